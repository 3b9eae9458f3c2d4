r"""Noise schedules: functions t -> (alpha, sigma), and what follows from them.

    x_t = alpha(t) x0 + sigma(t) eps                                                         (1)
    log SNR(t) = 2 log alpha(t) - 2 log sigma(t), falling in t                               (2)

The same marginals come from the stochastic differential equation (Song et al. 2021, arXiv:2011.13456, eq. 5)

    dx = f(t) x dt + g(t) dw,   f = alpha'/alpha,   g^2 = 2 sigma (sigma' - f sigma)         (3)

whose coefficients are derivatives of the schedule (Kingma et al. 2021, arXiv:2107.00630, eq. 19-20), taken here by
`jax.jvp`, so that a new schedule is one function. Time has no fixed range: t in [0, 1] for all but `edm`, where t is
sigma itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.typing import AlphaSigma, Array, Schedule


def vp_linear(beta_min: float = 0.1, beta_max: float = 20.0) -> Schedule:
    """Variance preserving, with a rate beta(t) that is linear in t in [0, 1] (Song et al. 2021, eq. 32-33).

    log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2;  sigma^2 = 1 - alpha^2

    >>> float(vp_linear()(jnp.float32(0.0)).alpha)
    1.0
    """
    _require(0 <= beta_min < beta_max, f"vp_linear: 0 <= beta_min < beta_max, got {beta_min}, {beta_max}")

    def schedule(t: Array) -> AlphaSigma:
        return _variance_preserving(-0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min)

    return schedule


def cosine(s: float = 0.008) -> Schedule:
    """Cosine schedule on t in [0, 1] (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17).

    alpha(t) = cos(u) / cos(u_0),  u = (t + s) / (1 + s) * pi / 2;  sigma^2 = 1 - alpha^2

    alpha(1) = 0 exactly. `s = 0` is (cos, sin) of pi t / 2.

    >>> [round(float(v), 4) for v in cosine()(jnp.float32(0.5))]
    [0.7027, 0.7114]
    """
    _require(s >= 0, f"cosine: s >= 0, got {s}")
    u0 = s / (1 + s) * np.pi / 2
    scale = np.pi / 2 / (1 + s)
    top = np.cos(u0).item()

    def schedule(t: Array) -> AlphaSigma:
        # cos(u) = sin(pi/2 - u) and cos^2(u0) - cos^2(u) = sin(u - u0) sin(u + u0) keep both ends exact.
        alpha = jnp.sin(scale * (1 - t)) / top
        if s == 0:
            return AlphaSigma(alpha, jnp.sin(scale * t))
        return AlphaSigma(alpha, jnp.sqrt(jnp.sin(scale * t) * jnp.sin(scale * t + 2 * u0)) / top)

    return schedule


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """Variance exploding on t in [0, 1] (Song et al. 2021, eq. 30).

    alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t

    >>> [round(float(v), 2) for v in ve(0.01, 50.0)(jnp.float32(1.0))]
    [1.0, 50.0]
    """
    _require(0 < sigma_min < sigma_max, f"ve: 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    ratio = np.log(sigma_max / sigma_min).item()

    def schedule(t: Array) -> AlphaSigma:
        return AlphaSigma(jnp.ones_like(t), sigma_min * jnp.exp(ratio * t))

    return schedule


def rectified() -> Schedule:
    """Rectified flow, the straight line from data to noise (Liu et al. 2023, arXiv:2209.03003): (1 - t, t).

    >>> [float(v) for v in rectified()(jnp.float32(0.25))]
    [0.75, 0.25]
    """
    return lambda t: AlphaSigma(1 - t, t)


def edm() -> Schedule:
    """EDM (Karras et al. 2022, arXiv:2206.00364, table 1): time is the noise level itself, (1, t).

    >>> [float(v) for v in edm()(jnp.float32(80.0))]
    [1.0, 80.0]
    """
    return lambda t: AlphaSigma(jnp.ones_like(t), t)


def from_betas(betas: ArrayLike) -> Schedule:
    """The schedule of a table of betas `f[T]` (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    alpha(i / T)^2 = prod_{j <= i} (1 - beta_j), i = 0..T, and log alpha is linear in between, which is the
    continuous process with a rate constant between table entries. t = 0 is clean data and t = 1 the last entry.
    Raises ValueError unless every beta is in (0, 1).

    >>> [round(float(v), 4) for v in from_betas(linear_betas(1000))(jnp.float32(1.0))]
    [0.0064, 1.0]
    """
    table = np.asarray(betas, np.float64)
    _require(
        table.ndim == 1 and table.size > 0 and bool(np.all((table > 0) & (table < 1))),
        f"from_betas: a one-dimensional table with values in (0, 1), got shape {table.shape}",
    )
    log_alpha = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-table))])

    def schedule(t: Array) -> AlphaSigma:
        # Not jnp.clip: its derivative at the two ends, where samplers start, is half of what it is inside.
        u = jnp.where(t < 0, 0, jnp.where(t > 1, 1, t)) * table.size
        i = jnp.clip(jnp.floor(u), 0, table.size - 1)
        left = jnp.asarray(log_alpha[:-1], t.dtype)[i.astype(jnp.int32)]
        slope = jnp.asarray(np.diff(log_alpha), t.dtype)[i.astype(jnp.int32)]
        return _variance_preserving(left + (u - i) * slope)

    return schedule


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
    return (a + b) / 2


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


def _variance_preserving(log_alpha: Array) -> AlphaSigma:
    # 0 - y and not -y: no negative zero at t = 0, and there the derivative is +inf as it should be.
    return AlphaSigma(jnp.exp(log_alpha), jnp.sqrt(0 - jnp.expm1(2 * log_alpha)))


def _positive(steps: int) -> int:
    _require(steps > 0, f"a table needs a positive number of steps, got {steps}")
    return steps


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
