"""The likelihood triangle: the probability flow, the variational bound and the I-MMSE integral against log p.

Data: n draws of the samplers' mixture in 64 dimensions, moved to mean zero, whose covariances have bases of their own.
Errors are in nats per dimension against the mixture's log density, in float64 (NumPy), of the same points. The flow and
I-MMSE are compared point by point: the largest error. The bound is compared by the mean over the points, after
Richardson extrapolation to infinitely many steps from 24, 36, 48 and 60 steps equal in log SNR, because a bound of n
steps has a gap of order 1 / n; those gaps have rows of their own, without a bound to hold. So has the flow with random
probes. What is averaged over noise has a standard error. Evaluations count products with the Jacobian.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance.samplers import space
from conformance.table import PROBLEMS
from diffusion_jax import likelihood
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Denoiser, Prediction, Schedule

BOUND = 1e-4
CLEAN = 7.8  # log SNR at which the bound and I-MMSE stop, sigma / alpha = 0.02
FLOW_STEPS, QUANTILES = 32, 16
SEGMENTS, STEPS = 12, (24, 36, 48, 60)
MIDDLE = range(4, 9)  # the segments where the denoiser is far from linear
FIRST = {"edm": 80.0}  # the time at which there is no signal, if not 1
Row = dict[str, Any]


def measure() -> list[Row]:
    """All rows: method, schedule, d, n, dtype, evaluations (an example), error, standard error, bound, ok, remark."""
    rows = [flow(name, np.float32) for name in ("vp_linear", "cosine", "rectified", "edm")]
    rows += [flow("edm", np.float32, tolerance=1e-5), flow("edm", np.float32, probes=16)]
    rows += [immse("vp_linear", np.float32), *bound("vp_linear", np.float32)]
    with jax.enable_x64(True):
        return [*rows, flow("vp_linear", np.float64)]


def centred(n: int, dtype: type) -> tuple[Mixture, np.ndarray]:
    """The mixture and n points, as `dtype`."""
    law = space()
    law = law._replace(means=law.means - mixtures.moments(law)[0])
    points = mixtures.draw(np.random.default_rng(1), law, n).astype(np.float32)
    return jax.tree.map(lambda a: np.asarray(a, dtype), law), points.astype(dtype)


def exact(law: Mixture, x: np.ndarray) -> np.ndarray:
    """log p(x): f64[n], from the components' covariances (SciPy)."""
    from scipy.stats import multivariate_normal

    parts = zip(law.weights, law.means, mixtures.covariances(law), strict=True)
    return np.logaddexp.reduce([np.log(w) + multivariate_normal.logpdf(x, m, c) for w, m, c in parts])


def flow(name: str, dtype: type, tolerance: float | None = None, probes: int | None = None, n: int = 16) -> Row:
    """The probability flow from sigma = 0 to no signal on a grid equal in its angle, or adaptive, or with probes."""
    (law, x), schedule, first = centred(n, dtype), PROBLEMS[name].schedule, FIRST.get(name, 1.0)
    last = schedule(jnp.asarray(first, dtype))
    angles = np.linspace(float(jnp.arctan2(last.sigma, last.alpha)), 0, FLOW_STEPS + 1)
    inner = inverse_logsnr(schedule, jnp.asarray(-2 * np.log(np.tan(angles[1:-1])), dtype), 0.0, first)
    times = jnp.concatenate([jnp.full(1, first, dtype), inner, jnp.zeros(1, dtype)])
    denoiser, both = mixtures.denoiser(law, schedule), None if tolerance is None else (tolerance, tolerance)

    @jax.jit
    def run(x: Array, times: Array, key: Array) -> likelihood.FlowDensity:
        v = None if probes is None else likelihood.hutchinson_probes(key, x, probes)
        return likelihood.ode_log_density(denoiser, schedule, x, times, probes=v, tolerance=both)

    keys = jax.random.split(jax.random.key(0), 1 if probes is None else 4)
    outs = [run(jnp.asarray(x), times, key) for key in keys]
    errors = per_dim(np.stack([out.log_density for out in outs]), law, x)
    calls = (4 if tolerance is None else 6) * float(jnp.mean(outs[0].steps)) * (1 + (probes or x.shape[1]))
    if probes:
        remark = "mean over points and draws of the probes"
        return row(f"flow, {probes} probes", name, x, calls, *spread(errors.mean(1)), remark, None)
    method = f"flow, {FLOW_STEPS} steps" if tolerance is None else f"flow, adaptive {tolerance:.0e}"
    return row(method, name, x, calls, float(np.abs(errors).max()), 0.0)


def immse(name: str, dtype: type, n: int = 8, pairs: int = 12, repeats: int = 6) -> Row:
    """The I-MMSE integral by a Gauss-Legendre rule in the quantiles of log SNR."""
    (law, x), schedule = centred(n, dtype), PROBLEMS[name].schedule
    denoiser, rule, times = mixtures.denoiser(law, schedule), likelihood.unit_rule(QUANTILES), ends(name, dtype)

    @jax.jit
    def run(x: Array, key: Array) -> Array:
        noise = likelihood.frames(pairs)
        return likelihood.immse_log_density(key, denoiser, schedule, x, times, rule=rule, noise=noise)

    keys = jax.random.split(jax.random.key(0), repeats)
    errors = per_dim(np.stack([run(jnp.asarray(x), key) for key in keys]), law, x)
    calls = (QUANTILES + 1) * 4 * x.shape[1] * pairs * repeats
    error, standard = np.abs(errors.mean(0)), errors.std(0, ddof=1) / np.sqrt(repeats)
    return row(f"I-MMSE, {QUANTILES} levels", name, x, calls, float(error.max()), float(standard.max()))


