"""The U-Net of denoising diffusion models (Ho et al. 2020, arXiv:2006.11239, appendix B), for signals of 1 to 3 axes.

With e = W2 silu(W1 features(t)) + label row, GN group normalization and every convolution of width 3 written C:

    block(h) = S h + C2 dropout(silu(GN(C1 silu(GN(h)) + W silu(e))))         S: 1x1 where the width changes    (1)
    attention(h) = h + W_o softmax(q k^T / sqrt(d)) v,   (q, k, v) = W GN(h)  over all pixels                   (2)

Down: at level i, `blocks` times (1) [and (2)] at width `channels * multipliers[i]`, then a convolution of stride 2.
Middle: (1), (2), (1). Up: at level i, `blocks + 1` times (1) on the concatenation with what the way down left,
[and (2)], then nearest upsampling and a convolution. Output: C silu(GN(h)).
The last convolution of (1), W_o and the output start at zero. Attribute names are those of diffusers' UNet2DModel.

In three axes, for video, the work can be divided (Ho et al. 2022, arXiv:2204.03458, section 3): a convolution of
1 x 3 x 3 looks within each frame, and attention is (2) over the pixels of each frame, followed by (2) over the frames
at each pixel. There q and k are turned by the rotary embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) at frame n,

    (q_i, q_{i+d/2}) <- R(n 10000^(-2i/d)) (q_i, q_{i+d/2}),   R(a) a rotation by the angle a, and the same for k (3)

so that weights depend on the distance of two frames and not on their place, as with the relative embeddings of the
paper, but without parameters, at any length, and under any attention kernel. A convolution of 1 x 3 x 3 followed by one
of 3 x 1 x 1 (Tran et al. 2018, arXiv:1711.11248) mixes neighbouring frames as well.
What a network is conditioned on besides t is the subject of `conditioning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import conditioning, layers
from diffusion_jax.nets.conditioning import CrossAttention, Given, Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options, PerAxis
from diffusion_jax.typing import Array, Cond, InputError, Key, Net

Noise = Iterator[Array | None]
AXES = {1: "(length, channels)", 2: "(height, width, channels)", 3: "(frames or depth, height, width, channels)"}
LETTERS = {1: "n", 2: "h w", 3: "t h w"}


def unet(
    shape: Sequence[int],
    *,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: Sequence[int] = (16,),
    heads: int = 1,
    groups: int | None = None,
    dropout: float = 0.0,
    classes: int | None = None,
    vector: int | None = None,
    tokens: int | None = None,
    image: int | None = None,
    attention_over: layers.AttentionOver = "pixels",
    convolution: layers.Convolution = "full",
    resample_time: bool = True,
    out_channels: int | None = None,
    learned_variance: bool = False,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The DDPM U-Net for examples of `shape`: `(x: [b *shape], t: [b], cond) -> f32[b *pixels out_channels]`.

    shape: (length, c) for sound and time series, (h, w, c) for pictures, (depth or frames, h, w, c) for volumes and
    video; its rank alone decides how many axes everything has.
    attention: the sizes (of the shortest side) at which pixels attend to each other; the middle always attends.
    groups: of every normalization; by default min(32, channels / 4), the paper's 32 from 128 channels on.
    classes, vector, tokens, image: the sizes of what the network is conditioned on, None for what it does not take.
    With classes alone cond is labels, int32[b] in [0, classes], where `classes` means no label, or None for no label
    at all; otherwise it is a dict of what there is, see `conditioning`. Tokens are attended to wherever pixels attend.
    attention_over, convolution: of three axes, whether space and time are taken together or apart, equation (3).
    resample_time: whether the first of three axes is halved from level to level as well. Where it is not, or where
    attention is over space and then time, the sizes in `attention` are those of a frame.
    Video Diffusion Models take "space_then_time", "space" and False. "space_then_time" for both mixes more.
    out_channels: c by default; learned_variance doubles it, and the caller splits the last axis in two.
    remat: what the backward pass keeps of each block, see `layers.remat`.
    dtype: of the computation; parameters, normalization statistics and the output are float32.
    The defaults, on (32, 32, 3), are the paper's network for CIFAR-10 (35,746,307 parameters), which is trained
    with dropout 0.1. Raises InputError if the arguments do not fit together.
    Source: Ho et al. 2020, appendix B, equations (1) and (2); for video Ho et al. 2022, section 3.
    """
    ndim = check_rank(shape, attention_over, convolution, resample_time)
    factor = (1, 2, 2) if not resample_time else (2,) * ndim
    options = Options(
        groups or layers.default_groups(channels), heads, dropout, dtype, ndim, convolution, attention_over, factor
    )
    frames = attention_over == "space_then_time" or not resample_time
    attends = attention_levels(shape, multipliers, attention, factor, frames)
    check_widths(channels, multipliers, blocks, options)
    kinds = Kinds(classes, vector, tokens, image)
    conditioning.check_kinds(kinds)
    outputs = (out_channels or shape[-1]) * (2 if learned_variance else 1)
    widths = tuple(channels * m for m in multipliers)
    return functional(
        lambda rngs: UNet(rngs, shape[-1], outputs, widths, channels, blocks, attends, kinds, options, remat)
    )


