"""Your own pictures: any sizes, PNG, JPEG or WebP, classes by subfolder.

    make train EXP=folder ARGS="path=photos size=32"
    make sample EXP=folder ARGS="n=64 guidance=2"

path/*.jpg trains an unconditional model, path/CLASS/*.jpg a class-conditional one. Pictures are cropped to their
central square and resized once.
Method: v-prediction on the cosine schedule (Salimans & Ho 2022, arXiv:2202.00512), DPM-Solver++(2M) in 30 steps.
"""

from functools import partial
from typing import Literal

import jax.numpy as jnp
import optax

from diffusion_jax import cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema
from diffusion_jax.training.sources import folder_classes, image_folder
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import InputError


def experiment(
    *,
    path: str,
    size: Count = 64,
    channels: Literal[1, 3] = 3,
    width: Count = 64,
    steps: Count = 20_000,
    batch: Count = 64,
    accumulate: Count = 1,
    learning_rate: Amount = 3e-4,
    dropout: Amount = 0.1,
    flip: bool = True,
    precision: Literal["float32", "bfloat16"] = "float32",
    sample_steps: Count = 30,
    guidance: float = 1.0,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 50,
    sample_every: Natural = 1000,
    checkpoint_every: Natural = 500,
) -> Experiment:
    """A folder of your own pictures.

    Args:
        path: the folder.
        size: pixels a side, a multiple of 8.
        channels: 3 for colour, 1 for grey.
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: the largest; it warms up over 500 steps and falls to zero by a cosine.
        dropout: in the residual blocks.
        flip: mirror pictures at random; not for text or anything with a left and a right.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: network evaluations for a picture.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    if size < 8 or size % 8:
        raise InputError(f"size={size} is not possible: it must be a multiple of 8")
    classes = len(folder_classes(path)) or None
    schedule, shape = cosine(), (size, size, channels)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(500, steps // 10), steps + 1)
    return Experiment(
        data=lambda: image_folder(path, size=size, channels=channels),
        shape=shape,
        net=unet(
            shape,
            channels=width,
            multipliers=(1, 2, 2, 4),
            attention=(size // 4, size // 8) if size <= 64 else (size // 8,),
            dropout=dropout,
            classes=classes,
            dtype=jnp.dtype(precision),
        ),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
        objective=make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        ema=ema.warmup(0.999),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=classes,
        drop=0.1 if classes else 0.0,
        guidance=guidance,
        flip=flip,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
