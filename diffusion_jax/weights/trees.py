"""What every table of weights needs: parameters as a flat mapping, kernels in torch's order, totality.

A table says where each of our parameters is there and how its array is turned; with leaf = table(path),

    here[path] = leaf.here(there[leaf.name]),   there[leaf.name] = leaf.there(here[path])                       (1)

over all paths and all names: one that is missing, left over or of another shape is an error that lists them all.
Kernels are `[*widths, n_in, n_out]` here and `[n_out, n_in, *widths]` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Path = tuple[str, ...]
Turn = Callable[[np.ndarray], np.ndarray]


class Leaf(NamedTuple):
    """The name there of a parameter, and how its array is turned to come here and to go there."""

    name: str
    here: Turn = np.asarray
    there: Turn = np.asarray


Table = Callable[[Path], Leaf | None]
"""A parameter's path here -> its `Leaf`, or None if it has no counterpart."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""What torch's modules call the leaves of ours."""
NO_FLOATS = "biucOSU"
"""Kinds of NumPy's types that no weight has; bfloat16 is of the kind V."""


def read(state: Mapping[str, np.ndarray], params_like: Any, table: Table) -> dict[str, Any]:
    """Our parameters from a state dict there, by (1).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    Raises ValueError listing every weight that is missing, left over, of another shape or not floating point.
    """
    targets = {path: (like, required(table, path)) for path, like in leaves(params_like)}
    names = {leaf.name for _, leaf in targets.values()}
    problems = [f"left over: {name}" for name in sorted(state.keys() - names)]
    found: dict[Path, np.ndarray] = {}
    for path, (like, leaf) in targets.items():
        if leaf.name not in state:
            problems.append(f"missing: {leaf.name}")
            continue
        value = leaf.here(np.asarray(state[leaf.name]))
        if value.dtype.kind in NO_FLOATS:
            problems.append(f"type of {leaf.name}: {value.dtype}, which is not floating point")
            continue
        if value.shape != tuple(like.shape):
            problems.append(f"shape of {leaf.name}: here {tuple(like.shape)}, there {value.shape} (in our order)")
        found[path] = np.ascontiguousarray(value, dtype=like.dtype)
    if problems:
        raise ValueError("the weights are not those of this network:\n  " + "\n  ".join(problems))
    return nested(found)


def write(params: Any, table: Table, there: str) -> dict[str, np.ndarray]:
    """The state dict there from our parameters, by (1); inverse of `read`. `there` names the source in the error.

    Raises ValueError listing every parameter that has no name there.
    """
    found = {path: (value, table(path)) for path, value in leaves(params)}
    strange = [".".join(path) for path, (_, leaf) in found.items() if leaf is None]
    if strange:
        raise ValueError(f"parameters without a name in {there}:\n  " + "\n  ".join(strange))
    return {leaf.name: np.ascontiguousarray(leaf.there(np.asarray(v))) for v, leaf in found.values() if leaf}


def same_names(path: Path) -> Leaf | None:
    """The table of modules that are called the same here and there: only the leaves of `LEAVES` are renamed."""
    if path[-1] not in LEAVES:
        return None
    name = ".".join([*path[:-1], LEAVES[path[-1]]])
    return Leaf(name, kernel_here, kernel_there) if path[-1] == "kernel" else Leaf(name)


def required(table: Table, path: Path) -> Leaf:
    """The leaf of a path, or a name that no state dict has, so that `read` lists the path as missing."""
    return table(path) or Leaf(f"(no name for {'.'.join(path)})")


def kernel_here(weight: np.ndarray) -> np.ndarray:
    """`[n_out, n_in, *widths] -> [*widths, n_in, n_out]`."""
    return np.transpose(weight, (*range(2, weight.ndim), 1, 0))


def kernel_there(kernel: np.ndarray) -> np.ndarray:
    """`[*widths, n_in, n_out] -> [n_out, n_in, *widths]`."""
    return np.transpose(kernel, (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)))


def leaves(tree: Any, prefix: Path = ()) -> list[tuple[Path, Any]]:
    """The leaves of nested mappings with their paths."""
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [leaf for name, sub in tree.items() for leaf in leaves(sub, (*prefix, name))]


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path; inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree
