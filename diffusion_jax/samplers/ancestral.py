r"""DDIM and the ancestral samplers: one evaluation a step, exact for data that is a point.

With the prediction (x0, eps) at x_t:

    DDIM(eta):    x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z,
                  c^2 = eta^2 sigma_s^2 / sigma_t^2 var_ts                                   (1)
    DDPM:         x_s = mean of q(x_s | x_t, x0) + sqrt(variance) z                          (2)

with z standard normal and var_ts the variance of q(x_t | x_s). (1) at eta = 1 is (2) with the smaller variance, and
at eta = 0 it is Euler's method for the probability flow in the time sigma / alpha, and DPM-Solver-1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from diffusion_jax.forward import q_posterior, transition, variance_bounds
from diffusion_jax.ops import bcast
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Denoise, Key, Noise, Prediction, Sampler, Schedule


def ddim(schedule: Schedule, eta: float = 0.0, noise: Noise = white) -> Sampler:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), eq. (1) above: deterministic at eta = 0."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        alpha, sigma = schedule(s)
        share = -jnp.expm1(logsnr(schedule, t) - logsnr(schedule, s))  # var_ts / sigma_t^2
        y = bcast(alpha, x) * p.x0 + bcast(sigma * jnp.sqrt(1 - eta**2 * share), x) * p.eps
        if eta:
            y = y + bcast(eta * sigma * jnp.sqrt(share), x) * noise(key, x, t, s)
        return y, state

    return memoryless(step)


def ddpm(schedule: Schedule, variance: Literal["small", "large"] = "small", noise: Noise = white) -> Sampler:
    """Ancestral sampling with a fixed variance, eq. (2) (Ho et al. 2020, arXiv:2006.11239, algorithm 2, section 3.2).

    "small" is the posterior's variance, right for data that is a point; "large" is var_ts, that of the paper's
    CIFAR-10 results. With "small" it equals `ddim(schedule, eta=1)`.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' or 'large', got {variance!r}")

    def std(prediction: Prediction, t: Array, s: Array) -> Array:
        var_ts = transition(schedule, t, s)[1]
        return jnp.sqrt(var_ts) * (schedule(s).sigma / schedule(t).sigma if variance == "small" else 1)

    return _ancestral(schedule, std, noise)


def ancestral(schedule: Schedule, noise: Noise = white) -> Sampler:
    """Ancestral sampling with the learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).

    log variance = v log(upper) + (1 - v) log(lower), v the prediction's `variance_fraction`; ValueError without one.
    """

    def std(prediction: Prediction, t: Array, s: Array) -> Array:
        v = prediction.variance_fraction
        if v is None:
            raise ValueError("ancestral: the denoiser predicts no variance; use ddpm for a fixed one")
        lower, upper = (bcast(bound, v) for bound in variance_bounds(schedule, t, s))
        return jnp.exp((v * upper + (1 - v) * jnp.maximum(lower, -80.0)) / 2)

    return _ancestral(schedule, std, noise)


def _ancestral(schedule: Schedule, std: Callable[[Prediction, Array, Array], Array], noise: Noise) -> Sampler:
    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        mean, _ = q_posterior(schedule, x, p.x0, t, s)
        shake = bcast(std(p, t, s), x) * noise(key, x, t, s)
        return mean + jnp.where(schedule(s).sigma > 0, shake, 0), state

    return memoryless(step)
