r"""Measures of one sampler against exact answers: orders, laws, evaluations, compilations.

In one dimension the probability flow keeps the order of points, so between the distribution functions F_t and F_s
of the marginals it is

    x_s = F_s^-1(F_t(x_t))                                                                   (1)

which gives the error of a deterministic sampler on a mixture of Gaussians, point by point. On Gaussian data every
sampler is affine in where it starts and in the normal noise it is given,

    x_0 = c + A x_T + sum_i B_i z_i                                                          (2)

so that, with one example of a batch for each coefficient, mean c + A E[x_T] and variance A^2 Var x_T + sum_i B_i^2 of a
random sampler follow without any drawing, each call of its `noise` being a draw of its own. Its error is the
Wasserstein-2 distance of two Gaussians.

The law of n float32 examples is compared with a mixture's by the mean, the covariance, Kolmogorov and Smirnov's
distance on projections, and the maximum mean discrepancy over m random Fourier features (Rahimi & Recht 2007)

    MMD^2 = 1/m sum_j (1/n sum_i f_j(x_i) - E f_j)^2,   f_j(x) = sqrt(2) cos(<w_j, x> + b_j)   (3)

whose expectations and covariances are the mixture's characteristic function, so that its null distribution, a weighted
sum of chi-squares, is known.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import diffusion_jax as dj
from conformance.table import PROBLEMS, SAMPLERS, Entry
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.typing import Array, Denoiser, Noise, Schedule

LINE = Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([[0.1], [0.2]]))
BELLS = mixtures.gaussian(np.array([0.5, -1.0, 0.2]), np.array([0.25, 1.0, 0.04]))

# Where the order is measured: inside, no coefficient is singular and the flow has work to do.
INTERVALS = {
    "vp_linear": (0.8, 0.1),
    "rectified": (0.95, 0.1),
    "cosine": (0.9, 0.1),
    "edm": (3.0, 0.2),
    "ve": (0.8, 0.2),
}
DOUBLINGS = (32, 64, 128, 256, 512, 1024, 2048)
FLOOR = 1e-11  # below, rounding shows
COUNTS = sorted({round(2 ** (i / 4)) for i in range(41)})  # 1, 2, 3, 4, 5, 6, 7, 8, 10, ... 1024 steps
TOLERANCES = (1e-2, 1e-3)
TESTS = ("mean", "covariance", "ks", "mmd")
LEVEL = 0.01 / len(TESTS)
EXAMPLES = {"1-D": 4000, "64-D": 2000}
STEPS = 1000  # of evaluations where the law is compared; a quarter where the order is two or more


@functools.cache
def space() -> Mixture:
    """A mixture in 64 dimensions with rotated covariances of different scales."""
    rng, d = np.random.default_rng(0), 64
    basis = np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2)])
    apart = rng.standard_normal(d)
    apart *= 1.5 / np.linalg.norm(apart)
    variances = np.stack([np.geomspace(0.1, 1.0, d), np.geomspace(0.05, 0.5, d)])
    return Mixture(np.array([0.3, 0.7]), np.stack([apart, -apart]), variances, basis)


# --- exact answers ----------------------------------------------------------------------------------------------------


def at(mixture: Mixture, schedule: Schedule, t: float) -> Mixture:
    """The law of x_t."""
    return mixtures.marginal(mixture, *(float(c) for c in schedule(jnp.asarray(t))))


def quantile(mixture: Mixture, p: np.ndarray) -> np.ndarray:
    """F^-1(p): f64[n], of a mixture in one dimension, by bisection."""
    cdf = mixtures.projected_cdf(mixture, np.ones(1))
    mean, std = np.ravel(mixture.means), np.sqrt(np.ravel(mixture.variances))
    low, high = np.full_like(p, (mean - 40 * std).min()), np.full_like(p, (mean + 40 * std).max())
    for _ in range(100):
        middle = (low + high) / 2
        below = cdf(middle) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def quantile_map(mixture: Mixture, schedule: Schedule, x: np.ndarray, t: float, s: float) -> np.ndarray:
    """Eq. (1): the exact probability flow of a mixture in one dimension from t to s, x: f64[n]."""
    return quantile(at(mixture, schedule, s), mixtures.projected_cdf(at(mixture, schedule, t), np.ones(1))(x))


def exact(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """The exact denoiser; its reverse variance, for samplers that read one, in the middle between the bounds."""
    denoiser = mixtures.denoiser(mixture, schedule)
    return lambda x, t, cond=None: denoiser(x, t, cond)._replace(variance_fraction=jnp.full_like(x, 0.5))


@functools.cache
def fine_grid(problem: str) -> np.ndarray:
    """4096 steps of a problem's grid."""
    return np.asarray(PROBLEMS[problem].grid(4096), np.float64)


