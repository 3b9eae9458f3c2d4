"""The classifier two-sample test: can a classifier tell samples from real examples?

    C2ST = accuracy, on examples it was not fitted to, of a classifier that was fitted to tell x ~ P from y ~ Q      (1)

1/2 where P = Q (Lopez-Paz & Oquab 2017, arXiv:1610.06545, section 3). Every example is judged once, by the one of
`folds` classifiers that has not seen it, so that all of them count; n judged examples give the standard error
sqrt(a (1 - a) / n).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.evaluation.moments import alike

Fit = Callable[[np.ndarray, np.ndarray, int], Callable[[np.ndarray], np.ndarray]]
"""(features f64[n, d], which i[n] of {0, 1}, seed) -> a function features -> which."""


def mlp(hidden: int = 64) -> Fit:
    """A network of one hidden layer on standardised features, stopped early on a tenth of what it is fitted to."""

    def fit(x: np.ndarray, which: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        network = MLPClassifier((hidden,), early_stopping=True, n_iter_no_change=5, random_state=seed)
        return make_pipeline(StandardScaler(), network).fit(x, which).predict

    return fit


def c2st(x: ArrayLike, y: ArrayLike, *, fit: Fit | None = None, folds: int = 5, seed: int = 0) -> Estimate:
    """Equation (1) of features [n, d], [m, d], cut to the same number: near 1/2 is good, 1 is told apart.

    fit: how to make a classifier, by default `mlp()`; features of the pictures themselves are their pixels. ValueError
    for fewer examples than folds.
    """
    a, b = alike(np.asarray(x), np.asarray(y), "c2st")
    n = min(len(a), len(b))
    if not 2 <= folds <= n:
        raise ValueError(f"c2st: {n} examples of each kind in {folds} folds")
    rng = np.random.default_rng(seed)
    rows = np.concatenate([a[rng.permutation(len(a))[:n]], b[rng.permutation(len(b))[:n]]])
    which, fold = np.repeat([0, 1], n), np.concatenate([rng.permutation(np.arange(n) % folds) for _ in range(2)])
    make, right = fit or mlp(), 0
    for i in range(folds):
        out = fold == i
        right += int(np.sum(make(rows[~out], which[~out], seed + i)(rows[out]) == which[out]))
    accuracy = right / (2 * n)
    return Estimate(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / (2 * n))))
