r"""Guidance: what steers or sharpens a sample, as functions from denoisers to denoisers.

Let p_c be the prediction given a condition and p_0 the one without. Both fulfil x = alpha x0 + sigma eps, and so does

    p_w = p_0 + w (p_c - p_0),   the score of   p_t(x | c)^w p_t(x)^(1 - w)                      (1)

at each single t. These products are not the noised versions of one law: for conditional N(m, v_c) and unconditional
N(m, v_0) data the probability flow of (1) ends, from pure noise, in

    N(m, v_c^w v_0^(1-w)),   while   p(x | c)^w p(x)^(1-w)   has variance  1 / (w / v_c + (1 - w) / v_0)     (2)

and for N(m_c, v) and N(m_0, v) in N(w m_c + (1 - w) m_0, v). A classifier's gradient, by Bayes' rule, adds to eps

    eps = eps_0 - w sigma grad_x log p_t(c | x),   x0 = x0_0 + w sigma^2 / alpha grad_x log p_t(c | x)          (3)

A scale w is a number, a traced scalar, f32[b], or a function of t: f32[b]. It is never compiled in when it is traced;
where it is neutral for the whole batch, one `lax.cond` on a scalar runs the one model that is needed and no other.
Under `vmap` such a condition becomes a selection, and both sides are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.ops import bcast, divide, dot, is_concrete, wide
from diffusion_jax.predictions import FROM, TO, Predicts, from_x0, lookup
from diffusion_jax.typing import Array, Cond, Denoise, Denoiser, Key, Prediction, Sampler, Schedule

Scale = ArrayLike | Callable[[Array], Array]
"""How strongly to guide: a scalar, f32[b], or a function of t: f32[b] that returns either."""


def classifier(
    denoiser: Denoiser, schedule: Schedule, log_prob: Callable[[Array, Array, Cond], Array], scale: Scale
) -> Denoiser:
    """Classifier guidance, eq. (3) (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4.2, eq. 14).

    log_prob: (x: f32[b *d], t: f32[b], cond) -> f32[b], log p_t(cond | x) of a classifier of noisy data. At scale 1 an
    exact one turns the unconditional denoiser into the conditional one; at scale 0 it is not evaluated. ValueError
    unless log_prob returns one number per example.
    """

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        w, plain = _weights(scale, x, t), denoiser(x, t, cond)

        def total(y: Array) -> Array:
            logp = log_prob(y, t, cond)
            if logp.shape != t.shape:
                raise ValueError(f"classifier: log_prob returned shape {logp.shape} for x of shape {x.shape}")
            return jnp.sum(logp)

        def steer() -> Prediction:
            alpha, sigma = schedule(t)
            gradient = jax.grad(total)(x)
            far = jnp.where(alpha == 0, 0, sigma**2 / jnp.where(alpha == 0, 1, alpha))  # nothing to tell at alpha = 0
            x0 = plain.x0 + bcast(w * far, x) * gradient
            return plain._replace(x0=x0, eps=plain.eps - bcast(w * sigma, x) * gradient)

        return _unless(scale, w, 0, lambda: plain, steer)

    return guided


def classifier_free(denoiser: Denoiser, null: Cond, scale: Scale) -> Denoiser:
    """Classifier-free guidance, eq. (1) (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, with scale = 1 + w).

    Scale 1 is the conditional model, and runs it alone; 0 is the unconditional one. The leaves of `null`, the "no
    condition" value, are broadcast to those of cond. Both predictions come from one call on a batch of 2b. ValueError
    without a condition, or if cond, null or scale do not fit x.
    """
    return _guided(denoiser, null, scale, lambda x, t, w, yes, no: _toward(no, yes, w))


def interval(schedule: Schedule, scale: Scale, low: ArrayLike, high: ArrayLike) -> Callable[[Array], Array]:
    """A scale for guidance in a limited interval of noise levels (Kynkäänniemi et al. 2024, arXiv:2404.07724).

    `scale` where low < sigma / alpha <= high, and 1 elsewhere, where `classifier_free` and its kin then run one model.
    ValueError unless 0 <= low < high; `high` may be infinite.

    >>> from diffusion_jax.schedules import edm
    >>> interval(edm(), 3.0, 0.5, 2.0)(jnp.asarray([0.5, 1.0, 2.0, 80.0])).tolist()
    [1.0, 3.0, 3.0, 1.0]
    """
    if is_concrete(low) and is_concrete(high) and not 0 <= np.asarray(low) < np.asarray(high):
        raise ValueError(f"interval: 0 <= low < high, got {low}, {high}")

    def inside(t: Array) -> Array:
        alpha, sigma = schedule(t)
        level, (above, upto) = sigma / alpha, (jnp.asarray(end, t.dtype) for end in (low, high))
        w = scale(t) if callable(scale) else jnp.asarray(scale, t.dtype)
        return jnp.where((above < level) & (level <= upto), w, 1)

    return inside


def cfg_rescale(
    denoiser: Denoiser, schedule: Schedule, null: Cond, scale: Scale, phi: ArrayLike, target: Predicts = "v"
) -> Denoiser:
    """Classifier-free guidance that keeps the contrast (Lin et al. 2024, arXiv:2305.08891, section 3.4).

    y = y_w (phi std(y_c) / std(y_w) + 1 - phi), std over each example; phi = 0 is `classifier_free`. The paper's y is
    the output of its network, a v; `target` is any name of the hub. ValueError unless phi is in [0, 1].
    """
    to, back = lookup(TO, target), lookup(FROM, target)
    _unit_interval("cfg_rescale: phi", phi)

    def combine(x: Array, t: Array, w: Array, yes: Prediction, no: Prediction) -> Prediction:
        y, wanted = to(schedule, _toward(no, yes, w), t), to(schedule, yes, t)
        factor = 1 + jnp.asarray(phi, wide(y)) * (divide(_std(wanted), _std(y), 1) - 1)
        return back(schedule, x, t, bcast(factor, y) * y)._replace(variance_fraction=yes.variance_fraction)

    return _guided(denoiser, null, scale, combine)


def cfg_pp(denoiser: Denoiser, null: Cond, scale: Scale) -> Denoiser:
    """CFG++: guide the data, renoise without guidance (Chung et al. 2024, arXiv:2406.08070, algorithm 2).

    x0 = x0_0 + scale (x0_c - x0_0), eps = eps_0; the paper's scale is in [0, 1], and 0 is the unconditional model, run
    alone. Here x = alpha x0 + sigma eps is given up on purpose: with `ddim` this is the paper's step, and a sampler
    that derives one of the two from x and the other does something else.
    """

    def combine(x: Array, t: Array, w: Array, yes: Prediction, no: Prediction) -> Prediction:
        return no._replace(x0=_toward(no, yes, w).x0)

    return _guided(denoiser, null, scale, combine, neutral=0)


def apg(
    denoiser: Denoiser, schedule: Schedule, null: Cond, scale: Scale, eta: ArrayLike, radius: ArrayLike = np.inf
) -> Denoiser:
    """Adaptive projected guidance without its momentum (Sadat et al. 2024, arXiv:2410.02416).

    x0 = x0_c + (scale - 1) (d_orthogonal + eta d_parallel),  d = x0_c - x0_0 shortened to the norm `radius`

    with the parts of d across and along x0_c. eta = 1 with an infinite radius is `classifier_free`; the paper prefers
    eta = 0. The norm is the root of the sum of squares over an example. The momentum needs a memory: `apg_momentum`.
    """

    def combine(x: Array, t: Array, w: Array, yes: Prediction, no: Prediction) -> Prediction:
        return _projected(schedule, x, t, yes, yes.x0 - no.x0, w, eta, radius)

    return _guided(denoiser, null, scale, combine)


def apg_momentum(
    inner: Sampler,
    schedule: Schedule,
    unconditional: Denoiser,
    scale: Scale,
    eta: ArrayLike,
    radius: ArrayLike,
    momentum: ArrayLike,
) -> Sampler:
    """`apg` with the average d_i = x0_c - x0_0 + momentum d_(i-1) over steps, from 0; the paper's momentum is negative.

    A memory belongs to a sampler, so this is sampler -> sampler: `inner` moves x with the guided denoiser. The denoiser
    given to `sample` is the conditional one, and `unconditional` is called with cond None, in a call of its own. All
    evaluations of a step share the average before it, which then takes in d at the step's (x, t); if `inner`
    does not evaluate there (`churn` does not: put it outside) that costs one more evaluation of each. Momentum 0 is
    `apg`.
    """

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        average, inner_state = state

        def look(y: Array, u: Array) -> tuple[Prediction, Array]:
            yes, no = denoise(y, u), unconditional(y, jnp.broadcast_to(u, y.shape[:1]), None)
            return yes, yes.x0 - no.x0 + jnp.asarray(momentum, y.dtype) * average

        first = look(x, t)

        def guided(y: Array, u: Array) -> Prediction:
            yes, d = first if y is x and u is t else look(y, u)
            times = jnp.broadcast_to(u, y.shape[:1])
            return _projected(schedule, y, u, yes, d, _weights(scale, y, times), eta, radius)

        x, inner_state = inner.step(key, x, inner_state, t, s, guided)
        return x, (first[1], inner_state)

    return Sampler(lambda x: (jnp.zeros_like(x), inner.init(x)), step)


def autoguidance(denoiser: Denoiser, worse: Denoiser, scale: Scale) -> Denoiser:
    """Guidance away from a worse model of the same condition (Karras et al. 2024, arXiv:2406.02507).

    worse + scale (denoiser - worse), eq. (1) with the worse model as p_0; scale 1 runs the better model alone.
    """

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        w = _weights(scale, x, t)

        def both() -> Prediction:
            return _toward(worse(x, t, cond), denoiser(x, t, cond), w)

        return _unless(scale, w, 1, lambda: denoiser(x, t, cond), both)

    return guided


def two_conditions(denoiser: Denoiser, first: Cond, null: Cond, scale: Scale, first_scale: Scale) -> Denoiser:
    """Two conditions with a scale each (Brooks et al. 2023, arXiv:2211.09800, eq. 3).

    p = p_0 + first_scale (p_1 - p_0) + scale (p_c - p_1), where p_c knows cond, p_1 `first`, which is cond with one of
    the two absent, and p_0 `null`, with both absent. The three come from one call on a batch of 3b. ValueError as in
    `classifier_free`, which it is at scale 0.
    """

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        both, one, none = _each(denoiser, x, t, cond, first, null)
        base, w = _toward(none, one, _weights(first_scale, x, t)), bcast(_weights(scale, x, t), x)
        return Prediction(base.x0 + w * (both.x0 - one.x0), base.eps + w * (both.eps - one.eps), both.variance_fraction)

    return guided


def perpendicular(
    denoiser: Denoiser, null: Cond, negatives: Sequence[Cond], scale: Scale, weights: Sequence[ArrayLike]
) -> Denoiser:
    """Negative conditions that cannot oppose the positive one (Perp-Neg; Armandpour et al. 2023, arXiv:2304.04968).

    eps = eps_0 + scale (pos - sum_i weights_i neg_i across pos),  pos = eps_c - eps_0,  neg_i = eps_i - eps_0

    x0 follows with the same coefficients and stays consistent. No negatives, or weights 0, is `classifier_free`. All
    2 + n predictions come from one call. ValueError unless there is a weight for each negative condition.
    """
    if len(negatives) != len(weights):
        raise ValueError(f"perpendicular: {len(negatives)} negatives and {len(weights)} weights")

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        w = _weights(scale, x, t)
        yes, no, *bad = _each(denoiser, x, t, cond, null, *negatives)
        pos = yes.eps - no.eps
        along = [divide(dot(p.eps - no.eps, pos), dot(pos, pos)) for p in bad]

        def combine(plus: Array, base: Array, minus: list[Array]) -> Array:
            d = plus - base
            for y, c, v in zip(minus, along, weights, strict=True):
                d = d - jnp.asarray(v, d.dtype) * (y - base - bcast(c, d) * (plus - base))
            return base + bcast(w, d) * d

        return Prediction(
            combine(yes.x0, no.x0, [p.x0 for p in bad]),
            combine(yes.eps, no.eps, [p.eps for p in bad]),
            yes.variance_fraction,
        )

    return guided


def static_threshold(denoiser: Denoiser, schedule: Schedule, limit: float = 1.0) -> Denoiser:
    """Clip x0 to [-limit, limit] and keep eps consistent with it (Ho et al. 2020; Saharia et al. 2022, sec. 2.3)."""
    return _with_x0(denoiser, schedule, lambda x0: jnp.clip(x0, -limit, limit))


def dynamic_threshold(denoiser: Denoiser, schedule: Schedule, percentile: ArrayLike, limit: float = 1.0) -> Denoiser:
    """Clip x0 to a percentile of its own size, if that is above the limit, and scale it back to the limit.

    x0 = clip(x0, -m, m) limit / m,  m = max(limit, percentile of |x0| over the example), eps consistent with it
    (Saharia et al. 2022, arXiv:2205.11487, section 2.3). `percentile` is a fraction, such as 0.995; at 1 the largest
    entry becomes the limit. ValueError unless it is in [0, 1].
    """
    _unit_interval("dynamic_threshold: percentile", percentile)

    def clip(x0: Array) -> Array:
        size = jnp.reshape(jnp.abs(x0), (x0.shape[0], -1)).astype(wide(x0))
        m = bcast(jnp.maximum(jnp.quantile(size, jnp.asarray(percentile, size.dtype), axis=1), limit), x0)
        return jnp.clip(x0, -m, m) * (limit / m)

    return _with_x0(denoiser, schedule, clip)


def _with_x0(denoiser: Denoiser, schedule: Schedule, change: Callable[[Array], Array]) -> Denoiser:
    def changed(x: Array, t: Array, cond: Cond = None) -> Prediction:
        prediction = denoiser(x, t, cond)
        new = from_x0(schedule, x, t, change(prediction.x0))
        return new._replace(variance_fraction=prediction.variance_fraction)

    return changed


def _guided(
    denoiser: Denoiser,
    null: Cond,
    scale: Scale,
    combine: Callable[[Array, Array, Array, Prediction, Prediction], Prediction],
    neutral: int = 1,
) -> Denoiser:
    """combine(x, t, w, conditional, unconditional), or where w is neutral (0 or 1) the one model that counts."""

    def guided(x: Array, t: Array, cond: Cond = None) -> Prediction:
        w, only = _weights(scale, x, t), _fitted(x, cond, null)[0 if neutral == 1 else 1]

        def both() -> Prediction:
            return combine(x, t, w, *_each(denoiser, x, t, cond, null))

        return _unless(scale, w, neutral, lambda: denoiser(x, t, only), both)

    return guided


def _weights(scale: Scale, x: Array, t: Array) -> Array:
    """The scale of each example, f32[b]."""
    w = jnp.asarray(scale(t) if callable(scale) else scale)
    if w.shape not in ((), x.shape[:1]):
        raise ValueError(f"guidance: scale has shape {w.shape}, not () or {x.shape[:1]}, for x of shape {x.shape}")
    return jnp.broadcast_to(w.astype(t.dtype), x.shape[:1])


def _unless(
    scale: Scale, w: Array, neutral: int, plain: Callable[[], Prediction], guided: Callable[[], Prediction]
) -> Prediction:
    """plain() where w is neutral for the whole batch, else guided(): decided now if the scale is known now."""
    if not callable(scale) and is_concrete(scale):
        return plain() if np.all(np.asarray(scale) == neutral) else guided()
    # A learned uncertainty is that of one model: guidance drops it, on both branches alike.
    bare = [lambda branch=branch: branch()._replace(uncertainty=None) for branch in (plain, guided)]
    return jax.lax.cond(jnp.all(w == neutral), *bare)


def _each(denoiser: Denoiser, x: Array, t: Array, cond: Cond, *others: Cond) -> list[Prediction]:
    """Predictions with cond and with each of the others, from one call on a batch of n b."""
    conds, b = _fitted(x, cond, *others), x.shape[0]
    n = len(conds)
    stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conds)
    every = denoiser(jnp.concatenate([x] * n), jnp.concatenate([t] * n), stacked)
    return [jax.tree.map(lambda y, i=i: y[i * b : (i + 1) * b], every) for i in range(n)]


def _fitted(x: Array, cond: Cond, *others: Cond) -> list[Cond]:
    """cond, which must lead like x, and the others with each leaf broadcast to that of cond."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(cond)]
    if not shapes or any(shape[:1] != x.shape[:1] for shape in shapes):
        raise ValueError(f"guidance: needs a condition of [{x.shape[0]}] for x of shape {x.shape}, got shapes {shapes}")

    def fit(c: Array, value: ArrayLike) -> Array:
        try:
            return jnp.broadcast_to(jnp.asarray(value, c.dtype), c.shape)
        except ValueError:
            message = f"guidance: a null or negative of shape {np.shape(value)} does not broadcast to cond {c.shape}"
            raise ValueError(message) from None

    def fit_all(other: Cond) -> Cond:
        if jax.tree.structure(other) != jax.tree.structure(cond):
            trees = jax.tree.structure(cond), jax.tree.structure(other)
            raise ValueError(f"guidance: cond is {trees[0]}, a null or negative {trees[1]}")
        return jax.tree.map(fit, cond, other)

    return [cond, *map(fit_all, others)]


