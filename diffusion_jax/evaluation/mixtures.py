r"""Distributions for which diffusion has exact answers: mixtures of Gaussians.

If x0 ~ sum_k w_k N(m_k, v_k) then x_t = alpha x0 + sigma eps ~ sum_k w_k N(alpha m_k, V_k), with
V_k = alpha^2 v_k + sigma^2, and with the responsibilities r_k(x), everything a network could learn has a closed form:

    E[x0 | x_t]  = sum_k r_k (m_k + alpha v_k / V_k (x - alpha m_k))                          (1)
    E[eps | x_t] = sum_k r_k sigma / V_k (x - alpha m_k)                                      (2)
    score        = -sum_k r_k (x - alpha m_k) / V_k                                           (3)

A covariance is diagonal in the standard basis, or in a basis of its own per component: then (1)-(3) hold for
Q_k^T x, and are turned back by Q_k.

For one component the probability flow carries x_t to x_s = alpha_s m + sqrt(V_s / V_t) (x_t - alpha_t m)     (4)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.typing import Array, Cond, Denoiser, Prediction, Schedule


class Mixture(NamedTuple):
    """weights: f[k]; means, variances: f[k *d]. Any floating dtype; computations follow x.

    With `basis: f[k d d]`, orthogonal matrices, the covariance of component k is basis_k diag(variances_k) basis_k^T;
    examples are then vectors [d].
    """

    weights: Array | np.ndarray
    means: Array | np.ndarray
    variances: Array | np.ndarray
    basis: Array | np.ndarray | None = None


def gaussian(mean: np.ndarray, variance: np.ndarray) -> Mixture:
    """One component: mean and variance f[*d]."""
    return Mixture(np.ones(1), np.asarray(mean)[None], np.asarray(variance)[None])


def marginal(mixture: Mixture, alpha: float, sigma: float) -> Mixture:
    """The law of x_t, again a mixture (NumPy, float64)."""
    w, m, v = (np.asarray(a, np.float64) for a in mixture[:3])
    return Mixture(w, alpha * m, alpha**2 * v + sigma**2, mixture.basis)


def draw(rng: np.random.Generator, mixture: Mixture, n: int) -> np.ndarray:
    """n exact samples f64[n *d] (NumPy)."""
    w, m, v = (np.asarray(a, np.float64) for a in mixture[:3])
    k = rng.choice(len(w), size=n, p=w / w.sum())
    z = np.sqrt(v[k]) * rng.standard_normal(m[k].shape)
    if mixture.basis is not None:
        z = np.einsum("nij,nj->ni", np.asarray(mixture.basis, np.float64)[k], z)
    return m[k] + z


def covariances(mixture: Mixture) -> np.ndarray:
    """The components' covariances f64[k d d] over flattened axes (NumPy)."""
    v = np.asarray(mixture.variances, np.float64).reshape(len(mixture.weights), -1)
    q = np.eye(v.shape[1])[None] if mixture.basis is None else np.asarray(mixture.basis, np.float64)
    return np.einsum("kij,kj,klj->kil", np.broadcast_to(q, (len(v), *q.shape[1:])), v, q)


