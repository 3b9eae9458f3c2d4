"""Devices: one mesh ("data", "model"), and where on it batches, parameters and optimizer state lie.

Batches are split over "data". With n devices along "data" and m along "model", an array of shape (d_1, ..., d_k) is

    replicated                             on every device whole                                            (1)
    fully sharded                          its largest axis that n divides over "data"                      (2)
    tensor parallel                        the axis i that a rule of the network names over "model"         (3)
    both                                   (3), and the largest other axis that n divides over "data"       (4)

Averages and optimizer state lie as the parameters they belong to. XLA adds the collectives: all-reduced gradients for
(1); gathered weights and scattered gradients, layer by layer, for (2); all-reduced activations for (3). Under (2) a
weight gathered for the forward pass is kept until the backward pass, unless its block is rematerialised (`remat`), and
with gradient accumulation until the last part: so each is sent once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.training.state import dotted
from diffusion_jax.typing import InputError

T = TypeVar("T")
SMALLEST_SPLIT = 1024
"""Arrays with fewer elements stay whole over "data": splitting them costs more than it saves."""
Partition = Mapping[str, int]
"""Regular expression, searched in the dotted path of a parameter -> the axis that is split over "model"."""


def make_mesh(devices: int | Sequence[Any] | None = None, tensor: int = 1, batch: int | None = None) -> Mesh:
    """The mesh ("data", "model") of all devices, the first `devices` of them, or given ones; `tensor` along "model".

    Given ones may be abstract, of `jax.experimental.topologies`. On accelerators neighbours on the network become
    neighbours on the mesh, and several slices are joined along "data". InputError if there are not that many devices,
    `tensor` does not divide them, or `batch` examples cannot be split evenly along "data".
    """
    chosen = _chosen(devices)
    n = len(chosen)
    if tensor < 1 or n % tensor:
        raise InputError(f"tensor={tensor} does not divide the {n} devices: their number is data x tensor")
    if batch is not None and batch % (n // tensor):
        raise InputError(
            f"a batch of {batch} cannot be split evenly over {n // tensor} devices: change batch or devices"
        )
    return Mesh(_grid(chosen, (n // tensor, tensor)), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def on_mesh(function: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """The function, traced with the mesh in force: kernels that the compiler cannot split ask it how (`attention`)."""

    @wraps(function)
    def traced(*args: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_axis(mesh: Mesh | AbstractMesh, axis: int = 0) -> NamedSharding:
    """One axis of a batch over "data"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def state_shardings(
    mesh: Mesh | AbstractMesh, shapes: Any, split: bool = False, partition: Partition | None = None
) -> Any:
    """Shardings for a train state, or any tree, of `ShapeDtypeStruct`: one of (1) to (4) for each array.

    split: fully sharded. partition: the rules of (3), for parameters and for what has the path and shape of one, such
    as a moment; they act if the mesh has a "model" axis. InputError that names the parameter whose axis does not
    divide, and if "model" has several devices but no rule matches.
    """
    rules = partition or {} if mesh.shape["model"] > 1 else {}
    known = {dotted(path): leaf.shape for path, leaf in _leaves(getattr(shapes, "params", shapes))}
    axes = {name: _model_axis(name, shape, rules, mesh.shape["model"]) for name, shape in known.items()}
    if mesh.shape["model"] > 1 and all(axis is None for axis in axes.values()):
        raise InputError(
            f"tensor={mesh.shape['model']}: no parameter of this network can be split over several devices "
            "(no rule of the experiment's `partition` matches one); split=True works for every network"
        )

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = dotted(path)
        model = axes[name] if known.get(name) == leaf.shape else None
        data = _data_axis(leaf, mesh.shape["data"], model) if split else None
        names = {model: "model", data: "data"}
        return NamedSharding(mesh, PartitionSpec(*_trimmed([names.get(i) for i in range(len(leaf.shape))])))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _chosen(devices: int | Sequence[Any] | None) -> list[Any]:
    if devices is not None and not isinstance(devices, int):
        return list(devices)
    available = jax.devices()
    n = len(available) if devices is None else devices
    if not 1 <= n <= len(available):
        raise InputError(f"devices={n}: this machine has {len(available)} ({available[0].platform})")
    return available[:n]


def _grid(devices: list[Any], shape: tuple[int, int]) -> np.ndarray:
    """The devices as [data, model], ordered by the network that connects them."""
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "cpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % len(slices):
        raise InputError(f"tensor={shape[1]}: each of the {len(slices)} slices needs whole groups of {shape[1]}")
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // len(slices), shape[1]), (len(slices), 1), devices, allow_split_physical_axes=True
    )


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _model_axis(name: str, shape: tuple[int, ...], rules: Partition, parts: int) -> int | None:
    """The axis that the first matching rule names, counted from the front."""
    axis = next((axis for pattern, axis in rules.items() if re.search(pattern, name)), None)
    if axis is None:
        return None
    if not -len(shape) <= axis < len(shape):
        raise InputError(f"tensor={parts}: the rule for {name} splits axis {axis}, which its shape {shape} lacks")
    if shape[axis] % parts:
        raise InputError(f"tensor={parts} does not divide axis {axis} of {name}, whose shape is {shape}")
    return axis % len(shape)


def _data_axis(leaf: Any, parts: int, taken: int | None) -> int | None:
    """The largest axis, beside the one taken, that divides; None for small arrays."""
    if leaf.size < SMALLEST_SPLIT:
        return None
    free = [i for i in range(len(leaf.shape)) if i != taken and leaf.shape[i] % parts == 0]
    return max(free, key=lambda i: (leaf.shape[i], -i), default=None)


def _trimmed(names: list[str | None]) -> list[str | None]:
    while names and names[-1] is None:
        names.pop()
    return names
