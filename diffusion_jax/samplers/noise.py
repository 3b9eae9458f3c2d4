r"""What drives a random step: fresh noise, or the increments of one Brownian path that all step sizes share."""

from __future__ import annotations

from diffusion_jax.ops import normal_like
from diffusion_jax.typing import Array, Key


def white(key: Key, x: Array, t: Array, s: Array) -> Array:
    """Fresh standard normal noise in each step."""
    return normal_like(key, x)
