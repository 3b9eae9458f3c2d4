"""The published weights of DiT, SiT and JiT, and of `diffusion_jax.nets.dit`.

The modules have the same names; the arrays are laid out differently where ours keep heads and parts apart:

    here                                       there
    kernel [n_in, n_out], [p, p, c, n]         weight [n_out, n_in], [n, c, p, p]                               (1)
    attn.qkv.kernel [n, 3, heads, d]           weight [3 n, n], rows (q | k | v), head after head; kv likewise  (2)
    mlp.w12.kernel [n, 2, m]                   weight [2 m, n], rows (u | v)                                    (3)
    scale, embedding, bias                     weight, weight, bias
    in_context_posemb.embedding [m, n]         in_context_posemb [1, m, n]
    computed, of any size                      pos_embed [1, h w, n]                                            (4)

JiT turns neighbours (q_2j, q_2j+1) where we turn (q_j, q_j+d/2): with rotary positions the channels of every head of q
and k, and of their norms, are in another order there, which no score depends on.                              (5)

A published SiT has the outputs of a learned variance and does not use them: `from_sit` leaves them out and `to_sit`
writes zeros. A `pos_embed` that is not the computed one, and anything missing or left over, is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path

Weights = Mapping[str, np.ndarray]


def from_dit(state: Weights, params_like: Any, *, rotary: bool = False) -> dict[str, Any]:
    """The parameters of a `dit` from a published state dict, by table (1)-(5).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    rotary: the network's option; JiT's weights have it. Raises ValueError listing every weight that is missing, left
    over or of another shape, and if `pos_embed` is not equation (7) of `nets.dit`.
    """
    _check_positions(state)
    own = {name: value for name, value in state.items() if name != "pos_embed" and "feat_rope" not in name}
    return trees.read(own, params_like, _table(params_like, rotary))


def to_dit(params: Any, *, grid: tuple[int, int] = (16, 16), rotary: bool = False) -> dict[str, np.ndarray]:
    """The published state dict from the parameters of a `dit`, by table (1)-(5), with the positions of `grid`.

    The inverse of `from_dit`. Raises ValueError listing every parameter that has no name there.
    """
    state = trees.write(params, _table(params, rotary), "DiT")
    width = params["final_layer"]["linear"]["kernel"].shape[0]
    return {"pos_embed": positions(*grid, width)[None], **state}


def from_sit(state: Weights, params_like: Any) -> dict[str, Any]:
    """The parameters of a `sit_xl2` from a published state dict; the outputs that SiT does not use are left out."""
    channels = _channels(params_like)
    halved = {
        name: _patches(value, 2 * channels)[:, :channels].reshape(-1, *value.shape[1:]) if _is_output(name) else value
        for name, value in state.items()
    }
    return from_dit(halved, params_like)


def to_sit(params: Any, *, grid: tuple[int, int] = (16, 16)) -> dict[str, np.ndarray]:
    """The published state dict from the parameters of a `sit_xl2`; the unused outputs are zeros."""
    channels = _channels(params)

    def doubled(value: np.ndarray) -> np.ndarray:
        split = _patches(value, channels)
        return np.concatenate([split, np.zeros_like(split)], axis=1).reshape(-1, *value.shape[1:])

    state = to_dit(params, grid=grid)
    return {name: doubled(value) if _is_output(name) else value for name, value in state.items()}


def positions(h: int, w: int, n: int) -> np.ndarray:
    """Equation (7) of `nets.dit` in double precision, as the published models computed it: f32[h w, n]."""
    rates = 10000.0 ** (-4 / n * np.arange(n // 4))
    x, y = np.tile(np.arange(w), h)[:, None] * rates, np.repeat(np.arange(h), w)[:, None] * rates
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def _check_positions(state: Weights) -> None:
    if "pos_embed" not in state:
        return
    given = np.asarray(state["pos_embed"])
    side = math.isqrt(given.shape[1])
    if given.ndim != 3 or side**2 != given.shape[1] or given.shape[2] % 4:
        raise ValueError(f"pos_embed: {given.shape} is not that of a square picture")
    error = np.max(np.abs(given[0] - positions(side, side, given.shape[2])))
    if not error < 1e-4:
        raise ValueError(f"pos_embed is not the table that the network computes: it differs by up to {error:.2g}")


def _table(params: Any, rotary: bool) -> trees.Table:
    """Tables (1)-(3) and (5) for a network whose number of heads is read off its parameters."""
    first = params["blocks"]["0"]
    heads = first.get("x_block", first)["attn"]["qkv"]["bias"].shape[1]

    def table(path: Path) -> Leaf | None:
        name = ".".join(path)
        if name == "in_context_posemb.embedding":
            return Leaf("in_context_posemb", lambda w: w[0], lambda w: w[None])
        leaf = trees.same_names(path)
        if leaf is None:
            return None
        if re.search(r"attn\.(qkv|kv)\.", name):
            parts = 3 if "qkv" in name else 2
            turned = rotary and parts == 3
            return Leaf(leaf.name, lambda w: _heads_here(w, parts, heads, turned), lambda w: _heads_there(w, turned))
        if re.search(r"mlp\.w12\.", name):
            return Leaf(leaf.name, lambda w: _parts_here(w, 2), _parts_there)
        if re.search(r"attn\.[qk]_norm\.", name) and rotary:
            return Leaf(leaf.name, _apart, _together)
        return leaf

    return table


def _heads_here(weight: np.ndarray, parts: int, heads: int, rotary: bool) -> np.ndarray:
    split = _parts_here(weight, parts)
    split = split.reshape(*split.shape[:-1], heads, -1)
    return _turned(split, _apart) if rotary else split


def _heads_there(kernel: np.ndarray, rotary: bool) -> np.ndarray:
    split = _turned(kernel, _together) if rotary else kernel
    return _parts_there(split.reshape(*split.shape[:-2], -1))


def _turned(split: np.ndarray, turn: trees.Turn) -> np.ndarray:
    """Turn q and k of `[*n_in, 3, heads, d]`, and leave v."""
    return np.concatenate([turn(split[..., :2, :, :]), split[..., 2:, :, :]], axis=-3)


def _apart(w: np.ndarray) -> np.ndarray:
    """Pairs of neighbours -> pairs half the last axis apart."""
    return np.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1)


def _together(w: np.ndarray) -> np.ndarray:
    """The inverse of `_apart`."""
    return np.stack(np.split(w, 2, axis=-1), axis=-1).reshape(w.shape)


def _parts_here(weight: np.ndarray, parts: int) -> np.ndarray:
    """`[parts m, n] -> [n, parts, m]`, `[parts m] -> [parts, m]`."""
    return (
        np.moveaxis(weight.reshape(parts, -1, *weight.shape[1:]), -1, 0)
        if weight.ndim == 2
        else weight.reshape(parts, -1)
    )


def _parts_there(kernel: np.ndarray) -> np.ndarray:
    """The inverse of `_parts_here`."""
    return kernel.reshape(len(kernel), -1).T if kernel.ndim == 3 else kernel.reshape(-1)


def _is_output(name: str) -> bool:
    return name.startswith("final_layer.linear.")


def _channels(params: Any) -> int:
    p = params["x_embedder"]["proj"]["kernel"].shape[0]
    return params["final_layer"]["linear"]["bias"].shape[0] // p**2


def _patches(value: np.ndarray, channels: int) -> np.ndarray:
    """Rows (p, p, channels) of the output, the channels apart: `[pixels, channels, ...]`."""
    if value.shape[0] % channels:
        raise ValueError(f"final_layer.linear: {value.shape[0]} outputs do not divide into {channels} channels")
    return value.reshape(-1, channels, *value.shape[1:])
