"""Layers that the networks share, channels last, for any number of spatial axes.

Group normalization with everything that follows it folded into one scale and one shift per channel and example:

    mu_g = E_g[h],   var_g = E_g[h^2] - mu_g^2,   h = x + d          both means in one pass over x, in float32      (1)
    a = gamma (var_g + eps)^(-1/2) (1 + scale),   b = (beta - mu_g gamma (var_g + eps)^(-1/2)) (1 + scale) + shift  (2)
    y = silu(a x + (a d + b))                                                                                       (3)

where the offset d (a bias of the convolution before, the time embedding) is constant over the pixels, so that it
enters the means as E[h] = E[x] + d, E[h^2] = E[x^2] + 2 d E[x] + d^2 and costs no pass over the pixels.

Time features (Vaswani et al. 2017, in the form of Ho et al. 2020), for i = 0 .. n/2 - 1:

    f_i = 10000^(-i / (n/2 - 1)),   features = [sin(t f_0), sin(t f_1), ..., cos(t f_0), cos(t f_1), ...]           (4)

Parameters are float32; `dtype` is the type in which a layer computes and to which its input is cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.nets.attention import attention
from diffusion_jax.ops import is_batched
from diffusion_jax.typing import Array, Key

DType = Any
Initializer = Callable[[nnx.Rngs, tuple[int, ...]], Array]
PerAxis = int | Sequence[int]
"""One number for every spatial axis, or one for each."""
Convolution = Literal["full", "space", "space_then_time"]
"""Of three axes: 3 x 3 x 3, 1 x 3 x 3, or 1 x 3 x 3 and then 3 x 1 x 1."""
AttentionOver = Literal["pixels", "space_then_time"]
"""Of three axes: all pixels at once, or those of each frame and then the frames at each place."""


class Options(NamedTuple):
    """What all blocks of one network share."""

    groups: int
    heads: int
    dropout: float
    dtype: DType
    ndim: int = 2
    convolution: Convolution = "full"
    attention_over: AttentionOver = "pixels"
    factor: PerAxis = 2


def xavier(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """Uniform with variance 2 / (fan in + fan out): kernel `[*widths, n_in, n_out]` (Glorot & Bengio 2010, eq. 16)."""
    limit = math.sqrt(6 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
    return rngs.uniform(shape, jnp.float32, minval=-limit, maxval=limit)


def zeros(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Array:
    """A kernel that starts at zero."""
    return jnp.zeros(shape, jnp.float32)


class Linear(nnx.Module):
    """y = x W + b over the last axis: `[*b, n_in] -> [*b, n_out]` in `dtype`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: DType, init: Initializer = xavier):
        self.kernel = nnx.Param(init(rngs, (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        y = jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y + _per_channel(self.bias[...].astype(self.dtype), y)


class Projection(nnx.Module):
    """y = x W, without a bias: `[*b, n_in] -> [*b, n_out]` in `dtype`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: DType):
        self.kernel = nnx.Param(xavier(rngs, (n_in, n_out)))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        return jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


def joint(x: Array, *linears: Linear | Projection) -> list[Array]:
    """Several linear layers on the same input in one matrix product, which is faster than one for each.

    Either all of them have a bias or none.
    """
    dtype = linears[0].dtype
    kernel = jnp.concatenate([linear.kernel[...] for linear in linears], axis=1).astype(dtype)
    y = jnp.matmul(x.astype(dtype), kernel)
    biases = [linear.bias[...] for linear in linears if isinstance(linear, Linear)]
    if biases:
        y = y + _per_channel(jnp.concatenate(biases).astype(dtype), y)
    ends = np.cumsum([linear.kernel.shape[1] for linear in linears])[:-1]
    return jnp.split(y, ends, axis=-1)


class Conv(nnx.Module):
    """A convolution: `[b, *pixels, n_in] -> [b, *pixels / stride, n_out]` in `dtype`.

    width and stride are one number for all axes, or one for each: width (1, 3, 3) looks within each frame of a video.
    padding: rows of zeros on every side. None is "SAME", for odd widths: with stride 2 and an even size it is one row
    after the picture and none before, as in DDPM.
    `call(x, bias=False)` leaves the bias out, for a group normalization that takes it as its offset.
    """

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, o: Options, *, width: PerAxis = 3, stride: PerAxis = 1,
        padding: int | None = None, init: Initializer = xavier,
    ):  # fmt: skip
        self.kernel = nnx.Param(init(rngs, (*per_axis(width, o.ndim), n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros((n_out,), jnp.float32))
        self.stride, self.padding = stride, padding
        self.dtype = o.dtype

    def __call__(self, x: Array, *, bias: bool = True) -> Array:
        y = conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride, self.padding)
        return y + _per_channel(self.bias[...].astype(self.dtype), y) if bias else y


def per_axis(n: PerAxis, ndim: int) -> tuple[int, ...]:
    """One number for each of `ndim` axes.

    >>> per_axis(3, 2), per_axis((1, 3, 3), 3)
    ((3, 3), (1, 3, 3))
    """
    sizes = (n,) * ndim if isinstance(n, int) else tuple(n)
    if len(sizes) != ndim:
        raise ValueError(f"{sizes} is not one number for each of {ndim} axes")
    return sizes


def conv(x: Array, kernel: Array, stride: PerAxis = 1, padding: int | None = None) -> Array:
    """Convolve `x: [b, *pixels, n_in]` with `kernel: [*widths, n_in, n_out]`, padding "SAME" or as many rows a side.

    Of three axes, those along which nothing happens join others, because compilers have fast code for two.
    """
    ndim = x.ndim - 2
    pixels, strides = "DHW"[-ndim:], per_axis(stride, ndim)
    numbers = (f"N{pixels}C", f"{pixels}IO", f"N{pixels}C")
    if padding is not None:
        return jax.lax.conv_general_dilated(x, kernel, strides, [(padding, padding)] * ndim, dimension_numbers=numbers)
    idle = [width == step == 1 for width, step in zip(kernel.shape, strides, strict=False)]
    if all(idle):
        return jnp.matmul(x, kernel[(0,) * ndim])
    if ndim == 3 and idle[0]:
        y = conv(jnp.reshape(x, (-1, *x.shape[2:])), kernel[0], strides[1:])
        return jnp.reshape(y, (*x.shape[:2], *y.shape[1:]))
    if ndim == 3 and idle[1] and idle[2]:
        y = conv(jnp.reshape(x, (*x.shape[:2], -1, x.shape[-1])), kernel[:, :, 0], strides[:2])
        return jnp.reshape(y, (*y.shape[:2], *x.shape[2:4], y.shape[-1]))
    return jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=numbers)


class GroupNorm(nnx.Module):
    """Equations (1)-(3) with learned gamma (`scale`) and beta (`bias`)."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups = groups
        self.eps = eps

    def __call__(
        self, x: Array, *, offset: Array | None = None, modulation: tuple[Array, Array] | None = None,
        act: bool = True,
    ) -> Array:  # fmt: skip
        return group_norm(
            x, self.scale[...], self.bias[...], self.groups, self.eps, offset=offset, modulation=modulation, act=act
        )


def group_norm(
    x: Array, gamma: Array, beta: Array, groups: int, eps: float, *, offset: Array | None = None,
    modulation: tuple[Array, Array] | None = None, act: bool = True,
) -> Array:  # fmt: skip
    """Equations (1)-(3): `x: [b, *pixels, c] -> [b, *pixels, c]` in x's type; the arithmetic is float32.

    gamma, beta: `[c]`. offset d: `[c]` or `[b, c]`. modulation: (scale, shift), each `[b, c]`. act: apply SiLU.
    """
    x32 = x.astype(jnp.float32)
    pixels = tuple(range(1, x.ndim - 1))
    mean, square = jnp.mean(x32, axis=pixels), jnp.mean(x32 * x32, axis=pixels)
    gamma, beta = _per_channel(gamma, mean), _per_channel(beta, mean)
    if offset is not None:
        d = _per_channel(offset.astype(jnp.float32), mean)
        mean, square = mean + d, square + d * (2 * mean + d)
    mean, square = _group_mean(mean, groups), _group_mean(square, groups)
    a = gamma * jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + eps)
    b = beta - mean * a
    if modulation is not None:
        scale, shift = (m.astype(jnp.float32) for m in modulation)
        a, b = a * (1 + scale), b * (1 + scale) + shift
    if offset is not None:
        b = b + a * d
    y = x32 * _over_pixels(a, x) + _over_pixels(b, x)
    return (jax.nn.silu(y) if act else y).astype(x.dtype)


def _group_mean(m: Array, groups: int) -> Array:
    """Replace each channel of `m: [b, c]` by the mean over its group."""
    grouped = jnp.reshape(m, (m.shape[0], groups, -1))
    return jnp.reshape(jnp.broadcast_to(jnp.mean(grouped, axis=2, keepdims=True), grouped.shape), m.shape)


def _over_pixels(c: Array, x: Array) -> Array:
    return jnp.reshape(c, (c.shape[0],) + (1,) * (x.ndim - 2) + (c.shape[-1],))


def _per_channel(c: Array, x: Array) -> Array:
    return jnp.reshape(c, (1,) * (x.ndim - c.ndim) + c.shape)


def dropout(x: Array, rate: float, noise: Array | None) -> Array:
    """Zero elements of `x: [b *d]` where the bytes `noise: uint8[b *d]` say so and rescale the rest; None: keep all.

    One byte decides each element, so the rate is rounded to a multiple of 1/256, and the rescaling is exact for
    the rounded rate. The bytes are those of `dropout_noise`.
    """
    if noise is None or rate == 0:
        return x
    keep = max(1, round(256 * (1 - rate)))
    return jnp.where(noise < keep, x * (256 / keep), jnp.zeros((), x.dtype))


def dropout_noise(
    key: Key | None, rate: float, batch: int, shapes: Sequence[tuple[int, ...]]
) -> Sequence[Array | None]:
    """Random bytes `uint8[batch, *shape]` for each of the shapes, all from one draw; None for each if there is no key.

    One draw because every further one adds to the compilation; four bytes from each 32-bit word,
    a quarter of the generator's work. With a `[b]` array of keys, the bytes of example i depend on key i alone.
    """
    if key is None or rate == 0:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    ends = np.cumsum([-(-size // 4) for size in sizes])
    if is_batched(key):
        words = jax.vmap(lambda k: jax.random.bits(k, (ends[-1],), jnp.uint32))(key)
    else:
        words = jax.random.bits(key, (batch, ends[-1]), jnp.uint32)
    parts = [jax.lax.bitcast_convert_type(part, jnp.uint8) for part in jnp.split(words, ends[:-1], axis=1)]
    return [
        jnp.reshape(jnp.reshape(part, (batch, -1))[:, :size], (batch, *shape))
        for part, size, shape in zip(parts, sizes, shapes, strict=True)
    ]


def time_features(t: Array, n: int) -> Array:
    """Equation (4): `t: [b] -> f32[b, n]`, n even."""
    rates = jnp.exp(jnp.arange(n // 2, dtype=jnp.float32) * (-math.log(10000.0) / max(n // 2 - 1, 1)))
    angles = t.astype(jnp.float32)[:, None] * rates[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Two layers with SiLU between: `[b, n_in] -> [b, n_out]`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: DType):
        self.linear_1 = Linear(rngs, n_in, n_out, dtype)
        self.linear_2 = Linear(rngs, n_out, n_out, dtype)

    def __call__(self, features: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class LabelEmbedding(nnx.Module):
    """A table of classes + 1 rows; the last one, index `classes`, stands for no label. `int[b] -> [b, n_out]`.

    The rows start with unit variance.
    """

    def __init__(self, rngs: nnx.Rngs, classes: int, n_out: int, dtype: DType):
        self.embedding = nnx.Param(
            rngs.uniform((classes + 1, n_out), jnp.float32, minval=-math.sqrt(3), maxval=math.sqrt(3))
        )
        self.dtype = dtype

    def __call__(self, labels: Array | None, batch: int) -> Array:
        table = self.embedding[...]
        null = table.shape[0] - 1
        if labels is None:
            return jnp.broadcast_to(table[null][None, :], (batch, table.shape[1])).astype(self.dtype)
        if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != (batch,):
            raise ValueError(f"labels must be int[{batch}], got {labels.dtype}{list(labels.shape)}")
        return jnp.take(table, labels, axis=0, mode="clip").astype(self.dtype)


def attend(q: Array, k: Array, v: Array, heads: int) -> Array:
    """Softmax attention over pixels: `[b, *pixels, c] -> [b, *pixels, c]`, c split into heads, softmax in float32."""
    shape = (q.shape[0], -1, heads, q.shape[-1] // heads)
    q_, k_, v_ = (jnp.reshape(z, shape) for z in (q, k, v))
    return jnp.reshape(attention(q_, k_, v_), q.shape)


def upsample(x: Array, factor: PerAxis = 2) -> Array:
    """Enlarge every spatial axis by repetition: `[b, *pixels, c] -> [b, *factor pixels, c]`."""
    for axis, times in enumerate(per_axis(factor, x.ndim - 2), start=1):
        x = jnp.repeat(x, times, axis=axis) if times > 1 else x
    return x


def average_pool(x: Array) -> Array:
    """Halve every spatial axis by the mean of neighbours: `[b, *pixels, c] -> [b, *pixels / 2, c]`."""
    split = [n for size in x.shape[1:-1] for n in (size // 2, 2)]
    paired = jnp.reshape(x, (x.shape[0], *split, x.shape[-1]))
    return jnp.mean(paired, axis=tuple(range(2, paired.ndim - 1, 2)))


Remat = Literal["none", "dots", "full"]
"""What the backward pass keeps of a block: everything, the results of matrix products and convolutions, its input."""


def remat(policy: Remat, block: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays; under `grad` it computes again what the policy does not keep of it.

    Memory for time, a whole block at a time. Arrays that the block closes over, such as its parameters, are kept.
    """
    if policy == "none":
        return block
    if policy == "full":
        return jax.checkpoint(block)
    return jax.checkpoint(block, policy=_is_dot)


def _is_dot(op: Any, *_: Any, **params: Any) -> bool:
    """Products with weights and convolutions. Products of two activations, the scores of attention, are not kept."""
    if op.name == "dot_general":
        batched, _ = params["dimension_numbers"][1]
        return not batched
    return op.name == "conv_general_dilated"


def default_groups(channels: int) -> int:
    """The number of groups for a network of this base width: 32, or fewer so that a group has four channels."""
    return max(1, min(32, channels // 4))
