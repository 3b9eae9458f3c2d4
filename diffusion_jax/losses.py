r"""One denoising loss, its weights, and the variational bound that trains a learned variance.

    L = w(alpha_t, sigma_t) mean (y(x0_hat, eps_hat) - y(x0, eps))^2                          (1)

where y is one of the hub's quantities. L_simple (Ho et al. 2020, arXiv:2006.11239, eq. 14) is y = eps, w = 1; flow
matching (Lipman et al. 2023, arXiv:2210.02747, eq. 9) is y = velocity, w = 1; EDM (Karras et al. 2022,
arXiv:2206.00364, eq. 8) is y = x0 with `edm_weight`. Since alpha (x0_hat - x0) = -sigma (eps_hat - eps), every choice
is a weight on the same error, and y only says in which form it is computed. A weight is stated for one y: to use it
whatever the network predicts, name that y as `target`.

The variational bound at time t (Ho et al. 2020, eq. 5), in bits per dimension:

    L_t = KL(q(x_s | x_t, x0) || N(mean_hat, variance_hat))  for s > 0,  -log p(x0 | x_t) for s = 0     (2)

In continuous time, in nats, it is w = 1 in the weighted bound (Kingma et al. 2021, arXiv:2107.00630, section 4; Kingma
& Gao 2023, arXiv:2303.00848), which depends on the schedule through the ends of its log SNR lambda alone:

    L = 1/2 E_t[-lambda'(t) w(lambda) |eps_hat - eps|^2],  t uniform in [0, 1]               (3)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.forward import q_posterior, q_sample, variance_bounds
from diffusion_jax.ops import bcast, check_like, check_time, is_concrete, mean_per_example
from diffusion_jax.predictions import TO, Predicts, lookup
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import AlphaSigma, Array, Cond, Denoiser, Prediction, Schedule

Weight = Callable[[AlphaSigma], Array]


def unit_weight(at: AlphaSigma) -> Array:
    """1: with y = eps, L_simple."""
    return jnp.ones_like(at.alpha)


def snr_weight(at: AlphaSigma) -> Array:
    """alpha^2 / sigma^2: with y = x0, L_simple again."""
    return (at.alpha / at.sigma) ** 2


def min_snr_weight(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma), for y = x0 (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""
    return lambda at: jnp.minimum(snr_weight(at), gamma)


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """(sigma^2 + sd^2) / (sigma sd)^2 with sigma = sigma_t / alpha_t, for y = x0 (Karras et al. 2022, table 1)."""

    def weight(at: AlphaSigma) -> Array:
        sigma = at.sigma / at.alpha
        return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2

    return weight


def p2_weight(gamma: float = 1.0, k: float = 1.0) -> Weight:
    """1 / (k + SNR)^gamma, for y = eps (Choi et al. 2022, arXiv:2204.00227, eq. 8): less of imperceptible detail."""
    return lambda at: (k + snr_weight(at)) ** -gamma


def sigmoid_weight(bias: float = 0.0) -> Weight:
    """sigmoid(bias - log SNR), for y = eps (Kingma & Gao 2023; SiD2, Hoogeboom et al. 2024, arXiv:2410.19324).

    Both papers mean the w of eq. (3): `elbo_weight(schedule, sigmoid_weight(bias))`.
    """
    return lambda at: jax.nn.sigmoid(bias - 2 * (jnp.log(at.alpha) - jnp.log(at.sigma)))


def elbo_weight(schedule: Schedule, weight: Weight = unit_weight, low: float = 0.0, high: float = 1.0) -> Weight:
    """-lambda'(t) / 2 times a weight, for y = eps: eq. (3) per dimension; with weight 1 the variational bound, in nats.

    For t drawn uniformly from [low, high], over which t is found back from (alpha, sigma), and a loss times
    high - low. Infinite where the log SNR's rate is.
    """

    def weighted(at: AlphaSigma) -> Array:
        t = inverse_logsnr(schedule, 2 * (jnp.log(at.alpha) - jnp.log(at.sigma)), low, high)
        rate = jax.jvp(lambda t: logsnr(schedule, t), (t,), (jnp.ones_like(t),))[1]
        return -rate / 2 * weight(at)

    return weighted


def uncertainty_loss(loss: Array, u: Array) -> Array:
    """loss / exp(u) + u, with a learned u(t): f32[b] (EDM2, Karras et al. 2024, arXiv:2312.02696, eq. 14-15).

    It is least where exp(u) is the expected loss at that noise level, and then every level's gradient weighs the same.

    >>> float(uncertainty_loss(jnp.float32(2.0), jnp.float32(0.0)))
    2.0
    """
    return loss * jnp.exp(-u) + u


def denoising_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    t: Array,
    eps: Array,
    cond: Cond = None,
    *,
    target: Predicts = "eps",
    weight: Weight = unit_weight,
) -> Array:
    """The loss of each example, eq. (1): f32[b]. x0, eps: f32[b *d]; t: f32[b]. Its mean is L_simple by default.

    Where the prediction carries a learned uncertainty it is `uncertainty_loss` of that, which trains both.
    ValueError for an unknown target, and for x0, t and eps (or what the denoiser returns) of shapes that do not match.
    """
    y = lookup(TO, target)
    check_time("denoising_loss: t", t, x0)
    prediction = denoiser(q_sample(schedule, x0, t, eps), t, cond)
    check_like("denoising_loss: the denoiser's x0", prediction.x0, x0)
    error = y(schedule, prediction, t) - y(schedule, Prediction(x0, eps), t)
    loss, u = weight(schedule(t)) * mean_per_example(error**2), prediction.uncertainty
    return loss if u is None else uncertainty_loss(loss, u)


def hybrid_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    t: Array,
    eps: Array,
    cond: Cond = None,
    *,
    table: int = 1000,
    vlb_weight: float = 0.001,
) -> Array:
    """L_simple + vlb_weight L_vlb of each example, f32[b] (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16).

    For a denoiser with a learned variance; t must be discrete times i / table, i >= 1. L_vlb = table * L_t estimates
    the sum over all times, and its gradient reaches the variance alone. x0 must lie in [-1, 1], from 8-bit values.
    """
    x_t = q_sample(schedule, x0, t, eps)
    prediction = denoiser(x_t, t, cond)
    simple = mean_per_example((prediction.eps - eps) ** 2)
    fixed_mean = prediction._replace(x0=jax.lax.stop_gradient(prediction.x0), eps=jax.lax.stop_gradient(prediction.eps))
    return simple + vlb_weight * table * variational_term(fixed_mean, schedule, x0, x_t, t, table=table)


def variational_term(
    prediction: Prediction, schedule: Schedule, x0: Array, x_t: Array, t: Array, *, table: int = 1000
) -> Array:
    """L_t of eq. (2) with s = t - 1 / table, in bits per dimension: f32[b]. ValueError without a learned variance.

    At the first time the likelihood is that of 8-bit values, a Gaussian integrated over each value's bin
    (Ho et al. 2020, eq. 13), and the lower bound of the variance, 0 there, is taken from the second time
    (Nichol & Dhariwal 2021, section 3.1).
    """
    v = prediction.variance_fraction
    if v is None:
        raise ValueError("variational_term: the denoiser predicts no variance")
    i = jnp.round(t * table)
    s = (i - 1) / table
    true_mean, true_variance = q_posterior(schedule, x_t, x0, t, s)
    mean = q_posterior(schedule, x_t, prediction.x0, t, s)[0]
    lower = variance_bounds(schedule, jnp.maximum(i, 2) / table, jnp.maximum(i - 1, 1) / table)[0]
    log_variance = v * bcast(variance_bounds(schedule, t, s)[1], v) + (1 - v) * bcast(lower, v)
    log_true = bcast(jnp.where(i > 1, jnp.log(jnp.where(i > 1, true_variance, 1)), 0), v)
    kl = 0.5 * (log_variance - log_true - 1 + jnp.exp(log_true - log_variance))
    kl = kl + 0.5 * (true_mean - mean) ** 2 * jnp.exp(-log_variance)
    nll = -discretized_log_likelihood(x0, mean, log_variance / 2)
    return mean_per_example(jnp.where(bcast(i, v) > 1, kl, nll)) / np.log(2).item()


def discretized_log_likelihood(x0: Array, mean: Array, log_std: Array) -> Array:
    """Log probability in nats of 8-bit values x0 in [-1, 1] under N(mean, std^2) integrated over bins of width 2/255.

    The first and last bins reach to infinity (Ho et al. 2020, eq. 13). All f32[b *d] -> f32[b *d]. ValueError where x0
    can be seen to be something else than value / 127.5 - 1.
    """
    if is_concrete(x0):
        level = (np.asarray(x0, np.float64) + 1) * 127.5
        if np.any(np.abs(level - np.round(level)) > 0.01 + 128 * float(jnp.finfo(x0.dtype).eps)):
            raise ValueError(f"discretized_log_likelihood: x0 of shape {x0.shape} has values that 8 bits do not")
    inverse = jnp.exp(-log_std)
    upper = jnp.where(x0 > 0.999, jnp.inf, (x0 - mean + 1 / 255) * inverse)
    lower = jnp.where(x0 < -0.999, -jnp.inf, (x0 - mean - 1 / 255) * inverse)
    # On the side where both tails are near 1 their difference cancels: mirror it.
    flip = lower > 0
    a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    return jnp.log(jnp.maximum(jax.scipy.stats.norm.cdf(b) - jax.scipy.stats.norm.cdf(a), 1e-12))
