"""The evaluation's own speed: pictures on the host to moments, against the bare forward pass of the feature network.

    python benchmarks/evaluation.py [features=inception n=10000 batch=256 size=32 precision=tensorfloat32]

Random weights and random pictures. bare: the jitted network on one batch that lies on the devices, again and again.
stream: `measuring.stream`, from pictures through `prepare`, the network and float64 moments; n pictures, of which the
last batch may be short. Both are warmed up first, and measured in turn `repeats` times. Prints one JSON line: pictures
a second of each (medians), and ratio = stream / bare, of which 0.9 is the aim. On a processor the defaults are small,
and the host's work has no cores of its own.
"""

import json
import statistics
import sys
import time

import jax
import numpy as np

from diffusion_jax.evaluation.features import networks
from diffusion_jax.measuring.stream import feature_batches, gather
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis

OPTIONS = {
    "features": "inception", "n": "10000", "batch": "256", "size": "32", "precision": "tensorfloat32", "repeats": "3",
}  # fmt: skip
ON_A_CPU = {"n": "40", "batch": "8"}
PART = 128
"""Pictures that come at a time, as from a sampler."""


def main() -> None:
    cpu = jax.default_backend() == "cpu"
    given = OPTIONS | (ON_A_CPU if cpu else {}) | dict(word.split("=", 1) for word in sys.argv[1:])
    n, batch, side, repeats = (int(given[name]) for name in ("n", "batch", "size", "repeats"))
    net, mesh = networks()[given["features"]].make(given["precision"]), make_mesh()
    params = jax.device_put(net.init(jax.random.key(0)), replicated(mesh))
    images = np.random.default_rng(0).integers(0, 256, (min(n, 2000), side, side, 3), dtype=np.uint8)
    whole = batch * mesh.shape["data"]
    ready = jax.device_put(net.prepare(np.resize(images, (whole, side, side, 3))), split_axis(mesh))
    forward = jax.jit(lambda params, x: net.apply(params, x)["pooled"], out_shardings=split_axis(mesh))
    rounds = -(-n // whole)

    def bare() -> None:
        for _ in range(rounds):
            done = forward(params, ready)
        jax.block_until_ready(done)

    def stream() -> None:
        parts = (np.take(images, range(i, min(i + PART, n)), axis=0, mode="wrap") for i in range(0, n, PART))
        gather(feature_batches(net, params, parts, mesh, batch=batch))

    seconds = {"bare": [], "stream": []}
    for _ in range(repeats + 1):
        for name, call in (("bare", bare), ("stream", stream)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    # The bare pass computes whole batches, the stream too: its last one is padded.
    speed = {name: rounds * whole / statistics.median(times[1:]) for name, times in seconds.items()}
    line = {"benchmark": "evaluation", "network": net.name, "device": jax.devices()[0].device_kind, **given}
    line |= {name: round(value, 2) for name, value in speed.items()}
    print(json.dumps(line | {"ratio": round(speed["stream"] / speed["bare"], 3)}), flush=True)


if __name__ == "__main__":
    main()
