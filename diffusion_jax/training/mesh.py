"""Devices: one mesh ("data", "model"), batches split over "data", parameters replicated or split."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.typing import InputError

SMALLEST_SPLIT = 1024
"""Arrays with fewer elements stay whole on every device: splitting them costs more than it saves."""


def make_mesh(devices: int | None = None, batch: int | None = None) -> Mesh:
    """A mesh of the first `devices` devices (all by default), all along "data".

    InputError if there are not that many, or if `batch` examples cannot be split evenly among them.
    """
    available = jax.devices()
    n = len(available) if devices is None else devices
    if not 1 <= n <= len(available):
        raise InputError(f"devices={n}: this machine has {len(available)} ({available[0].platform})")
    if batch is not None and batch % n:
        raise InputError(f"a batch of {batch} cannot be split evenly over {n} devices: change batch or devices")
    grid = np.asarray(available[:n]).reshape(n, 1)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_axis(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis of a batch over "data"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def state_shardings(mesh: Mesh, shapes: Any, split: bool = False) -> Any:
    """Shardings for a tree of `ShapeDtypeStruct`: replicated, or each array on its largest axis that divides."""

    def one(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        n = mesh.shape["data"]
        if not split or leaf.size < SMALLEST_SPLIT:
            return replicated(mesh)
        for axis in sorted(range(len(leaf.shape)), key=lambda i: -leaf.shape[i]):
            if leaf.shape[axis] % n == 0:
                return split_axis(mesh, axis)
        return replicated(mesh)

    return jax.tree.map(one, shapes)
