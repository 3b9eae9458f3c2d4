r"""Measurement operators of inverse problems: y = A x0 + sigma_y n with n standard normal, or y = A(x0).

Every linear operator here is a sum over blocks of m coefficients: with unitary maps T of examples and R of
measurements, and weights w_1..w_m for each block,

    A x  = R sum_i w_i (T x)_i                                                               (1)
    A* y = T* (conj(w_i) R* y)                                                               (2)
    A+ y = T* (conj(w_i) / s^2 R* y),  s^2 = sum_i |w_i|^2,  and 0 where s = 0               (3)

(T cuts an image into patches, or pixels into channels, or takes the Fourier transform and puts together the
frequencies that a smaller grid cannot tell apart.) So each block has one singular value s, with the right singular
vector conj(w) / s, and m - 1 that are 0: for any function g of the singular values of A = U S V*

    V g(S) V* x = g(0) x + T* (conj(w_i) / s (g(s) - g(0)) sum_j w_j / s (T x)_j)            (4)

which, with U* y = S V* A+ y, is all that a method asks of a singular value decomposition.

Examples are x: [b *space c], and [b d] is a line without channels. Boundaries are circular where a kernel reaches over
them, which makes (3) exact. An operator may be built inside of a jitted function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.ops import divide, fold, wide
from diffusion_jax.typing import Array, Key


@dataclass(frozen=True)
class Missing:
    """In the place of a function that an operator does not have: a ValueError that names both when it is called."""

    operator: str
    method: str

    def __call__(self, *args: Any) -> Any:
        raise ValueError(f"the operator {self.operator!r} has no {self.method}")


class Operator(NamedTuple):
    """A measurement as pure functions; those that it does not have are `Missing`.

    apply:           x f[b *d] -> y f[b *e], A x
    adjoint:         y -> x, A* y with <A x, y> = <x, A* y>
    pseudo_inverse:  y -> x, A+ y; of a nonlinear operator a generalised one, A(A+(A(x))) = A(x)
    spectral:        (g, x) -> V g(S) V* x, eq. (4); g maps singular values f[1 ...] elementwise to f[1 ...] or f[b ...]
    """

    name: str
    apply: Callable[[Array], Array]
    adjoint: Callable[[Array], Array]
    pseudo_inverse: Callable[[Array], Array]
    spectral: Callable[[Callable[[Array], Array], Array], Array]


def identity() -> Operator:
    """Denoising: A = I."""
    return _block_sum("identity", lambda x: x[..., None], lambda z: z[..., 0], jnp.ones_like)


def masking(mask: ArrayLike) -> Operator:
    """Inpainting: y = mask x, of the shape of x; hidden pixels are measured as 0.

    `mask` has the axes of one example or of the batch, each of its size or 1; True (or 1) is known. It may be traced,
    and any weights will do. ValueError for another shape.

    >>> masking(np.array([True, False])).apply(jnp.ones((1, 2))).tolist()
    [[1.0, 0.0]]
    """

    def weights(z: Array) -> Array:
        shape, m = z.shape[:-1], jnp.asarray(mask)
        full = m[None] if m.ndim == len(shape) - 1 else m
        if full.ndim != len(shape) or any(k not in (1, n) for k, n in zip(full.shape, shape, strict=True)):
            raise ValueError(f"a mask of shape {m.shape} for x of shape {shape}")
        return full.astype(z.dtype)[..., None]

    return _block_sum("mask", lambda x: x[..., None], lambda z: z[..., 0], weights)


def box(factor: int) -> Operator:
    """Downsampling by the mean over boxes: [b h w c] -> [b h/f w/f c]; ValueError where a size is not divisible.

    >>> box(2).apply(jnp.asarray([[1.0, 3.0, 5.0, 5.0]])).tolist()
    [[2.0, 5.0]]
    """
    _positive("box", factor)

    def weights(z: Array) -> Array:
        m = factor ** len(_space(z[..., 0]))
        return jnp.full((1,) * (z.ndim - 1) + (m,), 1 / m, z.dtype)

    return _block_sum("box", lambda x: _split(x, factor), lambda z: _merge(z, factor), weights)


def grey(weights: Sequence[float] = (0.299, 0.587, 0.114)) -> Operator:
    """Colour to grey: the weighted sum over channels, [b *space c] -> [b *space 1]; the luma of ITU-R BT.601."""

    def split(x: Array) -> Array:
        if x.shape[-1] != len(weights):
            raise ValueError(f"grey: {len(weights)} weights for x of shape {x.shape}")
        return x[..., None, :]

    def luma(z: Array) -> Array:
        return jnp.reshape(jnp.asarray(weights, z.dtype), (1,) * (z.ndim - 1) + (-1,))

    return _block_sum("grey", split, lambda z: z[..., 0, :], luma)


def blur(kernel: ArrayLike, factor: int = 1, cutoff: float = 1e-3, name: str = "blur") -> Operator:
    """Circular convolution with a kernel f[*k], one axis for each axis of space, then every factor-th pixel.

    The kernel is centred on the middle of the pixels factor j .. factor (j + 1) - 1 for pixel j of y, so that its sizes
    are odd or even as the factor is. Frequencies below `cutoff` of the largest singular value are lost: 0 in A and A+.
    ValueError for a kernel of another rank or parity, and where a size is not a multiple of the factor.
    """
    k = np.asarray(kernel, np.float64)
    _positive(name, factor)
    if any((n - factor) % 2 for n in k.shape):
        raise ValueError(f"{name}: a kernel of shape {k.shape} has no middle for factor {factor}")

    def waves(x: Array) -> Array:
        return jnp.fft.fftn(x.astype(wide(x)), axes=_space(x), norm="ortho")

    def pixels(u: Array) -> Array:
        return jnp.fft.ifftn(u, axes=_space(u), norm="ortho").real

    def split(x: Array) -> Array:
        if len(_space(x)) != k.ndim:
            raise ValueError(f"{name}: a kernel of shape {k.shape} for x of shape {x.shape}")
        return _split(waves(x), factor, far=True)

    def weights(z: Array) -> Array:
        h = _transfer(k, [z.shape[i] * factor for i in _space(z[..., 0])], factor)
        h = jnp.asarray(h.reshape(1, *h.shape, *(1,) * (z.ndim - 2 - k.ndim)), z.dtype)  # with an axis of channels
        w = _split(h, factor, far=True) / factor ** (k.ndim / 2)
        return jnp.where(_size(w) < cutoff * jnp.max(_size(w)), 0, w)

    return _block_sum(name, split, lambda z: pixels(_merge(z, factor, far=True)), weights, pixels, waves)


def gaussian_kernel(std: float, radius: int, axes: int = 2) -> np.ndarray:
    """A Gaussian of that standard deviation in pixels, f64[2 radius + 1, ...], with sum 1.

    >>> gaussian_kernel(1.0, 1, 1).round(3).tolist()
    [0.274, 0.452, 0.274]
    """
    return _outer(np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2), axes)


def bicubic(factor: int, axes: int = 2) -> Operator:
    """Antialiased bicubic downsampling: `blur` with Keys's kernel (1981; a = -1/2) stretched by the factor."""
    size = 4 * factor - factor % 2
    u = np.abs((np.arange(size) - (size - 1) / 2) / factor)
    near, far = 1.5 * u**3 - 2.5 * u**2 + 1, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2
    return blur(_outer(np.where(u <= 1, near, np.where(u < 2, far, 0)), axes), factor, name="bicubic")


