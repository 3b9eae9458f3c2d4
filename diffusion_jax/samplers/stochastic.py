r"""Samplers that discretise the reverse stochastic differential equation, or that add noise to another one's steps.

With the drift f and the diffusion g of the forward process (`schedules`, eq. 3), the reverse process has the same
marginals (Song et al. 2021, arXiv:2011.13456, eq. 6):

    dx = (f x - g^2 score) dt + g dw,  score = -eps / sigma                                  (1)

Euler-Maruyama takes (1) at t as it is. Reverse diffusion takes the forward step x_t = alpha_ts x_s + sqrt(var_ts) z for
what (1) discretises, with f dt = alpha_ts - 1 and g^2 dt = var_ts; it needs no derivative and is finite at both ends:

    x_s = x - (f dt) x + (g^2 dt) score + sqrt(g^2 dt) z                                     (2)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.forward import renoise, transition
from diffusion_jax.ops import bcast, fold, is_concrete
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import drift_diffusion, inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Denoise, Key, Noise, Sampler, Schedule


def euler_maruyama(schedule: Schedule, noise: Noise = white) -> Sampler:
    """Euler-Maruyama on the reverse process: eq. (2) with f dt and g^2 dt taken at t. One evaluation, weak order 1.

    Not from a time without signal, where f is infinite. A step to sigma_s = 0 leaves the noise out.
    """

    def coefficients(t: Array, s: Array) -> tuple[Array, Array]:
        f, g = drift_diffusion(schedule, t)
        return f * (t - s), g**2 * (t - s)

    return _reverse(schedule, coefficients, noise)


def reverse_diffusion(schedule: Schedule, noise: Noise = white) -> Sampler:
    """Reverse diffusion, eq. (2) (Song et al. 2021, arXiv:2011.13456, eq. 46). One evaluation, weak order 1.

    The predictor of algorithm 2, x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_t^2 - sigma_s^2) z, and of algorithm 3,
    (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z. With its corrector, which acts at t before it, it is
    `chain(langevin(schedule, snr), reverse_diffusion(schedule))`. A step to sigma_s = 0 leaves the noise out.
    """

    def coefficients(t: Array, s: Array) -> tuple[Array, Array]:
        alpha_ts, var_ts = transition(schedule, t, s)
        return alpha_ts - 1, var_ts

    return _reverse(schedule, coefficients, noise)


def _reverse(schedule: Schedule, coefficients: Any, noise: Noise) -> Sampler:
    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        f, g2 = coefficients(t, s)
        mean = bcast(1 - f, x) * x - bcast(g2 / schedule(t).sigma, x) * denoise(x, t).eps
        shake = jnp.where(schedule(s).sigma > 0, jnp.sqrt(g2), 0)
        return mean + bcast(shake, x) * noise(key, x, t, s), state

    return memoryless(step)


def restart(inner: Sampler, schedule: Schedule, times: Array, repeats: int) -> Sampler:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878, algorithm 1): go back up to t_max and down again, K times.

    times: f32[n + 1], decreasing from t_max to t_min: the n steps of `inner` in the restart interval; `repeats` is K.
    The step that comes to t_min, or first below it, is followed by K times noise from there up to t_max and the n steps
    down to it. Several intervals nest, `restart(restart(inner, ...), ...)`, as long as none contains another's t_min.
    The law of each time is kept: the gain is that noise forgets earlier errors. ValueError if times do not fall.
    """
    if times.ndim != 1 or times.shape[0] < 2 or repeats < 1:
        raise ValueError(f"restart: times must be f32[n + 1], n >= 1, repeats >= 1; got {times.shape}, {repeats}")
    if is_concrete(times) and not np.all(np.diff(np.asarray(times)) < 0):
        raise ValueError(f"restart: times must fall from t_max to t_min, got {times}")

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        x, state = inner.step(fold(key, 0), x, state, t, s, denoise)
        interval = jnp.asarray(times, t.dtype)
        t_min, grid = interval[-1], interval.at[-1].set(s)

        def again(carry: tuple[Array, Any], k: Array) -> tuple[tuple[Array, Any], None]:
            x = renoise(fold(key, k), schedule, carry[0], s, grid[0])

            def down(carry: tuple[Array, Any], step: tuple[Array, ...]) -> tuple[tuple[Array, Any], None]:
                i, t, s = step
                return inner.step(fold(fold(key, k), i), *carry, t, s, denoise), None

            steps = (jnp.arange(1, times.shape[0]), grid[:-1], grid[1:])
            return jax.lax.scan(down, (x, inner.init(x)), steps)[0], None

        reached, ks = (t > t_min) & (s <= t_min), jnp.arange(1, repeats + 1)
        return jax.lax.cond(reached, lambda: jax.lax.scan(again, (x, state), ks)[0], lambda: (x, state))

    return Sampler(inner.init, step)


def churn(
    inner: Sampler,
    schedule: Schedule,
    rate: float,
    t_min: ArrayLike,
    t_max: ArrayLike,
    limit: ArrayLike,
    noise: float = 1.003,
) -> Sampler:
    """Add noise before each step of `inner` (Karras et al. 2022, algorithm 2): from t up to t_hat, then down to s.

    The noise-to-signal ratio grows by 1 + min(rate, sqrt(2) - 1) where t_min <= t <= t_max, and t_hat never passes
    `limit`, where the schedule's time ends (1, or EDM's largest sigma). The paper's rate is S_churn / N and `noise` its
    S_noise: EDM on 18 steps of CIFAR-10 is `churn(heun(edm()), edm(), 40 / 18, 0.05, 50.0, 80.0)`. Rate 0 is `inner`.
    """
    if rate < 0:
        raise ValueError(f"churn: rate must not be negative, got {rate}")
    gamma = min(rate, 2**0.5 - 1)

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        target = logsnr(schedule, t) - 2 * jnp.log1p(jnp.asarray(gamma, t.dtype))
        raised = inverse_logsnr(schedule, target, t, jnp.maximum(t, jnp.asarray(limit, t.dtype)))
        t_hat = jnp.where((t >= t_min) & (t <= t_max) & (t < limit), raised, t)
        scaled = bcast(transition(schedule, t_hat, t)[0], x) * x
        up = scaled + noise * (renoise(fold(key, 0), schedule, x, t, t_hat) - scaled)
        up = jnp.where(t_hat > t, up, x)  # at t_hat = t without signal, alpha / alpha is undefined
        return inner.step(fold(key, 1), up, state, t_hat, s, denoise)

    return inner if gamma == 0 else Sampler(inner.init, step)
