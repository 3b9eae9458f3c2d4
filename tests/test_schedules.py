"""Contracts of every schedule at once, and the closed forms of those that have one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import diffusion_jax as dj

STEP = 1e-6
GRID = 41


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
    assert float(clean.alpha) == 1
    assert float(clean.sigma) == pytest.approx(0.01) if name == "ve" else float(clean.sigma) == 0
    if name in ("cosine", "cosine_0", "rectified"):
        assert float(noisy.alpha) == 0 and float(noisy.sigma) == pytest.approx(1, abs=1e-6)
        assert float(dj.logsnr(case.schedule, jnp.float32(1.0))) == -np.inf
    expected = {"ve": 50.0, "edm": 80.0}.get(name, 1.0)
    assert float(noisy.sigma) == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize(
    "name", ["linear_betas", "scaled_linear_betas", "cosine_betas", "vp_linear", "cosine", "cosine_0"]
)
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
    alpha, sigma = dj.cosine(0.0)(t)
    np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), rtol=1e-12)


def test_rates_of_the_trigonometric_schedule_at_clean_data(x64):
    rate = dj.rates(dj.cosine(0.0), jnp.asarray(0.0))
    assert float(rate.alpha) == pytest.approx(0, abs=1e-15)
    assert float(rate.sigma) == pytest.approx(np.pi / 2, rel=1e-12)


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
        lambda: dj.from_betas([0.1, 1.0]),
        lambda: dj.from_betas([0.1, np.nan]),
        lambda: dj.from_betas([[0.1], [0.2]]),
    ],
)
def test_bad_input(make):
    with pytest.raises(ValueError, match=r".{10}"):
        make()
