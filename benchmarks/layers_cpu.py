"""How layers are written against the obvious other way, on one processor core; memory of attention by blocks.

    python benchmarks/layers_cpu.py

One JSON line a comparison: milliseconds of each way, medians of calls that take turns. LayerNorm: a training step of a
transformer of 4 blocks of width 64, batch 64, with the variance of the centred row, and with the means of x and x^2
from one pass. Convolutions of 1x3x3 and 3x1x1 over a video of 8x32x32 with 32 channels: joined into two dimensions, and
as XLA's three-dimensional one. Attention: temporaries in MiB at 4,096 tokens of 4 heads, with gradients.
"""

import json
import os

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import statistics
import time

import jax
import jax.numpy as jnp

from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.dit import EPS, LayerNorm, dit
from diffusion_jax.nets.layers import conv

ROUNDS = 9


def alternating(programs):
    """Median milliseconds of each (function, arguments)."""
    times = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, (function, arguments) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def one_pass(self, x):
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(x32 * x32, axis=-1, keepdims=True) - mean * mean, 0)
    return ((x32 - mean) * jax.lax.rsqrt(variance + EPS)).astype(x.dtype)


def layer_norm():
    net = dit((4, 64, 4), 2, (8, 8, 1), learned_variance=False)
    params, centred = net.init(jax.random.key(0)), LayerNorm.__call__
    x, t = jax.random.normal(jax.random.key(1), (64, 8, 8, 1)), jnp.full((64,), 0.5)
    programs = {}
    for name, call in (("centred", centred), ("one pass", one_pass)):
        LayerNorm.__call__ = call
        step = jax.jit(jax.grad(lambda p: jnp.mean(net.apply(p, x, t) ** 2))).lower(params).compile()
        programs[name] = (step, (params,))
    LayerNorm.__call__ = centred
    return alternating(programs)


def convolution(widths):
    x = jax.random.normal(jax.random.key(0), (1, 8, 32, 32, 32))
    kernel = jax.random.normal(jax.random.key(1), (*widths, 32, 32))
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    plain = jax.jit(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1, 1), "SAME", dimension_numbers=numbers))
    return alternating({"joined": (jax.jit(conv), (x, kernel)), "three-dimensional": (plain, (x, kernel))})


def attention_memory(implementation):
    z = jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.float32)
    loss = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, implementation=implementation) ** 2), (0, 1, 2))
    return round(jax.jit(loss).lower(z, z, z).compile().memory_analysis().temp_size_in_bytes / 2**20)


def main() -> None:
    for what, found in (
        ("LayerNorm in a training step, ms", layer_norm()),
        ("convolution 1x3x3, ms", convolution((1, 3, 3))),
        ("convolution 3x1x1, ms", convolution((3, 1, 1))),
        ("attention at 4,096 tokens, MiB", {name: attention_memory(name) for name in ("chunked", "xla")}),
    ):
        print(json.dumps({"measurement": what, "cores": 1} | found), flush=True)


if __name__ == "__main__":
    main()
