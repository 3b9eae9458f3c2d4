r"""The magnitude-preserving network of EDM2, config G (Karras et al. 2024, arXiv:2312.02696, section 2 and appendix B).

Every operation keeps the root mean square of its input at 1, in expectation, so that no learned normalization is
needed. With rms over the axes named, and eps = 1e-4 against a division by zero (algorithm 1):

    normalize(a) = a / (rms(a) + eps)                                                                            (1)
    linear, conv(x) = (normalize(w_i) / sqrt(n)) x     rms of the n numbers of output i; no bias     (eq. 47)    (2)
    silu'(x) = silu(x) / 0.596                                                                       (eq. 81)    (3)
    sum(a, b, t) = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                                         (eq. 88)    (4)
    cat(a, b, t) = sqrt((n_a + n_b) / ((1 - t)^2 + t^2)) [(1 - t) a / sqrt(n_a), t b / sqrt(n_b)]    (eq. 103)   (5)
    fourier(t) = sqrt(2) cos(2 pi (f t + p)),   f ~ N(0, 1), p ~ U(0, 1), not trained                (eq. 75)    (6)

With e = silu'(sum(W_n fourier(t), sqrt(classes) W_c onehot(label), 0.5)), R a resampling by 2 (mean of neighbours,
repetition) or nothing, S a 1x1 convolution where the width changes, C 3x3 convolutions, and g a learned number that
starts at 0:

    encoder:    h = normalize(S R x) over the channels,   y = C silu'(h)                                         (7)
    decoder:    h = S R x,                                y = C silu'(R x)                                       (8)
    block(x) = sum(h, C dropout(silu'(y (1 + g W e))), 0.3)                                                      (9)
    attention(x) = sum(x, W_o softmax(q k^T / sqrt(d)) v, 0.3),   q, k, v = normalize(W x) over a head's d      (10)

Encoder: a convolution of x and a channel of ones; at each level a block that halves the size (not at the first), then
`blocks` times (9) [and (10)]. Decoder: at the last level (9), (10), (9); at each other level a block that doubles the
size; `blocks + 1` times (9) [and (10)] on cat(x, what the encoder left, 0.5). Output: g C x, with g = 0 at the start.

Since (2) does not see the length of w_i, the gradient is orthogonal to it, and updates make it grow, which would wear
down the learning rate. `forced_weight_norm` takes it back to sqrt(n) after each update (section 2.3, eq. 66).

Learned uncertainty (eq. 14, 15): u(t) = W fourier'(t), the log of the expected loss at that noise level.

The numbers f and p are parameters in the tree, where a published checkpoint has them too, behind a stop of the
gradient: an optimizer without weight decay and a moving average leave them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.unet import attention_levels, check_input
from diffusion_jax.typing import Array, InputError, Key, Net, Params

EPS = 1e-4
BRANCH = 0.3
"""t of (4) where a residual branch or attention joins."""

Size = Literal["XS", "S", "M", "L", "XL", "XXL"]
CHANNELS: dict[Size, int] = {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}
UNREGULARIZED = ("XS", "S")
"""Sizes that the paper trains without dropout; the others with 0.1 (table 6)."""


class Settings(NamedTuple):
    """What all blocks of one network share."""

    head_width: int
    dropout: float
    dtype: layers.DType


def edm2(
    shape: Sequence[int],
    *,
    channels: int = 192,
    multipliers: Sequence[int] = (1, 2, 3, 4),
    blocks: int = 3,
    attention: Sequence[int] = (16, 8),
    head_width: int = 64,
    dropout: float = 0.0,
    classes: int | None = None,
    uncertainty: bool = False,
    dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> Net:
    """EDM2's network for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], labels) -> f32[b h w c]`.

    t is c_noise = log(sigma) / 4 and x is c_in x, as `edm_precondition` gives them.
    attention: the sizes (of the shorter side) at which pixels attend to each other, in heads of `head_width` channels;
    fewer channels than that are one head.
    classes: labels are int32[b] in [0, classes], where `classes`, like cond None, means no label: the embedding is then
    that of a network without classes, such as the paper trains apart to guide with.
    uncertainty: appends a channel that holds u(t), the same at all pixels, for `edm_precondition(uncertainty=True)`.
    dtype: of the computation; parameters, their normalization and the output are float32. remat: of whole blocks.
    The defaults are the paper's EDM2-S. Raises InputError if the arguments do not fit together.
    Source: Karras et al. 2024, config G, equations (1)-(10).
    """
    attends = attention_levels(shape, multipliers, attention)
    _check(channels, multipliers, blocks, attends, head_width, dropout)
    settings, widths = Settings(head_width, dropout, dtype), tuple(channels * m for m in multipliers)
    return functional(
        lambda rngs: EDM2(rngs, tuple(shape), widths, channels, blocks, attends, classes, uncertainty, settings, remat)
    )


def edm2_imagenet512(
    size: Size = "S",
    *,
    dropout: float | None = None,
    classes: int | None = 1000,
    uncertainty: bool = False,
    dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> Net:
    """EDM2 for the latents (64, 64, 4) of ImageNet-512.

    XS, S, M, L, XL and XXL have 124.7M, 280.2M, 497.8M, 777.5M, 1119.3M and 1523.2M parameters.
    dropout: by default the paper's. InputError for an unknown size. Source: Karras et al. 2024, table 6.
    """
    return _preset((64, 64, 4), size, get_args(Size), dropout, classes, uncertainty, dtype, remat)


def edm2_imagenet64(
    size: Size = "S",
    *,
    dropout: float | None = None,
    classes: int | None = 1000,
    uncertainty: bool = False,
    dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> Net:
    """EDM2 for the pixels (64, 64, 3) of ImageNet-64.

    S, M, L and XL have 280.2M, 497.8M, 777.5M and 1119.3M parameters.
    dropout: by default the paper's. InputError for an unknown size. Source: Karras et al. 2024, table 6.
    """
    return _preset((64, 64, 3), size, ("S", "M", "L", "XL"), dropout, classes, uncertainty, dtype, remat)


def forced_weight_norm(params: Params) -> Params:
    """The parameters of an `edm2` network with every weight of (2) scaled to rms 1, which leaves its outputs the same.

    For use after each update, for example as the projection of an optimizer. Learned gains and the numbers of (6) are
    not weights and stay. Source: Karras et al. 2024, section 2.3 and algorithm 1.
    """

    def force(path: tuple, w: Array) -> Array:
        return _normalized_weight(w) if path[-1].key == "kernel" else w

    return jax.tree_util.tree_map_with_path(force, params)


def _preset(
    shape: tuple[int, ...], size: Size, sizes: Sequence[str], dropout: float | None, classes: int | None,
    uncertainty: bool, dtype: layers.DType, remat: layers.Remat,
) -> Net:  # fmt: skip
    if size not in sizes:
        raise InputError(f"unknown size {size!r} of EDM2 for {shape}: one of {', '.join(sizes)}")
    if dropout is None:
        dropout = 0.0 if size in UNREGULARIZED else 0.1
    return edm2(
        shape, channels=CHANNELS[size], dropout=dropout, classes=classes, uncertainty=uncertainty, dtype=dtype,
        remat=remat,
    )  # fmt: skip


def _check(
    channels: int, multipliers: Sequence[int], blocks: int, attends: Sequence[bool], head_width: int, dropout: float
) -> None:
    if not multipliers or min(multipliers) < 1 or blocks < 1 or channels < 1:
        raise InputError(
            f"needs at least one level, block and channel, got multipliers={tuple(multipliers)}, blocks={blocks}, "
            f"channels={channels}"
        )
    for m, attend in zip(multipliers, (*attends[:-1], True), strict=True):
        if attend and channels * m > head_width and channels * m % head_width:
            raise InputError(f"{channels * m} channels attend, which do not divide into heads of {head_width}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout must be in [0, 1), got {dropout}")


def normalize(a: Array, axes: Sequence[int] = (-1,)) -> Array:
    """Equation (1) over the given axes, by default the channels of each pixel; float32 inside, a's type outside."""
    a32 = a.astype(jnp.float32)
    # The bound keeps the derivative of the root finite where all is 0.
    square = jnp.maximum(jnp.mean(a32 * a32, axis=tuple(axes), keepdims=True), 1e-30)
    return (a32 / (jnp.sqrt(square) + EPS)).astype(a.dtype)


