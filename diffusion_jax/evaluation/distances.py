"""Distances between two distributions, from their features: Frechet and kernel distances.

Of Gaussians with the same moments (Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6), with the nuclear
norm |.|_*, the sum of singular values:

    d^2 = |mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),      tr (A B)^(1/2) = |A^(1/2) B^(1/2)|_*               (1)

The right-hand form takes square roots of symmetric matrices only, so that singular and ill-conditioned covariances do
no harm. Of kernels (Gretton et al. 2012, eq. 3): the unbiased U-statistic

    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1)) - 2 mean k(x_i, y_j)    (2)

with k(x, y) = (x.y / d + 1)^3 for the kernel (Inception) distance (Binkowski et al. 2018, arXiv:1801.01401, section 4),
and the biased V-statistic, with the diagonals, for CMMD (Jayasumana et al. 2024, arXiv:2401.09603, section 4), where
k(x, y) = exp(-|x - y|^2 / (2 s^2)), s = 10, on features scaled to length 1, and the result is shown times 1000.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation.moments import Moments, alike

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x: [n, d], y: [m, d]) -> [n, m]."""
ROWS = 2048
"""Rows of a kernel matrix that are held at once."""


class Estimate(NamedTuple):
    """A number and its standard error, nan where there is none."""

    value: float
    standard_error: float


def frechet_distance(mu_a: ArrayLike, cov_a: ArrayLike, mu_b: ArrayLike, cov_b: ArrayLike) -> float:
    """Squared Frechet distance of two Gaussians, eq. (1): mu f[d], cov f[d, d]. FID is this on Inception features.

    ValueError for shapes that do not match, values that are not finite and matrices that are not symmetric and positive
    semi-definite (to rounding).

    >>> frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2))
    4.0
    """
    means = [np.asarray(mu, np.float64) for mu in (mu_a, mu_b)]
    covariances = [np.asarray(cov, np.float64) for cov in (cov_a, cov_b)]
    shapes = [a.shape for a in (*means, *covariances)]
    d = means[0].size
    if shapes != [(d,), (d,), (d, d), (d, d)]:
        raise ValueError(f"frechet_distance: mu_a, mu_b, cov_a, cov_b have the shapes {shapes}")
    roots = [_root(cov, name) for cov, name in zip(covariances, ("cov_a", "cov_b"), strict=True)]
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    gap = means[0] - means[1]
    return float(max(0.0, gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross))


def frechet_of(a: Moments, b: Moments) -> float:
    """`frechet_distance` of two sets of features; it warns where one has no more rows than dimensions.

    The estimate is biased upwards by about a term in 1 / n: compare numbers of equal n only.
    """
    for moments in (a, b):
        if moments.n <= moments.mean.size:
            warnings.warn(
                f"{moments.n} examples give a singular covariance of {moments.mean.size} features: the distance is far "
                "above its value for many examples. Use more of them, or the kernel distance, which is unbiased",
                stacklevel=2,
            )
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def _root(cov: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(cov).all():
        raise ValueError(f"frechet_distance: {name} is not finite")
    scale = np.abs(cov).max()
    if np.abs(cov - cov.T).max() > 1e-6 * scale:
        raise ValueError(f"frechet_distance: {name} is not symmetric")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -1e-6 * scale:
        raise ValueError(f"frechet_distance: {name} has the negative eigenvalue {values[0]:.3g}")
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3, the kernel of the kernel Inception distance."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(s: float) -> Kernel:
    """exp(-|x - y|^2 / (2 s^2))."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squared = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1)[None, :] - 2 * (x @ y.T)
        return np.exp(-np.maximum(squared, 0) / (2 * s * s))

    return kernel


def mmd2(x: ArrayLike, y: ArrayLike, kernel: Kernel = cubic, *, unbiased: bool = True) -> float:
    """The squared maximum mean discrepancy of features [n, d] and [m, d], eq. (2), or with the diagonals.

    The unbiased estimate may be negative. ValueError for fewer than two rows, or features that do not match.
    """
    a, b = alike(np.asarray(x), np.asarray(y), "mmd2")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"mmd2: needs two examples of each kind, got {len(a)} and {len(b)}")
    return _within(a, kernel, unbiased) + _within(b, kernel, unbiased) - 2 * _total(a, b, kernel) / (len(a) * len(b))


def kernel_distance(x: ArrayLike, y: ArrayLike, *, block: int = 1000, seed: int = 0) -> Estimate:
    """KID where the features are Inception's: eq. (2) in disjoint random blocks, their mean and its standard error.

    Blocks share no example, so that they are independent, the mean is unbiased at any n and the error is honest; the
    published protocol (100 random blocks of 1,000) has the same expectation. ValueError for fewer than two blocks.
    """
    a, b = alike(np.asarray(x), np.asarray(y), "kernel_distance")
    blocks = min(len(a), len(b)) // block
    if blocks < 2 or block < 2:
        raise ValueError(
            f"kernel_distance: {len(a)} and {len(b)} examples make {blocks} blocks of {block}, at least 2 are needed: "
            "more examples or a smaller block"
        )
    rng = np.random.default_rng(seed)
    rows = [np.reshape(rng.permutation(len(z))[: blocks * block], (blocks, block)) for z in (a, b)]
    values = [mmd2(a[i], b[j]) for i, j in zip(*rows, strict=True)]
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(blocks)))


def cmmd(x: ArrayLike, y: ArrayLike) -> float:
    """CMMD of CLIP image features [n, d]: 1000 times the biased MMD^2 with a Gaussian kernel of width 10."""
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in alike(np.asarray(x), np.asarray(y), "cmmd"))
    return 1000 * mmd2(a, b, gaussian(10.0), unbiased=False)


def _within(x: np.ndarray, kernel: Kernel, unbiased: bool) -> float:
    n = len(x)
    if not unbiased:
        return _total(x, x, kernel) / n**2
    diagonal = sum(float(np.diagonal(kernel(part, part)).sum()) for part in _parts(x, 256))
    return (_total(x, x, kernel) - diagonal) / (n * (n - 1))


def _total(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> float:
    return float(sum(kernel(part, y).sum() for part in _parts(x, ROWS)))


def _parts(x: np.ndarray, rows: int) -> list[np.ndarray]:
    return [x[i : i + rows] for i in range(0, len(x), rows)]
