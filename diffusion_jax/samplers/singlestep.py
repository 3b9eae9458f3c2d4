r"""Single-step exponential integrators: evaluations at times inside the step, and no memory.

In the notation of `exponential`, a stage at lambda_t + r h, and the last one at s, is eq. (3) or (4) there from t, with
the slope from t to the stage before it, eq. (6). Stages are found by inverting the log SNR; where it is infinite at t
or at s, a step is of first order, with one evaluation.
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
from diffusion_jax.typing import Array, Denoise, Key, Noise, Sampler, Schedule


def dpm_solver_2(schedule: Schedule, r: float = 0.5, slope: Slope = "bh2") -> Sampler:
    """DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1): noise prediction, two evaluations, second order.

    x_m = alpha_m x0 + sigma_m eps at lambda_m = lambda_t + r h;  x_s = DDIM + sigma_s (1 - e^h) (eps_m - eps) / (2 r).
    DPM-Solver-1 is `ddim(schedule)`. ValueError unless 0 < r < 1.
    """
    return _singlestep(schedule, "eps", (r,), slope)


def dpm_solver_3(schedule: Schedule, r1: float = 1 / 3, r2: float = 2 / 3) -> Sampler:
    """DPM-Solver-3 (Lu et al. 2022, arXiv:2206.00927, algorithm 2): noise prediction, three evaluations, third order.

    Its second stage and its last line take eq. (6) "exact", from the nodes 0, r1 and 0, r2. ValueError unless
    0 < r1 < r2 < 1; of third order only for r2 = 2/3.
    """
    return _singlestep(schedule, "eps", (r1, r2), "exact")


def dpmpp_2s(schedule: Schedule, r: float = 0.5, slope: Slope = "bh2") -> Sampler:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1): data prediction, two evaluations, second order.

    x_m = alpha_m x0 + sigma_m eps at lambda_m = lambda_t + r h;  x_s = DDIM + alpha_s (1 - e^-h) (x0_m - x0) / (2 r).
    DPM-Solver++(1S) is `ddim(schedule)`. ValueError unless 0 < r < 1.
    """
    return _singlestep(schedule, "x0", (r,), slope)


def dpmpp_3s(schedule: Schedule, r1: float = 1 / 3, r2: float = 2 / 3) -> Sampler:
    """DPM-Solver-3 in data prediction, DPM-Solver++(3S): three evaluations, third order.

    Algorithm 2 of arXiv:2206.00927 on eq. (3) in place of (4). ValueError unless 0 < r1 < r2 < 1.
    """
    return _singlestep(schedule, "x0", (r1, r2), "exact")


def dpmpp_2s_sde(
    schedule: Schedule, tau: Tau = 1.0, r: float = 0.5, slope: Slope = "bh2", noise: Noise = white
) -> Sampler:
    """DPM-Solver++(2S) on eq. (3) with noise, "DPM++ SDE": two evaluations, weak order 2, strong order 1.

    The noise of the step is that of its two halves, (t, m) and (m, s), so x0_m sees the first half of what x_s gets:
    with independent noise instead the weak order would be 1. ValueError unless 0 < r < 1 and tau >= 0.
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

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, tau_t = denoise(x, t), level(t)
        whole = transfer(schedule, predicts, tau_t, t, s)

        def one() -> Array:
            return first_order(whole, p) + (draw(noise, key, x, whole.std, t, s) if random else 0)

        def stages() -> Array:
            y, m, r, shake, value = x, t, 0.0, jnp.zeros_like(x), getattr(p, predicts)
            for i, fraction in enumerate((*fractions, 1.0)):
                change = getattr(denoise(y, m), predicts) - value if i else 0
                after = (
                    inverse_logsnr(schedule, logsnr(schedule, t) + 2 * fraction * whole.h, s, t) if fraction < 1 else s
                )
                c = transfer(schedule, predicts, tau_t, t, after)
                y = first_order(c, p)
                if i:
                    integral = slope_integral(moments(c.z, 2), c.z, slope)
                    y = y + bcast(c.scale * integral * (fraction / r), x) * change
                if random:
                    c = transfer(schedule, predicts, tau_t, m, after)
                    shake = bcast(c.carry, x) * shake + draw(noise, fold(key, i), x, c.std, m, after)
                    y = y + shake
                m, r = after, fraction
            return y

        return jax.lax.cond(whole.finite, stages, one), state

    return memoryless(step)
