"""The frozen classifier of Fashion-MNIST, whose features stand where FID has Inception's.

Six 3x3 convolutions with group normalization (GN, 8 groups) and SiLU, a mean over the pixels, and a linear layer:

    h = silu GN C_32 silu GN C_32 x,   pool,   the same with C_64,   pool,   the same with C_128                 (1)
    features = mean over pixels of h                                                             f32[128]        (2)
    logits = W features + b                                                                      f32[10]         (3)

x are pixels in [-1, 1]; pool halves the size by the mean of neighbours. The weights ship with the package; they were
made by `python tools/train_fashion_classifier.py`, with the real training set and fixed seeds, and never change: a
number measured in other features is another number.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets import layers
from diffusion_jax.typing import Array, Key, Params

SHAPE, CLASSES, WIDTHS, GROUPS = (28, 28, 1), 10, (32, 64, 128), 8
WEIGHTS = Path(__file__).parent / "fashion_mnist.npz"


def init(key: Key) -> Params:
    """Parameters for training: kernels with variance 2 / fan in, ones and zeros."""
    params, n = {}, SHAPE[-1]
    for i, width in enumerate(WIDTHS):
        for j in range(2):
            key = jax.random.fold_in(key, 2 * i + j)
            kernel = jax.random.normal(key, (3, 3, n, width)) * jnp.sqrt(2 / (9 * n))
            params[f"conv_{i}_{j}"] = {"kernel": kernel, "scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
            n = width
    params["linear"] = {"kernel": jnp.zeros((n, CLASSES)), "bias": jnp.zeros((CLASSES,))}
    return params


def features(params: Params, images: Array) -> Array:
    """Equation (2) of pictures `u8[b, 28, 28, 1]`: f32[b, 128]. ValueError for other types and shapes."""
    if images.dtype != jnp.uint8 or images.shape[1:] != SHAPE:
        raise ValueError(f"pictures of Fashion-MNIST are u8[b, 28, 28, 1], got {images.dtype}{list(images.shape)}")
    return hidden(params, images.astype(jnp.float32) / 127.5 - 1.0)


def hidden(params: Params, x: Array) -> Array:
    """Equation (2) of pixels in [-1, 1]: f32[b, 28, 28, 1] -> f32[b, 128]."""
    for i in range(len(WIDTHS)):
        if i:
            x = layers.average_pool(x)
        for j in range(2):
            p = params[f"conv_{i}_{j}"]
            x = layers.group_norm(layers.conv(x, p["kernel"]), p["scale"], p["bias"], GROUPS, 1e-5)
    return jnp.mean(x, axis=(1, 2))


def logits(params: Params, hidden: Array) -> Array:
    """Equation (3) of features: f32[b, 128] -> f32[b, 10]."""
    return jnp.matmul(hidden, params["linear"]["kernel"]) + params["linear"]["bias"][None, :]


def load(path: Path = WEIGHTS) -> tuple[Params, dict[str, np.ndarray]]:
    """The frozen parameters, and the same by dotted names, for a hash."""
    with np.load(path) as file:
        arrays = dict(file)
    params: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        layer, leaf = name.split(".")
        params.setdefault(layer, {})[leaf] = jnp.asarray(array, jnp.float32)
    return params, arrays
