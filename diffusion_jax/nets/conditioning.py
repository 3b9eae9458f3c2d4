"""What a network is conditioned on besides the time: a class, a vector, a sequence, a picture, or several at once.

A condition of b examples is a dict with any of these entries, or just the array of labels:

    label    int[b]           one of the classes, or `classes` for none
    vector   f32[b, n]        numbers, such as a pose or the embedding of a picture; absent where vector_mask is False
    tokens   f32[b, m, d]     a sequence of any length, such as an encoded text; token j is absent where tokens_mask is
    image    f32[b *pixels c] another signal of the size of x, such as a masked or enlarged picture; absent where 0
    sizes    f32[b, k]        numbers that are embedded like a time, such as a picture's height and where it was cut;
                              absent where sizes_mask is False
    residuals                 a sequence of f32[b *pixels c], what a ControlNet adds to the features; absent where 0

with vector_mask, sizes_mask: bool[b] and tokens_mask: bool[b, m] all True unless given. What sizes and residuals do is
told in `text_unet`; the others, with GN group normalization, enter as

    e = (embedding of t) + (row of the label) + vector_mask (V_2 silu(V_1 vector))                              (1)
    h <- h + W_o softmax(q k^T / sqrt(d)) v,   q = W_q GN(h),   (k, v) = W tokens    over the tokens that are there (2)
    x <- (x, image)   side by side in the channels                                                              (3)

An absent vector adds nothing to (1), a sequence without tokens nothing to (2), and an entry that is left out is absent
for every example. Absence is a value, which is what classifier-free guidance needs: `absent(cond, classes)` is the
`null` of `guidance.classifier_free`, and what replaces a condition at random in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.layers import GroupNorm, Linear, Options
from diffusion_jax.ops import bcast
from diffusion_jax.typing import Array, Cond, InputError

MASKS = {"vector": "vector_mask", "tokens": "tokens_mask", "sizes": "sizes_mask"}


class Kinds(NamedTuple):
    """What a network takes: the number of classes, length of the vector, width of the tokens, channels of the image.

    And the number of sizes and of residuals.
    """

    classes: int | None = None
    vector: int | None = None
    tokens: int | None = None
    image: int | None = None
    sizes: int | None = None
    residuals: int | None = None


class Given(NamedTuple):
    """A condition that has been checked; None is absent for all examples. A mask of None is True everywhere."""

    label: Array | None = None
    vector: Array | None = None
    vector_mask: Array | None = None
    tokens: Array | None = None
    tokens_mask: Array | None = None
    image: Array | None = None
    sizes: Array | None = None
    sizes_mask: Array | None = None
    residuals: Sequence[Array] | None = None


def check_kinds(kinds: Kinds) -> None:
    """Raise InputError unless every size is at least 1."""
    for name, n in kinds._asdict().items():
        if n is not None and n < 1:
            raise InputError(f"{name}={n}: the size of a condition is at least 1, or None for a network without it")


def read(cond: Cond, kinds: Kinds, x: Array) -> Given:
    """The condition of a batch `x: [b *pixels c]`; a plain array is the label.

    Raises ValueError for an entry that the network does not take, that is not known, or of another shape or type.
    """
    entries = {} if cond is None else dict(cond) if isinstance(cond, Mapping) else {"label": cond}
    given = {name: value for name, value in entries.items() if value is not None}
    takes = {name: n for name, n in zip(("label", *Kinds._fields[1:]), kinds, strict=True) if n is not None}
    for name in given:
        kind = name.removesuffix("_mask")
        if kind not in takes or name not in Given._fields:
            what = "labels were given to a network without classes" if name == "label" else f"no condition {name!r}"
            raise ValueError(f"{what}: this network takes {', '.join(takes) or 'no condition'}")
        if kind not in given:
            raise ValueError(f"{name} was given without {kind}")
    result = Given(**given)
    _check_shapes(result, kinds, x)
    return result


def _check_shapes(given: Given, kinds: Kinds, x: Array) -> None:
    b, m = x.shape[0], "m" if given.tokens is None or given.tokens.ndim != 3 else given.tokens.shape[1]
    wanted = {
        "vector": (b, kinds.vector),
        "vector_mask": (b,),
        "tokens": (b, m, kinds.tokens),
        "tokens_mask": (b, m),
        "image": (*x.shape[:-1], kinds.image),
        "sizes": (b, kinds.sizes),
        "sizes_mask": (b,),
    }
    for name, shape in wanted.items():
        value, kind = getattr(given, name), jnp.bool_ if name.endswith("mask") else jnp.floating
        if value is not None and not (value.shape == shape and jnp.issubdtype(value.dtype, kind)):
            type_name = "bool" if kind is jnp.bool_ else "float"
            listed = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be {type_name}[{listed}], got {value.dtype}{list(value.shape)}")
    if given.label is not None and not (given.label.shape == (b,) and jnp.issubdtype(given.label.dtype, jnp.integer)):
        raise ValueError(f"labels must be int[{b}], got {given.label.dtype}{list(given.label.shape)}")
    ranks = [x.ndim] * (kinds.residuals or 0) if given.residuals is None else [r.ndim for r in given.residuals]
    if ranks != [x.ndim] * (kinds.residuals or 0):
        raise ValueError(f"residuals must be {kinds.residuals} arrays of {x.ndim} axes, got {len(ranks)} of {ranks}")


def with_masks(cond: Mapping[str, Array]) -> dict[str, Array]:
    """The same condition with its masks written out, so that parts of it can be made absent.

    >>> sorted(with_masks({"tokens": jnp.ones((2, 5, 3))}))
    ['tokens', 'tokens_mask']
    """
    masks = {
        mask: jnp.ones(cond[kind].shape[: 2 if kind == "tokens" else 1], jnp.bool_)
        for kind, mask in MASKS.items()
        if kind in cond
    }
    return {**masks, **cond}


def absent(cond: Cond, classes: int | None = None) -> Cond:
    """The null condition, scalars with the structure of `cond`: nothing of it is there, for every example.

    Give it to `classifier_free`, or put it in place of some examples' condition in training. ValueError for a vector,
    tokens or sizes without a mask (see `with_masks`), or for a label without the number of classes.

    >>> absent({"label": jnp.array([3]), "image": jnp.ones((1, 8, 8, 1))}, classes=10)
    {'label': 10, 'image': 0.0}
    """
    if not isinstance(cond, Mapping):
        return absent({"label": cond}, classes)["label"]
    for kind, mask in MASKS.items():
        if kind in cond and mask not in cond:
            raise ValueError(f"{kind} can only be absent where {mask} says so: with_masks(cond) adds it")
    if "label" in cond and classes is None:
        raise ValueError("the absent label is the number of classes, which was not given")
    values = {"label": classes, **dict.fromkeys(MASKS.values(), False)}
    return {name: _filled(value, values.get(name, 0.0)) for name, value in cond.items()}


def _filled(tree: Cond, leaf: float | None) -> Cond:
    return jax.tree.map(lambda _: leaf, tree)


class VectorEmbedding(nnx.Module):
    """The last term of equation (1): `[b, n] -> [b, n_out]`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: layers.DType):
        self.linear_1 = Linear(rngs, n_in, n_out, dtype)
        self.linear_2 = Linear(rngs, n_out, n_out, dtype)

    def __call__(self, vector: Array, mask: Array | None) -> Array:
        e = self.linear_2(jax.nn.silu(self.linear_1(vector)))
        return e if mask is None else e * bcast(mask.astype(e.dtype), e)


