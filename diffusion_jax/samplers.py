r"""Samplers: ways to move x from t to s < t, and the loop that applies one over a grid of times.

A step is given the denoiser, not its value, and calls it as often as it needs. With the prediction (x0, eps) at x_t:

    DDIM(eta):    x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z,
                  c^2 = eta^2 sigma_s^2 / sigma_t^2 var_ts                                   (1)
    DDPM:         x_s = mean of q(x_s | x_t, x0) + sqrt(variance) z                          (2)
    flow:         dx/dt = alpha' x0 + sigma' eps                                             (3)
    2M:           x_s = alpha_s x0 + sigma_s eps + alpha_s (1 - e^-h) (h / 2 h_prev) (x0 - x0_prev),
                  h = lambda_s - lambda_t,  lambda = log(alpha / sigma)                      (4)
    Langevin:     x <- x + e score + sqrt(2 e) z                                             (5)

with z standard normal and var_ts the variance of q(x_t | x_s). (1) at eta = 1 is (2) with the smaller variance, and
at eta = 0 it is Euler's method for (3) in the time sigma / alpha.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.forward import q_posterior, renoise, transition, variance_bounds
from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.predictions import to_score, to_velocity
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Cond, Denoise, Denoiser, Key, Prediction, Sampler, Schedule


def sample(
    key: Key,
    sampler: Sampler,
    denoiser: Denoiser,
    x: Array,
    times: Array,
    cond: Cond = None,
    *,
    trajectory: bool = False,
) -> Array:
    """Carry x: f32[b *d] from times[0] to times[-1], one step of the sampler for each pair of neighbours.

    times: f32[n + 1], decreasing. Step i draws from fold_in(key, i); a `[b]` array of keys draws per example, so that
    example i depends on its own key alone. Returns f32[b *d], or with `trajectory` all of f32[n + 1, b *d] with x
    first. One `lax.scan`, not jitted inside: jit the largest useful thing around it.
    """
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"sample: times must be f32[n + 1] with n >= 1, got shape {times.shape}")

    def denoise(x: Array, t: Array) -> Prediction:
        return denoiser(x, jnp.broadcast_to(t, x.shape[:1]), cond)

    def body(carry: tuple[Array, Any], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        i, t, s = step
        x, state = sampler.step(fold(key, i), *carry, t, s, denoise)
        return (x, state), x if trajectory else None

    steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
    (last, _), path = jax.lax.scan(body, (x, sampler.init(x)), steps)
    return last if path is None else jnp.concatenate([x[None], path])


def ddim(schedule: Schedule, eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), eq. (1) above: deterministic at eta = 0."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        alpha, sigma = schedule(s)
        share = -jnp.expm1(logsnr(schedule, t) - logsnr(schedule, s))  # var_ts / sigma_t^2
        y = bcast(alpha, x) * p.x0 + bcast(sigma * jnp.sqrt(1 - eta**2 * share), x) * p.eps
        if eta:
            y = y + bcast(eta * sigma * jnp.sqrt(share), x) * normal_like(key, x)
        return y, state

    return _memoryless(step)


def ddpm(schedule: Schedule, variance: Literal["small", "large"] = "small") -> Sampler:
    """Ancestral sampling with a fixed variance, eq. (2) (Ho et al. 2020, arXiv:2006.11239, algorithm 2, section 3.2).

    "small" is the posterior's variance, right for data that is a point; "large" is var_ts, that of the paper's
    CIFAR-10 results. With "small" it equals `ddim(schedule, eta=1)`.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' or 'large', got {variance!r}")

    def std(prediction: Prediction, t: Array, s: Array) -> Array:
        var_ts = transition(schedule, t, s)[1]
        return jnp.sqrt(var_ts) * (schedule(s).sigma / schedule(t).sigma if variance == "small" else 1)

    return _ancestral(schedule, std)


def ancestral(schedule: Schedule) -> Sampler:
    """Ancestral sampling with the learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).

    log variance = v log(upper) + (1 - v) log(lower), v the prediction's `variance_fraction`; ValueError without one.
    """

    def std(prediction: Prediction, t: Array, s: Array) -> Array:
        v = prediction.variance_fraction
        if v is None:
            raise ValueError("ancestral: the denoiser predicts no variance; use ddpm for a fixed one")
        lower, upper = (bcast(bound, v) for bound in variance_bounds(schedule, t, s))
        return jnp.exp((v * upper + (1 - v) * jnp.maximum(lower, -80.0)) / 2)

    return _ancestral(schedule, std)


