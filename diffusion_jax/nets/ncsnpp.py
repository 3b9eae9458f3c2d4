"""The DDPM++ network (Song et al. 2021, arXiv:2011.13456, appendix H) as EDM trains it (Karras et al. 2022,
arXiv:2206.00364, appendix C and table 7).

With e = silu(W2 silu(W1 (features(t) + label row))), GN group normalization, R a resampling by 2 (mean of neighbours
on the way down, repetition on the way up, nothing elsewhere), every 3x3 convolution written C and s = sqrt(1/2):

    block(h) = s (S R h + C2 dropout(silu(GN(C1 R silu(GN(h)) + W e))))     S: 1x1 where R or the width changes  (1)
    attention(h) = s (h + W_o softmax(q k^T / sqrt(d)) v),   (q, k, v) = W GN(h)  over all pixels                (2)

Encoder: at each level a block (1) that halves the size (not at the first), then `blocks` times (1) [and (2)].
Decoder: at the last level (1), (2), (1); at each other level a block (1) that doubles the size; then `blocks + 1`
times (1) on the concatenation with what the encoder left, the last of them [and (2)]. Output: C silu(GN(h)).
C2, W_o and the output start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options
from diffusion_jax.nets.unet import attention_levels, check_input, check_widths
from diffusion_jax.typing import Array, Key, Net

SKIP_SCALE = math.sqrt(0.5)


def ddpmpp(
    shape: Sequence[int],
    *,
    channels: int = 128,
    multipliers: Sequence[int] = (2, 2, 2),
    blocks: int = 4,
    attention: Sequence[int] = (16,),
    heads: int = 1,
    groups: int | None = None,
    dropout: float = 0.0,
    classes: int | None = None,
    out_channels: int | None = None,
    learned_variance: bool = False,
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The DDPM++ network for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], labels) -> f32[b h w out_channels]`.

    The arguments are those of `unet`; the defaults are EDM's for CIFAR-10. t is the network's own time: 1000 times
    the time for the linear variance-preserving schedule, log(sigma) / 4 for EDM. Raises InputError if the arguments
    do not fit together. Source: Song et al. 2021, appendix H, and Karras et al. 2022, table 7, equations (1), (2).
    """
    options = Options(groups or layers.default_groups(channels), heads, dropout, dtype)
    attends = attention_levels(shape, multipliers, attention)
    check_widths(channels, multipliers, blocks, options)
    outputs = (out_channels or shape[-1]) * (2 if learned_variance else 1)
    widths = tuple(channels * m for m in multipliers)
    return functional(
        lambda rngs: DDPMpp(rngs, shape[-1], outputs, widths, channels, blocks, attends, classes, options)
    )


def edm_cifar10(*, dropout: float = 0.13, classes: int | None = None, dtype: layers.DType = jnp.float32) -> Net:
    """EDM's network for CIFAR-10: 55.7M parameters (Karras et al. 2022, table 7)."""
    return ddpmpp((32, 32, 3), dropout=dropout, classes=classes, dtype=dtype)


def song_cifar10(*, dropout: float = 0.1, classes: int | None = None, dtype: layers.DType = jnp.float32) -> Net:
    """The DDPM++ of Song et al. 2021 for CIFAR-10, with four levels: 61.8M parameters."""
    return ddpmpp((32, 32, 3), multipliers=(1, 2, 2, 2), dropout=dropout, classes=classes, dtype=dtype)


