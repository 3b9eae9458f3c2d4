"""Resampling by 2 with a short filter, and pictures of another size beside a network's input.

Along one axis, with taps f_0 .. f_(m-1) that sum to 1, u the signal x with `up - 1` zeros after each value, zero
outside, and `before` + `after` zeros around it (Karras et al. 2020, arXiv:1912.04958, section 4, after Zhang 2019,
arXiv:1904.11486):

    y_i = up sum_j f_j u_(down i + j - before)                                                                   (1)

A picture is filtered along each axis in turn. For even m, halving takes before = after = (m - 2) / 2 and doubling
before = m / 2, after = m / 2 - 1; with f = [1, 3, 3, 1] / 8 doubling is linear interpolation. A convolution
of width w that goes with the resampling needs more of the border, so that nothing is cut off in between:

    halve:   blur at full size, then the convolution with stride 2;   before = after = (m + w - 3) / 2           (2)
    double:  (w - 1) / 2 further values on each side, then the convolution without padding                       (3)

Taps are symmetric, so correlation in (1) is convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from diffusion_jax.typing import Array, Cond

LINEAR = (1.0, 3.0, 3.0, 1.0)
"""The taps of NCSN++ and StyleGAN2, before they are normalized."""


def upfirdn(
    x: Array, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0), taps: Sequence[float] = LINEAR
) -> Array:
    """Equation (1) along every spatial axis of `x: [b, *pixels, c]`; pad = (before, after), taps are normalized."""
    for axis in range(1, x.ndim - 1):
        x = _upfirdn(x, axis, up, down, pad, tuple(taps))
    return x


def _upfirdn(x: Array, axis: int, up: int, down: int, pad: tuple[int, int], taps: tuple[float, ...]) -> Array:
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (pad[0], pad[1] + up - 1, up - 1)
    u = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    last = (u.shape[axis] - len(taps)) // down * down
    gain = up / sum(taps)
    parts = [
        jax.lax.slice_in_dim(u, j, j + last + 1, down, axis) * jnp.asarray(gain * f, x.dtype)
        for j, f in enumerate(taps)
    ]
    return sum(parts[1:], start=parts[0])


def fir_down(x: Array, taps: Sequence[float] = LINEAR) -> Array:
    """Halve every spatial axis: `[b, *pixels, c] -> [b, *pixels / 2, c]`, equation (1); an even number of taps."""
    p = len(taps) - 2
    return upfirdn(x, down=2, pad=(p // 2, p // 2), taps=taps)


def fir_up(x: Array, taps: Sequence[float] = LINEAR, margin: int = 0) -> Array:
    """Double every spatial axis: `[b, *pixels, c] -> [b, *2 pixels, c]`, equation (1); an even number of taps.

    margin: how many further values on each side, for a convolution without padding, equation (3).
    """
    p = len(taps) // 2
    return upfirdn(x, up=2, pad=(p + margin, p - 1 + margin), taps=taps)


def fir_down_conv(x: Array, kernel: Array, taps: Sequence[float] = LINEAR) -> Array:
    """Equation (2): blur, then convolve with stride 2: `[b, *pixels, n_in] -> [b, *pixels / 2, n_out]`.

    kernel: `[*widths, n_in, n_out]` of one odd width.
    """
    p = len(taps) + kernel.shape[0] - 3
    return _valid(upfirdn(x, pad=(p // 2, p // 2), taps=taps), kernel, 2)


def fir_up_conv(x: Array, kernel: Array, taps: Sequence[float] = LINEAR) -> Array:
    """Equation (3): double, then convolve: `[b, *pixels, n_in] -> [b, *2 pixels, n_out]`; kernel as in (2)."""
    return _valid(fir_up(x, taps, kernel.shape[0] // 2), kernel, 1)


def _valid(x: Array, kernel: Array, stride: int) -> Array:
    ndim = x.ndim - 2
    pixels = "DHW"[-ndim:]
    numbers = (f"N{pixels}C", f"{pixels}IO", f"N{pixels}C")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * ndim, "VALID", dimension_numbers=numbers)


def enlarge(image: Array, pixels: Sequence[int]) -> Array:
    """Enlarge `image: [b, *small, c]` to `[b, *pixels, c]` by linear interpolation, in float32.

    Raises ValueError unless each size is a multiple of the image's. Source: Dhariwal & Nichol 2021, arXiv:2105.05233,
    section 4.4, whose upsamplers are given a low-resolution image in this way.
    """
    small = image.shape[1:-1]
    if len(small) != len(pixels) or any(n % m for n, m in zip(pixels, small, strict=True)):
        raise ValueError(f"an image of {list(small)} pixels cannot be enlarged to {list(pixels)}: sizes must divide")
    shape = (image.shape[0], *pixels, image.shape[-1])
    return jax.image.resize(image.astype(jnp.float32), shape, "linear", antialias=False)


def with_enlarged_image(cond: Cond, x: Array) -> Cond:
    """The same condition with its entry "image", if there is one of another size than x, enlarged to that of x."""
    image = cond.get("image") if isinstance(cond, Mapping) else None
    if image is None or image.shape[1:-1] == x.shape[1:-1]:
        return cond
    return {**cond, "image": enlarge(image, x.shape[1:-1])}


def beside(x: Array, image: Array | None, channels: int) -> Array:
    """Join x: `[b, *pixels, c]` and an image `[b, *pixels, channels]`, zeros for None, along the channels."""
    image = jnp.zeros((*x.shape[:-1], channels), x.dtype) if image is None else image.astype(x.dtype)
    return jnp.concatenate([x, image], axis=-1)
