"""Fashion-MNIST, 28x28, class-conditional, in EDM's formulation with the DDPM U-Net.

    make train EXP=fashion_mnist                               on a GPU or TPU
    make train EXP=fashion_mnist ARGS="width=32 steps=4000"    on a patient laptop

Data: 60,000 pictures of clothing, 30 MB, downloaded once by tensorflow-datasets. Without a network: Debian's and
Ubuntu's package dataset-fashion-mnist is found by itself; otherwise the error says which files to put where.
Cost and quality: not measured yet on a GPU; width 64 has 6.5M parameters.
Method: Karras et al. 2022, arXiv:2206.00364 (preconditioning, loss, noise levels, Heun's sampler in 18 steps).
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
import optax

from diffusion_jax import denoising_loss, draw_lognormal, edm, edm_precondition, edm_weight, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Net

SHAPE, CLASSES = (28, 28, 1), 10


def network(*, width: int, dropout: float, precision: str, vector: int | None = None) -> Net:
    """The network, which a student of two times also gives a vector."""
    return unet(
        SHAPE,
        channels=width,
        multipliers=(1, 2, 2),
        attention=(7,),
        dropout=dropout,
        classes=CLASSES,
        vector=vector,
        dtype=jnp.dtype(precision),
    )


def experiment(
    *,
    width: Count = 64,
    steps: Count = 20_000,
    batch: Count = 256,
    learning_rate: Amount = 1e-3,
    dropout: Amount = 0.1,
    precision: Literal["float32", "bfloat16"] = "float32",
    sample_steps: Count = 18,
    guidance: float = 1.0,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 1000,
    checkpoint_every: Natural = 1000,
    data_dir: str | None = None,
) -> Experiment:
    """Class-conditional Fashion-MNIST.

    Args:
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: the largest; it warms up over 500 steps and falls to zero by a cosine.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: noise levels of the sampler, two evaluations each.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    schedule, spread = edm(), 0.7  # the standard deviation of the pixels in [-1, 1]
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(500, steps // 10), steps + 1)
    return Experiment(
        data=lambda: tfds_images("fashion_mnist", data_dir),
        shape=SHAPE,
        net=network(width=width, dropout=dropout, precision=precision),
        schedule=schedule,
        read=lambda net: edm_precondition(lambda x, t, cond: net(x, 250 * t, cond), schedule, spread),
        objective=make_objective(
            schedule, draw_lognormal(), partial(denoising_loss, target="x0", weight=edm_weight(spread))
        ),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        ema=ema.warmup(0.9995),
        sampler=heun(schedule),
        times=karras,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=CLASSES,
        drop=0.1,
        guidance=guidance,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
