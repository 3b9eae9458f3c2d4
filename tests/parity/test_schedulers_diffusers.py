r"""Whole loops of diffusers' schedulers against ours, on the same denoiser, start and normal noise, in float32.

The denoiser is exact for a mixture of Gaussians: on their side in NumPy and float64, on ours `mixtures.denoiser`. Their
schedulers carry x in one of these scalings, each of which is a schedule of ours with a time of its own:

    table, cosine   alpha^2 = abar_i, sigma^2 = 1 - abar_i       (i + 1) / T              from_betas
    index           the same; index 0 stands for clean data      i / T                    from_betas, moved by 1 / T
    vp              the same, as a function of the noise level   sigma / alpha            VP, below
    ve              x = x0 + sigma eps                           sigma                    edm
    flow            x = (1 - sigma) x0 + sigma eps               sigma                    rectified
    trig            x = cos(u) x0 + sin(u) eps                   2 u / pi                 cosine(0)
    crash           sigma = sin(pi u / 2)^2                      u                        IPNDMScheduler's own, below

Both sides are given the scheduler's own grid; grids are compared at the end. A case with a `reason` differs, by an
error inside the interval that it gives. Without counterpart here, and left out: PNDM (Runge-Kutta, or PLMS with an
improved Euler step, to start with), the inverse schedulers, and those of discrete, video and cascaded models.
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
from diffusion_jax import times
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.inverse import repaint
from diffusion_jax.samplers.ancestral import ancestral, ddim, ddpm, euler_ancestral
from diffusion_jax.samplers.exponential import (
    deis,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    exponential_ab,
    exponential_rule,
    interpolation_weights,
    ipndm,
    multistep,
    sa_solver,
    unipc,
)
from diffusion_jax.samplers.few_step import consistency, undershoot
from diffusion_jax.samplers.flow import dpm_2, euler, heun
from diffusion_jax.samplers.langevin import langevin
from diffusion_jax.samplers.singlestep import dpm_solver_2, dpm_solver_3, dpmpp_2s, dpmpp_2s_sde, dpmpp_3s
from diffusion_jax.samplers.stochastic import churn, reverse_diffusion
from diffusion_jax.schedules import shifted
from diffusion_jax.typing import AlphaSigma, Array, Cond, Noise, Prediction, Sampler, Schedule

sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))  # only for its Brownian tree, replaced below
from diffusers.schedulers import scheduling_cosine_dpmsolver_multistep as cosine_dpm  # noqa: E402
from diffusers.schedulers import scheduling_dpmsolver_sde as dpm_sde  # noqa: E402

SHAPE, STEPS = (16, 2, 2, 1), 20
LAW = Mixture(
    np.array([0.3, 0.5, 0.2]),
    np.array([[1.0, -0.5, 0.2, 0.3], [-0.6, 0.4, 0.0, 0.8], [0.3, 0.9, -0.7, -0.4]]).reshape(3, 2, 2, 1),
    np.array([[0.3, 0.5, 0.4, 0.2], [0.4, 0.3, 0.3, 0.6], [0.4, 0.2, 0.5, 0.3]]).reshape(3, 2, 2, 1) ** 2,
)
RNG = np.random.default_rng(0)
START = RNG.standard_normal(SHAPE)
NORMALS = RNG.standard_normal((200, 2, *SHAPE)).astype(np.float32)  # [step, draw within it]


def posterior_means(x: np.ndarray, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """E[x0 | x] and E[eps | x], in NumPy."""
    total, diff = alpha**2 * LAW.variances + sigma**2, x[:, None] - alpha * LAW.means
    logp = np.log(LAW.weights) - 0.5 * np.sum(diff**2 / total + np.log(total), axis=(2, 3, 4))
    share = np.exp(logp - logp.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True))[:, :, None, None, None]
    x0 = np.sum(share * (LAW.means + alpha * LAW.variances / total * diff), axis=1)
    return x0, np.sum(share * sigma / total * diff, axis=1)


def by_index(t: Array) -> AlphaSigma:
    return SCALINGS["table"](t + 1 / 1000)


def crash(t: Array) -> AlphaSigma:
    sigma = jnp.sin(jnp.pi / 2 * t) ** 2
    return AlphaSigma(jnp.sqrt(1 - sigma**2), sigma)


SCALINGS: dict[str, Schedule] = {
    "table": dj.from_betas(dj.linear_betas(1000)),
    "cosine": dj.from_betas(dj.cosine_betas(1000)),
    "index": by_index,
    "vp": lambda t: AlphaSigma(1 / jnp.sqrt(1 + t**2), t / jnp.sqrt(1 + t**2)),
    "ve": dj.edm(),
    "flow": dj.rectified(),
    "trig": dj.cosine(0.0),
    "crash": crash,
}
Look = Callable[[np.ndarray, float, np.ndarray], tuple[np.ndarray, float]]
Ours = Callable[[Schedule, Noise], Sampler]


class Case(NamedTuple):
    """One scheduler: `peer()` makes theirs, `ours(schedule, noise)` our sampler; see the module for `scaling`.

    predicts: what their network returns. evaluations: of it in a step, each of which is a `step` of their own.
    arguments: (scheduler, i) -> further arguments of their i-th step. change: of the scheduler after `set_timesteps`.
    table: their noise, [step, draw within it]; see `by_keys`. look: (x, sigma, noise) -> where their network is
    evaluated, if not at x. cut: how many steps are left out at the start and at the end. double: their side in float64,
    where their coefficients lose digits in float32.
    between: the least and the largest error, if a `reason` says why they differ.
    """

    peer: Callable[[], Any]
    scaling: str
    ours: Ours
    predicts: str = "epsilon"
    evaluations: int = 1
    arguments: Callable[[Any, int], dict[str, Any]] = lambda scheduler, i: {}
    change: Callable[[Any], None] = lambda scheduler: None
    table: Callable[[], np.ndarray] = lambda: NORMALS
    look: Look | None = None
    steps: int = STEPS
    cut: tuple[int, int] = (0, 0)
    double: bool = False
    between: tuple[float, float] = (0.0, 1e-5)
    reason: str = ""


# --- their side -------------------------------------------------------------------------------------------------------


def visited(case: Case, scheduler: Any) -> np.ndarray:
    """Where their network is evaluated, f64[m]: indices, noise levels, or angles, by the scaling."""
    if case.scaling in ("table", "cosine", "index"):
        return scheduler.timesteps.numpy()
    if case.scaling == "trig":
        return scheduler.timesteps.double().numpy()[:-1]
    if case.scaling == "crash":
        return scheduler.betas.double().numpy()[:-1]
    sigma = np.array(scheduler.sigmas, np.float64)[: len(scheduler.timesteps)]
    if hasattr(scheduler, "sigmas_interpol"):
        inner = np.array(scheduler.sigmas_interpol, np.float64)
        later = 0 if "Ancestral" in type(scheduler).__name__ else 1
        sigma[1::2] = inner[later : len(sigma) - 1 + later : 2]
    if isinstance(scheduler, dpm_sde.DPMSolverSDEScheduler):
        sigma[1::2] = np.sqrt(sigma[:-1:2] * sigma[1::2])
    return sigma


LEVELS: dict[str, Callable[[float], tuple[float, float]]] = {
    "vp": lambda time: (1 / np.sqrt(1 + time**2), time / np.sqrt(1 + time**2)),
    "ve": lambda time: (1.0, time),
    "flow": lambda time: (1 - time, time),
    "trig": lambda time: (np.cos(time), np.sin(time)),
    "crash": lambda time: (np.sqrt(1 - time**2), time),
}


def level(case: Case, scheduler: Any, time: float) -> tuple[float, float]:
    """alpha and sigma at one of `visited`."""
    if case.scaling in ("table", "cosine", "index"):
        abar = float(scheduler.alphas_cumprod[int(time)])
        return np.sqrt(abar), np.sqrt(1 - abar)
    return LEVELS[case.scaling](time)


def output(case: Case, scheduler: Any, x: np.ndarray, alpha: float, sigma: float, t: Any) -> np.ndarray:
    """What their network would return."""
    x0, eps = posterior_means(x, alpha, sigma)
    v = (alpha * eps - sigma * x0) / np.sqrt(alpha**2 + sigma**2)
    if case.predicts == "learned":
        return np.concatenate([eps, np.tanh(x)], axis=1)
    if case.predicts == "lcm":
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition_discrete(t))
        return (x0 - skip * x) / out
    if case.predicts == "cm":
        skip, out = (float(c) for c in scheduler.get_scalings_for_boundary_condition(torch.tensor(sigma)))
        return (x0 - skip * x) / out
    if case.predicts == "edm":
        data, sign = scheduler.config.sigma_data, -1 if scheduler.config.prediction_type == "v_prediction" else 1
        norm = np.sqrt(sigma**2 + data**2)
        return sign * (x0 - (data / norm) ** 2 * x) * norm / (sigma * data)
    return {"epsilon": eps, "sample": x0, "v_prediction": v, "flow": eps - x0, "score": -eps / sigma}[case.predicts]


class Draws:
    """Takes the place of all they draw with: the j-th draw of step i is table[i, j]."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.step, self.drawn = table, 0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.drawn += 1
        return torch.from_numpy(self.table[self.step, self.drawn - 1])

    def next(self, step: int) -> None:
        self.drawn = self.drawn if step == self.step else 0
        self.step = step


