"""Contracts of every schedule at once, and the closed forms of those that have one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.flatten_util import ravel_pytree
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.schedules import (
    init_learned,
    laplace,
    learned,
    shifted,
    sigmoid,
    sub_vp,
    trigonometric,
    zero_terminal_snr,
)

STEP = 1e-6
GRID = 41
NOT_PRESERVING = {"ve", "edm", "rectified", "sub_vp", "shifted_rectified", "shifted_sub_vp", "shifted_edm"}
SOME_SIGNAL_AT_THE_END = {
    *("linear_betas", "scaled_linear_betas", "cosine_betas", "vp_linear", "ve", "edm"),
    *("sub_vp", "shifted_sub_vp", "shifted_edm", "learned"),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def interior(case):
    """Times in float64, off the kinks of a beta table, whose sides have different rates."""
    return np.geomspace(case.low, case.high, GRID) + 0.00037 * (case.start == 1)


@functools.cache
def facts(name):
    """All that the contracts need of one schedule, in float64, from one compilation."""
    case = CASES[name]

    @jax.jit
    def compute(t, everywhere, end):
        schedule = case.schedule
        return {
            "at": schedule(t),
            "up": schedule(t + STEP),
            "down": schedule(t - STEP),
            "rates": dj.rates(schedule, t),
            "drift": dj.drift_diffusion(schedule, t),
            "back": dj.inverse_logsnr(schedule, dj.logsnr(schedule, t), case.end, case.start),
            "everywhere": schedule(everywhere),
            "logsnr": dj.logsnr(schedule, everywhere),
            "rates_end": dj.rates(schedule, end),
            "end": schedule(end),
            "before_end": schedule(end - 1e-7),
        }

    with jax.enable_x64(True):
        t, everywhere = jnp.asarray(interior(case)), jnp.linspace(case.end, case.start, 501)
        return jax.tree.map(np.asarray, compute(t, everywhere, jnp.asarray(case.start)))


@pytest.mark.parametrize("name", CASES)
def test_signal_falls_and_noise_is_not_negative(name):
    alpha, sigma = facts(name)["everywhere"]
    assert np.all(np.isfinite(alpha)) and np.all(np.isfinite(sigma))
    assert np.all(alpha >= 0) and np.all(sigma >= 0)
    assert np.all((alpha > 0) | (sigma > 0))
    assert np.all(np.diff(facts(name)["logsnr"]) < 0)


@pytest.mark.parametrize("name", CASES)
def test_ends(name):
    case = CASES[name]
    clean, noisy = (case.schedule(jnp.float32(t)) for t in (case.end, case.start))
    least = {"ve": 0.01, "learned": np.exp(-13.3 / 2)}.get(name, 0.0)
    assert float(clean.sigma) == pytest.approx(least, rel=1e-5)
    assert float(clean.alpha) == (pytest.approx(1, abs=1e-5) if name == "learned" else 1)
    if name not in SOME_SIGNAL_AT_THE_END:
        assert float(noisy.alpha) == 0 and float(noisy.sigma) == pytest.approx(1, abs=1e-6)
        assert float(dj.logsnr(case.schedule, jnp.float32(1.0))) == -np.inf
    expected = {"ve": 50.0, "edm": 80.0, "shifted_edm": 160.0}.get(name, 1.0)
    assert float(noisy.sigma) == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_PRESERVING))
def test_variance_is_preserved(name):
    alpha, sigma = facts(name)["everywhere"]
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-13)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_and_shape(name, dtype, x64):
    schedule = CASES[name].schedule
    for shape in ((), (6,), (2, 3)):
        given = jax.ShapeDtypeStruct(shape, dtype)
        for function in (schedule, lambda t: dj.logsnr(schedule, t), lambda t: dj.rates(schedule, t)):
            for value in jax.tree.leaves(jax.eval_shape(function, given)):
                assert value.shape == shape and value.dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_float32_agrees_with_float64_and_with_vmap(name):
    case = CASES[name]
    t = jnp.asarray(interior(case), jnp.float32)
    alpha, sigma, snr = jax.jit(jax.vmap(lambda u: (*case.schedule(u), dj.logsnr(case.schedule, u))))(t)
    np.testing.assert_allclose(alpha, facts(name)["at"].alpha, rtol=2e-4)
    np.testing.assert_allclose(sigma, facts(name)["at"].sigma, rtol=2e-4)
    assert np.all(np.diff(snr) < 0)


@pytest.mark.parametrize("name", CASES)
def test_rates_against_finite_differences(name):
    f = facts(name)
    for rate, up, down in zip(f["rates"], f["up"], f["down"], strict=True):
        np.testing.assert_allclose(rate, (up - down) / (2 * STEP), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_rates_at_the_noisy_end_are_those_from_inside(name):
    """A sampler starts at this very time: Euler's first step stands on this number."""
    f = facts(name)
    for rate, here, before in zip(f["rates_end"], f["end"], f["before_end"], strict=True):
        if name in ("sigmoid", "laplace") and np.isinf(rate):  # they go like a power of 1 - t below 1
            assert np.sign(rate) * (here - before) / 1e-7 > 5e2
            continue
        assert float(rate) == pytest.approx(float(here - before) / 1e-7, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_drift_and_diffusion_reproduce_the_marginals(name):
    """The moments' equations dm = f m, dV = 2 f V + g^2 must carry (alpha, sigma^2): on finite differences."""
    f = facts(name)
    (drift, diffusion), (a, s) = f["drift"], f["at"]
    (a1, s1), (a0, s0) = f["up"], f["down"]
    np.testing.assert_allclose(drift * a, (a1 - a0) / (2 * STEP), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(2 * drift * s**2 + diffusion**2, (s1**2 - s0**2) / (2 * STEP), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_inverse_logsnr_round_trip(name):
    np.testing.assert_allclose(facts(name)["back"], interior(CASES[name]), rtol=1e-9)


def test_drift_and_diffusion_closed_forms(x64):
    t = jnp.linspace(0.05, 0.95, 19)
    beta = 0.1 + 19.9 * t
    f, g = dj.drift_diffusion(dj.vp_linear(0.1, 20.0), t)
    np.testing.assert_allclose(f, -beta / 2, rtol=1e-12)
    np.testing.assert_allclose(g, np.sqrt(beta), rtol=1e-10)
    f, g = dj.drift_diffusion(dj.ve(0.01, 50.0), t)
    np.testing.assert_array_equal(f, np.zeros(19))
    np.testing.assert_allclose(g, 0.01 * 5000.0**t * np.sqrt(2 * np.log(5000.0)), rtol=1e-12)
    f, g = dj.drift_diffusion(dj.edm(), t)
    np.testing.assert_allclose(g, np.sqrt(2 * t), rtol=1e-12)
    f, g = dj.drift_diffusion(sub_vp(0.1, 20.0), t)
    np.testing.assert_allclose(f, -beta / 2, rtol=1e-12)
    integral = 0.1 * t + 19.9 * t**2 / 2
    np.testing.assert_allclose(g, np.sqrt(beta * (1 - np.exp(-2 * integral))), rtol=1e-10)  # Song et al. 2021, eq. 12
    f, g = dj.drift_diffusion(trigonometric(), t)
    np.testing.assert_allclose(f, -np.pi / 2 * np.tan(np.pi / 2 * t), rtol=1e-12)
    np.testing.assert_allclose(g, np.sqrt(np.pi * np.tan(np.pi / 2 * t)), rtol=1e-12)
    f, g = dj.drift_diffusion(dj.rectified(), t)
    np.testing.assert_allclose(f, -1 / (1 - t), rtol=1e-12)
    np.testing.assert_allclose(g, np.sqrt(2 * t / (1 - t)), rtol=1e-12)


def test_closed_forms(x64):
    t = jnp.linspace(0.0, 1.0, 11)
    integral = 0.1 * t + 19.9 * t**2 / 2
    alpha, sigma = dj.vp_linear(0.1, 20.0)(t)
    np.testing.assert_allclose(alpha, np.exp(-integral / 2), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.sqrt(1 - np.exp(-integral)), rtol=1e-12)
    alpha, sigma = dj.cosine(0.008)(t)
    bar = (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    np.testing.assert_allclose(alpha**2, bar, atol=1e-14)
    np.testing.assert_allclose(sigma**2, 1 - bar, atol=1e-14)
    for schedule in (trigonometric(), dj.cosine(0.0), dj.cosine(1e-12)):
        alpha, sigma = schedule(t)
        np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=1e-11)
        np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=1e-11)
    alpha, sigma = sub_vp(0.1, 20.0)(t)
    np.testing.assert_allclose(alpha, np.exp(-integral / 2), rtol=1e-12)
    np.testing.assert_allclose(sigma, 1 - np.exp(-integral), rtol=1e-12)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.7), (-3.0, 3.0, 0.1)])