def compressed_sensing(key: Key, shape: tuple[int, ...], m: int) -> Operator:
    """m of the d rows of a random orthogonal matrix, the cosine transform after random signs: f[b *d] -> f[b m].

    ValueError unless 1 <= m <= d = the size of `shape`, and for examples that do not have that shape.
    """
    d = math.prod(shape)
    if not 1 <= m <= d:
        raise ValueError(f"compressed_sensing: m = {m} of the {d} rows for shape {shape}")
    signs = jax.random.rademacher(fold(key, 0), (1, d), jnp.float32)
    rows = jax.random.permutation(fold(key, 1), d)[:m]

    def split(x: Array) -> Array:
        if x.shape[1:] != tuple(shape):
            raise ValueError(f"compressed_sensing: made for {tuple(shape)}, got x of shape {x.shape}")
        flat = jnp.reshape(x, (-1, d)).astype(wide(x))
        return jax.scipy.fft.dct(signs.astype(flat.dtype) * flat, norm="ortho", axis=1)[..., None]

    def merge(z: Array) -> Array:
        flat = signs.astype(z.dtype) * jax.scipy.fft.idct(z[..., 0], norm="ortho", axis=1)
        return jnp.reshape(flat, (-1, *shape))

    def spread(y: Array) -> Array:
        return jnp.zeros((y.shape[0], d), y.dtype).at[:, rows].set(y)

    def weights(z: Array) -> Array:
        return spread(jnp.ones((1, m), z.dtype))[..., None]

    return _block_sum("compressed sensing", split, merge, weights, lambda u: u[:, rows], spread)


