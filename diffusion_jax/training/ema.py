r"""Averages of the parameters over the updates: ema <- d ema + (1 - d) params, with a decay d that may grow.

Each function returns the decay as a function of the number of updates made before this one. A train state holds one
average for each decay of its experiment: the first is the one that is judged and drawn from. With no decay at all that
is the average inside a schedule-free optimizer, which costs no memory, or else the parameters as they are.

Power functions (Karras et al. 2024, arXiv:2312.02696, section 3). With t the number of updates so far, the average

    theta_gamma(t) = int_0^t p(tau) theta(tau) dtau,   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)          (1)
    d(t) = (1 - 1/t)^(gamma + 1)                                                                               (2)
    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))                                                (3)

has a width sigma_rel t, the standard deviation of p, that grows with the run. For a path theta that is constant over
each update the recursion with (2) is the integral (1) exactly. Any other profile can be made after training (section
3.2 there) from snapshots i of tracked ones, as theta = sum_i x_i theta_i with the x of least squares,

    A x = b,   A_ij = <p_i, p_j>,   b_i = <p_i, p>                                                             (4)
    <p, q> = (g + 1) (h + 1) / (g + h + 1) min(s, t)^(g + h + 1) / (s^(g + 1) t^(h + 1))                       (5)

p and q having the exponents g and h and ending at s and t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import ScheduleFreeState

from diffusion_jax.typing import Array, InputError, Params

Decay = Callable[[Array], Array]
Decays = Decay | tuple[Decay, ...]
"""One average, several, or () for none: then `evaluation_params` are judged and drawn from."""


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


@dataclass(frozen=True)
class PowerFunction:
    """The decay (2) of the profile whose relative width (3) is `sigma_rel`; made by `power_function`."""

    sigma_rel: float

    def __call__(self, step: Array) -> Array:
        # expm1 of log1p: 1 - 1/t would lose the last digits of 1/t, and those are what the decay is made of.
        t = step.astype(jnp.float32) + 1
        return 1 + jnp.expm1((exponent(self.sigma_rel) + 1) * jnp.log1p(-1 / t))


def power_function(sigma_rel: float) -> PowerFunction:
    """The average (1) of relative width `sigma_rel`, between 0 and 0.28: the paper tracks 0.05 and 0.10.

    >>> [round(float(power_function(0.1)(jnp.int32(n))), 3) for n in (0, 9, 999)]
    [0.0, 0.433, 0.992]
    """
    exponent(sigma_rel)
    return PowerFunction(sigma_rel)


def exponent(sigma_rel: float) -> float:
    """gamma of equation (3), the positive root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    InputError outside of (0, 1 / sqrt(12)), where gamma would not be positive.

    >>> round(exponent(0.05), 2), round(exponent(0.1), 2)
    (16.97, 6.94)
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise InputError(f"ema={sigma_rel}: the relative width of a power function is between 0 and 0.288")
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def width(gamma: float) -> float:
    """sigma_rel of equation (3)."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def reconstruction(
    steps: Sequence[float], sigma_rels: Sequence[float], step: float, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """The weights x of (4), `f64[n]`, with which n snapshots make the profile (step, sigma_rel), and their error.

    steps, sigma_rels: of each snapshot; only those of at most `step` updates may be given. The weights sum to 1, as
    Lagrange's multiplier of (4) makes sure. The error is |sum_i x_i p_i - p| / |p| in the norm of (5).
    """
    t, g = np.asarray(steps, np.float64), np.asarray([exponent(s) for s in sigma_rels])
    h = np.asarray(exponent(sigma_rel))
    a = _inner(t[:, None], g[:, None], t[None], g[None])
    b = _inner(t, g, np.asarray(float(step)), h)
    # In units of each profile's own norm: (4) is nearly singular as it is, for profiles that overlap.
    norm = np.sqrt(np.diag(a))
    n = len(t)
    system = np.zeros((n + 1, n + 1))
    system[:n, :n] = a / np.outer(norm, norm)
    system[n, :n] = system[:n, n] = 1 / norm / np.max(1 / norm)
    right = np.append(b / norm, 1 / np.max(1 / norm))
    x = np.linalg.lstsq(system, right, rcond=1e-14)[0][:n] / norm
    whole = float(_inner(np.asarray(float(step)), h, np.asarray(float(step)), h))
    return x, float(np.sqrt(max(whole - 2 * x @ b + x @ a @ x, 0.0) / whole))


def _inner(s: np.ndarray, g: np.ndarray, t: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Equation (5), by logarithms: t^g alone would overflow."""
    power = (g + h + 1) * np.log(np.minimum(s, t)) - (g + 1) * np.log(s) - (h + 1) * np.log(t)
    return (g + 1) * (h + 1) / (g + h + 1) * np.exp(power)


def several(decays: Decays) -> tuple[Decay, ...]:
    """The decays as a tuple."""
    return decays if isinstance(decays, tuple) else (decays,)


def update(ema: Params, params: Params, decay: Array) -> Params:
    """One step of the average, leaf by leaf."""
    return jax.tree.map(lambda e, p: p + decay * (e - p), ema, params)


def evaluation_params(opt_state: Any, params: Params) -> Params:
    """The parameters to evaluate: the average x of a schedule-free optimizer if that made them, else `params`."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda leaf: isinstance(leaf, ScheduleFreeState))
    found = [state for state in states if isinstance(state, ScheduleFreeState)]
    return optax.contrib.schedule_free_eval_params(found[0], params) if found else params
