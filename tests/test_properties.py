"""Properties over random schedules, shapes, dtypes, times, keys and sizes (hypothesis), without any known answer.

Compiled functions are kept by what changes them (schedule, shape, dtype), so that most examples only run.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_jax as dj
from diffusion_jax import times
from diffusion_jax.predictions import FROM, TO

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}
SHAPES = ((1, 3), (5, 2), (2, 6, 2), (3, 4, 4, 1), (2, 2, 3, 3, 2))
NAMES = sorted(CASES)
names, shapes, dtypes = st.sampled_from(NAMES), st.sampled_from(SHAPES), st.sampled_from(sorted(DTYPES))
seeds, unit = st.integers(0, 2**32 - 1), st.floats(0, 1, width=32)


def examples(n):
    return settings(max_examples=n, deadline=None, database=None, derandomize=True)


def between(case, u):
    """A time at the share u of the regular interval, evenly in log t."""
    return case.low * (case.high / case.low) ** np.asarray(u)


def data(seed, shape, dtype, n=2):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), DTYPES[dtype]) for _ in range(n)]


# --- schedules and the forward process --------------------------------------------------------------------------------


@functools.cache
def along(name):
    schedule = CASES[name].schedule

    def compute(t):
        pairs = [(t[2], t[1]), (t[1], t[0]), (t[2], t[0])]
        return schedule(t), dj.logsnr(schedule, t), dj.rates(schedule, t), [dj.transition(schedule, *p) for p in pairs]

    return jax.jit(compute)


@pytest.mark.slow
@examples(100)
@given(name=names, u=st.lists(unit, min_size=3, max_size=3))
def test_noise_grows_along_any_three_times(name, u):
    """SNR and its rates; going by way of a time in between has the law of going at once."""
    case = CASES[name]
    with jax.enable_x64(True):
        t = np.sort(between(case, u))
        (alpha, sigma), value, rate, steps = jax.tree.map(np.asarray, along(name)(t))
    assert np.all(alpha > 0) and np.all(sigma > 0)
    assert np.all(np.diff(value) <= 0) and np.all((np.diff(value) < 0) | (np.diff(t) < 1e-9 * t[1:]))
    assert np.all(alpha * rate.sigma - sigma * rate.alpha > 0)
    (late, noise_late), (early, noise_early), (whole, noise_whole) = steps
    np.testing.assert_allclose(late * early, whole, rtol=1e-9)
    np.testing.assert_allclose(late**2 * noise_early + noise_late, noise_whole, rtol=1e-6, atol=1e-9 * sigma[2] ** 2)


@examples(100)
@given(name=names, low=st.booleans(), distance=st.floats(1e-5, 1e6), n=st.integers(0, 3))
def test_times_outside_raise_wherever_they_are(name, low, distance, n):
    case = CASES[name]
    t = np.full(n + 1, between(case, 0.5))
    t[n // 2] = -distance if low else case.start + distance
    if case.start > 1 and not low:
        case.schedule(t)
    else:
        with pytest.raises(ValueError, match="must lie in"):
            case.schedule(t)


@pytest.mark.slow
@examples(60)
@given(name=names, shape=shapes, dtype=dtypes, scalar=st.booleans())
def test_shapes_and_dtypes_follow_x(name, shape, dtype, scalar):
    """Noising, posterior, predictions both ways: x in bfloat16 too, while the schedule keeps the dtype of t."""
    schedule = CASES[name].schedule
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct(shape, dtype)
        t = jax.ShapeDtypeStruct(() if scalar else shape[:1], "float64" if dtype == "float64" else "float32")

        def compute(x, t):
            x_t = dj.q_sample(schedule, x, t, x)
            predictions = [FROM[kind](schedule, x_t, t, x) for kind in FROM]
            mean, variance = dj.q_posterior(schedule, x_t, x, t, t / 2)
            return (x_t, mean, predictions, [TO[k](schedule, predictions[0], t) for k in TO]), (schedule(t), variance)

        like_x, like_t = jax.eval_shape(compute, x, t)
    assert all(a.shape == shape and a.dtype == dtype for a in jax.tree.leaves(like_x))
    assert all(a.shape == t.shape and a.dtype == t.dtype for a in jax.tree.leaves(like_t))


# --- predictions ------------------------------------------------------------------------------------------------------


@functools.cache
def round_trips(name):
    schedule = CASES[name].schedule

    @jax.jit
    def compute(x0, eps, t):
        x, truth = dj.q_sample(schedule, x0, t, eps), dj.Prediction(x0, eps)
        back = {k: FROM[k](schedule, x, t, TO[k](schedule, truth, t))[:2] for k in FROM}
        return back, schedule(t), dj.rates(schedule, t)

    return compute


@pytest.mark.slow
@examples(30)
@given(
    name=st.sampled_from(("cosine", "vp_linear", "rectified", "edm")), shape=shapes, dtype=dtypes, seed=seeds, u=unit
)
def test_predictions_round_trip_to_rounding(name, shape, dtype, seed, u):
    """Within the rounding of x's dtype, as far as the division by alpha or sigma magnifies it."""
    case = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        x0, eps = data(seed, shape, dtype)
        t = jnp.full(shape[:1], between(case, u), "float64" if dtype == "float64" else "float32")
        back, (alpha, sigma), rate = jax.tree.map(np.asarray, round_trips(name)(x0, eps, t))
        unit_roundoff = float(jnp.finfo(DTYPES[dtype]).eps)
    a, s, da, ds = (float(c[0]) for c in (alpha, sigma, *rate))
    size = max(np.abs(np.asarray(v, np.float64)).max() for v in (x0, eps)) + 1
    wide = 1 + (abs(da) + abs(ds)) * (a + s) / (a * ds - s * da)
    for kind, (got_x0, got_eps) in back.items():
        for got, true, share in ((got_x0, x0, a), (got_eps, eps, s)):
            bound = 30 * unit_roundoff * size * wide * (1 + (a + s) / share)
            error = np.abs(np.asarray(got, np.float64) - np.asarray(true, np.float64)).max()
            assert error < bound, f"{kind}: {error} > {bound}"


