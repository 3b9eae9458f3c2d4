"""CIFAR-10 against the clock: how long one GPU needs to FID 5.0, 3.17, 2.5 and 2.0. The claim is open.

    make train EXP=cifar10_speedrun
    make eval EXP=cifar10_speedrun ARGS="metrics=fid n=50000 batch=512 weights=pt_inception-2015-12-05-6726825d.pth"

The protocol: one GPU; the clock runs from the start of the command to the end of the update whose average is measured,
compilation, data and checkpoints included; FID by Inception's features in TensorFlow's numerics, 50,000 samples of one
seed against the 50,000 training pictures, no choice among seeds; unconditional, from random parameters, on CIFAR-10's
training set alone. Sampling and measuring are off the clock. A time to each FID comes from the snapshots of one run:

    make eval EXP=cifar10_speedrun ARGS="metrics=fid n=50000 ema=0.05 checkpoint=STEP weights=..."

and the first of them that is low enough; its wall-clock time is that of the file runs/cifar10_speedrun/RUN/averages/
STEP-0.05.npz after the run's experiment.json.

Recipe: that of `fashion_mnist_10min` (EDM's formulation, U-Net, bfloat16, batches of 512, cosine to zero, averages of
relative widths 0.05 and 0.1 with snapshots, 50 steps a dispatch, data on the device), with DDPM++ of widths 128
and 256 in three blocks a level, mirroring, and steps meant for FID 5.0: for the lower ones give more.
Time, a prediction: EDM's network of 126.8 GFLOP a picture and update trains 3,064 pictures a second on an H100; this
one has 52.2 and should reach 6,800: 20,000 updates of 512 in 25 minutes.
Data: CIFAR-10, 170 MB, downloaded once by tensorflow-datasets, or from an archive placed where its error message says.
Quality: not measured; EDM with augmentation needs 200M pictures for FID 1.97.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from diffusion_jax import denoising_loss, draw_lognormal, edm, edm_precondition, edm_weight, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import ddpmpp
from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.training.step import make_objective

SHAPE, SPREAD = (32, 32, 3), 0.5


def experiment(
    *,
    width: Count = 128,
    blocks: Count = 3,
    steps: Count = 20_000,
    batch: Count = 512,
    optimizer: Literal["adamw", "muon"] = "adamw",
    learning_rate: Amount = 1e-3,
    dropout: Amount = 0.1,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    noise_mean: float = -1.2,
    noise_std: Amount = 1.2,
    sample_steps: Count = 18,
    dispatch: Count = 50,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 2500,
    checkpoint_every: Natural = 2500,
    snapshot_every: Natural = 1000,
    data_dir: str | None = None,
) -> Experiment:
    """CIFAR-10 against the clock.

    Args:
        width: channels at full resolution, half of those below.
        blocks: residual blocks a level.
        steps: updates to make.
        batch: pictures an update.
        optimizer: adamw, or muon for the kernels with steps as large as Adam's.
        learning_rate: the largest; it warms up over a twentieth of the steps and falls to zero by a cosine.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        noise_mean: of the logarithm of the noise levels that are drawn in training.
        noise_std: their standard deviation.
        sample_steps: noise levels of the sampler, two evaluations each.
        dispatch: steps sent to the device at once; 1 on a CPU, where XLA is slow within loops.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        snapshot_every: steps between snapshots of the averages, 0 for none.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    schedule = edm()
    rate = optimizers.cosine(learning_rate, steps, steps // 20)
    adam = optimizers.adamw(rate, b2=0.99)
    return Experiment(
        data=lambda: tfds_images("cifar10", data_dir)._replace(classes=()),
        shape=SHAPE,
        net=ddpmpp(
            SHAPE, channels=width, multipliers=(1, 2, 2), blocks=blocks, dropout=dropout, dtype=jnp.dtype(precision)
        ),
        schedule=schedule,
        read=lambda net: edm_precondition(net, schedule, SPREAD),
        objective=make_objective(
            schedule,
            draw_lognormal(noise_mean, noise_std),
            partial(denoising_loss, target="x0", weight=edm_weight(SPREAD)),
        ),
        optimizer=optimizers.clip(optimizers.muon(rate, rms=0.2, adam=adam) if optimizer == "muon" else adam, 1.0),
        ema=(ema.power_function(0.05), ema.power_function(0.1)),
        sampler=heun(schedule),
        times=karras,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        flip=True,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
    )
