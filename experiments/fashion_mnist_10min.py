"""Fashion-MNIST in ten minutes on one H100: class-conditional, or with classes=False unconditional.

    make train EXP=fashion_mnist_10min                                       ten minutes, compilation included
    make eval EXP=fashion_mnist_10min ARGS="features=fashion_mnist metrics=fd,kd,c2st,copy,authenticity n=10000 seeds=3"
    python benchmarks/fashion_mnist_10min.py --size full                     everything there is to measure, unattended
    make train EXP=fashion_mnist_10min ARGS="width=16 blocks=1 steps=1000 batch=64 precision=float32 dispatch=1"
                                                                             a few minutes on a CPU

Recipe: EDM's formulation (Karras et al. 2022, arXiv:2206.00364: preconditioning, loss, noise levels, Heun's sampler in
18 steps), the U-Net of Ho et al. 2020 with widths 128 and 256, bfloat16, batches of 512, a learning rate that falls to
zero by a cosine, power-function averages of relative widths 0.05 and 0.1 with snapshots, 50 steps a dispatch, the data
on the device. No mirroring: shoes point one way, and so should samples. No augmentation as a condition either: at 5
million pictures, 85 passes, dropout is enough against overfitting at this size.

Time, a prediction and not a measurement: 26.4 GFLOP a picture and update (8.8 forwards, times three) at 300 TFLOP/s,
where a network of this kind with the same widths was seen to reach 390 at 32x32, are 11,300 pictures a second; 10,000
updates of 512 take 450 s, and leave 150 s for compilation (54 s cold for a network twice this size), four checkpoints
and the sample grids. 50,000 samples of 35 evaluations are 15.4 PFLOP: 50 s at the same rate.
Data: 60,000 pictures of clothing, 30 MB, downloaded once by tensorflow-datasets, or from Debian's package
dataset-fashion-mnist.
Quality: not measured on a GPU yet; docs/evaluation-fashion-mnist.md has what ran.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from diffusion_jax import denoising_loss, draw_lognormal, edm, edm_precondition, edm_weight, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.data import Data
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Net

SHAPE, CLASSES, SPREAD = (28, 28, 1), 10, 0.7  # SPREAD: the standard deviation of the pixels in [-1, 1]


def network(
    *, width: int, blocks: int, dropout: float, precision: str, classes: bool, vector: int | None = None
) -> Net:  # fmt: skip
    """The network, which a student of two times also gives a vector."""
    return unet(
        SHAPE,
        channels=width,
        multipliers=(1, 2, 2),
        blocks=blocks,
        attention=(7,),
        dropout=dropout,
        classes=CLASSES if classes else None,
        vector=vector,
        dtype=jnp.dtype(precision),
    )


def experiment(
    *,
    width: Count = 128,
    blocks: Count = 2,
    classes: bool = True,
    steps: Count = 10_000,
    batch: Count = 512,
    optimizer: Literal["adamw", "muon"] = "adamw",
    learning_rate: Amount = 1e-3,
    dropout: Amount = 0.1,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    noise_mean: float = -1.2,
    noise_std: Amount = 1.2,
    sample_steps: Count = 18,
    guidance: float = 1.0,
    dispatch: Count = 50,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 2500,
    checkpoint_every: Natural = 2500,
    snapshot_every: Natural = 1000,
    data_dir: str | None = None,
) -> Experiment:
    """Fashion-MNIST in ten minutes.

    Args:
        width: channels of the U-Net at full resolution.
        blocks: residual blocks a level.
        classes: conditional on the class, a tenth of the time without it.
        steps: updates to make.
        batch: pictures an update.
        optimizer: adamw, or muon for the kernels with steps as large as Adam's.
        learning_rate: the largest; it warms up over a twentieth of the steps and falls to zero by a cosine.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        noise_mean: of the logarithm of the noise levels that are drawn in training.
        noise_std: their standard deviation.
        sample_steps: noise levels of the sampler, two evaluations each.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
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
        data=partial(_data, data_dir, classes),
        shape=SHAPE,
        net=network(width=width, blocks=blocks, dropout=dropout, precision=precision, classes=classes),
        schedule=schedule,
        read=lambda net: edm_precondition(lambda x, t, cond: net(x, 250 * t, cond), schedule, SPREAD),
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
        null=CLASSES if classes else None,
        drop=0.1 if classes else 0.0,
        guidance=guidance if classes else 1.0,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
    )


def _data(data_dir: str | None, classes: bool) -> Data:
    data = tfds_images("fashion_mnist", data_dir)
    return data if classes else data._replace(classes=())
