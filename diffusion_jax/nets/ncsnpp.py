"""The networks NCSN++ and DDPM++ (Song et al. 2021, arXiv:2011.13456, section 4.1 and appendix H), one family of
options, also as EDM trains them (Karras et al. 2022, arXiv:2206.00364, appendix C and table 7).

With e = silu(W2 silu(W1 (features(t) + label row)) + vector), GN group normalization, R a resampling by 2 (nothing
where the size stays), every 3x3 convolution written C and s = sqrt(1/2):

    block(h) = s (S R h + C2 dropout(silu(GN(C1 R silu(GN(h)) + W e))))     S: 1x1 where R or the width changes  (1)
    attention(h) = s (h + W_o softmax(q k^T / sqrt(d)) v),   (q, k, v) = W GN(h)  over all pixels                (2)

R is the mean of neighbours on the way down and repetition on the way up, or both with the filter [1, 3, 3, 1]
(`fir`, see `resample`). Features are sines and cosines of fixed geometric rates (`time="positional"`, equation (4) of
`layers`) or of random ones (`time="fourier"`), drawn once and never trained:

    features(t) = [sin(2 pi w t), cos(2 pi w t)],   w ~ N(0, fourier_scale^2), `channels` of them                (3)

Encoder: at each level a block (1) that halves the size (not at the first), then `blocks` times (1) [and (2)].
Decoder: at the last level (1), (2), (1); at each other level a block (1) that doubles the size; then `blocks + 1`
times (1) on the concatenation with what the encoder left, the last of them [and (2)]. Output: C silu(GN(h)).
C2, W_o and the output start at zero.

The picture p enters again after each halving, R' being R or R with a 3x3 convolution:

    progressive_input "skip":      p <- R p,        h <- h + S p  or  [S p, h]  (`combine`)                      (4)
                      "residual":  p <- s (R' p + h),   h <- p                                                   (5)

and leaves in parts, one at the end of each level of the decoder, from the smallest:

    progressive_output "skip":     p <- R p + C silu(GN(h));   the output is p                                   (6)
                       "residual": p <- C silu(GN(h)) at first, then p <- s (R' p + h),   h <- p                 (7)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import conditioning, layers, resample
from diffusion_jax.nets.conditioning import Given, Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options
from diffusion_jax.nets.unet import attention_levels, check_input, check_widths
from diffusion_jax.typing import Array, Cond, InputError, Key, Net

SKIP_SCALE = math.sqrt(0.5)

Progressive = Literal["none", "skip", "residual"]
TimeFeatures = Literal["fourier", "positional"]
Combine = Literal["sum", "concatenation"]


class Plan(NamedTuple):
    """What tells the members of the family apart."""

    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    fir: bool = False
    fourier_scale: float | None = None
    progressive_input: Progressive = "none"
    progressive_output: Progressive = "none"
    concatenates: bool = False
    remat: layers.Remat = "none"


def ncsnpp(
    shape: Sequence[int],
    *,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 2, 2, 2),
    blocks: int = 4,
    attention: Sequence[int] = (16,),
    heads: int = 1,
    groups: int | None = None,
    dropout: float = 0.0,
    classes: int | None = None,
    vector: int | None = None,
    image: int | None = None,
    out_channels: int | None = None,
    learned_variance: bool = False,
    time: TimeFeatures = "fourier",
    fourier_scale: float = 16.0,
    fir: bool = True,
    progressive_input: Progressive = "residual",
    progressive_output: Progressive = "none",
    combine: Combine = "sum",
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """NCSN++ for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], cond) -> f32[b h w out_channels]`.

    The arguments up to learned_variance are those of `unet`, but each normalization has by default min(32, n / 4)
    groups for its own n channels, or the next lower number that divides n; the others are in the module's equations.
    cond: labels int32[b] in [0, classes], where `classes` means none, or a dict of what the network takes: "label",
    "vector" of `vector` numbers, "image": f32[b h' w' image], which is concatenated to x, after linear enlargement if
    it is smaller. What is left out, or the whole if it is None, is absent; see `conditioning`.
    t: the network's own time: the paper's log(sigma), where its output over sigma is the score; EDM's log(sigma) / 4.
    The random rates (3) are a parameter, `time_proj.weight`, so that they are kept with the others and can be carried
    over; their gradient is zero, and weight decay of matrices alone leaves them as they are.
    remat: what the backward pass keeps of each block; see `layers.remat`.
    The defaults, on (32, 32, 3), are the paper's for CIFAR-10. Raises InputError if the arguments do not fit together.
    Source: Song et al. 2021, appendix H, equations (1)-(7).
    """
    check_choice("time", time, TimeFeatures)
    check_choice("progressive_input", progressive_input, Progressive)
    check_choice("progressive_output", progressive_output, Progressive)
    check_choice("combine", combine, Combine)
    check_choice("remat", remat, layers.Remat)
    options = Options(groups or 0, heads, dropout, dtype)
    attends = attention_levels(shape, multipliers, attention)
    check_widths(channels, multipliers, blocks, options._replace(groups=groups or 1))
    plan = Plan(
        tuple(channels * m for m in multipliers), blocks, attends, fir, fourier_scale if time == "fourier" else None,
        progressive_input, progressive_output, combine == "concatenation", remat,
    )  # fmt: skip
    outputs = (out_channels or shape[-1]) * (2 if learned_variance else 1)
    kinds = Kinds(classes=classes, vector=vector, image=image)
    conditioning.check_kinds(kinds)
    return functional(lambda rngs: NCSNpp(rngs, shape[-1], outputs, channels, kinds, plan, options))


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
    vector: int | None = None,
    image: int | None = None,
    out_channels: int | None = None,
    learned_variance: bool = False,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The DDPM++ network for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], cond) -> f32[b h w out_channels]`.

    `ncsnpp` with positional time features, without filter and without progressive input and output; the groups are
    those of `unet`, and the defaults EDM's for CIFAR-10. t is the network's own time: 1000 times
    the time for the linear variance-preserving schedule, log(sigma) / 4 for EDM. Raises InputError if the arguments
    do not fit together. Source: Song et al. 2021, appendix H, and Karras et al. 2022, table 7, equations (1), (2).
    """
    return ncsnpp(
        shape, channels=channels, multipliers=multipliers, blocks=blocks, attention=attention, heads=heads,
        groups=groups or layers.default_groups(channels), dropout=dropout, classes=classes, vector=vector,
        image=image, out_channels=out_channels, learned_variance=learned_variance,
        time="positional", fir=False, progressive_input="none", remat=remat, dtype=dtype,
    )  # fmt: skip


def edm_cifar10(
    *, dropout: float = 0.13, classes: int | None = None, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """EDM's DDPM++ for CIFAR-10: 55.7M parameters (Karras et al. 2022, table 7)."""
    return ddpmpp((32, 32, 3), dropout=dropout, classes=classes, remat=remat, dtype=dtype)


