r"""Noise schedules: functions t -> (alpha, sigma), and what follows from them.

    x_t = alpha(t) x0 + sigma(t) eps                                                         (1)
    log SNR(t) = 2 log alpha(t) - 2 log sigma(t), falling in t                               (2)

The same marginals come from the stochastic differential equation (Song et al. 2021, arXiv:2011.13456, eq. 5)

    dx = f(t) x dt + g(t) dw,   f = alpha'/alpha,   g^2 = 2 sigma (sigma' - f sigma)         (3)

whose coefficients are derivatives of the schedule (Kingma et al. 2021, arXiv:2107.00630, eq. 19-20), taken here by
`jax.jvp`, so that a new schedule is one function. Time has no fixed range: t in [0, 1] for all but `edm`, where t is
sigma itself. A concrete time outside of a schedule's range raises ValueError; a traced one cannot be looked at. Where
alpha = 0 or sigma = 0 a rate may be infinite (alpha ~ sqrt(1 - t) at t = 1 in `sigmoid`), and Euler's method in that
time can then not start or end there; samplers in log SNR can.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.ops import is_concrete
from diffusion_jax.typing import AlphaSigma, Array, Key, Params, Schedule


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Variance preserving, with a rate beta(t) that is linear in t in [0, 1] (Song et al. 2021, eq. 32-33).

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2;  sigma^2 = 1 - alpha^2

    >>> float(vp_linear()(jnp.float32(0.0)).alpha)
    1.0
    """
    _require(0 <= beta_min < beta_max, f"vp_linear: 0 <= beta_min < beta_max, got {beta_min}, {beta_max}")
    return _checked("vp_linear", lambda t: _variance_preserving(_log_alpha(t, beta_min, beta_max)))


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Sub-variance preserving: alpha of `vp_linear`, sigma = 1 - alpha^2 (Song et al. 2021, eq. 29), t in [0, 1].

    >>> [round(float(v), 4) for v in sub_vp()(jnp.float32(0.5))]
    [0.2812, 0.9209]
    """
    _require(0 <= beta_min < beta_max, f"sub_vp: 0 <= beta_min < beta_max, got {beta_min}, {beta_max}")

    def schedule(t: Array) -> AlphaSigma:
        log_alpha = _log_alpha(t, beta_min, beta_max)
        return AlphaSigma(jnp.exp(log_alpha), 0 - jnp.expm1(2 * log_alpha))

    return _checked("sub_vp", schedule)


def cosine(s: float = 0.008) -> Schedule:
    """Cosine schedule on t in [0, 1] (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17).

    alpha(t) = cos(u) / cos(u_0),  u = (t + s) / (1 + s) * pi / 2;  sigma^2 = 1 - alpha^2

    alpha(1) = 0 exactly. `cosine(0)` is `trigonometric()`.

    >>> [round(float(v), 4) for v in cosine()(jnp.float32(0.5))]
    [0.7027, 0.7114]
    """
    _require(s >= 0, f"cosine: s >= 0, got {s}")
    if s == 0:
        return trigonometric()
    u0 = s / (1 + s) * np.pi / 2
    scale = np.pi / 2 / (1 + s)
    top = np.cos(u0).item()

    def schedule(t: Array) -> AlphaSigma:
        # cos(u) = sin(pi/2 - u) and cos^2(u0) - cos^2(u) = sin(u - u0) sin(u + u0) keep both ends exact.
        sigma = jnp.sqrt(jnp.sin(scale * t) * jnp.sin(scale * t + 2 * u0)) / top
        return AlphaSigma(jnp.sin(scale * (1 - t)) / top, sigma)

    return _checked("cosine", schedule)


def trigonometric() -> Schedule:
    """The trigonometric interpolant (Albergo et al. 2023, arXiv:2303.08797): (cos, sin) of pi t / 2, t in [0, 1].

    >>> [round(float(v), 4) for v in trigonometric()(jnp.float32(0.5))]
    [0.7071, 0.7071]
    """
    right = np.pi / 2
    return _checked("trigonometric", lambda t: AlphaSigma(jnp.sin(right * (1 - t)), jnp.sin(right * t)))


def sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Schedule:
    """Sigmoid schedule on t in [0, 1] (Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972).

    alpha(t)^2 = (S(end) - S(u)) / (S(end) - S(start)),  u = start + t (end - start),  S(u) = sigmoid(u / tau)

    Variance preserving. alpha(1) = 0 exactly, where its rate is -inf; the papers clip alpha^2 at 1e-9 instead.

    >>> [round(float(v), 4) for v in sigmoid()(jnp.float32(0.5))]
    [0.7071, 0.7071]
    """
    _require(start < end and tau > 0, f"sigmoid: start < end and tau > 0, got {start}, {end}, {tau}")
    low, high = start / tau, end / tau
    width = high - low

    def schedule(t: Array) -> AlphaSigma:
        # S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)) keeps both ends exact.
        u, norm = low + width * t, np.expm1(-width).item()
        kept = jax.nn.sigmoid(-u) / jax.nn.sigmoid(-low) * jnp.expm1(-width * (1 - t)) / norm
        lost = jax.nn.sigmoid(u) / jax.nn.sigmoid(high) * jnp.expm1(-width * t) / norm
        return AlphaSigma(jnp.sqrt(kept), jnp.sqrt(lost))

    return _checked("sigmoid", schedule)


def laplace(mu: float = 0.0, b: float = 0.5) -> Schedule:
    """Uniform t in [0, 1] gives a Laplace-distributed log SNR (Hang et al. 2024, arXiv:2407.03297).

    log SNR(t) = mu - b sign(1/2 - t) log(1 - 2 |t - 1/2|);  alpha^2 + sigma^2 = 1

    The log SNR is infinite at both ends, where (alpha, sigma) = (1, 0) and (0, 1) with infinite rates for b < 2.

    >>> round(float(logsnr(laplace(1.0, 0.5), jnp.float32(0.5))), 4)
    1.0
    """
    _require(b > 0, f"laplace: b > 0, got {b}")

    def schedule(t: Array) -> AlphaSigma:
        # The smaller of SNR and 1 / SNR is k u^b; with u once in each formula no rate is inf - inf at the ends.
        clean = t <= 0.5
        u, k = jnp.where(clean, 2 * t, 2 * (1 - t)), jnp.where(clean, np.exp(-mu).item(), np.exp(mu).item())
        less = jnp.sin(jnp.arctan(jnp.sqrt(k) * u ** (b / 2)))
        more = 1 / jnp.sqrt(1 + k * u**b)
        return AlphaSigma(jnp.where(clean, more, less), jnp.where(clean, less, more))

    return _checked("laplace", schedule)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Variance exploding on t in [0, 1] (Song et al. 2021, eq. 30).

    alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t

    >>> [round(float(v), 2) for v in ve(0.01, 50.0)(jnp.float32(1.0))]
    [1.0, 50.0]
    """
    _require(0 < sigma_min < sigma_max, f"ve: 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    ratio = np.log(sigma_max / sigma_min).item()
    return _checked("ve", lambda t: AlphaSigma(jnp.ones_like(t), sigma_min * jnp.exp(ratio * t)))


def rectified() -> Schedule:
    """Rectified flow, the straight line from data to noise (Liu et al. 2023, arXiv:2209.03003): (1 - t, t).

    >>> [float(v) for v in rectified()(jnp.float32(0.25))]
    [0.75, 0.25]
    """
    return _checked("rectified", lambda t: AlphaSigma(1 - t, t))


def edm() -> Schedule:
    """EDM (Karras et al. 2022, arXiv:2206.00364, table 1): time is the noise level itself, (1, t), t >= 0.

    >>> [float(v) for v in edm()(jnp.float32(80.0))]
    [1.0, 80.0]
    """
    return _checked("edm", lambda t: AlphaSigma(jnp.ones_like(t), t), np.inf)


def shifted(schedule: Schedule, factor: ArrayLike) -> Schedule:
    """The schedule with its SNR divided by factor^2, for data of another resolution.

    (alpha, sigma) -> (alpha, factor sigma) / n, where n restores the first of these that the schedule keeps constant:
    alpha + sigma = 1; alpha = 1; and for all others alpha^2 + sigma^2. So a rectified flow stays one, in the time
    factor t / (1 + (factor - 1) t) (Esser et al. 2024, arXiv:2403.03206, eq. 23); a variance preserving schedule stays
    one, its log SNR lower by 2 log(factor) (Hoogeboom et al. 2023, arXiv:2301.11093, with factor = resolution / 64);
    and EDM's noise levels are multiplied by factor. ValueError unless factor > 0.

    >>> [round(float(v), 4) for v in shifted(rectified(), 3.0)(jnp.float32(0.5))]
    [0.25, 0.75]
    """
    if is_concrete(factor):
        _require(bool(np.all(np.asarray(factor) > 0)), f"shifted: factor > 0, got {factor}")
    norm = _form(schedule)

    def moved(t: Array) -> AlphaSigma:
        alpha, sigma = schedule(t)
        f = jnp.asarray(factor, alpha.dtype)
        n = norm(alpha, sigma, f)
        return AlphaSigma(alpha / n, f * sigma / n)

    return moved


def learned(params: Params, low: ArrayLike = -5.0, high: ArrayLike = 13.3) -> Schedule:
    """Variance preserving, with a learned log SNR from `high` at t = 0 to `low` at t = 1 (Kingma et al. 2021, app. H).

    log SNR(t) = high - (high - low) (g(t) - g(0)) / (g(1) - g(0)),  g(t) = a t + mean_k h_k sigmoid(w_k (t - c_k))

    with a, h_k, w_k positive through softplus, so that it falls: the paper's monotone network without the biases that
    cancel. Differentiable with respect to params, those of `init_learned`, and to both ends.

    >>> schedule = learned(init_learned(jax.random.key(0)), -5.0, 13.3)
    >>> [round(float(logsnr(schedule, jnp.float32(t))), 3) for t in (0.0, 1.0)]
    [13.3, -5.0]
    """
    if is_concrete(low) and is_concrete(high):
        _require(bool(np.asarray(low) < np.asarray(high)), f"learned: low < high, got {low}, {high}")

    def schedule(t: Array) -> AlphaSigma:
        p = jax.tree.map(lambda a: jnp.asarray(a, t.dtype), params)
        slope, height, steepness = (jax.nn.softplus(p[name]) for name in ("slope", "height", "steepness"))

        def g(t: Array) -> Array:
            shape = (1,) * t.ndim + (-1,)
            offset = t[..., None] - jnp.reshape(p["centre"], shape)
            bumps = jnp.reshape(height, shape) * jax.nn.sigmoid(jnp.reshape(steepness, shape) * offset)
            return slope * t + jnp.mean(bumps, axis=-1)

        top, bottom = (jnp.asarray(end, t.dtype) for end in (high, low))
        at_zero, at_one = g(jnp.zeros_like(t)), g(jnp.ones_like(t))
        value = top - (top - bottom) * (g(t) - at_zero) / (at_one - at_zero)
        return AlphaSigma(jnp.sqrt(jax.nn.sigmoid(value)), jnp.sqrt(jax.nn.sigmoid(-value)))

    return _checked("learned", schedule)


def init_learned(key: Key, width: int = 1024) -> Params:
    """Parameters of `learned`: scalar `slope`, and `centre`, `height`, `steepness` f32[width] (1024 is the paper's).

    >>> {name: value.shape for name, value in init_learned(jax.random.key(0), 8).items()}
    {'centre': (8,), 'height': (8,), 'slope': (), 'steepness': (8,)}
    """
    _require(width > 0, f"init_learned: width > 0, got {width}")
    centre, height, steepness = jax.random.split(key, 3)
    return {
        "centre": jax.random.uniform(centre, (width,)),
        "height": jax.random.normal(height, (width,)),
        "slope": jnp.zeros(()),
        "steepness": 5 + jax.random.normal(steepness, (width,)),
    }


def from_betas(betas: ArrayLike) -> Schedule:
    """The schedule of a table of betas `f[T]` (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    alpha(i / T)^2 = prod_{j <= i} (1 - beta_j), i = 0..T, and log alpha is linear in between, which is the
    continuous process with a rate constant between table entries. t = 0 is clean data and t = 1 the last entry.
    Only the last beta may be 1, see `zero_terminal_snr`: then alpha itself is linear in the last cell, and 0 at t = 1.
    ValueError for any other beta outside (0, 1).

    >>> [round(float(v), 4) for v in from_betas(linear_betas(1000))(jnp.float32(1.0))]
    [0.0064, 1.0]
    """
    table = _table("from_betas", betas)
    zero = bool(table[-1] == 1)
    log_alpha = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-table[:-1] if zero else -table))])
    slopes = np.append(np.diff(log_alpha), [0.0] * zero)

    def schedule(t: Array) -> AlphaSigma:
        # Not jnp.clip: its derivative at the two ends, where samplers start, is half of what it is inside.
        u = jnp.where(t < 0, 0, jnp.where(t > 1, 1, t)) * table.size
        i = jnp.clip(jnp.floor(u), 0, table.size - 1)
        left = jnp.asarray(log_alpha[: table.size], t.dtype)[i.astype(jnp.int32)]
        at = _variance_preserving(left + (u - i) * jnp.asarray(slopes, t.dtype)[i.astype(jnp.int32)])
        if not zero:
            return at
        inside, keep, alpha = i < table.size - 1, 1 - (u - i), jnp.exp(left)
        sigma = jnp.sqrt(alpha**2 * (1 - keep**2) - jnp.expm1(2 * left))
        return AlphaSigma(jnp.where(inside, at.alpha, alpha * keep), jnp.where(inside, at.sigma, sigma))

    return _checked("from_betas", schedule)


