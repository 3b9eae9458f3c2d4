"""Schedules that the tests of several modules run over."""

from typing import NamedTuple

import diffusion_jax as dj
from diffusion_jax.typing import Schedule


class Case(NamedTuple):
    """A schedule with an interval of times inside which nothing is singular, and with its ends."""

    schedule: Schedule
    low: float
    high: float
    start: float = 1.0
    end: float = 0.0


CASES: dict[str, Case] = {
    "linear_betas": Case(dj.from_betas(dj.linear_betas(1000)), 0.02, 0.98),
    "scaled_linear_betas": Case(dj.from_betas(dj.scaled_linear_betas(1000)), 0.02, 0.98),
    "cosine_betas": Case(dj.from_betas(dj.cosine_betas(1000)), 0.02, 0.98),
    "vp_linear": Case(dj.vp_linear(), 0.02, 0.98),
    "cosine": Case(dj.cosine(0.008), 0.02, 0.98),
    "cosine_0": Case(dj.cosine(0.0), 0.02, 0.98),
    "ve": Case(dj.ve(0.01, 50.0), 0.02, 0.98),
    "rectified": Case(dj.rectified(), 0.02, 0.98),
    "edm": Case(dj.edm(), 0.01, 40.0, start=80.0),
}
