"""Students that draw Fashion-MNIST in one or two evaluations, from a trained teacher or from the data alone.

    make train EXP=fashion_mnist_student ARGS="method=ect teacher=runs/fashion_mnist_10min/RUN"
    make train EXP=fashion_mnist_student ARGS="method=alphaflow teacher=runs/fashion_mnist_10min/RUN"
    make sample EXP=fashion_mnist_student ARGS="steps=1 n=100"

Data: the teacher's. Its network, parameters, formulation and data are read from its run; any run in EDM's formulation
will do, and no teacher means to train from scratch.
Methods: ect, easy consistency tuning (Geng et al. 2024, arXiv:2406.14548); meanflow (Geng et al. 2025,
arXiv:2505.13447); improved_meanflow (Geng et al. 2025, arXiv:2512.02012); alphaflow, MeanFlow by differences (Zhang et
al. 2025, arXiv:2510.20771); as `training/students.py` puts them. For all but the first the network gets a second
time, which changes nothing at first. Two evaluations are a step to the noise level `middle` and one from there: of a
consistency function with fresh noise in between, of an average velocity two jumps. A student of two times is still a
teacher: sampler=heun draws from the flow inside it.

Measured at toy size only, on a busy processor, one seed, 1,000 samples, Frechet distance in the features of
fashion_mnist (held-out data: 4.4). The teacher, EXP=fashion_mnist with width=8 batch=32 learning_rate=3e-3 dropout=0,
stopped at step 1,736 of 2,000: 170 at 35 evaluations. ect from it with batch=32 learning_rate=1e-3 stages=5, stopped
at step 371 of 500: 214 at one evaluation (1.26 times the teacher's), 153 at two (0.90 times). That says that the chain
works, and nothing of what a good teacher's student reaches. The average velocities have not been measured on pictures.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import consistency, draw_lognormal, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.distill import adaptive_error, improved_mean_flow_loss, mean_flow_loss, squared_error
from diffusion_jax.experiment import Experiment, find_experiment
from diffusion_jax.times import Draw
from diffusion_jax.training import ema, students
from diffusion_jax.training.teacher import Teacher, find_teacher, network_with, teacher_params, untrained_teacher
from diffusion_jax.typing import Array, InputError, Net, Params

UNTRAINED = "fashion_mnist"  # whose network and data a student has that learns without a teacher
SHAPE, SPREAD = (28, 28, 1), 0.7  # SPREAD: of the pixels in [-1, 1], for the angle of training/students.py
LOSSES = {"meanflow": mean_flow_loss, "improved_meanflow": improved_mean_flow_loss}


def experiment(
    *,
    method: Literal["ect", "meanflow", "improved_meanflow", "alphaflow"] = "ect",
    teacher: str = "",
    teacher_ema: Amount | None = None,
    params: str = "",
    width: Count | None = None,
    steps: Count = 10_000,
    batch: Count = 256,
    learning_rate: Amount = 3e-4,
    dropout: Amount | None = None,
    stages: Count = 8,
    noise_mean: float = -1.1,
    noise_std: Amount = 2.0,
    apart: Amount = 0.75,
    middle: Amount = 0.8,
    sample_steps: Count = 1,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 1000,
    checkpoint_every: Natural = 1000,
    snapshot_every: Natural = 0,
    data_dir: str | None = None,
) -> Experiment:
    """A few-step student on Fashion-MNIST.

    Args:
        method: ect learns a consistency function, the others an average velocity.
        teacher: folder of the run to begin from; without one the student learns from the data alone.
        teacher_ema: begin from the average of this relative width, put together from the snapshots of the teacher.
        params: begin from the parameters in this file, of make average or an extrapolation.
        width: channels of the network at full resolution; by default the teacher's, which it has to be.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: the largest; it warms up over 100 steps and falls to a tenth by a cosine.
        dropout: in the residual blocks; by default the teacher's.
        stages: in how many of them ect and alphaflow halve the distance of their two times during the run.
        noise_mean: of the logarithm of the noise levels that are drawn in training.
        noise_std: their standard deviation.
        apart: share of the examples of an average velocity whose two times differ.
        middle: noise level between two evaluations.
        sample_steps: evaluations of the network for a picture.
        dispatch: steps sent to the device at once.
        seed: of new parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        snapshot_every: steps between snapshots of the averages, 0 for none.
        data_dir: where tensorflow-datasets keeps its data; by default as the teacher.
    """
    known = _teacher(teacher, width=width, dropout=dropout, data_dir=data_dir)
    base = known.experiment
    draw = draw_lognormal(noise_mean, noise_std)
    if method == "ect":
        model = _consistency_function(base, draw, steps, stages, middle)
    else:
        both = students.draw_angles(draw, SPREAD, apart)
        model = _average_velocity(known, middle) | _objective(method, both, steps, stages)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps + 1, learning_rate / 10)
    return Experiment(
        data=base.data,
        shape=base.shape,
        optimizer=optax.adam(rate, b2=0.99),
        ema=(ema.power_function(0.1), ema.power_function(0.05)),
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=base.null,
        drop=base.drop,
        flip=base.flip,
        prepare=base.prepare,
        decode=base.decode,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
        start=partial(_start, known, model["net"], seed, teacher_ema, params) if teacher else None,
        **model,
    )


def _consistency_function(base: Experiment, draw: Draw, steps: int, stages: int, middle: float) -> dict[str, Any]:
    """What a student is that goes on with the teacher's denoiser as it is."""
    return {
        "net": base.net,
        "schedule": base.schedule,
        "read": base.read,
        "objective": students.easy_consistency(base.schedule, draw, steps, stages),
        "staged": True,
        "sampler": consistency(base.schedule),
        "times": partial(_levels, middle=middle),
    }


