r"""The loop that applies a sampler over a grid of times, and the ways to put samplers together.

A step moves x from t to s < t. It is given the denoiser, not its value, and calls it as often as it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffusion_jax.ops import fold, is_batched, is_concrete
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

    ValueError for x without a batch axis, another number of keys than examples, and, where the values of times are
    known, times that do not fall strictly, are not finite or lie outside the sampler's schedule.
    """
    _check(key, sampler, x, times)

    def denoise(x: Array, t: Array) -> Prediction:
        return denoiser(x, jnp.broadcast_to(t, x.shape[:1]), cond)

    def body(carry: tuple[Array, Any], step: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        i, t, s = step
        x, state = sampler.step(fold(key, i), *carry, t, s, denoise)
        return (x, state), x if trajectory else None

    steps = (jnp.arange(times.shape[0] - 1), times[:-1], times[1:])
    (last, _), path = jax.lax.scan(body, (x, sampler.init(x)), steps)
    return last if path is None else jnp.concatenate([x[None], path])


def _check(key: Key, sampler: Sampler, x: Array, times: Array) -> None:
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"sample: x must be floating [b *d], a batch axis first, got {x.dtype}{list(x.shape)}")
    if is_batched(key) and key.shape[0] != x.shape[0]:
        raise ValueError(f"sample: {key.shape[0]} keys for x of shape {x.shape}")
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"sample: times must be f32[n + 1] with n >= 1, got shape {times.shape}")
    if not is_concrete(times):
        return
    with jax.ensure_compile_time_eval():
        first, last = jnp.asarray(times[0]), jnp.asarray(times[-1])
    for i, (t, s) in enumerate(itertools.pairwise(np.asarray(times))):
        if not (np.isfinite(t) and np.isfinite(s) and s < t):
            raise ValueError(f"sample: times must be finite and fall strictly: times[{i}] = {t}, times[{i + 1}] = {s}")

    def step(key: Key, x: Array) -> Any:
        return sampler.step(key, x, sampler.init(x), first, last, lambda x, t: Prediction(x, x, x))

    jax.eval_shape(step, key, x)  # a schedule sees concrete times here and refuses those outside its domain


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


def skipping(inner: Sampler) -> Sampler:
    """`inner`, and nothing where s = t: a grid filled up with its last time is the shorter one, in the same program."""

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        return jax.lax.cond(s < t, lambda: inner.step(key, x, state, t, s, denoise), lambda: (x, state))

    return Sampler(inner.init, step)


def memoryless(step: Any) -> Sampler:
    return Sampler(lambda x: (), step)


def ravelled(
    denoiser: Callable[[Any, Array, Cond], Prediction], example: Any
) -> tuple[Denoiser, Callable[[Any], Array], Callable[[Array], Any]]:
    """A denoiser of pytrees, as one of vectors, and the ways from a batch of trees to vectors f32[b n] and back.

    `denoiser` takes x as a pytree of f32[b *d_i] and predicts trees like it; `example` is one example of x, without
    the batch axis. What works on arrays, samplers and losses alike, then works on the vectors.

    >>> example = {"image": jnp.zeros((2, 2)), "label": jnp.zeros(3)}
    >>> denoiser, ravel, unravel = ravelled(lambda x, t, cond: Prediction(x, x), example)
    >>> jax.tree.map(jnp.shape, unravel(jnp.ones((5, 7))))
    {'image': (5, 2, 2), 'label': (5, 3)}
    """
    back = ravel_pytree(example)[1]
    ravel, unravel = jax.vmap(lambda tree: ravel_pytree(tree)[0]), jax.vmap(back)

    def flat(x: Array, t: Array, cond: Cond = None) -> Prediction:
        x0, eps, fraction = denoiser(unravel(x), t, cond)[:3]
        return Prediction(ravel(x0), ravel(eps), None if fraction is None else ravel(fraction))

    return flat, ravel, unravel
