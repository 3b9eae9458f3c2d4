"""The samplers that are held against exact answers, one line each, here and in the tests.

A new sampler is its constructor and its line in `SAMPLERS`: the contracts (keys, traces, batches, dtypes, laws, order,
evaluations) are then measured without more code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

import diffusion_jax as dj
from diffusion_jax.typing import Array, Cond, FlowMap, Noise, Sampler, Schedule


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
    evaluations: of the denoiser in a step in the middle of the grid; None where they depend on x.
    problem: where order is measured.
    ends: a problem at both of whose times, without signal and without noise, the sampler is finite.
    law: whether many steps reach the data's law; False where the denoiser has to be something else, see `remark`.
    independent: whether an example is bit-identical in any batch.
    """

    make: Callable[[Problem, Noise], Sampler]
    order: float | None
    evaluations: int | None = 1
    random: bool = False
    problem: str = "vp_linear"
    remark: str = ""
    ends: str = "cosine"
    law: bool = True
    independent: bool = True


def _mmse(schedule: Schedule) -> Callable[[Array], Array]:
    """e(t) of Gaussian data with variance 1/2."""
    return lambda t: 0.5 * schedule(t).sigma ** 2 / (0.5 * schedule(t).alpha ** 2 + schedule(t).sigma ** 2)


def _flow_map(schedule: Schedule) -> FlowMap:
    """The flow of standard normal data."""

    def move(x: Array, t: Array, s: Array, cond: Cond = None) -> Array:
        norm_t, norm_s = (jnp.hypot(*schedule(time)) for time in (t, s))
        return dj.bcast(norm_s / norm_t, x) * x

    return move