def bound(name: str, dtype: type, n: int = 16, repeats: int = 20) -> list[Row]:
    """The variational bound: extrapolated, and as it is for each number of steps."""
    (law, x), schedule, times = centred(n, dtype), PROBLEMS[name].schedule, ends(name, dtype)
    denoiser, (low, high) = widest(mixtures.denoiser(law, schedule)), logsnr(schedule, times)

    def grid(steps: int) -> Array:
        inner = inverse_logsnr(schedule, jnp.linspace(low, high, steps + 1)[1:-1], times[1], times[0])
        return jnp.concatenate([times[:1], inner, times[1:]])

    @jax.jit
    def run(x: Array, times: Array, keys: Array) -> Array:
        return segmented(keys, denoiser, schedule, x, times)

    keys = jax.random.split(jax.random.key(0), repeats)
    values = [np.asarray(run(jnp.asarray(x), grid(steps), keys), np.float64) for steps in STEPS]
    gaps = np.stack([-per_dim(-value, law, x).mean(1) for value in values], axis=1)
    once = SEGMENTS - len(MIDDLE)
    calls = [4 * x.shape[1] * ((once + repeats * len(MIDDLE)) * steps // SEGMENTS + once) for steps in STEPS]
    remark = "mean over points, extrapolated from " + ", ".join(map(str, STEPS)) + " steps"
    rows = [row("bound", name, x, sum(calls), *spread(gaps @ limit()), remark)]
    for k, steps in enumerate(STEPS):
        remark = "mean over points; a bound of n steps has a gap of order 1 / n"
        rows.append(row(f"bound, {steps} steps", name, x, calls[k], *spread(gaps[:, k]), remark, None))
    return rows


def limit() -> np.ndarray:
    """Weights of the values at STEPS in their polynomial in 1 / n at 0 (Richardson)."""
    return np.array([np.prod([n / (n - m) for m in STEPS if m != n]) for n in STEPS])


def segmented(keys: Array, denoiser: Denoiser, schedule: Schedule, x: Array, times: Array) -> Array:
    """The bound with the noise of each of the keys, f[r b], which is the same for all times of a segment.

    So it is the same for each grid, and what differs between two grids is smooth in the step and can be extrapolated.
    Outside of the middle the denoiser is nearly linear, where `frames` has no error, and the first key serves all.
    """
    each = (len(times) - 1) // SEGMENTS
    segments = jnp.stack([times[i * each : (i + 1) * each + 1] for i in range(SEGMENTS)])

    def terms(index: tuple[Array, Array]) -> likelihood.Terms:
        repeat, i = index
        key = jax.random.fold_in(keys[repeat], i)
        noise = lambda _, x: likelihood.frames(1)(key, x)  # noqa: E731
        return likelihood.vlb(key, denoiser, schedule, x, segments[i], noise=noise)

    outer = jnp.asarray([i for i in range(SEGMENTS) if i not in MIDDLE])
    once = jax.lax.map(terms, (jnp.zeros_like(outer), outer))
    index = jnp.meshgrid(jnp.arange(len(keys)), jnp.asarray(MIDDLE), indexing="ij")
    often = jax.lax.map(lambda i: jnp.sum(terms(i).diffusion, axis=0), tuple(i.ravel() for i in index))
    fixed = once.prior[0] + jnp.sum(once.diffusion, axis=(0, 1)) + once.reconstruction[-1]
    return fixed[None] + jnp.sum(jnp.reshape(often, (len(keys), -1, len(x))), axis=1)


def widest(denoiser: Denoiser) -> Denoiser:
    """With the upper bound for the variance of the reverse step, which is nearer to this mixture's."""

    def wide(x: Array, t: Array, cond: Any = None) -> Prediction:
        return denoiser(x, t, cond)._replace(variance_fraction=jnp.ones_like(x))

    return wide


def ends(name: str, dtype: type) -> Array:
    first = FIRST.get(name, 1.0)
    last = inverse_logsnr(PROBLEMS[name].schedule, jnp.asarray(CLEAN, dtype), 0.0, first)
    return jnp.stack([jnp.asarray(first, dtype), last])


def per_dim(log_density: np.ndarray, law: Mixture, x: np.ndarray) -> np.ndarray:
    """Errors of log densities f[r n], a dimension: f64[r n]."""
    return (np.asarray(log_density, np.float64) - exact(law, x)) / x.shape[1]


def spread(values: np.ndarray) -> tuple[float, float]:
    return float(np.abs(values.mean())), float(values.std(ddof=1) / np.sqrt(len(values)))


def row(
    method: str,
    schedule: str,
    x: np.ndarray,
    calls: float,
    error: float,
    standard_error: float,
    remark: str = "",
    bound: float | None = BOUND,
) -> Row:
    what = {"method": method, "schedule": schedule, "d": x.shape[1], "n": x.shape[0], "dtype": x.dtype.name}
    errors = {"error_nats_per_dim": error, "standard_error": standard_error}
    held = {"bound": bound, "ok": None if bound is None else error < bound}
    return what | {"evaluations": round(calls)} | errors | held | {"remark": remark}