def moments(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[d] and covariance f64[d d] of a mixture over flattened axes (NumPy)."""
    w = np.asarray(mixture.weights, np.float64)
    w, m = w / w.sum(), np.asarray(mixture.means, np.float64).reshape(len(w), -1)
    mean = w @ m
    centred = m - mean
    return mean, np.einsum("k,ki,kj->ij", w, centred, centred) + np.einsum("k,kij->ij", w, covariances(mixture))


def projected_cdf(mixture: Mixture, direction: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of <direction, x>, for x flattened (SciPy)."""
    from scipy.stats import norm

    w = np.asarray(mixture.weights, np.float64)
    m = np.asarray(mixture.means, np.float64).reshape(len(w), -1)
    centre, std = m @ direction, np.sqrt(np.einsum("i,kij,j->k", direction, covariances(mixture), direction))
    return lambda y: (w / w.sum()) @ norm.cdf((y[None] - centre[:, None]) / std[:, None])


def log_density(mixture: Mixture, schedule: Schedule, x: Array, t: Array) -> Array:
    """log p_t(x): f[b]."""
    return jax.nn.logsumexp(_components(mixture, schedule, x, t).logp, axis=1)


def score(mixture: Mixture, schedule: Schedule, x: Array, t: Array) -> Array:
    """Eq. (3)."""
    c = _components(mixture, schedule, x, t)
    return -jnp.reshape(_mix(mixture, c, c.diff / c.total), x.shape)


def denoiser(mixture: Mixture, schedule: Schedule, next_time: Callable[[Array], Array] | None = None) -> Denoiser:
    """Eq. (1) and (2), finite at alpha = 0 and at sigma = 0.

    With `next_time`, t -> s, also the exact variance fraction of the step to s, see `reverse_fraction`.
    """

    def denoise(x: Array, t: Array, cond: Cond = None) -> Prediction:
        prediction = _predict(mixture, x, _components(mixture, schedule, x, t))
        if next_time is None:
            return prediction
        variance = jnp.reshape(jnp.asarray(mixture.variances, x.dtype)[0], (1, *x.shape[1:]))
        return prediction._replace(variance_fraction=reverse_fraction(schedule, x, t, next_time(t), variance))

    return denoise


def conditional(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """The denoiser given the component: cond i32[b], and the whole mixture where cond = k, the null value."""
    k = mixture.weights.shape[0]

    def denoise(x: Array, t: Array, cond: Array) -> Prediction:
        label = cond[:, None]
        allowed = (label == k) | (label == jnp.arange(k, dtype=label.dtype)[None])
        return _predict(mixture, x, _components(mixture, schedule, x, t, allowed))

    return denoise


def reverse_fraction(schedule: Schedule, x: Array, t: Array, s: Array, variance: Array) -> Array:
    """Where log Var(x_s | x_t) lies between its bounds, for Gaussian data of that variance f[1 *d]: f[b *d].

    Var(x_s | x_t) comes from the joint Gaussian of (x_s, x_t), without the posterior's formula:
    Cov(x_s, x_t) = alpha_s alpha_t v + (alpha_t / alpha_s) sigma_s^2.
    """
    shape = (-1,) + (1,) * (x.ndim - 1)
    a_t, s_t, a_s, s_s = (jnp.reshape(c, shape) for c in (*schedule(t), *schedule(s)))
    var_s, var_t = a_s**2 * variance + s_s**2, a_t**2 * variance + s_t**2
    cov = a_s * a_t * variance + a_t / a_s * s_s**2
    exact = var_s - cov**2 / var_t
    upper = s_t**2 - (a_t / a_s) ** 2 * s_s**2
    lower = upper * s_s**2 / s_t**2
    fraction = (jnp.log(exact) - jnp.log(lower)) / (jnp.log(upper) - jnp.log(lower))
    return jnp.broadcast_to(jnp.where(lower > 0, fraction, 0), x.shape).astype(x.dtype)


def flow(mixture: Mixture, schedule: Schedule, x: Array, t: Array, s: Array) -> Array:
    """Eq. (4): the exact probability flow of a single Gaussian from t to s, both scalars; x: f[b *d]."""
    m, v = (jnp.asarray(a, x.dtype) for a in mixture[1:3])
    (a_t, s_t), (a_s, s_s) = schedule(t), schedule(s)
    return a_s * m + jnp.sqrt((a_s**2 * v + s_s**2) / (a_t**2 * v + s_t**2)) * (x - a_t * m)


class _Components(NamedTuple):
    logp: Array  # f[b k], of weight and component
    diff: Array  # f[b k n], x - alpha m_k in the component's basis
    total: Array  # f[b k n], V_k
    alpha: Array  # f[b 1 1]
    sigma: Array


def _components(mixture: Mixture, schedule: Schedule, x: Array, t: Array, allowed: Array | None = None) -> _Components:
    b, k = x.shape[0], mixture.weights.shape[0]
    m = jnp.reshape(jnp.asarray(mixture.means, x.dtype), (1, k, -1))
    v = jnp.reshape(jnp.asarray(mixture.variances, x.dtype), (1, k, -1))
    alpha, sigma = (jnp.reshape(jnp.broadcast_to(c, (b,)), (b, 1, 1)).astype(x.dtype) for c in schedule(t))
    total = alpha**2 * v + sigma**2
    diff = jnp.reshape(x, (b, 1, -1)) - alpha * m
    if mixture.basis is not None:
        diff = jnp.einsum("bki,kij->bkj", diff, jnp.asarray(mixture.basis, x.dtype))
    logw = jnp.log(jnp.reshape(jnp.asarray(mixture.weights, x.dtype), (1, k)))
    if allowed is not None:
        logw = jnp.where(allowed, logw, -jnp.inf)
    logp = logw - 0.5 * jnp.sum(diff**2 / total + jnp.log(2 * np.pi * total), axis=-1)
    return _Components(logp, diff, total, alpha, sigma)


def _predict(mixture: Mixture, x: Array, c: _Components) -> Prediction:
    k = mixture.weights.shape[0]
    m, v = (jnp.reshape(jnp.asarray(a, x.dtype), (1, k, -1)) for a in mixture[1:3])
    x0 = jnp.sum(_shares(c.logp) * m, axis=1) + _mix(mixture, c, c.alpha * v / c.total * c.diff)
    eps = _mix(mixture, c, c.sigma / c.total * c.diff)
    return Prediction(jnp.reshape(x0, x.shape), jnp.reshape(eps, x.shape))


def _shares(logp: Array) -> Array:
    """Responsibilities f[b k 1]; exactly 1 for one component, so that a Gaussian's denoiser is elementwise."""
    return (jnp.ones_like(logp) if logp.shape[1] == 1 else jax.nn.softmax(logp, axis=1))[:, :, None]


def _mix(mixture: Mixture, c: _Components, y: Array) -> Array:
    """sum_k r_k Q_k y_k: f[b k n] -> f[b n]."""
    if mixture.basis is not None:
        y = jnp.einsum("bkj,kij->bki", y, jnp.asarray(mixture.basis, y.dtype))
    return jnp.sum(_shares(c.logp) * y, axis=1)
