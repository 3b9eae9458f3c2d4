"""DDPM on CIFAR-10, the paper's setting (Ho, Jain & Abbeel 2020, arXiv:2006.11239, section 4 and appendix B).

    make train EXP=cifar10
    make sample EXP=cifar10 ARGS="n=50000 format=npz"
    make train EXP=cifar10 ARGS="learned_variance=True"    Improved DDPM's variance and hybrid loss instead

To the letter: 35.7M-parameter U-Net, T = 1000, linear betas from 1e-4 to 0.02, eps-prediction with L_simple, Adam at
2e-4, batch 128, dropout 0.1, random flips, average of decay 0.9999, 800,000 steps; sampling by ancestral steps of the
larger variance with x0 clipped to [-1, 1]. The warm-up over 5,000 steps and the clipping of gradients to norm 1 are
not in the paper's text but in its published code.

Cost, as the paper reports it: 10.6 hours on a TPU v3-8 (21 steps a second), and 17 s for 256 samples.
Expected: the paper reports FID 3.17 and Inception score 9.46 for 50,000 samples. Not measured here.
Data: CIFAR-10, 170 MB, downloaded once by tensorflow-datasets, or from an archive placed where its error message says.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
import optax

from diffusion_jax import (
    ancestral,
    ddpm,
    denoising_loss,
    discrete_time,
    draw_discrete,
    from_betas,
    hybrid_loss,
    linear_betas,
    parameterize,
    trailing,
)
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema
from diffusion_jax.training.sources import tfds_images
from diffusion_jax.training.step import make_objective

SHAPE = (32, 32, 3)


def experiment(
    *,
    width: Count = 128,
    table: Count = 1000,
    learned_variance: bool = False,
    steps: Count = 800_000,
    batch: Count = 128,
    accumulate: Count = 1,
    learning_rate: Amount = 2e-4,
    warmup: Natural = 5000,
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
    """Unconditional CIFAR-10, the DDPM paper's setting.

    Args:
        width: channels of the U-Net at full resolution.
        table: T, the number of noise levels.
        learned_variance: learn the reverse variance too, by the hybrid loss (Nichol & Dhariwal 2021, arXiv:2102.09672).
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: Adam's, after the warm-up.
        warmup: steps over which it grows from zero.
        dropout: in the residual blocks.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: of the T levels, how many sampling visits.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    schedule = from_betas(linear_betas(table))
    return Experiment(
        data=lambda: tfds_images("cifar10", data_dir)._replace(classes=()),
        shape=SHAPE,
        net=unet(SHAPE, channels=width, dropout=dropout, learned_variance=learned_variance, dtype=jnp.dtype(precision)),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "eps", discrete_time(table), learned_variance),
        objective=make_objective(
            schedule, draw_discrete(table), partial(hybrid_loss, table=table) if learned_variance else denoising_loss
        ),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, learning_rate, max(1, warmup)))
        ),
        ema=ema.constant(0.9999),
        sampler=ancestral(schedule) if learned_variance else ddpm(schedule, variance="large"),
        times=lambda n: trailing(n, table),
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        clip=True,
        learned_variance=learned_variance,
        flip=True,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
