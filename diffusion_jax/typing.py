"""The three nouns (schedule, denoiser, sampler) and the types they are made of.

A noised example is  x_t = alpha(t) x0 + sigma(t) eps,  eps ~ N(0, I)                 (1)

A schedule is the function t -> (alpha, sigma); a denoiser estimates x0 and eps from x_t; a sampler moves x
from a time t to a smaller time s with the denoiser's help. Everything else is a function from one of these to
another of the same type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array
"""A typed key of `jax.random.key`: a scalar, or an array `[b]` of keys that draws per example."""
Cond = Any
"""Any pytree of arrays with a leading batch axis `[b]`, or None."""
Params = Any
"""A plain nested dict of arrays."""


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints it as one line, without a traceback."""


class AlphaSigma(NamedTuple):
    """Signal and noise level of equation (1): each `f32[*b]`."""

    alpha: Array
    sigma: Array


class Prediction(NamedTuple):
    """What a denoiser knows of x_t: each `f32[b *d]`, with x_t = alpha x0 + sigma eps.

    `variance_fraction` is set only by networks with a learned reverse variance: the place in [0, 1] of the log
    variance between its lower and its upper bound (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
    `uncertainty`, f32[b], only by those that learn the log of their expected loss at t, for `denoising_loss`.
    """

    x0: Array
    eps: Array
    variance_fraction: Array | None = None
    uncertainty: Array | None = None


Schedule = Callable[[Array], AlphaSigma]
"""t: f32[*b] -> AlphaSigma of the same shape; the signal-to-noise ratio falls as t grows."""
Denoiser = Callable[[Array, Array, Cond], Prediction]
"""(x: f32[b *d], t: f32[b], cond) -> Prediction."""
Denoise = Callable[[Array, Array], Prediction]
"""(x: f32[b *d], t: f32[]) -> Prediction: a denoiser as a sampler's step sees it."""

Noise = Callable[[Key, Array, Array, Array], Array]
"""(key, x: f32[b *d], t, s) -> standard normal f32[b *d]: what drives a random step from t to s."""
FlowMap = Callable[[Array, Array, Array, Cond], Array]
"""(x: f32[b *d], t: f32[b], s: f32[b], cond) -> x_s: f32[b *d], a model of two times."""


class Sampler(NamedTuple):
    """A way to move x from t to s < t.

    init: (x) -> state, the history of a multistep method or ().
    step: (key, x, state, t, s, denoise) -> (x, state), with scalar t and s.
    """

    init: Callable[[Array], Any]
    step: Callable[[Key, Array, Any, Array, Array, Denoise], tuple[Array, Any]]


class NetApply(Protocol):
    """(params, x: f32[b *d], t: f32[b], cond, *, key=None) -> f32[b *d']; `key` drives dropout, None means none."""

    def __call__(self, params: Params, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array: ...


class Net(NamedTuple):
    """A network as two pure functions; `init(key)` returns its parameters."""

    init: Callable[[Key], Params]
    apply: NetApply
