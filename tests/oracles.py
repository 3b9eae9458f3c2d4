r"""Distributions for which diffusion has exact answers: mixtures of Gaussians with diagonal covariances.

If x0 ~ sum_k w_k N(m_k, v_k) then x_t = alpha x0 + sigma eps ~ sum_k w_k N(alpha m_k, V_k), with
V_k = alpha^2 v_k + sigma^2, and with the responsibilities r_k(x), everything a network could learn has a closed form:

    E[x0 | x_t]  = sum_k r_k (m_k + alpha v_k / V_k (x - alpha m_k))                          (1)
    E[eps | x_t] = sum_k r_k sigma / V_k (x - alpha m_k)                                      (2)
    score        = -sum_k r_k (x - alpha m_k) / V_k                                           (3)

For one component the probability flow carries x_t to x_s = alpha_s m + sqrt(V_s / V_t) (x_t - alpha_t m)     (4)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffusion_jax as dj
from diffusion_jax.typing import Array, Denoiser, Prediction, Schedule


class Case(NamedTuple):
    """A schedule with an interval of times inside which nothing is singular, and with its ends."""

    schedule: Schedule
    low: float
    high: float
    start: float = 1.0
    end: float = 0.0


CASES: dict[str, Case] = {
    "linear_betas": Case(dj.from_betas(dj.linear_betas(1000)), 0.02, 0.98),
    "scaled_linear_betas": Case(dj.from_betas(dj.scaled_linear_betas(1000)), 0.02, 0.98),
    "cosine_betas": Case(dj.from_betas(dj.cosine_betas(1000)), 0.02, 0.98),
    "vp_linear": Case(dj.vp_linear(), 0.02, 0.98),
    "cosine": Case(dj.cosine(0.008), 0.02, 0.98),
    "cosine_0": Case(dj.cosine(0.0), 0.02, 0.98),
    "ve": Case(dj.ve(0.01, 50.0), 0.02, 0.98),
    "rectified": Case(dj.rectified(), 0.02, 0.98),
    "edm": Case(dj.edm(), 0.01, 40.0, start=80.0),
}


class Mixture(NamedTuple):
    """weights: f[k]; means, variances: f[k *d]. Any floating dtype; computations follow x."""

    weights: Array
    means: Array
    variances: Array


def gaussian(mean: Array, variance: Array) -> Mixture:
    """One component: mean and variance f[*d]."""
    return Mixture(np.ones(1), np.asarray(mean)[None], np.asarray(variance)[None])


def marginal(mixture: Mixture, alpha: float, sigma: float) -> Mixture:
    """The law of x_t, again a mixture (NumPy, float64)."""
    w, m, v = (np.asarray(a, np.float64) for a in mixture)
    return Mixture(w, alpha * m, alpha**2 * v + sigma**2)


def draw(rng: np.random.Generator, mixture: Mixture, n: int) -> np.ndarray:
    """n exact samples f64[n *d] (NumPy)."""
    w, m, v = (np.asarray(a, np.float64) for a in mixture)
    k = rng.choice(len(w), size=n, p=w / w.sum())
    return m[k] + np.sqrt(v[k]) * rng.standard_normal(m[k].shape)


def moments(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Mean f64[d] and covariance f64[d d] of a mixture over flattened axes."""
    w, m, v = (np.asarray(a, np.float64).reshape(len(mixture.weights), -1) for a in mixture)
    w = w[:, 0] / w.sum()
    mean = w @ m
    centred = m - mean
    return mean, np.einsum("k,ki,kj->ij", w, centred, centred) + np.diag(w @ v)


