"""A second start finds its compiled programs: the first step in under a third of the cold time."""

import json
import subprocess
import sys

from commands import ROOT, environment

SCRIPT = """
import json, time
import jax, numpy as np
from diffusion_jax.__main__ import _set_up_jax
from diffusion_jax.experiment import find_experiment
_set_up_jax()
from diffusion_jax.experiment import loss_fn
from diffusion_jax.training.state import init_state
from diffusion_jax.training.step import make_train_step
experiment = find_experiment("digits")()
jax.block_until_ready(jax.numpy.zeros(3) + 1)
start = time.perf_counter()
state = jax.jit(lambda: init_state(jax.random.key(0), experiment.net, experiment.optimizer))()
batch = {"image": np.zeros((128, 8, 8, 1), np.uint8), "label": np.zeros(128, np.int32)}
step = jax.jit(make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema), donate_argnums=0)
jax.block_until_ready(step(state, batch))
print(json.dumps(time.perf_counter() - start))
"""


def test_second_start(tmp_path):
    def seconds():
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment(tmp_path), capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm = seconds(), min(seconds() for _ in range(3))  # the least disturbed start on a busy machine
    print(f"first step: cold {cold:.1f} s, second start {warm:.1f} s, ratio {warm / cold:.2f}")
    assert warm < cold / 3
