r"""Diffusion transformers: DiT (Peebles & Xie 2023, arXiv:2212.09748), SiT (Ma et al. 2024, arXiv:2401.08740), and
the kit that later work added, up to JiT on pixels (Li & He 2025, arXiv:2511.13720).

A picture of h x w patches of p x p pixels is a sequence X of tokens [h w, n]; N is layer normalization without
parameters, and the modulation is adaLN-zero, whose W starts at zero so that every block starts as the identity:

    X = E patch + P,     c = W_2 silu(W_1 f(t)) + row of the label [+ embedding of a vector]                     (1)
    (b_1, a_1, g_1, b_2, a_2, g_2) = W silu(c)                                                                   (2)
    X <- X + g_1 proj(attention(qkv(N(X) (1 + a_1) + b_1)))                                                      (3)
    X <- X + g_2 fc2(gelu(fc1(N(X) (1 + a_2) + b_2)))                        gelu in its tanh form               (4)
    patch' = W_o (N(X) (1 + a) + b),   (b, a) = W silu(c)                                                        (5)
    f(t) = [cos(t r_i), sin(t r_i)],   r_i = 10000^(-i / 128),   i < 128                                         (6)
    P = [sin(x w_j), cos(x w_j), sin(y w_j), cos(y w_j)],   w_j = 10000^(-4 j / n),   j < n / 4                  (7)

for the patch in column x and row y. P is computed for any grid and is no parameter. The kit, each an option:

    RMSNorm      N(X) = gamma X (mean X^2 + e)^(-1/2)                      (Zhang & Sennrich 2019, arXiv:1910.07467)
    SwiGLU       w3 (silu(u) v),  (u, v) = w12 X,  2/3 as wide as (4)               (Shazeer 2020, arXiv:2002.05202)
    QK-norm      RMSNorm of each head's q and k                            (Dehghani et al. 2023, arXiv:2302.05442)
    rotary       q_j + i q_(j+d/2) is turned by y 10000^(-4 j / d) for j < d/4, by x likewise for d/4 <= j < d/2,
                 and k too, so that scores know relative places            (Su et al. 2021, arXiv:2104.09864, eq. 34)
    in context   copies of the label's row with places of their own join the sequence from some block on  (JiT)
    bottleneck   E of rank r < n, for patches of thousands of numbers                                     (JiT)
    cross        after (3), X <- X + attention of X to the condition's tokens  (Chen et al. 2023, arXiv:2310.00426)
    joint        the condition's tokens are a second stream with weights of its own and one attention over both
                                                          (MM-DiT: Esser et al. 2024, arXiv:2403.03206, figure 2b)

With `cross` and `joint` a learned token stands beside the condition's, so that one with no tokens is a condition too.
Names of attributes are those of the published checkpoints; MM-DiT's are those of Stable Diffusion 3.

How it is laid out for speed. (2) and the gates work on [b, n], and normalization, modulation, gate and residual are
one expression each with float32 inside, which XLA fuses around the matrix products. q, k and v leave one product as
[b, tokens, 3, heads, d] and go to attention as they are: no transpose.
`split_qkv` makes it three products instead. Fused kernels want q, k and v each contiguous, and cutting them out of one
array is a copy of 3 n numbers a token, about 3 % of a training step of DiT-XL/2 by its bytes, while three narrower
products may run less well: to be measured on the device at hand. One product for the modulations (2) of all blocks
is not done: it would copy a third of all parameters in every step to save a few launches of b rows each.
Blocks are unrolled; `scan` compiles one block for all, with a stack of their weights (in `dtype`) made in each step.

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): `TENSOR_PARALLEL` splits heads and hidden units, so that a
device computes whole heads, and each of (3) and (4) ends in one all-reduce. The kernel of qkv is [n, 3, heads, d]: in
memory the published [q | k | v], but a split of its axis 2 gives every device q, k and v of its heads, and a number of
devices that does not divide the heads is seen before anything is compiled. `FUSED` tells an optimizer which kernels
are several matrices side by side, along axis 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.nets import conditioning, layers
from diffusion_jax.nets.attention import Implementation, attention
from diffusion_jax.nets.conditioning import Given, Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Linear
from diffusion_jax.typing import Array, Cond, InputError, Key, Net

SIZES = {
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
    "H": (32, 1280, 16), "G": (40, 1664, 16),
}  # fmt: skip
"""Blocks, width and heads: DiT's table 1; H and G are JiT's."""
TENSOR_PARALLEL = {
    r"attn\.(qkv|kv)\.kernel$": 2,
    r"attn\.(qkv|kv)\.bias$": 1,
    r"cross_attn\.q\.kernel$": 1,
    r"cross_attn\.q\.bias$": 0,
    r"attn\.proj\.kernel$": 0,
    r"mlp\.fc1\.kernel$": 1,
    r"mlp\.fc1\.bias$": 0,
    r"mlp\.fc2\.kernel$": 0,
    r"mlp\.w12\.kernel$": 2,
    r"mlp\.w12\.bias$": 1,
    r"mlp\.w3\.kernel$": 0,
}
"""Regular expression on the dotted path of a parameter -> the axis that goes over the mesh axis "model"."""
FUSED = {r"attn\.qkv\.kernel$": 3, r"attn\.kv\.kernel$": 2, r"mlp\.w12\.kernel$": 2}
"""Regular expression -> how many matrices lie side by side in a kernel `[n_in, parts, *n_out]`."""
EPS = 1e-6
FEATURES = 256

Norm = Literal["layer", "rms"]
Context = Literal["cross", "joint"]
Rotary = tuple[Array, Array]
"""cos, sin: f32[tokens, d / 2]."""


class Options(NamedTuple):
    """What all blocks of one transformer share; `dit` explains them."""

    width: int
    heads: int
    norm: Norm
    swiglu: bool
    qk_norm: bool
    split_qkv: bool
    attention: Implementation
    dtype: layers.DType


class Plan(NamedTuple):
    """What the transformer has around its blocks; `dit` explains them. grid positions: added, rotary."""

    depth: int
    patch: int
    n_in: int
    n_out: int
    kinds: Kinds
    context: Context
    in_context: tuple[int, int]
    bottleneck: int | None
    position: bool
    rotary: bool
    scan: bool
    remat: layers.Remat


def dit(
    size: str | tuple[int, int, int] = "XL",
    patch: int = 2,
    shape: Sequence[int] = (32, 32, 4),
    *,
    classes: int | None = 1000,
    learned_variance: bool = True,
    out_channels: int | None = None,
    vector: int | None = None,
    tokens: int | None = None,
    context: Context = "cross",
    image: int | None = None,
    norm: Norm = "layer",
    position: bool = True,
    rotary: bool = False,
    qk_norm: bool = False,
    swiglu: bool = False,
    in_context: tuple[int, int] = (0, 0),
    bottleneck: int | None = None,
    attention: Implementation = "auto",
    split_qkv: bool = False,
    scan: bool = False,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """A diffusion transformer: `(x: [b h w c], t: [b], cond) -> f32[b h w out_channels]`.

    size: one of SIZES, or (blocks, width, heads). shape: (h, w, c) of x; any other h and w that patch divides will do.
    classes, vector, tokens, image: what the condition may hold; see `nets.conditioning`. context: how its tokens enter.
    out_channels: c by default; learned_variance doubles it, and the caller splits the last axis in two.
    norm, position (the P of (1)), rotary, qk_norm, swiglu: the kit above. in_context: (number of tokens, block from
    which on they take part). bottleneck: the rank of E. attention: see `nets.attention`; "chunked" for `jax.jvp`.
    split_qkv, scan, remat: see above; they change speed and memory alone. dtype: of the computation; parameters,
    normalization, embeddings of t and labels, and the output are float32.
    Raises InputError if the arguments do not fit together. Source: equations (1)-(7).
    """
    depth, width, heads = _size(size)
    kinds = Kinds(classes, vector, tokens, image)
    conditioning.check_kinds(kinds)
    o = Options(width, heads, norm, swiglu, qk_norm, split_qkv, attention, dtype)
    c = shape[-1]
    plan = Plan(
        depth, patch, c + (image or 0), (out_channels or c) * (2 if learned_variance else 1), kinds, context,
        in_context, bottleneck, position, rotary, scan, remat,
    )  # fmt: skip
    _check(shape, plan, o)
    return functional(lambda rngs: DiT(rngs, plan, o))


def dit_s2(**options: Any) -> Net:
    """DiT-S/2 for 32 x 32 x 4 latents: 33M parameters (Peebles & Xie 2023, table 4). options: of `dit`."""
    return dit("S", 2, **options)


def dit_b2(**options: Any) -> Net:
    """DiT-B/2: 130M parameters (Peebles & Xie 2023, table 4). options: of `dit`."""
    return dit("B", 2, **options)


def dit_l2(**options: Any) -> Net:
    """DiT-L/2: 458M parameters (Peebles & Xie 2023, table 4). options: of `dit`."""
    return dit("L", 2, **options)


def dit_xl2(**options: Any) -> Net:
    """DiT-XL/2: 675M parameters (Peebles & Xie 2023, table 4). options: of `dit`."""
    return dit("XL", 2, **options)


def sit_xl2(**options: Any) -> Net:
    """SiT-XL/2: the same network without a learned variance (Ma et al. 2024, section 4). options: of `dit`.

    The published weights have time 0 at noise and 1 at data, and predict the velocity in that direction:
    `parameterize(lambda x, t, c: -net(x, t, c), rectified(), "velocity", time=lambda t: 1 - t)`.
    """
    return dit("XL", 2, **{"learned_variance": False, **options})


def just_image(size: str = "B", patch: int = 16, shape: Sequence[int] = (256, 256, 3), **options: Any) -> Net:
    """JiT on pixels, B, L, H or G: 131M, 459M, 953M, 2B parameters (Li & He 2025). options: of `dit`.

    It predicts x0, and its loss is on the velocity: `parameterize(net, rectified(), "x0")` and a `denoising_loss` with
    target "velocity"; time there runs the other way, 1 - t.
    """
    start = {"B": 4, "L": 8, "H": 10, "G": 10}
    if size not in start:
        raise InputError(f"just_image: size {size!r} is none of {', '.join(start)}")
    kit: dict[str, Any] = {
        "learned_variance": False, "norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True,
        "in_context": (32, start[size]), "bottleneck": 128 if size in "BL" else 256,
    }  # fmt: skip
    return dit(size, patch, shape, **{**kit, **options})


def jit_b16(**options: Any) -> Net:
    """JiT-B/16 for 256 x 256 pixels: 131M parameters (Li & He 2025). options: of `dit`."""
    return just_image("B", 16, **options)


def jit_l16(**options: Any) -> Net:
    """JiT-L/16 for 256 x 256 pixels: 459M parameters (Li & He 2025). options: of `dit`."""
    return just_image("L", 16, **options)


def _size(size: str | tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(size, str):
        return size
    if size not in SIZES:
        raise InputError(f"dit: size {size!r} is none of {', '.join(SIZES)}")
    return SIZES[size]


def _check(shape: Sequence[int], plan: Plan, o: Options) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape is (height, width, channels), got {tuple(shape)}")
    if plan.patch < 1 or shape[0] % plan.patch or shape[1] % plan.patch:
        raise InputError(f"patch={plan.patch} does not divide the size {tuple(shape[:2])}")
    if min(plan.depth, o.width, o.heads) < 1 or o.width % o.heads:
        raise InputError(f"needs blocks, and heads that divide the width; got {plan.depth}, {o.heads}, {o.width}")
    if (plan.position and o.width % 4) or (plan.rotary and o.width // o.heads % 4):
        raise InputError(f"positions want a width, and for rotary ones a head, that 4 divides: {o.width}, {o.heads}")
    for name, value, known in (("norm", o.norm, Norm), ("context", plan.context, Context)):
        if value not in get_args(known):
            raise InputError(f"dit: {name}={value!r} is none of {', '.join(get_args(known))}")
    if o.attention not in get_args(Implementation):
        raise InputError(f"dit: attention={o.attention!r} is none of {', '.join(get_args(Implementation))}")
    length, start = plan.in_context
    if length < 0 or not 0 <= start < plan.depth or (length and plan.kinds.classes is None):
        raise InputError(f"in_context={plan.in_context}: tokens of the label, from one of the {plan.depth} blocks on")


# Layers --------------------------------------------------------------------------------------------------------------


def small(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Values of standard deviation 0.02, DiT's for embeddings; uniform, as the law does not matter."""
    limit = 0.02 * math.sqrt(3)
    return rngs.uniform(shape, jnp.float32, minval=-limit, maxval=limit)


