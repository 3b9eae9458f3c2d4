r"""Inverse problems: samples of p(x0 | y) for y = A x0 + sigma_y n, from a denoiser of p(x0).

Every method is a function from samplers to samplers or from denoisers to denoisers, so that any operator goes with any
sampler; for a latent model `operators.latent` is the operator. y is f[b *e], or f[1 *e] for the whole batch. At
x = alpha x0 + sigma eps, with x0^ the denoiser's estimate, J = d x0^ / d x and r = y - A x0^:

    E[x0 | x, y] = x0^ + sigma^2 / alpha grad_x log p(y | x),  and eps - sigma grad_x log p(y | x)        (1)
    p(y | x) ~ N(A x0^, sigma_y^2 + A C A^T),   C ~ Cov[x0 | x] = sigma^2 / alpha J                       (2)
    grad_x log p(y | x) ~ J^T A^T (sigma_y^2 + A C A^T)^-1 r                                              (3)

(1) and the last equality of (2) are Tweedie's formulas for a perfect denoiser. What the methods put in (3):

    method    C                                      exact for
    DPS       0, and a size of the step to be tuned  -
    Pi-GDM    v sigma^2 / (alpha^2 v + sigma^2) I    x0 ~ N(m, v I)
    TMPD      such that A C A^T is diagonal          Gaussian x0 for which it is
    MMPS      sigma^2 / alpha J                      Gaussian x0

The others put the measurement in the place of part of the estimate or of x:

    DDNM, DDRM                 x0^ + A+ r, or part of it for each singular vector of A                    (4)
    DiffPIR                    argmin_z |y - A z|^2 + rho |z - x0^|^2 = x0^ + A^T (A A^T + rho)^-1 r      (5)
    replacement, RePaint, MCG  x_s + A+ (alpha_s y + sigma_s A z - A x_s),  z standard normal             (6)

With (4) to (6) the rest of x0 learns of y through the denoiser alone, and (6) keeps the noise of y. Only the particles
of `twisted_smc` converge to the posterior. `conformance/posterior.py` measures how far each method is from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.forward import q_posterior, q_sample, renoise, transition
from diffusion_jax.operators import Missing, Operator, masking
from diffusion_jax.ops import bcast, divide, dot, fold, is_batched, is_concrete, normal_like, wide
from diffusion_jax.samplers.driver import memoryless, sample
from diffusion_jax.samplers.noise import white
from diffusion_jax.typing import Array, Cond, Denoise, Denoiser, Key, Noise, Prediction, Sampler, Schedule


def pigdm(
    denoiser: Denoiser,
    schedule: Schedule,
    operator: Operator,
    y: Array,
    sigma_y: ArrayLike = 0.0,
    variance: float = 1.0,
) -> Denoiser:
    """Pseudoinverse guidance (Song et al. 2023, "Pseudoinverse-guided diffusion models", ICLR), eq. (3).

    C = v sigma^2 / (alpha^2 v + sigma^2) I with `variance` v that of the data (the paper's is 1): exact for
    x0 ~ N(m, v I). With a Python 0 for sigma_y, (3) needs A+ alone, and A may be nonlinear: `jpeg`, say. Otherwise it
    needs the spectrum, or the adjoint for 50 steps of conjugate gradients. This is the paper's score; its algorithm 1
    gives it another weight at each step. One evaluation and its gradient.
    """
    _nonnegative("pigdm", sigma_y)

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        def estimate(x: Array) -> tuple[Array, Prediction]:
            p = denoiser(x, t, cond)
            return p.x0, p

        alpha, sigma = schedule(t)
        total = alpha**2 * variance + sigma**2  # C = variance sigma^2 / total
        x0, pull, p = jax.vjp(estimate, x, has_aux=True)
        g = pull(_solve("pigdm", operator, y, x0, sigma_y, total / variance, sigma))[0]
        return _shift(schedule, t, p, bcast(divide(total, alpha * variance), x) * g)

    return guided


def tmpd(denoiser: Denoiser, schedule: Schedule, operator: Operator, y: Array, sigma_y: ArrayLike) -> Denoiser:
    """Tweedie moment projected diffusion (Boys et al. 2023, arXiv:2310.06721), in its form for large problems.

    Eq. (3) with the row sums diag(A C A^T 1) for A C A^T: right where that matrix is diagonal. Of strongly correlated
    data a row sum may be negative, and the step wrong by any amount; `mmps` solves the whole system. Any differentiable
    operator. One evaluation and two gradients.
    """
    _nonnegative("tmpd", sigma_y)

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        r, pull, push, p = _linearised("tmpd", denoiser, schedule, operator, y, x, t, cond)
        total = push(pull(jnp.ones_like(r))) + jnp.asarray(sigma_y, r.dtype) ** 2
        return _shift(schedule, t, p, pull(divide(r, total)))

    return guided


def mmps(
    denoiser: Denoiser, schedule: Schedule, operator: Operator, y: Array, sigma_y: ArrayLike, iterations: int
) -> Denoiser:
    """Moment matching posterior sampling (Rozet et al. 2024, arXiv:2405.13712): eq. (3) with all of C.

    The system is solved by `iterations` steps of conjugate gradients, each one a gradient of the denoiser: as many as
    there are measurements solve it, a few do where A C A^T + sigma_y^2 is well conditioned. Exact for Gaussian data.
    Any differentiable operator, linearised at x0^. ValueError for less than one iteration.
    """
    _nonnegative("mmps", sigma_y)
    _at_least("mmps", "iterations", iterations, 1)

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        r, pull, push, p = _linearised("mmps", denoiser, schedule, operator, y, x, t, cond)
        variance = jnp.asarray(sigma_y, r.dtype) ** 2
        return _shift(schedule, t, p, pull(_conjugate_gradients(lambda u: push(pull(u)) + variance * u, r, iterations)))

    return guided


def ddnm(denoiser: Denoiser, schedule: Schedule, operator: Operator, y: Array) -> Denoiser:
    """Null-space projection of the estimate, eq. (4) (Wang et al. 2022, arXiv:2212.00490, algorithm 1, with `ddpm`).

    x0^ + A+ y - A+ A x0^, so that A x0 = y at the end: for y without noise, else see `ddnm_plus`. A nonlinear operator
    with a generalised inverse will do, as `jpeg` in Kawar et al. 2022, arXiv:2209.11888. `travel` around the
    sampler is the paper's time-travel.
    """

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        p = denoiser(x, t, cond)
        return _shift(schedule, t, p, _gap("ddnm", operator, y, p.x0))

    return guided


def diffpir(
    denoiser: Denoiser, schedule: Schedule, operator: Operator, y: Array, sigma_y: ArrayLike, lam: float
) -> Denoiser:
    """The proximal estimate, eq. (5), rho = lam (sigma_y alpha / sigma)^2 (Zhu et al. 2023, arXiv:2305.08995, alg. 1).

    It is the mean of z ~ N(x0^, (sigma / alpha)^2 / lam I) given y. The paper's sampler is `remix`. Needs the spectrum
    of the operator, or its adjoint for 50 steps of conjugate gradients; with a Python 0 for sigma_y it is `ddnm`.
    ValueError unless lam > 0.
    """
    _nonnegative("diffpir", sigma_y)
    if lam <= 0:
        raise ValueError(f"diffpir: lam must be positive, got {lam}")

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        p, (alpha, sigma) = denoiser(x, t, cond), schedule(t)
        return _shift(schedule, t, p, _solve("diffpir", operator, y, p.x0, sigma_y, lam * alpha**2, sigma))

    return guided


def replacement(inner: Sampler, schedule: Schedule, operator: Operator, y: Array) -> Sampler:
    """Put the measurement, noised to s, in its place after each step of `inner`, eq. (6).

    Song et al. 2021, arXiv:2011.13456, appendix I.2, for a mask; here any linear operator with A+. The rest learns of
    it through the denoiser alone, so that it does not follow p(x0 | y); at the end A x0 = y, with the noise of y.
    """

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        x, state = inner.step(fold(key, 1), x, state, t, s, denoise)
        alpha, sigma = schedule(s)
        z = operator.apply(normal_like(fold(key, 0), x))
        known = bcast(alpha, z) * _fit("replacement", operator, y, z) + bcast(sigma, z) * z
        # Two terms and not A+ of a difference: known pixels become those of y bit by bit.
        return x - operator.pseudo_inverse(operator.apply(x)) + operator.pseudo_inverse(known), state

    return Sampler(inner.init, step)


def travel(inner: Sampler, schedule: Schedule, jumps: int, length: int = 1) -> Sampler:
    """Take each step `jumps` times, adding noise back from s to t in between, in `length` equal parts of t - s.

    The resampling of Lugmayr et al. 2022, arXiv:2201.09865, section 4.2, and the time-travel of Wang et al. 2022,
    arXiv:2212.00490: on a grid of n / length steps, the jumps have that length. It gives what was put in x the time to
    agree with the rest. A multistep method starts each time from the history that it came with. ValueError where jumps
    or length is less than 1.
    """
    _at_least("travel", "jumps", jumps, 1)
    _at_least("travel", "length", length, 1)

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        def part(key: Key, carry: tuple[Array, Any], i: Array) -> tuple[Array, Any]:
            start, end = (t + (s - t) * (j.astype(t.dtype) / length) for j in (i, i + 1))
            return inner.step(fold(key, i), *carry, start, jnp.where(i + 1 == length, s, end), denoise)

        def once(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            each, last = fold(key, i), carry[0]
            start = jnp.where(i > 0, renoise(fold(each, length), schedule, last, s, t), last)
            return jax.lax.scan(lambda c, j: (part(each, c, j), None), (start, state), jnp.arange(length))[0]

        return jax.lax.fori_loop(0, jumps, once, (x, state))

    return Sampler(inner.init, step)


def repaint(inner: Sampler, schedule: Schedule, y: Array, mask: ArrayLike, jumps: int, length: int = 1) -> Sampler:
    """Inpainting by replacement and resampling (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1, with `ddpm`).

    `travel` of `replacement`; jumps = 10 and length = 10 are the paper's. y: f[b *d], of which the known pixels count
    (mask True, see `operators.masking`). A mask that knows nothing leaves `inner`.
    """
    if is_concrete(mask) and not np.any(mask):
        return inner
    return travel(replacement(inner, schedule, masking(mask), y), schedule, jumps, length)


def dps(inner: Sampler, operator: Operator, y: Array, zeta: ArrayLike) -> Sampler:
    """Diffusion posterior sampling (Chung et al. 2022, arXiv:2209.14687, algorithm 1 with `ddpm`).

    x_s <- x_s - zeta / |r| grad_x |r|^2,   r = y - A x0^(x)

    with the |r| of each example: 2 zeta grad |r|. The step is not that of (3): it knows neither of sigma_y nor of the
    grid, and is to be tuned. Any differentiable operator; zeta 0 is `inner`. One gradient more than `inner`.
    """

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        def misfit(x: Array) -> tuple[Array, Prediction]:
            p = denoise(x, t)
            seen = operator.apply(p.x0)
            r = _fit("dps", operator, y, seen) - seen
            return dot(r, r), p

        square, pull, p = jax.vjp(misfit, x, has_aux=True)

        def known(z: Array, u: Array) -> Prediction:
            return p if z is x and u is t else denoise(z, u)  # the inner step's first evaluation is this one

        gradient, size = pull(jnp.ones_like(square))[0], divide(jnp.sqrt(square), square)
        moved, state = inner.step(key, x, state, t, s, known)
        return moved - bcast(jnp.asarray(zeta, size.dtype) * size, x) * gradient, state

    return Sampler(inner.init, step)


def mcg(inner: Sampler, schedule: Schedule, operator: Operator, y: Array, zeta: ArrayLike) -> Sampler:
    """Manifold constrained gradients (Chung et al. 2022, arXiv:2206.00941): `dps`, then `replacement`.

    The paper's weight W of the residual is I here, and the step that of `dps`. Zeta 0 is `replacement`.
    """
    return replacement(dps(inner, operator, y, zeta), schedule, operator, y)


def remix(schedule: Schedule, zeta: float, noise: Noise = white) -> Sampler:
    """DiffPIR's step (Zhu et al. 2023, arXiv:2305.08995, algorithm 1): part of the predicted noise becomes new.

    x_s = alpha_s x0 + sigma_s (sqrt(1 - zeta) eps + sqrt(zeta) z);  zeta in [0, 1], and 0 is `ddim`.
    """
    if not 0 <= zeta <= 1:
        raise ValueError(f"remix: zeta must be in [0, 1], got {zeta}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, (alpha, sigma) = denoise(x, t), schedule(s)
        z = (1 - zeta) ** 0.5 * p.eps + zeta**0.5 * noise(key, x, t, s)
        return bcast(alpha, x) * p.x0 + bcast(sigma, x) * z, state

    return memoryless(step)


def ddnm_plus(schedule: Schedule, operator: Operator, y: Array, sigma_y: ArrayLike, noise: Noise = white) -> Sampler:
    """DDNM+ for noisy measurements (Wang et al. 2022, arXiv:2212.00490, section 3.3), a step of `ddpm` with

    x0^ + V l(S) V^T A+ r,   noise of variance V g(S) V^T,
    l(s) = min(1, std s / (a sigma_y)),   g(s) = std^2 - (a l(s) sigma_y / s)^2 for s > 0, and std^2 for s = 0

    with std^2 the variance of q(x_s | x_t, x0) and a the weight of x0 in its mean: the noise of y takes the place of
    the sampler's. sigma_y = 0 is `ddnm` with `ddpm`. Needs A+ and the spectrum.
    """
    _nonnegative("ddnm_plus", sigma_y)

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        mean, variance = q_posterior(schedule, x, p.x0, t, s)
        a = schedule(s).alpha * transition(schedule, t, s)[1] / schedule(t).sigma ** 2
        std, by_y = jnp.sqrt(variance), a * jnp.asarray(sigma_y, a.dtype)

        def trust(v: Array) -> Array:
            return jnp.minimum(1, divide(_lead(std, v) * v, _lead(by_y, v), math.inf))

        def spread(v: Array) -> Array:
            return jnp.sqrt(jnp.maximum(_lead(std, v) ** 2 - divide(_lead(by_y, v) * trust(v), v) ** 2, 0))

        mean = mean + bcast(a, x) * operator.spectral(trust, _gap("ddnm_plus", operator, y, p.x0))
        return mean + operator.spectral(spread, noise(key, x, t, s)), state

    return memoryless(step)


def ddrm(
    schedule: Schedule,
    operator: Operator,
    y: Array,
    sigma_y: ArrayLike,
    eta: float = 0.85,
    eta_b: float = 1.0,
    noise: Noise = white,
) -> Sampler:
    """Denoising diffusion restoration models (Kawar et al. 2022, arXiv:2201.11793, section 3.2; their eta, eta_b).

    With sigma~ = sigma_s / alpha_s, the coefficients of x_s / alpha_s in the basis V have mean and standard deviation

        s = 0:                   x0^ + sqrt(1 - eta^2) sigma~ eps,                              eta sigma~
        sigma~ < sigma_y / s:    x0^ + sqrt(1 - eta^2) sigma~ (y' - x0^) / (sigma_y / s),       eta sigma~
        sigma~ >= sigma_y / s:   x0^ + eta_b (y' - x0^),          sqrt(sigma~^2 - (eta_b sigma_y / s)^2)

    y' = V^T A+ y. Needs A+ and the spectrum; without a measurement it is `remix(schedule, eta^2)`.
    """
    _nonnegative("ddrm", sigma_y)
    if not (0 <= eta <= 1 and 0 <= eta_b <= 1):
        raise ValueError(f"ddrm: eta and eta_b must be in [0, 1], got {eta}, {eta_b}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p, (alpha, sigma) = denoise(x, t), schedule(s)

        def levels(v: Array) -> tuple[Array, Array]:
            return _lead(sigma / alpha, v), divide(jnp.asarray(sigma_y, v.dtype), v)  # sigma~, sigma_y / s

        def toward(v: Array) -> Array:
            level, by_y = levels(v)
            return jnp.where(v > 0, jnp.where(level < by_y, (1 - eta**2) ** 0.5 * divide(level, by_y), eta_b), 0)

        def keep(v: Array) -> Array:
            return jnp.where(v > 0, 0, (1 - eta**2) ** 0.5 * levels(v)[0])

        def spread(v: Array) -> Array:
            level, by_y = levels(v)
            rest = jnp.sqrt(jnp.maximum(level**2 - (eta_b * by_y) ** 2, 0))
            return jnp.where((v > 0) & (level >= by_y), rest, eta * level)

        x0 = p.x0 + operator.spectral(toward, _gap("ddrm", operator, y, p.x0))
        shake = operator.spectral(keep, p.eps) + operator.spectral(spread, noise(key, x, t, s))
        return bcast(alpha, x) * (x0 + shake), state

    return memoryless(step)


def sdedit(
    key: Key, sampler: Sampler, denoiser: Denoiser, schedule: Schedule, guide: Array, times: Array, cond: Cond = None
) -> Array:
    """Start from a guide noised to times[0] (Meng et al. 2021, arXiv:2108.01073, algorithm 1): f[b *d] -> f[b *d].

    The guide is anything close to data, A+ y for example; the later the start, the closer the result to it. With a
    `replacement` sampler it edits under a mask.
    """
    x = q_sample(schedule, guide, times[0], normal_like(fold(key, 0), guide))
    return sample(fold(key, 1), sampler, denoiser, x, times, cond)


Twist = Callable[[Array, Array], Array]
"""(x0^: f[n *d], t: f[n]) -> f[n], roughly log p(y | x_t), but log p(y | x0) exactly where sigma = 0 and x0^ is x0."""


class Particles(NamedTuple):
    """Weighted samples x: f[n *d] of p(x0 | y); the exponentials of log_weights: f[n] sum to 1.

    ess: f[steps + 1], the effective sample size before each resampling and at the end; log_evidence: f[], the estimate
    of log p(y), whose exponential is unbiased.
    """

    x: Array
    log_weights: Array
    ess: Array
    log_evidence: Array


def gaussian_twist(
    schedule: Schedule,
    operator: Operator,
    y: Array,
    sigma_y: ArrayLike,
    variance: float = 1.0,
    measurements: ArrayLike | None = None,
) -> Twist:
    """log N(y; A x0^, sigma_y^2 + A C A^T) with the C of `pigdm`, up to a function of t, which cancels.

    An operator without spectrum gets C for A C A^T. `measurements` is their number, the size of y unless given: hidden
    pixels of a mask are none. ValueError unless sigma_y > 0.
    """
    if is_concrete(sigma_y) and not np.all(np.asarray(sigma_y) > 0):
        raise ValueError(f"gaussian_twist: sigma_y must be positive, got {sigma_y}")

    def twist(x0: Array, t: Array) -> Array:
        alpha, sigma = schedule(t)
        own, c = jnp.asarray(sigma_y, sigma.dtype) ** 2, variance * sigma**2 / (alpha**2 * variance + sigma**2)
        if isinstance(operator.spectral, Missing):
            seen = operator.apply(x0)
            r = _fit("gaussian_twist", operator, y, seen) - seen
            square = dot(r, r) / (own + c).astype(wide(r))
        else:
            r = _gap("gaussian_twist", operator, y, x0)
            square = dot(r, operator.spectral(lambda v: v**2 / (own.astype(v.dtype) + _lead(c, v) * v**2), r))
        m = jnp.asarray(y[0].size if measurements is None else measurements, square.dtype)
        return -0.5 * (square + m * jnp.log(2 * np.pi * own).astype(square.dtype))

    return twist


def twisted_smc(
    key: Key,
    denoiser: Denoiser,
    schedule: Schedule,
    twist: Twist,
    x: Array,
    times: Array,
    cond: Cond = None,
    *,
    variance: Literal["small", "large"] = "large",
    threshold: float = 0.5,
) -> Particles:
    """The twisted diffusion sampler (Wu et al. 2023, arXiv:2306.17775, algorithm 1): exact for many particles.

    Each particle takes a step of `ddpm` (of that variance) whose mean is moved by variance times grad_x log twist, and
    is weighted by prior step x new twist / (moved step x old twist); they are resampled where the effective sample size
    falls below threshold n. For n -> infinity the particles follow p(x0) p(y | x0) / p(y) with p(x0) the law of `ddpm`
    on this grid, for any twist that ends as p(y | x0). One evaluation and its gradient a step.

    x: f[n *d] are draws of `prior`; all particles share one measurement and one condition. ValueError for fewer than 2,
    and for a `[b]` array of keys: they are not independent.
    """
    n = x.shape[0]
    if variance not in ("small", "large"):
        raise ValueError(f"twisted_smc: variance must be 'small' or 'large', got {variance!r}")
    if n < 2:
        raise ValueError(f"twisted_smc: at least 2 particles, got x of shape {x.shape}")
    if is_batched(key):
        raise ValueError(f"twisted_smc: one key for all particles, got {list(key.shape)}")
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"twisted_smc: times must be f32[n + 1] with n >= 1, got shape {times.shape}")

    def look(x: Array, t: Array) -> tuple[Array, Array, Array]:
        def value(x: Array) -> tuple[Array, Array]:
            each = jnp.broadcast_to(t, x.shape[:1])
            x0 = denoiser(x, each, cond).x0
            return _log_twist(twist, x0, each), x0

        logp, pull, x0 = jax.vjp(value, x, has_aux=True)
        return x0, logp, pull(jnp.ones_like(logp))[0]

    def body(carry: tuple[Array, Array, Array], step: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        (x, logw, evidence), (i, t, s) = carry, step
        x0, logp, slope = look(x, t)
        logw, ess, gain = _normalised(logw + logp)
        few = ess < threshold * n
        pick = jnp.where(few, systematic_resampling(fold(fold(key, i), 0), logw), jnp.arange(n))
        logw = jnp.where(few, -math.log(n), logw)
        x, x0, logp, slope = (a[pick] for a in (x, x0, logp, slope))
        mean, small = q_posterior(schedule, x, x0, t, s)
        std = bcast(jnp.sqrt(small if variance == "small" else transition(schedule, t, s)[1]), x)
        z, move = normal_like(fold(fold(key, i), 1), x), std * slope
        x = mean + std * (move + z)
        ratio = -dot(move, z + move / 2)  # log of prior step / moved step
        return (x, logw + ratio - logp, evidence + gain), ess

    weights = jnp.full(n, -math.log(n), wide(x))
    steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
    (x, logw, evidence), ess = jax.lax.scan(body, (x, weights, jnp.zeros((), weights.dtype)), steps)
    end = jnp.broadcast_to(times[-1], (n,))
    ends_clean = schedule(times[-1]).sigma == 0
    logp = jax.lax.cond(ends_clean, lambda: _log_twist(twist, x, end), lambda: look(x, times[-1])[1])
    logw, last, gain = _normalised(logw + logp)
    return Particles(x, logw, jnp.append(ess, last), evidence + gain)


def systematic_resampling(key: Key, log_weights: Array) -> Array:
    """Indices i32[n], index k about n w_k times: never more than one off (Kitagawa 1996).

    >>> systematic_resampling(jax.random.key(0), jnp.log(jnp.asarray([0.5, 0.0, 0.5, 0.0]))).tolist()
    [0, 0, 2, 2]
    """
    n = log_weights.shape[0]
    cumulated = jnp.cumsum(jax.nn.softmax(log_weights))
    places = (jnp.arange(n, dtype=cumulated.dtype) + jax.random.uniform(key, (), cumulated.dtype)) / n
    return jnp.searchsorted(cumulated / cumulated[-1], places, side="right").clip(0, n - 1)


def _normalised(log_weights: Array) -> tuple[Array, Array, Array]:
    """Log weights whose exponentials sum to 1, the effective sample size, and the logarithm of the sum they had."""
    total = jax.nn.logsumexp(log_weights)
    log_weights = log_weights - total
    return log_weights, jnp.exp(-jax.nn.logsumexp(2 * log_weights)), total


def _log_twist(twist: Twist, x0: Array, t: Array) -> Array:
    logp = twist(x0, t)
    if logp.shape != t.shape:
        raise ValueError(f"twisted_smc: the twist returned shape {logp.shape} for x0 of shape {x0.shape}")
    return logp.astype(wide(x0))


def _shift(schedule: Schedule, t: Array, p: Prediction, delta: Array) -> Prediction:
    """Eq. (1): add delta to x0, and keep eps consistent with it."""
    alpha, sigma = schedule(t)
    return p._replace(x0=p.x0 + delta, eps=p.eps - bcast(divide(alpha, sigma), delta) * delta)


def _fit(name: str, operator: Operator, y: Array, seen: Array) -> Array:
    """y, of the shape and dtype of A x, or with one measurement for the batch; ValueError for another shape."""
    if y.shape not in (seen.shape, (1, *seen.shape[1:])):
        raise ValueError(f"{name}: y has shape {y.shape}, but the operator {operator.name!r} measures {seen.shape}")
    return jnp.broadcast_to(y.astype(seen.dtype), seen.shape)


def _gap(name: str, operator: Operator, y: Array, x0: Array) -> Array:
    """A+ y - A+ A x0, eq. (4)."""
    seen = operator.apply(x0)
    return operator.pseudo_inverse(_fit(name, operator, y, seen)) - operator.pseudo_inverse(seen)


def _solve(name: str, operator: Operator, y: Array, x0: Array, sigma_y: ArrayLike, scale: Array, sigma: Array) -> Array:
    """A^T (A A^T + rho)^-1 (y - A x0) of (5), rho = scale (sigma_y / sigma)^2 for each example."""
    if isinstance(sigma_y, int | float) and sigma_y == 0:
        return _gap(name, operator, y, x0)
    # At sigma = 0, where x is x0, rho is not infinite but large.
    rho = scale * (jnp.asarray(sigma_y, sigma.dtype) / jnp.maximum(sigma, 1e-8)) ** 2

    def share(v: Array) -> Array:
        return divide(v**2, v**2 + _lead(rho, v))

    if not isinstance(operator.spectral, Missing):
        return operator.spectral(share, _gap(name, operator, y, x0))
    seen = operator.apply(x0)
    r = _fit(name, operator, y, seen) - seen
    u = _conjugate_gradients(lambda u: operator.apply(operator.adjoint(u)) + bcast(rho, u) * u, r, 50)
    return operator.adjoint(u)


def _linearised(
    name: str, denoiser: Denoiser, schedule: Schedule, operator: Operator, y: Array, x: Array, t: Array, cond: Cond
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array], Prediction]:
    """y - A x0^, u -> C A^T u = sigma^2 / alpha J^T A^T u, v -> A v, and the prediction."""

    def measure(x: Array) -> tuple[Array, Prediction]:
        p = denoiser(x, t, cond)
        return operator.apply(p.x0), p

    alpha, sigma = schedule(t)
    far = bcast(divide(sigma**2, alpha), x)  # without signal J = 0: nothing to tell
    seen, pull, p = jax.vjp(measure, x, has_aux=True)
    push = jax.linearize(operator.apply, p.x0)[1]
    return _fit(name, operator, y, seen) - seen, lambda u: far * pull(u)[0], push, p


def _conjugate_gradients(matvec: Callable[[Array], Array], b: Array, iterations: int) -> Array:
    """Solve matvec(u) = b for each example of b: f[b *e] (Hestenes & Stiefel 1952).

    Not `jax.scipy.sparse.linalg.cg`, whose inner products are over the batch: an example would depend on the others.
    """

    def body(carry: tuple[Array, ...], _: None) -> tuple[tuple[Array, ...], None]:
        u, r, d, square = carry
        ad = matvec(d)
        step = divide(square, dot(d, ad))
        u, r = u + bcast(step, d) * d, r - bcast(step, d) * ad
        new = dot(r, r)
        return (u, r, r + bcast(divide(new, square), d) * d, new), None

    return jax.lax.scan(body, (jnp.zeros_like(b), b, b, dot(b, b)), None, length=iterations)[0][0]


def _lead(c: Array, v: Array) -> Array:
    """c: f[] or f[b], one for each example, with the rank and the dtype of singular values v: f[1 ...]."""
    return jnp.reshape(c, c.shape + (1,) * (v.ndim - c.ndim)).astype(v.dtype)


def _nonnegative(name: str, sigma_y: ArrayLike) -> None:
    if is_concrete(sigma_y) and np.any(np.asarray(sigma_y) < 0):
        raise ValueError(f"{name}: sigma_y must not be negative, got {sigma_y}")


def _at_least(name: str, what: str, value: int, least: int) -> None:
    if is_concrete(value) and value < least:
        raise ValueError(f"{name}: {what} must be at least {least}, got {value}")
