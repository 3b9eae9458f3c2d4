"""Throughput of feature networks: pictures to features against the bare forward pass, random weights.

    python benchmarks/features.py [batch=256 size=32 precision=tensorfloat32 repeats=20]      smaller on a CPU

bare: the network on its input, already resized and normalised. apply: bytes on the device to features. host: bytes on
the host through `prepare`, one batch ahead on a thread, as an evaluation runs. Prints one JSON line a network: pictures
a second of each, and ratio = host / bare, 1 being no overhead.
"""

import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.features import clip, dinov2, inception
from diffusion_jax.evaluation.features.resize import resize
from diffusion_jax.nets.clip import clip_vision
from diffusion_jax.nets.functional import functional

OPTIONS = {"batch": "256", "size": "32", "precision": "tensorfloat32", "repeats": "20"}
ON_A_CPU = {"batch": "2", "repeats": "1"}


def cases(precision: str):
    """(network, its bare graph, the side of the graph's input)."""
    yield inception.inception_v3(precision=precision), functional(inception.InceptionV3), inception.SIZE
    yield dinov2.dinov2_vitl14(precision=precision), dinov2.dinov2_net(), dinov2.SIZE
    yield dinov2.dinov2_vitl14("torch", precision=precision), dinov2.dinov2_net(), dinov2.SIZE
    yield clip.clip_image(precision=precision), clip_vision(size=336), 336


def seconds(call, repeats: int) -> float:
    """The median time of a call, after two."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def from_the_host(made, apply, params, images: np.ndarray, repeats: int) -> float:
    """Seconds a batch with `prepare` one batch ahead of the device."""
    with ThreadPoolExecutor(1) as thread:
        made.prepare(images)
        start, features = time.perf_counter(), None
        ready = thread.submit(made.prepare, images)
        for _ in range(repeats):
            batch, ready = ready.result(), thread.submit(made.prepare, images)
            done, features = features, apply(params, batch)
            jax.block_until_ready(done)
        jax.block_until_ready(features)
        spent = time.perf_counter() - start
        ready.result()
    return spent / repeats


def main() -> None:
    cpu = jax.default_backend() == "cpu"
    given = OPTIONS | (ON_A_CPU if cpu else {}) | dict(word.split("=", 1) for word in sys.argv[1:])
    batch, size, repeats = (int(given[name]) for name in ("batch", "size", "repeats"))
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    for made, graph, side in cases(given["precision"]):
        params = made.init(jax.random.key(0))
        x = jax.jit(lambda i, side=side: resize(i.astype(jnp.float32) / 128 - 1, (side, side), "bilinear"))(images)

        def bare(params, x, graph=graph):
            with jax.default_matmul_precision(given["precision"]):
                return graph.apply(params, x, jnp.zeros(()))

        forward, apply = jax.jit(bare), jax.jit(made.apply)
        ready = jax.device_put(made.prepare(images))
        times = {
            "bare": seconds(lambda f=forward, p=params, x=x: f(p, x), repeats),
            "apply": seconds(lambda f=apply, p=params, x=ready: f(p, x), repeats),
            "host": from_the_host(made, apply, params, images, repeats),
        }
        line = {"network": made.name, "resize": made.resize, "device": jax.devices()[0].device_kind, **given}
        line |= {name: round(batch / value, 1) for name, value in times.items()}
        print(json.dumps(line | {"ratio": round(times["bare"] / times["host"], 3)}), flush=True)


if __name__ == "__main__":
    main()
