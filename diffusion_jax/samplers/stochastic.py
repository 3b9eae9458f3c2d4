r"""Samplers that add noise to another one's steps, or that discretise the reverse stochastic differential equation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.forward import renoise, transition
from diffusion_jax.ops import bcast, fold
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Denoise, Key, Sampler, Schedule


def churn(
    inner: Sampler,
    schedule: Schedule,
    rate: float,
    t_min: ArrayLike,
    t_max: ArrayLike,
    limit: ArrayLike,
    noise: float = 1.003,
) -> Sampler:
    """Add noise before each step of `inner` (Karras et al. 2022, algorithm 2): from t up to t_hat, then down to s.

    The noise-to-signal ratio grows by 1 + min(rate, sqrt(2) - 1) where t_min <= t <= t_max, and t_hat never passes
    `limit`, where the schedule's time ends (1, or EDM's largest sigma). The paper's rate is S_churn / N and `noise` its
    S_noise: EDM on 18 steps of CIFAR-10 is `churn(heun(edm()), edm(), 40 / 18, 0.05, 50.0, 80.0)`. Rate 0 is `inner`.
    """
    if rate < 0:
        raise ValueError(f"churn: rate must not be negative, got {rate}")
    gamma = min(rate, 2**0.5 - 1)

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        target = logsnr(schedule, t) - 2 * jnp.log1p(jnp.asarray(gamma, t.dtype))
        raised = inverse_logsnr(schedule, target, t, jnp.maximum(t, jnp.asarray(limit, t.dtype)))
        t_hat = jnp.where((t >= t_min) & (t <= t_max) & (t < limit), raised, t)
        scaled = bcast(transition(schedule, t_hat, t)[0], x) * x
        up = scaled + noise * (renoise(fold(key, 0), schedule, x, t, t_hat) - scaled)
        up = jnp.where(t_hat > t, up, x)  # at t_hat = t without signal, alpha / alpha is undefined
        return inner.step(fold(key, 1), up, state, t_hat, s, denoise)

    return inner if gamma == 0 else Sampler(inner.init, step)
