"""The first stage of latent diffusion: a trained autoencoder, from the run that trained it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.training.data import Data, prepare, size, take, to_uint8
from diffusion_jax.training.latents import Encoding, encode_to_store, read_header, weights_digest
from diffusion_jax.training.latents import latents as read_latents
from diffusion_jax.training.teacher import find_teacher, network_with, teacher_params
from diffusion_jax.typing import Array, InputError, Params


class FirstStage(NamedTuple):
    """encode: (params, x) -> (mean, logvar); decode: (params, z) -> x; its data; the shape of x."""

    encode: Callable[[Params, Array], Any]
    decode: Callable[[Params, Array], Array]
    params: Params
    data: Callable[[], Data]
    shape: tuple[int, ...]


@functools.cache
def first_stage(run: str) -> FirstStage:
    """The autoencoder in the folder of a run of experiments/autoencoder.py; InputError for another folder."""
    teacher = find_teacher(run)
    shape = teacher.experiment.shape
    network: Any = network_with(teacher, channels=shape[-1])
    params = teacher_params(teacher)
    if not isinstance(params, dict) or "autoencoder" not in params:
        raise InputError(f"autoencoder={run}: that run trained no autoencoder")
    return FirstStage(network.encode, network.decode, params["autoencoder"], teacher.experiment.data, shape)


def measured_scale(stage: FirstStage, n: int = 1024, batch: int = 64) -> float:
    """1 / (standard deviation of z) over the first n training pictures, all channels together."""
    source = stage.data().train
    encode = jax.jit(lambda params, images: stage.encode(params, prepare(images)))
    squares, total, count = 0.0, 0.0, 0
    for start in range(0, min(n, size(source)) // batch * batch or 1, batch):
        rows = np.arange(start, min(start + batch, size(source)))
        mean, logvar = (np.asarray(a, np.float64) for a in encode(stage.params, take(source, rows)["image"]))
        squares, total, count = squares + np.sum(mean**2 + np.exp(logvar)), total + np.sum(mean), count + mean.size
    return float(1 / np.sqrt(squares / count - (total / count) ** 2))


def decoder(stage: FirstStage, scale: float) -> Callable[[Array], Array]:
    """Latents x = scale z -> pictures u8; the parameters are leaves of the function, so that programs take them."""
    return jax.tree_util.Partial(
        lambda params, x: to_uint8(stage.decode(params, x / jnp.float32(scale))), jax.device_put(stage.params)
    )


def latents_of(stage: FirstStage, folder: Path, scale: float, source: str) -> Data:
    """The latents of the data that an autoencoder was trained on, encoded into a folder when they are first asked for.

    Of several processes none encodes: InputError that says what to do.
    """
    complete = (folder / "header.json").is_file() and read_header(folder)["complete"]
    if not complete and jax.process_count() > 1:
        raise InputError(f"there are no latents in {folder}: begin once with one process, which writes them")
    if not complete:
        encode_to_store(Encoding(stage.data, source, stage.encode, stage.params, scale, folder, mirror=False))
    return read_latents(folder, weights=weights_digest(stage.params), scale=scale)


@functools.cache
def scale_of(run: str, folder: Path) -> float:
    """The scale of the latents of a run in their store, or, where there is none yet, the one that it will have."""
    if (folder / "header.json").is_file():
        return float(read_header(folder)["scale"])
    with jax.ensure_compile_time_eval():  # also where a program that asks for it is being traced
        return measured_scale(first_stage(run))
