r"""Exponential integrators of the probability flow and of the reverse stochastic differential equation.

With lambda = log(alpha / sigma), h = lambda_s - lambda_t and the predictions x0 at t and at earlier times:

    2M:           x_s = alpha_s x0 + sigma_s eps + alpha_s (1 - e^-h) (h / 2 h_prev) (x0 - x0_prev)      (1)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from diffusion_jax.ops import bcast
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Denoise, Key, Sampler, Schedule


def dpmpp_2m(schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), eq. (1): one evaluation, second order.

    The first step, and one to sigma(s) = 0, are of first order.
    """

    def init(x: Array) -> tuple[Array, Array, Array]:
        return jnp.zeros_like(x), jnp.zeros(()), jnp.zeros((), bool)

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        x0_prev, lam_prev, started = state
        p = denoise(x, t)
        alpha, sigma = schedule(s)
        lam_t, lam_s = logsnr(schedule, t) / 2, logsnr(schedule, s) / 2
        h, h_prev = lam_s - lam_t, lam_t - lam_prev.astype(lam_t.dtype)
        second = started & (sigma > 0)
        ratio = jnp.where(second, h / (2 * jnp.where(second, h_prev, 1)), 0)
        extra = jnp.where(second, -alpha * jnp.expm1(-h) * jnp.where(second, ratio, 0), 0)
        y = bcast(alpha, x) * p.x0 + bcast(sigma, x) * p.eps + bcast(extra, x) * (p.x0 - x0_prev)
        return y, (p.x0, lam_t.astype(lam_prev.dtype), jnp.ones((), bool))

    return Sampler(init, step)