def test_sigmoid_is_the_formula_of_the_paper(start, end, tau, x64):
    def s(u):
        return 1 / (1 + np.exp(-u / tau))

    t = np.linspace(0, 1, 21)
    gamma = (s(end) - s(t * (end - start) + start)) / (s(end) - s(start))
    alpha, sigma = sigmoid(start, end, tau)(jnp.asarray(t))
    np.testing.assert_allclose(alpha**2, gamma, atol=1e-13)
    np.testing.assert_allclose(sigma**2, 1 - gamma, atol=1e-13)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.5, 1.0), (-2.0, 2.5)])
def test_laplace_log_snr_is_the_quantile(mu, b, x64):
    """Of uniform times the log SNR has Laplace's law; and both ends are exact."""
    t = np.linspace(0.001, 0.999, 101)
    value = dj.logsnr(laplace(mu, b), jnp.asarray(t))
    np.testing.assert_allclose(stats.laplace(mu, b).cdf(value), 1 - t, rtol=1e-9)
    assert [float(c) for c in laplace(mu, b)(0.0)] == [1, 0] and [float(c) for c in laplace(mu, b)(1.0)] == [0, 1]


@pytest.mark.parametrize("betas", [dj.scaled_linear_betas(1000), dj.linear_betas(50), dj.cosine_betas(20)])
def test_zero_terminal_snr_is_algorithm_1(betas, x64):
    """Without any signal at the end, the first entry kept, the table's roots on a line with the old ones."""
    n, old = len(betas), np.sqrt(np.cumprod(1 - betas))
    betas = zero_terminal_snr(betas)
    alpha, sigma = jax.jit(dj.from_betas(betas))(jnp.arange(1, n + 1) / n)
    expected = (old - old[-1]) * old[0] / (old[0] - old[-1])
    np.testing.assert_allclose(alpha, expected, rtol=1e-8, atol=1e-15)
    assert betas[-1] == 1 and float(alpha[-1]) == 0 and float(sigma[-1]) == 1
    late = 1 - jnp.asarray([0.9, 0.5, 0.1, 1e-6]) / n
    np.testing.assert_allclose(jax.jit(dj.from_betas(betas))(late).alpha, (1 - late) * n * alpha[-2], rtol=1e-7)