class Attention(nnx.Module):
    """Equation (2)."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options):
        self.norm = GroupNorm(n, o.groups)
        self.qkv = Linear(rngs, n, 3 * n, o.dtype)
        self.proj = Linear(rngs, n, n, o.dtype, layers.zeros)
        self.heads = o.heads

    def __call__(self, x: Array) -> Array:
        q, k, v = jnp.split(self.qkv(self.norm(x, act=False)), 3, axis=-1)
        return (x + self.proj(layers.attend(q, k, v, self.heads))) * SKIP_SCALE


class Block(nnx.Module):
    """Equation (1), followed by (2) if `attends`; `resample` is "up", "down" or ""."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, n_emb: int, o: Options, *, resample: str = "",
        attends: bool = False, joins: bool = False,
    ):  # fmt: skip
        self.norm1 = GroupNorm(n_in, o.groups)
        self.conv1 = Conv(rngs, n_in, n_out, o)
        self.time_emb_proj = Linear(rngs, n_emb, n_out, o.dtype)
        self.norm2 = GroupNorm(n_out, o.groups)
        self.conv2 = Conv(rngs, n_out, n_out, o, init=layers.zeros)
        self.conv_shortcut = Conv(rngs, n_in, n_out, o, width=1) if resample or n_in != n_out else None
        self.attention = Attention(rngs, n_out, o) if attends else None
        self.resample, self.joins, self.dropout = resample, joins, o.dropout

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        resample = {"up": layers.upsample, "down": layers.average_pool, "": lambda z: z}[self.resample]
        h = self.conv1(resample(self.norm1(x)), bias=False)
        h = self.norm2(h, offset=self.time_emb_proj(emb).astype(jnp.float32) + self.conv1.bias[...][None, :])
        h = self.conv2(layers.dropout(h, self.dropout, noise))
        x = (resample(x) if self.conv_shortcut is None else self.shortcut(x)) + h
        return x * SKIP_SCALE if self.attention is None else self.attention(x * SKIP_SCALE)

    def shortcut(self, x: Array) -> Array:
        """S R h, the 1x1 convolution, which commutes with R, at the smaller of the two sizes."""
        assert self.conv_shortcut is not None
        if self.resample == "up":
            return layers.upsample(self.conv_shortcut(x))
        return self.conv_shortcut(layers.average_pool(x) if self.resample == "down" else x)


class DDPMpp(nnx.Module):
    """The whole network; see `ddpmpp`."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, widths: tuple[int, ...], channels: int, blocks: int,
        attends: tuple[bool, ...], classes: int | None, o: Options,
    ):  # fmt: skip
        n_emb, n, skips = 4 * channels, channels, [channels]
        self.conv_in = Conv(rngs, n_in, n, o)
        self.time_embedding = layers.TimeEmbedding(rngs, channels, n_emb, o.dtype)
        self.class_embedding = None if classes is None else layers.LabelEmbedding(rngs, classes, channels, jnp.float32)
        self.encoder, self.decoder = nnx.List(), nnx.List()
        for i, width in enumerate(widths):
            if i:
                self.encoder.append(Block(rngs, n, n, n_emb, o, resample="down"))
                skips.append(n)
            for _ in range(blocks):
                self.encoder.append(Block(rngs, n, width, n_emb, o, attends=attends[i]))
                skips.append(width)
                n = width
        self.decoder.append(Block(rngs, n, n, n_emb, o, attends=True))
        self.decoder.append(Block(rngs, n, n, n_emb, o))
        for i, width in reversed(list(enumerate(widths))):
            if i < len(widths) - 1:
                self.decoder.append(Block(rngs, n, n, n_emb, o, resample="up"))
            for j in range(blocks + 1):
                attend = attends[i] and j == blocks
                self.decoder.append(Block(rngs, n + skips.pop(), width, n_emb, o, attends=attend, joins=True))
                n = width
        self.norm_out = GroupNorm(n, o.groups)
        self.conv_out = Conv(rngs, n, n_out, o, init=layers.zeros)
        self.n_in, self.channels, self.levels, self.dropout = n_in, channels, len(widths), o.dropout

    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, self.levels)
        emb = self.embed(t, cond)
        noise = iter(layers.dropout_noise(key, self.dropout, x.shape[0], self.block_shapes(x)))
        x = self.conv_in(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, emb, next(noise))
            skips.append(x)
        for block in self.decoder:
            h = jnp.concatenate([x, skips.pop()], axis=-1) if block.joins else x
            x = block(h, emb, next(noise))
        return self.conv_out(self.norm_out(x)).astype(jnp.float32)

    def block_shapes(self, x: Array) -> list[tuple[int, ...]]:
        """The shape, without the batch axis, in which each block computes after resampling."""
        shapes, pixels = [], x.shape[1:-1]
        for block in [*self.encoder, *self.decoder]:
            pixels = tuple({"up": 2 * n, "down": n // 2, "": n}[block.resample] for n in pixels)
            shapes.append((*pixels, block.conv2.bias.shape[0]))
        return shapes

    def embed(self, t: Array, labels: Array | None) -> Array:
        """e of equation (1), `[b, 4 channels]`."""
        features = layers.time_features(t, self.channels)
        if self.class_embedding is not None:
            features = features + self.class_embedding(labels, t.shape[0])
        elif labels is not None:
            raise ValueError("labels were given to a network without classes")
        return jax.nn.silu(self.time_embedding(features))
