"""A feature network: a function, its weights with their hash, and a word for every choice that changes a number.

    features = net.apply(params, net.prepare(images)),   params, sha256 = net.load(path)                           (1)

`prepare` runs on the host: it checks the pictures and does what the protocol does before its network sees them, such as
Pillow's resize. `apply` is pure: jit it, with the pictures sharded over the devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.results import sha256
from diffusion_jax.typing import Array, InputError, Key, Params
from diffusion_jax.weights import files, torch_files, trees

Features = dict[str, Array]
"""Each f32[b, d]. "pooled" is what distances are measured in; the networks say what else they give."""


class Loaded(NamedTuple):
    """Parameters, and the sha256 of the file they came from: of its arrays, where they came from several files."""

    params: Params
    sha256: str


class FeatureNet(NamedTuple):
    """A feature network with its protocol.

    name: of the network and its input's numerics. resize: how a picture comes to its size; both go into `Protocol`.
    init: (key) -> random parameters, for tests and `jax.eval_shape`. load: (path) -> Loaded, from a file as published.
    prepare: (u8[b, h, w, 3]) -> u8[b, h', w', 3] on the host; InputError for other pictures, as in `pictures`.
    apply: (params, u8[b, h', w', 3]) -> Features.
    published: how the sha256 of the weights that numbers are published with begins; "" if there is no such file.
    """

    name: str
    resize: str
    init: Callable[[Key], Params]
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Params, Array], Features]
    load: Callable[[str | os.PathLike[str]], Loaded]
    published: str = ""


def pictures(images: Any) -> np.ndarray:
    """The same array if it is `u8[b, h, w, 3]`, else InputError that says what it is instead and what to do.

    >>> pictures(np.zeros((2, 8, 8, 1), np.uint8))
    Traceback (most recent call last):
        ...
    diffusion_jax.typing.InputError: pictures are u8[b, h, w, 3], these have 1 channel: repeat grey three times
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise InputError(f"pictures are u8[b, h, w, 3], these are {images.dtype}: {_what_they_are(images)}")
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise InputError(f"pictures are u8[b, h, w, 3], these are {list(images.shape)}")
    if images.shape[3] != 3:
        c = images.shape[3]
        advice = {1: ": repeat grey three times", 4: ": drop the opacity"}.get(c, "")
        raise InputError(f"pictures are u8[b, h, w, 3], these have {c} channel{'s' if c > 1 else ''}{advice}")
    return images


def to_pictures(x: Any) -> np.ndarray:
    """Pixels in [-1, 1] as bytes, floor(127.5 x + 128) up to 255, as EDM stores samples: f[...] -> u8[...].

    InputError for NaN, infinities and values outside [-1, 1] by more than a half: those are no clipped samples.
    """
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all() or (x.size and np.abs(x).max() > 1.5):
        raise InputError(f"pixels should be in [-1, 1], these are not: {_what_they_are(x)}")
    return np.clip(x * np.float32(127.5) + 128, 0, 255).astype(np.uint8)


def _what_they_are(images: np.ndarray) -> str:
    if images.size == 0 or not np.issubdtype(images.dtype, np.number):
        return "no numbers"
    bad = int((~np.isfinite(images)).sum())
    if bad:
        return f"{bad} of {images.size} values are not finite"
    return f"values from {images.min():.4g} to {images.max():.4g}; `to_pictures` rounds pixels in [-1, 1]"


def named(network: str, precision: str) -> str:
    """A network's name, with its precision where that is not the references' float32.

    >>> named("clip", "highest"), named("clip", "tensorfloat32")
    ('clip', 'clip tensorfloat32')
    """
    return network if precision == "highest" else f"{network} {precision}"


def check_traced(images: Array) -> None:
    """ValueError, when a program is traced, for arrays that `pictures` would refuse."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"pictures are u8[b, h, w, 3], got {images.dtype}{list(images.shape)}")


def normalised(x: Array, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Array:
    """(x / 255 - mean) / deviation for each channel of `f32[b, h, w, 3]`."""
    m, d = (jnp.asarray(v, jnp.float32)[None, None, None, :] for v in (mean, deviation))
    return (x / 255 - m) / d


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a file of weights by name, and a sha256; nothing in the file can run.

    .safetensors, its index or a folder with either; .npz; .pth, .pt, .bin, .ckpt of torch. InputError for others.
    """
    path = Path(path).expanduser()
    if path.suffix in torch_files.SUFFIXES:
        return torch_files.load(path), sha256(path)
    if path.suffix == ".npz":
        return _read_npz(path), sha256(path)
    state = files.load(path)
    file = files.find(path)
    return state, sha256(file if file.suffix == files.SUFFIX else state)


def loader(
    what: str, init: Callable[[Key], Params], table: Callable[[Mapping[str, np.ndarray], Any], Params]
) -> Callable[[str | os.PathLike[str]], Loaded]:
    """`FeatureNet.load` from a table of weights: (state, params_like) -> params, ValueError for another network's."""

    def load(path: str | os.PathLike[str]) -> Loaded:
        like = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        state, digest = read_state(path)
        try:
            params = table(state, like)
        except ValueError as error:
            differences = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
            raise InputError(f"{path} does not hold {what}: {'; '.join(differences[:6])}{more}") from None
        ill = [".".join(name) for name, value in trees.leaves(params) if not np.isfinite(value).all()]
        if ill:
            raise InputError(f"{path}: numbers of {', '.join(ill[:4])}{' …' if len(ill) > 4 else ''} are not finite")
        return Loaded(params, digest)

    return load


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except Exception as error:  # whatever NumPy's reader of damaged archives comes to raise
        raise InputError(f"{path} cannot be read as arrays ({' '.join(str(error).split())})") from None
