r"""Whole sampling loops of diffusers' schedulers against ours, on the same denoiser, start and normal noise, in float32.

The denoiser is exact for a mixture of Gaussians: on their side in NumPy, in float64, on ours `mixtures.denoiser`. Their
schedulers carry x in one of four scalings, each of which is a schedule of ours with a time of its own:

    table   alpha^2 = abar_i, sigma^2 = 1 - abar_i         time (i + 1) / T             from_betas
    vp      the same, but a step knows their ratio only    time sigma / alpha           VP, below
    ve      x = x0 + sigma eps                             time sigma                   edm
    flow    x = (1 - sigma) x0 + sigma eps                 time sigma                   rectified

Both are given the scheduler's own grid; grids are compared at the end. A case with a `reason` is expected to differ, by
an error inside the interval that it gives.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.samplers import exponential, singlestep
from diffusion_jax.typing import AlphaSigma, Array, Noise, Sampler, Schedule

sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # only for its Brownian tree, replaced below
from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep, scheduling_dpmsolver_sde  # noqa: E402

SHAPE, STEPS = (16, 2, 2, 1), 20
LAW = Mixture(
    np.array([0.3, 0.5, 0.2]),
    np.array([[1.0, -0.5, 0.2, 0.3], [-0.6, 0.4, 0.0, 0.8], [0.3, 0.9, -0.7, -0.4]]).reshape(3, 2, 2, 1),
    np.array([[0.3, 0.5, 0.4, 0.2], [0.4, 0.3, 0.3, 0.6], [0.4, 0.2, 0.5, 0.3]]).reshape(3, 2, 2, 1) ** 2,
)
RNG = np.random.default_rng(0)
START = RNG.standard_normal(SHAPE)
NORMALS = RNG.standard_normal((100, 4, *SHAPE)).astype(np.float32)  # [step, draw within it]


def posterior_means(x: np.ndarray, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """E[x0 | x] and E[eps | x] for LAW, in NumPy."""
    total, diff = alpha**2 * LAW.variances + sigma**2, x[:, None] - alpha * LAW.means
    logp = np.log(LAW.weights) - 0.5 * np.sum(diff**2 / total + np.log(total), axis=(2, 3, 4))
    share = np.exp(logp - logp.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True))[:, :, None, None, None]
    x0 = np.sum(share * (LAW.means + alpha * LAW.variances / total * diff), axis=1)
    return x0, np.sum(share * sigma / total * diff, axis=1)


def vp_in_sigma() -> Schedule:
    """Variance preserving, with sigma / alpha for time."""
    return lambda t: AlphaSigma(1 / jnp.sqrt(1 + t**2), t / jnp.sqrt(1 + t**2))


SCALINGS: dict[str, Schedule] = {
    "table": dj.from_betas(dj.linear_betas(1000)),
    "vp": vp_in_sigma(),
    "ve": dj.edm(),
    "flow": dj.rectified(),
}


class Case(NamedTuple):
    """One scheduler: `peer()` makes theirs, `ours(schedule, noise)` our sampler; see the module for `scaling`.

    evaluations: of theirs in a step, each of which is a `step` of its own. predicts: what their denoiser returns.
    between: the least and the largest error, if a `reason` says why they differ.
    """

    peer: Callable[[], Any]
    scaling: str
    ours: Callable[[Schedule, Noise], Sampler]
    predicts: str = "epsilon"
    evaluations: int = 1
    arguments: dict[str, Any] = {}
    steps: int = STEPS
    between: tuple[float, float] = (0.0, 1e-5)
    reason: str = ""


def levels(case: Case, scheduler: Any) -> np.ndarray:
    """(alpha, sigma) of each evaluation of theirs, f64[m 2], as the scheduler has them."""
    if case.scaling == "table":
        abar = scheduler.alphas_cumprod.double().numpy()[scheduler.timesteps.numpy()]
        return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=1)
    sigma = np.array(scheduler.sigmas, np.float64)[: len(scheduler.timesteps)]
    if hasattr(scheduler, "sigmas_interpol"):
        inner = np.array(scheduler.sigmas_interpol, np.float64)
        sigma[1::2] = inner[1 : len(sigma) : 2] if "Ancestral" not in type(scheduler).__name__ else inner[: len(sigma) - 1 : 2]
    alpha = {"vp": 1 / np.sqrt(1 + sigma**2), "ve": np.ones_like(sigma), "flow": 1 - sigma}[case.scaling]
    return np.stack([alpha, sigma * alpha if case.scaling == "vp" else sigma], axis=1)


def grid(case: Case, scheduler: Any) -> np.ndarray:
    """Their grid in our time, f32[n + 1]."""
    if case.scaling == "table":
        return np.append((scheduler.timesteps.numpy() + 1) / 1000, 0).astype(np.float32)
    sigma = np.array(scheduler.sigmas, np.float32)
    return np.append(sigma[:-1 : case.evaluations], sigma[-1])


class Draws:
    """Takes the place of what they draw with: the j-th draw of step i is NORMALS[i, j]."""

    def __init__(self) -> None:
        self.step, self.drawn = 0, 0

    def __call__(self, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.drawn += 1
        return torch.from_numpy(NORMALS[self.step, self.drawn - 1])

    def next(self, step: int) -> None:
        self.drawn = self.drawn if step == self.step else 0
        self.step = step


def output(case: Case, scheduler: Any, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """What their network would return."""
    x0, eps = posterior_means(x, alpha, sigma)
    norm = np.sqrt(alpha**2 + sigma**2)
    forms = {"epsilon": eps, "sample": x0, "v_prediction": (alpha * eps - sigma * x0) / norm, "flow": eps - x0}
    if case.predicts != "edm":
        return forms[case.predicts]
    data = scheduler.config.sigma_data
    norm = np.sqrt(sigma**2 + data**2)
    return (x0 - (data / norm) ** 2 * x) * norm / (sigma * data)


def theirs(case: Case, scheduler: Any, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    draws, module = Draws(), sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", draws, raising=False)
    x_t = torch.from_numpy(x)
    for i, (t, level) in enumerate(zip(scheduler.timesteps, levels(case, scheduler), strict=True)):
        draws.next(i // case.evaluations)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x_t, t)
        out = torch.from_numpy(output(case, scheduler, x_t.double().numpy(), *level).astype(np.float32))
        x_t = scheduler.step(out, t, x_t, **case.arguments).prev_sample
    return x_t.numpy()


def table_noise(times: Array) -> Noise:
    """The j-th draw of our step i: NORMALS[i, j], by the time at which it starts."""
    drawn = []

    def noise(key: Array, x: Array, t: Array, s: Array) -> Array:
        i = jnp.sum(times > t * (1 + 1e-6)) - 0
        drawn.append(1)
        return jnp.asarray(NORMALS)[i, len(drawn) - 1]

    return noise


def run_ours(case: Case, x: np.ndarray, times: np.ndarray) -> np.ndarray:
    schedule = SCALINGS[case.scaling]

    @jax.jit
    def go(x: Array, times: Array) -> Array:
        sampler = case.ours(schedule, table_noise(times))
        return dj.sample(jax.random.key(0), sampler, mixtures.denoiser(LAW, schedule), x, times)

    return np.asarray(go(x, times))


def peer(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**options)


def dpm(**options: Any) -> Callable[[], Any]:
    return peer("DPMSolverMultistepScheduler", **({"use_karras_sigmas": True, "lower_order_final": False} | options))


def eps_multistep(order: int, slope: str) -> Callable[..., Sampler]:
    """DPM-Solver in its multistep form, noise prediction, with their half of the third difference."""
    rule = exponential.exponential_rule(slope, 0.5)
    return lambda s, noise: exponential.multistep(s, order, predicts="eps", rule=rule)


CASES: dict[str, Case] = {}
for spacing in ("leading", "trailing"):
    for eta in (0.0, 0.5, 1.0):
        CASES[f"ddim_{eta}_{spacing}"] = Case(
            peer("DDIMScheduler", timestep_spacing=spacing, clip_sample=False),
            "table",
            lambda s, noise, eta=eta: dj.ddim(s, eta, noise),
            arguments={"eta": eta},
        )
for variance in ("small", "large"):
    for predicts in ("epsilon", "sample", "v_prediction"):
        CASES[f"ddpm_{variance}_{predicts}"] = Case(
            peer("DDPMScheduler", variance_type=f"fixed_{variance}", prediction_type=predicts, clip_sample=False),
            "table",
            lambda s, noise, v=variance: dj.ddpm(s, v, noise),
            predicts,
        )
CASES |= {
    "ddpm_large_trailing": Case(
        peer("DDPMScheduler", variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"),
        "table",
        lambda s, noise: dj.ddpm(s, "large", noise),
        between=(0.1, 1.0),
        reason="theirs adds the noise of the last step to the result, unless it starts at index 0",
    ),
    "dpmpp_1": Case(dpm(solver_order=1), "vp", lambda s, noise: dj.ddim(s)),
    "dpmpp_2m_midpoint": Case(dpm(), "vp", lambda s, noise: exponential.dpmpp_2m(s)),
    "dpmpp_2m_heun": Case(dpm(solver_type="heun"), "vp", lambda s, noise: exponential.dpmpp_2m(s, "exact")),
    "dpmpp_3m": Case(dpm(solver_order=3), "vp", lambda s, noise: exponential.dpmpp_3m(s, curvature=0.5)),
    "dpmpp_3m_whole": Case(
        dpm(solver_order=3),
        "vp",
        lambda s, noise: exponential.dpmpp_3m(s),
        between=(1e-4, 1e-1),
        reason="theirs, as the authors' code, takes half of the second difference's integral: of second order only",
    ),
    "dpm_1m": Case(
        dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=1), "vp", eps_multistep(1, "bh2")
    ),
    "dpm_2m_midpoint": Case(
        dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"), "vp", eps_multistep(2, "bh2")
    ),
    "dpm_2m_heun": Case(
        dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_type="heun"),
        "vp",
        eps_multistep(2, "exact"),
    ),
    "dpm_3m": Case(
        dpm(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=3), "vp", eps_multistep(3, "bh2")
    ),
    "sde_dpmpp_1": Case(dpm(algorithm_type="sde-dpmsolver++", solver_order=1), "vp", lambda s, n: dj.ddim(s, 1.0, n)),
    "sde_dpmpp_2m_midpoint": Case(
        dpm(algorithm_type="sde-dpmsolver++"), "vp", lambda s, noise: exponential.dpmpp_2m_sde(s, noise=noise)
    ),
    "sde_dpmpp_2m_heun": Case(
        dpm(algorithm_type="sde-dpmsolver++", solver_type="heun"),
        "vp",
        lambda s, noise: exponential.dpmpp_2m_sde(s, slope="exact", noise=noise),
    ),
    "sde_dpmpp_3m": Case(
        dpm(algorithm_type="sde-dpmsolver++", solver_order=3),
        "vp",
        lambda s, noise: exponential.dpmpp_3m_sde(s, curvature=0.5, noise=noise),
    ),
    "sde_dpm_1": Case(
        dpm(algorithm_type="sde-dpmsolver", solver_order=1, final_sigmas_type="sigma_min"),
        "vp",
        lambda s, noise: exponential.exponential_ab(s, 1, "eps", 1.0, noise=noise),
    ),
    "sde_dpm_2": Case(
        dpm(algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"),
        "vp",
        lambda s, noise: exponential.exponential_ab(s, 2, "eps", 1.0, "bh2", noise=noise),
    ),
    "dpm_flow": Case(
        dpm(use_karras_sigmas=False, use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        "flow",
        lambda s, noise: exponential.dpmpp_2m(s),
        "flow",
    ),
}
for order in (1, 2, 3):
    for slope in ("bh1", "bh2"):
        CASES[f"unipc_{order}_{slope}"] = Case(
            peer(
                "UniPCMultistepScheduler",
                solver_order=order,
                solver_type=slope,
                lower_order_final=False,
                final_sigmas_type="sigma_min",
            ),
            "vp",
            lambda s, noise, order=order, slope=slope: exponential.unipc(s, order, slope),
        )
    CASES[f"deis_{order}"] = Case(
        peer("DEISMultistepScheduler", solver_order=order, lower_order_final=False),
        "vp",
        lambda s, noise, order=order: exponential.deis(s, order),
    )
CASES |= {
    "unipc_2_default": Case(peer("UniPCMultistepScheduler"), "vp", lambda s, noise: exponential.unipc(s, 2)),
    "unipc_2_eps": Case(
        peer("UniPCMultistepScheduler", predict_x0=False, lower_order_final=False, final_sigmas_type="sigma_min"),
        "vp",
        lambda s, noise: exponential.unipc(s, 2, predicts="eps"),
    ),
    "heun": Case(peer("HeunDiscreteScheduler"), "ve", lambda s, noise: dj.heun(s), evaluations=2),
    "euler": Case(peer("EulerDiscreteScheduler"), "ve", lambda s, noise: dj.euler(s)),
    "euler_karras": Case(peer("EulerDiscreteScheduler", use_karras_sigmas=True), "ve", lambda s, noise: dj.euler(s)),
    "euler_exponential": Case(
        peer("EulerDiscreteScheduler", use_exponential_sigmas=True), "ve", lambda s, noise: dj.euler(s)
    ),
    "euler_beta": Case(peer("EulerDiscreteScheduler", use_beta_sigmas=True), "ve", lambda s, noise: dj.euler(s)),
    "edm_euler": Case(peer("EDMEulerScheduler"), "ve", lambda s, noise: dj.euler(s), "edm"),
    "edm_dpm_2": Case(
        peer("EDMDPMSolverMultistepScheduler"), "ve", lambda s, noise: exponential.dpmpp_2m(s), "edm"
    ),
    "edm_dpm_3": Case(
        peer("EDMDPMSolverMultistepScheduler", solver_order=3),
        "ve",
        lambda s, noise: exponential.dpmpp_3m(s, curvature=0.5),
        "edm",
    ),
    "flow_euler": Case(peer("FlowMatchEulerDiscreteScheduler", shift=3.0), "flow", lambda s, noise: dj.euler(s), "flow"),
    "flow_heun": Case(
        peer("FlowMatchHeunDiscreteScheduler", shift=3.0), "flow", lambda s, noise: dj.heun(s), "flow", 2
    ),
}
for predictor, corrector in ((1, 2), (2, 2), (3, 3), (3, 4)):
    CASES[f"sa_{predictor}_{corrector}"] = Case(
        peer(
            "SASolverScheduler",
            predictor_order=predictor,
            corrector_order=corrector,
            tau_func=lambda t: 1.0,
            lower_order_final=False,
        ),
        "vp",
        lambda s, noise, p=predictor, c=corrector: exponential.sa_solver(s, p, c, 1.0, "bh1", noise=noise),
    )


@pytest.mark.parametrize("name", CASES)
def test_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    scheduler = case.peer()
    scheduler.set_timesteps(case.steps)
    alpha, sigma = levels(case, scheduler)[0]
    x = (alpha * LAW.means[1] + np.sqrt(alpha**2 * LAW.variances[1] + sigma**2) * START).astype(np.float32)
    expected, times = theirs(case, scheduler, x, monkeypatch), grid(case, scheduler)
    assert np.isfinite(expected).all()
    error = np.abs(run_ours(case, x, times) - expected).max() / np.std(expected)
    print(f"{name}: {error:.1e}")
    assert case.between[0] <= error <= case.between[1], case.reason
