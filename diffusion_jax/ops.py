"""Small array operations that every other module uses."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import ArrayLike

from diffusion_jax.typing import Array, Key


def bcast(c: Array, x: Array) -> Array:
    """Give `c: [*b]` the rank of `x: [*b *d]` by trailing axes of size 1, and then the dtype of x.

    Coefficients are computed in their own precision and rounded once, here, so that x may be bfloat16 while the
    schedule stays float32.

    >>> bcast(jnp.ones((4,)), jnp.ones((4, 8, 8, 3))).shape
    (4, 1, 1, 1)
    """
    if c.ndim > x.ndim:
        raise ValueError(f"bcast: c of shape {c.shape} has more axes than x of shape {x.shape}")
    if c.ndim and c.shape != x.shape[: c.ndim] and c.shape != (1,) * c.ndim:
        raise ValueError(f"bcast: c of shape {c.shape} does not lead x of shape {x.shape}")
    return jnp.reshape(c, c.shape + (1,) * (x.ndim - c.ndim)).astype(x.dtype)


def check_like(name: str, a: Array, x: Array) -> None:
    """ValueError unless `a` has the shape of x; `name` says whose and which argument it is."""
    if a.shape != x.shape:
        raise ValueError(f"{name} has shape {a.shape}, and x {x.shape}")


def check_time(name: str, t: ArrayLike, x: Array) -> None:
    """ValueError unless the times t are f32[] or f32[b], for x: f32[b *d]."""
    shape = jnp.shape(t)
    if shape not in ((), x.shape[:1]):
        raise ValueError(f"{name} must be a scalar or [b] for x of shape {x.shape}, got shape {shape}")


def is_concrete(a: Any) -> bool:
    """True when the values of `a` can be looked at now, False for a tracer: input is checked where it can be.

    >>> is_concrete(jnp.ones(3)), bool(jax.jit(lambda x: jnp.asarray(is_concrete(x)))(1.0))
    (True, False)
    """
    return not isinstance(a, jax.core.Tracer)


def is_batched(key: Key) -> bool:
    """True for an array `[b]` of keys, False for one key; ValueError for anything else.

    >>> is_batched(jax.random.key(0)), is_batched(jax.random.split(jax.random.key(0), 4))
    (False, True)
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim > 1:
        raise ValueError(f"expected a key of jax.random.key or a [b] array of them, got {key.dtype}{list(key.shape)}")
    return key.ndim == 1


def fold(key: Key, data: Array | int) -> Key:
    """`jax.random.fold_in` for one key or, with the same data, for each of a `[b]` array of keys."""
    if is_batched(key):
        return jax.vmap(lambda k: jax.random.fold_in(k, data))(key)
    return jax.random.fold_in(key, data)


def normal_like(key: Key, x: Array) -> Array:
    """Standard normal noise of the shape and dtype of `x: [b *d]`.

    With a `[b]` array of keys, example i is drawn from key i alone, so that it does not depend on the batch.
    """
    if not is_batched(key):
        return jax.random.normal(key, x.shape, x.dtype)
    if key.shape[0] != x.shape[0]:
        raise ValueError(f"{key.shape[0]} keys for a batch of {x.shape[0]} examples")
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(key)


def wide(x: Array) -> Any:
    """The dtype in which sums over x are taken: its own, or float32 for a narrower one."""
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32


def dot(a: Array, b: Array) -> Array:
    """Inner product of each example, summed in float32 at least: f32[b *d], f32[b *d] -> f32[b].

    >>> dot(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4))).tolist()
    [12.0, 12.0]
    """
    return jnp.sum(jnp.reshape(a.astype(wide(a)) * b.astype(wide(a)), (a.shape[0], -1)), axis=1)


def divide(a: Array, b: Array, otherwise: float = 0.0) -> Array:
    """a / b, and `otherwise` where b is 0; its derivatives are finite there."""
    return jnp.where(b == 0, otherwise, a / jnp.where(b == 0, 1, b))


def mean_per_example(x: Array) -> Array:
    """Mean over all axes but the first: `[b *d] -> [b]`.

    >>> mean_per_example(jnp.ones((2, 3, 4))).shape
    (2,)
    """
    return jnp.mean(jnp.reshape(x, (x.shape[0], -1)), axis=1)