def zero_terminal_snr(betas: ArrayLike) -> np.ndarray:
    """The table `f64[T]` rescaled so that no signal is left at its end (Lin et al. 2024, arXiv:2305.08891, alg. 1).

    alpha_i -> alpha_1 (alpha_i - alpha_T) / (alpha_1 - alpha_T), the first kept and the last 0, hence the last beta 1.

    >>> [round(float(v), 4) for v in from_betas(zero_terminal_snr(linear_betas(1000)))(jnp.float32(1.0))]
    [0.0, 1.0]
    """
    table = _table("zero_terminal_snr", betas)
    _require(table.size > 1, f"zero_terminal_snr: a table of at least two betas, got shape {table.shape}")
    alpha = np.sqrt(np.cumprod(1 - table))
    alpha = alpha[0] * (alpha - alpha[-1]) / (alpha[0] - alpha[-1])
    return 1 - (alpha / np.append(1.0, alpha[:-1])) ** 2


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Linear table of betas `f64[steps]` (Ho et al. 2020, section 4).

    >>> linear_betas(3).tolist()
    [0.0001, 0.01005, 0.02]
    """
    return np.linspace(start, end, _positive(steps))


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Table `f64[steps]` whose square roots are linear, of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

    >>> scaled_linear_betas(2).round(5).tolist()
    [0.00085, 0.012]
    """
    return np.linspace(start**0.5, end**0.5, _positive(steps)) ** 2


