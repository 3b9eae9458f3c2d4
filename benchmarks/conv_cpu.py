"""The weight gradient of a 3x3 convolution on one pinned core: XLA's own against other ways to write it.

    python benchmarks/conv_cpu.py

Prints one JSON line a shape: GFLOP/s of the forward pass, the input gradient and each weight gradient, best of five.
"""

import json
import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.layers import conv

SHAPES = [(16, 32, 64, 64), (16, 16, 128, 128), (128, 8, 32, 32)]  # batch, size, channels in and out
TAPS = [(i, j) for i in range(3) for j in range(3)]


def shifted(x, pad, g):
    """Nine matrix products, one for each tap."""
    _, h, w, c = x.shape
    flat = jnp.reshape(g, (-1, g.shape[-1]))
    return jnp.stack([jnp.reshape(pad[:, i : i + h, j : j + w], (-1, c)).T @ flat for i, j in TAPS])


def im2col(x, pad, g):
    """One matrix product of all taps side by side."""
    _, h, w, c = x.shape
    columns = jnp.concatenate([pad[:, i : i + h, j : j + w] for i, j in TAPS], axis=-1)
    return jnp.reshape(columns, (-1, 9 * c)).T @ jnp.reshape(g, (-1, g.shape[-1]))


def swapped(x, pad, g):
    """A convolution over exchanged batch and channel axes, written out."""
    rows, kernel = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3))
    return jax.lax.conv_general_dilated(
        rows, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def seconds(function, *arguments) -> float:
    program = jax.jit(function)
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    for batch, size, c, d in SHAPES:
        x, g = (jnp.asarray(rng.standard_normal((batch, size, size, n)), jnp.float32) for n in (c, d))
        kernel = jnp.asarray(rng.standard_normal((3, 3, c, d)), jnp.float32)
        pad = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        spent = {
            "forward": seconds(conv, x, kernel),
            "input gradient": seconds(lambda x, k, g: jax.vjp(lambda x: conv(x, k), x)[1](g), x, kernel, g),
            "weight gradient": seconds(lambda x, k, g: jax.vjp(lambda k: conv(x, k), k)[1](g), x, kernel, g),
        } | {f.__name__: seconds(f, x, pad, g) for f in (shifted, im2col, swapped)}
        work = 2 * batch * size * size * 9 * c * d / 1e9
        rates = {name: round(work / value) for name, value in spent.items()}
        print(json.dumps({"measurement": "GFLOP/s", "shape": [batch, size, c, d]} | rates))


if __name__ == "__main__":
    main()