class Fused(nnx.Module):
    """Linear layers of one input as one: `[b, m, n_in] -> parts` times `[b, m, *n_out]`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, parts: int, n_out: tuple[int, ...], dtype: layers.DType):
        kernel = layers.xavier(rngs, (n_in, parts * math.prod(n_out)))
        self.kernel = nnx.Param(jnp.reshape(kernel, (n_in, parts, *n_out)))
        self.bias = nnx.Param(jnp.zeros((parts, *n_out), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Array, *, split: bool = False) -> list[Array]:
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        x = x.astype(self.dtype)
        if split:
            return [jnp.tensordot(x, kernel[:, i], 1) + bias[i][None, None] for i in range(len(bias))]
        y = jnp.tensordot(x, kernel, 1) + bias[None, None]
        return [y[:, :, i] for i in range(len(bias))]


class RMSNorm(nnx.Module):
    """gamma x (mean x^2 + e)^(-1/2) over the last axis, in float32."""

    def __init__(self, n: int):
        self.scale = nnx.Param(jnp.ones((n,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        x32, gamma = x.astype(jnp.float32), jnp.reshape(self.scale[...], (1,) * (x.ndim - 1) + (-1,))
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + EPS) * gamma).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean x) (var x + e)^(-1/2) over the last axis, in float32; no parameters.

    The variance is that of the centred x: a row fits in registers or cache, so that a second look at it is free, and
    a training step on a processor takes a third of the time it takes with the mean of squares from the same pass.
    """

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + EPS)).astype(x.dtype)


