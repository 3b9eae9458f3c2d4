"""What nearest neighbours in feature space say: fidelity, diversity, and copies of the training set.

With B_k(y) the ball around a real example y that reaches to its k-th nearest real neighbour:

    precision = share of samples in some ball of a real example,  recall = the same with the roles exchanged        (1)
    density   = mean number of balls of real examples around a sample, over k                                       (2)
    coverage  = share of real examples whose ball holds a sample                                                    (3)

(Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1-2; Naeem et al. 2020, arXiv:2002.09797, eq. 3-4.) For copies, with
d(x, T) the distance of x to its nearest training example:

    copy ratio   = median of d(sample, T) over median of d(held-out, T)                                             (4)
    authenticity = share of samples x for which d(t, T without t) <= |x - t|, t the training example next to x       (5)

(4) is about 1 for new examples of the same kind and 0 for copies (Meehan et al. 2020, arXiv:2004.05675, in its
plainest form); (5) is Alaa et al. 2022, arXiv:2102.08921, section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation.moments import alike

ROWS = 1024
"""Rows of a distance matrix that are held at once."""


class Support(NamedTuple):
    """Equations (1)-(3), each in [0, 1] but density."""

    precision: float
    recall: float
    density: float
    coverage: float


def support(real: ArrayLike, samples: ArrayLike, k: int = 5) -> Support:
    """Precision, recall, density and coverage of features [n, d], [m, d], eq. (1)-(3), all with the same k.

    The papers take k = 3 for (1) and 5 for (2), (3). ValueError unless 1 <= k < n, m.
    """
    y, x = alike(np.asarray(real), np.asarray(samples), "support")
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(f"support: k={k} neighbours of {len(y)} real examples and {len(x)} samples")
    real_radii, sample_radii = radii(y, k), radii(x, k)
    inside_real, inside_samples = np.zeros(len(x), int), np.zeros(len(y), bool)
    covered = np.zeros(len(y), bool)
    for start, distances in _blocks(x, y):
        rows = slice(start, start + len(distances))
        within = distances <= real_radii[None, :]
        inside_real[rows] = within.sum(axis=1)
        covered |= within.any(axis=0)
        inside_samples |= (distances <= sample_radii[rows, None]).any(axis=0)
    return Support(
        float(np.mean(inside_real > 0)), float(np.mean(inside_samples)), float(np.mean(inside_real) / k),
        float(np.mean(covered)),
    )  # fmt: skip


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """The distance of each row of [n, d] to its k-th nearest other row: f64[n]."""
    # Column 0 is the row itself at distance 0, so the k-th other one is column k.
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _blocks(x, x, same=True)])


def nearest(x: ArrayLike, to: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of `to` for each row of x: (distance f64[n], index i[n])."""
    a, b = alike(np.asarray(x), np.asarray(to), "nearest")
    parts = [(d.min(axis=1), d.argmin(axis=1)) for _, d in _blocks(a, b)]
    distances, indices = zip(*parts, strict=True)
    return np.concatenate(distances), np.concatenate(indices)


def copy_ratio(train: ArrayLike, held_out: ArrayLike, samples: ArrayLike) -> float:
    """Equation (4), of features or of flattened pixels."""
    mine, real = (np.median(nearest(x, train)[0]) for x in (samples, held_out))
    return float(mine / real)


def authenticity(train: ArrayLike, samples: ArrayLike) -> float:
    """Equation (5). Fresh examples of the training distribution reach about 1/2, copies 0."""
    distances, indices = nearest(samples, train)
    own = radii(np.asarray(train, np.float64), 1)
    return float(np.mean(own[indices] <= distances))


def _blocks(x: np.ndarray, y: np.ndarray, same: bool = False):
    """(first row, distances f64[rows, len(y)]) for a few rows of x at a time."""
    squares = np.sum(y * y, axis=1)
    for start in range(0, len(x), ROWS):
        part = x[start : start + ROWS]
        squared = np.sum(part * part, axis=1)[:, None] + squares[None, :] - 2 * (part @ y.T)
        if same:
            squared[np.arange(len(part)), start + np.arange(len(part))] = 0
        yield start, np.sqrt(np.maximum(squared, 0))
