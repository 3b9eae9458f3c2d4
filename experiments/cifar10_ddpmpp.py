"""Score SDE on CIFAR-10: DDPM++ in continuous time, variance preserving (Song et al. 2021, arXiv:2011.13456).

    make train EXP=cifar10_ddpmpp ARGS="precision=bfloat16"
    make sample EXP=cifar10_ddpmpp ARGS="n=50000 format=npz"
    make sample EXP=cifar10_ddpmpp ARGS="sampler=heun steps=50"    the probability flow

The paper's setting (section 4.2, appendix H, "DDPM++ cont. (VP)"): beta(t) linear from 0.1 to 20, t uniform on
[1e-5, 1], the eps-loss, Adam at 2e-4 after 5,000 steps of warm-up, gradients clipped to norm 1, batch 128, dropout
0.1, average of decay 0.9999, 1.3M steps; ancestral sampling in 1,000 steps.

Expected: the paper reports FID 2.55 with its predictor-corrector sampler. Not measured here.
Data: CIFAR-10, 170 MB, downloaded once by tensorflow-datasets, or from an archive placed where its error message says.
"""

from typing import Literal

import jax.numpy as jnp
import optax

from diffusion_jax import ddpm, denoising_loss, draw_uniform, parameterize, uniform, vp_linear
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
    steps: Count = 1_300_000,
    batch: Count = 128,
    accumulate: Count = 1,
    learning_rate: Amount = 2e-4,
    dropout: Amount = 0.1,
    precision: Literal["float32", "bfloat16"] = "float32",
    sample_steps: Count = 1000,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 10_000,
    checkpoint_every: Natural = 5000,
    data_dir: str | None = None,
) -> Experiment:
    """Unconditional CIFAR-10, the score SDE paper's continuous variance-preserving setting.

    Args:
        width: channels that the network's levels are multiples of.
        blocks: residual blocks a level.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: Adam's, after 5,000 steps of warm-up.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: equal steps of the sampler.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    schedule = vp_linear(0.1, 20.0)
    return Experiment(
        data=lambda: tfds_images("cifar10", data_dir)._replace(classes=()),
        shape=SHAPE,
        net=ddpmpp(
            SHAPE,
            channels=width,
            multipliers=(1, 2, 2, 2),
            blocks=blocks,
            dropout=dropout,
            dtype=jnp.dtype(precision),
        ),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "eps", time=lambda t: 999 * t),
        objective=make_objective(schedule, draw_uniform(1e-5, 1.0), denoising_loss),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, learning_rate, 5000))
        ),
        ema=ema.constant(0.9999),
        sampler=ddpm(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        clip=True,
        flip=True,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
