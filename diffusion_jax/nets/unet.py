"""The U-Net of denoising diffusion models (Ho et al. 2020, arXiv:2006.11239, appendix B).

With e = W2 silu(W1 features(t)) + label row, GN group normalization and every 3x3 convolution written C:

    block(h) = S h + C2 dropout(silu(GN(C1 silu(GN(h)) + W silu(e))))         S: 1x1 where the width changes    (1)
    attention(h) = h + W_o softmax(q k^T / sqrt(d)) v,   (q, k, v) = W GN(h)  over all pixels                   (2)

Down: at level i, `blocks` times (1) [and (2)] at width `channels * multipliers[i]`, then a convolution of stride 2.
Middle: (1), (2), (1). Up: at level i, `blocks + 1` times (1) on the concatenation with what the way down left,
[and (2)], then nearest upsampling and a convolution. Output: C silu(GN(h)).
The last convolution of (1), W_o and the output start at zero. Attribute names are those of diffusers' UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options
from diffusion_jax.typing import Array, InputError, Key, Net

Noise = Iterator[Array | None]


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
    out_channels: int | None = None,
    learned_variance: bool = False,
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The DDPM U-Net for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], labels) -> f32[b h w out_channels]`.

    attention: the sizes (of the shorter side) at which pixels attend to each other; the middle always attends.
    groups: of every normalization; by default min(32, channels / 4), the paper's 32 from 128 channels on.
    classes: labels are int32[b] in [0, classes], where `classes` means no label; cond None means no label for all.
    out_channels: c by default; learned_variance doubles it, and the caller splits the last axis in two.
    dtype: of the computation; parameters, normalization statistics and the output are float32.
    The defaults, on (32, 32, 3), are the paper's network for CIFAR-10 (35,746,307 parameters), which is trained
    with dropout 0.1. Raises InputError if the arguments do not fit together.
    Source: Ho et al. 2020, appendix B, equations (1) and (2).
    """
    options = Options(groups or layers.default_groups(channels), heads, dropout, dtype)
    attends = attention_levels(shape, multipliers, attention)
    check_widths(channels, multipliers, blocks, options)
    outputs = (out_channels or shape[-1]) * (2 if learned_variance else 1)
    widths = tuple(channels * m for m in multipliers)
    return functional(lambda rngs: UNet(rngs, shape[-1], outputs, widths, channels, blocks, attends, classes, options))


def ddpm_cifar10(*, dropout: float = 0.1, classes: int | None = None, dtype: layers.DType = jnp.float32) -> Net:
    """The network of Ho et al. 2020 for CIFAR-10: 35,746,307 parameters without classes (35.7M in appendix B)."""
    return unet((32, 32, 3), dropout=dropout, classes=classes, dtype=dtype)


def attention_levels(shape: Sequence[int], multipliers: Sequence[int], attention: Sequence[int]) -> tuple[bool, ...]:
    """Whether each level attends, from the image's shape (h, w, c) and the sizes at which to attend.

    Raises InputError if the image cannot be halved often enough or a size never occurs.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape is (height, width, channels), got {tuple(shape)}")
    factor = 2 ** (len(multipliers) - 1)
    if any(size % factor for size in shape[:-1]):
        raise InputError(f"{len(multipliers)} levels need sizes divisible by {factor}, got {tuple(shape)}")
    sizes = [min(shape[:-1]) >> level for level in range(len(multipliers))]
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
    if not 0 <= options.dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {options.dropout}")


def check_input(x: Array, t: Array, n_in: int, levels: int) -> None:
    """Raise ValueError unless x is `[b h w n_in]`, divisible by the downsampling, and t is `[b]`."""
    factor = 2 ** (levels - 1)
    if x.ndim != 4 or x.shape[-1] != n_in or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"x must be [b h w {n_in}] with h and w divisible by {factor}, got {list(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be [{x.shape[0]}], one time for each image, got {list(t.shape)}")


class ResnetBlock(nnx.Module):
    """Equation (1)."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, n_emb: int, o: Options):
        self.norm1 = GroupNorm(n_in, o.groups)
        self.conv1 = Conv(rngs, n_in, n_out, o)
        self.time_emb_proj = Linear(rngs, n_emb, n_out, o.dtype)
        self.norm2 = GroupNorm(n_out, o.groups)
        self.conv2 = Conv(rngs, n_out, n_out, o, init=layers.zeros)
        self.conv_shortcut = None if n_in == n_out else Conv(rngs, n_in, n_out, o, width=1)
        self.dropout = o.dropout

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        h = self.conv1(self.norm1(x), bias=False)
        h = self.norm2(h, offset=self.time_emb_proj(emb).astype(jnp.float32) + self.conv1.bias[...][None, :])
        h = self.conv2(layers.dropout(h, self.dropout, noise))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Equation (2)."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options):
        self.group_norm = GroupNorm(n, o.groups)
        self.to_q = Linear(rngs, n, n, o.dtype)
        self.to_k = Linear(rngs, n, n, o.dtype)
        self.to_v = Linear(rngs, n, n, o.dtype)
        self.to_out = nnx.List([Linear(rngs, n, n, o.dtype, layers.zeros)])
        self.heads = o.heads

    def __call__(self, x: Array) -> Array:
        q, k, v = layers.joint(self.group_norm(x, act=False), self.to_q, self.to_k, self.to_v)
        return x + self.to_out[0](layers.attend(q, k, v, self.heads))