def projected_cdf(mixture: Mixture, direction: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of <direction, x>, for x flattened."""
    from scipy.stats import norm

    w, m, v = (np.asarray(a, np.float64).reshape(len(mixture.weights), -1) for a in mixture)
    centre, std = m @ direction, np.sqrt(v @ direction**2)
    return lambda y: (w[:, 0] / w.sum()) @ norm.cdf((y[None] - centre[:, None]) / std[:, None])


def _components(mixture: Mixture, schedule: Schedule, x: Array, t: Array, allowed: Array | None = None):
    """log joint f[b k]; x - alpha m_k, V_k f[b k n]; alpha, sigma f[b 1 1]; means, variances f[1 k n]."""
    b, k = x.shape[0], mixture.weights.shape[0]
    m = jnp.reshape(jnp.asarray(mixture.means, x.dtype), (1, k, -1))
    v = jnp.reshape(jnp.asarray(mixture.variances, x.dtype), (1, k, -1))
    alpha, sigma = (jnp.reshape(jnp.broadcast_to(c, (b,)), (b, 1, 1)).astype(x.dtype) for c in schedule(t))
    total = alpha**2 * v + sigma**2
    diff = jnp.reshape(x, (b, 1, -1)) - alpha * m
    logw = jnp.log(jnp.reshape(jnp.asarray(mixture.weights, x.dtype), (1, k)))
    if allowed is not None:
        logw = jnp.where(allowed, logw, -jnp.inf)
    logp = logw - 0.5 * jnp.sum(diff**2 / total + jnp.log(2 * np.pi * total), axis=-1)
    return logp, diff, total, alpha, sigma, m, v


def _shares(logp: Array) -> Array:
    """Responsibilities f[b k 1]; exactly 1 for one component, so that a Gaussian's denoiser is elementwise."""
    return (jnp.ones_like(logp) if logp.shape[1] == 1 else jax.nn.softmax(logp, axis=1))[:, :, None]


def log_density(mixture: Mixture, schedule: Schedule, x: Array, t: Array) -> Array:
    """log p_t(x): f[b]."""
    return jax.nn.logsumexp(_components(mixture, schedule, x, t)[0], axis=1)


def score(mixture: Mixture, schedule: Schedule, x: Array, t: Array) -> Array:
    """Eq. (3)."""
    logp, diff, total, *_ = _components(mixture, schedule, x, t)
    return -jnp.reshape(jnp.sum(_shares(logp) * diff / total, axis=1), x.shape)


def denoiser(mixture: Mixture, schedule: Schedule, next_time: Callable[[Array], Array] | None = None) -> Denoiser:
    """Eq. (1) and (2), finite at alpha = 0 and at sigma = 0.

    With `next_time`, t -> s, also the exact variance fraction of the step to s, see `reverse_fraction`.
    """

    def denoise(x: Array, t: Array, cond=None) -> Prediction:
        logp, diff, total, alpha, sigma, m, v = _components(mixture, schedule, x, t)
        r = _shares(logp)
        x0 = jnp.reshape(jnp.sum(r * (m + alpha * v / total * diff), axis=1), x.shape)
        eps = jnp.reshape(jnp.sum(r * sigma / total * diff, axis=1), x.shape)
        if next_time is None:
            return Prediction(x0, eps)
        variance = jnp.reshape(v[:, 0], (1, *x.shape[1:]))
        return Prediction(x0, eps, reverse_fraction(schedule, x, t, next_time(t), variance))

    return denoise


def conditional(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """The denoiser given the component: cond i32[b], and the whole mixture where cond = k, the null value."""
    k = mixture.weights.shape[0]

    def denoise(x: Array, t: Array, cond: Array) -> Prediction:
        label = cond[:, None]
        allowed = (label == k) | (label == jnp.arange(k, dtype=label.dtype)[None])
        logp, diff, total, alpha, sigma, m, v = _components(mixture, schedule, x, t, allowed)
        r = _shares(logp)
        x0 = jnp.sum(r * (m + alpha * v / total * diff), axis=1)
        eps = jnp.sum(r * sigma / total * diff, axis=1)
        return Prediction(jnp.reshape(x0, x.shape), jnp.reshape(eps, x.shape))

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
    m, v = (jnp.asarray(a, x.dtype) for a in mixture[1:])
    (a_t, s_t), (a_s, s_s) = schedule(t), schedule(s)
    return a_s * m + jnp.sqrt((a_s**2 * v + s_s**2) / (a_t**2 * v + s_t**2)) * (x - a_t * m)
