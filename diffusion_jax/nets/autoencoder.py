"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G).

With GN group normalization and every 3x3 convolution written C,

    block(h) = S h + C2 silu(GN(C1 silu(GN(h))))                      S: 1x1 where the width changes            (1)
    attention(h) = h + W_o softmax(q k^T / sqrt(d)) v,   (q, k, v) = W GN(h)  over all pixels                   (2)
    middle(h) = block(attention(block(h)))                                                                      (3)

Encoder: C; at level i, `blocks` times (1) at width `widths[i]`, then, but for the last level, a convolution of stride 2
padded by one row after and none before; (3); C silu(GN(h)) to twice the latent channels; a 1x1 convolution.
Its halves are the mean and the log variance of a diagonal Gaussian

    q(z | x) = N(mean, exp(logvar)),    logvar clipped to [-30, 20],    z = mean + exp(logvar / 2) eps           (4)
    KL(q || N(0, I)) = 1/2 sum(mean^2 + exp(logvar) - 1 - logvar)                                               (5)

Decoder: a 1x1 convolution; C; (3); at level i from the last to the first, `blocks + 1` times (1), then, but for the
first level, nearest upsampling and a convolution; C silu(GN(h)). A diffusion model is trained on z times a scale
that brings its standard deviation to about 1; see `SD_SCALE`. Attribute names are those of diffusers' AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Options
from diffusion_jax.nets.unet import Attention, Resample
from diffusion_jax.ops import normal_like
from diffusion_jax.typing import Array, Cond, InputError, Key, Params

SD_SCALE = 0.18215
"""What Stable Diffusion 1 and 2, and DiT, multiply latents by (Rombach et al. 2022, appendix G)."""


class Gaussian(NamedTuple):
    """Equation (4): mean and log variance, each `f32[b *d]`."""

    mean: Array
    logvar: Array


class Autoencoder(NamedTuple):
    """An autoencoder as pure functions; the parameters are a plain nested dict of arrays.

    init: (key) -> params. encode: (params, x: f32[b h w c]) -> Gaussian of f32[b h/f w/f z]; decode: (params,
    z: f32[b h/f w/f z]) -> x: f32[b h w c]. Each needs its half of the parameters only.
    """

    init: Callable[[Key], Params]
    encode: Callable[[Params, Array], Gaussian]
    decode: Callable[[Params, Array], Array]


def draw_latent(key: Key, q: Gaussian) -> Array:
    """A draw z of equation (4); a `[b]` array of keys draws per example."""
    return q.mean + jnp.exp(0.5 * q.logvar) * normal_like(key, q.mean)


def kl_to_standard(q: Gaussian) -> Array:
    """Equation (5), `f32[b]`.

    >>> kl_to_standard(Gaussian(jnp.ones((2, 4)), jnp.zeros((2, 4)))).tolist()
    [2.0, 2.0]
    """
    terms = q.mean**2 + jnp.exp(q.logvar) - 1.0 - q.logvar
    return 0.5 * jnp.sum(jnp.reshape(terms, (terms.shape[0], -1)), axis=1)


def kl_autoencoder(
    *,
    widths: Sequence[int] = (128, 256, 512, 512),
    blocks: int = 2,
    channels: int = 3,
    latent: int = 4,
    groups: int | None = None,
    dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> Autoencoder:
    """The KL autoencoder for images of `channels` of any size divisible by f = 2^(levels - 1).

    widths: of the levels; latent: channels of z. groups: of every normalization, by default min(32, widths[0] / 4).
    dtype: of the computation; parameters, normalization statistics and the outputs are float32. remat: by block.
    InputError if the arguments do not fit together; ValueError for inputs of the wrong shape.
    Source: Rombach et al. 2022, equations (1) to (4).
    """
    options = make_options(widths, blocks, channels, latent, groups, dtype)
    both = 2 * latent
    encoder = functional(lambda rngs: Encoding(rngs, channels, both, both, tuple(widths), blocks, options, remat))
    decoder = functional(lambda rngs: Decoding(rngs, latent, latent, channels, tuple(widths), blocks, options, remat))

    def init(key: Key) -> Params:
        return encoder.init(jax.random.fold_in(key, 0)) | decoder.init(jax.random.fold_in(key, 1))

    def encode(params: Params, x: Array) -> Gaussian:
        check_image("x", x, channels, 2 ** (len(widths) - 1))
        mean, logvar = jnp.split(encoder.apply(part(params, "encoder", "quant_conv"), x, no_time(x)), 2, axis=-1)
        return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(params: Params, z: Array) -> Array:
        check_image("z", z, latent, 1)
        return decoder.apply(part(params, "decoder", "post_quant_conv"), z, no_time(z))

    return Autoencoder(init, encode, decode)


def sd_vae(*, dtype: layers.DType = jnp.float32, remat: layers.Remat = "none") -> Autoencoder:
    """The autoencoder of Stable Diffusion 1 and 2 and, with other weights, of SDXL: 83,653,863 parameters, f = 8."""
    return kl_autoencoder(dtype=dtype, remat=remat)


def make_options(
    widths: Sequence[int], blocks: int, channels: int, latent: int, groups: int | None, dtype: layers.DType
) -> Options:
    """What the blocks share. Raises InputError if the arguments of an autoencoder do not fit together."""
    if not widths or min(*widths, blocks, channels, latent) < 1:
        raise InputError(f"needs widths, blocks and channels of at least 1, got {tuple(widths)}, {blocks}, {channels}")
    options = Options(groups or layers.default_groups(widths[0]), 1, 0.0, dtype)
    if any(width % options.groups for width in widths):
        raise InputError(f"widths={tuple(widths)} must be divisible by groups={options.groups}")
    return options


def part(params: Params, *names: str) -> Params:
    """These of an autoencoder's parameters. ValueError if they are not there."""
    missing = [name for name in names if name not in params]
    if missing:
        raise ValueError(f"the autoencoder's parameters lack {', '.join(missing)}")
    return {name: params[name] for name in names}


def no_time(x: Array) -> Array:
    """A t for networks that use none: f32[b]."""
    return jnp.zeros(x.shape[:1], jnp.float32)


def check_image(name: str, x: Array, channels: int, factor: int) -> None:
    """Raise ValueError unless x is `[b h w channels]` with sizes that `factor` divides."""
    if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"{name} must be [b h w {channels}] with h and w divisible by {factor}, got {list(x.shape)}")


