"""What to say when a device's memory was not enough: the part of a plan that needs no compiler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax.experiment import Experiment, initial_state
from diffusion_jax.planning.plan import state_bytes
from diffusion_jax.planning.report import advice, size
from diffusion_jax.training.mesh import make_mesh, state_shardings


def shortage(
    experiment: Experiment, arguments: Mapping[str, Any], devices: int | None, split: bool, tensor: int
) -> str:
    """What a device holds between steps, and the switches that are there and not on yet, on one line."""
    mesh = make_mesh(devices, tensor)
    shapes = jax.eval_shape(lambda: initial_state(experiment))
    parts = state_bytes(shapes, state_shardings(mesh, shapes, split, experiment.partition))
    held = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
    result = {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "partitioned": bool(experiment.partition),
        "batch": experiment.batch,
    }
    helps = advice(result, {**arguments, "split": split, "tensor": tensor})
    switches = "; ".join(f"{switch.removesuffix('=')} ({what})" for switch, what in helps)
    return (
        f"each device holds {size(sum(parts.values()))} between steps ({held}) and the activations of a step; "
        f"what helps: {switches or 'a smaller network'}"
    )