def ddpm_cifar10(*, dropout: float = 0.1, classes: int | None = None, dtype: layers.DType = jnp.float32) -> Net:
    """The network of Ho et al. 2020 for CIFAR-10: 35,746,307 parameters without classes (35.7M in appendix B)."""
    return unet((32, 32, 3), dropout=dropout, classes=classes, dtype=dtype)


def check_rank(shape: Sequence[int], attention_over: str, convolution: str, resample_time: bool) -> int:
    """The number of spatial axes, 1 to 3. Raises InputError for another, or for what is meant for three only."""
    ndim = len(shape) - 1
    if ndim not in AXES or min(shape) < 1:
        raise InputError(f"shape is {', '.join(AXES.values())}, got {tuple(shape)}")
    if attention_over not in (known := get_args(layers.AttentionOver)):
        raise InputError(f"attention_over={attention_over!r} is not one of {', '.join(known)}")
    if convolution not in (known := get_args(layers.Convolution)):
        raise InputError(f"convolution={convolution!r} is not one of {', '.join(known)}")
    together = attention_over == "pixels" and convolution == "full" and resample_time
    if ndim != 3 and not together:
        raise InputError(
            f"attention_over, convolution and resample_time are for (t, h, w, c), got shape {tuple(shape)}"
        )
    if convolution == "space" and resample_time:
        raise InputError("convolution='space' sees one frame at a time and cannot halve time: resample_time=False")
    return ndim


