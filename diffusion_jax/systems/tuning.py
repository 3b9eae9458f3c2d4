"""Low-rank updates of a trained network: few parameters that are trained while all others stay (Hu et al. 2021).

Each chosen kernel W: [*widths, n_in, n_out] is replaced by (arXiv:2106.09685, eq. 3)

    W + (alpha / r) A B,   A: [*widths, n_in, r] normal,   B: [r, n_out] zero at first                           (1)

so that training starts at the network as it was. Parameters are {"frozen": all of the network's, "lora": A and B by
the dotted path of their kernel}; `trained_alone` keeps an optimizer to the latter, and no gradient reaches the former.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.ops import fold
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params
from diffusion_jax.weights import trees
from diffusion_jax.weights.lora import Lora, Update

ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)\.kernel$"
"""The kernels of attention, which most LoRAs change."""
EVERYTHING = (
    r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|conv1|conv2|time_emb_proj)\.kernel$"
)
"""Also the other linear layers and the convolutions of the blocks."""


def low_rank(
    net: Net, *, rank: int = 8, alpha: float | None = None, targets: str = ATTENTION, dtype: Any = None
) -> Net:
    """Equation (1) as a network with the parameters {"frozen", "lora"}; alpha is the rank unless given.

    targets: regular expression, searched in the dotted paths of kernels. dtype: that the frozen ones are kept in,
    float32 unless given. InputError where no kernel matches or the rank is below 1.
    """
    if rank < 1:
        raise InputError(f"rank={rank}: a low-rank update has a rank of at least 1")
    scale = (rank if alpha is None else alpha) / rank

    def init(key: Key) -> Params:
        frozen = halved(net.init(fold(key, 0)), dtype)
        return {"frozen": frozen, "lora": factors(fold(key, 1), frozen, rank, targets)}

    def apply(params: Params, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        frozen = jax.tree.map(jax.lax.stop_gradient, params["frozen"])
        return net.apply(merged(frozen, params["lora"], scale), x, t, cond, key=key)

    return Net(jax.jit(init), apply)


def factors(key: Key, params: Params, rank: int, targets: str) -> dict[str, dict[str, Array]]:
    """A and B of (1) at the start, by the dotted path of their kernel; InputError if no path matches."""
    found = {}
    for i, (path, kernel) in enumerate(trees.leaves(params)):
        name = ".".join(path)
        if re.search(targets, name):
            *widths, n_in, n_out = kernel.shape
            std = 1 / math.sqrt(math.prod(widths) * n_in)
            down = std * jax.random.normal(fold(key, i), (*widths, n_in, rank), jnp.float32)
            found[name] = {"down": down, "up": jnp.zeros((rank, n_out), jnp.float32)}
    if not found:
        raise InputError(f"targets={targets!r} matches no kernel of the network")
    return found


def merged(params: Params, lora: Mapping[str, Mapping[str, Array]], scale: float) -> Params:
    """The network's parameters with (1) in place; kernels keep their type."""
    new = dict(trees.leaves(params))
    for name, part in lora.items():
        path = tuple(name.split("."))
        difference = scale * jnp.matmul(part["down"], part["up"])
        new[path] = (new[path].astype(jnp.float32) + difference).astype(new[path].dtype)
    return trees.nested(new)


def as_lora(lora: Mapping[str, Mapping[str, Any]], alpha: float, component: str = "unet") -> Lora:
    """Trained factors under diffusers' names, as `weights.lora.save` writes them."""
    updates = {}
    for name, part in lora.items():
        down, up = np.asarray(part["down"]), np.asarray(part["up"])
        ones = (1,) * (down.ndim - 2)
        updates[name.removesuffix("kernel") + "weight"] = Update(
            trees.kernel_there(down), trees.kernel_there(up.reshape(*ones, *up.shape)), alpha=float(alpha)
        )
    return {component: updates}


def trained_alone(params: Params) -> Any:
    """Labels for `optax.partition`: "lora" for what is trained, "frozen" for the rest."""
    return {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}


def halved(params: Params, dtype: Any) -> Params:
    """Kernels and tables in another type; vectors, whose sums want every bit, stay. None changes nothing."""
    if dtype is None:
        return params
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)
