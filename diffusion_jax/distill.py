r"""Losses of few-step models: students of a teacher, and students of the data alone.

Along the probability flow dx/dt = v(x, t) = E[alpha' x0 + sigma' eps | x], which carries x_t to x_s,

    consistency function   f(x_t, t) = x_0 = f(x_s, s),            df/dt = 0                       (1)
    average velocity       u(x_t, t, s) = (x_s - x_t) / (s - t),   u + (t - s) du/dt = v           (2)
                           u(x_t, t, s) = (u(x_t, t, m) + u(x_m, m, s)) / 2,  m = (t + s) / 2      (3)

with d/dt = v d/dx + d/dt at fixed s. A consistency model is a `Denoiser` whose x0 is f; a model of (2) is a
function (x, t, s, cond) -> u, which `average_velocity_map` turns into a `FlowMap`. Each loss has one side of
such an identity as its target, under stop_gradient (sg), and returns one value per example, f32[b]:

    metric(student - sg(target)),   to be weighted by any function of the times                    (4)

Without a teacher, v is replaced by the velocity alpha' x0 + sigma' eps of the drawn pair, whose mean given x_t is v.
The target is linear in it, so `squared_error` leaves the minimum where it was. What weighs an example by its own error
(`pseudo_huber`, `adaptive_error`, the normalized tangent of `continuous_consistency_loss`) does so only where x0 given
x_t is symmetric, as for Gaussian data; elsewhere it moves the minimum, which those papers accept. Times are f32[b].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from diffusion_jax.denoisers import BoundNet
from diffusion_jax.forward import q_sample
from diffusion_jax.ops import bcast, dot, is_concrete, mean_per_example
from diffusion_jax.predictions import TO, Predicts, from_velocity, from_x0, lookup, to_velocity
from diffusion_jax.schedules import rates
from diffusion_jax.times import Draw
from diffusion_jax.typing import AlphaSigma, Array, Cond, Denoiser, FlowMap, Key, Prediction, Sampler, Schedule

AverageVelocity = Callable[[Array, Array, Array, Cond], Array]
"""(x: f32[b *d], t: f32[b], s: f32[b], cond) -> u: f32[b *d], eq. (2); at s = t the velocity itself."""
Metric = Callable[[Array], Array]
"""error: f[b *d] -> f32[b]."""


def average_velocity_map(velocity: AverageVelocity) -> FlowMap:
    """The flow map of an average velocity, eq. (2): x_s = x + (s - t) u(x, t, s)."""
    return lambda x, t, s, cond=None: x + bcast(s - t, x) * velocity(x, t, s, cond)


def average_velocity_denoiser(velocity: AverageVelocity, schedule: Schedule) -> Denoiser:
    """The denoiser inside an average velocity: u(x, t, t) is the velocity of the flow."""
    return lambda x, t, cond=None: from_velocity(schedule, x, t, velocity(x, t, t, cond))


def solver_map(sampler: Sampler, denoiser: Denoiser, steps: int = 1) -> FlowMap:
    """The flow map of a teacher: `steps` equal steps of a deterministic sampler from each example's t to its s."""

    def one(x: Array, t: Array, s: Array, cond: Cond) -> Array:
        x, cond = jax.tree.map(lambda a: a[None], (x, cond))
        times = t + (s - t) * jnp.linspace(0, 1, steps + 1, dtype=t.dtype)
        unused = jax.random.key(0)

        def denoise(x: Array, t: Array) -> Prediction:
            return denoiser(x, jnp.reshape(t, (1,)), cond)

        def body(carry: tuple, ends: tuple[Array, Array]) -> tuple[tuple, None]:
            return sampler.step(unused, carry[0], carry[1], ends[0], ends[1], denoise), None

        return jax.lax.scan(body, (x, sampler.init(x)), (times[:-1], times[1:]))[0][0][0]

    return lambda x, t, s, cond=None: jax.vmap(one)(x, t, s, cond)


