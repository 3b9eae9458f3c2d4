"""Training and sampling speed of the CIFAR-10 experiments on the device at hand, in bfloat16, on made-up pictures.

    python benchmarks/accelerator.py     on a GPU or TPU; at toy size where there is none

For each experiment: seconds to the first step (compilation included, no cache), images/s of the jitted training step
(median of rounds after a warm-up), the FLOPs that XLA counts, and images/s of sampling. One JSON line a measurement.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp

from diffusion_jax.experiment import find_experiment
from diffusion_jax.training.generate import example_keys, make_draw
from diffusion_jax.training.state import init_state
from diffusion_jax.training.step import make_loss_fn, make_train_step

FULL = [("cifar10", {"batch": 512}, 50), ("cifar10_edm", {"batch": 512}, 18), ("cifar10_ddpmpp", {"batch": 256}, 50)]
TINY = [("cifar10", {"batch": 4, "width": 32}, 2), ("cifar10_edm", {"batch": 4, "width": 32, "blocks": 1}, 2)]


def train_speed(name: str, arguments: dict, rounds: int) -> dict:
    experiment = find_experiment(name)(precision="bfloat16", **arguments)
    loss = make_loss_fn(experiment.net, experiment.read, experiment.objective, flip=experiment.flip)
    state = jax.jit(lambda: init_state(jax.random.key(0), experiment.net, experiment.optimizer))()
    images = jax.random.bits(jax.random.key(1), (experiment.batch, *experiment.shape), jnp.uint8)
    start = time.perf_counter()
    step = jax.jit(make_train_step(loss, experiment.optimizer, experiment.ema), donate_argnums=0)
    program = step.lower(state, {"image": images}).compile()
    state, metrics = program(state, {"image": images})
    jax.block_until_ready(metrics)
    first, times = time.perf_counter() - start, []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(10):
            state, metrics = program(state, {"image": images})
        jax.block_until_ready(metrics)
        times.append((time.perf_counter() - start) / 10)
    seconds = statistics.median(times)
    cost = program.cost_analysis() or {}
    return {
        "first_step_seconds": round(first, 1),
        "images_per_second": round(experiment.batch / seconds, 1),
        "tflop_per_second": round(cost.get("flops", 0) / seconds / 1e12, 2),
    }


def sample_speed(name: str, arguments: dict, steps: int) -> dict:
    experiment = find_experiment(name)(precision="bfloat16", **arguments)
    params = jax.jit(experiment.net.init)(jax.random.key(0))
    draw = jax.jit(make_draw(experiment, steps=steps))
    keys = example_keys(0, 0, experiment.batch)
    jax.block_until_ready(draw(params, keys, None))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(draw(params, keys, None))
        times.append(time.perf_counter() - start)
    return {"steps": steps, "images_per_second": round(experiment.batch / statistics.median(times), 2)}


def main() -> None:
    tiny = jax.default_backend() == "cpu"
    device = jax.devices()[0].device_kind
    for name, arguments, steps in TINY if tiny else FULL:
        line = {"measurement": f"{name} train step", "device": device, **arguments}
        print(json.dumps(line | train_speed(name, arguments, 1 if tiny else 5)), flush=True)
        line = {"measurement": f"{name} sampling", "device": device, **arguments}
        print(json.dumps(line | sample_speed(name, arguments, steps)), flush=True)


if __name__ == "__main__":
    main()
