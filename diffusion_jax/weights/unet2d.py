"""The weights of diffusers' `UNet2DModel` and of `diffusion_jax.nets.unet`.

The modules have the same names, so the table is one of leaves:

    here                               there
    kernel [*widths, n_in, n_out]      weight [n_out, n_in, *widths]                                            (1)
    scale, embedding                   weight
    bias                               bias

Files older than diffusers 0.18 name the attention layers query, key, value, proj_attn; they are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `unet` from the state dict of a `UNet2DModel`, by table (1).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    Raises ValueError listing every weight that is missing, left over or of another shape.
    """
    source = {_modern(name): value for name, value in state.items()}
    if len(source) != len(state):
        raise ValueError("two weights have the same name once the old attention names are replaced")
    targets = dict(_leaves(params_like))
    found: dict[tuple[str, ...], np.ndarray] = {}
    problems = [f"left over: {name}" for name in sorted(source.keys() - {_name(path) for path in targets})]
    for path, like in targets.items():
        if _name(path) not in source:
            problems.append(f"missing: {_name(path)}")
            continue
        value = np.asarray(source[_name(path)])
        value = _kernel_here(value) if path[-1] == "kernel" else value
        if value.shape != tuple(like.shape):
            problems.append(f"shape of {_name(path)}: here {tuple(like.shape)}, there {value.shape} (in our order)")
        found[path] = np.ascontiguousarray(value, dtype=like.dtype)
    if problems:
        raise ValueError("the weights are not those of this network:\n  " + "\n  ".join(problems))
    return _nested(found)


def to_diffusers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a `UNet2DModel` from the parameters of a `unet`, by table (1); inverse of `from_diffusers`.

    Raises ValueError listing every parameter that has no name there.
    """
    leaves = dict(_leaves(params))
    strange = [".".join(path) for path in leaves if path[-1] not in LEAVES]
    if strange:
        raise ValueError("parameters without a name in diffusers:\n  " + "\n  ".join(strange))
    return {
        _name(path): np.ascontiguousarray(_kernel_there(np.asarray(v)) if path[-1] == "kernel" else np.asarray(v))
        for path, v in leaves.items()
    }


def _name(path: tuple[str, ...]) -> str:
    return ".".join([*path[:-1], LEAVES.get(path[-1], path[-1])])


def _modern(name: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name)


def _kernel_here(weight: np.ndarray) -> np.ndarray:
    return np.transpose(weight, (*range(2, weight.ndim), 1, 0))


def _kernel_there(kernel: np.ndarray) -> np.ndarray:
    return np.transpose(kernel, (kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)))


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [leaf for name, sub in tree.items() for leaf in _leaves(sub, (*prefix, name))]


def _nested(leaves: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree
