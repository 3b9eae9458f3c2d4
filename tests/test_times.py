"""Grids against the papers' formulas written out anew; draws against their distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import diffusion_jax as dj

GRIDS = {
    "uniform": lambda n: dj.uniform(n),
    "quadratic": lambda n: dj.quadratic(n),
    "trailing": lambda n: dj.trailing(n, 1000),
    "leading": lambda n: dj.leading(n, 1000, 0),
    "karras": lambda n: dj.karras(n, 0.002, 80.0, 7.0),
    "logsnr_uniform": lambda n: dj.logsnr_uniform(n, dj.vp_linear(), 1.0, 1e-3),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_grids_fall_to_zero(name, n):
    times = GRIDS[name](n)
    assert times.shape == (n + 1,) and times.dtype == jnp.float32
    assert np.all(np.diff(times) < 0)
    assert float(times[-1]) == 0
    start = {"karras": 80.0, "leading": ((n - 1) * (1000 // n) + 1) / 1000}.get(name, 1.0)
    assert float(times[0]) == pytest.approx(start, rel=1e-6)


def test_karras_equation_5():
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    np.testing.assert_allclose(dj.karras(n, low, high, rho), [*expected, 0.0], rtol=1e-6)


def test_trailing_and_leading_indices():
    """Lin et al. 2024, table 2, for T = 1000 and S = 10; with their indices 1..T these are t / T."""
    np.testing.assert_allclose(dj.trailing(10) * 1000, [*range(1000, 0, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.leading(10) * 1000, [*range(901, 0, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.leading(10, offset=1) * 1000, [*range(902, 1, -100), 0], atol=1e-3)
    np.testing.assert_allclose(dj.trailing(3) * 1000, [1000, 667, 333, 0], atol=1e-3)
    np.testing.assert_allclose(dj.trailing(1000), dj.uniform(1000), atol=1e-7)


def test_quadratic_and_uniform():
    np.testing.assert_allclose(dj.quadratic(5), (np.arange(5, -1, -1) / 5) ** 2, atol=1e-7)
    np.testing.assert_allclose(dj.uniform(5, 0.9, 0.1), 0.9 - 0.16 * np.arange(6), atol=1e-6)


def test_logsnr_uniform_is_uniform():
    schedule, times = dj.vp_linear(), np.asarray(dj.logsnr_uniform(20, dj.vp_linear(), 1.0, 1e-3))[:-1]
    values = np.asarray(dj.logsnr(schedule, jnp.asarray(times)))
    np.testing.assert_allclose(np.diff(values), (values[-1] - values[0]) / 19, rtol=2e-3)
    sigmas = np.asarray(dj.logsnr_uniform(9, dj.edm(), 80.0, 0.002))[:-1]
    np.testing.assert_allclose(sigmas, np.geomspace(80.0, 0.002, 9), rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dj.uniform(0),
        lambda: dj.quadratic(-1),
        lambda: dj.karras(0),
        lambda: dj.karras(5, 0.0, 80.0),
        lambda: dj.karras(5, 2.0, 1.0),
        lambda: dj.trailing(0),
        lambda: dj.trailing(11, 10),
        lambda: dj.leading(11, 10),
        lambda: dj.leading(10, 10, offset=1),
        lambda: dj.logsnr_uniform(0, dj.vp_linear()),
        lambda: dj.logsnr_uniform(5, dj.cosine(), 1.0, 1e-3),
    ],
)
def test_bad_grids(make):
    with pytest.raises(ValueError, match=r".{10}"):
        make()


DRAWS = {
    "uniform": (dj.draw_uniform(0.1, 0.9), stats.uniform(0.1, 0.8)),
    "stratified": (dj.draw_stratified(0.1, 0.9), stats.uniform(0.1, 0.8)),
    "logit_normal": (dj.draw_logit_normal(0.3, 1.2), stats.norm(0.3, 1.2)),
    "lognormal": (dj.draw_lognormal(-1.2, 1.2), stats.lognorm(1.2, scale=np.exp(-1.2))),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_have_their_distribution(name):
    draw, law = DRAWS[name]
    t = draw(jax.random.key(5), 4000)
    assert t.shape == (4000,) and t.dtype == jnp.float32
    values = np.asarray(t, np.float64)
    if name == "logit_normal":
        assert np.all((values > 0) & (values < 1))
        values = np.log(values / (1 - values))
    assert stats.kstest(values, law.cdf).pvalue > 0.01
    assert not np.array_equal(t, draw(jax.random.key(6), 4000))


def test_discrete_draws_are_uniform_on_the_table():
    t = np.asarray(dj.draw_discrete(10)(jax.random.key(1), 5000))
    index = np.round(t * 10).astype(int)
    np.testing.assert_allclose(t, index / 10, rtol=1e-6)
    counts = np.bincount(index, minlength=11)
    assert counts[0] == 0 and counts.size == 11
    assert stats.chisquare(counts[1:]).pvalue > 0.01


@pytest.mark.parametrize("b", [1, 7, 64])
def test_stratified_draws_have_one_in_each_cell(b):
    for seed in range(5):
        t = np.asarray(dj.draw_stratified(0.0, 1.0)(jax.random.key(seed), b), np.float64)
        assert np.all((t >= 0) & (t < 1))
        np.testing.assert_array_equal(np.sort(np.floor(t * b)), np.arange(b))


def test_each_stratified_draw_is_uniform_by_itself():
    """Any one example of the batch sees all times: over keys, not only over the batch."""
    draw = dj.draw_stratified(0.0, 1.0)
    t = jax.jit(jax.vmap(lambda key: draw(key, 8)))(jax.random.split(jax.random.key(2), 1000))
    for i in (0, 5):
        assert stats.kstest(np.asarray(t[:, i], np.float64), stats.uniform.cdf).pvalue > 0.01