def test_a_table_of_one_beta_that_removes_all_signal(x64):
    t = np.linspace(0.0, 1.0, 5)
    (alpha, sigma), rate = jax.jit(lambda t: (dj.from_betas([1.0])(t), dj.rates(dj.from_betas([1.0]), t)))(t)
    np.testing.assert_allclose(alpha, 1 - t, atol=1e-15)
    np.testing.assert_allclose(sigma, np.sqrt(t * (2 - t)), rtol=1e-12)
    np.testing.assert_allclose(rate.alpha, -np.ones(5))
    np.testing.assert_allclose(rate.sigma, [np.inf, *((1 - t[1:]) / np.sqrt(t[1:] * (2 - t[1:])))], rtol=1e-12)


ONE_OF_EACH = ("linear_betas", "cosine", "ve", "rectified", "edm", "zero_terminal_snr", "sub_vp", "laplace", "learned")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_shifted_divides_the_snr(name, x64):
    """And keeps the form; to shift back gives the schedule again."""
    case, (a, s) = CASES[name], facts(name)["at"]
    compute = jax.jit(lambda t, f: (shifted(case.schedule, f)(t), shifted(shifted(case.schedule, f), 1 / f)(t)))
    for factor in (0.3, 4.0):
        (alpha, sigma), back = compute(interior(case), jnp.asarray(factor))
        np.testing.assert_allclose(alpha / sigma, a / s / factor, rtol=1e-10)
        np.testing.assert_allclose(back, (a, s), rtol=1e-9)
        for form in (lambda a, s: a + s, lambda a, s: a, lambda a, s: a**2 + s**2):
            if np.allclose(form(a, s), 1):
                np.testing.assert_allclose(form(alpha, sigma), 1, rtol=1e-12)


