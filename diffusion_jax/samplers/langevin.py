r"""Langevin dynamics.

x <- x + e score + sqrt(2 e) z                                                           (1)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.predictions import to_score
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.typing import Array, Denoise, Key, Sampler, Schedule


def langevin(schedule: Schedule, snr: float = 0.16, steps: int = 1) -> Sampler:
    """Langevin dynamics at time t, eq. (1): x stays at t, so as a sampler of its own it is annealed Langevin.

    The step size is e = 2 (snr sigma_t)^2, proportional to sigma_t^2 as in Song & Ermon 2019, arXiv:1907.05600,
    algorithm 1. Song et al. 2021, arXiv:2011.13456, algorithms 4-5, write 2 (snr |z| / |score|)^2, which is the same up
    to O(1 / sqrt(d)); but a step that depends on x and z leaves another law than p(x), in two dimensions one of far
    more variance (docs/design/001). Put it before a sampler with `chain` to make it a corrector.
    """
    if snr <= 0 or steps < 1:
        raise ValueError(f"langevin: snr must be positive and steps at least 1, got {snr}, {steps}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        e = 2 * (snr * schedule(t).sigma) ** 2

        def body(x: Array, i: Array) -> tuple[Array, None]:
            z, score = normal_like(fold(key, i), x), to_score(schedule, denoise(x, t), t)
            return x + bcast(e, x) * score + bcast(jnp.sqrt(2 * e), x) * z, None

        return jax.lax.scan(body, x, jnp.arange(steps))[0], state

    return memoryless(step)
