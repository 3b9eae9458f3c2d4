r"""The loop that applies a sampler over a grid of times, and the ways to put samplers together.

A step moves x from t to s < t. It is given the denoiser, not its value, and calls it as often as it needs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.ops import fold
from diffusion_jax.typing import Array, Cond, Denoise, Denoiser, Key, Prediction, Sampler


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


def memoryless(step: Any) -> Sampler:
    return Sampler(lambda x: (), step)