def test_shifted_is_a_shift_of_time_or_of_parameters(x64):
    """The published forms, one for each family, with their rates at both ends."""
    f, t = 3.0, jnp.linspace(0.0, 1.0, 11)
    pairs = {
        "Esser et al. 2024, eq. 23": (dj.rectified(), lambda u: dj.rectified()(f * u / (1 + (f - 1) * u))),
        "levels": (dj.edm(), lambda u: dj.edm()(f * u)),
        "both levels": (dj.ve(0.01, 50.0), dj.ve(0.03, 150.0)),
        "log SNR": (laplace(0.5, 2.5), laplace(0.5 - 2 * np.log(f), 2.5)),
        "angle": (
            trigonometric(),
            lambda u: dj.AlphaSigma(*(g(jnp.arctan(f * jnp.tan(np.pi / 2 * u))) for g in (jnp.cos, jnp.sin))),
        ),
    }

    @jax.jit
    def compute(t):
        both = {k: (shifted(schedule, f), expected) for k, (schedule, expected) in pairs.items()}
        return {k: [(schedule(t), dj.rates(schedule, t)) for schedule in pair] for k, pair in both.items()}

    for what, (got, expected) in compute(t).items():
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-12, atol=1e-15, err_msg=what)
        inside = slice(None) if what != "angle" else slice(-1)  # tan is not finite at the end
        got, expected = (np.asarray(rate)[:, inside] for rate in (got[1], expected[1]))
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9, err_msg=what)
    end = compute(t)["angle"][0][1]
    np.testing.assert_allclose((end.alpha[-1], end.sigma[-1]), (-np.pi / 2 / f, 0), atol=1e-12)


def test_shifted_rates_at_the_ends_where_they_are_infinite(x64):
    """d(alpha) is multiplied by f^2 at clean data, d(sigma) divided by it at noise; what was infinite still is."""
    f = 3.0
    for schedule, t, finite, factor in ((dj.cosine(), 0.0, "alpha", f**2), (sigmoid(), 1.0, "sigma", f**-2)):
        rates = jax.jit(lambda t, s=schedule: (dj.rates(s, t), dj.rates(shifted(s, f), t)))
        old, new = (a._asdict() for a in rates(jnp.asarray(t)))
        infinite = "sigma" if finite == "alpha" else "alpha"
        assert float(new[finite]) == pytest.approx(factor * float(old[finite]), rel=1e-9)
        assert np.isinf(old[infinite]) and float(new[infinite]) == float(old[infinite])


