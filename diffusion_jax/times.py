r"""Time grids for sampling, `f32[n + 1]` decreasing, and draws of training times, `(key, b) -> f32[b]`.

A grid is not a schedule: any grid goes with any schedule, as long as both speak of the same time. Times in [0, 1]
are those of all schedules but `edm`, whose time is sigma; `karras` and `draw_lognormal` are meant for it.
Discrete indices i = 0..T-1 of a beta table are the times (i + 1) / T.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Key, Schedule

Draw = Callable[[Key, int], Array]


def uniform(n: int, start: float = 1.0, end: float = 0.0) -> Array:
    """n equal steps from `start` down to `end`.

    >>> uniform(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return jnp.asarray(np.linspace(start, end, _steps(n) + 1), jnp.float32)


def quadratic(n: int, start: float = 1.0, end: float = 0.0) -> Array:
    """n steps, equal in sqrt(t), finer towards the data (Song et al. 2021, arXiv:2010.02502, appendix D.2).

    >>> quadratic(2).tolist()
    [1.0, 0.25, 0.0]
    """
    return jnp.asarray(np.linspace(start**0.5, end**0.5, _steps(n) + 1) ** 2, jnp.float32)


def trailing(n: int, table: int = 1000) -> Array:
    """n of the `table` discrete times, spaced from the last one, then 0 (Lin et al. 2024, arXiv:2305.08891, table 2).

    >>> trailing(4, 8).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _within(n, table)
    return jnp.asarray(np.append(np.round(np.arange(n, 0, -1) * (table / n)), 0) / table, jnp.float32)


def leading(n: int, table: int = 1000, offset: int = 0) -> Array:
    """n of the `table` discrete times, spaced from the first one by table // n, then 0 (Ho et al. 2020's spacing).

    `offset` shifts the indices (Stable Diffusion 1 uses 1).

    >>> leading(4, 8).tolist()
    [0.875, 0.625, 0.375, 0.125, 0.0]
    """
    _within(n, table)
    index = np.arange(n - 1, -1, -1) * (table // n) + offset
    if index[0] >= table:
        raise ValueError(f"leading: offset {offset} leads past the end of a table of {table}")
    return jnp.asarray(np.append(index + 1, 0) / table, jnp.float32)


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """n noise levels, equal in sigma^(1/rho), then 0 (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    >>> [round(float(t), 3) for t in karras(3)]
    [80.0, 2.515, 0.002, 0.0]
    """
    _steps(n)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"karras: 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho
    return jnp.asarray(np.append(levels, 0), jnp.float32)


def logsnr_uniform(n: int, schedule: Schedule, start: float = 1.0, end: float = 1e-3) -> Array:
    """n times between `start` and `end`, equal in log SNR, then 0 (Lu et al. 2022, arXiv:2206.00927, section 3.4)."""
    ends = jnp.asarray([start, end], jnp.float32)
    low, high = logsnr(schedule, ends)
    if not bool(jnp.isfinite(low) & jnp.isfinite(high)):
        raise ValueError(f"logsnr_uniform: the log SNR is infinite at {start} or {end}")
    inner = inverse_logsnr(schedule, jnp.linspace(low, high, _steps(n))[1:-1], end, start)
    zero = jnp.zeros((1,), jnp.float32)
    return jnp.concatenate([ends[:1], inner, ends[1:], zero] if n > 1 else [ends[:1], zero])


def draw_uniform(low: float = 0.0, high: float = 1.0) -> Draw:
    """Independent uniform times in (low, high]: never 0, where some schedules have an infinite rate."""
    return lambda key, b: high - (high - low) * jax.random.uniform(key, (b,))


def draw_discrete(table: int = 1000) -> Draw:
    """Independent uniform choices of the discrete times 1/T, ..., 1 (Ho et al. 2020, algorithm 1)."""
    return lambda key, b: (jax.random.randint(key, (b,), 1, table + 1) / table).astype(jnp.float32)


def draw_stratified(low: float = 0.0, high: float = 1.0) -> Draw:
    """Uniform times, one in each of b equal cells: low-discrepancy (Kingma et al. 2021, arXiv:2107.00630, app. I.1)."""

    def draw(key: Key, b: int) -> Array:
        u = (jax.random.uniform(key, ()) + jnp.arange(b) / b) % 1.0
        return high - (high - low) * u

    return draw


def draw_logit_normal(mean: float = 0.0, std: float = 1.0) -> Draw:
    """t = sigmoid(N(mean, std^2)) in (0, 1) (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    return lambda key, b: jax.nn.sigmoid(mean + std * jax.random.normal(key, (b,)))


def draw_lognormal(mean: float = -1.2, std: float = 1.2) -> Draw:
    """sigma = exp(N(mean, std^2)) (Karras et al. 2022, table 1)."""
    return lambda key, b: jnp.exp(mean + std * jax.random.normal(key, (b,)))


def _steps(n: int) -> int:
    if n < 1:
        raise ValueError(f"a grid needs at least 1 step, got {n}")
    return n


def _within(n: int, table: int) -> None:
    if not 1 <= n <= table:
        raise ValueError(f"between 1 and {table} steps of a table of {table}, got {n}")