class Resample(nnx.Module):
    """The convolution that follows nearest upsampling, or halves the size with stride 2."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options, *, up: bool):
        self.conv = Conv(rngs, n, n, o, stride=1 if up else 2)
        self.up = up

    def __call__(self, x: Array) -> Array:
        return self.conv(layers.upsample(x) if self.up else x)


class Level(nnx.Module):
    """The blocks of one level, of `widths` in and out, the first `attentions` of them followed by (2); a `Resample`."""

    def __init__(
        self, rngs: nnx.Rngs, widths: Sequence[tuple[int, int]], n_emb: int, o: Options, *, attentions: int = 0,
        down: bool = False, up: bool = False,
    ):  # fmt: skip
        n = widths[-1][1]
        self.resnets = nnx.List([ResnetBlock(rngs, n_in, n_out, n_emb, o) for n_in, n_out in widths])
        self.attentions = nnx.List([Attention(rngs, n, o) for _ in range(attentions)])
        self.downsamplers = nnx.List([Resample(rngs, n, o, up=False)] if down else [])
        self.upsamplers = nnx.List([Resample(rngs, n, o, up=True)] if up else [])

    def block(self, i: int, x: Array, emb: Array, noise: Array | None) -> Array:
        x = self.resnets[i](x, emb, noise)
        return self.attentions[i](x) if i < len(self.attentions) else x


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
        attends: tuple[bool, ...], classes: int | None, o: Options,
    ):  # fmt: skip
        n_emb, last, n = 4 * channels, len(widths) - 1, channels
        self.conv_in = Conv(rngs, n_in, n, o)
        self.time_embedding = layers.TimeEmbedding(rngs, channels, n_emb, o.dtype)
        self.class_embedding = None if classes is None else layers.LabelEmbedding(rngs, classes, n_emb, o.dtype)
        self.down_blocks, self.up_blocks, skips = nnx.List(), nnx.List(), [n]
        for i, width in enumerate(widths):
            pairs = [(width if j else n, width) for j in range(blocks)]
            self.down_blocks.append(Level(rngs, pairs, n_emb, o, attentions=blocks * attends[i], down=i < last))
            skips += [width] * (blocks + (i < last))
            n = width
        self.mid_block = Level(rngs, [(n, n), (n, n)], n_emb, o, attentions=1)
        for i, width in reversed(list(enumerate(widths))):
            pairs = [(skips.pop() + (width if j else n), width) for j in range(blocks + 1)]
            self.up_blocks.append(Level(rngs, pairs, n_emb, o, attentions=(blocks + 1) * attends[i], up=i > 0))
            n = width
        self.conv_norm_out = GroupNorm(n, o.groups)
        self.conv_out = Conv(rngs, n, n_out, o, init=layers.zeros)
        self.n_in, self.channels, self.dropout = n_in, channels, o.dropout
        self.plan = block_plan(widths, blocks)

    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, len(self.down_blocks))
        emb = self.embed(t, cond)
        noise = iter(layers.dropout_noise(key, self.dropout, x.shape[0], self.block_shapes(x)))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x = self.down(level, x, emb, noise, skips)
        for i in range(2):
            x = self.mid_block.block(i, x, emb, next(noise))
        for level in self.up_blocks:
            x = self.up(level, x, emb, noise, skips)
        return self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)

    def block_shapes(self, x: Array) -> list[tuple[int, ...]]:
        """The shape, without the batch axis, in which each block computes."""
        return [(*(size >> level for size in x.shape[1:-1]), width) for level, width in self.plan]

    def embed(self, t: Array, labels: Array | None) -> Array:
        """silu(e) of equation (1), `[b, 4 channels]`."""
        emb = self.time_embedding(layers.time_features(t, self.channels))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(labels, t.shape[0])
        elif labels is not None:
            raise ValueError("labels were given to a network without classes")
        return jax.nn.silu(emb)

    def down(self, level: Level, x: Array, emb: Array, noise: Noise, skips: list[Array]) -> Array:
        for i in range(len(level.resnets)):
            x = level.block(i, x, emb, next(noise))
            skips.append(x)
        for resample in level.downsamplers:
            x = resample(x)
            skips.append(x)
        return x

    def up(self, level: Level, x: Array, emb: Array, noise: Noise, skips: list[Array]) -> Array:
        for i in range(len(level.resnets)):
            x = level.block(i, jnp.concatenate([x, skips.pop()], axis=-1), emb, next(noise))
        for resample in level.upsamplers:
            x = resample(x)
        return x
