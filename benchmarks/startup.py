"""What a user waits for: import, and the first training step with a cold and a warm compilation cache.

    python benchmarks/startup.py

Each figure is the median of fresh processes. Prints one JSON line a measurement.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

FIRST_STEP = """
import time, jax, jax.numpy as jnp
from diffusion_jax.__main__ import _set_up_jax
from diffusion_jax.experiment import find_experiment, initial_state, loss_fn
from diffusion_jax.training.step import make_train_step
_set_up_jax()
e = find_experiment("NAME")(ARGUMENTS)
start = time.perf_counter()
state = jax.jit(lambda: initial_state(e))()
step = jax.jit(make_train_step(loss_fn(e), e.optimizer, e.ema), donate_argnums=0)
batch = {"image": jnp.zeros((e.batch, *e.shape), jnp.uint8), "label": jnp.zeros(e.batch, jnp.int32)}
jax.block_until_ready(step(state, batch))
print(time.perf_counter() - start)
"""
EXPERIMENTS = {"digits": "", "cifar10": "width=32, batch=8"}


def seconds(code: str, **environment: str) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout or time.perf_counter() - start)


def main() -> None:
    seconds("import diffusion_jax")
    imports = statistics.median(seconds("import diffusion_jax") for _ in range(5))
    print(json.dumps({"measurement": "python -c 'import diffusion_jax'", "seconds": round(imports, 2)}))
    for name, arguments in EXPERIMENTS.items():
        code = FIRST_STEP.replace("NAME", name).replace("ARGUMENTS", arguments)
        with tempfile.TemporaryDirectory() as cache:
            cold = seconds(code, JAX_COMPILATION_CACHE_DIR=cache)
            warm = statistics.median(seconds(code, JAX_COMPILATION_CACHE_DIR=cache) for _ in range(3))
        line = {"measurement": f"{name}: first training step, warm / cold cache", "ratio": round(warm / cold, 3)}
        print(json.dumps(line | {"cold_seconds": round(cold, 1), "warm_seconds": round(warm, 1)}))


if __name__ == "__main__":
    main()