@pytest.mark.slow
def test_learned_falls_between_its_ends_and_has_gradients(x64):
    """For any parameters; the gradient is that of finite differences, also through `shifted` under jit."""
    t = jnp.linspace(0.0, 1.0, 201)
    params = jax.tree.map(lambda a: a.astype("float64"), init_learned(jax.random.key(0), 8))
    values = jax.jit(lambda p: dj.logsnr(learned(p, -6.0, 9.0), t))
    for scale in (-1, 1, 2):
        value = values(jax.tree.map(lambda a, s=scale: s * a, params))
        np.testing.assert_allclose((value[0], value[-1]), (9, -6), rtol=1e-12)
        assert np.all(np.diff(value) < 0)

    def f(params, low):
        schedule, some = shifted(learned(params, low, 9.0), 2.0), jnp.linspace(0.1, 0.9, 5)
        return jnp.sum(jnp.sin(dj.logsnr(schedule, some)) + dj.rates(schedule, some).sigma)

    flat, restore = ravel_pytree(params)
    step = 1e-6 * jnp.eye(flat.size)
    gradient, low = jax.jit(jax.grad(f, argnums=(0, 1)))(params, -6.0)
    at = jax.jit(jax.vmap(lambda v: f(restore(v), -6.0)))
    expected = (at(flat[None] + step) - at(flat[None] - step)) / 2e-6
    np.testing.assert_allclose(ravel_pytree(gradient)[0], expected, rtol=1e-5, atol=1e-8)
    assert np.abs(expected).min() > 1e-6 and abs(low) > 1e-3


@pytest.mark.slow
def test_learned_can_become_another_schedule(x64):
    """Gradient steps on the parameters reach the log SNR of cosine(0) inside; the start is far from it."""
    t = jnp.linspace(0.02, 0.98, 97)
    target = dj.logsnr(trigonometric(), t)

    def loss(params):
        return jnp.mean((dj.logsnr(learned(params, target[-1], target[0]), (t - 0.02) / 0.96) - target) ** 2)

    @jax.jit
    def fit(params):
        def body(_, state):
            params, velocity = state
            velocity = jax.tree.map(lambda v, g: 0.95 * v - 0.05 * g, velocity, jax.grad(loss)(params))
            return jax.tree.map(jnp.add, params, velocity), velocity

        return jax.lax.fori_loop(0, 3000, body, (params, jax.tree.map(jnp.zeros_like, params)))[0]

    params = jax.tree.map(lambda a: a.astype("float64"), init_learned(jax.random.key(0), 32))
    start, end = float(loss(params)), float(jax.jit(loss)(fit(params)))
    print(f"mean squared error of the log SNR: {start:.3f} -> {end:.4f}")
    assert end < 0.03 * start


@pytest.mark.parametrize("name", CASES)
def test_times_outside_raise_where_they_can_be_seen(name):
    case = CASES[name]
    outside = [-0.5, np.float32(-1e-3), jnp.asarray([0.5, np.nan], jnp.float32), np.asarray([0.1, -7.0])]
    outside += [] if case.start > 1 else [1.001, jnp.asarray([0.2, 999.0], jnp.float32)]
    for t in outside:
        with pytest.raises(ValueError, match=r"^\w+: t must lie in \[0, (1|inf)\], got \["):
            case.schedule(t)
        with pytest.raises(ValueError, match="must lie in"):  # inside a trace, but a constant of it
            jax.eval_shape(lambda x, t=t: case.schedule(t).alpha * x, jnp.ones(()))
    jax.eval_shape(case.schedule, jnp.ones(3))  # a tracer has no value
    jax.eval_shape(lambda t: dj.rates(case.schedule, t), jnp.ones(3))


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_times_too(name):
    schedule = CASES[name].schedule
    expected = schedule(jnp.float32(0.5))
    for t in (0.5, np.float64(0.5), np.asarray(0.5, np.float32)):
        for value, same in zip(schedule(t), expected, strict=True):
            assert value.dtype == jnp.float32 and value.shape == () and float(value) == float(same)
    for value, same in zip(schedule(1), schedule(1.0), strict=True):
        assert value.dtype == jnp.float32 and float(value) == float(same)
    for t in (-1e-7, 1 + 5e-7):  # rounding of a grid
        schedule(t)


def test_rates_of_the_trigonometric_schedule_at_clean_data(x64):
    rate = dj.rates(dj.cosine(0.0), jnp.asarray(0.0))
    assert float(rate.alpha) == pytest.approx(0, abs=1e-15)
    assert float(rate.sigma) == pytest.approx(np.pi / 2, rel=1e-12)


