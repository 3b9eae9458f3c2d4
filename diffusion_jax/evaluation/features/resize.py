"""Resizing as each published protocol does it: the same word means different pixels in different libraries.

A resize is linear and separable, y = A_h x A_w^T, with a matrix A of `n_out` rows for each axis, s = n_in / n_out:

    A_ij = k(u_i - j),   u_i = s (i + 1/2) - 1/2,   j outside the picture counts for the pixel at the edge         (1)
    A_ij = k(u_i - j),   u_i = s i                                                                                 (2)
    A_ij ~ k((s (i + 1/2) - 1/2 - j) / max(s, 1)),   rows that sum to 1                                            (3)

    bilinear            (1), k(d) = max(1 - |d|, 0)        torch's interpolate, align_corners=False
    bilinear_tf1        (2), the same k                    TensorFlow 1, without half pixels: FID's graph
    bicubic             (1), Keys' k with a = -3/4         torch's interpolate
    bilinear_antialias  (3)                                torch's interpolate with antialias, jax.image
    bicubic_antialias   (3), Keys' k with a = -1/2         the same

Keys' cubic is k(d) = (a+2)|d|^3 - (a+3)|d|^2 + 1 up to 1 and a(|d|^3 - 5|d|^2 + 8|d| - 4) up to 2 (Keys 1981, eq. 4).
(1), (2) skip pixels when they shrink a picture; (3) does not. Pillow does (3) with rounding to 8 bits after each axis:
where a protocol means Pillow, Pillow does it, on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.typing import Array, InputError

Method = Literal["bilinear", "bilinear_tf1", "bicubic", "bilinear_antialias", "bicubic_antialias"]
PillowMethod = Literal["bilinear", "bicubic"]
RADIUS = {"bilinear": 1, "bicubic": 2}


def resize(x: Array, size: tuple[int, int], method: Method) -> Array:
    """`f32[b, h, w, c]` -> `f32[b, *size, c]` by (1)-(3), not rounded, not clipped; InputError for another method."""
    if method not in get_args(Method):
        raise InputError(f"resize: {method!r} is none of {', '.join(get_args(Method))}")
    for axis, n_out in zip((2, 1), reversed(size), strict=True):
        n_in = x.shape[axis]
        if n_in != n_out:
            a = jnp.asarray(matrix(n_in, n_out, method), jnp.float32)
            ends = "biwc,oi->bowc" if axis == 1 else "bhic,oi->bhoc"
            x = jnp.einsum(ends, x, a, precision=jax.lax.Precision.HIGHEST)
    return x


def matrix(n_in: int, n_out: int, method: Method, scale: float | None = None) -> np.ndarray:
    """A of (1)-(3): f64[n_out, n_in]. scale: an s that is not n_in / n_out, for (1).

    >>> matrix(2, 4, "bilinear").tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    >>> matrix(2, 4, "bilinear_tf1").tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 1.0]]
    """
    name = method.split("_")[0]
    if method.endswith("antialias"):
        return _antialiased(n_in, n_out, _kernel(name, -0.5), RADIUS[name])
    # Places are float32 in the references, and 1 / 128 of a pixel's value hangs on their last digits.
    s = np.float32(n_in / n_out if scale is None else scale)
    i = np.arange(n_out, dtype=np.float32)
    u = i * s if method == "bilinear_tf1" else (i + np.float32(0.5)) * s - np.float32(0.5)
    return _interpolated(n_in, u, _kernel(name, -0.75), RADIUS[name])


def pillow(images: np.ndarray, size: tuple[int, int], method: PillowMethod = "bicubic") -> np.ndarray:
    """Pillow's resize of `u8[b, h, w, 3]` to `u8[b, *size, 3]`, rounded and clipped as Pillow does."""
    if images.shape[1:3] == size:
        return images
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    if len(images) == 0:
        return np.zeros((0, *size, images.shape[3]), np.uint8)

    def one(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), filters[method]))

    with ThreadPoolExecutor() as threads:  # Pillow lets go of Python's lock while it resizes
        return np.stack(list(threads.map(one, images)))


def pillow_short_side(images: np.ndarray, size: int, method: PillowMethod = "bicubic") -> np.ndarray:
    """Pillow's resize of the shorter side to `size`, and the square in the middle: `u8[b, size, size, 3]`.

    CLIP's preprocessing (Radford et al. 2021, arXiv:2103.00020, their code): the longer side is rounded down, the
    margin is rounded to the nearest, half to even.
    """
    h, w = images.shape[1:3]
    short = min(h, w)
    images = pillow(images, (size * h // short, size * w // short), method)
    top, left = (round((n - size) / 2) for n in images.shape[1:3])
    return images[:, top : top + size, left : left + size]


def pillow_square(images: np.ndarray, size: int, method: PillowMethod = "bicubic") -> np.ndarray:
    """The square in the middle, and Pillow's resize of it: `u8[b, size, size, 3]`; CMMD's preprocessing."""
    h, w = images.shape[1:3]
    short = min(h, w)
    top, left = (h - short) // 2, (w - short) // 2
    return pillow(images[:, top : top + short, left : left + short], (size, size), method)


def _kernel(name: str, a: float) -> Callable[[np.ndarray], np.ndarray]:
    def triangle(d: np.ndarray) -> np.ndarray:
        return np.maximum(1 - np.abs(d), 0)

    def cubic(d: np.ndarray) -> np.ndarray:
        d = np.abs(d)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, near, np.where(d < 2, far, 0))

    return triangle if name == "bilinear" else cubic


def _interpolated(n_in: int, u: np.ndarray, kernel: Callable[[np.ndarray], np.ndarray], radius: int) -> np.ndarray:
    """Equations (1), (2) for the places u."""
    u = u.astype(np.float64)
    a, rows = np.zeros((len(u), n_in)), np.arange(len(u))
    for tap in range(1 - radius, radius + 1):
        j = np.floor(u).astype(int) + tap
        np.add.at(a, (rows, np.clip(j, 0, n_in - 1)), kernel(u - j))
    return a


def _antialiased(n_in: int, n_out: int, kernel: Callable[[np.ndarray], np.ndarray], radius: int) -> np.ndarray:
    """Equation (3). Pixels count whose middle is within the kernel's reach, to the nearest whole one."""
    s = n_in / n_out
    wide = max(s, 1.0)
    middle, j = ((np.arange(n_out) + 0.5) * s)[:, None], np.arange(n_in)[None, :]
    first = np.floor(np.maximum(middle - radius * wide + 0.5, 0))
    last = np.floor(np.minimum(middle + radius * wide + 0.5, n_in))
    a = np.where((j >= first) & (j < last), kernel((j + 0.5 - middle) / wide), 0)
    return a / a.sum(axis=1, keepdims=True)