def _toward(a: Prediction, b: Prediction, w: Array) -> Prediction:
    """a + w (b - a), with b's variance."""
    return Prediction(
        a.x0 + bcast(w, a.x0) * (b.x0 - a.x0), a.eps + bcast(w, a.eps) * (b.eps - a.eps), b.variance_fraction
    )


def _projected(
    schedule: Schedule, x: Array, t: Array, yes: Prediction, d: Array, w: Array, eta: ArrayLike, radius: ArrayLike
) -> Prediction:
    """Eta and radius of `apg` on the difference d."""
    dtype = wide(d)
    d = bcast(jnp.minimum(1, jnp.asarray(radius, dtype) / jnp.sqrt(dot(d, d))), d) * d
    along = (1 - jnp.asarray(eta, dtype)) * divide(dot(d, yes.x0), dot(yes.x0, yes.x0))
    x0 = yes.x0 + bcast(w - 1, d) * (d - bcast(along, d) * yes.x0)
    return from_x0(schedule, x, t, x0)._replace(variance_fraction=yes.variance_fraction)


def _std(y: Array) -> Array:
    """Standard deviation over each example: f32[b *d] -> f32[b]."""
    return jnp.std(jnp.reshape(y, (y.shape[0], -1)).astype(wide(y)), axis=1)


def _unit_interval(name: str, value: ArrayLike) -> None:
    if is_concrete(value) and not 0 <= np.asarray(value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