def consistency_precondition(
    net: BoundNet, schedule: Schedule, sigma_min: float = 0.002, sigma_data: float = 0.5
) -> Denoiser:
    """A consistency model from a bound network F, with f(x, t) = x / alpha where sigma_t / alpha_t = sigma_min.

    f = c_skip x + c_out F(c_in x, log(sigma) / 4), in EDM's variables sigma = sigma_t / alpha_t and x / alpha_t:
    c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2), c_out = sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2) and
    c_in = 1 / sqrt(sigma^2 + sd^2) (Song et al. 2023, arXiv:2303.01469, eq. 5 and appendix C). `sigma_min` may be 0.
    It is not among the other preconditionings since a denoiser, unlike f, is not the identity at sigma_min.
    """

    def denoiser(x: Array, t: Array, cond: Cond = None) -> Prediction:
        alpha, sigma = schedule(t)
        norm = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
        above = sigma - alpha * sigma_min
        noise = jnp.log(jnp.maximum(sigma / alpha, jnp.finfo(sigma.dtype).tiny)) / 4
        skip = alpha * sigma_data**2 / (above**2 + (alpha * sigma_data) ** 2)
        out = net(bcast(1 / norm, x) * x, noise, cond)
        return from_x0(schedule, x, t, bcast(skip, x) * x + bcast(sigma_data * above / norm, x) * out)

    return denoiser


def squared_error(error: Array) -> Array:
    """The mean of the squares over all axes but the first."""
    return dot(error, error) / error[0].size


def pseudo_huber(c: float | None = None) -> Metric:
    """sqrt(|e|^2 + c^2) - c, with c = 0.00054 sqrt(d) (Song & Dhariwal 2023, arXiv:2310.14189, table 1)."""

    def metric(error: Array) -> Array:
        size = 0.00054 * np.sqrt(error[0].size).item() if c is None else c
        return jnp.sqrt(dot(error, error) + size**2) - size

    return metric


def adaptive_error(power: float = 1.0, c: float = 1e-3) -> Metric:
    """|e|^2 / sg(|e|^2 + c)^power (Geng et al. 2025, arXiv:2505.13447, section 4.3); power 0 is the sum of squares."""

    def metric(error: Array) -> Array:
        square = dot(error, error)
        return square / stop_gradient(square + c) ** power

    return metric


