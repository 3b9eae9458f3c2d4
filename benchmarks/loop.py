"""Throughput of the training loop against the bare jitted step, on the digits experiment.

    python benchmarks/loop.py

The loop's figure is the median of its own lines in metrics.jsonl; the bare step runs the same program on the same
device in turn with it. Prints one JSON line: ratio = loop / bare, the median of the pairs, 1 being no overhead.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from diffusion_jax.__main__ import _set_up_jax
from diffusion_jax.experiment import find_experiment, initial_state, loss_fn
from diffusion_jax.training.data import feed
from diffusion_jax.training.loop import fit
from diffusion_jax.training.step import make_train_step

STEPS, PAIRS, SIZE = 80, 5, {"width": 32, "log_every": 10, "sample_every": 0, "checkpoint_every": 0}


def bare(experiment, steps: int = 50) -> float:
    """Images a second of the jitted step alone, batches on the device already."""
    step = jax.jit(make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema), donate_argnums=0)
    state = jax.jit(lambda: initial_state(experiment))()
    train = experiment.data().train
    rows = feed(train, experiment.batch, 0).next(1)["index"][0]
    batch = jax.device_put({name: array[rows] for name, array in train.items()})
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    times = []
    for _ in range(steps // 10):
        start = time.perf_counter()
        for _ in range(10):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return 10 * experiment.batch / statistics.median(times)


def looped(experiment) -> float:
    with tempfile.TemporaryDirectory() as folder:
        fit(experiment, Path(folder), {})
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:] if "images_per_second" in line)


def main() -> None:
    _set_up_jax()  # the compiled programs are kept between the pairs
    experiment = find_experiment("digits")(steps=STEPS, **SIZE)
    experiment = dataclasses.replace(experiment, evaluate=None)
    pairs = [(looped(experiment), bare(experiment)) for _ in range(PAIRS)]
    ratios = sorted(round(loop / step, 3) for loop, step in pairs)
    line = {"measurement": "loop / bare step", "ratio": statistics.median(ratios), "ratios": ratios}
    print(json.dumps(line | {"images_per_second": round(statistics.median(step for _, step in pairs))}))


if __name__ == "__main__":
    main()