def make_norm(o: Options) -> LayerNorm | RMSNorm:
    """The normalization of the residual stream."""
    return RMSNorm(o.width) if o.norm == "rms" else LayerNorm()


def modulate(norm: Callable[[Array], Array], x: Array, shift: Array, scale: Array) -> Array:
    """N(x) (1 + scale) + shift: `x: [b, m, n]`, shift and scale `[b, n]`; the arithmetic is float32."""
    shift, scale = (m.astype(jnp.float32)[:, None, :] for m in (shift, scale))
    return (norm(x.astype(jnp.float32)) * (1 + scale) + shift).astype(x.dtype)


class Attention(nnx.Module):
    """The attention of (3), in two halves, so that other streams can join between them."""

    def __init__(self, rngs: nnx.Rngs, o: Options, *, ends: bool = True):
        d = o.width // o.heads
        self.qkv = Fused(rngs, o.width, 3, (o.heads, d), o.dtype)
        self.q_norm, self.k_norm = (RMSNorm(d), RMSNorm(d)) if o.qk_norm else (None, None)
        self.proj = Linear(rngs, o.width, o.width, o.dtype) if ends else None
        self.split = o.split_qkv

    def heads(self, x: Array, rotary: Rotary | None) -> tuple[Array, Array, Array]:
        """q, k, v: `[b, m, n] -> [b, m, heads, d]`."""
        q, k, v = self.qkv(x, split=self.split)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q, k, v

    def out(self, x: Array) -> Array:
        """`[b, m, heads, d] -> [b, m, n]`."""
        assert self.proj is not None
        return self.proj(jnp.reshape(x, (*x.shape[:2], -1)))


