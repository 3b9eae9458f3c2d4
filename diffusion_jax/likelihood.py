r"""Likelihoods: probability flow, variational bound, I-MMSE integral, bits per dimension.

In the angle phi = atan2(sigma, alpha) in [0, pi/2], with y = x / n, n = sqrt(alpha^2 + sigma^2), the flow is

    dy/dphi = v_hat(y) = cos(phi) eps_hat - sin(phi) x0_hat                                   (1)
    log p_s(x_s) = log p_T(x_T) + d log(n_T / n_s) + int_phi_s^phi_T div v_hat dphi           (2)

(Salimans & Ho 2022, arXiv:2202.00512, appendix D; Song et al. 2021, arXiv:2011.13456, eq. 39). v is finite at both ends
of every schedule, sigma = 0 and alpha = 0, and so is the error from which all else here is made, with l = log SNR:

    E(l) = E_eps |v_hat - v|^2,  v = cos(phi) eps - sin(phi) x0;  |eps_hat - eps|^2 = S(l) |v_hat - v|^2     (3)

where S is the logistic function. From a time T of little signal to a time 0 of little noise, over s < t in between,

    -log p(x0) <= KL(q(x_T | x0) || p(x_T)) + sum KL(q(x_s | x_t, x0) || p(x_s | x_t)) - E log p(x0 | x_0)   (4)
    KL(q(x_s | x_t, x0) || p(x_s | x_t)) = 1/2 (SNR_s - SNR_t) / (1 + SNR_t) E(l_t)           (5)
    sum of (5) -> 1/2 int S(l) E(l) dl  as the grid is refined                                (6)

(Ho et al. 2020, arXiv:2006.11239, eq. 5; Kingma et al. 2021, arXiv:2107.00630, eq. 11-17); in (5) p has the variance of
q. For the best denoiser the integral over all l is exact, for each x0 (Guo, Shamai & Verdu 2005, arXiv:cs/0412108, in
the mean; Kong et al. 2023, arXiv:2302.03792):

    -log p(x0) = d/2 log(2 pi e) - 1/2 int S(l) (d - E(l)) dl                                 (7)

Everything is in nats per example, f32[b], summed over its axes, until `bits_per_dim`. Times decrease from noise to
data, as in `sample`; the prior is that of `forward.prior`. What needs E_eps takes a `NoiseRule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from diffusion_jax.forward import q_sample
from diffusion_jax.ops import bcast, dot, fold, is_concrete, normal_like, wide
from diffusion_jax.schedules import inverse_logsnr, logsnr, rates
from diffusion_jax.typing import AlphaSigma, Array, Cond, Denoiser, Key, Prediction, Schedule

EIGHT_BIT = 2 / 255
"""Width of a bin of 8-bit data in [-1, 1], value / 127.5 - 1."""
NoiseRule = Callable[[Key, Array], tuple[Array, Array]]
"""(key, x0: f32[b *d]) -> eps: f32[m b *d] and weight: f32[m], so that E f(eps) ~ sum_j weight_j f(eps_j)."""
Decoder = Callable[[Array, Array, Array], Array]
"""(x0, mean, log_std) -> log p(x0) of every element: f32[b *d] all."""
Dequantiser = Callable[[Key, Array], tuple[Array, Array]]
"""(key, x: f32[b *d]) -> y ~ q(y | x), f32[b *d], and log q(y | x), f32[b]."""
State = tuple[Array, Array]
Field = Callable[[State, Array], State]
RUNGE_KUTTA = ((0, 1 / 2, 1 / 2, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


class FlowDensity(NamedTuple):
    """Log density at times[-1], f32[b]; x where the flow arrives at times[0], f32[b *d]; steps taken, i32[b]."""

    log_density: Array
    x: Array
    steps: Array


def ode_log_density(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Array,
    times: Array,
    cond: Cond = None,
    *,
    probes: Array | None = None,
    chunk: int = 64,
    data_variance: float = 0.0,
    tolerance: tuple[float, float] | None = None,
) -> FlowDensity:
    """Log density of x: f32[b *d] under the model's law at t = times[-1], eq. (2).

    That is the law of alpha x0 + sigma eps: of the data if sigma = 0 there. From it x follows the flow up to times[0]
    and the prior N(0, sigma^2 + alpha^2 data_variance): with a fourth-order Runge-Kutta step in phi, four evaluations,
    for each interval of times: f32[n + 1]; or, given `tolerance = (rtol, atol)` on x and on the log density, with
    adaptive steps of each example (Dormand-Prince, NaN after 4096), and then only the ends of times count. The
    divergence is exact, by d products with the Jacobian, `chunk` at a time, or estimated with `hutchinson_probes`,
    f32[n b *d]. The state is float32 at least. ValueError for times that do not decrease or probes of another shape.
    """
    if probes is not None and probes.shape[1:] != x.shape:
        raise ValueError(f"ode_log_density: probes of shape {probes.shape} for x of shape {x.shape}: expected [n, *x]")
    up = _check_times("ode_log_density", times)[::-1]
    n_s, n_T = jnp.hypot(*schedule(up[0])), jnp.hypot(*schedule(up[-1]))
    y = x.astype(wide(x))
    state = y / bcast(n_s, y), jnp.zeros(len(y), y.dtype)
    field = partial(_field, denoiser, schedule, x.dtype, chunk)
    if tolerance is None:
        y, trace = _runge_kutta(field(cond, probes), schedule, state, up)
        steps = jnp.full(len(x), len(times) - 1, jnp.int32)
    else:
        alone = jax.tree.map(lambda a: a[:, None], (state, cond))
        probes = None if probes is None else jnp.moveaxis(probes, 1, 0)[:, :, None]
        solve = jax.vmap(lambda state, *given: _adaptive(field(*given), schedule, state, up, tolerance))
        y, trace, steps = jax.tree.map(lambda a: jnp.squeeze(a, 1), solve(*alone, probes))
    x, d = bcast(n_T, y) * y, math.prod(y.shape[1:])
    scale = bcast(d * jnp.log(n_T / n_s), trace)
    return FlowDensity(prior_log_density(schedule, x, times[0], data_variance) + scale + trace, x, steps)


def hutchinson_probes(key: Key, x: Array, n: int, kind: Literal["rademacher", "gaussian"] = "rademacher") -> Array:
    """n random vectors u with E u u^T = I for each example, f32[n b *d], so that E u^T J u = tr J.

    One set serves a whole trajectory (Grathwohl et al. 2019, arXiv:1810.01367, section 3.1). ValueError for n < 1 or an
    unknown kind.
    """
    if n < 1 or kind not in ("rademacher", "gaussian"):
        raise ValueError(f"hutchinson_probes: n >= 1 and kind 'rademacher' or 'gaussian', got {n} and {kind!r}")
    z = _draws(key, x.astype(wide(x)), n)
    return z if kind == "gaussian" else jnp.where(z < 0, -1, 1).astype(z.dtype)


def prior_log_density(schedule: Schedule, x: Array, t: Array, data_variance: float = 0.0) -> Array:
    """Log density of N(0, sigma_t^2 + alpha_t^2 data_variance) at x: f32[b]; with 0, of `forward.prior`. t: f32[]."""
    (alpha, sigma), squares = schedule(t), dot(x, x)
    variance = bcast(sigma**2 + alpha**2 * data_variance, squares)
    return -0.5 * (squares / variance + math.prod(x.shape[1:]) * jnp.log(2 * math.pi * variance))


def antithetic(pairs: int) -> NoiseRule:
    """Pairs of draws eps and -eps of equal weight: unbiased, and exact for odd f."""

    def rule(key: Key, x0: Array) -> tuple[Array, Array]:
        eps = _draws(key, x0, pairs)
        return jnp.concatenate([eps, -eps]), jnp.full(2 * pairs, 0.5 / pairs)

    return rule


def frames(pairs: int) -> NoiseRule:
    """Pairs of random orthogonal frames, +-r q_i for i = 1..d, one on each of two radii: 4 d nodes a pair. For small d.

    r^2 = d + 2 -+ sqrt(2 d + 4) with weights 1/2 +- 1 / sqrt(2 d + 4) is the Gauss rule of |eps|^2: exact to degree 7
    in |eps|, with a small bias beyond. Over directions it is unbiased, and without error to degree 3 (after the random
    spherical-radial rules of Genz & Monahan 1998). So E(l) of Gaussian data has no error.
    """

    def rule(key: Key, x0: Array) -> tuple[Array, Array]:
        d, q = math.prod(x0.shape[1:]), _rotations(key, x0, 2 * pairs)
        root = math.sqrt(2 * d + 4)
        radius = jnp.asarray([math.sqrt(d + 2 - root), math.sqrt(d + 2 + root)] * pairs, q.dtype)
        weight = jnp.asarray([0.5 + 1 / root, 0.5 - 1 / root] * pairs) / (2 * d * pairs)
        eps = jnp.reshape(jnp.swapaxes(bcast(radius, q) * q, 1, 2), (-1, *x0.shape)).astype(x0.dtype)
        return jnp.concatenate([eps, -eps]), jnp.tile(jnp.repeat(weight, d), 2)

    return rule


class Terms(NamedTuple):
    """The right side of eq. (4): prior f32[b], diffusion f32[n b] from the noisiest step on, reconstruction f32[b]."""

    prior: Array
    diffusion: Array
    reconstruction: Array

    def total(self) -> Array:
        """The bound on -log p(x0): f32[b]."""
        return self.prior + jnp.sum(self.diffusion, axis=0) + self.reconstruction


def vlb(
    key: Key,
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    times: Array,
    cond: Cond = None,
    *,
    noise: NoiseRule,
    decoder: Decoder | None = None,
) -> Terms:
    """The variational bound (4) term by term, each with noise of its own; times: f32[n + 1].

    The reverse step has the variance of the posterior, or the one that the denoiser learned (`variance_fraction`).
    At times[-1] x0 is decoded from N(x0_hat, (sigma / alpha)^2): as a density, or, with
    `losses.discretized_log_likelihood` for a decoder, as the probability of 8-bit values. The gap to -log p(x0) falls
    as the first power of the steps in l, down to that of the decoder, for Gaussian data of variance v about
    (sigma / alpha)^4 / (4 v^2) a dimension. ValueError for times that do not decrease, or with sigma = 0 at their end.
    """
    times, n = _check_times("vlb", times), len(times) - 1
    last = schedule(times[-1]).sigma
    if is_concrete(last) and float(last) == 0:
        raise ValueError(f"vlb: times of shape {times.shape} must end where sigma > 0")

    def diffusion(step: tuple[Array, Array, Array]) -> Array:
        i, t, s = step
        l_t, l_s = logsnr(schedule, t), logsnr(schedule, s)
        gain = -jnp.exp(l_s) * jnp.expm1(l_t - l_s) / (1 + jnp.exp(l_t))
        widest = 2 * jnp.log(schedule(t).sigma / schedule(s).sigma)

        def kl(eps: Array) -> Array:
            prediction, error = _noised(denoiser, schedule, x0, t, eps, cond)
            v = 0.0 if prediction.variance_fraction is None else prediction.variance_fraction.astype(error.dtype)
            wider = bcast(widest, error) * v  # log variance of p over that of q
            return 0.5 * _sum(wider + jnp.expm1(-wider) + jnp.exp(-wider) * bcast(gain, error) * error)

        return _mean(kl, noise(fold(key, i), x0))

    terms = jax.lax.map(diffusion, (jnp.arange(n), times[:-1], times[1:]))
    decode = partial(_reconstruction, denoiser, schedule, x0, times[-1], cond, decoder)
    return Terms(_prior_kl(schedule, x0, times[0]), terms, _mean(decode, noise(fold(key, n), x0)))


def vdm_loss(denoiser: Denoiser, schedule: Schedule, x0: Array, t: Array, eps: Array, cond: Cond = None) -> Array:
    """The integrand of (6) in t: f32[b], for one draw of eps, 1/2 (-dl/dt) |eps_hat - eps|^2: f32[b].

    Its integral over t, for times in [0, 1] its mean over uniform t, depends on the schedule through its two ends
    alone (Kingma et al. 2021, eq. 17-18). So a learned schedule is trained on the variance: by the gradient of the
    mean of `vdm_loss(...) ** 2` in its parameters.
    """
    at, rate = schedule(t), rates(schedule, t)
    weight = at.alpha * (rate.sigma * at.alpha - rate.alpha * at.sigma) / (at.sigma * (at.alpha**2 + at.sigma**2))
    error = _sum(_noised(denoiser, schedule, x0, t, eps, cond)[1])
    return bcast(weight, error) * error


def vdm_bound(
    key: Key,
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    times: Array,
    cond: Cond = None,
    *,
    draws: int,
    decoder: Decoder | None = None,
) -> Array:
    """Independent, unbiased draws of (4) with (6) for its sum, between the ends of times: f32[draws b].

    Each draws one t and one eps and evaluates twice; the prior and the decoder are those of `vlb`. The mean over the
    first axis has the standard error that `bits_per_dim(-draws, ...)` gives.
    """
    high, low = _check_times("vdm_bound", times)[jnp.asarray([0, -1])]

    def draw(i: Array) -> Array:
        k = fold(key, i)
        eps, u = normal_like(fold(k, 0), x0), norm.cdf(normal_like(fold(k, 1), jnp.zeros(len(x0), times.dtype)))
        loss = vdm_loss(denoiser, schedule, x0, high - (high - low) * u, eps, cond)
        return bcast(high - low, loss) * loss + _reconstruction(denoiser, schedule, x0, low, cond, decoder, eps)

    return _prior_kl(schedule, x0, high)[None] + jax.lax.map(draw, jnp.arange(draws))


def unit_rule(n: int, key: Key | None = None) -> tuple[Array, Array]:
    """Nodes and weights on (0, 1), f32[n] each: Gauss-Legendre, or, with a key, a draw in each of n cells, unbiased."""
    if key is None:
        u, w = np.polynomial.legendre.leggauss(n)
        return jnp.asarray((u + 1) / 2, jnp.result_type(float)), jnp.asarray(w / 2, jnp.result_type(float))
    u = jax.random.uniform(key, (n,))
    return (jnp.arange(n, dtype=u.dtype) + u) / n, jnp.full(n, 1 / n, u.dtype)


def immse_log_density(
    key: Key,
    denoiser: Denoiser,
    schedule: Schedule,
    x0: Array,
    times: Array,
    cond: Cond = None,
    *,
    rule: tuple[Array, Array],
    noise: NoiseRule,
) -> Array:
    """log p(x0) by eq. (7) with u = S(l) for l between the ends of times: f32[b].

    `rule` is for u: `unit_rule(n)` for a quadrature, with a key for importance sampling with logistic l. Past times[0]
    the integral is the prior's divergence, and past times[-1] E - d falls as 1 / SNR: this leaves out what is of second
    order in SNR and in 1 / SNR. Of another denoiser than the best one it is a lower bound, up to that.
    """
    times = _check_times("immse_log_density", times)[jnp.asarray([0, -1])]
    (u, weight), (first, last), d = rule, logsnr(schedule, times), math.prod(x0.shape[1:])
    span = jax.nn.sigmoid(last) - jax.nn.sigmoid(first)
    below = jax.nn.sigmoid(-last) + span * (1 - u)  # 1 - u, without cancellation
    l_t = jnp.log(jax.nn.sigmoid(first) + span * u) - jnp.log(below)
    t = jnp.append(inverse_logsnr(schedule, l_t, times[1], times[0]), times[1])

    def error(step: tuple[Array, Array]) -> Array:
        i, t = step
        return _mean(lambda eps: _sum(_noised(denoiser, schedule, x0, t, eps, cond)[1]), noise(fold(key, i), x0))

    errors = jax.lax.map(error, (jnp.arange(len(t)), t))
    integral = jnp.tensordot((span * weight / below).astype(errors.dtype), d - errors[:-1], 1)
    tail = bcast(jax.nn.sigmoid(last), errors[-1]) * errors[-1]
    ends = bcast(d * (math.log(2 * math.pi) + jnp.log1p(jnp.exp(-last)) - jax.nn.softplus(first)), tail)
    return 0.5 * (integral - tail - ends) - _prior_kl(schedule, x0, times[0])


class BitsPerDim(NamedTuple):
    """A mean, and its standard errors over the examples and over repeated draws (a part of the first): f32[] each."""

    value: Array
    over_examples: Array
    over_draws: Array


def bits_per_dim(log_likelihood: Array, dimensions: int, bin_width: float) -> BitsPerDim:
    """-(log p / d + log bin_width) / log 2 from nats, f32[b], or f32[r b] for r independent draws of each.

    bin_width makes a density the probability of a bin: EIGHT_BIT for data in [-1, 1], which adds log2(127.5) bits; 1
    for what is a probability already, of a discrete decoder or a `dequantised_bound`. The error over draws is 0 for
    f32[b], that over examples NaN for b = 1. ValueError for another rank or bin_width <= 0.

    >>> round(float(bits_per_dim(jnp.zeros(2), 3, EIGHT_BIT).value), 3)
    6.994
    """
    if log_likelihood.ndim not in (1, 2) or bin_width <= 0:
        raise ValueError(f"bits_per_dim: f32[b] or f32[r b] and width > 0, got {log_likelihood.shape}, {bin_width}")
    bits = -(jnp.atleast_2d(log_likelihood) / dimensions + math.log(bin_width)) / math.log(2)
    r, b = bits.shape
    draws = jnp.sqrt(jnp.mean(jnp.var(bits, axis=0, ddof=1)) / (r * b)) if log_likelihood.ndim == 2 else jnp.zeros(())
    return BitsPerDim(jnp.mean(bits), jnp.std(jnp.mean(bits, axis=0), ddof=1) / math.sqrt(b), draws)


def uniform_dequantiser(bin_width: float) -> Dequantiser:
    """y = x + bin_width (u - 1/2) with u uniform (Ho et al. 2019, arXiv:1902.00275, section 3.1)."""

    def dequantise(key: Key, x: Array) -> tuple[Array, Array]:
        log_q = -math.prod(x.shape[1:]) * math.log(bin_width)
        return x + bin_width * (norm.cdf(normal_like(key, x)) - 0.5), jnp.full(len(x), log_q)

    return dequantise


def dequantised_bound(
    key: Key, dequantiser: Dequantiser, log_density: Callable[[Array], Array], x: Array, draws: int
) -> Array:
    """log p(y) - log q(y | x), y ~ q: f32[draws b], with a mean below the log probability of the bin of x.

    The gap is KL(q(y | x) || p(y | x)): none in any draw when q is the model's law inside the bin, as variational
    dequantisation learns (Ho et al. 2019, section 3.1). q must put nothing outside the bin of x.
    """

    def draw(i: Array) -> Array:
        y, log_q = dequantiser(fold(key, i), x)
        return log_density(y) - log_q

    return jax.lax.map(draw, jnp.arange(draws))


def _field(
    denoiser: Denoiser, schedule: Schedule, dtype: jnp.dtype, chunk: int, cond: Cond, probes: Array | None
) -> Field:
    """((y, _), t: f32[]) -> v_hat and its divergence in y, eq. (1)."""

    def field(state: State, t: Array) -> State:
        y, at = state[0], schedule(t)
        t, d = jnp.broadcast_to(t, y.shape[:1]), math.prod(y.shape[1:])

        def v_hat(y: Array) -> Array:
            return _velocity(at, denoiser((bcast(jnp.hypot(*at), y) * y).astype(dtype), t, cond)).astype(y.dtype)

        v, push = jax.linearize(v_hat, y)

        def diagonal(i: Array) -> Array:
            unit = jnp.reshape(jnp.arange(d) == i, y.shape[1:]).astype(y.dtype)
            return dot(jnp.broadcast_to(unit, y.shape), push(jnp.broadcast_to(unit, y.shape)))

        if probes is None:
            return v, jnp.sum(jax.lax.map(diagonal, jnp.arange(d), batch_size=min(chunk, d)), axis=0)
        along = jax.lax.map(lambda u: dot(u, push(u)), probes, batch_size=min(chunk, len(probes)))
        return v, jnp.mean(along, axis=0)

    return field


def _runge_kutta(field: Field, schedule: Schedule, state: State, up: Array) -> State:
    angle = jnp.arctan2(*schedule(up)[::-1])
    middle = inverse_logsnr(schedule, _logsnr_of_angle((angle[1:] + angle[:-1]) / 2), up[:-1], up[1:])

    def add(a: State, c: Array, b: State) -> State:
        return a[0] + bcast(c, a[0]) * b[0], a[1] + bcast(c, a[1]) * b[1]

    def step(state: State, interval: tuple[Array, Array]) -> tuple[State, None]:
        def stage(carry: tuple[State, State], tableau: tuple[Array, Array, Array]) -> tuple[tuple[State, State], None]:
            (k, new), (lag, share, t) = carry, tableau
            k = field(add(state, lag * h, k), t)
            return (k, add(new, share * h, k)), None

        h, times = interval
        start = jax.tree.map(jnp.zeros_like, state), state
        return jax.lax.scan(stage, start, (*jnp.asarray(RUNGE_KUTTA, h.dtype), times))[0][1], None

    return jax.lax.scan(step, state, (jnp.diff(angle), jnp.stack([up[:-1], middle, middle, up[1:]], axis=1)))[0]


def _adaptive(
    field: Field, schedule: Schedule, state: State, up: Array, tolerance: tuple[float, float]
) -> tuple[Array, Array, Array]:
    import diffrax

    def rate(angle: Any, state: State, _: None) -> State:
        return field(state, inverse_logsnr(schedule, _logsnr_of_angle(angle), up[0], up[-1]))

    low, high = jnp.arctan2(*schedule(up[jnp.asarray([0, -1])])[::-1])
    solver, term = diffrax.Dopri5(), diffrax.ODETerm(rate)
    control = diffrax.PIDController(*tolerance, norm=lambda e: jnp.maximum(*(jnp.sqrt(jnp.mean(a**2)) for a in e)))
    out = diffrax.diffeqsolve(term, solver, low, high, None, state, stepsize_controller=control, throw=False)
    y, trace = jax.tree.map(lambda a: a[0], out.ys)
    done = out.result == diffrax.RESULTS.successful
    return y, jnp.where(done, trace, jnp.nan), jnp.full(1, out.stats["num_steps"], jnp.int32)


def _noised(
    denoiser: Denoiser, schedule: Schedule, x0: Array, t: Array, eps: Array, cond: Cond
) -> tuple[Prediction, Array]:
    """The prediction from x_t, and the squared error of v of each element, eq. (3)."""
    at = schedule(t)
    prediction = denoiser(q_sample(schedule, x0, t, eps), jnp.broadcast_to(t, x0.shape[:1]), cond)
    error = _velocity(at, prediction) - _velocity(at, Prediction(x0, eps))
    return prediction, error.astype(wide(error)) ** 2


def _prior_kl(schedule: Schedule, x0: Array, t: Array) -> Array:
    """KL(N(alpha_t x0, sigma_t^2) || N(0, sigma_t^2)): f32[b]."""
    squares = dot(x0, x0)
    return 0.5 * bcast(jnp.exp(logsnr(schedule, t)), squares) * squares


def _reconstruction(
    denoiser: Denoiser, schedule: Schedule, x0: Array, t: Array, cond: Cond, decoder: Decoder | None, eps: Array
) -> Array:
    """-log p(x0 | x_t): f32[b]; without a decoder that of a Gaussian, by eq. (3)."""
    prediction, error = _noised(denoiser, schedule, x0, t, eps, cond)
    l_t = bcast(logsnr(schedule, t), error)
    if decoder is not None:
        return -_sum(decoder(x0, prediction.x0, jnp.broadcast_to(-0.5 * l_t, x0.shape).astype(x0.dtype)))
    return 0.5 * _sum(jax.nn.sigmoid(l_t) * error + math.log(2 * math.pi) - l_t)


def _mean(f: Callable[[Array], Array], nodes: tuple[Array, Array]) -> Array:
    values = jax.lax.map(f, nodes[0], batch_size=min(16, len(nodes[0])))
    return jnp.tensordot(nodes[1].astype(values.dtype), values, 1)


def _draws(key: Key, x: Array, n: int) -> Array:
    return jax.vmap(lambda i: normal_like(fold(key, i), x))(jnp.arange(n))


def _rotations(key: Key, x0: Array, n: int) -> Array:
    """Uniform up to signs, f32[n b d d], by reflections (Stewart 1980): QR of jaxlib can hang in loops on the CPU."""
    d = math.prod(x0.shape[1:])
    g = _draws(key, jnp.zeros((len(x0), d, d), wide(x0)), n)

    def reflect(k: Array, q: Array) -> Array:
        v = jnp.where(jnp.reshape(jnp.arange(d) < k, (1, 1, d)), 0, g[:, :, k])
        v = v.at[:, :, k].add(jnp.copysign(jnp.linalg.norm(v, axis=-1), v[:, :, k]))
        v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
        return q - 2 * jnp.einsum("nbij,nbj,nbk->nbik", q, v, v)

    return jax.lax.fori_loop(0, d, reflect, jnp.broadcast_to(jnp.eye(d, dtype=g.dtype), g.shape))


def _velocity(at: AlphaSigma, prediction: Prediction) -> Array:
    (x0, eps), n = prediction[:2], jnp.hypot(*at)
    return bcast(at.alpha / n, eps) * eps - bcast(at.sigma / n, x0) * x0


def _logsnr_of_angle(angle: Array) -> Array:
    return 2 * (jnp.log(jnp.maximum(jnp.cos(angle), 0)) - jnp.log(jnp.sin(angle)))  # cos rounds below 0 at pi / 2


def _sum(x: Array) -> Array:
    return jnp.sum(jnp.reshape(x.astype(wide(x)), (len(x), -1)), axis=1)


def _check_times(name: str, times: Array) -> Array:
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name}: times must be f32[n + 1] with n >= 1, got shape {times.shape}")
    if is_concrete(times) and not bool(np.all(np.diff(np.asarray(times)) < 0)):
        raise ValueError(f"{name}: times of shape {times.shape} must decrease, from noise to data as in `sample`")
    return times