@pytest.mark.slow
def test_inverse_logsnr_has_the_derivative_of_the_inverse(x64):
    """t = 1 / (1 + exp(l / 2)) for the straight line; and in parameters, d t = -d l / l'."""
    value = jnp.linspace(-5.0, 5.0, 7)
    t, rate = jax.jvp(lambda v: dj.inverse_logsnr(dj.rectified(), v, 0.0, 1.0), (value,), (jnp.ones(7),))
    np.testing.assert_allclose(t, 1 / (1 + np.exp(value / 2)), rtol=1e-12)
    np.testing.assert_allclose(rate, -t * (1 - t) / 2, rtol=1e-9)
    moved = jax.jacfwd(lambda f: dj.inverse_logsnr(shifted(dj.rectified(), f), value, 0.0, 1.0))(2.0)
    np.testing.assert_allclose(moved, -np.exp(value / 2) / (1 + 2 * np.exp(value / 2)) ** 2, rtol=1e-9)
    outside = jax.grad(lambda v: dj.inverse_logsnr(dj.ve(), v, 0.0, 1.0))(100.0)
    assert float(outside) == 0


def test_inverse_logsnr_without_a_solution_gives_the_nearer_end():
    value = jnp.asarray([100.0, -100.0], jnp.float32)
    np.testing.assert_allclose(dj.inverse_logsnr(dj.ve(), value, 0.0, 1.0), [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("table", [dj.linear_betas(1000), dj.scaled_linear_betas(50), dj.cosine_betas(100)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_betas_is_the_cumulative_product(table, dtype, x64):
    n = len(table)
    alpha, sigma = jax.jit(dj.from_betas(table))(jnp.asarray(np.arange(n + 1) / n, dtype))
    bar = np.concatenate([[1.0], np.cumprod(1 - table)])
    rtol = {"float32": 2e-4, "float64": 1e-11}[dtype]
    np.testing.assert_allclose(alpha, np.sqrt(bar), rtol=rtol)
    np.testing.assert_allclose(sigma, np.sqrt(1 - bar), rtol=rtol)


def test_beta_tables():
    linear = dj.linear_betas(1000)
    np.testing.assert_allclose(np.diff(linear), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_allclose(np.diff(np.sqrt(dj.scaled_linear_betas(1000))), (0.012**0.5 - 0.00085**0.5) / 999)
    betas = dj.cosine_betas(1000)
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(betas, np.clip(1 - bar[1:] / bar[:-1], 0, 0.999), rtol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dj.vp_linear(-0.1, 20.0),
        lambda: dj.vp_linear(2.0, 1.0),
        lambda: dj.cosine(-0.1),
        lambda: dj.ve(0.0, 50.0),
        lambda: dj.ve(2.0, 1.0),
        lambda: dj.linear_betas(0),
        lambda: dj.cosine_betas(-1),
        lambda: dj.scaled_linear_betas(0),
        lambda: dj.from_betas([]),
        lambda: dj.from_betas([0.0, 0.1]),
        lambda: dj.from_betas([1.0, 0.1]),
        lambda: dj.from_betas([0.1, 1.1]),
        lambda: zero_terminal_snr([0.1]),
        lambda: zero_terminal_snr([0.1, -0.1]),
        lambda: sub_vp(2.0, 1.0),
        lambda: sigmoid(3.0, -3.0),
        lambda: sigmoid(-3.0, 3.0, 0.0),
        lambda: laplace(0.0, 0.0),
        lambda: shifted(dj.cosine(), 0.0),
        lambda: shifted(dj.cosine(), -2.0),
        lambda: learned(init_learned(jax.random.key(0), 4), 5.0, -5.0),
        lambda: init_learned(jax.random.key(0), 0),
        lambda: dj.from_betas([0.1, np.nan]),
        lambda: dj.from_betas([[0.1], [0.2]]),
    ],
)
def test_bad_input(make):
    with pytest.raises(ValueError, match=r".{10}"):
        make()
