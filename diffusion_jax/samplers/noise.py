r"""What drives a random step: fresh noise, or the increments of one Brownian path that all step sizes share.

While the predicted x0 stays the same, the reverse process moves alpha x / sigma^2 by a drift and by the increments of a
Brownian motion B whose clock is the SNR = e^(2 lambda), lambda = log(alpha / sigma). So the noise of a step is

    z = (B(SNR_s) - B(SNR_t)) / sqrt(SNR_s - SNR_t)
      = (Y_s - e^-h Y_t) / sqrt(1 - e^(-2 h)),   h = lambda_s - lambda_t,  Y = B / sqrt(SNR)   (1)

Its second form stays in range: Y is stationary in lambda, with Cov(Y, Y') = e^-|lambda - lambda'|. Between two known
values, at distances p from the left and q from the right, Y is normal with

    mean      (sinh(q) Y_left + sinh(p) Y_right) / sinh(p + q)
    variance  2 sinh(p) sinh(q) / sinh(p + q)                                                  (2)

so its value anywhere follows by halving an interval of lambda, with one key for each midpoint and nothing stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.ops import fold, is_concrete, normal_like
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Key, Noise, Schedule


def white(key: Key, x: Array, t: Array, s: Array) -> Array:
    """Fresh standard normal noise in each step."""
    return normal_like(key, x)


def brownian(key: Key, schedule: Schedule, start: ArrayLike, end: ArrayLike, depth: int = 14) -> Noise:
    """The increments (1) of one Brownian path, the same for all grids of times between `start` and `end` < start.

    A sampler then converges path by path as its grid is refined. The path is that of `key`, not of the step's key; a
    `[b]` array of keys gives each example its own. Increments over disjoint steps are independent standard normals if
    the grid's times lie in different ones of the 2^depth equal cells of [lambda_start, lambda_end]; one costs
    2 depth + 6 draws. Outside of start and end only times without signal or without noise may be visited.
    ValueError if lambda is infinite at one of them or does not rise from start to end. The idea is the virtual Brownian
    tree of Li et al. 2020, arXiv:2001.01328, section 4; the clock and (2) make it exact for the reverse process.
    """
    if is_concrete(start) and is_concrete(end):
        with jax.ensure_compile_time_eval():
            low, high = np.asarray(logsnr(schedule, jnp.asarray([start, end], jnp.float32)))
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"brownian: the log SNR must be finite and rise from {start} to {end}, got {low}, {high}")

    def noise(step_key: Key, x: Array, t: Array, s: Array) -> Array:
        lam = logsnr(schedule, jnp.stack([t, s])) / 2
        low, high = logsnr(schedule, jnp.asarray([start, end], t.dtype)) / 2
        like, h = jnp.zeros(x.shape, lam.dtype), lam[1] - lam[0]
        y_t, y_s = jax.vmap(lambda lam: _path(key, like, lam, low, high, depth))(jnp.clip(lam, low, high))
        return ((y_s - jnp.exp(-h) * y_t) / jnp.sqrt(-jnp.expm1(-2 * h))).astype(x.dtype)

    return noise


def _path(key: Key, like: Array, lam: Array, low: Array, high: Array, depth: int) -> Array:
    """Y at lam in [low, high], of the shape and dtype of `like`: depth halvings by (2), and (2) in the last cell."""

    def draw(i: Array | int) -> Array:
        return normal_like(fold(key, i), like)

    def between(m: Array, a: Array, b: Array, y_a: Array, y_b: Array, z: Array) -> Array:
        p, q, whole = jnp.sinh(m - a), jnp.sinh(b - m), jnp.sinh(b - a)
        return q / whole * y_a + p / whole * y_b + jnp.sqrt(2 * p * q / whole) * z

    def halve(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, a, b, y_a, y_b = carry  # cells are numbered as in a heap: the halves of i are 2 i and 2 i + 1
        m = (a + b) / 2
        y_m, right = between(m, a, b, y_a, y_b, draw(i)), lam >= m
        halves = (2 * i, a, m, y_a, y_m), (2 * i + 1, m, b, y_m, y_b)
        return jax.tree.map(lambda first, second: jnp.where(right, second, first), *halves)

    y_low = draw(0)
    y_high = jnp.exp(low - high) * y_low + jnp.sqrt(-jnp.expm1(2 * (low - high))) * draw(2 ** (depth + 1))
    whole = jnp.ones((), jnp.int32), low, high, y_low, y_high
    i, a, b, y_a, y_b = jax.lax.fori_loop(0, depth, halve, whole)
    return between(lam, a, b, y_a, y_b, draw(i))
