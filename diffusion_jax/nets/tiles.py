r"""An autoencoder that works on one tile of a picture after the other, so that its memory is that of a tile.

Along an axis of n latents there are k = ceil((n - o) / (T - o)) tiles of T, neighbours sharing at least o. The i-th
begins at

    s_i = round(i (n - T) / (k - 1)),   i = 0 .. k - 1                                                            (1)

and what the autoencoder f makes of the tiles x_i is averaged, with weights that rise where a tile begins and fall
where it ends, unless the picture begins or ends there too: for the middle p of each pixel, measured in latents,

    y(p) = sum_i w_i(p) f(x_i)(p) / sum_i w_i(p),   w_i(p) = r(p - s_i) r(s_i + T - p)                            (2)
    r(d) = min(1, max(0, 2 d / o - 1/2))                                                                          (3)

The outermost o / 4 latents of a tile, which see padding where the picture goes on, do not count: y is f of the whole
picture where f looks no further than that and takes no statistics over the pixels. Where it does, as in group
normalization and attention, tiles differ in tone, and the ramp (3) leaves no edge between them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.autoencoder import Autoencoder, Gaussian
from diffusion_jax.typing import Array, InputError, Params


def tiled(autoencoder: Autoencoder, tile: int, overlap: int, *, factor: int = 8) -> Autoencoder:
    """The same autoencoder by (1) to (3), for pictures of more than `tile` pixels a side: equal to it up to tone.

    tile, overlap: pixels, multiples of `factor`, which is how many of them a latent is wide. A picture that fits in a
    tile is left to the autoencoder itself. All tiles have one shape; the gradient computes each of them again. Means
    and log variances are averaged alike. InputError unless 0 < 2 overlap <= tile.
    """
    if tile % factor or overlap % factor or not 0 < 2 * overlap <= tile:
        raise InputError(f"tile={tile}, overlap={overlap}: multiples of {factor}, and the overlap at most half a tile")
    size, shared = tile // factor, overlap // factor

    def encode(params: Params, x: Array) -> Gaussian:
        return by_tiles(partial(autoencoder.encode, params), x, size, shared, factor, 1)

    def decode(params: Params, z: Array) -> Array:
        return by_tiles(partial(autoencoder.decode, params), z, size, shared, 1, factor)

    return Autoencoder(autoencoder.init, encode, decode)


def by_tiles(f: Callable[[Array], Any], x: Array, tile: int, overlap: int, inside: int, outside: int) -> Any:
    """Equation (2): x f32[b, inside h, inside w, c] -> arrays of f32[b, outside h, outside w, c'], as f gives them.

    Sizes that `inside` does not divide, and those of one tile, are left to f.
    """
    if x.ndim != 4 or any(n % inside for n in x.shape[1:3]) or max(x.shape[1:3]) <= tile * inside:
        return f(x)
    h, w = (n // inside for n in x.shape[1:3])
    rows, columns = starts(h, tile, overlap), starts(w, tile, overlap)
    piece = (x.shape[0], min(tile, h) * inside, min(tile, w) * inside, x.shape[3])
    f = jax.checkpoint(f, prevent_cse=False)

    def add(total: Any, place: tuple[Array, ...]) -> tuple[Any, None]:
        i, j, by_row, by_column = place
        y = f(jax.lax.dynamic_slice(x, _corner(i, j, inside), piece))
        weight = (by_row[:, None] * by_column[None, :])[None, :, :, None]
        return jax.tree.map(lambda t, y: _added(t, weight * y, _corner(i, j, outside)), total, y), None

    made = jax.eval_shape(f, jax.ShapeDtypeStruct(piece, x.dtype))
    empty = jax.tree.map(lambda y: jnp.zeros((x.shape[0], outside * h, outside * w, y.shape[3]), y.dtype), made)
    shares = shares_of(rows, h, tile, overlap, outside), shares_of(columns, w, tile, overlap, outside)
    return jax.lax.scan(add, empty, _pairs((rows, shares[0]), (columns, shares[1])))[0]


def starts(n: int, tile: int, overlap: int) -> np.ndarray:
    """Equation (1), i32[k]; one tile where the axis is no longer than that.

    >>> starts(20, 8, 2).tolist(), starts(6, 8, 2).tolist()
    ([0, 6, 12], [0])
    """
    if n <= tile:
        return np.zeros(1, np.int32)
    k = -(-(n - overlap) // (tile - overlap))
    return np.round(np.linspace(0, n - tile, k)).astype(np.int32)


def shares_of(begins: np.ndarray, n: int, tile: int, overlap: int, outside: int) -> np.ndarray:
    """w_i / sum w of equation (2) along an axis: f32[k, pixels of a tile], `outside` pixels a latent.

    >>> shares_of(starts(6, 4, 2), 6, 4, 2, 1).tolist()
    [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    """
    tile = min(tile, n)
    d = (np.arange(tile * outside) + 0.5) / outside
    rise, total, found = np.clip(2 * d / overlap - 0.5, 0, 1), np.zeros(n * outside), []
    for s in begins:
        w = np.where(s > 0, rise, 1) * np.where(s + tile < n, rise[::-1], 1)
        total[s * outside : (s + tile) * outside] += w
        found.append(w)
    parts = [w / total[s * outside : (s + tile) * outside] for s, w in zip(begins, found, strict=True)]
    return np.stack(parts).astype(np.float32)


def _pairs(rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]) -> tuple[Array, ...]:
    """Where each tile begins and what its pixels count, for all tiles of a picture: i32[K], i32[K], f32[K, p] twice."""
    i, j = (index.ravel() for index in np.indices((len(rows[0]), len(columns[0]))))
    return tuple(jnp.asarray(part) for part in (rows[0][i], columns[0][j], rows[1][i], columns[1][j]))


def _corner(i: Array, j: Array, pixels: int) -> tuple[Array, ...]:
    """Where a tile begins in an array of so many pixels a latent."""
    zero = jnp.zeros((), i.dtype)
    return zero, i * pixels, j * pixels, zero


def _added(total: Array, y: Array, corner: tuple[Array, ...]) -> Array:
    return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, corner, y.shape) + y, corner)
