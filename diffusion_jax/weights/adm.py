"""The weights of the published ADM checkpoints and of `diffusion_jax.nets.adm`, networks, upsamplers and classifiers.

A state dict there (`torch.load(file)` of a checkpoint of guided-diffusion, as NumPy arrays) and here:

    here                                                there
    time_embed.linear_1, .linear_2                      time_embed.0, .2                                         (1)
    label_emb                                           label_emb                [classes, n], the same
    input_blocks.I.J, middle_block.J, output_blocks.I.J the same, with in a block and in attention
        in_norm, in_conv, emb_linear                        in_layers.0, in_layers.2, emb_layers.1
        out_norm, out_conv, skip_connection                 out_layers.0, out_layers.3, skip_connection
        norm, qkv, proj_out                                 the same             [n_out, n_in, 1]
    out_norm, out_conv                                  out.0, out.2
    out_pool.positional_embedding  [1 + pixels, n]      out.2.positional_embedding  [n, 1 + pixels]
    out_pool.qkv_proj, .c_proj                          out.2.qkv_proj, .c_proj  [n_out, n_in, 1]

A channel of qkv is (part, head, channel of the head) here, with part q, k or v. There it is so in the order "new",
and (head, part, channel) in the order "legacy". The checkpoint `64x64_diffusion` has the new one, all others, the
classifiers included, the legacy one; the pooling of a classifier always has the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path, Table

Order = Literal["legacy", "new"]

BLOCK = {
    "in_norm": "in_layers.0",
    "in_conv": "in_layers.2",
    "emb_linear": "emb_layers.1",
    "out_norm": "out_layers.0",
    "out_conv": "out_layers.3",
}
ENDS = {"out_norm": "out.0", "out_conv": "out.2", "out_pool": "out.2"}
TIME = {"linear_1": "0", "linear_2": "2"}
POINTWISE = ("qkv", "proj_out", "qkv_proj", "c_proj")
"""Layers that are matrices here and convolutions of width 1 there."""


def from_guided_diffusion(
    state: Mapping[str, np.ndarray], params_like: Any, *, order: Order, heads: int | None = None,
    head_channels: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """The parameters of an `adm` or `adm_classifier` from a published state dict, by table (1).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    order: that of the checkpoint. heads, head_channels: those of the network. Raises ValueError listing every weight
    that is missing, left over or of another shape.
    """
    return trees.read(state, params_like, table(order, heads, head_channels))


def to_guided_diffusion(
    params: Any, *, order: Order, heads: int | None = None, head_channels: int = 64
) -> dict[str, np.ndarray]:
    """The published form of the parameters of an `adm` or `adm_classifier`; inverse of `from_guided_diffusion`.

    Raises ValueError listing every parameter that has no name there.
    """
    return trees.write(params, table(order, heads, head_channels), "guided-diffusion")


def table(order: Order, heads: int | None, head_channels: int) -> Table:
    """Table (1). Raises InputError for an order that does not exist."""
    if order not in get_args(Order):
        raise InputError(f"order={order!r} is not one of {', '.join(get_args(Order))}")

    def leaf(path: Path) -> Leaf | None:
        if path[-1] == "positional_embedding":
            return Leaf(".".join([*_there(path[:-1]), path[-1]]), np.transpose, np.transpose)
        if path[-1] not in trees.LEAVES:
            return None
        name = ".".join([*_there(path[:-1]), trees.LEAVES[path[-1]]])
        if path[-2] == "qkv" and order == "legacy":
            return _legacy(name, path[-1], heads, head_channels)
        if path[-1] == "kernel" and path[-2] in POINTWISE:
            return Leaf(name, _matrix_here, _matrix_there)
        return Leaf(name, trees.kernel_here, trees.kernel_there) if path[-1] == "kernel" else Leaf(name)

    return leaf


def _there(path: Path) -> Path:
    """The name there of a module."""
    if path[0] == "time_embed":
        return path[0], *(TIME.get(name, name) for name in path[1:])
    if path[0] in ENDS:
        return ENDS[path[0]], *path[1:]
    return tuple(BLOCK.get(name, name) for name in path)


def _matrix_here(weight: np.ndarray) -> np.ndarray:
    """`[n_out, n_in, 1] -> [n_in, n_out]`; what has another rank is left for the check of shapes."""
    return weight[:, :, 0].T if weight.ndim == 3 and weight.shape[2] == 1 else weight


def _matrix_there(kernel: np.ndarray) -> np.ndarray:
    return kernel.T[:, :, None]


def _legacy(name: str, kind: str, heads: int | None, head_channels: int) -> Leaf:
    """qkv, whose channels go by head first there."""

    def order_of(n: int) -> np.ndarray:
        """Where each channel of ours is there."""
        parts = np.arange(n).reshape((heads, 3, -1) if heads else (-1, 3, head_channels))
        return np.swapaxes(parts, 0, 1).ravel()

    def here(value: np.ndarray) -> np.ndarray:
        ours = _matrix_here(value) if kind == "kernel" else value
        fits = ours.ndim and ours.shape[-1] % (3 * (heads or head_channels)) == 0
        return ours[..., order_of(ours.shape[-1])] if fits else ours

    def there(value: np.ndarray) -> np.ndarray:
        theirs = value[..., np.argsort(order_of(value.shape[-1]))]
        return _matrix_there(theirs) if kind == "kernel" else theirs

    return Leaf(name, here, there)
