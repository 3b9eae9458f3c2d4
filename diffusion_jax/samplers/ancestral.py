r"""DDIM and the ancestral samplers: one evaluation a step, exact for data that is a point.

With the prediction (x0, eps) at x_t:

    DDIM(eta):    x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z,
                  c^2 = eta^2 sigma_s^2 / sigma_t^2 var_ts                                   (1)
    DDPM:         x_s = mean of q(x_s | x_t, x0) + sqrt(variance) z                          (2)

with z standard normal and var_ts the variance of q(x_t | x_s). (1) at eta = 1 is (2) with the smaller variance, and
at eta = 0 it is Euler's method for the probability flow in the time sigma / alpha, and DPM-Solver-1.

The mean of (1) is linear in x0, with x_t fixed, so what is not known of x0 adds to the variance of x_s. With its mean
squared error per coordinate, e(t) = E|x0 - E[x0|x_t]|^2 / d, the best isotropic variance is

    analytic-DPM: c^2 + (alpha_s - sqrt(sigma_s^2 - c^2) alpha_t / sigma_t)^2 e(t)           (3)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_jax.forward import q_posterior, q_sample, transition, variance_bounds
from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Cond, Denoise, Denoiser, Key, Noise, Prediction, Sampler, Schedule


def ddim(schedule: Schedule, eta: float = 0.0, noise: Noise = white) -> Sampler:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), eq. (1) above: deterministic at eta = 0."""
    in_unit_interval("ddim", eta)

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        keep, shake = split_noise(schedule, t, s, eta)
        y = bcast(schedule(s).alpha, x) * p.x0 + bcast(keep, x) * p.eps
        return (y + bcast(shake, x) * noise(key, x, t, s) if eta else y), state

    return memoryless(step)


def euler_ancestral(schedule: Schedule, eta: float = 1.0, noise: Noise = white) -> Sampler:
    """Ancestral Euler of k-diffusion (Crowson 2022), which is `ddim` under another name.

    There, in x / alpha and with sigma for sigma / alpha, an Euler step goes down to sqrt(sigma_s^2 - sigma_up^2), then
    sigma_up z is added, sigma_up = eta sigma_s sqrt(1 - sigma_s^2 / sigma_t^2): eq. (1) with c = alpha_s sigma_up.
    """
    return ddim(schedule, eta, noise)


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


def analytic_dpm(schedule: Schedule, mmse: Callable[[Array], Array], eta: float = 1.0, noise: Noise = white) -> Sampler:
    """Analytic-DPM, eq. (3): the best isotropic variance for the steps of `ddim(schedule, eta)`.

    Bao et al. 2022, arXiv:2201.06503, theorem 1, where e(t) = (sigma_t / alpha_t)^2 (1 - E|eps|^2 / d). `mmse` is e, a
    function of scalar t; `estimate_mmse` measures it, for an imperfect denoiser too. Exact in any number of steps for
    Gaussian data of covariance v I, by e(t) = v sigma_t^2 / (alpha_t^2 v + sigma_t^2). A step to sigma_s = 0 draws too.
    """
    in_unit_interval("analytic_dpm", eta)

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, (a_t, s_t), a_s = denoise(x, t), schedule(t), schedule(s).alpha
        keep, shake = split_noise(schedule, t, s, eta)
        std = jnp.sqrt(shake**2 + (a_s - keep * a_t / s_t) ** 2 * mmse(t))
        return bcast(a_s, x) * p.x0 + bcast(keep, x) * p.eps + bcast(std, x) * noise(key, x, t, s), state

    return memoryless(step)


def estimate_mmse(
    key: Key, schedule: Schedule, denoiser: Denoiser, x0: Array, times: Array, cond: Cond = None
) -> Callable[[Array], Array]:
    """e(t) = E|x0 - denoiser's x0|^2 / d of eq. (3), measured on data x0: f32[b *d] at each of times: f32[n].

    Between the times, which may come in any order, e is linear in t; beyond them it is that of the nearest one.
    """

    def error(i: Array, t: Array) -> Array:
        ts = jnp.broadcast_to(t, x0.shape[:1])
        x = q_sample(schedule, x0, ts, normal_like(fold(key, i), x0))
        return jnp.mean((x0 - denoiser(x, ts, cond).x0).astype(t.dtype) ** 2)

    errors = jax.lax.map(lambda i_t: error(*i_t), (jnp.arange(times.shape[0]), times))
    order = jnp.argsort(times)
    return lambda t: jnp.interp(t, times[order], errors[order])


def split_noise(schedule: Schedule, t: Array, s: Array, eta: float) -> tuple[Array, Array]:
    """sqrt(sigma_s^2 - c^2) and c of (1), scalars."""
    sigma, share = schedule(s).sigma, -jnp.expm1(logsnr(schedule, t) - logsnr(schedule, s))  # var_ts / sigma_t^2
    return sigma * jnp.sqrt(1 - eta**2 * share), eta * sigma * jnp.sqrt(share)


def in_unit_interval(name: str, eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name}: eta must be in [0, 1], got {eta}")


def _ancestral(schedule: Schedule, std: Callable[[Prediction, Array, Array], Array], noise: Noise) -> Sampler:
    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        mean, _ = q_posterior(schedule, x, p.x0, t, s)
        shake = bcast(std(p, t, s), x) * noise(key, x, t, s)
        return mean + jnp.where(schedule(s).sigma > 0, shake, 0), state

    return memoryless(step)