def doubling_levels(step: ArrayLike, steps: int, first: int = 10, last: int = 1280) -> Array:
    """Number of noise levels at a training step: doubled at equal intervals from `first` + 1 to `last` + 1.

    N(k) = min(first 2^floor(k / K'), last) + 1 with K' = floor(K / (log2(floor(last / first)) + 1)) and K = `steps`
    (Song & Dhariwal 2023, table 1). `step` may be traced.
    """
    period = int(steps / (np.log2(last // first) + 1))
    if period < 1:
        raise ValueError(f"doubling_levels: {steps} steps are too few to go from {first} to {last} levels")
    doublings = jnp.minimum(jnp.asarray(step) // period, int(np.ceil(np.log2(last / first))))
    return jnp.minimum(first * 2**doublings, last) + 1


def draw_levels(
    mean: float = -1.1, std: float = 2.0, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Callable[[Key, int, ArrayLike], tuple[Array, Array]]:
    """Neighbours (t, s) of Karras' grid of n levels, (key, b, n) -> two f32[b]: the times of consistency training.

    A pair is drawn with the mass that the log-normal law of sigma has between its two levels (Song & Dhariwal 2023,
    table 1). n may be traced: one compilation for the whole of `doubling_levels`. Times are noise levels, as of `edm`.
    """
    low, high = ((np.log(sigma).item() - mean) / std for sigma in (sigma_min, sigma_max))
    bottom, top = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def draw(key: Key, b: int, n: ArrayLike) -> tuple[Array, Array]:
        sigma = jnp.exp(mean + std * jax.random.truncated_normal(key, low, high, (b,)))
        last = jnp.asarray(n, sigma.dtype) - 1
        i = jnp.clip(jnp.floor((sigma ** (1 / rho) - bottom) / (top - bottom) * last), 0, last - 1)
        t, s = ((bottom + j / last * (top - bottom)) ** rho for j in (i + 1, i))
        return t, s

    return draw


def draw_two_times(draw: Draw, apart: float = 0.25) -> Callable[[Key, int], tuple[Array, Array]]:
    """Two draws in order, (key, b) -> (t, s), but s = t for all but a share `apart` (Geng et al. 2025, section 4.3)."""

    def draw_both(key: Key, b: int) -> tuple[Array, Array]:
        one, two, three = jax.random.split(key, 3)
        a, c = draw(one, b), draw(two, b)
        t = jnp.maximum(a, c)
        return t, jnp.where(jax.random.uniform(three, (b,)) < apart, jnp.minimum(a, c), t)

    return draw_both


def progressive_distillation_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    target: Predicts = "v",
) -> Array:
    """One DDIM step of the student from t to s is to be two of the teacher.

    (Salimans & Ho 2022, arXiv:2202.00512, algorithm 2.) The step that ends where the teacher's end has x0 =
    (x_s - sigma_s / sigma_t x_t) / (alpha_s - sigma_s / sigma_t alpha_t), and the student is compared with it as
    `target`: of a variance preserving schedule, v is the paper's SNR + 1 weighting of x0.
    """
    _check("progressive_distillation_loss", x0, t, s)
    x_t, m, y = q_sample(schedule, x0, t, eps), (t + s) / 2, lookup(TO, target)
    x_m = _ddim(schedule, _same("teacher", teacher(x_t, t, cond).x0, x_t), x_t, t, m)
    x_s = _ddim(schedule, teacher(x_m, m, cond).x0, x_m, m, s)
    (a_t, s_t), (a_s, s_s) = schedule(t), schedule(s)
    scale = s_t * a_s - s_s * a_t
    exact = from_x0(schedule, x_t, t, bcast(s_t / scale, x_t) * x_s - bcast(s_s / scale, x_t) * x_t)
    return squared_error(y(schedule, student(x_t, t, cond), t) - stop_gradient(y(schedule, exact, t)))


def consistency_distillation_loss(
    student: Denoiser,
    teacher: FlowMap,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    ema: Denoiser | None = None,
    metric: Metric = squared_error,
) -> Array:
    """f(x_t, t) against sg f(x_s, s), with x_s where the teacher's flow carries x_t (Song et al. 2023, algorithm 2).

    teacher: a step of a solver, for example `solver_map(heun(schedule), denoiser)`, whose error becomes the student's.
    ema: the student with averaged parameters, None for the student itself. Where sigma_s = 0, f is x_s / alpha_s.
    """
    _check("consistency_distillation_loss", x0, t, s)
    x_t = q_sample(schedule, x0, t, eps)
    x_s = _same("teacher", teacher(x_t, t, s, cond), x_t)
    f = _same("student", student(x_t, t, cond).x0, x_t)
    alpha, sigma = schedule(s)
    target = jnp.where(bcast(sigma, x_s) > 0, (ema or student)(x_s, s, cond).x0, bcast(1 / alpha, x_s) * x_s)
    return metric(f - stop_gradient(target))


def consistency_training_loss(
    student: Denoiser,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    ema: Denoiser | None = None,
    metric: Metric = squared_error,
) -> Array:
    """f(x_t, t) against sg f(x_s, s), both of the same x0 and eps (Song et al. 2023, arXiv:2303.01469, algorithm 3).

    The gradient is that of distillation from the true flow, itself O(t - s), up to O((t - s)^2).
    Improved consistency training (Song & Dhariwal 2023) has `metric=pseudo_huber()`, weight 1 / (t - s), and times
    `draw_levels()(key, b, doubling_levels(step, steps))`. Easy consistency tuning (Geng et al. 2024) has
    s = `easy_mapping(t, stage)` and weight 1 / (t - s); its adaptive weight is `pseudo_huber(c)`'s gradient, doubled.
    """
    _check("consistency_training_loss", x0, t, s)
    x_s = q_sample(schedule, x0, s, eps)
    return consistency_distillation_loss(student, lambda *_: x_s, schedule, x0, t, s, eps, cond, ema=ema, metric=metric)


def easy_mapping(t: Array, stage: ArrayLike, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Array:
    """The earlier time of easy consistency tuning, f32[b] -> f32[b], 0 at first and nearer to t with each stage.

    r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^(stage + 1)) (Geng et al. 2024, arXiv:2406.14548); the paper raises the
    stage at equal intervals of training. t is a noise level, as of `edm`.

    >>> [round(float(easy_mapping(jnp.float32(80.0), stage)), 3) for stage in (0, 1, 7)]
    [40.0, 60.0, 79.688]
    """
    ratio = 1 - (1 + k * jax.nn.sigmoid(-b * t)) / q ** (jnp.asarray(stage, t.dtype) + 1)
    return t * jnp.maximum(ratio, 0)


def continuous_consistency_loss(
    student: Denoiser,
    schedule: Schedule,
    x0: Array,
    t: Array,
    eps: Array,
    cond: Cond = None,
    *,
    sigma_data: float,
    teacher: Denoiser | None = None,
    warmup: ArrayLike = 1.0,
    normalize: float | None = 0.1,
    log_weight: Array | None = None,
) -> Array:
    r"""The continuous-time consistency loss sCM (Lu & Song 2024, arXiv:2410.11081, eq. 8 and algorithm 1).

    exp(w) / d |F - sg(F) - sg(g / (|g| + c))|^2 - w, with c = `normalize` (None: g itself), w = `log_weight` f32[b]
    (the learned w(t), None: 0), sd = `sigma_data`, and cos(a) times the tangent of f = cos(a) z - sin(a) sd F:

        g = -cos^2(a) (sd F - dz/da) - r (cos(a) sin(a) z + sd cos(a) sin(a) dF/da),   r = `warmup`, 0 -> 1

    The paper's angle a, z = cos(a) x0 + sin(a) sd eps and sd F = cos(a) sd eps - sin(a) x0 are those of any schedule
    through tan(a) = sigma / (alpha sd), so that the loss depends on it through the times drawn only. dz/da is the
    teacher's sd F (sCD), or without a teacher that of the pair (sCT).
    """
    _check("continuous_consistency_loss", x0, t)
    x = q_sample(schedule, x0, t, eps)
    truth = Prediction(x0, eps) if teacher is None else teacher(x, t, cond)
    _same("teacher", truth.x0, x)

    def angle(t: Array) -> tuple[Array, Array]:
        alpha, sigma = schedule(t)
        norm = jnp.sqrt((alpha * sigma_data) ** 2 + sigma**2)
        return bcast(alpha * sigma_data / norm, x), bcast(sigma / norm, x)

    def field(prediction: Prediction, t: Array) -> Array:
        cos, sin = angle(t)
        return cos * sigma_data * prediction.eps - sin * prediction.x0

    (alpha, sigma), (d_alpha, d_sigma), (cos, sin) = schedule(t), rates(schedule, t), angle(t)
    dt = alpha * sigma / (alpha * d_sigma - sigma * d_alpha)  # cos(a) sin(a) dt/da
    dx = bcast(dt, x) * to_velocity(schedule, truth, t)
    out, d_out = jax.jvp(lambda x, t: field(student(x, t, cond), t), (x, t), (dx, dt))
    r, z = bcast(jnp.full_like(t, warmup), x), cos * x0 + sin * sigma_data * eps
    g = stop_gradient(-(cos**2) * (out - field(truth, t)) - r * (cos * sin * z + d_out))
    if normalize is not None:
        g = g / bcast(jnp.sqrt(dot(g, g)) + normalize, g)
    loss = squared_error((out - stop_gradient(out)) / sigma_data - g)
    return loss if log_weight is None else jnp.exp(log_weight) * loss - log_weight


def mean_flow_loss(
    student: AverageVelocity,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    null: Cond = None,
    omega: ArrayLike = 1.0,
    kappa: ArrayLike = 0.0,
    metric: Metric = squared_error,
) -> Array:
    """MeanFlow: u against sg(v - (t - s) (v du/dx + du/dt)), s <= t (Geng et al. 2025, arXiv:2505.13447, algorithm 1).

    v is the velocity of the pair. With `null`, the value of cond for "no condition", the student learns the flow guided
    with scale omega / (1 - kappa): v becomes omega v + kappa u(x, t, t, cond) + (1 - omega - kappa) u(x, t, t, null)
    (appendix B.2). The paper's metric is `adaptive_error()`; its times are those of `draw_two_times`.
    """
    _check("mean_flow_loss", x0, t, s, equal=True)
    x, v = q_sample(schedule, x0, t, eps), to_velocity(schedule, Prediction(x0, eps), t)
    if null is not None:
        nulls = jax.tree.map(lambda n, c: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape), null, cond)
        w, k = (bcast(jnp.full_like(t, value), x) for value in (omega, kappa))
        v = stop_gradient(w * v + k * student(x, t, t, cond) + (1 - w - k) * student(x, t, t, nulls))
    u, du = _and_derivative(student, x, t, s, v, cond)
    return metric(u - stop_gradient(v - bcast(t - s, x) * du))


def improved_mean_flow_loss(
    student: AverageVelocity,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    velocity: BoundNet | None = None,
    metric: Metric = squared_error,
) -> Array:
    """Improved MeanFlow: V = u + (t - s) sg(v du/dx + du/dt) against the pair's velocity, a target without the network.

    v inside V is the student's own u(x, t, t), or the output of `velocity`, a head that the caller trains with the
    denoising loss (Geng et al. 2025, arXiv:2512.02012, eq. 12). V depends on x_t alone, so that this is a regression:
    at the minimum the loss is the variance of the pair's velocity given x_t. It needs a share of s = t, where V = u.
    """
    _check("improved_mean_flow_loss", x0, t, s, equal=True)
    x = q_sample(schedule, x0, t, eps)
    v = student(x, t, t, cond) if velocity is None else velocity(x, t, cond)
    u, du = _and_derivative(student, x, t, s, stop_gradient(v), cond)
    return metric(u + bcast(t - s, x) * stop_gradient(du) - to_velocity(schedule, Prediction(x0, eps), t))


def shortcut_loss(
    student: AverageVelocity,
    schedule: Schedule,
    x0: Array,
    t: Array,
    s: Array,
    eps: Array,
    cond: Cond = None,
    *,
    ema: AverageVelocity | None = None,
    smallest: float = 1 / 128,
    metric: Metric = squared_error,
) -> Array:
    """Shortcut models (Frans et al. 2024, arXiv:2410.12557, algorithm 1): one step is to be two of half its length.

    s < t: u(x, t, s) against sg of eq. (3), each half a step of `ema` (the student with averaged parameters, None:
    itself); halves no longer than `smallest` are Euler steps of u(x, t, t), and leave an error of that order.
    s = t: u against the pair's velocity. The paper's batches hold 1/4 of the former, with steps 2^-k.
    """
    _check("shortcut_loss", x0, t, s, equal=True)
    x, m, model = q_sample(schedule, x0, t, eps), (t + s) / 2, ema or student
    euler = t - m <= smallest
    first = model(x, t, jnp.where(euler, t, m), cond)
    x_m = x + bcast(m - t, x) * first
    second = model(x_m, m, jnp.where(euler, m, s), cond)
    target = jnp.where(bcast(s, x) < bcast(t, x), (first + second) / 2, to_velocity(schedule, Prediction(x0, eps), t))
    return metric(student(x, t, s, cond) - stop_gradient(target))


def reflow_pairs(
    teacher: FlowMap, schedule: Schedule, eps: Array, cond: Cond = None, *, start: float = 1.0, end: float = 0.0
) -> tuple[Array, Array]:
    """Couple noise with the data to which a teacher's flow carries it: eps f32[b *d] -> (x0, eps).

    x0 = teacher(sigma(start) eps, start, end). Reflow (Liu et al. 2023, arXiv:2209.03003, algorithm 1) trains on the
    straight lines of these pairs: `denoising_loss(student, rectified(), x0, t, eps, target="velocity")`.
    """
    t, s = (jnp.full(eps.shape[:1], time, np.promote_types(eps.dtype, jnp.float32)) for time in (start, end))
    return stop_gradient(_same("teacher", teacher(bcast(schedule(t).sigma, eps) * eps, t, s, cond), eps)), eps


def optimal_transport_coupling(x0: Array, eps: Array) -> Array:
    """Permute the noises of a batch so that sum |x0_i - eps_i|^2 is least: x0, eps f32[b *d] -> f32[b *d].

    The exact minibatch coupling (Pooladian et al. 2023, arXiv:2304.14772; Tong et al. 2024, arXiv:2302.00482), by
    SciPy's assignment on the host, O(b^3). Both marginals stay what they were. ValueError when the shapes differ.
    """
    if x0.shape != eps.shape:
        raise ValueError(f"optimal_transport_coupling: x0 has shape {x0.shape} and eps {eps.shape}")

    def assign(x0: np.ndarray, eps: np.ndarray) -> np.ndarray:
        from scipy.optimize import linear_sum_assignment

        x0, eps = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x0, eps))
        return linear_sum_assignment(-x0 @ eps.T)[1].astype(np.int32)  # |x0|^2 + |eps|^2 is the same for all pairings

    shape = jax.ShapeDtypeStruct(x0.shape[:1], jnp.int32)
    return eps[jax.pure_callback(assign, shape, stop_gradient(x0), stop_gradient(eps), vmap_method="sequential")]


def distribution_matching_loss(
    x: Array,
    real: Denoiser,
    fake: Denoiser,
    schedule: Schedule,
    t: Array,
    eps: Array,
    cond: Cond = None,
    *,
    weight: Callable[[AlphaSigma], Array] | None = None,
) -> Array:
    """A loss of a generator's samples x: f32[b *d] whose gradient is w (x0_fake - x0_real) / d at the noised x.

    real, fake: denoisers of the data's law and of the generator's current law; the latter is trained with the
    denoising loss on sg(x). w = 1 / mean |x - x0_real| by default (Yin et al. 2023, arXiv:2311.18828, algorithm 2,
    DMD, and DMD2, arXiv:2405.14867; eq. 7-8 of the former have a factor alpha_t more). With `weight=snr_weight`, w =
    (alpha / sigma)^2, the expected gradient is that of KL(generator at t || data at t) per dimension, which is
    Diff-Instruct (Luo et al. 2023, arXiv:2305.18455). The value is mean (w (x0_fake - x0_real))^2 / 2.
    """
    _check("distribution_matching_loss", x, t)
    x_t = q_sample(schedule, stop_gradient(x), t, eps)
    to, away = (_same(name, f(x_t, t, cond).x0, x) for name, f in (("real", real), ("fake", fake)))
    w = 1 / mean_per_example(jnp.abs(x - to)) if weight is None else weight(schedule(t))
    return squared_error(x - stop_gradient(x - bcast(w, x) * (away - to))) / 2


def _and_derivative(u: AverageVelocity, x: Array, t: Array, s: Array, v: Array, cond: Cond) -> tuple[Array, Array]:
    """u and v du/dx + du/dt."""
    value, derivative = jax.jvp(lambda x, t: u(x, t, s, cond), (x, t), (v, jnp.ones_like(t)))
    return _same("student", value, x), derivative


def _ddim(schedule: Schedule, x0: Array, x: Array, t: Array, s: Array) -> Array:
    alpha, sigma = schedule(s)
    return bcast(alpha, x) * x0 + bcast(sigma, x) * from_x0(schedule, x, t, x0).eps


def _same(name: str, y: Array, x: Array) -> Array:
    if y.shape != x.shape:
        raise ValueError(f"the {name} returned {y.shape} for x of shape {x.shape}")
    return y


def _check(name: str, x: Array, t: Array, s: Array | None = None, *, equal: bool = False) -> None:
    shapes = [time.shape for time in (t, s) if time is not None]
    if any(shape != x.shape[:1] for shape in shapes):
        raise ValueError(f"{name}: t and s are one per example, got {shapes} for x of shape {x.shape}")
    late = np.greater if equal else np.greater_equal
    if s is not None and is_concrete(t) and is_concrete(s) and np.any(late(np.asarray(s), np.asarray(t))):
        raise ValueError(f"{name}: a step goes from t to s {'<=' if equal else '<'} t, got t = {t} and s = {s}")