def _objective(method: str, both: Any, steps: int, stages: int) -> dict[str, Any]:
    schedule = students.angular(SPREAD)
    if method == "alphaflow":
        objective = students.alpha_flow(schedule, both, steps, stages, squared_error)
    else:
        objective = students.mean_flow(schedule, both, partial(LOSSES[method], metric=adaptive_error()))
    return {"objective": objective, "staged": method == "alphaflow"}


def _average_velocity(known: Teacher, middle: float) -> dict[str, Any]:
    """What a student is whose network gets a second time."""
    schedule = students.angular(SPREAD)
    return {
        "net": students.silent_vector(network_with(known, vector=2 * students.HARMONICS)),
        "schedule": schedule,
        "read": students.two_time_denoiser(known.experiment.read, SPREAD),
        "flow_map": students.flow_map_of(schedule),
        "sampler": heun(schedule),
        "times": lambda n: students.to_angle(_levels(n, middle), SPREAD),
    }


def _levels(n: int, middle: float) -> Array:
    """The noise levels of n evaluations, the grid of a teacher where they are more than two."""
    return karras(n, sigma_min=middle if n == 2 else 0.002)


def _teacher(folder: str, **changed: Any) -> Teacher:
    """The teacher in a folder, or an untrained one; InputError unless a student can go on with it."""
    if not folder:
        return untrained_teacher(find_experiment(UNTRAINED), {}, **changed)
    known = find_teacher(folder, **changed)
    trained = find_teacher(folder).arguments.get("width")
    if changed["width"] not in (None, trained):
        raise InputError(f"width={changed['width']}: the teacher's is {trained}; leave it out")
    t = jnp.asarray([0.01, 1.0, 50.0])
    if known.experiment.shape != SHAPE or not np.allclose(known.experiment.schedule(t), [np.ones(3), t]):
        raise InputError(f"teacher={folder} is not a model of Fashion-MNIST in EDM's formulation, sigma(t) = t")
    return known


def _start(known: Teacher, net: Net, seed: int, sigma_rel: float | None, file: str) -> Params:
    """The teacher's parameters, and those that `net` has besides."""
    params = teacher_params(known, sigma_rel, file)
    return params if net is known.experiment.net else students.with_vector(net, params, jax.random.key(seed))
