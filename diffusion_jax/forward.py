r"""The forward process and its posterior, for any schedule.

    q(x_t | x0)       = N(alpha_t x0, sigma_t^2)                                              (1)
    q(x_t | x_s)      = N(alpha_ts x_s, var_ts),  alpha_ts = alpha_t / alpha_s,
                        var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2                             (2)
    q(x_s | x_t, x0)  = N(alpha_ts sigma_s^2 / sigma_t^2 x_t + alpha_s var_ts / sigma_t^2 x0,
                          var_ts sigma_s^2 / sigma_t^2)                                       (3)

for s < t (Ho et al. 2020, arXiv:2006.11239, eq. 4, 6-7; Kingma et al. 2021, arXiv:2107.00630, appendix A).
var_ts is computed as -sigma_t^2 expm1(log SNR_t - log SNR_s), which loses no digits when s is close to t.
"""

from __future__ import annotations

import jax.numpy as jnp

from diffusion_jax.ops import bcast, check_like, check_time, is_batched, normal_like
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Key, Schedule


def q_sample(schedule: Schedule, x0: Array, t: Array, eps: Array) -> Array:
    """Noise data to time t, eq. (1): x_t = alpha_t x0 + sigma_t eps.

    x0, eps: f32[b *d]; t: f32[b] or f32[]. ValueError when the shapes do not match.

    >>> from diffusion_jax.schedules import rectified
    >>> q_sample(rectified(), jnp.ones((1, 2)), jnp.full((1,), 0.25), jnp.zeros((1, 2))).tolist()
    [[0.75, 0.75]]
    """
    check_like("q_sample: eps", eps, x0)
    check_time("q_sample: t", t, x0)
    alpha, sigma = schedule(t)
    return bcast(alpha, x0) * x0 + bcast(sigma, x0) * eps


def transition(schedule: Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """(alpha_ts, var_ts) of eq. (2), for s < t: each f32[*b].

    >>> from diffusion_jax.schedules import edm
    >>> [round(float(v), 4) for v in transition(edm(), jnp.float32(2.0), jnp.float32(1.0))]
    [1.0, 3.0]
    """
    at, as_ = schedule(t), schedule(s)
    return at.alpha / as_.alpha, -(at.sigma**2) * jnp.expm1(logsnr(schedule, t) - logsnr(schedule, s))


def q_posterior(schedule: Schedule, x_t: Array, x0: Array, t: Array, s: Array) -> tuple[Array, Array]:
    """Mean f32[b *d] and variance f32[*b] of q(x_s | x_t, x0), eq. (3), for s < t. ValueError for other shapes."""
    check_like("q_posterior: x0", x0, x_t)
    check_time("q_posterior: t", t, x_t)
    alpha_ts, var_ts = transition(schedule, t, s)
    at, as_ = schedule(t), schedule(s)
    keep = alpha_ts * as_.sigma**2 / at.sigma**2
    move = as_.alpha * var_ts / at.sigma**2
    return bcast(keep, x_t) * x_t + bcast(move, x_t) * x0, var_ts * as_.sigma**2 / at.sigma**2


def variance_bounds(schedule: Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """Logarithms of the lower and upper bound of the reverse variance: each f32[*b].

    The lower one is the posterior's, eq. (3), right for data that is a point; the upper one is var_ts, right for
    data that is standard normal if the schedule is variance preserving (Ho et al. 2020, section 3.2). The lower is
    -inf where sigma_s = 0.
    """
    upper = jnp.log(transition(schedule, t, s)[1])
    return upper + 2 * (jnp.log(schedule(s).sigma) - jnp.log(schedule(t).sigma)), upper


def renoise(key: Key, schedule: Schedule, x_s: Array, s: Array, t: Array) -> Array:
    """Go forward from s to t > s: a draw of q(x_t | x_s), eq. (2), f32[b *d]."""
    alpha_ts, var_ts = transition(schedule, t, s)
    return bcast(alpha_ts, x_s) * x_s + bcast(jnp.sqrt(var_ts), x_s) * normal_like(key, x_s)


def prior(key: Key, schedule: Schedule, shape: tuple[int, ...], t: Array) -> Array:
    """Where sampling starts: sigma(t) times standard normal noise, f32[shape], for a scalar t.

    With a `[b]` array of keys example i is drawn from key i alone, and shape[0] must be b.
    """
    if is_batched(key) and key.shape[0] != shape[0]:
        raise ValueError(f"prior: {key.shape[0]} keys for shape {shape}")
    sigma = schedule(jnp.asarray(t)).sigma
    return sigma * normal_like(key, jnp.zeros(shape, sigma.dtype))
