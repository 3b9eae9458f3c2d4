r"""Single-step exponential integrators: evaluations at times inside the step, and no memory.

A stage at lambda_t + r h, and the last one at s, is eq. (3) or (4) of `exponential` from t, on the straight line from
the prediction at t to that of the stage before it, eq. (7) there. The log SNR is inverted to find a stage; where it is
infinite, at t or at s, a step is of first order, with one evaluation.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from diffusion_jax.ops import bcast, fold
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.exponential import (
    Quantity,
    Slope,
    Tau,
    choice,
    draw,
    first_order,
    moments,
    noise_level,
    slope_integral,
    transfer,
)
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Denoise, Key, Noise, Prediction, Sampler, Schedule


def dpm_solver_2(schedule: Schedule, r: float = 0.5, slope: Slope = "bh2") -> Sampler:
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1): noise prediction, two evaluations, second order.

    x_m = alpha_m x0 + sigma_m eps at lambda_m = lambda_t + r h;  x_s = DDIM + sigma_s (1 - e^h) (eps_m - eps) / (2 r).
    DPM-Solver-1 is `ddim(schedule)`. ValueError unless 0 < r < 1.
    """
    return _singlestep(schedule, "eps", (r,), slope)


def dpm_solver_3(schedule: Schedule, r1: float = 1 / 3, r2: float = 2 / 3) -> Sampler:
    """DPM-Solver-3 (Lu et al. 2022, arXiv:2206.00927, algorithm 2): noise prediction, three evaluations, third order.

    Straight lines through the nodes 0 and r1, then 0 and r2, integrated exactly: third order because r2 = 2/3, for any
    r1. ValueError unless 0 < r1 < r2 < 1.
    """
    return _singlestep(schedule, "eps", (r1, r2), "exact")


def dpmpp_2s(schedule: Schedule, r: float = 0.5, slope: Slope = "bh2") -> Sampler:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1): data prediction, two evaluations, second order.

    x_m = alpha_m x0 + sigma_m eps at lambda_m = lambda_t + r h;  x_s = DDIM + alpha_s (1 - e^-h) (x0_m - x0) / (2 r).
    DPM-Solver++(1S) is `ddim(schedule)`. ValueError unless 0 < r < 1.
    """
    return _singlestep(schedule, "x0", (r,), slope)


def dpmpp_3s(schedule: Schedule, r1: float = 1 / 3, r2: float = 2 / 3) -> Sampler:
    """DPM-Solver++(3S), which is `dpm_solver_3` in data prediction: three evaluations, third order."""
    return _singlestep(schedule, "x0", (r1, r2), "exact")


def dpmpp_2s_sde(
    schedule: Schedule, tau: Tau = 1.0, r: float = 0.5, slope: Slope = "bh2", noise: Noise = white
) -> Sampler:
    """DPM-Solver++(2S) with noise ("DPM++ SDE"): two evaluations, weak order 2, strong order 1.

    The noise of a step is made of that from t to m and from m to s, so that x0_m sees the part of it that x_m has; with
    independent draws for x_m and x_s the weak order is 1. ValueError unless 0 < r < 1 and tau >= 0.
    """
    return _singlestep(schedule, "x0", (r,), slope, tau, noise)


def _singlestep(
    schedule: Schedule,
    predicts: Quantity,
    fractions: tuple[float, ...],
    slope: Slope,
    tau: Tau = 0.0,
    noise: Noise = white,
) -> Sampler:
    """Stages at lambda_t + r h and last at s; each goes from t with the slope from t to the stage before it."""
    if not all(a < b for a, b in itertools.pairwise((0.0, *fractions, 1.0))):
        raise ValueError(f"stages must rise between 0 and 1, got {fractions}")
    choice("slope", slope, Slope)
    level, random = noise_level(tau)

    def stages(key: Key, x: Array, p: Prediction, t: Array, s: Array, denoise: Denoise) -> Array:
        lam, h = logsnr(schedule, t) / 2, transfer(schedule, predicts, level(t), t, s).h
        y, m, shake, ends = x, t, jnp.zeros_like(x), (*fractions, 1.0)
        for i, r in enumerate(ends):
            change = getattr(denoise(y, m), predicts) - getattr(p, predicts) if i else x
            after = s if r == 1 else inverse_logsnr(schedule, 2 * (lam + r * h), s, t)
            c = transfer(schedule, predicts, level(t), t, after)
            y = first_order(c, p)
            if i:
                w = slope_integral(moments(c.z, 2), c.z, slope) * (r / ends[i - 1])
                y = y + bcast(c.scale * w, x) * change
            if random:
                c = transfer(schedule, predicts, level(t), m, after)
                shake = bcast(c.carry, x) * shake + draw(noise, fold(key, i), x, c.std, m, after)
                y = y + shake
            m = after
        return y

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, c = denoise(x, t), transfer(schedule, predicts, level(t), t, s)

        def one() -> Array:
            y = first_order(c, p)
            return y + draw(noise, key, x, c.std, t, s) if random else y

        return jax.lax.cond(c.finite, lambda: stages(key, x, p, t, s, denoise), one), state

    return memoryless(step)
