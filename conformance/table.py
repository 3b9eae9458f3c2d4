"""The samplers that are held against exact answers, one line each, here and in the tests.

A new sampler is its constructor and its line in `SAMPLERS`: the contracts (keys, traces, batches, dtypes, laws, order,
evaluations) are then measured without more code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import diffusion_jax as dj
from diffusion_jax.typing import Array, Noise, Sampler, Schedule


class Problem(NamedTuple):
    """A schedule, its grids of n steps from noisy to nearly clean times, and its largest time."""

    schedule: Schedule
    grid: Callable[[int], Array]
    top: float = 1.0


PROBLEMS: dict[str, Problem] = {
    "vp_linear": Problem(dj.vp_linear(), lambda n: dj.logsnr_uniform(n + 1, dj.vp_linear(), 1.0, 0.01)[:-1]),
    "rectified": Problem(dj.rectified(), lambda n: dj.uniform(n, 1.0, 0.02)),
    "cosine": Problem(dj.cosine(), lambda n: dj.uniform(n, 1.0, 0.02)),
    "edm": Problem(dj.edm(), lambda n: dj.karras(n + 1, 0.05, 20.0)[:-1], 20.0),
    "ve": Problem(dj.ve(0.05, 10.0), lambda n: dj.uniform(n, 1.0, 0.0)),
    "ve_noisy": Problem(dj.ve(0.05, 10.0), lambda n: dj.uniform(n, 1.0, 0.5)),
}


class Entry(NamedTuple):
    """One sampler and what theory says of it.

    order: of the error of the probability flow for a deterministic sampler, of the law (weak order) for a random one;
        None where no order is claimed, and `remark` says why.
    evaluations: of the denoiser in a step in the middle of the grid.
    problem: where order is measured.
    """

    make: Callable[[Problem, Noise], Sampler]
    order: float | None
    evaluations: int = 1
    random: bool = False
    problem: str = "vp_linear"
    remark: str = ""


SAMPLERS: dict[str, Entry] = {
    # one-step, ancestral
    "ddim": Entry(lambda p, noise: dj.ddim(p.schedule), 1),
    "ddim_half": Entry(lambda p, noise: dj.ddim(p.schedule, 0.5, noise), 1, random=True),
    "ddpm_small": Entry(lambda p, noise: dj.ddpm(p.schedule, "small", noise), 1, random=True),
    "ddpm_large": Entry(lambda p, noise: dj.ddpm(p.schedule, "large", noise), 1, random=True),
    # probability flow
    "euler": Entry(lambda p, noise: dj.euler(p.schedule), 1),
    "heun": Entry(lambda p, noise: dj.heun(p.schedule), 2, 2),
    # exponential integrators
    "dpmpp_2m": Entry(lambda p, noise: dj.dpmpp_2m(p.schedule), 2),
    # stochastic
    "churn_heun": Entry(
        lambda p, noise: dj.churn(dj.heun(p.schedule), p.schedule, 0.05, 0.0, p.top, p.top, noise=1.0),
        None,
        2,
        random=True,
        remark="a fixed rate of noise a step has no limit",
    ),
    # Langevin
    "langevin_ddim": Entry(
        lambda p, noise: dj.chain(dj.langevin(p.schedule, 0.05), dj.ddim(p.schedule)),
        None,
        2,
        random=True,
        remark="the corrector's bias depends on its step size, not on the grid",
    ),
}