def euler(schedule: Schedule) -> Sampler:
    """Euler's method for the probability flow (3) in the schedule's own time; one evaluation, first order."""

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        return x + bcast(s - t, x) * to_velocity(schedule, denoise(x, t), t), state

    return _memoryless(step)


def heun(schedule: Schedule) -> Sampler:
    """Heun's method for the probability flow (3) (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    Two evaluations, second order; one evaluation (Euler) where sigma(s) = 0.
    """

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        dt = bcast(s - t, x)
        d = to_velocity(schedule, denoise(x, t), t)
        y = x + dt * d

        def correct() -> Array:
            return x + dt / 2 * (d + to_velocity(schedule, denoise(y, s), s))

        return jax.lax.cond(schedule(s).sigma > 0, correct, lambda: y), state

    return _memoryless(step)


def dpmpp_2m(schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), eq. (4): one evaluation, second order.

    The first step, and one to sigma(s) = 0, are of first order.
    """

    def init(x: Array) -> tuple[Array, Array, Array]:
        return jnp.zeros_like(x), jnp.zeros(()), jnp.zeros((), bool)

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        x0_prev, lam_prev, started = state
        p = denoise(x, t)
        alpha, sigma = schedule(s)
        lam_t, lam_s = logsnr(schedule, t) / 2, logsnr(schedule, s) / 2
        h, h_prev = lam_s - lam_t, lam_t - lam_prev.astype(lam_t.dtype)
        second = started & (sigma > 0)
        ratio = jnp.where(second, h / (2 * jnp.where(second, h_prev, 1)), 0)
        extra = jnp.where(second, -alpha * jnp.expm1(-h) * jnp.where(second, ratio, 0), 0)
        y = bcast(alpha, x) * p.x0 + bcast(sigma, x) * p.eps + bcast(extra, x) * (p.x0 - x0_prev)
        return y, (p.x0, lam_t.astype(lam_prev.dtype), jnp.ones((), bool))

    return Sampler(init, step)


def langevin(schedule: Schedule, snr: float = 0.16, steps: int = 1) -> Sampler:
    """Langevin dynamics at time t, eq. (5): x stays at t, so as a sampler of its own it is annealed Langevin.

    The step size is e = 2 (snr sigma_t)^2, proportional to sigma_t^2 as in Song & Ermon 2019, arXiv:1907.05600,
    algorithm 1. Song et al. 2021, arXiv:2011.13456, algorithms 4-5, write 2 (snr |z| / |score|)^2, which is the same up
    to O(1 / sqrt(d)); but a step that depends on x and z leaves another law than p(x), in two dimensions one of far
    more variance (docs/design/001). Put it before a sampler with `chain` to make it a corrector.
    """
    if snr <= 0 or steps < 1:
        raise ValueError(f"langevin: snr must be positive and steps at least 1, got {snr}, {steps}")

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        e = 2 * (snr * schedule(t).sigma) ** 2

        def body(x: Array, i: Array) -> tuple[Array, None]:
            z, score = normal_like(fold(key, i), x), to_score(schedule, denoise(x, t), t)
            return x + bcast(e, x) * score + bcast(jnp.sqrt(2 * e), x) * z, None

        return jax.lax.scan(body, x, jnp.arange(steps))[0], state

    return _memoryless(step)


def chain(*samplers: Sampler) -> Sampler:
    """Apply several samplers in each step: correctors, which leave x at t, and last the one that moves it to s."""
    if not samplers:
        raise ValueError("chain: needs at least one sampler")
    if len(samplers) == 1:
        return samplers[0]

    def step(key: Key, x: Array, states: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        new = []
        for i, (sampler, state) in enumerate(zip(samplers, states, strict=True)):
            x, state = sampler.step(fold(key, i), x, state, t, s, denoise)
            new.append(state)
        return x, tuple(new)

    return Sampler(lambda x: tuple(sampler.init(x) for sampler in samplers), step)


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


def _memoryless(step: Any) -> Sampler:
    return Sampler(lambda x: (), step)


def _ancestral(schedule: Schedule, std: Any) -> Sampler:
    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        p = denoise(x, t)
        mean, _ = q_posterior(schedule, x, p.x0, t, s)
        noise = bcast(std(p, t, s), x) * normal_like(key, x)
        return mean + jnp.where(schedule(s).sigma > 0, noise, 0), state

    return _memoryless(step)