def attention_levels(
    shape: Sequence[int], multipliers: Sequence[int], attention: Sequence[int], factor: PerAxis = 2,
    frames: bool = False,
) -> tuple[bool, ...]:  # fmt: skip
    """Whether each level attends, from the example's shape (h, w, c) and the sizes at which to attend.

    factor: by how much a level is smaller than the one before, in all axes or in each; shapes of other than three
    numbers need one for each. frames: sizes are of all axes but the first.
    Raises InputError if the example cannot be halved often enough or a size never occurs.
    """
    if (isinstance(factor, int) and len(shape) != 3) or min(shape) < 1:
        raise InputError(f"shape is (height, width, channels), got {tuple(shape)}")
    factors = layers.per_axis(factor, len(shape) - 1)
    whole = [f ** (len(multipliers) - 1) for f in factors]
    if any(size % f for size, f in zip(shape, whole, strict=False)):
        needed = whole[0] if len(set(whole)) == 1 else tuple(whole)
        raise InputError(f"{len(multipliers)} levels need sizes divisible by {needed}, got {tuple(shape)}")
    pixels = [[size // f**level for size, f in zip(shape, factors, strict=False)] for level in range(len(multipliers))]
    sizes = [min(axes[1:] if frames else axes) for axes in pixels]
    for size in attention:
        if size not in sizes:
            raise InputError(f"attention at {size} never happens: the levels have sizes {sizes}")
    return tuple(size in attention for size in sizes)


def check_widths(channels: int, multipliers: Sequence[int], blocks: int, options: Options) -> None:
    """Raise InputError if channels do not divide into groups and heads, or there is no level or block."""
    if not multipliers or min(multipliers) < 1 or blocks < 1:
        raise InputError(f"needs at least one level and one block, got multipliers={multipliers}, blocks={blocks}")
    if channels % 2 or channels % options.groups:
        raise InputError(f"channels={channels} must be even and divisible by groups={options.groups}")
    if options.heads < 1 or any(channels * m % options.heads for m in multipliers):
        raise InputError(f"channels={channels} times {tuple(multipliers)} must be divisible by heads={options.heads}")
    if options.attention_over == "space_then_time" and any(channels * m // options.heads % 2 for m in multipliers):
        raise InputError(f"attention over time needs heads of even width, got {channels} and heads={options.heads}")
    if not 0 <= options.dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {options.dropout}")


def check_input(x: Array, t: Array, n_in: int, levels: int, factor: PerAxis = 2) -> None:
    """Raise ValueError unless x is `[b *pixels n_in]`, divisible by the downsampling, and t is `[b]`.

    factor: as for `attention_levels`; pixels are h and w where it is one number.
    """
    factors = (factor,) * 2 if isinstance(factor, int) else tuple(factor)
    whole = [f ** (levels - 1) for f in factors]
    letters = LETTERS[len(factors)]
    if (
        x.ndim != len(factors) + 2
        or x.shape[-1] != n_in
        or any(n % f for n, f in zip(x.shape[1:], whole, strict=False))
    ):
        needed = " and ".join(f"{letter} divisible by {f}" for letter, f in zip(letters.split(), whole, strict=True))
        raise ValueError(f"x must be [b {letters} {n_in}] with {needed}, got {list(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be [{x.shape[0]}], one time for each example, got {list(t.shape)}")


class SpaceTimeConv(Conv):
    """A convolution within each frame, then one over frames: y = K_time * (K * x) + b, of 3 x 1 x 1 and 1 x 3 x 3."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, o: Options, *, stride: PerAxis = 1,
        init: layers.Initializer = layers.xavier,
    ):  # fmt: skip
        step, *steps = layers.per_axis(stride, 3)
        super().__init__(rngs, n_in, n_out, o, width=(1, 3, 3), stride=(1, *steps))
        self.time_kernel = nnx.Param(init(rngs, (3, 1, 1, n_out, n_out)))
        self.time_stride = (step, 1, 1)

    def __call__(self, x: Array, *, bias: bool = True) -> Array:
        y = layers.conv(super().__call__(x, bias=False), self.time_kernel[...].astype(self.dtype), self.time_stride)
        b = self.bias[...].astype(self.dtype)
        return y + jnp.reshape(b, (1,) * (y.ndim - 1) + b.shape) if bias else y


def convolution(
    rngs: nnx.Rngs, n_in: int, n_out: int, o: Options, *, stride: PerAxis = 1,
    init: layers.Initializer = layers.xavier,
) -> Conv:  # fmt: skip
    """A C of equations (1) and (2), of the kind that the network has."""
    if o.convolution == "space_then_time":
        return SpaceTimeConv(rngs, n_in, n_out, o, stride=stride, init=init)
    return Conv(rngs, n_in, n_out, o, width=(1, 3, 3) if o.convolution == "space" else 3, stride=stride, init=init)


def rotate(x: Array, heads: int) -> Array:
    """Equation (3): place n of `x: [b, n, c]` turned in each of its heads; c / heads is even. The angles are float32.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34, with i and i + d/2 as a pair.
    """
    b, n, c = x.shape
    half = c // heads // 2
    rates = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(n, dtype=jnp.float32)[:, None] * rates[None, :]
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(jnp.reshape(x.astype(jnp.float32), (b, n, heads, 2 * half)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.reshape(turned, x.shape).astype(x.dtype)


def attend_along(q: Array, k: Array, v: Array, heads: int, axes: tuple[int, ...], *, places: bool = False) -> Array:
    """Softmax attention of `[b, *pixels, c]` over some of its axes; along the others nothing meets.

    places: turn q and k by equation (3), for a single axis.
    """
    others = tuple(axis for axis in range(q.ndim - 1) if axis not in axes)
    order = (*others, *axes, q.ndim - 1)
    sizes = tuple(q.shape[axis] for axis in order)
    flat = (-1, *sizes[len(others) :])
    q, k, v = (jnp.reshape(jnp.transpose(z, order), flat) for z in (q, k, v))
    if places:
        q, k = rotate(q, heads), rotate(k, heads)
    y = jnp.reshape(layers.attend(q, k, v, heads), sizes)
    return jnp.transpose(y, [order.index(axis) for axis in range(len(order))])


class ResnetBlock(nnx.Module):
    """Equation (1), with eps in the root of its normalizations."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, n_emb: int, o: Options, eps: float = 1e-6):
        self.norm1 = GroupNorm(n_in, o.groups, eps)
        self.conv1 = convolution(rngs, n_in, n_out, o)
        self.time_emb_proj = Linear(rngs, n_emb, n_out, o.dtype)
        self.norm2 = GroupNorm(n_out, o.groups, eps)
        self.conv2 = convolution(rngs, n_out, n_out, o, init=layers.zeros)
        self.conv_shortcut = None if n_in == n_out else Conv(rngs, n_in, n_out, o, width=1)
        self.dropout = o.dropout

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        h = self.conv1(self.norm1(x), bias=False)
        h = self.norm2(h, offset=self.time_emb_proj(emb).astype(jnp.float32) + self.conv1.bias[...][None, :])
        h = self.conv2(layers.dropout(h, self.dropout, noise))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Equation (2) over all pixels, or over those along some `axes`; along a single one with `places`, by (3)."""

    def __init__(
        self, rngs: nnx.Rngs, n: int, o: Options, axes: tuple[int, ...] | None = None, *, places: bool = False
    ):
        self.group_norm = GroupNorm(n, o.groups)
        self.to_q = Linear(rngs, n, n, o.dtype)
        self.to_k = Linear(rngs, n, n, o.dtype)
        self.to_v = Linear(rngs, n, n, o.dtype)
        self.to_out = nnx.List([Linear(rngs, n, n, o.dtype, layers.zeros)])
        self.heads, self.axes, self.places = o.heads, axes, places

    def __call__(self, x: Array) -> Array:
        q, k, v = layers.joint(self.group_norm(x, act=False), self.to_q, self.to_k, self.to_v)
        if self.axes is None:
            return x + self.to_out[0](layers.attend(q, k, v, self.heads))
        return x + self.to_out[0](attend_along(q, k, v, self.heads, self.axes, places=self.places))


class Resample(nnx.Module):
    """The convolution that follows nearest upsampling, or halves the size with stride 2."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options, *, up: bool):
        self.conv = convolution(rngs, n, n, o, stride=1 if up else o.factor)
        self.up, self.factor = up, o.factor

    def __call__(self, x: Array) -> Array:
        return self.conv(layers.upsample(x, self.factor) if self.up else x)


class Level(nnx.Module):
    """The blocks of one level, of `widths` in and out, the first `attentions` of them followed by (2); a `Resample`.

    Where space and time are apart, each attention is over space and followed by one over time; where there are
    `tokens`, of that width, by one over them.
    """

    def __init__(
        self, rngs: nnx.Rngs, widths: Sequence[tuple[int, int]], n_emb: int, o: Options, *, attentions: int = 0,
        down: bool = False, up: bool = False, tokens: int | None = None,
    ):  # fmt: skip
        n, apart = widths[-1][1], o.attention_over == "space_then_time"
        self.resnets = nnx.List([ResnetBlock(rngs, n_in, n_out, n_emb, o) for n_in, n_out in widths])
        self.attentions = nnx.List([Attention(rngs, n, o, (2, 3) if apart else None) for _ in range(attentions)])
        times = [Attention(rngs, n, o, (1,), places=True) for _ in range(attentions if apart else 0)]
        crosses = [] if tokens is None else [CrossAttention(rngs, n, tokens, o) for _ in range(attentions)]
        self.temp_attentions, self.cross_attentions = nnx.List(times), nnx.List(crosses)
        self.downsamplers = nnx.List([Resample(rngs, n, o, up=False)] if down else [])
        self.upsamplers = nnx.List([Resample(rngs, n, o, up=True)] if up else [])

    def block(self, i: int, x: Array, emb: Array, noise: Array | None, given: Given) -> Array:
        x = self.resnets[i](x, emb, noise)
        for attentions in (self.attentions, self.temp_attentions):
            if i < len(attentions):
                x = attentions[i](x)
        if i < len(self.cross_attentions) and given.tokens is not None:
            x = self.cross_attentions[i](x, given.tokens, given.tokens_mask)
        return x


def block_plan(widths: Sequence[int], blocks: int) -> tuple[tuple[int, int], ...]:
    """The level and the width of every block (1), in the order of computation."""
    levels = list(enumerate(widths))
    down = [pair for pair in levels for _ in range(blocks)]
    up = [pair for pair in reversed(levels) for _ in range(blocks + 1)]
    return (*down, levels[-1], levels[-1], *up)


class UNet(nnx.Module):
    """The whole network; see `unet`."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, widths: tuple[int, ...], channels: int, blocks: int,
        attends: tuple[bool, ...], kinds: Kinds, o: Options, remat: layers.Remat = "none",
    ):  # fmt: skip
        n_emb, last, n, tokens = 4 * channels, len(widths) - 1, channels, kinds.tokens
        self.conv_in = convolution(rngs, n_in + (kinds.image or 0), n, o)
        self.time_embedding = layers.TimeEmbedding(rngs, channels, n_emb, o.dtype)
        label, vector = kinds.classes, kinds.vector
        self.class_embedding = None if label is None else layers.LabelEmbedding(rngs, label, n_emb, o.dtype)
        self.vector_embedding = None if vector is None else conditioning.VectorEmbedding(rngs, vector, n_emb, o.dtype)
        self.down_blocks, self.up_blocks, skips = nnx.List(), nnx.List(), [n]
        for i, width in enumerate(widths):
            pairs = [(width if j else n, width) for j in range(blocks)]
            more: dict[str, Any] = {"attentions": blocks * attends[i], "down": i < last, "tokens": tokens}
            self.down_blocks.append(Level(rngs, pairs, n_emb, o, **more))
            skips += [width] * (blocks + (i < last))
            n = width
        self.mid_block = Level(rngs, [(n, n), (n, n)], n_emb, o, attentions=1, tokens=tokens)
        for i, width in reversed(list(enumerate(widths))):
            pairs = [(skips.pop() + (width if j else n), width) for j in range(blocks + 1)]
            more = {"attentions": (blocks + 1) * attends[i], "up": i > 0, "tokens": tokens}
            self.up_blocks.append(Level(rngs, pairs, n_emb, o, **more))
            n = width
        self.conv_norm_out = GroupNorm(n, o.groups)
        self.conv_out = convolution(rngs, n, n_out, o, init=layers.zeros)
        self.n_in, self.channels, self.dropout, self.kinds = n_in, channels, o.dropout, kinds
        self.remat: layers.Remat = remat
        self.factor, self.plan = layers.per_axis(o.factor, o.ndim), block_plan(widths, blocks)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, len(self.down_blocks), self.factor)
        given = conditioning.read(cond, self.kinds, x)
        emb = self.embed(t, given)
        noise = iter(layers.dropout_noise(key, self.dropout, x.shape[0], self.block_shapes(x)))
        x = self.conv_in(self.beside(x, given))
        skips = [x]
        for level in self.down_blocks:
            x = self.down(level, x, emb, noise, given, skips)
        for i in range(2):
            x = self.block(self.mid_block, i, x, emb, noise, given)
        for level in self.up_blocks:
            x = self.up(level, x, emb, noise, given, skips)
        return self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)

    def block_shapes(self, x: Array) -> list[tuple[int, ...]]:
        """The shape, without the batch axis, in which each block computes."""
        pixels = x.shape[1:-1]
        return [
            (*(n // f**level for n, f in zip(pixels, self.factor, strict=True)), width) for level, width in self.plan
        ]

    def embed(self, t: Array, given: Given) -> Array:
        """silu(e) of equation (1), `[b, 4 channels]`."""
        emb = self.time_embedding(layers.time_features(t, self.channels))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(given.label, t.shape[0])
        if self.vector_embedding is not None and given.vector is not None:
            emb = emb + self.vector_embedding(given.vector, given.vector_mask)
        return jax.nn.silu(emb)

    def beside(self, x: Array, given: Given) -> Array:
        """x, and in further channels the image of the condition, zero where it is absent."""
        if self.kinds.image is None:
            return x
        absent = jnp.zeros((*x.shape[:-1], self.kinds.image), x.dtype)
        return jnp.concatenate([x, absent if given.image is None else given.image.astype(x.dtype)], axis=-1)

    def block(self, level: Level, i: int, x: Array, emb: Array, noise: Noise, given: Given) -> Array:
        return layers.remat(self.remat, partial(level.block, i))(x, emb, next(noise), given)

    def down(self, level: Level, x: Array, emb: Array, noise: Noise, given: Given, skips: list[Array]) -> Array:
        for i in range(len(level.resnets)):
            x = self.block(level, i, x, emb, noise, given)
            skips.append(x)
        for resample in level.downsamplers:
            x = resample(x)
            skips.append(x)
        return x

    def up(self, level: Level, x: Array, emb: Array, noise: Noise, given: Given, skips: list[Array]) -> Array:
        for i in range(len(level.resnets)):
            x = self.block(level, i, jnp.concatenate([x, skips.pop()], axis=-1), emb, noise, given)
        for resample in level.upsamplers:
            x = resample(x)
        return x
