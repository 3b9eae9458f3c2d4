"""Numbers of a single set of samples: Inception score, Vendi score, CLIP score.

    IS    = exp E_x KL(p(y | x) || p(y))      in each of several parts (Salimans et al. 2016, arXiv:1606.03498)      (1)
    Vendi = exp(-sum_i l_i log l_i)           l: eigenvalues of K / n, K_ij = cos(x_i, x_j)                          (2)
    CLIP  = 100 E max(cos(image, text), 0)    (Hessel et al. 2021, arXiv:2104.08718, eq. 1, with w = 100)            (3)

(2) is Friedman & Dieng 2022, arXiv:2210.02410, eq. 2: the effective number of different samples, from 1 to n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.evaluation.moments import alike, features


def inception_score(probabilities: ArrayLike, parts: int = 10) -> Estimate:
    """Equation (1) of class probabilities [n, classes]: the mean over `parts` consecutive parts and its standard error.

    ValueError for rows that do not sum to 1, or fewer rows than parts.

    >>> round(inception_score(np.eye(4)[np.arange(40) % 4], parts=2).value, 6)
    4.0
    """
    p = features(np.asarray(probabilities), "inception_score")
    if (p < 0).any() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("inception_score: the rows must be probabilities, at least 0 and with the sum 1")
    if not 2 <= parts <= len(p):
        raise ValueError(f"inception_score: {len(p)} examples in {parts} parts, at least 2 are needed")
    scores = [np.exp(_divergence(part)) for part in np.array_split(p, parts)]
    return Estimate(float(np.mean(scores)), float(np.std(scores, ddof=1) / np.sqrt(parts)))


def vendi_score(x: ArrayLike) -> float:
    """Equation (2) of features [n, d]; through the d x d matrix of the same eigenvalues where d < n."""
    rows = features(np.asarray(x), "vendi_score")
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    gram = unit.T @ unit if rows.shape[1] < len(rows) else unit @ unit.T
    values = np.linalg.eigvalsh(gram / len(rows))
    values = values[values > 1e-15]
    return float(np.exp(-np.sum(values * np.log(values))))


def clip_score(images: ArrayLike, texts: ArrayLike) -> Estimate:
    """Equation (3) of CLIP features [n, d] of pictures and of their texts, row by row."""
    a, b = alike(np.asarray(images), np.asarray(texts), "clip_score")
    if len(a) != len(b):
        raise ValueError(f"clip_score: {len(a)} pictures and {len(b)} texts")
    cosine = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    each = 100 * np.maximum(cosine, 0)
    return Estimate(float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else float("nan"))


def _divergence(p: np.ndarray) -> float:
    marginal = p.mean(axis=0)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(marginal, 1e-300))), 0)
    return float(terms.sum(axis=1).mean())