def mp_silu(x: Array) -> Array:
    """Equation (3)."""
    return jax.nn.silu(x) * (1 / 0.596)


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """Equation (4)."""
    norm = math.hypot(1 - t, t)
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a: Array, b: Array, t: float = 0.5) -> Array:
    """Equation (5) over the last axis: each part gets a share of the whole that does not depend on its width."""
    n_a, n_b = a.shape[-1], b.shape[-1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return jnp.concatenate([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], axis=-1)


def _normalized_weight(w: Array) -> Array:
    """Equation (1) over all the numbers of `w: [*widths, n_in, n_out]` that make one output."""
    return normalize(w, range(w.ndim - 1))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers from the uniform ones that a network draws all at once."""
    return math.sqrt(2) * jax.lax.erf_inv(rngs.uniform(shape, minval=float(np.nextafter(np.float32(-1), 0))))


class MPFourier(nnx.Module):
    """Equation (6): `t: [b] -> f32[b, n]`. `freqs` and `phases` hold 2 pi f and 2 pi p."""

    def __init__(self, rngs: nnx.Rngs, n: int):
        self.freqs = nnx.Param(2 * math.pi * _normal(rngs, (n,)))
        self.phases = nnx.Param(2 * math.pi * rngs.uniform((n,)))

    def __call__(self, t: Array) -> Array:
        freqs, phases = (jax.lax.stop_gradient(p[...])[None, :] for p in (self.freqs, self.phases))
        return math.sqrt(2) * jnp.cos(t.astype(jnp.float32)[:, None] * freqs + phases)


class MPConv(nnx.Module):
    """Equation (2) times a gain, in `dtype`: with `width` a convolution, and without over the last axis alone."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: layers.DType, width: int | None = None):
        shape = (n_in, n_out) if width is None else (width, width, n_in, n_out)
        self.kernel = nnx.Param(_normalized_weight(_normal(rngs, shape)))
        self.dtype = dtype

    def __call__(self, x: Array, gain: Array | None = None) -> Array:
        w = _normalized_weight(self.kernel[...])
        w = w * (1 / math.sqrt(w.size // w.shape[-1]))
        w = (w if gain is None else w * gain).astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), w) if w.ndim == 2 else layers.conv(x.astype(self.dtype), w)

    def rows(self, labels: Array) -> Array:
        """What (2) makes of sqrt(n) onehot(label), for the n labels: `int[b] -> [b, n_out]`."""
        return jnp.take(_normalized_weight(self.kernel[...]), labels, axis=0, mode="clip").astype(self.dtype)


class Block(nnx.Module):
    """Equations (7) or (8), and (9), followed by (10) if `attends`; `resample` is "up", "down" or ""."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, n_emb: int, s: Settings, *, encodes: bool, resample: str = "",
        attends: bool = False, joins: bool = False,
    ):  # fmt: skip
        self.emb_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.conv_res0 = MPConv(rngs, n_out if encodes else n_in, n_out, s.dtype, width=3)
        self.emb_linear = MPConv(rngs, n_emb, n_out, s.dtype)
        self.conv_res1 = MPConv(rngs, n_out, n_out, s.dtype, width=3)
        self.conv_skip = MPConv(rngs, n_in, n_out, s.dtype, width=1) if n_in != n_out else None
        self.attn_qkv = MPConv(rngs, n_out, 3 * n_out, s.dtype, width=1) if attends else None
        self.attn_proj = MPConv(rngs, n_out, n_out, s.dtype, width=1) if attends else None
        self.heads, self.dropout = max(1, n_out // s.head_width), s.dropout
        self.encodes, self.resample, self.joins = encodes, resample, joins

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        x = {"up": layers.upsample, "down": layers.average_pool, "": lambda z: z}[self.resample](x)
        h = x if self.conv_skip is None else self.conv_skip(x)
        if self.encodes:
            x = h = normalize(h)
        y = self.conv_res0(mp_silu(x))
        y = y * (self.emb_linear(emb, self.emb_gain[...]) + 1)[:, None, None, :]
        x = mp_sum(h, self.conv_res1(layers.dropout(mp_silu(y), self.dropout, noise)), BRANCH)
        return x if self.attn_qkv is None else mp_sum(x, self.attention(x), BRANCH)

    def attention(self, x: Array) -> Array:
        assert self.attn_qkv is not None
        assert self.attn_proj is not None
        qkv = jnp.reshape(self.attn_qkv(x), (*x.shape[:-1], 3 * self.heads, -1))
        q, k, v = jnp.split(jnp.reshape(normalize(qkv), (*x.shape[:-1], -1)), 3, axis=-1)
        return self.attn_proj(layers.attend(q, k, v, self.heads))


class EDM2(nnx.Module):
    """The whole network; see `edm2`. Attributes are named like the tensors of the published checkpoints.

    One layout differs: the outputs of `attn_qkv` are all of q, then k, then v, each head by head.
    """

    def __init__(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], widths: tuple[int, ...], channels: int, blocks: int,
        attends: tuple[bool, ...], classes: int | None, uncertainty: bool, s: Settings, remat: layers.Remat,
    ):  # fmt: skip
        n_emb, n, skips = max(widths), channels, [channels]
        sizes = [f"{shape[0] >> i}x{shape[1] >> i}" for i in range(len(widths))]
        self.emb_fourier = MPFourier(rngs, channels)
        self.emb_noise = MPConv(rngs, channels, n_emb, s.dtype)
        self.emb_label = None if classes is None else MPConv(rngs, classes, n_emb, s.dtype)
        self.enc, self.dec = nnx.Dict(), nnx.Dict()
        self.enc[f"{sizes[0]}_conv"] = MPConv(rngs, shape[-1] + 1, n, s.dtype, width=3)
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if i:
                self.enc[f"{size}_down"] = Block(rngs, n, n, n_emb, s, encodes=True, resample="down")
                skips.append(n)
            for j in range(blocks):
                block = Block(rngs, n, width, n_emb, s, encodes=True, attends=attends[i])
                self.enc[f"{size}_block{j}"] = block
                skips.append(width)
                n = width
        self.dec[f"{sizes[-1]}_in0"] = Block(rngs, n, n, n_emb, s, encodes=False, attends=True)
        self.dec[f"{sizes[-1]}_in1"] = Block(rngs, n, n, n_emb, s, encodes=False)
        for i, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if i < len(widths) - 1:
                self.dec[f"{size}_up"] = Block(rngs, n, n, n_emb, s, encodes=False, resample="up")
            for j in range(blocks + 1):
                block = Block(rngs, n + skips.pop(), width, n_emb, s, encodes=False, attends=attends[i], joins=True)
                self.dec[f"{size}_block{j}"] = block
                n = width
        self.out_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.out_conv = MPConv(rngs, n, shape[-1], s.dtype, width=3)
        self.logvar_fourier = MPFourier(rngs, 128) if uncertainty else None
        self.logvar_linear = MPConv(rngs, 128, 1, jnp.float32) if uncertainty else None
        self.first, self.encoder, self.decoder = next(iter(self.enc)), tuple(self.enc)[1:], tuple(self.dec)
        self.n_in, self.s = shape[-1], s
        self.remat: layers.Remat = remat

    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, 1 + sum(name.endswith("_down") for name in self.encoder))
        emb = self.embed(t, cond)
        noise = iter(layers.dropout_noise(key, self.s.dropout, x.shape[0], self.block_shapes(x)))
        x = x.astype(self.s.dtype)
        x = self.enc[self.first](jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1))
        skips = [x]
        for name in self.encoder:
            x = layers.remat(self.remat, self.enc[name])(x, emb, next(noise))
            skips.append(x)
        for name in self.decoder:
            h = mp_cat(x, skips.pop()) if self.dec[name].joins else x
            x = layers.remat(self.remat, self.dec[name])(h, emb, next(noise))
        out = self.out_conv(x, self.out_gain[...]).astype(jnp.float32)
        return out if self.logvar_linear is None else jnp.concatenate([out, self.uncertainty(t, out)], axis=-1)

    def uncertainty(self, t: Array, out: Array) -> Array:
        """u(t) at every pixel, f32[b h w 1]."""
        assert self.logvar_linear is not None
        assert self.logvar_fourier is not None
        u = self.logvar_linear(self.logvar_fourier(t))
        return jnp.broadcast_to(u[:, None, None, :], (*out.shape[:-1], 1))

    def block_shapes(self, x: Array) -> list[tuple[int, ...]]:
        """The shape, without the batch axis, in which each block computes after resampling."""
        shapes, pixels = [], x.shape[1:-1]
        for block in [*(self.enc[name] for name in self.encoder), *(self.dec[name] for name in self.decoder)]:
            pixels = tuple({"up": 2 * n, "down": n // 2, "": n}[block.resample] for n in pixels)
            shapes.append((*pixels, block.conv_res1.kernel.shape[-1]))
        return shapes

    def embed(self, t: Array, labels: Array | None) -> Array:
        """e of equation (9), `[b, n_emb]`; where there is no label, of the noise level alone."""
        emb = self.emb_noise(self.emb_fourier(t))
        if labels is None:
            return mp_silu(emb)
        if self.emb_label is None:
            raise ValueError("labels were given to a network without classes")
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != t.shape:
            raise ValueError(f"labels must be int[{t.shape[0]}], got {labels.dtype}{list(labels.shape)}")
        known = (labels >= 0) & (labels < self.emb_label.kernel.shape[0])
        return mp_silu(jnp.where(known[:, None], mp_sum(emb, self.emb_label.rows(labels), 0.5), emb))