SAMPLERS: dict[str, Entry] = {
    # one-step, ancestral
    "ddim": Entry(lambda p, noise: dj.ddim(p.schedule), 1),
    "ddim_half": Entry(lambda p, noise: dj.ddim(p.schedule, 0.5, noise), 1, random=True),
    "ddpm_small": Entry(lambda p, noise: dj.ddpm(p.schedule, "small", noise), 1, random=True),
    "ddpm_large": Entry(lambda p, noise: dj.ddpm(p.schedule, "large", noise), 1, random=True),
    "ancestral": Entry(lambda p, noise: dj.ancestral(p.schedule, noise), 1, random=True),
    "analytic_dpm": Entry(lambda p, noise: dj.analytic_dpm(p.schedule, _mmse(p.schedule), noise=noise), 1, random=True),
    "analytic_ddim": Entry(lambda p, noise: dj.analytic_dpm(p.schedule, _mmse(p.schedule), 0.0, noise), 1, random=True),
    "euler_ancestral": Entry(lambda p, noise: dj.euler_ancestral(p.schedule, noise=noise), 1, random=True),
    # probability flow
    "euler": Entry(lambda p, noise: dj.euler(p.schedule), 1),
    "heun": Entry(lambda p, noise: dj.heun(p.schedule), 2, 2),
    "midpoint": Entry(lambda p, noise: dj.midpoint(p.schedule), 2, 2),
    "dpm_2": Entry(lambda p, noise: dj.dpm_2(p.schedule), 2, 2),
    "dpm_2_ancestral": Entry(lambda p, noise: dj.dpm_2(p.schedule, 1.0, noise), 2, 2, random=True),
    "adaptive": Entry(
        lambda p, noise: dj.adaptive(p.schedule, 1e-4, 1e-4),
        None,
        None,
        remark="its error follows the tolerance, not the grid",
        independent=False,
    ),
    # exponential integrators
    "dpm_solver_2": Entry(lambda p, noise: dj.dpm_solver_2(p.schedule), 2, 2),
    "dpm_solver_3": Entry(lambda p, noise: dj.dpm_solver_3(p.schedule), 3, 3),
    "dpmpp_2s": Entry(lambda p, noise: dj.dpmpp_2s(p.schedule), 2, 2),
    "dpmpp_3s": Entry(lambda p, noise: dj.dpmpp_3s(p.schedule), 3, 3),
    "dpmpp_2s_sde": Entry(lambda p, noise: dj.dpmpp_2s_sde(p.schedule, noise=noise), 2, 2, random=True),
    "dpmpp_2m": Entry(lambda p, noise: dj.dpmpp_2m(p.schedule), 2),
    "dpmpp_3m": Entry(lambda p, noise: dj.dpmpp_3m(p.schedule), 3),
    "dpmpp_2m_sde": Entry(lambda p, noise: dj.dpmpp_2m_sde(p.schedule, noise=noise), 2, random=True),
    "dpmpp_3m_sde": Entry(
        lambda p, noise: dj.dpmpp_3m_sde(p.schedule, noise=noise), 2, random=True, problem="rectified"
    ),
    "exponential_ab_2": Entry(lambda p, noise: dj.exponential_ab(p.schedule, 2), 2),
    "exponential_ab_3": Entry(lambda p, noise: dj.exponential_ab(p.schedule, 3), 3),
    "unipc_1_bh1": Entry(lambda p, noise: dj.unipc(p.schedule, 1, "bh1"), 2),
    "unipc_1_bh2": Entry(lambda p, noise: dj.unipc(p.schedule, 1, "bh2"), 2),
    "unipc_2_bh1": Entry(lambda p, noise: dj.unipc(p.schedule, 2, "bh1"), 3, problem="rectified"),
    "unipc_2_bh2": Entry(lambda p, noise: dj.unipc(p.schedule, 2, "bh2"), 3, problem="rectified"),
    "unipc_3_bh1": Entry(lambda p, noise: dj.unipc(p.schedule, 3, "bh1"), 4, problem="rectified"),
    "unipc_3_bh2": Entry(lambda p, noise: dj.unipc(p.schedule, 3, "bh2"), 4, problem="rectified"),
    "deis_1": Entry(lambda p, noise: dj.deis(p.schedule, 1), 1),
    "deis_2": Entry(lambda p, noise: dj.deis(p.schedule, 2), 2),
    "deis_3": Entry(lambda p, noise: dj.deis(p.schedule, 3), 3),
    "deis_4": Entry(lambda p, noise: dj.deis(p.schedule, 4), 4),
    "sa_solver_2_2": Entry(
        lambda p, noise: dj.sa_solver(p.schedule, 2, 2, noise=noise),
        None,
        random=True,
        remark="weak order 2, but with so small a coefficient that 512 steps do not show it",
    ),
    "sa_solver_3_4": Entry(
        lambda p, noise: dj.sa_solver(p.schedule, 3, 4, 0.7, noise=noise), 2, random=True, problem="rectified"
    ),
    **{
        f"ipndm_{order}": Entry(
            lambda p, noise, order=order: dj.ipndm(p.schedule, order),
            order if order < 3 else None,
            remark=""
            if order < 3
            else "of order 2, and of its own on grids uniform in sigma / alpha (test_exponential)",
        )
        for order in (1, 2, 3, 4)
    },
    # stochastic
    "euler_maruyama": Entry(lambda p, noise: dj.euler_maruyama(p.schedule, noise), 1, random=True, ends="vp_linear"),
    "reverse_diffusion": Entry(lambda p, noise: dj.reverse_diffusion(p.schedule, noise), 1, random=True),
    "restart_heun": Entry(
        lambda p, noise: dj.restart(dj.heun(p.schedule), p.schedule, p.top * jnp.linspace(0.8, 0.5, 7), 2),
        None,
        2,
        random=True,
        remark="the grid of the restart interval is fixed",
    ),
    "churn_heun": Entry(
        lambda p, noise: dj.churn(dj.heun(p.schedule), p.schedule, 0.05, 0.0, p.top, p.top, noise=1.0),
        None,
        2,
        random=True,
        remark="a fixed rate of noise a step has no limit",
    ),
    # Langevin
    "annealed_langevin": Entry(
        lambda p, noise: dj.annealed_langevin(p.schedule, 0.01, 1.0, 2),
        None,
        2,
        random=True,
        remark="stays at t: as the levels fall it needs many steps at each to follow",
        law=False,
    ),
    "predictor_corrector": Entry(
        lambda p, noise: dj.chain(dj.langevin(p.schedule, 0.05), dj.reverse_diffusion(p.schedule, noise)),
        None,
        2,
        random=True,
        remark="the corrector's bias depends on its step size, not on the grid",
    ),
    "langevin_ddim": Entry(
        lambda p, noise: dj.chain(dj.langevin(p.schedule, 0.05), dj.ddim(p.schedule)),
        None,
        2,
        random=True,
        remark="the corrector's bias depends on its step size, not on the grid",
    ),
    # few steps
    "consistency": Entry(
        lambda p, noise: dj.consistency(p.schedule, noise=noise),
        None,
        random=True,
        remark="exact in any number of steps for an exact consistency function, which a denoiser is not",
        law=False,
    ),
    "tcd": Entry(
        lambda p, noise: dj.undershoot(dj.ddim(p.schedule), p.schedule, 0.3),
        None,
        random=True,
        remark="exact if DDIM from t to any earlier time is; a denoiser's is not",
        law=False,
    ),
    "jump": Entry(
        lambda p, noise: dj.jump(_flow_map(p.schedule)),
        None,
        0,
        remark="the flow map of standard normal data: exact for it alone",
        law=False,
    ),
}
