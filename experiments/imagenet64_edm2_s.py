"""EDM2-S on ImageNet at 64x64 (Karras et al. 2024, arXiv:2312.02696), class-conditional, 280.2M parameters.

    make train EXP=imagenet64_edm2_s ARGS="path=FOLDER accumulate=16"
    make sample EXP=imagenet64_edm2_s ARGS="n=50000 format=npz"
    make plan EXP=imagenet64_edm2_s TOPOLOGY=v5e:16x16

The paper's setting (table 6, ImageNet-64, S): config G with forced weight normalization and learned uncertainty,
sigma log-normal with P_mean -0.8 and P_std 1.6, batch 2048, Adam with beta_2 0.99, rate 0.0100 after a warm-up over 10M
pictures and falling as 1 / sqrt(step) from step 35,000 on, no dropout, no augmentation, labels always given, averages
by power functions of relative widths 0.05 and 0.10 kept every 8.4M pictures for reconstruction of others, 1,074M
pictures; Heun's sampler in 32 steps (63 evaluations). It differs in bfloat16 where the paper has float16.
To guide without a second network, train with drop=0.1.

Cost: 1,074M pictures, which the paper's machines of eight GPUs take days for; `make plan` prints memory and time for
yours, and `accumulate` and `remat` fit the batch to it. The averages kept are 128 times 1.1 GB.
Expected: the paper reports FID 1.58 with an average of the best width. Not measured here.
Data: ImageNet (ILSVRC 2012), for which image-net.org asks registration: FOLDER/train/n01440764/*.JPEG, or prepared by
tensorflow-datasets. With `size` and `classes` it runs on any other folder of class folders.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp

from diffusion_jax import denoising_loss, draw_lognormal, edm, edm_precondition, edm_weight, heun, karras
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import edm2, forced_weight_norm
from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.sources import imagenet
from diffusion_jax.training.step import make_objective


def experiment(
    *,
    width: Count = 192,
    blocks: Count = 3,
    size: Count = 64,
    classes: Count = 1000,
    steps: Count = 524_288,
    batch: Count = 2048,
    accumulate: Count = 1,
    learning_rate: Amount = 0.01,
    decay_from: Count = 35_000,
    dropout: Amount = 0.0,
    drop: Amount = 0.0,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    remat: Literal["none", "dots", "full"] = "none",
    sample_steps: Count = 32,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 8192,
    checkpoint_every: Natural = 4096,
    snapshot_every: Natural = 4096,
    path: str | None = None,
) -> Experiment:
    """Class-conditional ImageNet at 64 pixels, EDM2-S.

    Args:
        width: channels that the network's levels are multiples of: 192 is S, 256 M, 320 L, 384 XL.
        blocks: residual blocks a level.
        size: pixels a side, a multiple of 8.
        classes: that the data has.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: Adam's at its highest, after a warm-up over 10M pictures.
        decay_from: the update from which the rate falls as one over the root of their number.
        dropout: in the residual blocks; the paper has 0.1 from M on.
        drop: probability that a label is left out in training, for guidance by the same network.
        precision: of the network's arithmetic; parameters stay float32.
        remat: what the backward pass keeps of each block: everything, matrix products, or nothing but its input.
        sample_steps: noise levels of the sampler, two evaluations each.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        snapshot_every: steps between averages that are kept for reconstruction, 0 for none.
        path: folder of the pictures, by default IMAGENET_DIR or where tensorflow-datasets keeps its data.
    """
    schedule, spread, shape = edm(), 0.5, (size, size, 3)
    rate = optimizers.inverse_sqrt(learning_rate, decay_from, warmup=-(-10_000_000 // batch))
    return Experiment(
        data=lambda: imagenet(size, path),
        shape=shape,
        net=edm2(
            shape,
            channels=width,
            blocks=blocks,
            attention=(size // 4, size // 8),
            dropout=dropout,
            classes=classes,
            uncertainty=True,
            dtype=jnp.dtype(precision),
            remat=remat,
        ),
        schedule=schedule,
        read=lambda net: edm_precondition(net, schedule, spread, uncertainty=True),
        objective=make_objective(
            schedule, draw_lognormal(-0.8, 1.6), partial(denoising_loss, target="x0", weight=edm_weight(spread))
        ),
        optimizer=optimizers.projected(optimizers.adamw(rate, b2=0.99), forced_weight_norm),
        ema=(ema.power_function(0.05), ema.power_function(0.10)),
        sampler=heun(schedule),
        times=karras,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=classes,
        drop=drop,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        snapshot_every=snapshot_every,
    )
