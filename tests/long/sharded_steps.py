"""Steps of a small transformer on eight simulated devices, for test_sharding.py: python sharded_steps.py FOLDER."""

import json
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.dit import FUSED, TENSOR_PARALLEL, dit
from diffusion_jax.training import ema
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.optimizers import adamw, clip, muon, projected, schedule_free_adamw
from diffusion_jax.training.state import init_state
from diffusion_jax.training.step import make_train_step
from diffusion_jax.typing import Net

BATCH, STEPS = 16, 3
NET = dit((2, 64, 4), 2, (8, 8, 3), classes=10, learned_variance=False)
MESHES = {  # name: devices, tensor, split
    "one": (1, 1, False),
    "data": (8, 1, False),
    "split": (8, 1, True),
    "2x4": (8, 4, False),
    "4x2": (8, 2, False),
    "4x2 split": (8, 2, True),
}
# Adam's quotient would make differences of rounding as large as updates, were its eps not large.
OPTIMIZERS = {
    "adamw": clip(adamw(1e-2, eps=1e-3, weight_decay=0.1), 1.0),
    "muon": muon(1e-2, fused=FUSED, dtype=jnp.float32, adam=adamw(1e-2, eps=1e-3)),
    "schedule free": schedule_free_adamw(1e-2, eps=1e-3),
    "projected": projected(adamw(1e-2, eps=1e-3), partial(jax.tree.map, lambda p: p / jnp.sqrt(1 + jnp.sum(p**2)))),
}
DECAYS = (ema.power_function(0.1), ema.constant(0.9))


def loss(params, batch, key):
    out = NET.apply(params, batch["x"], batch["t"], batch["label"])
    return jnp.mean((out - batch["y"]) ** 2)


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, BATCH, 8, 8, 3)).astype(np.float32)
    return {
        "x": x,
        "y": y,
        "t": rng.uniform(size=BATCH).astype(np.float32),
        "label": np.arange(BATCH, dtype=np.int32) % 10,
    }


def start(optimizer):
    """A state whose parameters are nowhere zero: all blocks act."""
    state = init_state(jax.random.key(0), NET, optimizer, len(DECAYS))
    params = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(jax.random.key(p.size), p.shape), state.params)
    return state._replace(params=params)


def share(tree):
    """What the first device holds of the bytes of a tree."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    return sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)


def run(optimizer, devices, tensor, split, accumulate=1):
    mesh = make_mesh(devices, tensor, batch=BATCH // accumulate)
    shardings = state_shardings(mesh, jax.eval_shape(partial(start, optimizer)), split, TENSOR_PARALLEL)
    rows = split_axis(mesh)
    step = jax.jit(
        make_train_step(loss, optimizer, DECAYS, accumulate),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh)),
    )
    state, given = jax.jit(partial(start, optimizer), out_shardings=shardings)(), jax.device_put(batch(), rows)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, given)
        losses.append(float(metrics["loss"]))
    found = {
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "params": share(state.params),
        "averages": share(state.averages),
        "moments": share(state.opt_state),
        "rows": sorted(shard.data.shape[0] for shard in given["x"].addressable_shards),
        "laid out": all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, state, shardings))),
    }
    leaves = jax.tree.leaves((state.params, state.averages))
    return found, {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}


def gathers(remat, accumulate):
    """(gathered weights in the program of eight dense layers, bytes beside its arguments / bytes of parameters)."""
    layers = [str(i) for i in range(8)]
    net = Net(lambda key: {i: {"kernel": jax.random.normal(key, (512, 512))} for i in layers}, NET.apply)
    layer = lambda x, w: jnp.tanh(x @ w)  # noqa: E731

    def loss(params, batch, key):
        x = batch["x"]
        for i in layers:
            x = (jax.checkpoint(layer) if remat else layer)(x, params[i]["kernel"])
        return jnp.mean(x)

    mesh, optimizer = make_mesh(8), adamw(1e-3)
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), net, optimizer))
    shardings, rows = state_shardings(mesh, shapes, split=True), split_axis(mesh)
    step = jax.jit(
        make_train_step(loss, optimizer, ema.constant(), accumulate),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, replicated(mesh)),
    )
    text = step.lower(shapes, {"x": jax.ShapeDtypeStruct((8192, 512), jnp.float32)}).compile().as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    return {
        "gathers": len(re.findall(r"= f32\[512,512\]\S* all-gather", text)),
        "sums": [len(re.findall(r"f32\[64,512\]", line)) for line in loops],
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {}
    for name, optimizer in OPTIMIZERS.items():
        for mesh, where in MESHES.items():
            if name == "adamw" or mesh in ("one", "4x2 split"):
                found[f"{name}, {mesh}"], arrays = run(optimizer, *where)
                np.savez(out / f"{name}, {mesh}.npz", **arrays)
    for mesh in ("data", "split", "4x2 split"):
        found[f"adamw, {mesh}, accumulate"], arrays = run(OPTIMIZERS["adamw"], *MESHES[mesh], accumulate=2)
        np.savez(out / f"adamw, {mesh}, accumulate.npz", **arrays)
    found["plain"], found["remat"], found["parts"] = gathers(False, 1), gathers(True, 1), gathers(False, 4)
    (out / "found.json").write_text(json.dumps(found))
