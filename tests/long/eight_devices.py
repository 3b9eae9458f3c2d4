"""Train and draw on 1 and on 8 simulated devices, for test_devices.py: python eight_devices.py FOLDER."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from commands import make

from diffusion_jax.nets import unet
from diffusion_jax.training import loop
from diffusion_jax.training.generate import make_draw, make_pictures
from diffusion_jax.training.mesh import make_mesh

OPTIONS = {"width": 64, "batch": 32, "steps": 30, "log_every": 1, "checkpoint_every": 10, "dropout": 0.1}


def train(folder, devices, split):
    """What the loop really feeds its program: (devices and parts of the batch, number of split parameters)."""
    seen = {}
    compiled = loop._compiled_dispatch

    def watched(run, shardings):
        program = compiled(run, shardings)

        def dispatch(state, resident, batches, n):
            leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
            seen["split"] = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
            seen["share"] = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(x.size for x in leaves)
            seen["rows"] = [shard.data.shape[1] for shard in batches["index"].addressable_shards]
            seen["devices"] = len(leaves[0].sharding.device_set)
            return program(state, resident, batches, n)

        return dispatch

    loop._compiled_dispatch = watched
    loop.fit(make(**OPTIONS), folder, {}, devices=devices, split=split)
    loop._compiled_dispatch = compiled
    return seen


def draw_with_unet(devices):
    """Pictures of a convolutional network with attention, whose parameters are nowhere zero."""
    experiment = make()
    net = unet((8, 8, 1), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), classes=10)
    experiment = experiment.__class__(**{**vars(experiment), "net": net})
    params = jax.tree.map(
        lambda p: p + 0.03 * jax.random.normal(jax.random.key(p.size), p.shape), net.init(jax.random.key(0))
    )
    pictures = make_pictures(make_draw(experiment, steps=4), make_mesh(devices), 4)
    return np.concatenate(list(pictures(params, 37, 1, np.arange(37) % 10)))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    found = {
        name: train(out / name, devices, split)
        for name, devices, split in (("one", 1, False), ("eight", 8, False), ("split", 8, True))
    }
    (out / "found.json").write_text(json.dumps(found))
    np.savez(out / "drawn.npz", one=draw_with_unet(1), eight=draw_with_unet(8))
