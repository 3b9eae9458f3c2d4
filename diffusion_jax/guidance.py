r"""Guidance: functions from denoisers to denoisers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.ops import bcast
from diffusion_jax.predictions import from_x0
from diffusion_jax.typing import Array, Cond, Denoiser, Prediction, Schedule


def classifier_free(denoiser: Denoiser, null: Cond, scale: ArrayLike | Callable[[Array], Array]) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with scale = 1 + w).

    prediction = unconditional + scale (conditional - unconditional)

    Scale 1 is the conditional model and 0 the unconditional one. `scale` may be a traced scalar, or a function of
    t: f32[b] -> f32[b]. The leaves of `null`, the "no condition" value, are broadcast to those of cond. Both
    predictions come from one call on a batch of 2b; a Python 1 costs nothing. ValueError without a condition.
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return denoiser

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        if cond is None:
            raise ValueError("classifier_free: needs a condition")
        b = x.shape[0]
        nulls = jax.tree.map(lambda n, c: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape), null, cond)
        both = denoiser(
            jnp.concatenate([x, x]),
            jnp.concatenate([t, t]),
            jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, nulls),
        )
        w = scale(t) if callable(scale) else jnp.full_like(t, scale)

        def mix(y: Array) -> Array:
            return y[b:] + bcast(w, x) * (y[:b] - y[b:])

        fraction = both.variance_fraction
        return Prediction(mix(both.x0), mix(both.eps), None if fraction is None else fraction[:b])

    return guided


def static_threshold(denoiser: Denoiser, schedule: Schedule, limit: float = 1.0) -> Denoiser:
    """Clip x0 to [-limit, limit] and keep eps consistent with it (Ho et al. 2020; Saharia et al. 2022, sec. 2.3)."""

    def clipped(x: Array, t: Array, cond: Cond = None) -> Prediction:
        prediction = denoiser(x, t, cond)
        x0 = jnp.clip(prediction.x0, -limit, limit)
        return from_x0(schedule, x, t, x0)._replace(variance_fraction=prediction.variance_fraction)

    return clipped