class ResnetBlock(nnx.Module):
    """Equation (1)."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, o: Options):
        self.norm1 = GroupNorm(n_in, o.groups)
        self.conv1 = Conv(rngs, n_in, n_out, o)
        self.norm2 = GroupNorm(n_out, o.groups)
        self.conv2 = Conv(rngs, n_out, n_out, o)
        self.conv_shortcut = None if n_in == n_out else Conv(rngs, n_in, n_out, o, width=1)

    def __call__(self, x: Array) -> Array:
        h = self.norm2(self.conv1(self.norm1(x), bias=False), offset=self.conv1.bias[...])
        return self.conv2(h) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Level(nnx.Module):
    """Blocks (1) one after the other, the first `attentions` of them followed by (2), then a `Resample`."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n: int, blocks: int, o: Options, remat: layers.Remat, *,
        attentions: int = 0, down: bool = False, up: bool = False,
    ):  # fmt: skip
        self.resnets = nnx.List([ResnetBlock(rngs, n if i else n_in, n, o) for i in range(blocks)])
        self.attentions = nnx.List([Attention(rngs, n, o) for _ in range(attentions)])
        self.downsamplers = nnx.List([Resample(rngs, n, o, up=False)] if down else [])
        self.upsamplers = nnx.List([Resample(rngs, n, o, up=True)] if up else [])
        self.remat: layers.Remat = remat

    def __call__(self, x: Array) -> Array:
        for i in range(len(self.resnets)):
            x = layers.remat(self.remat, partial(self.block, i))(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x

    def block(self, i: int, x: Array) -> Array:
        x = self.resnets[i](x)
        return self.attentions[i](x) if i < len(self.attentions) else x


class Encoder(nnx.Module):
    """From pixels to the features that `quant_conv` makes (4) of."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, widths: tuple[int, ...], blocks: int, o: Options,
        remat: layers.Remat,
    ):  # fmt: skip
        self.conv_in = Conv(rngs, n_in, widths[0], o)
        pairs = list(zip((widths[0], *widths), widths, strict=False))
        self.down_blocks = nnx.List(
            [Level(rngs, a, b, blocks, o, remat, down=i + 1 < len(pairs)) for i, (a, b) in enumerate(pairs)]
        )
        self.mid_block = Level(rngs, widths[-1], widths[-1], 2, o, remat, attentions=1)
        self.conv_norm_out = GroupNorm(widths[-1], o.groups)
        self.conv_out = Conv(rngs, widths[-1], n_out, o)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nnx.Module):
    """From latents to pixels."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, widths: tuple[int, ...], blocks: int, o: Options,
        remat: layers.Remat,
    ):  # fmt: skip
        up = widths[::-1]
        self.conv_in = Conv(rngs, n_in, up[0], o)
        self.mid_block = Level(rngs, up[0], up[0], 2, o, remat, attentions=1)
        pairs = list(zip((up[0], *up), up, strict=False))
        self.up_blocks = nnx.List(
            [Level(rngs, a, b, blocks + 1, o, remat, up=i + 1 < len(pairs)) for i, (a, b) in enumerate(pairs)]
        )
        self.conv_norm_out = GroupNorm(up[-1], o.groups)
        self.conv_out = Conv(rngs, up[-1], n_out, o)

    def __call__(self, z: Array) -> Array:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(self.conv_norm_out(x))


class Encoding(nnx.Module):
    """The half of an autoencoder that encodes, in the form `functional` takes; time and condition are ignored.

    The encoder makes `features` of x, and a 1x1 convolution n_out of them.
    """

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, features: int, n_out: int, widths: tuple[int, ...], blocks: int, o: Options,
        remat: layers.Remat,
    ):  # fmt: skip
        self.encoder = Encoder(rngs, n_in, features, widths, blocks, o, remat)
        self.quant_conv = Conv(rngs, features, n_out, o, width=1)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return self.quant_conv(self.encoder(x)).astype(jnp.float32)


class Decoding(nnx.Module):
    """The half that decodes."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, features: int, n_out: int, widths: tuple[int, ...], blocks: int, o: Options,
        remat: layers.Remat,
    ):  # fmt: skip
        self.post_quant_conv = Conv(rngs, n_in, features, o, width=1)
        self.decoder = Decoder(rngs, features, n_out, widths, blocks, o, remat)

    def __call__(self, z: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)