def edm_cifar10_ncsnpp(
    *, dropout: float = 0.13, classes: int | None = None, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """EDM's NCSN++ for CIFAR-10: the widths of `edm_cifar10`, the rest as in `ncsnpp` (Karras et al. 2022, table 7)."""
    return ncsnpp((32, 32, 3), multipliers=(2, 2, 2), dropout=dropout, classes=classes, remat=remat, dtype=dtype)


def song_cifar10(
    *, dropout: float = 0.1, classes: int | None = None, deep: bool = False, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """The DDPM++ of Song et al. 2021 for CIFAR-10: 61.8M parameters; deep: 8 blocks a level instead of 4, 106.6M."""
    return ddpmpp(
        (32, 32, 3), multipliers=(1, 2, 2, 2), blocks=8 if deep else 4, dropout=dropout, classes=classes,
        remat=remat, dtype=dtype,
    )  # fmt: skip


def song_cifar10_ncsnpp(
    *, dropout: float = 0.1, classes: int | None = None, deep: bool = False, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """The NCSN++ of Song et al. 2021 for CIFAR-10: 62.8M parameters; deep: 8 blocks a level instead of 4, 107.6M."""
    return ncsnpp((32, 32, 3), blocks=8 if deep else 4, dropout=dropout, classes=classes, remat=remat, dtype=dtype)


def song_256(
    *, classes: int | None = None, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32
) -> Net:  # fmt: skip
    """The NCSN++ of Song et al. 2021 for CelebA-HQ, FFHQ and LSUN at 256 pixels, with skips: 65.6M parameters."""
    return ncsnpp(
        (256, 256, 3), multipliers=(1, 1, 2, 2, 2, 2, 2), blocks=2, classes=classes, progressive_input="skip",
        progressive_output="skip", remat=remat, dtype=dtype,
    )  # fmt: skip


def song_1024(
    *, classes: int | None = None, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32
) -> Net:  # fmt: skip
    """The NCSN++ of Song et al. 2021 for CelebA-HQ and FFHQ at 1024 pixels, with skips: 105.8M parameters."""
    return ncsnpp(
        (1024, 1024, 3), channels=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), blocks=1, classes=classes,
        progressive_input="skip", progressive_output="skip", remat=remat, dtype=dtype,
    )  # fmt: skip


def check_choice(name: str, value: str, known: Any) -> None:
    """Raise InputError unless value is one of the strings of a `Literal`."""
    if value not in get_args(known):
        raise InputError(f"{name}={value!r} is not one of {', '.join(get_args(known))}")


def norm(n: int, o: Options) -> GroupNorm:
    """The normalization of n channels: in o.groups groups, or if that is 0 in as many as the paper takes for n."""
    wanted = o.groups or max(1, min(32, n // 4))
    return GroupNorm(n, next(g for g in range(wanted, 0, -1) if n % g == 0))


class FourierFeatures(nnx.Module):
    """Equation (3): `t: [b] -> f32[b, 2 n]`; `weight` holds the rates w, and gets no gradient."""

    def __init__(self, rngs: nnx.Rngs, n: int, scale: float):
        tiny = float(jnp.finfo(jnp.float32).eps)
        u = rngs.uniform((n,), jnp.float32, minval=tiny, maxval=1 - tiny)
        self.weight = nnx.Param(scale * jax.scipy.special.ndtri(u))

    def __call__(self, t: Array) -> Array:
        w = jax.lax.stop_gradient(self.weight[...])
        angles = t.astype(jnp.float32)[:, None] * (2 * math.pi * w)[None, :]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Attention(nnx.Module):
    """Equation (2)."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options):
        self.norm = norm(n, o)
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
        attends: bool = False, joins: bool = False, fir: bool = False,
    ):  # fmt: skip
        self.norm1 = norm(n_in, o)
        self.conv1 = Conv(rngs, n_in, n_out, o)
        self.time_emb_proj = Linear(rngs, n_emb, n_out, o.dtype)
        self.norm2 = norm(n_out, o)
        self.conv2 = Conv(rngs, n_out, n_out, o, init=layers.zeros)
        self.conv_shortcut = Conv(rngs, n_in, n_out, o, width=1) if resample or n_in != n_out else None
        self.attention = Attention(rngs, n_out, o) if attends else None
        self.resample, self.joins, self.dropout, self.fir = resample, joins, o.dropout, fir

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        h = self.conv1(resized(self.norm1(x), self.resample, self.fir), bias=False)
        h = self.norm2(h, offset=self.time_emb_proj(emb).astype(jnp.float32) + self.conv1.bias[...][None, :])
        h = self.conv2(layers.dropout(h, self.dropout, noise))
        x = (resized(x, self.resample, self.fir) if self.conv_shortcut is None else self.shortcut(x)) + h
        return x * SKIP_SCALE if self.attention is None else self.attention(x * SKIP_SCALE)

    def shortcut(self, x: Array) -> Array:
        """S R h, the 1x1 convolution, whose kernel commutes with R, at the smaller of the two sizes."""
        assert self.conv_shortcut is not None
        if self.resample != "up":
            return self.conv_shortcut(resized(x, self.resample, self.fir))
        if not self.fir:
            return layers.upsample(self.conv_shortcut(x))
        h = resample.fir_up(self.conv_shortcut(x, bias=False))  # the filter does not keep a constant at the border
        return h + self.conv_shortcut.bias[...].astype(h.dtype)[None, None, None, :]


def resized(x: Array, way: str, fir: bool) -> Array:
    """R: `[b, *pixels, c]` half the size where way is "down", twice where "up", as it is where ""."""
    if way == "up":
        return resample.fir_up(x) if fir else layers.upsample(x)
    if way == "down":
        return resample.fir_down(x) if fir else layers.average_pool(x)
    return x


class ResampledConv(nnx.Module):
    """R' of (5) and (7): a 3x3 convolution and a resampling by 2, `way` "down" or "up", as one linear map."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, o: Options, *, way: str, fir: bool):
        self.conv = Conv(rngs, n_in, n_out, o, stride=2 if way == "down" else 1)
        self.way, self.fir = way, fir

    def __call__(self, x: Array) -> Array:
        if not self.fir:
            return self.conv(layers.upsample(x) if self.way == "up" else x)
        dtype = self.conv.dtype
        f = resample.fir_up_conv if self.way == "up" else resample.fir_down_conv
        y = f(x.astype(dtype), self.conv.kernel[...].astype(dtype))
        return y + self.conv.bias[...].astype(dtype)[None, None, None, :]


class Output(nnx.Module):
    """C silu(GN(h)), of (6), (7)."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, o: Options, init: layers.Initializer = layers.zeros):
        self.norm = norm(n_in, o)
        self.conv = Conv(rngs, n_in, n_out, o, init=init)

    def __call__(self, h: Array) -> Array:
        return self.conv(self.norm(h))


class NCSNpp(nnx.Module):
    """The whole network; see `ncsnpp`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, channels: int, kinds: Kinds, plan: Plan, o: Options):
        n_emb, n_p, classes = 4 * channels, n_in + (kinds.image or 0), kinds.classes
        n_features = channels if plan.fourier_scale is None else 2 * channels
        self.n_in, self.channels, self.dropout, self.kinds, self.plan = n_in, channels, o.dropout, kinds, plan
        self.conv_in = Conv(rngs, n_p, channels, o)
        fourier = plan.fourier_scale
        self.time_proj = None if fourier is None else FourierFeatures(rngs, channels, fourier)
        self.time_embedding = layers.TimeEmbedding(rngs, n_features, n_emb, o.dtype)
        self.class_embedding = (
            None if classes is None else layers.LabelEmbedding(rngs, classes, n_features, jnp.float32)
        )
        self.vector_embedding = (
            None if kinds.vector is None else conditioning.VectorEmbedding(rngs, kinds.vector, n_emb, o.dtype)
        )
        skips = self._make_encoder(rngs, n_p, n_emb, o)
        n = self._make_decoder(rngs, n_out, n_emb, skips, o)
        if plan.progressive_output != "skip":
            self.norm_out = norm(n, o)
            self.conv_out = Conv(rngs, n, n_out, o, init=layers.zeros)

    def _make_encoder(self, rngs: nnx.Rngs, n_p: int, n_emb: int, o: Options) -> list[int]:
        """Set `encoder` and `pyramid_in`; the widths that they leave for the decoder, with the last one's."""
        plan, n, skips = self.plan, self.channels, [self.channels]
        self.encoder, self.pyramid_in = nnx.List(), nnx.List()
        for i, width in enumerate(plan.widths):
            if i:
                self.encoder.append(Block(rngs, n, n, n_emb, o, resample="down", fir=plan.fir))
                if plan.progressive_input == "skip":
                    self.pyramid_in.append(Conv(rngs, n_p, n, o, width=1))
                    n = 2 * n if plan.concatenates else n
                elif plan.progressive_input == "residual":
                    self.pyramid_in.append(ResampledConv(rngs, n_p, n, o, way="down", fir=plan.fir))
                    n_p = n
                skips.append(n)
            for _ in range(plan.blocks):
                self.encoder.append(Block(rngs, n, width, n_emb, o, attends=plan.attends[i]))
                skips.append(width)
                n = width
        return skips

    def _make_decoder(self, rngs: nnx.Rngs, n_out: int, n_emb: int, skips: list[int], o: Options) -> int:
        """Set `decoder` and `pyramid_out`; the width at the end."""
        plan, n = self.plan, skips[-1]
        last, n_p = len(plan.widths) - 1, n
        self.decoder, self.pyramid_out = nnx.List(), nnx.List()
        self.decoder.append(Block(rngs, n, n, n_emb, o, attends=True))
        self.decoder.append(Block(rngs, n, n, n_emb, o))
        for i, width in reversed(list(enumerate(plan.widths))):
            if i < last:
                self.decoder.append(Block(rngs, n, n, n_emb, o, resample="up", fir=plan.fir))
            for j in range(plan.blocks + 1):
                attend = plan.attends[i] and j == plan.blocks
                self.decoder.append(Block(rngs, n + skips.pop(), width, n_emb, o, attends=attend, joins=True))
                n = width
            if plan.progressive_output == "skip":
                self.pyramid_out.append(Output(rngs, n, n_out, o))
            elif plan.progressive_output == "residual" and i == last:
                self.pyramid_out.append(Output(rngs, n, n, o, layers.xavier))
            elif plan.progressive_output == "residual":
                self.pyramid_out.append(ResampledConv(rngs, n_p, n, o, way="up", fir=plan.fir))
            n_p = n
        return n

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, len(self.plan.widths))
        given = conditioning.read(resample.with_enlarged_image(cond, x), self.kinds, x)
        emb = self.embed(t, given)
        noise = iter(layers.dropout_noise(key, self.dropout, x.shape[0], self.block_shapes(x)))
        x = resample.beside(x, given.image, self.kinds.image) if self.kinds.image else x
        h, skips = self.encode(x, emb, noise)
        h, p = self.decode(h, emb, noise, skips)
        y = self.conv_out(self.norm_out(h)) if p is None else p
        return y.astype(jnp.float32)

    def encode(self, x: Array, emb: Array, noise: Iterator[Array | None]) -> tuple[Array, list[Array]]:
        """The encoder with (4) or (5): its end, and what it leaves for the decoder."""
        h, p, parts = self.conv_in(x), x.astype(self.conv_in.dtype), iter(self.pyramid_in)
        skips = [h]
        for block in self.encoder:
            h = layers.remat(self.plan.remat, block)(h, emb, next(noise))
            if block.resample and self.plan.progressive_input == "skip":
                p = resized(p, "down", self.plan.fir)
                part = next(parts)(p)
                h = jnp.concatenate([part, h], axis=-1) if self.plan.concatenates else part + h
            elif block.resample and self.plan.progressive_input == "residual":
                h = p = (next(parts)(p) + h) * SKIP_SCALE
            skips.append(h)
        return h, skips

    def decode(
        self, h: Array, emb: Array, noise: Iterator[Array | None], skips: list[Array]
    ) -> tuple[Array, Array | None]:
        """The decoder with (6) or (7): its end, and with (6) the picture p, which is the output."""
        p, parts, left = None, iter(self.pyramid_out), self.plan.blocks + 1
        for block in self.decoder:
            h = jnp.concatenate([h, skips.pop()], axis=-1) if block.joins else h
            h = layers.remat(self.plan.remat, block)(h, emb, next(noise))
            left -= block.joins
            if left == 0:
                h, p = self.leave(h, p, next(parts, None))
                left = self.plan.blocks + 1
        return h, p if self.plan.progressive_output == "skip" else None

    def leave(self, h: Array, p: Array | None, part: Any) -> tuple[Array, Array | None]:
        """(6) or (7) at the end of one level: h and p after it."""
        if part is None or p is None:
            return h, None if part is None else part(h)
        if self.plan.progressive_output == "skip":
            return h, resized(p, "up", self.plan.fir) + part(h)
        h = (part(p) + h) * SKIP_SCALE
        return h, h

    def block_shapes(self, x: Array) -> list[tuple[int, ...]]:
        """The shape, without the batch axis, in which each block computes after resampling."""
        shapes, pixels = [], x.shape[1:-1]
        for block in [*self.encoder, *self.decoder]:
            pixels = tuple({"up": 2 * n, "down": n // 2, "": n}[block.resample] for n in pixels)
            shapes.append((*pixels, block.conv2.bias.shape[0]))
        return shapes

    def embed(self, t: Array, given: Given) -> Array:
        """e of equation (1), `[b, 4 channels]`."""
        features = layers.time_features(t, self.channels) if self.time_proj is None else self.time_proj(t)
        if self.class_embedding is not None:
            features = features + self.class_embedding(given.label, t.shape[0])
        e = self.time_embedding(features)
        if self.vector_embedding is not None and given.vector is not None:
            e = e + self.vector_embedding(given.vector, given.vector_mask)
        return jax.nn.silu(e)