@examples(40)
@given(shape=shapes, other=shapes, kind=st.sampled_from(sorted(FROM)))
def test_shapes_that_do_not_match_raise_and_are_named(shape, other, kind):
    x, y = (jax.ShapeDtypeStruct(s, "float32") for s in (shape, other))
    t, late = (jax.ShapeDtypeStruct((b,), "float32") for b in (shape[0], shape[0] + 1))
    schedule = dj.rectified()
    calls = [(lambda x, t, y: FROM[kind](schedule, x, t, y), (x, late, x)), (dj_q_sample, (x, late, x))]
    if shape != other:
        calls += [(lambda x, t, y: FROM[kind](schedule, x, t, y), (x, t, y)), (dj_q_sample, (x, t, y))]
    for call, given_ in calls:
        with pytest.raises(ValueError, match=r"(output|eps|t) .*\(\d.*\(\d"):
            jax.eval_shape(call, *given_)


def dj_q_sample(x, t, eps):
    return dj.q_sample(dj.rectified(), x, t, eps)


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@examples(10)
@given(shape=shapes, seed=seeds, dtype=st.sampled_from(("bfloat16", "float32")), pick=st.data())
def test_an_example_is_drawn_from_its_own_key(shape, seed, dtype, pick):
    x, keys = jnp.zeros(shape, DTYPES[dtype]), jax.random.split(jax.random.key(seed), shape[0])
    i = pick.draw(st.integers(0, shape[0] - 1))
    whole, part = dj.normal_like(keys, x), dj.normal_like(keys[i : i + 1], x[:1])
    assert whole.shape == shape and whole.dtype == x.dtype
    np.testing.assert_array_equal(whole[i : i + 1], part)
    with pytest.raises(ValueError, match="keys for a batch"):
        dj.normal_like(jax.random.split(jax.random.key(seed), shape[0] + 1), x)


# --- grids ------------------------------------------------------------------------------------------------------------


@examples(150)
@given(
    n=st.integers(1, 200),
    kind=st.sampled_from(("uniform", "quadratic", "trailing", "leading", "karras", "exponential", "beta", "ays")),
    a=st.floats(0.3, 3),
    b=st.floats(0.3, 3),
    ratio=st.floats(1.5, 1e5),
)
def test_grids_fall_from_their_start_to_zero(n, kind, a, b, ratio):
    low = 80.0 / ratio
    start, grid = {
        "uniform": lambda: (a, dj.uniform(n, a)),
        "quadratic": lambda: (a, dj.quadratic(n, a)),
        "trailing": lambda: (1.0, dj.trailing(n, n + int(ratio) % 1000)),
        "leading": lambda: (None, dj.leading(n, n + int(ratio) % 1000)),
        "karras": lambda: (80.0, dj.karras(n, low, 80.0, 3 * a)),
        "exponential": lambda: (80.0, times.exponential(n, low, 80.0)),
        "beta": lambda: (1.0, times.beta_quantile(n, a, max(b, 0.5))),
        "ays": lambda: (14.615, times.align_your_steps(n, "sdxl")),
    }[kind]()
    grid = np.asarray(grid)
    assert grid.shape == (n + 1,) and grid.dtype == np.float32 and grid[-1] == 0
    assert np.all(np.diff(grid) < 0)
    assert start is None or grid[0] == pytest.approx(start, rel=1e-6)


