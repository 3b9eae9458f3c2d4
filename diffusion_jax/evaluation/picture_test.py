"""A convolutional network as the judge of the classifier two-sample test, on the pixels themselves.

    h = silu GN C_64 pool silu GN C_32 pool silu GN C_16 x,   logit = w . mean over pixels of h + b                 (1)

C is a 3x3 convolution, GN group normalization, pool the mean of 2 x 2 pixels. A test on the features of a network
trained for something else sees only what that network kept; this one learns what tells these very samples from these
very examples. AdamW with one cycle of the learning rate, always the same number of passes, no choice by held-out
accuracy: so the accuracy of `two_sample.c2st` on its own fold stays honest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.evaluation.two_sample import Fit
from diffusion_jax.nets import layers
from diffusion_jax.typing import Array, Key, Params

WIDTHS, GROUPS, AT_ONCE = (16, 32, 64), 8, 500


def convolutional(
    shape: Sequence[int], *, passes: int = 12, batch: int = 128, least: int = 100, rate: float = 3e-3
) -> Fit:
    """A judge (1) for `two_sample.c2st` of pictures u8[n, *shape] that were flattened.

    passes: over what it is fitted to, but at least `least` updates, of `batch` pictures with the peak learning `rate`.
    """

    def fit(x: np.ndarray, which: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        rng, size = np.random.default_rng(seed), min(batch, len(x))
        steps = max(least, passes * len(x) // size)
        order = np.concatenate([rng.permutation(len(x)) for _ in range(-(-steps * size // len(x)))])
        rows = np.reshape(order[: steps * size], (steps, size)).astype(np.int32)
        params = _fitted(rate, jax.random.key(seed), _pictures(x, shape), which.astype(np.float32), rows)
        return partial(_judged, params, tuple(shape))

    return fit


def init(key: Key, channels: int) -> Params:
    """Parameters of (1) before it has learned anything."""
    params, n = {}, channels
    for i, width in enumerate(WIDTHS):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (3, 3, n, width)) * jnp.sqrt(2 / (9 * n))
        params[f"conv_{i}"] = {"kernel": kernel, "scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
        n = width
    return params | {"linear": {"kernel": jnp.zeros((n,)), "bias": jnp.zeros(())}}


def logit(params: Params, x: Array) -> Array:
    """Equation (1) of pixels in [-1, 1]: f32[b, h, w, c] -> f32[b], above 0 for the second kind."""
    for i in range(len(WIDTHS)):
        p = params[f"conv_{i}"]
        x = layers.average_pool(x) if i else x
        x = layers.group_norm(layers.conv(x, p["kernel"]), p["scale"], p["bias"], GROUPS, 1e-5)
    return jnp.matmul(jnp.mean(x, axis=(1, 2)), params["linear"]["kernel"]) + params["linear"]["bias"]


def _pictures(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Flattened pictures of 0 to 255 as bytes, a quarter of what they would be on the device."""
    return np.reshape(np.clip(np.rint(x), 0, 255), (len(x), *shape)).astype(np.uint8)


def _pixels(images: Array) -> Array:
    return images.astype(jnp.float32) / 127.5 - 1.0


def _fitted(rate: float, key: Key, images: np.ndarray, which: np.ndarray, rows: np.ndarray) -> Params:
    """The parameters after one update for each row of indices."""
    optimizer, update = _learning(rate, len(rows))
    params = init(key, images.shape[-1])
    state = optimizer.init(params)
    for row in rows:
        params, state = update(params, state, images[row], which[row])
    return params


@lru_cache(maxsize=8)
def _learning(rate: float, steps: int) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer of so many steps and its update, compiled once for all folds and seeds.

    One program for each update: XLA's convolutions on CPUs take ten times as long within a loop of its own.
    """
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, rate, 0.2), weight_decay=0.05)

    @jax.jit
    def update(params: Params, state: Any, images: Array, which: Array) -> tuple[Params, Any]:
        def loss(params: Params) -> Array:
            return jnp.mean(optax.sigmoid_binary_cross_entropy(logit(params, _pixels(images)), which))

        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes powers of floats to whole numbers
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, update


@lru_cache(maxsize=1)
def _program() -> Any:
    return jax.jit(lambda params, images: logit(params, _pixels(images)) > 0)


def _judged(params: Params, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """Which kind each flattened picture is taken for: i[n] of {0, 1}."""
    images, found = _pictures(x, shape), []
    for i in range(0, len(images), AT_ONCE):
        part = images[i : i + AT_ONCE]
        padded = np.concatenate([part, np.zeros((AT_ONCE - len(part), *shape), np.uint8)])
        found.append(np.asarray(_program()(params, padded))[: len(part)])
    return np.concatenate(found).astype(int)