class CrossAttention(nnx.Module):
    """Equation (2): the pixels of `[b, *pixels, n]` attend to tokens `[b, m, d]`."""

    def __init__(self, rngs: nnx.Rngs, n: int, n_tokens: int, o: Options):
        self.group_norm = GroupNorm(n, o.groups)
        self.to_q = Linear(rngs, n, n, o.dtype)
        self.to_k = Linear(rngs, n_tokens, n, o.dtype)
        self.to_v = Linear(rngs, n_tokens, n, o.dtype)
        self.to_out = nnx.List([Linear(rngs, n, n, o.dtype, layers.zeros)])
        self.heads = o.heads

    def __call__(self, x: Array, tokens: Array, mask: Array | None) -> Array:
        q = self.to_q(self.group_norm(x, act=False))
        k, v = layers.joint(tokens, self.to_k, self.to_v)
        if mask is None:
            return x + self.to_out[0](layers.attend(q, k, v, self.heads))
        h = self.to_out[0](masked_attend(q, k, v, mask, self.heads))
        return x + jnp.where(bcast(jnp.any(mask, axis=1), h), h, jnp.zeros((), h.dtype))


def masked_attend(q: Array, k: Array, v: Array, mask: Array, heads: int) -> Array:
    """Softmax attention of `q: [b, *pixels, c]` over those of `k, v: [b, m, c]` where `mask: bool[b, m]` is True.

    Where it is False for all of an example's tokens, the result is finite and means nothing.
    """
    shape = (q.shape[0], -1, heads, q.shape[-1] // heads)
    q_, k_, v_ = (jnp.reshape(z, shape) for z in (q, k, v))
    some = mask | ~jnp.any(mask, axis=1, keepdims=True)
    return jnp.reshape(attention(q_, k_, v_, mask=some[:, None, None, :]), q.shape)
