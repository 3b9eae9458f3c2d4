"""EDM on CIFAR-10 (Karras et al. 2022, arXiv:2206.00364), unconditional, with the 55.7M-parameter DDPM++ network.

    make train EXP=cifar10_edm ARGS="precision=bfloat16"
    make sample EXP=cifar10_edm ARGS="n=50000 format=npz"

The paper's setting (table 7, VP column): preconditioning and loss of table 1, Adam at 1e-3 after a warm-up over 10M
pictures, batch 512, dropout 0.13, average with a half-life of 0.5M pictures and a 5 % ramp, 200M pictures; Heun's
sampler in 18 steps (35 evaluations). It differs in one thing: mirror flips instead of the paper's non-leaky
augmentation with conditioning, which is still to come.

Cost: 200M pictures; `python benchmarks/gpu.py` prints pictures a second on the device at hand.
Expected: with its augmentation the paper reports FID 1.97. Not measured here.
Data: CIFAR-10, 170 MB, downloaded once by tensorflow-datasets, or from an archive placed where its error message says.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
import optax

from diffusion_jax import denoising_loss, draw_lognormal, edm, edm_precondition, edm_weight, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import ddpmpp
from diffusion_jax.training import ema
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.training.step import make_objective

SHAPE = (32, 32, 3)


def experiment(
    *,
    width: Count = 128,
    blocks: Count = 4,
    steps: Count = 390_625,
    batch: Count = 512,
    accumulate: Count = 1,
    learning_rate: Amount = 1e-3,
    dropout: Amount = 0.13,
    precision: Literal["float32", "bfloat16"] = "float32",
    sample_steps: Count = 18,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 5000,
    checkpoint_every: Natural = 2500,
    data_dir: str | None = None,
) -> Experiment:
    """Unconditional CIFAR-10, EDM's setting.

    Args:
        width: channels that the network's levels are multiples of.
        blocks: residual blocks a level.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: Adam's, after a warm-up over 10M pictures.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: noise levels of the sampler, two evaluations each.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    schedule, spread = edm(), 0.5
    warmup = -(-10_000_000 // batch)
    return Experiment(
        data=lambda: tfds_images("cifar10", data_dir)._replace(classes=()),
        shape=SHAPE,
        net=ddpmpp(SHAPE, channels=width, blocks=blocks, dropout=dropout, dtype=jnp.dtype(precision)),
        schedule=schedule,
        read=lambda net: edm_precondition(net, schedule, spread),
        objective=make_objective(
            schedule, draw_lognormal(-1.2, 1.2), partial(denoising_loss, target="x0", weight=edm_weight(spread))
        ),
        optimizer=optax.adam(optax.linear_schedule(0.0, learning_rate, warmup)),
        ema=ema.half_life(500_000, batch),
        sampler=heun(schedule),
        times=karras,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        flip=True,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
