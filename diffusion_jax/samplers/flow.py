r"""Samplers of the probability flow, by methods for ordinary differential equations.

In the schedule's own time, in the noise level, and in the angle a = atan(sigma / alpha), with r^2 = alpha^2 + sigma^2:

    dx / dt = alpha' x0 + sigma' eps                                                         (1)
    d(x / alpha) / d(sigma / alpha) = eps                                                    (2)
    d(x / r) / da = (alpha eps - sigma x0) / r                                               (3)

(3) is v-prediction (Salimans & Ho 2022, arXiv:2202.00512, appendix D). Of the three it alone is regular at both ends,
without signal and without noise, on every schedule.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.ops import bcast, mean_per_example
from diffusion_jax.predictions import to_velocity
from diffusion_jax.samplers.ancestral import in_unit_interval, split_noise
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Denoise, Key, Noise, Sampler, Schedule


def euler(schedule: Schedule) -> Sampler:
    """Euler's method for the probability flow (1) in the schedule's own time; one evaluation, first order."""

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        return x + bcast(s - t, x) * to_velocity(schedule, denoise(x, t), t), state

    return memoryless(step)


def heun(schedule: Schedule) -> Sampler:
    """Heun's method for the probability flow (1) (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    Two evaluations, second order; one evaluation (Euler) where sigma(s) = 0.
    """

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        dt = bcast(s - t, x)
        d = to_velocity(schedule, denoise(x, t), t)
        y = x + dt * d

        def correct() -> Array:
            return x + dt / 2 * (d + to_velocity(schedule, denoise(y, s), s))

        return jax.lax.cond(schedule(s).sigma > 0, correct, lambda: y), state

    return memoryless(step)


def midpoint(schedule: Schedule) -> Sampler:
    """The midpoint method for the probability flow (1) in the schedule's own time; two evaluations, second order."""

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        half, m = bcast((s - t) / 2, x), (t + s) / 2
        y = x + half * to_velocity(schedule, denoise(x, t), t)
        return x + 2 * half * to_velocity(schedule, denoise(y, m), m), state

    return memoryless(step)


def dpm_2(schedule: Schedule, eta: float = 0.0, noise: Noise = white) -> Sampler:
    """DPM-2 of k-diffusion (Crowson 2022): the midpoint method for (2), at the geometric mean of the noise levels.

    With eta > 0 its ancestral form: down to sqrt(sigma_s^2 - c^2) and up again by c z, with `ddim`'s c. Both keep the
    law of each level, so its order in law is 2 too. Two evaluations; one, of `ddim`, where a level is 0 or infinite.
    At eta = 0 it is DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1).
    """
    in_unit_interval("dpm_2", eta)

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, (a_t, s_t), a_s = denoise(x, t), schedule(t), schedule(s).alpha
        down, up = split_noise(schedule, t, s, eta)
        y = bcast(a_s, x) * p.x0 + bcast(down, x) * p.eps

        def correct() -> Array:
            m = inverse_logsnr(schedule, logsnr(schedule, t) / 2 + jnp.log(a_s / down), s, t)
            a_m, s_m = schedule(m)
            middle = denoise(bcast(a_m, x) * p.x0 + bcast(s_m, x) * p.eps, m)
            return y + bcast(down - a_s * s_t / a_t, x) * (middle.eps - p.eps)

        y = jax.lax.cond((a_t > 0) & (down > 0), correct, lambda: y)
        return (y + bcast(up, x) * noise(key, x, t, s) if eta else y), state

    return memoryless(step)


def adaptive(schedule: Schedule, rtol: float, atol: float, solver: Any = None, max_steps: int = 4096) -> Sampler:
    """An embedded Runge-Kutta method of diffrax on the probability flow, as in Song et al. 2021, arXiv:2011.13456.

    Integrates (3) from t to s, whatever the ends, with step sizes that keep each example's root mean square error, in
    units of atol + rtol |x| / r, below 1. `solver` is a diffrax solver; None is Dormand and Prince's fifth order
    (the paper's RK45). The step size, and so the number of evaluations, is that of the hardest example: an example
    depends on its batch within the tolerance. More than `max_steps` steps are an error when it runs. Needs diffrax.
    """
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"adaptive: rtol and atol must not be negative, nor both 0, got {rtol}, {atol}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        import diffrax

        def velocity(a: Any, y: Array, _: Any) -> Array:
            target = 2 * jnp.log(jnp.maximum(jnp.cos(a), 0)) - 2 * jnp.log(jnp.sin(a))
            m = inverse_logsnr(schedule, target, s, t)
            (alpha, sigma), r = schedule(m), jnp.hypot(*schedule(m))
            p = denoise((r * y).astype(x.dtype), m)
            return (bcast(alpha / r, x) * p.eps - bcast(sigma / r, x) * p.x0).astype(y.dtype)

        def worst(scaled: Array) -> Array:
            return jnp.sqrt(jnp.max(mean_per_example(scaled**2)))

        a, b = (jnp.arctan2(c.sigma, c.alpha) for c in (schedule(t), schedule(s)))
        y, term = x.astype(t.dtype) / jnp.hypot(*schedule(t)), diffrax.ODETerm(velocity)
        method, control = solver or diffrax.Dopri5(), diffrax.PIDController(rtol=rtol, atol=atol, norm=worst)
        path: Any = diffrax.diffeqsolve(term, method, a, b, None, y, stepsize_controller=control, max_steps=max_steps)
        return (jnp.hypot(*schedule(s)) * path.ys[0]).astype(x.dtype), state

    return memoryless(step)