def grid(problem: str, n: int) -> np.ndarray:
    """A problem's grid f64[n + 1] without compiling it anew for each n: every grid is one function of i / n."""
    fine = fine_grid(problem)
    return np.interp(np.arange(n + 1) / n, np.linspace(0, 1, len(fine)), fine)


# --- orders and evaluations needed ------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """What ran: the number of the step, once for each evaluation, and with that of the draw for each draw of noise."""

    evaluations: list[int]
    draws: list[tuple[int, int]]


def kick(counts: Counts, kicks: int, i: Array) -> Noise:
    """Noise whose j-th draw in step i is 0 but in example 3 + kicks i + j, where it is 1: eq. (2)."""
    drawn = itertools.count()

    def noise(key: Array, x: Array, t: Array, s: Array) -> Array:
        j = next(drawn)
        jax.debug.callback(lambda i: counts.draws.append((int(i), j)), i)
        hit = jnp.arange(x.shape[0]) == 3 + kicks * i + j
        return jnp.broadcast_to(hit[:, None], x.shape).astype(x.dtype)

    return noise


def runner(entry: Entry, kicks: int) -> tuple[Callable[..., np.ndarray], Counts]:
    """(law, x, times f[n + 1]) -> x at times[-1], compiled once for all n up to `DOUBLINGS[-1]`, and what it counts."""
    problem, counts = PROBLEMS[entry.problem], Counts([], [])

    @jax.jit
    def loop(law: Mixture, x: Array, times: Array, n: Array) -> Array:
        def body(i: Array, now: tuple[Array, Any]) -> tuple[Array, Any]:
            def denoise(x: Array, t: Array) -> dj.Prediction:
                jax.debug.callback(lambda i: counts.evaluations.append(int(i)), i)
                return exact(law, problem.schedule)(x, jnp.broadcast_to(t, x.shape[:1]), None)

            (x, state), key = now, jax.random.fold_in(jax.random.key(0), i)
            sampler = entry.make(problem, kick(counts, kicks, i))
            return sampler.step(key, x, state, times[i], times[i + 1], denoise)

        return jax.lax.fori_loop(0, n, body, (x, entry.make(problem, dj.white).init(x)))[0]

    def run(law: Mixture, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        counts.evaluations.clear()
        counts.draws.clear()
        padded = np.pad(times, (0, DOUBLINGS[-1] + 1 - len(times)), mode="edge")
        y = np.asarray(loop(jax.tree.map(np.asarray, law), x, padded, len(times) - 1))
        jax.effects_barrier()
        return y

    return run, counts


def draws_per_step(entry: Entry) -> int:
    """How often a step calls `noise`, by tracing it."""
    problem, drawn = PROBLEMS[entry.problem], []

    def noise(key: Array, x: Array, t: Array, s: Array) -> Array:
        drawn.append(1)
        return x

    def step(x: Array, t: Array) -> Any:
        sampler = entry.make(problem, noise)
        return sampler.step(jax.random.key(0), x, sampler.init(x), t, t / 2, lambda x, t: dj.Prediction(x, x, x))

    jax.eval_shape(step, jnp.zeros((1, 1)), jnp.ones(()))
    return len(drawn)


def interval(entry: Entry, n: int) -> np.ndarray:
    """n steps over the interval where the order is measured, the first of length O(n^-2).

    So the low order in which a multistep method starts is not seen, and neighbouring steps differ in length.
    """
    high, low = INTERVALS[entry.problem]
    return high - (high - low) * (np.arange(n + 1) / n) ** 2


@functools.cache
def quantiles(problem: str, t: float) -> np.ndarray:
    """33 quantiles of the mixture at t: the probability flow (1) carries those of one time to those of another."""
    return quantile(at(LINE, PROBLEMS[problem].schedule, t), np.linspace(0.02, 0.98, 33))


def flow_error(run: Callable, entry: Entry, times: np.ndarray) -> float:
    """Error of a deterministic sampler against eq. (1): root mean square over quantiles, in the data's std."""
    x, wanted = (quantiles(entry.problem, float(t)) for t in (times[0], times[-1]))
    error = run(LINE, x[:, None], times)[:, 0] - wanted
    return float(np.sqrt(np.mean(error**2) / mixtures.moments(LINE)[1].item()))


def law_error(run: Callable, entry: Entry, kicks: int, times: np.ndarray) -> float:
    """Wasserstein-2 distance of a sampler's law by eq. (2) from the exact one, on Gaussian data, in the data's std.

    nan for a sampler that is not affine in its start and in the noise it is given: then the third example, which
    starts opposite to the second one, does not stay there.
    """
    schedule = PROBLEMS[entry.problem].schedule
    start, end = (at(BELLS, schedule, t) for t in (times[0], times[-1]))
    rows = np.zeros((3 + kicks * DOUBLINGS[-1], 1))
    rows[1:3, 0] = 1, -1
    y = run(BELLS, start.means + rows * np.sqrt(start.variances), times)
    centred = y - y[0]
    if np.abs(centred[1] + centred[2]).max() > 1e-9:
        return float("nan")
    std = np.sqrt(centred[1] ** 2 + np.sum(centred[3:] ** 2, axis=0))
    squared = (y[0] - end.means[0]) ** 2 + (std - np.sqrt(end.variances[0])) ** 2
    return float(np.sqrt(squared.sum() / BELLS.variances.sum()))


def order(errors: dict[int, float]) -> float | None:
    """The slope of log error between doublings of n, from the last three above rounding error.

    It differs from its limit by O(1 / n) where the next order still shows, and is extrapolated: 2 p(n) - p(n / 2).
    """
    clear = [error for error in errors.values() if error > FLOOR][-3:]
    if len(clear) < 3:
        return None
    return float(2 * np.log2(clear[1] / clear[2]) - np.log2(clear[0] / clear[1]))


def measure_errors(entry: Entry) -> dict[str, Any]:
    """In float64: orders, evaluations of a step in the middle, and those needed on the problem's own grid."""
    with jax.enable_x64(True):
        run, counts = runner(entry, kicks := draws_per_step(entry))
        gauges = {"Gaussians": functools.partial(law_error, run, entry, kicks)}
        if not entry.random:
            gauges["mixture"] = functools.partial(flow_error, run, entry)
        first = gauges["Gaussians"](interval(entry, DOUBLINGS[0]))
        found: dict[str, Any] = {"evaluations": counts.evaluations.count(DOUBLINGS[0] // 2), "orders": {}, "needed": {}}
        again = len(counts.draws) > len(set(counts.draws))  # in an inner loop, whose draws eq. (2) cannot tell apart
        if entry.random and (again or not kicks or np.isnan(first)):
            return found
        if entry.order is not None:
            errors = {law: {n: gauge(interval(entry, n)) for n in DOUBLINGS} for law, gauge in gauges.items()}
            found |= {"orders": {law: order(values) for law, values in errors.items()}, "errors": errors}
        return found | evaluations_needed(gauges["Gaussians" if entry.random else "mixture"], entry, counts)


def evaluations_needed(error: Callable, entry: Entry, counts: Counts) -> dict[str, Any]:
    """The fewest evaluations, over `COUNTS` steps of the problem's grid, with an error below each tolerance."""
    curve = []
    for n in COUNTS:
        found = error(grid(entry.problem, n))
        curve.append((len(counts.evaluations), found))
        if found < min(TOLERANCES):
            break
    return {"needed": {str(tol): next((k for k, e in curve if e < tol), None) for tol in TOLERANCES}, "curve": curve}


# --- laws -------------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A law to compare examples with: directions f[m d], and eq. (3)'s features with 20,000 draws of n MMD^2."""

    law: Mixture
    directions: np.ndarray
    frequencies: np.ndarray
    phases: np.ndarray
    expected: np.ndarray
    null: np.ndarray


def make_probe(law: Mixture, features: int = 128) -> Probe:
    """Frequencies of a Gaussian kernel as wide as the law, and what the characteristic function says of eq. (3).

    E cos(<w, x> + b) = sum_k w_k exp(-w^T C_k w / 2) cos(<w, m_k> + b), and a product of two cosines is half the sum
    of the cosines of difference and sum.
    """
    mean, covariance = mixtures.moments(law)
    rng, d = np.random.default_rng(0), len(mean)
    w, b = rng.standard_normal((features, d)) / np.sqrt(np.trace(covariance)), rng.uniform(0, 2 * np.pi, features)

    def expectation(w: np.ndarray, b: np.ndarray) -> Any:
        shares, means = law.weights / np.sum(law.weights), np.reshape(law.means, (-1, d))
        each = zip(shares, means, mixtures.covariances(law), strict=True)
        return sum(share * np.exp(-np.sum(w @ c * w, axis=-1) / 2) * np.cos(w @ m + b) for share, m, c in each)

    expected = np.sqrt(2) * expectation(w, b)
    pairs = expectation(w[:, None] - w, b[:, None] - b) + expectation(w[:, None] + w, b[:, None] + b)
    spectrum = np.clip(np.linalg.eigvalsh(pairs - np.outer(expected, expected)), 0, None)
    null = rng.chisquare(1, (20_000, features)) @ spectrum / features
    lines = np.ones((1, 1)) if d == 1 else np.stack([law.means[0] - law.means[-1], *rng.standard_normal((7, d))])
    return Probe(law, lines / np.linalg.norm(lines, axis=1, keepdims=True), w, b, expected, null)


@functools.cache
def probe_of(dimension: str, problem: str) -> Probe:
    """The law at the end of a problem's grid."""
    law = LINE if dimension == "1-D" else space()
    return make_probe(at(law, PROBLEMS[problem].schedule, float(grid(problem, 1)[-1])))


def mmd_p(x: np.ndarray, probe: Probe) -> float:
    gaps = np.mean(np.sqrt(2) * np.cos(x @ probe.frequencies.T + probe.phases), axis=0) - probe.expected
    return float(np.mean(probe.null >= len(x) * np.mean(gaps**2)))


def covariance_p(white: np.ndarray) -> float:
    """Of whitened examples: every entry of the second moment, and its trace, within standard errors."""
    n, d = white.shape
    second, fourth = white.T @ white / n, (white**2).T @ white**2 / n
    entries = np.abs(second - np.eye(d)) / np.sqrt((fourth - second**2) / n)
    norms = np.sum(white**2, axis=1)
    trace = np.abs(norms.mean() - d) / (norms.std() / np.sqrt(n))
    return 2 * float(min(2 * stats.norm.sf(trace), d * (d + 1) / 2 * 2 * stats.norm.sf(entries.max())))


def check_law(x: np.ndarray, probe: Probe) -> dict[str, float]:
    """Errors of mean and covariance in the law's scale, and the p-values of four tests.

    mean: chi-square of the whitened mean; covariance: every entry and the trace after whitening, against their
    standard errors; ks: over all directions; mmd: eq. (3). Each is corrected by Bonferroni for what is in it.
    """
    x = np.asarray(x, np.float64)
    (n, d), (mean, covariance) = x.shape, mixtures.moments(probe.law)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T).T
    ks = [stats.kstest(x @ u, mixtures.projected_cdf(probe.law, u), method="asymp").pvalue for u in probe.directions]
    p = {
        "mean": stats.chi2.sf(n * np.sum(white.mean(0) ** 2), d),
        "covariance": covariance_p(white),
        "ks": len(ks) * min(ks),
        "mmd": mmd_p(x, probe),
    }
    off = np.cov(x.T, bias=True).reshape(d, d) - covariance
    return {
        "mean_error": float(np.linalg.norm(x.mean(0) - mean) / np.sqrt(np.trace(covariance))),
        "covariance_error": float(np.linalg.norm(off) / np.linalg.norm(covariance)),
    } | {name: min(1.0, float(value)) for name, value in p.items()}


def measure_law(entry: Entry, dimension: str) -> dict[str, Any]:
    """From exact draws at the top of the grid, in float32, to its end: `check_law`.

    If a p is too small all is drawn anew, once, with another key.
    """
    law, problem = LINE if dimension == "1-D" else space(), PROBLEMS[entry.problem]
    steps = max((STEPS if (entry.order or 1) < 2 else STEPS // 4) // (entry.evaluations or 10), 50)
    times, found = grid(entry.problem, steps).astype(np.float32), {}

    @jax.jit
    def go(key: Array, law: Mixture, x: Array, times: Array) -> Array:
        return dj.sample(key, entry.make(problem, dj.white), exact(law, problem.schedule), x, times)

    for draws in (1, 2):
        x = mixtures.draw(np.random.default_rng(draws - 1), at(law, problem.schedule, times[0]), EXAMPLES[dimension])
        y = go(jax.random.key(draws), jax.tree.map(np.float32, law), np.float32(x), times)
        found = check_law(y, probe_of(dimension, entry.problem)) | {"steps": steps, "n": len(x), "draws": draws}
        if not entry.law or min(found[name] for name in TESTS) > LEVEL:
            break
    return found


def measure_floor() -> dict[str, Any]:
    """What `check_law` says of exact draws."""
    probes = {dimension: probe_of(dimension, "vp_linear") for dimension in EXAMPLES}
    draws = {k: mixtures.draw(np.random.default_rng(0), probe.law, EXAMPLES[k]) for k, probe in probes.items()}
    return {k: check_law(x, probes[k]) | {"steps": 0, "n": len(x), "draws": 1} for k, x in draws.items()}


# --- compilation and the row of the table -----------------------------------------------------------------------------


def count_traces(entry: Entry) -> int:
    """How often one jitted step is traced in a Python loop over two keys and two grids: more than 1 recompiles."""
    problem, traces = PROBLEMS[entry.problem], []
    sampler, denoiser = entry.make(problem, dj.white), exact(LINE, problem.schedule)

    @jax.jit
    def step(key: Array, x: Array, state: Any, t: Array, s: Array) -> tuple[Array, Any]:
        traces.append(1)
        return sampler.step(key, x, state, t, s, lambda x, t: denoiser(x, jnp.broadcast_to(t, x.shape[:1]), None))

    for n in (3, 4):
        x, state = jnp.ones((2, 1)), sampler.init(jnp.ones((2, 1)))
        for t, s in itertools.pairwise(grid(entry.problem, n).astype(np.float32)):
            x, state = step(jax.random.key(n), x, state, t, s)
    return len(traces)


def misses(entry: Entry, row: dict[str, Any]) -> list[str]:
    """What a sampler claims, or what every sampler has to hold, and this one does not."""
    found = [] if entry.order is None else order_misses(entry.order, row["orders"])
    if entry.evaluations not in (None, row["evaluations"]):
        found.append(f"{row['evaluations']} evaluations a step, not {entry.evaluations}")
    if row["traces"] != 1:
        found.append(f"{row['traces']} compilations")
    for dimension, law in row["laws"].items() if entry.law else ():
        found += [f"{dimension} {name}: p = {law[name]:.1g}" for name in TESTS if not law[name] > LEVEL]
    return found


def order_misses(theory: float, orders: dict[str, float | None]) -> list[str]:
    """Within 0.1 of theory; from the third order on at least theory less 0.2."""
    below, above = (0.1, 0.1) if theory < 3 else (0.2, np.inf)
    found = [] if orders else ["order not measurable"]
    for law, value in orders.items():
        if value is None or not theory - below <= value <= theory + above:
            found.append(f"order on {law} {value if value is None else round(value, 2)}, not {theory:g}")
    return found


def measure(name: str, entry: Entry | None = None) -> dict[str, Any]:
    """All measures of one sampler and, under "misses", those that theory or the entry say otherwise of."""
    start, entry = time.perf_counter(), entry or SAMPLERS[name]
    row: dict[str, Any] = {"name": name, "problem": entry.problem, "random": entry.random, "remark": entry.remark}
    row |= {"theory": entry.order, "claimed_evaluations": entry.evaluations, "claims_law": entry.law}
    try:
        row |= measure_errors(entry)
        row |= {"traces": count_traces(entry), "laws": {k: measure_law(entry, k) for k in EXAMPLES}}
        row["misses"] = misses(entry, row)
    except Exception as error:  # a sampler that cannot run is a row of the table as well
        row["misses"] = [f"{type(error).__name__}: {str(error)[:100].partition(chr(10))[0]}"]
    return row | {"seconds": round(time.perf_counter() - start, 1)}
