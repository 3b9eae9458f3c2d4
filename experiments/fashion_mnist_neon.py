"""Extrapolation after training (Neon; Alemohammad et al. 2025, arXiv:2510.03597) of a model of Fashion-MNIST.

    make sample EXP=fashion_mnist_10min ARGS="n=6000 format=npz out=OWN"
    make train EXP=fashion_mnist_neon ARGS="teacher=runs/fashion_mnist_10min/RUN samples=OWN/images.npz"
    make extrapolate EXP=fashion_mnist_neon ARGS="w=0.5,1,1.5,2"
    make eval EXP=fashion_mnist_10min ARGS="run=RUN params=runs/fashion_mnist_neon/.../extrapolated-w=1.0.npz"

The teacher goes on for a short while on samples that it has drawn itself; then its parameters are moved the other way,
as `training/extrapolate.py` has it. The best w is found by measuring: the distance against w is a parabola.
Data: the samples, and the teacher's held-out pictures, by which the log shows how the model gets worse.
Cost: 6,000 samples of 35 evaluations and 100 updates of 256 are 1.9 % of 10,000 updates of 512; `make extrapolate` says
what the run at hand took.
"""

from functools import partial
from pathlib import Path

import numpy as np
import optax

from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment, find_experiment
from diffusion_jax.training import ema
from diffusion_jax.training.data import Data
from diffusion_jax.training.teacher import Teacher, find_teacher, teacher_params, untrained_teacher
from diffusion_jax.typing import InputError

UNTRAINED = "fashion_mnist"  # what the arguments are explained with where no teacher is given; it cannot be trained


def experiment(
    *,
    teacher: str = "",
    teacher_ema: Amount | None = None,
    params: str = "",
    samples: str = "",
    width: Count | None = None,
    steps: Count = 100,
    batch: Count = 256,
    learning_rate: Amount = 1e-4,
    sigma_rel: Amount = 0.1,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 10,
    sample_every: Natural = 0,
    checkpoint_every: Natural = 0,
    data_dir: str | None = None,
) -> Experiment:
    """A trained model that goes on with its own samples, to be extrapolated from.

    Args:
        teacher: folder of the run whose model this is.
        teacher_ema: begin from the average of this relative width, put together from the snapshots of the teacher.
        params: begin from the parameters in this file, of make average.
        samples: the .npz of pictures and labels that the teacher drew: make sample format=npz.
        width: channels of the network at full resolution; by default the teacher's, which it has to be.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: Adam's, constant after a tenth of the steps.
        sigma_rel: relative width of the average over the updates that is extrapolated from.
        dispatch: steps sent to the device at once.
        seed: of the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default as the teacher.
    """
    known = _teacher(teacher, width, data_dir)
    base = known.experiment
    return Experiment(
        data=partial(_own_samples, known, samples),
        shape=base.shape,
        net=base.net,
        schedule=base.schedule,
        read=base.read,
        objective=base.objective,
        optimizer=optax.adam(optax.linear_schedule(0.0, learning_rate, max(steps // 10, 1))),
        ema=ema.power_function(sigma_rel),
        sampler=base.sampler,
        times=base.times,
        sample_steps=base.sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=base.null,
        drop=base.drop,
        guidance=base.guidance,
        flip=base.flip,
        prepare=base.prepare,
        decode=base.decode,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        start=partial(teacher_params, known, teacher_ema, params),
    )


def _teacher(folder: str, width: int | None, data_dir: str | None) -> Teacher:
    if not folder:
        return untrained_teacher(find_experiment(UNTRAINED), {}, width=width)
    known = find_teacher(folder, data_dir=data_dir)
    if width not in (None, known.arguments.get("width")):
        raise InputError(f"width={width}: the teacher's is {known.arguments.get('width')}; leave it out")
    return known


def _own_samples(known: Teacher, path: str) -> Data:
    """The samples as training data, beside what the teacher was judged by."""
    if known.folder is None or not path:
        raise InputError("give teacher=, the folder of a run, and samples=, the .npz of make sample format=npz from it")
    if not Path(path).is_file():
        raise InputError(f"samples={path} is not there: make sample format=npz makes it")
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"] if "labels" in file.files else None
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"samples={path} is no .npz of make sample: {error}") from None
    real = known.experiment.data()
    if images.shape[1:] != tuple(real.shape) or (real.classes and labels is None):
        raise InputError(f"samples={path} has pictures of {images.shape[1:]}, labels: {labels is not None}")
    train = {"image": images} | ({} if labels is None else {"label": labels.astype(np.int32)})
    return real._replace(train=train)
