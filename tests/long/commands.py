"""Training commands as processes of their own, and what they leave behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import toy

from diffusion_jax.training import checkpoint
from diffusion_jax.training.mesh import make_mesh, state_shardings
from diffusion_jax.training.state import init_state

ROOT = Path(__file__).parent.parent.parent
TOY = ROOT / "tests" / "toy.py"


def environment(cache, **extra):
    """A user's environment with a compilation cache that the tests share."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


def begin(cache, runs, *words, log=None, **extra):
    """Start `train` of the toy; its error stream goes to the file `log`."""
    command = [sys.executable, "-m", "diffusion_jax", "train", str(TOY), f"runs={runs}", "run=r", *words]
    with Path(log or os.devnull).open("w") as stream:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=stream, env=environment(cache, **extra), cwd=ROOT
        )


def steps_saved(run):
    """The steps of the complete checkpoints of a run."""
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def last_logged(run):
    """The last whole line of metrics.jsonl: its step, or 0."""
    path, step = run / "metrics.jsonl", 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
    return step


def saved_state(run, experiment, step):
    """(every array of a checkpoint as NumPy, the position of the data)."""
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), experiment.net, experiment.optimizer))
    shardings = state_shardings(make_mesh(1), shapes)
    like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    manager = checkpoint.open_read_only(run / "checkpoints")
    complaints = []
    state, meta = checkpoint.restore(manager, like, complaints.append, step, read_only=True)
    manager.close()
    assert not complaints
    assert int(state.step) == step
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.asarray, state), meta["position"]


def assert_same_state(run, other, experiment, step):
    """Parameters, averages, optimizer, key and position of two runs are equal to the last bit."""
    (state, position), (wanted, wanted_position) = (saved_state(r, experiment, step) for r in (run, other))
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert position == wanted_position == {"step": step}


def make(**options):
    """The toy under the tests' strict rules of promotion."""
    return toy.experiment(**options)