@examples(60)
@given(
    n=st.integers(-3, 0) | st.floats(1.1, 9.9).filter(lambda v: v != int(v)), start=st.floats(0, 1), end=st.floats(0, 2)
)
def test_grids_without_steps_or_that_would_rise_raise(n, start, end):
    for make in (dj.uniform, dj.quadratic, dj.karras, times.exponential, times.beta_quantile):
        with pytest.raises(ValueError, match="steps"):
            make(n)
    if start <= end:
        for make in (dj.uniform, dj.quadratic, lambda n, *ends: dj.logsnr_uniform(n, dj.vp_linear(), *ends)):
            with pytest.raises(ValueError, match="0 <= end < start"):
                make(5, start, end)


@functools.cache
def levels_back(name):
    """From levels to times and to levels again."""
    schedule = CASES[name].schedule

    def compute(levels):
        grid = times.at_levels(schedule, levels)
        alpha, sigma = schedule(grid)
        return grid, sigma / alpha

    return jax.jit(compute)


@examples(30)
@given(name=st.sampled_from(("vp_linear", "rectified", "cosine")), top=st.floats(0.5, 30), ratio=st.floats(1.5, 100))
def test_at_levels_inverts_the_schedule(name, top, ratio):
    levels = times.exponential(12, top / ratio, top)
    grid, back = levels_back(name)(levels)
    assert np.all(np.diff(grid) < 0) and float(grid[-1]) == 0
    np.testing.assert_allclose(back[:-1], levels[:-1], rtol=5e-3)


# --- draws ------------------------------------------------------------------------------------------------------------

DRAWS = {
    "uniform": (dj.draw_uniform(0.2, 0.7), 0.2, 0.7),
    "discrete": (dj.draw_discrete(37), 1 / 37, 1.0),
    "stratified": (dj.draw_stratified(0.2, 0.7), 0.2, 0.7),
    "logit_normal": (dj.draw_logit_normal(0.5, 2.0), 0.0, 1.0),
    "lognormal": (dj.draw_lognormal(), 0.0, np.inf),
    "importance": (lambda key, b: times.draw_importance(key, times.init_importance(37), b)[0], 1 / 37, 1.0),
}
DRAWN = {name: jax.jit(draw, static_argnums=1) for name, (draw, *_) in DRAWS.items()}


@pytest.mark.slow
@examples(60)
@given(name=st.sampled_from(sorted(DRAWS)), seed=seeds, b=st.sampled_from((1, 2, 7, 32)))
def test_draws_stay_in_their_range_and_repeat(name, seed, b):
    _, low, high = DRAWS[name]
    key = jax.random.key(seed)
    t = np.asarray(DRAWN[name](key, b))
    assert t.shape == (b,) and t.dtype == np.float32
    assert np.all(t >= np.float32(low)) and np.all(t <= np.float32(high))
    np.testing.assert_array_equal(t, DRAWN[name](key, b))
    if name == "stratified":
        np.testing.assert_array_equal(
            np.sort(np.floor((0.7 - t.astype(np.float64)) / 0.5 * b + 1e-4) % b), np.arange(b)
        )
    if name in ("discrete", "importance"):
        np.testing.assert_allclose(t * 37, np.round(t * 37), atol=1e-4)
    assert len({*itertools.chain(t)}) == b or name in ("discrete", "importance")


@examples(15)
@given(seed=seeds, table=st.sampled_from((3, 20)), scale=st.floats(-10, 10))
def test_importance_weights_undo_their_probabilities(seed, table, scale):
    """1 / weight, over the table, is p T and so sums to T; weights stay below 1 / uniform."""
    losses = np.exp(scale * np.random.default_rng(seed).standard_normal((table, 4)) / 4)
    state = times.LossHistory(jnp.asarray(losses, jnp.float32), jnp.full(table, 4, jnp.int32))
    t, weight = jax.tree.map(np.asarray, importance(jax.random.key(seed), state, 20_000))
    index = np.round(t * table).astype(int) - 1
    inverse = dict(zip(index.tolist(), (1 / weight.astype(np.float64)).tolist(), strict=True))
    missing = 1 - sum(inverse.values()) / table
    assert abs(missing) < 1e-4 + 12 * (table - len(inverse)) / 20_000
    assert weight.max() <= 1000 * (1 + 1e-5)


importance = jax.jit(times.draw_importance, static_argnums=2)
