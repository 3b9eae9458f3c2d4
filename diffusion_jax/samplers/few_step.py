r"""Samplers for models that take long steps: consistency functions, and flow maps between any two times.

A consistency function gives the end of the probability flow through x_t, f(x_t, t) = x_end (Song et al. 2023,
arXiv:2303.01469); as a denoiser it stands in for x0. More than one step alternates it with noise:

    x_s = alpha_s / alpha_end f(x_t, t) + sqrt(var_(s, end)) z                               (1)

with alpha_s / alpha_end and the variance those of the forward process from `end` to s.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.forward import renoise, transition
from diffusion_jax.ops import bcast, fold
from diffusion_jax.samplers.driver import memoryless
from diffusion_jax.samplers.noise import white
from diffusion_jax.typing import Array, Cond, Denoise, FlowMap, Key, Noise, Sampler, Schedule


def consistency(schedule: Schedule, end: ArrayLike = 0.0, noise: Noise = white) -> Sampler:
    """Multistep consistency sampling, eq. (1) (Song et al. 2023, arXiv:2303.01469, algorithm 1).

    The denoiser's x0 is f(x, t), the state at `end` (the paper's epsilon, 0.002 on `edm()`); a step to s <= end is f
    itself. Its law is exact for an exact f; with an ordinary denoiser, which predicts the mean, it is not.
    """

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        x_end = denoise(x, t).x0
        alpha, variance = transition(schedule, s, jnp.asarray(end, s.dtype))
        y = bcast(alpha, x) * x_end + bcast(jnp.sqrt(variance), x) * noise(key, x, t, s)
        return jnp.where(s > end, y, x_end), state

    return memoryless(step)


def undershoot(inner: Sampler, schedule: Schedule, gamma: float) -> Sampler:
    """Go down to r = (1 - gamma) s by `inner`, then up to s by noise: gamma = 0 is `inner`, 1 goes down to time 0.

    With `ddim(schedule)` this is the strategic stochastic sampling of trajectory consistency distillation (Zheng et al.
    2024, arXiv:2402.19159), and at gamma = 1 `consistency`; with `jump(flow_map)` it is the gamma-sampling of
    consistency trajectory models (Kim et al. 2024, arXiv:2310.02279), who write sqrt(1 - gamma^2) for 1 - gamma.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"undershoot: gamma must be in [0, 1], got {gamma}")

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        r = (1 - gamma) * s
        x, state = inner.step(fold(key, 0), x, state, t, r, denoise)
        return jnp.where(s > 0, renoise(fold(key, 1), schedule, x, r, s), x), state

    return inner if gamma == 0 else Sampler(inner.init, step)


def jump(flow_map: FlowMap, cond: Cond = None) -> Sampler:
    """Steps of a flow map, x_s = flow_map(x_t, t, s, cond): one evaluation of it, and none of the denoiser.

    On the grid [1, 0] it is the one-step sampler of consistency models, MeanFlow and shortcut models. `sample` still
    takes a denoiser, which is not called.
    """

    def step(key: Key, x: Array, state: tuple, t: Array, s: Array, denoise: Denoise) -> tuple[Array, tuple]:
        t, s = (jnp.broadcast_to(time, x.shape[:1]) for time in (t, s))
        return flow_map(x, t, s, cond), state

    return memoryless(step)