def halves(draws: Draws) -> Callable[..., torch.Tensor]:
    """For DPMSolverSDE: (sigma, middle) gets the first draw, (sigma, next) what `dpmpp_2s_sde` makes of both."""

    def increment(sigma: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        first = torch.from_numpy(draws.table[draws.step, 0])
        draws.drawn += 1
        if draws.drawn == 1:
            return first
        e = np.float64(to / sigma)  # e^-h; a half step's is its root
        mixed = np.sqrt(e * (1 - e)) * draws.table[draws.step, 0] + np.sqrt(1 - e) * draws.table[draws.step, 1]
        return torch.from_numpy(np.float32(mixed / np.sqrt(1 - e**2)))

    return increment


def theirs(case: Case, scheduler: Any, x: np.ndarray, draws: Draws) -> np.ndarray:
    kind = np.float64 if case.double else np.float32
    if case.double:
        scheduler.sigmas = scheduler.sigmas.double()
    x_t, times = torch.from_numpy(x.astype(kind)), visited(case, scheduler)
    first, last = case.cut
    for i in range(first * case.evaluations, len(times) - last * case.evaluations):
        draws.next(i // case.evaluations)
        t = scheduler.timesteps[i]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x_t, t)
        y, time = x_t.double().numpy(), times[i]
        if case.look is not None:
            y, time = case.look(y, time, draws.table[draws.step, 0])
        out = output(case, scheduler, y, *level(case, scheduler, time), t)
        x_t = scheduler.step(torch.from_numpy(out.astype(kind)), t, x_t, **case.arguments(scheduler, i)).prev_sample
    return x_t.numpy()


# --- our side ---------------------------------------------------------------------------------------------------------


def grid(case: Case, scheduler: Any) -> np.ndarray:
    """Their grid in our time, f32[n + 1]."""
    first, last = case.cut
    if case.scaling in ("table", "cosine"):
        times = np.append(scheduler.timesteps.numpy() + 1, 0) / 1000
    elif case.scaling == "index":
        times = np.append(scheduler.timesteps.numpy(), 0) / 1000
    elif case.scaling == "trig":
        times = scheduler.timesteps.double().numpy() * 2 / np.pi
    elif case.scaling == "crash":
        times = np.arange(case.steps, -1, -1) / case.steps
    elif case.evaluations > 1 and hasattr(scheduler, "order_list"):
        times = np.array(scheduler.sigmas)[:: case.evaluations]
    else:
        sigma = np.array(scheduler.sigmas)
        times = np.unique(sigma)[::-1] if case.evaluations > 1 else sigma
    return np.float32(times[first : len(times) - last])


def from_table(times: Array) -> Noise:
    """NORMALS[i, 0] for a draw that starts at our i-th time, NORMALS[i, 1] if it starts inside of step i."""

    def noise(key: Array, x: Array, t: Array, s: Array) -> Array:
        i = jnp.sum(times >= t * (1 - 1e-6)) - 1
        return jnp.asarray(NORMALS)[i, (times[i] > t * (1 + 1e-6)).astype(jnp.int32)]

    return noise


def by_keys(*path: int) -> np.ndarray:
    """What ours draws where it takes no `noise`: with the steps' keys, folded with these numbers."""

    def draw(i: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(0), i)
        for data in path:
            key = jax.random.fold_in(key, data)
        return jax.random.normal(key, SHAPE)

    return np.asarray(jax.lax.map(draw, jnp.arange(len(NORMALS))))[:, None]


def run_ours(case: Case, x: np.ndarray, times: np.ndarray) -> np.ndarray:
    schedule = SCALINGS[case.scaling]
    plain = mixtures.denoiser(LAW, schedule)

    def denoiser(x: Array, t: Array, cond: Cond = None) -> Prediction:
        p = plain(x, t)
        return p._replace(variance_fraction=(jnp.tanh(x) + 1) / 2) if case.predicts == "learned" else p

    @jax.jit
    def go(x: Array, times: Array) -> Array:
        return dj.sample(jax.random.key(0), case.ours(schedule, from_table(times)), denoiser, x, times)

    return np.asarray(go(x, times))


# --- the table --------------------------------------------------------------------------------------------------------


def peer(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**options)


def dpm(**options: Any) -> Callable[[], Any]:
    """DPMSolverMultistep without steps of a lower order before the last; to the smallest level for noise prediction."""
    last = "sigma_min" if options.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") else "zero"
    return peer("DPMSolverMultistepScheduler", lower_order_final=False, final_sigmas_type=last, **options)


def constant(ours: Callable[[Schedule], Sampler]) -> Ours:
    """A sampler that draws nothing."""
    return lambda schedule, noise: ours(schedule)


def noise_multistep(order: int, slope: Any) -> Ours:
    """DPM-Solver in its multistep form, noise prediction, with their half of the third difference."""
    return constant(lambda s: multistep(s, order, predicts="eps", rule=exponential_rule(slope, 0.5)))


def half_steps(count: int) -> Callable[[Any], None]:
    """Sigmas of a single-step method: geometric, so that the inner ones lie at equal parts of a step in log SNR."""

    def change(scheduler: Any) -> None:
        sigma = np.geomspace(40.0, 0.05, len(scheduler.order_list) // count + 1)
        inner = [sigma[:-1] ** (1 - j / count) * sigma[1:] ** (j / count) for j in range(count)]
        scheduler.sigmas = torch.from_numpy(np.append(np.stack(inner, 1).ravel(), sigma[-1]).astype(np.float32))

    return change


def churned(x: np.ndarray, sigma: float, noise: np.ndarray) -> tuple[np.ndarray, float]:
    """Where algorithm 2 of Karras et al. 2022 evaluates, with S_churn = 4."""
    hat = sigma * (1 + 4 / STEPS)
    return x + noise * np.sqrt(hat**2 - sigma**2), hat


def wrong_third_order(schedule: Schedule, noise: Noise) -> Sampler:
    """SDE-DPM-Solver++(3M) with their coefficient of the second difference: lower by 1 than the half that was meant."""

    def rule(h: Array, z: Array, distances: list[Array], valid: list[Array]) -> list[Array]:
        right = exponential_rule("bh2", 0.5)(h, z, distances, valid)
        off = interpolation_weights(jnp.zeros(3).at[2].set(-1.0), [d / h for d in distances], valid)
        return [a + jnp.where(valid[1], b, 0) for a, b in zip(right, off, strict=True)]

    return multistep(schedule, 3, tau=1.0, rule=rule, noise=noise)


CHURN = constant(lambda s: churn(euler(s), s, 4 / STEPS, 0.0, np.inf, 1000.0, 1.0))
NOISE_AT_THE_END = "theirs adds the noise of the last step to the result, unless that starts at index 0"
HALF = "theirs, like the authors' code, takes half of the second difference's integral: second order only"
BEFORE_CHURN = "theirs evaluates the network before it adds the noise, and then treats the output as one from after it"
SECOND_STAGE = "their second stage has the slope of a second-order step, the paper's algorithm 2 its exact integral"
QUADRATIC = (
    "theirs puts a parabola through all three stages, the paper's algorithm 2 a line through the first and third"
)
FIRST_BETA = "their last step is beta_0 / (1 - abar_0) x0, off by 5e-4 in float32: 1 - abar_0 is 4e-5 for this table"
START_AT_NOISE = "at alpha = 0 they take 0 for x0 = (x - eps) / alpha, ours what the denoiser knows: its mean"
MEAN_STEP = "their corrector's step depends on the batch's norms of score and noise, ours on the noise level alone"


class ScoreSdeVe:
    """ScoreSdeVeScheduler as its pipeline uses it, one `step` for each evaluation; at the end the predictor's mean."""

    def __init__(self, corrected: bool) -> None:
        self.inner, self.each = diffusers.ScoreSdeVeScheduler(snr=0.05, sigma_max=20.0), 2 if corrected else 1

    def set_timesteps(self, n: int) -> None:
        self.inner.set_timesteps(n)
        self.inner.set_sigmas(n)
        self.timesteps = self.inner.timesteps.repeat_interleave(self.each)
        sigmas = self.inner.discrete_sigmas.flip(0).repeat_interleave(self.each)
        self.sigmas = torch.cat([sigmas, torch.zeros(1)])

    def step(self, out: torch.Tensor, t: torch.Tensor, x: torch.Tensor, i: int) -> Any:
        if i % self.each < self.each - 1:
            return self.inner.step_correct(out, x)
        done = self.inner.step_pred(out, t, x)
        last = i == len(self.timesteps) - 1
        return types.SimpleNamespace(prev_sample=done.prev_sample_mean if last else done.prev_sample)


CASES: dict[str, Case] = {}
for kind in ("DDIM", "DDIMParallel"):
    for eta in (0.0, 0.5, 1.0) if kind == "DDIM" else (0.5,):
        for spacing in ("leading", "trailing"):
            CASES[f"{kind} eta={eta} {spacing}"] = Case(
                peer(f"{kind}Scheduler", timestep_spacing=spacing, clip_sample=False),
                "table",
                lambda s, noise, eta=eta: ddim(s, eta, noise),
                arguments=lambda scheduler, i, eta=eta: {"eta": eta},
            )
for kind in ("DDPM", "DDPMParallel"):
    for variance in ("small", "large"):
        for predicts in ("epsilon", "sample", "v_prediction") if kind == "DDPM" else ("epsilon",):
            CASES[f"{kind} {variance} {predicts}"] = Case(
                peer(
                    f"{kind}Scheduler", variance_type=f"fixed_{variance}", prediction_type=predicts, clip_sample=False
                ),
                "table",
                lambda s, noise, v=variance: ddpm(s, v, noise),
                predicts,
            )
CASES |= {
    "DDIM trailing, 7 steps": Case(
        peer("DDIMScheduler", timestep_spacing="trailing", clip_sample=False),
        "table",
        constant(ddim),
        steps=7,
        between=(1e-4, 1.0),
        reason="theirs steps to t - T // n, which misses its own next time where n does not divide T",
    ),
    "DDPM large trailing": Case(
        peer("DDPMScheduler", variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing"),
        "table",
        lambda s, noise: ddpm(s, "large", noise),
        between=(0.1, 1.0),
        reason=NOISE_AT_THE_END,
    ),
    "DDPM learned": Case(
        peer("DDPMScheduler", variance_type="learned_range", clip_sample=False),
        "table",
        lambda s, noise: ancestral(s, noise),
        "learned",
    ),
    "UnCLIP": Case(
        peer("UnCLIPScheduler", clip_sample=False, prediction_type="sample"),
        "cosine",
        lambda s, noise: ddpm(s, "small", noise),
        "sample",
        arguments=lambda scheduler, i: {"prev_timestep": [*scheduler.timesteps, None][i + 1]},
        cut=(0, 2),
    ),
    "UnCLIP to 0": Case(
        peer("UnCLIPScheduler", clip_sample=False, prediction_type="sample"),
        "cosine",
        lambda s, noise: ddpm(s, "small", noise),
        "sample",
        arguments=lambda scheduler, i: {"prev_timestep": [*scheduler.timesteps, None][i + 1]},
        between=(1e-4, 1e-2),
        reason=FIRST_BETA,
    ),
    "Euler": Case(peer("EulerDiscreteScheduler"), "ve", constant(euler)),
    "Euler v": Case(
        peer("EulerDiscreteScheduler", prediction_type="v_prediction"), "ve", constant(euler), "v_prediction"
    ),
    "Euler karras": Case(peer("EulerDiscreteScheduler", use_karras_sigmas=True), "ve", constant(euler)),
    "Euler exponential": Case(peer("EulerDiscreteScheduler", use_exponential_sigmas=True), "ve", constant(euler)),
    "Euler beta": Case(peer("EulerDiscreteScheduler", use_beta_sigmas=True), "ve", constant(euler)),
    "EulerAncestral": Case(
        peer("EulerAncestralDiscreteScheduler"), "ve", lambda s, noise: euler_ancestral(s, 1.0, noise)
    ),
    "Heun": Case(peer("HeunDiscreteScheduler"), "ve", constant(heun), evaluations=2),
    "Heun karras": Case(peer("HeunDiscreteScheduler", use_karras_sigmas=True), "ve", constant(heun), evaluations=2),
    "KDPM2": Case(peer("KDPM2DiscreteScheduler"), "ve", constant(dpm_2), evaluations=2),
    "KDPM2Ancestral": Case(
        peer("KDPM2AncestralDiscreteScheduler"), "ve", lambda s, noise: dpm_2(s, 1.0, noise), evaluations=2
    ),
    "LMS": Case(peer("LMSDiscreteScheduler"), "ve", constant(lambda s: deis(s, 4, "rho")), cut=(0, 1)),
    "LMS to 0": Case(
        peer("LMSDiscreteScheduler"),
        "ve",
        constant(lambda s: deis(s, 4, "rho")),
        between=(1e-4, 1e-2),
        reason="theirs extrapolates in the step to sigma = 0 too, ours takes the denoised mean",
    ),
    "EDMEuler": Case(peer("EDMEulerScheduler"), "ve", constant(euler), "edm"),
    "EDMEuler churn": Case(
        peer("EDMEulerScheduler"),
        "ve",
        CHURN,
        "edm",
        arguments=lambda scheduler, i: {"s_churn": 4.0},
        table=lambda: by_keys(0),
        look=churned,
    ),
    "EDMEuler churn as is": Case(
        peer("EDMEulerScheduler"),
        "ve",
        CHURN,
        "edm",
        arguments=lambda scheduler, i: {"s_churn": 4.0},
        table=lambda: by_keys(0),
        between=(1e-2, 10.0),
        reason=BEFORE_CHURN,
    ),
    "DPMMultistep++ 1": Case(dpm(solver_order=1), "vp", constant(ddim)),
    "DPMMultistep++ 2 midpoint": Case(dpm(), "vp", constant(dpmpp_2m)),
    "DPMMultistep++ 2 heun": Case(dpm(solver_type="heun"), "vp", constant(lambda s: dpmpp_2m(s, "exact"))),
    "DPMMultistep++ 2 karras": Case(dpm(use_karras_sigmas=True), "vp", constant(dpmpp_2m)),
    "DPMMultistep++ 3": Case(dpm(solver_order=3), "vp", constant(lambda s: dpmpp_3m(s, curvature=0.5))),
    "DPMMultistep++ 3, ours whole": Case(
        dpm(solver_order=3), "vp", constant(dpmpp_3m), between=(1e-3, 0.2), reason=HALF
    ),
    "DPMMultistep++ flow": Case(
        dpm(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"), "flow", constant(dpmpp_2m), "flow"
    ),
    "DPMMultistep 1": Case(dpm(algorithm_type="dpmsolver", solver_order=1), "vp", noise_multistep(1, "bh2")),
    "DPMMultistep 2 midpoint": Case(dpm(algorithm_type="dpmsolver"), "vp", noise_multistep(2, "bh2")),
    "DPMMultistep 2 heun": Case(dpm(algorithm_type="dpmsolver", solver_type="heun"), "vp", noise_multistep(2, "exact")),
    "DPMMultistep 3": Case(dpm(algorithm_type="dpmsolver", solver_order=3), "vp", noise_multistep(3, "bh2")),
    "DPMMultistep++ SDE 1": Case(
        dpm(algorithm_type="sde-dpmsolver++", solver_order=1), "vp", lambda s, noise: ddim(s, 1.0, noise)
    ),
    "DPMMultistep++ SDE 2 midpoint": Case(
        dpm(algorithm_type="sde-dpmsolver++"), "vp", lambda s, noise: dpmpp_2m_sde(s, noise=noise)
    ),
    "DPMMultistep++ SDE 2 heun": Case(
        dpm(algorithm_type="sde-dpmsolver++", solver_type="heun"),
        "vp",
        lambda s, noise: dpmpp_2m_sde(s, slope="exact", noise=noise),
    ),
    "DPMMultistep++ SDE 3": Case(dpm(algorithm_type="sde-dpmsolver++", solver_order=3), "vp", wrong_third_order),
    "DPMMultistep++ SDE 3, ours whole": Case(
        dpm(algorithm_type="sde-dpmsolver++", solver_order=3),
        "vp",
        lambda s, noise: dpmpp_3m_sde(s, noise=noise),
        between=(0.1, 10.0),
        reason="theirs has a wrong sign of 1/2: the second difference's coefficient tends to -1 and not to 0 as h does",
    ),
    "DPMMultistep SDE 1": Case(
        dpm(algorithm_type="sde-dpmsolver", solver_order=1),
        "vp",
        lambda s, noise: exponential_ab(s, 1, "eps", 1.0, noise=noise),
    ),
    "DPMMultistep SDE 2": Case(
        dpm(algorithm_type="sde-dpmsolver"), "vp", lambda s, noise: exponential_ab(s, 2, "eps", 1.0, "bh2", noise)
    ),
    "DPMSDE": Case(
        lambda: dpm_sde.DPMSolverSDEScheduler(),
        "ve",
        lambda s, noise: dpmpp_2s_sde(s, noise=noise),
        evaluations=2,
    ),
    "EDMDPMMultistep 2": Case(peer("EDMDPMSolverMultistepScheduler"), "ve", constant(dpmpp_2m), "edm"),
    "EDMDPMMultistep 3": Case(
        peer("EDMDPMSolverMultistepScheduler", solver_order=3),
        "ve",
        constant(lambda s: dpmpp_3m(s, curvature=0.5)),
        "edm",
    ),
    "EDMDPMMultistep SDE 2": Case(
        peer("EDMDPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        "ve",
        lambda s, noise: dpmpp_2m_sde(s, noise=noise),
        "edm",
    ),
    "CosineDPMMultistep": Case(
        lambda: cosine_dpm.CosineDPMSolverMultistepScheduler(),
        "ve",
        lambda s, noise: dpmpp_2m_sde(s, noise=noise),
        "edm",
    ),
    "UniPC default": Case(peer("UniPCMultistepScheduler"), "vp", constant(unipc)),
    "UniPC eps": Case(
        peer("UniPCMultistepScheduler", predict_x0=False, lower_order_final=False, final_sigmas_type="sigma_min"),
        "vp",
        constant(lambda s: unipc(s, 2, predicts="eps")),
    ),
    "ScoreSdeVe predictor": Case(
        lambda: ScoreSdeVe(False),
        "ve",
        lambda s, noise: reverse_diffusion(s, noise),
        "score",
        arguments=lambda scheduler, i: {"i": i},
    ),
    "ScoreSdeVe": Case(
        lambda: ScoreSdeVe(True),
        "ve",
        lambda s, noise: dj.chain(langevin(s, 0.05), reverse_diffusion(s, noise)),
        "score",
        evaluations=2,
        arguments=lambda scheduler, i: {"i": i},
        table=lambda: np.concatenate([by_keys(0, 0), NORMALS[:, :1]], axis=1),
        between=(1e-2, 1.0),
        reason=MEAN_STEP,
    ),
    "IPNDM": Case(peer("IPNDMScheduler"), "crash", constant(ipndm), "v_prediction", cut=(1, 1)),
    "IPNDM from noise": Case(
        peer("IPNDMScheduler"),
        "crash",
        constant(ipndm),
        "v_prediction",
        cut=(0, 1),
        between=(1e-3, 1.0),
        reason=START_AT_NOISE,
    ),
    "FlowMatchEuler": Case(peer("FlowMatchEulerDiscreteScheduler", shift=3.0), "flow", constant(euler), "flow"),
    "FlowMatchEuler stochastic": Case(
        peer("FlowMatchEulerDiscreteScheduler", shift=3.0, stochastic_sampling=True),
        "flow",
        lambda s, noise: consistency(s, noise=noise),
        "flow",
    ),
    "FlowMatchLCM": Case(
        peer("FlowMatchLCMScheduler", shift=3.0), "flow", lambda s, noise: consistency(s, noise=noise), "flow", steps=4
    ),
    "FlowMatchHeun": Case(
        peer("FlowMatchHeunDiscreteScheduler", shift=3.0), "flow", constant(heun), "flow", evaluations=2
    ),
    "LCM": Case(
        peer("LCMScheduler", prediction_type="sample", beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        "table",
        lambda s, noise: consistency(s, noise=noise),
        "lcm",
        steps=4,
    ),
    "TCD": Case(
        peer("TCDScheduler", beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        "index",
        constant(lambda s: undershoot(ddim(s), s, 0.5)),
        arguments=lambda scheduler, i: {"eta": 0.5},
        change=lambda scheduler: scheduler.set_timesteps(timesteps=[998, 700, 400, 100]),
        table=lambda: by_keys(1),
        steps=4,
    ),
    "CMStochasticIterative": Case(
        peer("CMStochasticIterativeScheduler", clip_denoised=False),
        "ve",
        lambda s, noise: consistency(s, 0.002, noise),
        "cm",
        steps=4,
        double=True,
    ),
    "SCM": Case(
        peer("SCMScheduler", sigma_data=1.0),
        "trig",
        lambda s, noise: consistency(s, noise=noise),
        "v_prediction",
        change=lambda scheduler: scheduler.set_timesteps(2, max_timesteps=1.5, intermediate_timesteps=0.8),
        steps=2,
    ),
}
for order in (1, 2, 3):
    for slope in ("bh1", "bh2"):
        CASES[f"UniPC {order} {slope}"] = Case(
            peer(
                "UniPCMultistepScheduler",
                solver_order=order,
                solver_type=slope,
                lower_order_final=False,
                final_sigmas_type="sigma_min",
            ),
            "vp",
            constant(lambda s, order=order, slope=slope: unipc(s, order, slope)),
            double=True,
        )
    CASES[f"DEIS {order}"] = Case(
        peer("DEISMultistepScheduler", solver_order=order, lower_order_final=False),
        "vp",
        constant(lambda s, order=order: deis(s, order)),
        double=True,
    )
for predictor, corrector in ((1, 2), (2, 2), (3, 3), (3, 4)):
    for tau in (1.0, 0.5):
        CASES[f"SA {predictor} {corrector} tau={tau}"] = Case(
            peer(
                "SASolverScheduler",
                predictor_order=predictor,
                corrector_order=corrector,
                tau_func=lambda t, tau=tau: tau,
                lower_order_final=False,
                use_karras_sigmas=True,
            ),
            "vp",
            lambda s, noise, p=predictor, c=corrector, tau=tau: sa_solver(s, p, c, tau, "bh1", noise=noise),
            cut=(0, 1),  # of length 0
            double=True,
        )
for kind, samplers in (("dpmsolver", (ddim, dpm_solver_2, dpm_solver_3)), ("dpmsolver++", (ddim, dpmpp_2s, dpmpp_3s))):
    for order, sampler in enumerate(samplers, 1):
        for solver in ("midpoint", "heun") if order > 1 else ("midpoint",):
            exact = constant(lambda s, f=sampler: f(s, slope="exact"))
            CASES[f"DPMSinglestep {kind} {order} {solver}"] = Case(
                peer(
                    "DPMSolverSinglestepScheduler",
                    solver_order=order,
                    algorithm_type=kind,
                    solver_type=solver,
                    lower_order_final=False,
                    final_sigmas_type="sigma_min",
                ),
                "vp",
                exact if order == 2 and solver == "heun" else constant(sampler),
                evaluations=order,
                change=half_steps(order),
                steps=24,
                between=(1e-5, 1e-1) if order == 3 else (0.0, 1e-5),
                reason={"midpoint": SECOND_STAGE, "heun": QUADRATIC}[solver] if order == 3 else "",
            )


def start(case: Case, scheduler: Any) -> np.ndarray:
    alpha, sigma = level(case, scheduler, visited(case, scheduler)[case.cut[0] * case.evaluations])
    return np.float32(alpha * LAW.means[1] + np.sqrt(alpha**2 * LAW.variances[1] + sigma**2) * START)


def run_theirs(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, their grid in our time, their end)."""
    scheduler, draws = case.peer(), Draws(case.table())
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.schedulers.") and hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", draws)
    monkeypatch.setattr(cosine_dpm, "BrownianTreeNoiseSampler", lambda *args, **kwargs: draws)
    monkeypatch.setattr(dpm_sde, "BrownianTreeNoiseSampler", lambda *args, **kwargs: halves(draws))
    scheduler.set_timesteps(case.steps)
    case.change(scheduler)
    x = start(case, scheduler)
    return x, grid(case, scheduler), theirs(case, scheduler, x, draws)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    x, ours_at, expected = run_theirs(case, monkeypatch)
    assert np.isfinite(expected).all()
    error = np.abs(run_ours(case, x, ours_at) - expected).max() / np.std(expected)
    print(f"{name}: {error:.1e} {case.reason}")
    assert case.between[0] <= error <= case.between[1], case.reason


# --- where theirs and ours differ -------------------------------------------------------------------------------------


def geometric(high: float, low: float) -> Callable[[Any], None]:
    def change(scheduler: Any) -> None:
        scheduler.sigmas = torch.from_numpy(np.geomspace(high, low, len(scheduler.sigmas)).astype(np.float32))

    return change


def fine_end(x: np.ndarray, start: float, end: float, tau: float) -> np.ndarray:
    """d(x / sigma) = ((1 + tau^2) e^lambda x0 - tau^2 x / sigma) dlambda by Runge and Kutta, scaling "vp"."""

    def slope(lam: float, y: np.ndarray) -> np.ndarray:
        sigma = 1 / np.sqrt(1 + np.exp(2 * lam))
        return (1 + tau**2) * np.exp(lam) * posterior_means(sigma * y, sigma * np.exp(lam), sigma)[0] - tau**2 * y

    lams = np.linspace(-np.log(start), -np.log(end), 601)
    y, h = x * np.sqrt(1 + start**2) / start, lams[1] - lams[0]
    for lam in lams[:-1]:
        a = slope(lam, y)
        b = slope(lam + h / 2, y + h / 2 * a)
        c = slope(lam + h / 2, y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + slope(lam + h, y + h * c))
    return y * end / np.sqrt(1 + end**2)


WHO_IS_RIGHT = {  # orders at which theirs and ours converge, and tau
    "DPMMultistep++ 3, ours whole": (2, 3, 0.0),
    "DPMMultistep++ SDE 3, ours whole": (1, 3, 1.0),
    "DPMSinglestep dpmsolver 3 midpoint": (3, 3, 0.0),
    "DPMSinglestep dpmsolver 3 heun": (3, 3, 0.0),
    "DPMSinglestep dpmsolver++ 3 midpoint": (3, 3, 0.0),
    "DPMSinglestep dpmsolver++ 3 heun": (3, 3, 0.0),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", WHO_IS_RIGHT)
def test_convergence_where_the_two_differ(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders, in float64, against a fine solution; of a random sampler for its equation without the noise."""
    *expected, tau = WHO_IS_RIGHT[name]
    case = CASES[name]._replace(table=lambda: np.zeros_like(NORMALS), double=True)
    if case.evaluations == 1:
        case = case._replace(change=geometric(3.0, 0.3) if tau else geometric(40.0, 0.05))
    if tau:
        case = case._replace(ours=constant(lambda s: dpmpp_3m_sde(s, noise=lambda key, x, t, s: jnp.zeros_like(x))))
    errors = []
    for steps in (96, 192):
        x, at, end = run_theirs(case._replace(steps=steps), monkeypatch)
        with jax.enable_x64(True):
            ours = run_ours(case, x.astype(np.float64), at.astype(np.float64))
        exact = fine_end(x.astype(np.float64), float(at[0]), float(at[-1]), tau)
        errors.append([np.abs(y - exact).max() for y in (end, ours)])
    orders = np.log2(np.array(errors[0]) / np.array(errors[1]))
    print(f"{name}: orders {orders}, errors {errors[1]}")
    np.testing.assert_allclose(orders, expected, atol=0.2)


# --- what has no `step` -----------------------------------------------------------------------------------------------


def test_parallel_ddim_steps() -> None:
    """DDIMParallel's `batch_step_no_noise`: one step from every time of the grid at once."""
    scheduler = diffusers.DDIMParallelScheduler(clip_sample=False)
    scheduler.set_timesteps(len(START))
    schedule = SCALINGS["table"]
    x, eps = (START.astype(np.float32), NORMALS[0, 0])
    expected = scheduler.batch_step_no_noise(torch.from_numpy(eps), scheduler.timesteps, torch.from_numpy(x))
    at = dj.leading(len(START))

    def one(x: Array, eps: Array, t: Array, s: Array) -> Array:
        denoise = lambda x, t: dj.from_eps(schedule, x, t, eps[None])  # noqa: E731
        return ddim(schedule).step(jax.random.key(0), x[None], (), t, s, denoise)[0][0]

    got = jax.jit(jax.vmap(one))(x, eps, at[:-1], at[1:])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)  # x0 is up to 150 here


def test_repaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """RePaintScheduler with jumps of 4 of 24 indices, 3 times; unlike ours it does not repeat the first of them.

    Their noise, in the order in which they draw it, is made of ours: for a step what the mask leaves of both draws; for
    the jump back, which they make in 4 small steps, nothing but in the last.
    """
    table, length, jumps = 24, 4, 3
    scheduler = diffusers.RePaintScheduler(
        table, trained_betas=np.linspace(0.01, 0.4, table, dtype=np.float32), eta=1.0, clip_sample=False
    )
    scheduler.set_timesteps(table, jump_length=length, jump_n_sample=jumps)
    schedule, mask, y = dj.from_betas(scheduler.betas.double().numpy()), np.zeros(SHAPE, bool), 0.3 * START[::-1]
    mask[:, 0] = True
    x, y = START.astype(np.float32), y.astype(np.float32)
    coarse = np.float32(np.arange(table, -1, -length) / table)

    def normal(key: Any) -> np.ndarray:
        return np.asarray(jax.random.normal(key, SHAPE))

    def small_step(key: Any) -> np.ndarray:
        return np.where(mask, normal(jax.random.fold_in(key, 0)), normal(jax.random.fold_in(key, 1)))

    draws = []
    for block in range(table // length):
        key = jax.random.fold_in(jax.random.key(min(block, 1)), max(block - 1, 0))
        top = table - block * length  # indices above this block are done with
        for jump in range(jumps if block else 1):
            each = jax.random.fold_in(key, jump)
            if jump:
                beta = scheduler.betas.double().numpy()[top - length : top]
                share = np.sqrt((1 - np.prod(1 - beta)) / beta[-1])
                draws += [np.zeros(SHAPE)] * (length - 1) + [share * normal(jax.random.fold_in(each, length))]
            draws += [small_step(jax.random.fold_in(each, i)) for i in range(length)]
    feed = iter(draws)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: torch.from_numpy(np.float32(next(feed))))

    x_t, before = torch.from_numpy(x), table
    for t in scheduler.timesteps:  # as in RePaintPipeline
        if t < before:
            abar = float(scheduler.alphas_cumprod[t])
            eps = posterior_means(x_t.double().numpy(), np.sqrt(abar), np.sqrt(1 - abar))[1]
            out = torch.from_numpy(eps.astype(np.float32))
            x_t = scheduler.step(out, t, x_t, torch.from_numpy(y), torch.from_numpy(np.float32(mask))).prev_sample
        else:
            x_t = scheduler.undo_step(x_t, before)
        before = t
    assert next(feed, None) is None

    @jax.jit
    def go(x: Array, coarse: Array) -> Array:
        denoiser, inner = mixtures.denoiser(LAW, schedule), ddim(schedule, 1.0)
        first, rest = (repaint(inner, schedule, jnp.asarray(y), jnp.asarray(mask), n, length) for n in (1, jumps))
        x = dj.sample(jax.random.key(0), first, denoiser, x, coarse[:2])
        return dj.sample(jax.random.key(1), rest, denoiser, x, coarse[1:])

    error = np.abs(np.asarray(go(x, coarse)) - x_t.numpy()).max() / np.std(x_t.numpy())
    print(f"RePaint: {error:.1e}")
    assert error <= 1e-5


# --- grids ------------------------------------------------------------------------------------------------------------


def of_times(name: str, **options: Any) -> Callable[[], np.ndarray]:
    """Their `timesteps`, which are indices, as our times."""

    def read() -> np.ndarray:
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(STEPS)
        return (scheduler.timesteps.double().numpy() + 1) / 1000

    return read


def of_levels(name: str, n: int = STEPS, **options: Any) -> Callable[[], np.ndarray]:
    """Their `sigmas`."""

    def read() -> np.ndarray:
        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(n)
        return scheduler.sigmas.numpy()

    return read


def shifted_flow() -> np.ndarray:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS))
    return scheduler.sigmas.numpy()


def ends() -> tuple[float, float]:
    """The least and the largest level of their table, which is rounded to float32: the least by 8e-5 of itself."""
    abar = diffusers.DDPMScheduler().alphas_cumprod.numpy()
    return tuple((((1 - abar) / abar) ** 0.5)[[0, -1]].tolist())


GRIDS: dict[str, tuple[Callable[[], np.ndarray], Callable[[], Array | np.ndarray]]] = {
    "leading": (of_times("DDIMScheduler"), lambda: times.leading(STEPS)[:-1]),
    "leading, offset 1": (of_times("DDIMScheduler", steps_offset=1), lambda: times.leading(STEPS, offset=1)[:-1]),
    "trailing": (of_times("DDIMScheduler", timestep_spacing="trailing"), lambda: times.trailing(STEPS)[:-1]),
    "linspace": (of_times("EulerDiscreteScheduler"), lambda: times.uniform(STEPS - 1, 1.0, 0.001)),
    "karras, EDM": (of_levels("EDMEulerScheduler"), lambda: times.karras(STEPS)),
    "exponential, EDM": (
        of_levels("EDMEulerScheduler", sigma_schedule="exponential"),
        lambda: times.exponential(STEPS),
    ),
    "karras": (
        of_levels("EulerDiscreteScheduler", use_karras_sigmas=True, beta_start=1e-4, beta_end=0.02),
        lambda: times.karras(STEPS, *ends()),
    ),
    "exponential": (
        of_levels("EulerDiscreteScheduler", use_exponential_sigmas=True, beta_start=1e-4, beta_end=0.02),
        lambda: times.exponential(STEPS, *ends()),
    ),
    "lu lambdas": (
        of_levels("DPMSolverMultistepScheduler", use_lu_lambdas=True),
        lambda: times.exponential(STEPS, *ends()),
    ),
    "log SNR": (
        of_levels("EulerDiscreteScheduler", use_exponential_sigmas=True, beta_start=1e-4, beta_end=0.02),
        lambda: levels_at(times.logsnr_uniform(STEPS, SCALINGS["table"], 1.0, 0.001)),
    ),
    "beta, in sigma": (
        of_levels("EulerDiscreteScheduler", use_beta_sigmas=True, beta_start=1e-4, beta_end=0.02),
        lambda: np.append(ends()[0] + (ends()[1] - ends()[0]) * times.beta_quantile(STEPS - 1), 0),
    ),
    "shifted flow": (shifted_flow, lambda: shifted(dj.rectified(), 3.0)(times.uniform(STEPS)).sigma),
    "AYS sd15": (lambda: ays("StableDiffusionSigmas"), lambda: times.align_your_steps(11, "sd15")[:-2]),
    "AYS sdxl": (lambda: ays("StableDiffusionXLSigmas"), lambda: times.align_your_steps(11, "sdxl")[:-2]),
    "AYS svd": (lambda: ays("StableDiffusionVideoSigmas"), lambda: times.align_your_steps(11, "svd")[:-2]),
}


def levels_at(t: Array) -> Array:
    alpha, sigma = SCALINGS["table"](t)
    return sigma / alpha


def ays(name: str) -> np.ndarray:
    """Without the last, which is 0 there and the model's smallest level in the paper."""
    return np.array(diffusers.schedulers.AysSchedules[name][:-1])


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name: str) -> None:
    expected, got = (read() for read in GRIDS[name])
    np.testing.assert_allclose(got, expected, rtol=1e-4 if name == "log SNR" else 1e-5, atol=1e-7)
