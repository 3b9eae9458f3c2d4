r"""Exponential moving averages of the parameters: ema <- d ema + (1 - d) params, with a decay d that may grow.

Each function returns the decay as a function of the number of updates made before this one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.typing import Array, Params

Decay = Callable[[Array], Array]


def constant(decay: float = 0.9999) -> Decay:
    """The same decay at every step (Ho et al. 2020, arXiv:2006.11239, appendix B: 0.9999)."""
    return lambda step: jnp.full((), decay, jnp.float32)


def warmup(decay: float = 0.9999) -> Decay:
    """min(decay, (1 + step) / (10 + step)): short averages first, so that short runs have a useful one.

    >>> float(warmup(0.99)(jnp.int32(0)))
    0.10000000149011612
    """

    def at(step: Array) -> Array:
        n = step.astype(jnp.float32)
        return jnp.minimum(jnp.float32(decay), (1 + n) / (10 + n))

    return at


def half_life(examples: float, batch: int, ramp: float | None = 0.05) -> Decay:
    """An average that halves an update's share after `examples` examples (Karras et al. 2022, arXiv:2206.00364, F.2).

    With `ramp` the half-life is at most that share of the examples seen so far.
    """

    def at(step: Array) -> Array:
        seen = step.astype(jnp.float32) * batch
        life = examples if ramp is None else jnp.minimum(jnp.float32(examples), seen * ramp)
        return jnp.float32(0.5) ** (batch / jnp.maximum(life, 1e-8))

    return at


def update(ema: Params, params: Params, decay: Array) -> Params:
    """One step of the average, leaf by leaf."""
    return jax.tree.map(lambda e, p: p + decay * (e - p), ema, params)
