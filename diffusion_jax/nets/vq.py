"""The autoencoder with a codebook: VQ-VAE and VQGAN (van den Oord et al. 2017, arXiv:1711.00937; Esser et al. 2021,
arXiv:2012.09841).

With the encoder E and the decoder D of `autoencoder`, and K learned rows e_1 .. e_K of d numbers, for every place of
z = E(x)

    k = argmin_j |z - e_j|^2,    z_q = e_k,    x' = D(z_q)                                                       (1)

in whose gradient z_q counts as z: the encoder gets what comes from the decoder. With sg for "no gradient",

    codebook loss = |sg(z) - e_k|^2,    commitment loss = |z - sg(e_k)|^2                                        (2)

each a mean over places and channels, and beta times the second is added to the first, with beta = 0.25 in both papers
(van den Oord et al. 2017, eq. 3). How many rows are in use is told by

    perplexity = exp(-sum_j p_j log p_j),   p_j the share of places with k = j                                   (3)

between 1 and K. Attribute names are those of diffusers' VQModel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.nets import layers
from diffusion_jax.nets.autoencoder import Decoding, Encoding, check_image, make_options, no_time, part
from diffusion_jax.nets.functional import functional
from diffusion_jax.typing import Array, InputError, Key, Params


class Quantized(NamedTuple):
    """What (1) makes of z.

    z: z_q, f32[b h w d], whose gradient is that of z. ids: k, int32[b h w]. codebook, commitment: the losses (2), each
    f32[b]. perplexity: (3), f32[], over the whole batch.
    """

    z: Array
    ids: Array
    codebook: Array
    commitment: Array
    perplexity: Array


class VectorAutoencoder(NamedTuple):
    """An autoencoder with a codebook as pure functions; the parameters are a plain nested dict of arrays.

    init: (key) -> params. encode: (params, x: f32[b h w c]) -> z: f32[b h/f w/f d], not quantized; quantize: (params,
    z) -> Quantized; decode: (params, z_q: f32[b h/f w/f d]) -> x: f32[b h w c]. Each needs its part of the parameters.
    """

    init: Callable[[Key], Params]
    encode: Callable[[Params, Array], Array]
    quantize: Callable[[Params, Array], Quantized]
    decode: Callable[[Params, Array], Array]


def vq_autoencoder(
    *,
    widths: Sequence[int] = (128, 256, 512),
    blocks: int = 2,
    channels: int = 3,
    latent: int = 3,
    codes: int = 8192,
    code_width: int | None = None,
    groups: int | None = None,
    dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> VectorAutoencoder:
    """The autoencoder (1) for images of `channels` of any size divisible by f = 2^(levels - 1).

    latent: channels that the encoder gives and the decoder takes. codes: K. code_width: d, by default `latent`.
    The others are as for `kl_autoencoder`. The defaults are the network of Rombach et al. 2022 with f = 4, 55,322,782
    parameters. The codebook starts uniform in [-1/K, 1/K]. InputError if the arguments do not fit together; ValueError
    for inputs of the wrong shape.
    Source: van den Oord et al. 2017, section 3; Esser et al. 2021, section 3.1.
    """
    options, d = make_options(widths, blocks, channels, latent, groups, dtype), code_width or latent
    if codes < 1 or d < 1:
        raise InputError(f"codes={codes}, code_width={d}: a codebook has at least one row of one number")
    encoder = functional(lambda rngs: Encoding(rngs, channels, latent, d, tuple(widths), blocks, options, remat))
    decoder = functional(lambda rngs: Decoding(rngs, d, latent, channels, tuple(widths), blocks, options, remat))

    def init(key: Key) -> Params:
        rows = jax.random.uniform(jax.random.fold_in(key, 2), (codes, d), jnp.float32, -1 / codes, 1 / codes)
        halves = encoder.init(jax.random.fold_in(key, 0)) | decoder.init(jax.random.fold_in(key, 1))
        return halves | {"quantize": {"embedding": {"embedding": rows}}}

    def encode(params: Params, x: Array) -> Array:
        check_image("x", x, channels, 2 ** (len(widths) - 1))
        return encoder.apply(part(params, "encoder", "quant_conv"), x, no_time(x))

    def quantize(params: Params, z: Array) -> Quantized:
        check_image("z", z, d, 1)
        return quantized(z, codebook(params))

    def decode(params: Params, z: Array) -> Array:
        check_image("z", z, d, 1)
        return decoder.apply(part(params, "decoder", "post_quant_conv"), z, no_time(z))

    return VectorAutoencoder(init, encode, quantize, decode)


def codebook(params: Params) -> Array:
    """The rows e_1 .. e_K: f32[K, d]; `codebook(params)[ids]` is the z_q of numbers of rows."""
    return part(params, "quantize")["quantize"]["embedding"]["embedding"]


def quantized(z: Array, rows: Array) -> Quantized:
    """Equations (1) to (3): z f32[b h w d], rows f32[K, d]."""
    ids = nearest(z, rows)
    e = rows[ids]
    return Quantized(
        z + jax.lax.stop_gradient(e - z), ids, _mean_square(jax.lax.stop_gradient(z) - e),
        _mean_square(z - jax.lax.stop_gradient(e)), perplexity(ids, len(rows)),
    )  # fmt: skip


def nearest(z: Array, rows: Array) -> Array:
    """k of equation (1), the first of several: z f32[*b, d], rows f32[K, d] -> int32[*b].

    >>> nearest(jnp.asarray([[0.9, 0.2], [-2.0, 0.0]]), jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])).tolist()
    [0, 1]
    """
    flat = jnp.reshape(z, (-1, z.shape[-1])).astype(jnp.float32)
    products = jnp.matmul(flat, rows.T.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    distances = jnp.sum(rows * rows, axis=1)[None, :] - 2 * products  # less |z|^2, which is the same for all rows
    return jnp.reshape(jnp.argmin(distances, axis=1).astype(jnp.int32), z.shape[:-1])


def perplexity(ids: Array, codes: int) -> Array:
    """Equation (3), f32[], for numbers of rows of any shape.

    >>> round(float(perplexity(jnp.asarray([0, 1, 1, 0]), 8)), 4)
    2.0
    """
    share = jnp.bincount(jnp.ravel(ids), length=codes).astype(jnp.float32) / ids.size
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def _mean_square(x: Array) -> Array:
    return jnp.mean(jnp.reshape(x * x, (x.shape[0], -1)), axis=1)
