r"""Time grids for sampling, `f32[n + 1]` decreasing, and draws of training times, `(key, b) -> f32[b]`.

A grid is not a schedule: any grid goes with any schedule, as long as both speak of the same time. Times in [0, 1]
are those of all schedules but `edm`, whose time is the noise level sigma / alpha; `karras`, `exponential`,
`align_your_steps` and `draw_lognormal` are meant for it, and `at_levels` takes their levels to another schedule.
Discrete indices i = 0..T-1 of a beta table are the times (i + 1) / T.

`optimised` fits a grid to a denoiser. Against an accurate trajectory x_0..x_m of the probability flow, on m steps equal
in log SNR, a sampler's step to time k leaves a defect e_k. What it does to the final x0 along a random direction r is
<a_k, e_k> + O(|e_k|^2), with the adjoint a_k = d<r, x0> / d x_k, which one backward pass gives for all k. The grid is
the shortest path of n steps through these m + 1 times, by dynamic programming: the least

    sum_k E |<a_k, e_k>|                                                                     (1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.ops import bcast, is_concrete, normal_like
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Cond, Denoiser, Key, Schedule

Draw = Callable[[Key, int], Array]


def uniform(n: int, start: float = 1.0, end: float = 0.0) -> Array:
    """n equal steps from `start` down to `end`.

    >>> uniform(4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _falls("uniform", start, end)
    return jnp.asarray(np.linspace(start, end, _steps(n) + 1), jnp.float32)


def quadratic(n: int, start: float = 1.0, end: float = 0.0) -> Array:
    """n steps, equal in sqrt(t), finer towards the data (Song et al. 2021, arXiv:2010.02502, appendix D.2).

    >>> quadratic(2).tolist()
    [1.0, 0.25, 0.0]
    """
    _falls("quadratic", start, end)
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
    if offset < 0 or index[0] >= table:
        raise ValueError(f"leading: offset {offset} leads out of a table of {table} with {n} steps")
    return jnp.asarray(np.append(index + 1, 0) / table, jnp.float32)


def beta_quantile(n: int, a: float = 0.6, b: float = 0.6) -> Array:
    """Quantiles of a Beta(a, b) law, t_i = F^-1(1 - i / n) (Lee et al. 2024, arXiv:2407.12173).

    Below 1, a and b make the grid finer at both ends; Beta(1, 1) is `uniform`, Beta(1/2, 1/2) is sin^2.

    >>> [round(float(t), 3) for t in beta_quantile(4, 0.5, 0.5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    from scipy.special import betaincinv

    if a <= 0 or b <= 0:
        raise ValueError(f"beta_quantile: a > 0 and b > 0, got {a}, {b}")
    grid = betaincinv(a, b, np.linspace(1, 0, _steps(n) + 1)).astype(np.float32)
    if np.any(np.diff(grid) >= 0):
        raise ValueError(f"beta_quantile: some of {n} steps of Beta({a}, {b}) are none in float32")
    return jnp.asarray(grid)


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """n noise levels, equal in sigma^(1/rho), then 0 (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    >>> [round(float(t), 3) for t in karras(3)]
    [80.0, 2.515, 0.002, 0.0]
    """
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(f"karras: 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}")
    levels = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), _steps(n)) ** rho
    return jnp.asarray(np.append(levels, 0), jnp.float32)


def exponential(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Array:
    """n noise levels, equal in log sigma, then 0: the limit of `karras` for large rho.

    >>> [round(float(t), 3) for t in exponential(3)]
    [80.0, 0.4, 0.002, 0.0]
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"exponential: 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    return jnp.asarray(np.append(np.geomspace(sigma_max, sigma_min, _steps(n)), 0), jnp.float32)


AYS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(n: int, model: Literal["sd15", "sdxl", "deepfloyd", "svd"]) -> Array:
    """n noise levels optimised for a model, then 0 (Sabour et al. 2024, arXiv:2404.14507, table 3).

    The table's 11 levels, their logarithms interpolated for another n. ValueError for an unknown model.

    >>> [round(float(t), 3) for t in align_your_steps(3, "sd15")]
    [14.615, 1.396, 0.029, 0.0]
    """
    if model not in AYS:
        raise ValueError(f"align_your_steps: unknown model {model!r}: one of {', '.join(AYS)}")
    table = np.log(AYS[model])
    levels = np.exp(np.interp(np.linspace(0, 10, _steps(n)), np.arange(11), table))
    return jnp.asarray(np.append(levels, 0), jnp.float32)


def at_levels(schedule: Schedule, levels: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """The times in [low, high] at which sigma / alpha has the given decreasing levels: f32[n + 1] -> f32[n + 1].

    Level 0 is `low`. ValueError when they leave no decreasing times, as several levels above the schedule's largest do.

    >>> from diffusion_jax.schedules import rectified
    >>> [round(float(t), 3) for t in at_levels(rectified(), karras(3))]
    [0.988, 0.716, 0.002, 0.0]
    """
    found = inverse_logsnr(schedule, -2 * jnp.log(levels), low, high)
    times = jnp.where(levels == 0, jnp.asarray(low, levels.dtype), found)
    if is_concrete(times) and bool(jnp.any(jnp.diff(times) >= 0)):
        raise ValueError(
            f"at_levels: the levels {levels} do not fall within those of the schedule from {low} to {high}"
        )
    return times


def logsnr_uniform(n: int, schedule: Schedule, start: float = 1.0, end: float = 1e-3) -> Array:
    """n times between `start` and `end`, equal in log SNR, then 0 (Lu et al. 2022, arXiv:2206.00927, section 3.4)."""
    _falls("logsnr_uniform", start, end)
    ends = jnp.asarray([start, end], jnp.float32)
    low, high = logsnr(schedule, ends)
    if not bool(jnp.isfinite(low) & jnp.isfinite(high)):
        raise ValueError(f"logsnr_uniform: the log SNR is infinite at {start} or {end}")
    inner = inverse_logsnr(schedule, jnp.linspace(low, high, _steps(n))[1:-1], end, start)
    zero = jnp.zeros((1,), jnp.float32)
    return jnp.concatenate([ends[:1], inner, ends[1:], zero] if n > 1 else [ends[:1], zero])


def optimised(
    key: Key,
    denoiser: Denoiser,
    schedule: Schedule,
    n: int,
    x: Array,
    cond: Cond = None,
    *,
    start: float = 1.0,
    end: float = 1e-3,
    order: Literal[1, 2] = 2,
    fine: int = 128,
) -> Array:
    """n times from `start` to `end`, then 0, for this denoiser and number of steps: the least of eq. (1).

    order 1 takes the defects of `ddim`, order 2 those of `dpmpp_2m`. x: f32[b *d], draws at `start`, for the
    expectation; the key draws r; `fine` is m. It costs m evaluations and their gradients, once, outside of jit. Chen et
    al. 2024 (arXiv:2405.11326) find such paths without the adjoint. (1) is a leading order: below about 8 steps of
    order 2 it may gain nothing. ValueError where the log SNR is infinite, or unless 2 <= n <= fine.
    """
    if not 2 <= n <= fine or order not in (1, 2):
        raise ValueError(f"optimised: n in 2..fine and order 1 or 2, got n = {n}, fine = {fine}, order = {order}")
    times = logsnr_uniform(fine + 1, schedule, start, end)[:-1]
    at = tuple(np.asarray(a, np.float64) for a in (*schedule(times), logsnr(schedule, times) / 2))
    cost = _defects(at, _trajectory(key, denoiser, schedule, x, times, cond), order == 2)
    return jnp.concatenate([times[_shortest(cost, n - 1)], jnp.zeros((1,), times.dtype)])


def _trajectory(key: Key, denoiser: Denoiser, schedule: Schedule, x: Array, times: Array, cond: Cond) -> tuple:
    """a_k, x_k and the predictions x0 and eps, each f64[m + 1, b, d], of `dpmpp_2m` at times equal in log SNR."""
    r = normal_like(key, x)

    @jax.checkpoint
    def body(carry: tuple, step: tuple) -> tuple[tuple, tuple]:
        (x, before), (t, s, second, shift) = carry, step
        x = x + shift
        p = denoiser(x, jnp.broadcast_to(t, x.shape[:1]), cond)
        alpha, sigma = schedule(s)
        half = jnp.where(second, -jnp.expm1((logsnr(schedule, t) - logsnr(schedule, s)) / 2) / 2, 0)
        y = bcast(alpha, x) * (p.x0 + bcast(half, x) * (p.x0 - before)) + bcast(sigma, x) * p.eps
        return (y, p.x0), (x, p.x0, p.eps)

    def final(shifts: Array) -> tuple[Array, tuple]:
        steps = times, jnp.append(times[1:], times[-1]), jnp.arange(times.size) > 0, shifts
        path = jax.lax.scan(body, (x, x), steps)[1]
        return jnp.sum(r * path[1][-1]), path

    adjoint, path = jax.grad(final, has_aux=True)(jnp.zeros((times.size, *x.shape), x.dtype))
    return tuple(np.asarray(a, np.float64).reshape(times.size, x.shape[0], -1) for a in (adjoint, *path))


def _defects(at: tuple[np.ndarray, ...], path: tuple[np.ndarray, ...], second: bool) -> np.ndarray:
    """E |<a_k, e_k>| [i, j, k] of the step from time j to k > j after the one from i; i = j is a first step."""
    (alpha, sigma, lam), (adjoint, x, x0, eps) = at, path
    own = np.einsum("kbd,kbd->kb", adjoint, x)
    by_x0, by_eps = (np.einsum("kbd,jbd->jkb", adjoint, a) for a in (x0, eps))
    cost = np.full((lam.size,) * 3, np.inf)
    for j in range(lam.size - 1):
        k, h = slice(j + 1, None), lam[j + 1 :] - lam[j]
        defect = own[k] - alpha[k, None] * by_x0[j, k] - sigma[k, None] * by_eps[j, k]
        before = np.append(lam[j] - lam[:j], np.inf)
        extra = second * (-alpha[k] * np.expm1(-h) * h) / (2 * before[:, None])
        change = by_x0[j, k] - by_x0[: j + 1, k]
        cost[: j + 1, j, k] = np.mean(np.abs(defect - extra[..., None] * change), axis=-1)
    return cost


def _shortest(cost: np.ndarray, steps: int) -> np.ndarray:
    """The indices [steps + 1] from the first to the last time with the least sum of costs."""
    least = np.full(cost.shape[1:], np.inf)  # over paths that end with the step from j to k
    least[0] = cost[0, 0]
    choices = []
    for _ in range(steps - 1):
        total = least[:, :, None] + cost
        choices.append(total.argmin(0))
        least = total.min(0)
    path = [cost.shape[0] - 1, int(least[:, -1].argmin())]
    for choice in reversed(choices):
        path.append(int(choice[path[-1], path[-2]]))
    return np.asarray(path[::-1])


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


class LossHistory(NamedTuple):
    """The last losses at each discrete time, f32[table, history], and how many there were, i32[table]."""

    losses: Array
    count: Array


def init_importance(table: int = 1000, history: int = 10) -> LossHistory:
    """An empty history for `draw_importance`; the paper keeps 10 losses of each of 1000 times."""
    if table < 1 or history < 1:
        raise ValueError(f"init_importance: table and history at least 1, got {table}, {history}")
    return LossHistory(jnp.zeros((table, history), jnp.float32), jnp.zeros((table,), jnp.int32))


def draw_importance(key: Key, state: LossHistory, b: int, floor: float = 0.001) -> tuple[Array, Array]:
    """Discrete times i / T with probability p_i ~ sqrt(E[L_i^2]), and weights 1 / (T p_i): each f32[b].

    The mean of weight * loss estimates the mean over all times without bias, whatever the history; p is uniform until
    every time has a full one (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3). A share `floor` of the draws,
    not the paper's, stays uniform, which bounds the weights by 1 / floor.
    """
    table, history = state.losses.shape
    root = jnp.sqrt(jnp.mean(state.losses**2, axis=1))
    ready = jnp.all(state.count >= history) & (jnp.sum(root) > 0)
    root = jnp.where(ready, root, 1)
    p = (1 - floor) * root / jnp.sum(root) + floor / table
    i = jax.random.categorical(key, jnp.log(p), shape=(b,))
    return (i + 1).astype(jnp.float32) / table, 1 / (table * p[i])


def update_importance(state: LossHistory, t: Array, losses: Array) -> LossHistory:
    """Put unweighted losses f32[b] at the discrete times t: f32[b] in the place of the oldest there."""
    if t.shape != losses.shape or t.ndim != 1:
        raise ValueError(f"update_importance: t and losses must be [b], got shapes {t.shape} and {losses.shape}")
    table, history = state.losses.shape
    i = jnp.round(t * table).astype(jnp.int32) - 1
    same = (i[:, None] == i[None, :]) & jnp.tril(jnp.ones((t.size, t.size), bool), -1)
    rank = jnp.sum(same, axis=1, dtype=jnp.int32)
    kept = jnp.sum(same, axis=0) < history  # else two would write to one place, in an undefined order
    place = (state.count[i] + rank) % history
    at = state.losses.at[jnp.where(kept, i, table), place]
    return LossHistory(at.set(losses.astype(state.losses.dtype), mode="drop"), state.count.at[i].add(1))


def _steps(n: int) -> int:
    if n != int(n) or n < 1:
        raise ValueError(f"a grid needs a whole number of steps, at least 1, got {n}")
    return n


def _falls(name: str, start: float, end: float) -> None:
    if not 0 <= end < start:
        raise ValueError(f"{name}: times fall, 0 <= end < start, got start {start}, end {end}")


def _within(n: int, table: int) -> None:
    if not 1 <= n <= table:
        raise ValueError(f"between 1 and {table} steps of a table of {table}, got {n}")
