"""The frozen classifier of Fashion-MNIST, whose features stand where FID has Inception's.

Five 3x3 convolutions with group normalization (GN, 8 groups) and SiLU, and two linear layers:

    h = silu GN C_32 x,   pool,   silu GN C_64 silu GN C_64 h,   pool,   the same with C_128       f32[b, 7, 7, 128] (1)
    features = silu(U h + u),   U over all places and channels                                     f32[b, 128]       (2)
    logits = W features + w                                                                        f32[b, 10]        (3)

x are pixels in [-1, 1]; pool halves the size by the mean of neighbours. As U weighs each place for itself, the features
know where things are; a mean over the pixels would not. The weights ship with the package; they were
made by `python tools/train_fashion_classifier.py`, with the real training set and fixed seeds, and never change: a
number measured in other features is another number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.features import net
from diffusion_jax.nets import layers
from diffusion_jax.typing import Array, InputError, Key, Params
from diffusion_jax.weights import trees

SHAPE, CLASSES, STAGES, GROUPS, PLACES = (28, 28, 1), 10, ((32,), (64, 64), (128, 128)), 8, 49
WEIGHTS = Path(__file__).parent / "fashion_mnist.npz"
SHA256 = "be379572f51353e14527140ab07883ffe9a3b3511a9f3584efe1dcfcabcf9aaa"
"""Of that file: `load` takes no other."""


def fashion_mnist() -> net.FeatureNet:
    """The feature network: pictures u8[b, 28, 28, 1] -> "pooled" of (2) and "logits" of (3).

    load(WEIGHTS) gives the frozen parameters; InputError for a file with another sha256.
    """

    def prepare(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != SHAPE:
            raise InputError(f"pictures of Fashion-MNIST are u8[b, 28, 28, 1], got {images.dtype}{list(images.shape)}")
        return images

    def apply(params: Params, images: Array) -> net.Features:
        if images.dtype != jnp.uint8 or images.shape[1:] != SHAPE:
            raise ValueError(f"pictures of Fashion-MNIST are u8[b, 28, 28, 1], got {images.dtype}{list(images.shape)}")
        with jax.default_matmul_precision("highest"):
            pooled = hidden(params, pixels(images))
            return {"pooled": pooled, "logits": logits(params, pooled)}

    return net.FeatureNet("fashion_mnist", "none", init, prepare, apply, load)


def load(path: str | os.PathLike[str] = WEIGHTS) -> net.Loaded:
    """The frozen parameters; InputError unless the file is the one that ships, to the last bit."""
    loaded = net.loader("the frozen classifier of Fashion-MNIST", init, _from_dotted)(path)
    if loaded.sha256 != SHA256:
        raise InputError(f"{path} is not the frozen classifier of Fashion-MNIST: its sha256 is {loaded.sha256}")
    return loaded


def init(key: Key) -> Params:
    """Parameters for training: kernels with variance 2 / fan in, ones and zeros."""
    params, n = {}, SHAPE[-1]
    for i, widths in enumerate(STAGES):
        for j, width in enumerate(widths):
            kernel = jax.random.normal(jax.random.fold_in(key, 2 * i + j), (3, 3, n, width)) * jnp.sqrt(2 / (9 * n))
            params[f"conv_{i}_{j}"] = {"kernel": kernel, "scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
            n = width
    # The dense layer begins as the mean over the places.
    params["dense"] = {"kernel": jnp.tile(jnp.eye(n) / PLACES, (PLACES, 1)), "bias": jnp.zeros((n,))}
    params["linear"] = {"kernel": jnp.zeros((n, CLASSES)), "bias": jnp.zeros((CLASSES,))}
    return params


def pixels(images: Array) -> Array:
    """u8 -> f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def convolved(params: Params, x: Array) -> Array:
    """Equation (1) of pixels in [-1, 1]: f32[b, 28, 28, 1] -> f32[b, 7, 7, 128]."""
    for i, widths in enumerate(STAGES):
        if i:
            x = layers.average_pool(x)
        for j in range(len(widths)):
            p = params[f"conv_{i}_{j}"]
            x = layers.group_norm(layers.conv(x, p["kernel"]), p["scale"], p["bias"], GROUPS, 1e-5)
    return x


def hidden(params: Params, x: Array) -> Array:
    """Equation (2) of pixels in [-1, 1]: f32[b, 28, 28, 1] -> f32[b, 128]."""
    flat = jnp.reshape(convolved(params, x), (x.shape[0], -1))
    return jax.nn.silu(jnp.matmul(flat, params["dense"]["kernel"]) + params["dense"]["bias"][None, :])


def logits(params: Params, hidden: Array) -> Array:
    """Equation (3) of features: f32[b, 128] -> f32[b, 10]."""
    return jnp.matmul(hidden, params["linear"]["kernel"]) + params["linear"]["bias"][None, :]


def _from_dotted(state: Mapping[str, np.ndarray], like: Params) -> Params:
    return trees.read(state, like, lambda path: trees.Leaf(".".join(path)))
