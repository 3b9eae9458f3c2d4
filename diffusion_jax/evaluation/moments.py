"""Mean and covariance of features that never are in memory at once, in float64.

For a batch of m rows with mean u and scatter S = sum (x - u)(x - u)^T, joined to n rows with mean v and scatter T,

    d = u - v,   mean = v + d m / (n + m),   scatter = T + S + d d^T n m / (n + m)                               (1)

(Chan, Golub & LeVeque 1983, eq. 2.1), which loses nothing to cancellation as sums of squares would. The covariance is
scatter / (n - 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """n rows seen, their mean f64[d] and scatter f64[d, d]."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """f64[d, d], unbiased; ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.n}")
        return self.scatter / (self.n - 1)


def no_moments(d: int) -> Moments:
    """The moments of nothing yet."""
    return Moments(0, np.zeros(d), np.zeros((d, d)))


def joined(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of rows together, equation (1); hosts and shards are joined in any order.

    >>> rows = np.arange(12.0).reshape(6, 2)
    >>> both = joined(moments([rows[:1]]), moments([rows[1:]]))
    >>> bool(np.allclose(both.covariance, np.cov(rows.T)))
    True
    """
    n = a.n + b.n
    if n == 0:
        return a
    gap = b.mean - a.mean
    return Moments(n, a.mean + gap * (b.n / n), a.scatter + b.scatter + np.outer(gap, gap) * (a.n * b.n / n))


def moments(batches: Iterable[np.ndarray]) -> Moments:
    """The moments of all rows of batches `[m, d]`; ValueError for no batch, or for NaN and infinities."""
    total: Moments | None = None
    for batch in batches:
        rows = features(batch, "moments")
        mean = rows.mean(axis=0)
        part = Moments(len(rows), mean, (rows - mean).T @ (rows - mean))
        total = part if total is None else joined(total, part)
    if total is None:
        raise ValueError("moments: no features were given")
    return total


def features(x: np.ndarray, where: str) -> np.ndarray:
    """`[n, d]` as float64; ValueError, naming `where`, for another rank, no rows, or values that are not finite."""
    rows = np.asarray(x, np.float64)
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"{where}: features are [n, d] with n >= 1, got {list(rows.shape)}")
    if not np.isfinite(rows).all():
        bad = int(np.argmin(np.isfinite(rows).all(axis=1)))
        raise ValueError(f"{where}: the features of example {bad} are not finite")
    return rows


def alike(x: np.ndarray, y: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features of the same width; ValueError if they are not."""
    a, b = features(x, where), features(y, where)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{where}: the two sets have features of {a.shape[1]} and of {b.shape[1]} dimensions")
    return a, b