class CrossAttention(nnx.Module):
    """The attention of X to a condition's tokens; proj starts at zero."""

    def __init__(self, rngs: nnx.Rngs, o: Options):
        self.q = Linear(rngs, o.width, o.width, o.dtype)
        self.kv = Fused(rngs, o.width, 2, (o.heads, o.width // o.heads), o.dtype)
        self.proj = Linear(rngs, o.width, o.width, o.dtype, layers.zeros)
        self.implementation: Implementation = o.attention

    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        k, v = self.kv(context)
        q = jnp.reshape(self.q(x), (*x.shape[:2], *k.shape[2:]))
        y = attention(q, k, v, mask=mask, implementation=self.implementation)
        return self.proj(jnp.reshape(y, x.shape))


class Mlp(nnx.Module):
    """fc2(gelu(fc1(x))) of (4), four times as wide inside."""

    def __init__(self, rngs: nnx.Rngs, o: Options):
        self.fc1 = Linear(rngs, o.width, 4 * o.width, o.dtype)
        self.fc2 = Linear(rngs, 4 * o.width, o.width, o.dtype)

    def __call__(self, x: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class SwiGLU(nnx.Module):
    """w3 (silu(u) v), (u, v) = w12 x, with about the parameters of `Mlp`."""

    def __init__(self, rngs: nnx.Rngs, o: Options):
        hidden = 8 * o.width // 3
        self.w12 = Fused(rngs, o.width, 2, (hidden,), o.dtype)
        self.w3 = Linear(rngs, hidden, o.width, o.dtype)

    def __call__(self, x: Array) -> Array:
        u, v = self.w12(x)
        return self.w3(jax.nn.silu(u) * v)


# Blocks --------------------------------------------------------------------------------------------------------------


class Carry(NamedTuple):
    """What goes from block to block: the picture's tokens [b, m, n] and, with `joint`, the condition's."""

    x: Array
    context: Array | None = None


class Around(NamedTuple):
    """What every block gets: silu(c) [b, n], the places of x, tokens to attend to, bool[b 1 1 m] of those there."""

    c: Array
    rotary: Rotary | None = None
    context: Array | None = None
    mask: Array | None = None


class Block(nnx.Module):
    """Equations (2)-(4); with `cross` it attends to the condition's tokens too.

    not ends: what `joint` needs of the last block of the condition's stream, which nothing comes after: q, k and v.
    """

    def __init__(self, rngs: nnx.Rngs, o: Options, *, cross: bool = False, ends: bool = True):
        self.norm1 = make_norm(o)
        self.attn = Attention(rngs, o, ends=ends)
        self.cross_attn = CrossAttention(rngs, o) if cross else None
        self.norm2 = make_norm(o) if ends else None
        self.mlp = None if not ends else SwiGLU(rngs, o) if o.swiglu else Mlp(rngs, o)
        self.adaLN_modulation = nnx.Dict(
            {"1": Linear(rngs, o.width, (6 if ends else 2) * o.width, o.dtype, layers.zeros)}
        )
        self.implementation: Implementation = o.attention

    def __call__(self, carry: Carry, around: Around) -> Carry:
        m = self.modulation(around.c)
        y = attention(*self.heads(carry.x, m, around.rotary), implementation=self.implementation)
        return Carry(self.rest(carry.x, y, m, around))

    def modulation(self, c: Array) -> list[Array]:
        """The six vectors (2), or the first two."""
        m = self.adaLN_modulation["1"](c)
        return jnp.split(m, m.shape[-1] // c.shape[-1], axis=-1)

    def heads(self, x: Array, m: list[Array], rotary: Rotary | None) -> tuple[Array, Array, Array]:
        """q, k and v of (3)."""
        return self.attn.heads(modulate(self.norm1, x, m[0], m[1]), rotary)

    def rest(self, x: Array, y: Array, m: list[Array], around: Around) -> Array:
        """What follows attention in (3), and (4)."""
        assert self.norm2 is not None
        assert self.mlp is not None
        x = x + m[2][:, None] * self.attn.out(y)
        if self.cross_attn is not None and around.context is not None:
            x = x + self.cross_attn(LayerNorm()(x), around.context, around.mask)
        return x + m[5][:, None] * self.mlp(modulate(self.norm2, x, m[3], m[4]))


class JointBlock(nnx.Module):
    """A block for each of two streams, with one attention over both; the last one ends the condition's stream."""

    def __init__(self, rngs: nnx.Rngs, o: Options, *, last: bool):
        self.context_block = Block(rngs, o, ends=not last)
        self.x_block = Block(rngs, o)
        self.last = last

    def __call__(self, carry: Carry, around: Around) -> Carry:
        x, context = carry
        assert context is not None
        mine, theirs = self.x_block.modulation(around.c), self.context_block.modulation(around.c)
        streams = zip(
            self.context_block.heads(context, theirs, None), self.x_block.heads(x, mine, around.rotary), strict=True
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in streams)
        y = attention(q, k, v, mask=around.mask, implementation=self.x_block.implementation)
        m = context.shape[1]
        x = self.x_block.rest(x, y[:, m:], mine, around)
        return Carry(x, context if self.last else self.context_block.rest(context, y[:, :m], theirs, around))


def run(blocks: Sequence[Any], carry: Carry, around: Around, remat: layers.Remat, scan: bool) -> Carry:
    """Block after block. scan: one program for those that are alike, over a stack of their weights."""
    if scan and len(blocks) > 1 and len({str(nnx.split(block)[0]) for block in blocks}) == 1:
        return _scanned(blocks, carry, around, remat)
    for block in blocks:
        carry = layers.remat(remat, block)(carry, around)
    return carry


def _scanned(blocks: Sequence[Any], carry: Carry, around: Around, remat: layers.Remat) -> Carry:
    graph, states = nnx.split(blocks[0])[0], [nnx.split(block)[1] for block in blocks]

    def stacked(*leaves: Array) -> Array:
        kernels = leaves[0].ndim > 1
        return jnp.stack([leaf.astype(carry.x.dtype) if kernels else leaf for leaf in leaves])

    def step(carry: Carry, state: Any) -> tuple[Carry, None]:
        return layers.remat(remat, nnx.merge(graph, state))(carry, around), None

    return jax.lax.scan(step, carry, jax.tree.map(stacked, *states))[0]


# Positions, time, ends -----------------------------------------------------------------------------------------------


def position_table(h: int, w: int, n: int) -> Array:
    """Equation (7): f32[h w, n], row after row."""
    rates = 10000.0 ** (jnp.arange(n // 4, dtype=jnp.float32) * (-4 / n))
    x, y = (place[:, None] * rates[None, :] for place in _places(h, w))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)


def rotary_table(h: int, w: int, d: int, before: int = 0) -> Rotary:
    """cos and sin of the angles of every pair: f32[before + h w, d / 2]; the `before` first tokens are not turned."""
    rates = 10000.0 ** (jnp.arange(d // 4, dtype=jnp.float32) * (-4 / d))
    x, y = _places(h, w)
    angles = jnp.concatenate([y[:, None] * rates[None, :], x[:, None] * rates[None, :]], axis=-1)
    angles = jnp.concatenate([jnp.zeros((before, d // 2), jnp.float32), angles])
    return jnp.cos(angles), jnp.sin(angles)


def _places(h: int, w: int) -> tuple[Array, Array]:
    """Column and row of each patch: f32[h w]."""
    x, y = jnp.arange(w, dtype=jnp.float32), jnp.arange(h, dtype=jnp.float32)
    return jnp.tile(x, h), jnp.repeat(y, w)


def rotate(q: Array, rotary: Rotary) -> Array:
    """Turn the pairs (q_j, q_(j+d/2)) of `q: [b, m, heads, d]` by the angles of `rotary_table`."""
    cos, sin = (table[None, :, None, :] for table in rotary)
    a, b = jnp.split(q.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(q.dtype)


def patches(x: Array, p: int) -> Array:
    """`[b, h p, w p, c] -> [b, h w, p p c]`."""
    b, h, w, c = x.shape
    split = jnp.reshape(x, (b, h // p, p, w // p, p, c))
    return jnp.reshape(jnp.swapaxes(split, 2, 3), (b, h * w // p**2, p * p * c))


def unpatch(x: Array, h: int, w: int, p: int) -> Array:
    """`[b, h w, p p c] -> [b, h p, w p, c]`; the inverse of `patches`."""
    split = jnp.reshape(x, (x.shape[0], h, w, p, p, -1))
    return jnp.reshape(jnp.swapaxes(split, 2, 3), (x.shape[0], h * p, w * p, -1))


class PatchEmbed(nnx.Module):
    """E of (1) on whole patches; proj is kept as the convolution [p, p, c, n] of stride p that it is."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, p: int, n: int, dtype: layers.DType):
        self.proj = Kernel(rngs, (p, p, n_in, n), dtype)

    def __call__(self, x: Array) -> Array:
        return self.proj(x)


class Bottleneck(nnx.Module):
    """E of rank r: a convolution [p, p, c, r] of stride p without bias, then one of width 1 to n channels."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, p: int, r: int, n: int, dtype: layers.DType):
        self.proj1 = Kernel(rngs, (p, p, n_in, r), dtype, bias=False)
        self.proj2 = Kernel(rngs, (1, 1, r, n), dtype)

    def __call__(self, x: Array) -> Array:
        return self.proj2(self.proj1(x))


class Kernel(nnx.Module):
    """A convolution [p, p, c, n] of stride p as a matrix product over patches: `[b, m, p p c] -> [b, m, n]`."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], dtype: layers.DType, *, bias: bool = True):
        n = shape[-1]
        self.kernel = nnx.Param(jnp.reshape(layers.xavier(rngs, (math.prod(shape[:-1]), n)), shape))
        self.bias = nnx.Param(jnp.zeros((n,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        kernel = jnp.reshape(self.kernel[...], (-1, self.kernel.shape[-1])).astype(self.dtype)
        y = jnp.matmul(x.astype(self.dtype), kernel)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)[None, None]


class TimestepEmbedder(nnx.Module):
    """The terms of t in (1), with the features (6); float32."""

    def __init__(self, rngs: nnx.Rngs, n: int):
        first, second = Linear(rngs, FEATURES, n, jnp.float32, small), Linear(rngs, n, n, jnp.float32, small)
        self.mlp = nnx.Dict({"0": first, "2": second})

    def __call__(self, t: Array) -> Array:
        rates = 10000.0 ** (-2 / FEATURES * np.arange(FEATURES // 2))  # double: t is as large as 1000
        angles = t.astype(jnp.float32)[:, None] * jnp.asarray(rates, jnp.float32)[None, :]
        features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return self.mlp["2"](jax.nn.silu(self.mlp["0"](features)))


class Table(nnx.Module):
    """Rows that are looked up or learned as they are."""

    def __init__(self, rngs: nnx.Rngs, rows: int, n: int):
        self.embedding = nnx.Param(small(rngs, (rows, n)))


class LabelEmbedder(nnx.Module):
    """The row of a label; row `classes` stands for none: `int[b] -> f32[b, n]`."""

    def __init__(self, rngs: nnx.Rngs, classes: int, n: int):
        self.embedding_table = Table(rngs, classes + 1, n)

    def __call__(self, labels: Array | None, batch: int) -> Array:
        table = self.embedding_table.embedding[...]
        if labels is None:
            return jnp.broadcast_to(table[-1][None, :], (batch, table.shape[1]))
        return jnp.take(table, labels, axis=0, mode="clip")


class FinalLayer(nnx.Module):
    """Equation (5)."""

    def __init__(self, rngs: nnx.Rngs, n_out: int, o: Options):
        self.norm_final = make_norm(o)
        self.linear = Linear(rngs, o.width, n_out, o.dtype, layers.zeros)
        self.adaLN_modulation = nnx.Dict({"1": Linear(rngs, o.width, 2 * o.width, o.dtype, layers.zeros)})

    def __call__(self, x: Array, c: Array) -> Array:
        shift, scale = jnp.split(self.adaLN_modulation["1"](c), 2, axis=-1)
        return self.linear(modulate(self.norm_final, x, shift, scale))


class DiT(nnx.Module):
    """The whole network; see `dit`."""

    def __init__(self, rngs: nnx.Rngs, plan: Plan, o: Options):
        kinds, n = plan.kinds, o.width
        self.x_embedder = (
            PatchEmbed(rngs, plan.n_in, plan.patch, n, o.dtype)
            if plan.bottleneck is None
            else Bottleneck(rngs, plan.n_in, plan.patch, plan.bottleneck, n, o.dtype)
        )
        self.t_embedder = TimestepEmbedder(rngs, n)
        self.y_embedder = None if kinds.classes is None else LabelEmbedder(rngs, kinds.classes, n)
        self.vector_embedder = (
            None if kinds.vector is None else conditioning.VectorEmbedding(rngs, kinds.vector, n, jnp.float32)
        )
        self.context_embedder = None if kinds.tokens is None else Linear(rngs, kinds.tokens, n, o.dtype)
        self.context_null = None if kinds.tokens is None else Table(rngs, 1, n)
        self.in_context_posemb = Table(rngs, plan.in_context[0], n) if plan.in_context[0] else None
        self.blocks = nnx.List([self._block(rngs, i, plan, o) for i in range(plan.depth)])
        self.final_layer = FinalLayer(rngs, plan.patch**2 * plan.n_out, o)
        self.plan, self.o = plan, o

    @staticmethod
    def _block(rngs: nnx.Rngs, i: int, plan: Plan, o: Options) -> Block | JointBlock:
        if plan.kinds.tokens is not None and plan.context == "joint":
            return JointBlock(rngs, o, last=i == plan.depth - 1)
        return Block(rngs, o, cross=plan.kinds.tokens is not None)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        plan, o = self.plan, self.o
        self.check_input(x, t)
        given = conditioning.read(cond, plan.kinds, x)
        grid = (x.shape[1] // plan.patch, x.shape[2] // plan.patch)
        tokens = self.x_embedder(patches(self.beside(x, given), plan.patch))
        if plan.position:
            tokens = tokens + position_table(*grid, o.width).astype(o.dtype)[None]
        rows = None if self.y_embedder is None else self.y_embedder(given.label, x.shape[0])
        c = self.embed(t, rows, given)
        tokens = self.body(tokens, c, rows, given, grid)
        return unpatch(self.final_layer(tokens, c), *grid, plan.patch).astype(jnp.float32)

    def check_input(self, x: Array, t: Array) -> None:
        """Raise ValueError unless x is `[b h w c]`, with sizes that patch divides, and t is `[b]`."""
        p, c = self.plan.patch, self.plan.n_in - (self.plan.kinds.image or 0)
        if x.ndim != 4 or x.shape[-1] != c or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(f"x must be [b h w {c}] with h and w divisible by {p}, got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be [{x.shape[0]}], one time for each image, got {list(t.shape)}")

    def beside(self, x: Array, given: Given) -> Array:
        """x with the condition's image beside it in the channels, zeros where there is none."""
        if self.plan.kinds.image is None:
            return x
        image = given.image
        if image is None:
            image = jnp.zeros((*x.shape[:-1], self.plan.kinds.image), x.dtype)
        return jnp.concatenate([x, image.astype(x.dtype)], axis=-1)

    def embed(self, t: Array, rows: Array | None, given: Given) -> Array:
        """silu(c) of (1) and (2): `[b, n]` in the type of the computation."""
        c = self.t_embedder(t)
        if rows is not None:
            c = c + rows
        if self.vector_embedder is not None and given.vector is not None:
            c = c + self.vector_embedder(given.vector, given.vector_mask)
        return jax.nn.silu(c).astype(self.o.dtype)

    def context(self, given: Given, batch: int) -> tuple[Array, Array | None]:
        """The condition's tokens after the learned one: `[b, 1 + m, n]`, and bool[b, 1 + m] of those that are there."""
        assert self.context_embedder is not None
        assert self.context_null is not None
        null = self.context_null.embedding[...].astype(self.o.dtype)
        null = jnp.broadcast_to(null[None], (batch, *null.shape))
        if given.tokens is None:
            return null, None
        tokens = jnp.concatenate([null, self.context_embedder(given.tokens)], axis=1)
        if given.tokens_mask is None:
            return tokens, None
        return tokens, jnp.concatenate([jnp.ones((batch, 1), jnp.bool_), given.tokens_mask], axis=1)

    def body(self, x: Array, c: Array, rows: Array | None, given: Given, grid: tuple[int, int]) -> Array:
        """All blocks: `[b, h w, n] -> [b, h w, n]`."""
        plan, o = self.plan, self.o
        length, start = plan.in_context
        around = Around(c)
        carry = Carry(x)
        if self.context_embedder is not None:
            context, mask = self.context(given, x.shape[0])
            around = Around(c, None, context, mask)
            if plan.context == "joint":
                carry, around = Carry(x, context), Around(c, None, None, mask)
        turned = functools.partial(rotary_table, *grid, o.width // o.heads)
        step = functools.partial(run, remat=plan.remat, scan=plan.scan)
        blocks = list(self.blocks)
        if length and start:
            carry = step(blocks[:start], carry, self.placed(around, turned, x.shape[1]))
        if length:
            assert self.in_context_posemb is not None
            assert rows is not None
            extra = (rows[:, None] + self.in_context_posemb.embedding[...][None]).astype(o.dtype)
            carry = Carry(jnp.concatenate([extra, carry.x], axis=1), carry.context)
        rest = blocks[start:] if length else blocks
        around = self.placed(around, functools.partial(turned, before=length), x.shape[1] + length)
        joint = isinstance(blocks[-1], JointBlock)
        carry = step(rest[:-1] if joint else rest, carry, around)
        carry = step(rest[-1:], carry, around) if joint else carry
        return carry.x[:, length:]

    def placed(self, around: Around, turned: Callable[[], Rotary], m: int) -> Around:
        """Around, for a sequence of m tokens: their rotary places, and the mask of keys as attention takes it."""
        mask = around.mask
        if mask is not None and self.plan.context == "joint":
            mask = jnp.concatenate([mask, jnp.ones((mask.shape[0], m), jnp.bool_)], axis=1)
        mask = None if mask is None else mask[:, None, None, :]
        return around._replace(rotary=turned() if self.plan.rotary else None, mask=mask)
