"""Schedules that the tests of several modules run over."""

from typing import NamedTuple

import jax

import diffusion_jax as dj
from diffusion_jax import schedules
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
    "zero_terminal_snr": Case(dj.from_betas(schedules.zero_terminal_snr(dj.scaled_linear_betas(1000))), 0.02, 0.98),
    "sub_vp": Case(schedules.sub_vp(), 0.02, 0.98),
    "sigmoid": Case(schedules.sigmoid(), 0.02, 0.98),
    "laplace": Case(schedules.laplace(0.5, 0.6), 0.02, 0.98),
    "learned": Case(schedules.learned(schedules.init_learned(jax.random.key(0), 32), -8.0, 13.3), 0.02, 0.98),
    "shifted_rectified": Case(schedules.shifted(dj.rectified(), 3.0), 0.02, 0.98),
    "shifted_cosine": Case(schedules.shifted(dj.cosine(), 0.25), 0.02, 0.98),
    "shifted_sub_vp": Case(schedules.shifted(schedules.sub_vp(), 2.0), 0.02, 0.98),
    "shifted_edm": Case(schedules.shifted(dj.edm(), 2.0), 0.01, 40.0, start=80.0),
}
