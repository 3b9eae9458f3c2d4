r"""Samplers of the probability flow in the schedule's own time.

dx/dt = alpha' x0 + sigma' eps                                                           (1)
"""

from __future__ import annotations

import jax

from diffusion_jax.ops import bcast
from diffusion_jax.predictions import to_velocity
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.typing import Array, Denoise, Key, Sampler, Schedule


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
