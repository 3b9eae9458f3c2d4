r"""The hub of parameterizations: every network output becomes a `Prediction`, and back.

With x = alpha x0 + sigma eps, a network may be read as

    x0;   eps;   score = -eps / sigma;   v = alpha eps - sigma x0;   velocity = alpha' x0 + sigma' eps    (1)

(Ho et al. 2020, arXiv:2006.11239; Song et al. 2021, arXiv:2011.13456; Salimans & Ho 2022, arXiv:2202.00512,
appendix D; Lipman et al. 2023, arXiv:2210.02747). Each `from_*` solves (1) together with the first equation for
(x0, eps). All have the signature (schedule, x: f32[b *d], t: f32[b] or f32[], output: f32[b *d]) -> Prediction, and
each `to_*` is (schedule, prediction, t) -> f32[b *d]. Where a division by alpha = 0 or sigma = 0 leaves the other
half undetermined, it is 0. ValueError for an output that has not the shape of x, or times that have not its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from diffusion_jax.ops import bcast, check_like, check_time, divide
from diffusion_jax.schedules import rates
from diffusion_jax.typing import Array, Prediction, Schedule

Predicts = Literal["x0", "eps", "score", "v", "velocity"]


def from_x0(schedule: Schedule, x: Array, t: Array, x0: Array) -> Prediction:
    """eps = (x - alpha x0) / sigma.

    >>> from diffusion_jax.schedules import rectified
    >>> from_x0(rectified(), jnp.ones((1, 1)), jnp.full((1,), 0.5), jnp.zeros((1, 1))).eps.tolist()
    [[2.0]]
    """
    _check("from_x0", x, t, x0)
    alpha, sigma = schedule(t)
    return Prediction(x0, divide(x - bcast(alpha, x) * x0, bcast(sigma, x)))


def from_eps(schedule: Schedule, x: Array, t: Array, eps: Array) -> Prediction:
    """x0 = (x - sigma eps) / alpha."""
    _check("from_eps", x, t, eps)
    alpha, sigma = schedule(t)
    return Prediction(divide(x - bcast(sigma, x) * eps, bcast(alpha, x)), eps)


def from_score(schedule: Schedule, x: Array, t: Array, score: Array) -> Prediction:
    """eps = -sigma score."""
    _check("from_score", x, t, score)
    return from_eps(schedule, x, t, -bcast(schedule(t).sigma, x) * score)


def from_v(schedule: Schedule, x: Array, t: Array, v: Array) -> Prediction:
    """x0 = (alpha x - sigma v) / (alpha^2 + sigma^2), eps = (sigma x + alpha v) / (alpha^2 + sigma^2)."""
    _check("from_v", x, t, v)
    alpha, sigma = schedule(t)
    norm = alpha**2 + sigma**2
    a, b = bcast(alpha / norm, x), bcast(sigma / norm, x)
    return Prediction(a * x - b * v, b * x + a * v)


def from_velocity(schedule: Schedule, x: Array, t: Array, velocity: Array) -> Prediction:
    """x0 = (sigma' x - sigma u) / w, eps = (alpha u - alpha' x) / w, w = alpha sigma' - sigma alpha' > 0."""
    _check("from_velocity", x, t, velocity)
    (alpha, sigma), (d_alpha, d_sigma) = schedule(t), rates(schedule, t)
    w = alpha * d_sigma - sigma * d_alpha
    singular, clean = ~jnp.isfinite(w), sigma < alpha  # a rate is infinite at some schedules' ends

    def over_w(a: Array, end: Array | float) -> Array:
        return bcast(jnp.where(singular, end, a / w), x)

    x0 = over_w(d_sigma, jnp.where(clean, 1 / alpha, 0)) * x - over_w(sigma, 0) * velocity
    return Prediction(x0, over_w(alpha, 0) * velocity - over_w(d_alpha, jnp.where(clean, 0, -1 / sigma)) * x)


def to_x0(schedule: Schedule, prediction: Prediction, t: Array) -> Array:
    """The x0 of a prediction."""
    return prediction.x0


def to_eps(schedule: Schedule, prediction: Prediction, t: Array) -> Array:
    """The eps of a prediction."""
    return prediction.eps


def to_score(schedule: Schedule, prediction: Prediction, t: Array) -> Array:
    """score = -eps / sigma."""
    return -divide(prediction.eps, bcast(schedule(t).sigma, prediction.eps))


def to_v(schedule: Schedule, prediction: Prediction, t: Array) -> Array:
    """v = alpha eps - sigma x0."""
    alpha, sigma = schedule(t)
    return bcast(alpha, prediction.x0) * prediction.eps - bcast(sigma, prediction.x0) * prediction.x0


def to_velocity(schedule: Schedule, prediction: Prediction, t: Array) -> Array:
    """dx/dt of the probability flow: alpha' x0 + sigma' eps."""
    d_alpha, d_sigma = rates(schedule, t)
    return bcast(d_alpha, prediction.x0) * prediction.x0 + bcast(d_sigma, prediction.x0) * prediction.eps


Reader = Callable[[Schedule, Array, Array, Array], Prediction]
Writer = Callable[[Schedule, Prediction, Array], Array]
FROM: dict[str, Reader] = {"x0": from_x0, "eps": from_eps, "score": from_score, "v": from_v, "velocity": from_velocity}
TO: dict[str, Writer] = {"x0": to_x0, "eps": to_eps, "score": to_score, "v": to_v, "velocity": to_velocity}


def lookup(table: dict, name: str) -> Callable:
    """The entry of FROM or TO, or a ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"unknown prediction type {name!r}: one of {', '.join(table)}")
    return table[name]


def _check(name: str, x: Array, t: Array, output: Array) -> None:
    check_like(f"{name}: the output", output, x)
    check_time(f"{name}: t", t, x)
