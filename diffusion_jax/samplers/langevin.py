r"""Langevin dynamics, with the score of a noise level or with any score.

    x <- x + e score(x) + sqrt(2 e) z                                                        (1)

leaves N(0, V) at V / (1 - e / (2 V)), for any fixed e < 2 V. With a velocity v ~ N(0, I), friction gamma and step h,

    dx = v dt,   dv = score(x) dt - gamma v dt + sqrt(2 gamma) dw                            (2)

is split into B, v += h/2 score; A, x += h/2 v; and O, v <- c v + sqrt(1 - c^2) z with c = e^(-gamma h). In the order
BAOAB the stationary law of x is exact for Gaussians at any stable h < 2 sqrt(V), and that of v is not.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.predictions import to_score
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.typing import Array, Denoise, Key, Sampler, Schedule

Score = Callable[[Array], Array]
"""(x: f32[b *d]) -> gradient of the log density, f32[b *d]."""


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
        return langevin_dynamics(key, lambda x: to_score(schedule, denoise(x, t), t), x, e, steps), state

    return memoryless(step)


def annealed_langevin(schedule: Schedule, epsilon: float = 2e-5, last: float = 0.01, steps: int = 100) -> Sampler:
    """Annealed Langevin dynamics of score networks (Song & Ermon 2019, arXiv:1907.05600, algorithm 1).

    `steps` of (1) at each time but the grid's last, with the paper's alpha_i = 2 e = epsilon sigma_t^2 / last^2:
    `langevin` with snr = sqrt(epsilon) / (2 last). The defaults are the paper's, whose levels go from 1 down to
    last = 0.01 in ten steps: on `edm()` the grid is these, then 0.
    """
    if epsilon <= 0 or last <= 0:
        raise ValueError(f"annealed_langevin: epsilon and last must be positive, got {epsilon}, {last}")
    return langevin(schedule, epsilon**0.5 / (2 * last), steps)


def langevin_dynamics(key: Key, score: Score, x: Array, step: ArrayLike, n: int) -> Array:
    """n steps (1) of unadjusted Langevin dynamics from x: f32[b *d], with e = `step`; f32[b *d].

    Draw i comes from fold_in(key, i), per example if key is `[b]`.
    """
    e = jnp.asarray(step)

    def body(x: Array, i: Array) -> tuple[Array, None]:
        return x + bcast(e, x) * score(x) + bcast(jnp.sqrt(2 * e), x) * normal_like(fold(key, i), x), None

    return jax.lax.scan(body, x, jnp.arange(n))[0]


def underdamped_langevin(
    key: Key, score: Score, x: Array, step: ArrayLike, n: int, friction: ArrayLike = 1.0
) -> tuple[Array, Array]:
    """n steps BAOAB of underdamped Langevin dynamics (2), from x: f32[b *d] and a fresh velocity; (x, v) like x.

    Leimkuhler & Matthews 2013, arXiv:1203.5428; one score a step. (2) is the dynamics that critically damped Langevin
    diffusion has for its forward process (Dockhorn et al. 2022, arXiv:2112.07068).
    """
    h, c = jnp.asarray(step), jnp.exp(-jnp.asarray(friction) * jnp.asarray(step))
    half, keep, shake = bcast(h / 2, x), bcast(c, x), bcast(jnp.sqrt(1 - c**2), x)

    def body(carry: tuple[Array, Array, Array], i: Array) -> tuple[tuple[Array, Array, Array], None]:
        x, v, force = carry
        v = v + half * force
        x = x + half * v
        v = keep * v + shake * normal_like(fold(key, i), x)
        x = x + half * v
        force = score(x)
        return (x, v + half * force, force), None

    return jax.lax.scan(body, (x, normal_like(fold(key, n), x), score(x)), jnp.arange(n))[0][:2]