def cosine_betas(steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> np.ndarray:
    """Table `f64[steps]` of the cosine schedule, clipped at `largest` (Nichol & Dhariwal 2021, eq. 17).

    >>> float(cosine_betas(1000)[-1])
    0.999
    """
    u = (np.arange(_positive(steps) + 1) / steps + s) / (1 + s) * np.pi / 2
    return np.minimum(1 - (np.cos(u[1:]) / np.cos(u[:-1])) ** 2, largest)


def logsnr(schedule: Schedule, t: Array) -> Array:
    """Logarithm of the signal-to-noise ratio, eq. (2): f32[*b] -> f32[*b], +inf where sigma = 0.

    >>> float(logsnr(rectified(), jnp.float32(0.5)))
    0.0
    """
    alpha, sigma = schedule(t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))


def inverse_logsnr(schedule: Schedule, value: Array, low: ArrayLike, high: ArrayLike, iterations: int = 50) -> Array:
    """The time in [low, high] at which the log SNR is `value: f32[*b]`, by bisection; the nearer end if there is none.

    A Newton step from the time found carries the derivatives in value and in the schedule's parameters.

    >>> round(float(inverse_logsnr(edm(), jnp.float32(0.0), 0.002, 80.0)), 5)
    1.0
    """

    def halve(_, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = bounds
        middle = (a + b) / 2
        above = logsnr(schedule, middle) > value
        return jnp.where(above, middle, a), jnp.where(above, b, middle)

    ends = tuple(jnp.broadcast_to(jnp.asarray(end, value.dtype), value.shape) for end in (low, high))
    a, b = jax.lax.fori_loop(0, iterations, halve, ends)
    t = jax.lax.stop_gradient((a + b) / 2)
    found, slope = jax.jvp(lambda t: logsnr(schedule, t), (t,), (jnp.ones_like(t),))
    step = (value - found) / jax.lax.stop_gradient(slope)
    near = jnp.abs(step) < 1e-3 * (
        ends[1] - ends[0]
    )  # not where there is no such time, nor where the slope is infinite
    return jnp.clip(t + jnp.where(near, step, 0), *ends)


def rates(schedule: Schedule, t: Array) -> AlphaSigma:
    """Time derivatives (alpha', sigma') of a schedule at t: f32[*b] -> each f32[*b].

    >>> [float(v) for v in rates(rectified(), jnp.float32(0.3))]
    [-1.0, 1.0]
    """
    return jax.jvp(schedule, (t,), (jnp.ones_like(t),))[1]


def drift_diffusion(schedule: Schedule, t: Array) -> tuple[Array, Array]:
    """Coefficients (f, g) of the equation (3) that has this schedule's marginals: each f32[*b].

    >>> [round(float(v), 3) for v in drift_diffusion(vp_linear(0.1, 20.0), jnp.float32(1.0))]
    [-10.0, 4.472]
    """
    alpha, sigma = schedule(t)
    rate = rates(schedule, t)
    f = rate.alpha / alpha
    return f, jnp.sqrt(2 * sigma * (rate.sigma - f * sigma))


def _log_alpha(t: Array, beta_min: float, beta_max: float) -> Array:
    return -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min


def _variance_preserving(log_alpha: Array) -> AlphaSigma:
    # 0 - y and not -y: no negative zero at t = 0, and there the derivative is +inf as it should be.
    return AlphaSigma(jnp.exp(log_alpha), jnp.sqrt(0 - jnp.expm1(2 * log_alpha)))


def _form(schedule: Schedule) -> Callable[[Array, Array, Array], Array]:
    """What (alpha, f sigma) is divided by to have the form of (alpha, sigma), known from a few times."""
    some = schedule(jnp.linspace(0.1, 0.9, 9))
    kept = some.alpha + some.sigma, some.alpha, some.alpha**2 + some.sigma**2
    total, signal, power = (jnp.all(jnp.abs(value - 1) < 1e-5) for value in kept)

    def norm(alpha: Array, sigma: Array, f: Array) -> Array:
        n = jnp.hypot(alpha, f * sigma) / jnp.hypot(alpha, sigma)
        # The same by alpha^2 + sigma^2 = 1, without the one of the two whose rate may be infinite where it is 0.
        square = jnp.where(sigma < alpha, f**2 + (1 - f**2) * alpha**2, 1 + (f**2 - 1) * sigma**2)
        n = jnp.where(power, jnp.sqrt(square), n)
        return jnp.where(total, alpha + f * sigma, jnp.where(signal, 1, n))

    return norm


def _checked(name: str, schedule: Schedule, high: float = 1.0) -> Schedule:
    """The schedule, with ValueError for concrete times outside [0, high] (and a little, for rounding)."""

    def checked(t: Array) -> AlphaSigma:
        if is_concrete(t):
            values = np.asarray(t)
            bad = values[~((values >= -1e-6) & (values <= high + 1e-6))]
            _require(bad.size == 0, f"{name}: t must lie in [0, {high:g}], got {bad[:3].tolist()}")
        t = jnp.asarray(t)
        return schedule(t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.float32))

    return checked


def _table(name: str, betas: ArrayLike) -> np.ndarray:
    table = np.asarray(betas, np.float64)
    _require(table.ndim == 1 and table.size > 0, f"{name}: a table [T] of betas, got shape {table.shape}")
    inside = np.all((table[:-1] > 0) & (table[:-1] < 1)) and 0 < table[-1] <= 1
    _require(bool(inside), f"{name}: betas in (0, 1), the last at most 1, got {table.min()} to {table.max()}")
    return table


def _positive(steps: int) -> int:
    _require(steps > 0, f"a table needs a positive number of steps, got {steps}")
    return steps


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