def phase_retrieval(oversampling: int = 2) -> Operator:
    """Magnitudes of the unitary Fourier transform of x after zeros: [b *n c] -> [b *(oversampling n) c]. Nonlinear."""
    _positive("phase retrieval", oversampling)

    def apply(x: Array) -> Array:
        sizes = tuple(oversampling * x.shape[i] for i in _space(x))
        return jnp.abs(jnp.fft.fftn(x.astype(wide(x)), s=sizes, axes=_space(x), norm="ortho")).astype(x.dtype)

    return _nonlinear("phase retrieval", apply)


_LUMINANCE = bytes.fromhex(  # ITU-T T.81, table K.1: quantisation steps of luminance, row by row
    "100b0a101828333d0c0c0e131a3a3c370e0d1018283945380e11161d3357503e"
    "12162538446d674d182337405168715c31404e5767797865485c5f6270646763"
)


def jpeg(quality: int = 50) -> Operator:
    """JPEG without its colour transform: rounded cosine coefficients of 8 x 8 blocks, [b h w c] -> the same shape.

    x in [-1, 1] are 8-bit values around 0, y integers; A+ decodes (Kawar et al. 2022, arXiv:2209.11888). Rounding has
    derivative 0: methods that differentiate A (DPS, TMPD, MMPS) do nothing. The quality scales ITU-T T.81's table of
    luminance as in libjpeg.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"jpeg: quality between 1 and 100, got {quality}")
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    q = np.clip(np.floor((np.frombuffer(_LUMINANCE, np.uint8) * float(scale) + 50) / 100), 1, 255)
    i = np.arange(8)
    c = np.where(i == 0, 8**-0.5, 0.5)[:, None] * np.cos(np.pi * (2 * i[None] + 1) * i[:, None] / 16)
    transform = np.kron(c, c)  # of the 64 pixels of a block, in a column

    def blockwise(x: Array, matrix: np.ndarray) -> Array:
        if x.ndim != 4:
            raise ValueError(f"jpeg: x must be [b h w c], got shape {x.shape}")
        z = _split(x.astype(wide(x)), 8)
        return _merge(z @ jnp.asarray(matrix, z.dtype), 8)

    return _nonlinear(
        "jpeg",
        lambda x: jnp.round(blockwise(x, transform.T * 127.5 / q)).astype(x.dtype),
        lambda y: blockwise(y, transform * q[:, None] / 127.5).astype(y.dtype),
    )


def compose(outer: Operator, inner: Operator) -> Operator:
    """First `inner`, then `outer`; it has no pseudo-inverse, which is not that of the parts."""
    both = _nonlinear(f"{outer.name} of {inner.name}", lambda x: outer.apply(inner.apply(x)))
    if isinstance(outer.adjoint, Missing) or isinstance(inner.adjoint, Missing):
        return both
    return both._replace(adjoint=lambda y: inner.adjoint(outer.adjoint(y)))


def latent(operator: Operator, decode: Callable[[Array], Array]) -> Operator:
    """The operator as seen from a latent z: z -> A(decode(z)). For methods that only apply and differentiate it."""
    return _nonlinear(f"{operator.name} of a latent", lambda z: operator.apply(decode(z)))


def _nonlinear(name: str, apply: Callable[[Array], Array], inverse: Callable[[Array], Array] | None = None) -> Operator:
    missing = [Missing(name, method) for method in Operator._fields[2:]]
    return Operator(name, apply, missing[0], inverse or missing[1], missing[2])


def _block_sum(
    name: str,
    split: Callable[[Array], Array],
    merge: Callable[[Array], Array],
    weights: Callable[[Array], Array],
    join: Callable[[Array], Array] = lambda u: u,
    unjoin: Callable[[Array], Array] = lambda y: y,
) -> Operator:
    """Equations (1)-(4): split, merge are T, T* of [b *d] <-> [b *e m]; join, unjoin are R, R*.

    `weights` are [1 *e m] for any array of the shape [b *e m] or [b *e 1], and of its dtype.
    """

    def unit(w: Array) -> tuple[Array, Array]:
        s = _size(w)
        return s, divide(jnp.conj(w), s.astype(w.dtype))

    def apply(x: Array) -> Array:
        z = split(x)
        return join(jnp.sum(weights(z) * z, axis=-1)).astype(x.dtype)

    def adjoint(y: Array) -> Array:
        u = unjoin(y.astype(wide(y)))[..., None]
        return merge(jnp.conj(weights(u)) * u).astype(y.dtype)

    def pseudo_inverse(y: Array) -> Array:
        u = unjoin(y.astype(wide(y)))[..., None]
        s, a = unit(weights(u))
        return merge(divide(a * u, s.astype(a.dtype))).astype(y.dtype)

    def spectral(g: Callable[[Array], Array], x: Array) -> Array:
        z = split(x.astype(wide(x)))
        s, a = unit(weights(z))
        zero = g(jnp.zeros((1,) * x.ndim, s.dtype)).astype(x.dtype)
        change = (g(s) - g(jnp.zeros_like(s))).astype(z.dtype) * jnp.sum(jnp.conj(a) * z, axis=-1, keepdims=True)
        return zero * x + merge(a * change).astype(x.dtype)

    return Operator(name, apply, adjoint, pseudo_inverse, spectral)


def _size(w: Array) -> Array:
    """The singular value of each block, real: [*e m] -> [*e 1]."""
    return jnp.sqrt(jnp.sum(jnp.abs(w) ** 2, axis=-1, keepdims=True))


def _space(x: Array) -> tuple[int, ...]:
    """Axes of space: all but the first and the last, and the second of [b d]."""
    return tuple(range(1, max(x.ndim - 1, 2)))


def _split(x: Array, factor: int, far: bool = False) -> Array:
    """Each axis n of space becomes n / factor; the factor^k members of a block, `far` apart or not, a new last axis."""
    axes = _space(x)
    if any(x.shape[i] % factor for i in axes):
        raise ValueError(f"the sizes of x of shape {x.shape} in space are not multiples of {factor}")
    pairs = [(factor, x.shape[i] // factor) if far else (x.shape[i] // factor, factor) for i in axes]
    x = jnp.reshape(x, (x.shape[0], *sum(pairs, ()), *x.shape[axes[-1] + 1 :]))
    x = jnp.moveaxis(x, [2 * i - far for i in axes], range(-len(axes), 0))
    return jnp.reshape(x, (*x.shape[: -len(axes)], -1))


def _merge(z: Array, factor: int, far: bool = False) -> Array:
    """The inverse of `_split`."""
    shape, axes = z.shape[:-1], _space(z[..., 0])
    z = jnp.reshape(z, shape + (factor,) * len(axes))
    z = jnp.moveaxis(z, range(-len(axes), 0), [2 * i - far for i in axes])
    return jnp.reshape(z, tuple(n * factor if i in axes else n for i, n in enumerate(shape)))


def _transfer(kernel: np.ndarray, sizes: list[int], factor: int) -> np.ndarray:
    """Fourier transform c128[*sizes] of the kernel, laid around pixel 0 of a circle, or around (factor - 1) / 2."""
    circle = np.zeros(sizes)
    places = [(np.arange(k) - (k - factor) // 2 - (factor - 1)) % n for k, n in zip(kernel.shape, sizes, strict=True)]
    np.add.at(circle, np.ix_(*places), kernel)
    return np.fft.fftn(circle)


def _outer(row: np.ndarray, axes: int) -> np.ndarray:
    """The kernel with sum 1 that is a product of the same row in each axis."""
    return np.asarray(math.prod(np.ix_(*[row / row.sum()] * axes)))


def _positive(name: str, factor: int) -> None:
    if factor < 1:
        raise ValueError(f"{name}: a factor of at least 1, got {factor}")
