"""Distances, neighbours and scores against known answers and plain transcriptions of their definitions."""

import itertools

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.evaluation import distances, neighbours, scores
from diffusion_jax.evaluation.distances import frechet_distance, frechet_of, kernel_distance, mmd2
from diffusion_jax.evaluation.moments import joined, moments, no_moments


def covariance(rng, d, condition):
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (turn * np.geomspace(1, 1 / condition, d)) @ turn.T


@given(cuts=st.lists(st.integers(1, 199), max_size=6), offset=st.floats(-1e4, 1e4))
@settings(deadline=None, max_examples=30)
def test_moments_do_not_depend_on_the_batches(cuts, offset):
    rows = np.random.default_rng(0).standard_normal((200, 3)) + offset
    parts = np.split(rows, sorted(set(cuts)))
    found = moments(parts)
    assert found.n == 200
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-7)
    pieces = [moments([part]) for part in parts]
    backwards = no_moments(3)
    for piece in reversed(pieces):
        backwards = joined(piece, backwards)
    np.testing.assert_allclose(backwards.covariance, found.covariance, rtol=1e-7)


@pytest.mark.parametrize("condition", [1.0, 1e6, 1e12])
def test_frechet_distance_is_scipys(condition):
    rng = np.random.default_rng(0)
    a, b = (covariance(rng, 64, condition) for _ in range(2))
    mu = rng.standard_normal((2, 64))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.sum((mu[0] - mu[1]) ** 2) + np.trace(a + b - 2 * root)
    assert frechet_distance(mu[0], a, mu[1], b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_commuting_covariances_and_its_laws():
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    s, r = rng.uniform(0, 2, (2, 8))
    s[0] = r[1] = 0
    a, b, mu = (turn * s**2) @ turn.T, (turn * r**2) @ turn.T, rng.standard_normal(8)
    exact = np.sum(mu**2) + np.sum((s - r) ** 2)
    # The zeros are rounded to about 1e-16, whose square root is 1e-8.
    assert frechet_distance(mu, a, np.zeros(8), b) == pytest.approx(exact, rel=1e-7)
    assert frechet_distance(np.zeros(8), b, mu, a) == pytest.approx(exact, rel=1e-7)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_is_biased_upwards_like_one_over_n():
    rng, exact = np.random.default_rng(2), 8 * 0.25  # N(0, I) and N(1/2, I) in 8 dimensions
    bias = {}
    for n in (50, 100, 200, 400):
        pairs = (rng.standard_normal((2, 200, n, 8)) + np.array([0, 0.5])[:, None, None, None]).swapaxes(0, 1)
        bias[n] = np.mean([frechet_of(moments([x]), moments([y])) for x, y in pairs]) - exact
    assert all(value > 0 for value in bias.values())
    slopes = [np.log2(bias[n] / bias[2 * n]) for n in (50, 100, 200)]
    assert np.mean(slopes) == pytest.approx(1.0, abs=0.15)


def test_few_examples_are_warned_of():
    x = np.random.default_rng(0).standard_normal((8, 8))
    with pytest.warns(UserWarning, match="8 examples give a singular covariance of 8 features"):
        frechet_of(moments([x]), moments([x]))


def plain_mmd2(x, y, k, unbiased):
    def mean(a, b, skip):
        pairs = [(i, j) for i, j in itertools.product(range(len(a)), range(len(b))) if not (skip and i == j)]
        return sum(k(a[i], b[j]) for i, j in pairs) / len(pairs)

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd2_is_its_definition(unbiased, monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 7)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), rng.standard_normal((17, 3)) + 0.3
    cube = plain_mmd2(x, y, lambda a, b: (a @ b / 3 + 1) ** 3, unbiased)
    assert mmd2(x, y, unbiased=unbiased) == pytest.approx(cube, rel=1e-9)
    bell = plain_mmd2(x, y, lambda a, b: np.exp(-np.sum((a - b) ** 2) / 8), unbiased)
    assert mmd2(x, y, distances.gaussian(2.0), unbiased=unbiased) == pytest.approx(bell, rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_is_honest():
    rng, d = np.random.default_rng(0), 4
    # E k(x, y) of (x.y / d + 1)^3: for x, y ~ N(0, I) it is 1 + 3 / d; for a shift m of one of them the same; for both
    # shifted by m, with a = m.m / d: E (z + 1)^3 with mean a, second moment a^2 + 2 a / d + 1 / d, third moment below.
    m = np.full(d, 0.4)
    a = m @ m / d
    second, third = a**2 + 2 * a / d + 1 / d, a**3 + 3 * a * (2 * a / d + 1 / d) + 6 * a / d**2
    exact = (1 + 3 / d) + (1 + 3 * a + 3 * second + third) - 2 * (1 + 3 * (1 / d + a / d))
    found = [
        kernel_distance(rng.standard_normal((400, d)), rng.standard_normal((400, d)) + m, block=50) for _ in range(300)
    ]
    values, errors = np.array(found).T
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(len(values))
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.15)
    same = [kernel_distance(*rng.standard_normal((2, 100, d)), block=50).value for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)


def test_cmmd_is_its_definition():
    x, y = np.random.default_rng(0).standard_normal((2, 12, 5))
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    expected = 1000 * plain_mmd2(*unit, lambda a, b: np.exp(-np.sum((a - b) ** 2) / 200), False)
    assert distances.cmmd(x, y) == pytest.approx(expected, rel=1e-6)
    assert distances.cmmd(3 * x, y) == pytest.approx(expected, rel=1e-6)


def test_support_is_its_definition(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 11)
    rng, k = np.random.default_rng(0), 3
    y, x = rng.standard_normal((40, 2)), 1.3 * rng.standard_normal((30, 2)) + 0.5
    between = np.linalg.norm(x[:, None] - y[None], axis=-1)
    r_y, r_x = (np.sort(np.linalg.norm(z[:, None] - z[None], axis=-1), axis=1)[:, k] for z in (y, x))
    found = neighbours.support(y, x, k)
    assert found.precision == np.mean([any(between[i] <= r_y) for i in range(30)])
    assert found.recall == np.mean([any(between[:, j] <= r_x) for j in range(40)])
    assert found.density == pytest.approx(np.sum(between <= r_y[None]) / (30 * k))
    assert found.coverage == np.mean([between[:, j].min() <= r_y[j] for j in range(40)])


def test_support_of_the_same_law_of_one_mode_and_of_elsewhere():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((1000, 2))
    same = neighbours.support(real, rng.standard_normal((1000, 2)))
    # 1 - (1/2)^k is the exact expectation of coverage for two samples of one law (Naeem et al. 2020, section 3.2).
    assert same.coverage == pytest.approx(1 - 2**-5, abs=0.03)
    assert same.density == pytest.approx(1.0, abs=0.05)
    narrow = neighbours.support(real, 0.1 * rng.standard_normal((1000, 2)))
    assert narrow.precision > 0.95
    assert narrow.coverage < 0.2
    away = neighbours.support(real, rng.standard_normal((1000, 2)) + 100)
    assert away == (0, 0, 0, 0)


def test_copies_are_found():
    rng = np.random.default_rng(0)
    train, held_out, fresh = rng.standard_normal((3, 500, 4))
    assert neighbours.copy_ratio(train, held_out, fresh) == pytest.approx(1.0, abs=0.1)
    assert neighbours.copy_ratio(train, held_out, train) < 1e-6
    assert neighbours.authenticity(train, fresh) == pytest.approx(0.5, abs=0.07)
    assert neighbours.authenticity(train, train + 1e-3) < 0.01


def test_scores_of_known_sets():
    p = np.full((100, 5), 0.2)
    assert scores.inception_score(p).value == pytest.approx(1.0)
    eye = np.eye(6)
    assert scores.vendi_score(eye) == pytest.approx(6.0)
    assert scores.vendi_score(np.repeat(eye[:3], 50, axis=0)) == pytest.approx(3.0)
    x = np.random.default_rng(0).standard_normal((7, 20))
    assert scores.vendi_score(x) == pytest.approx(scores.vendi_score(np.pad(x, ((0, 0), (0, 3)))))
    texts = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert scores.clip_score(np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), texts).value == pytest.approx(
        100 * (1 + np.sqrt(0.5) + 0) / 3
    )


def test_bad_input():
    x = np.zeros((4, 2))
    for call, message in [
        (lambda: moments([]), "no features"),
        (lambda: moments([np.array([[1.0, np.nan]])]), "example 0 are not finite"),
        (lambda: moments([x[0]]), "features are"),
        (lambda: moments([x[:1]]).covariance, "at least 2 rows"),
        (lambda: frechet_distance(x[0], np.eye(2), x[0], np.eye(3)), "have the shapes"),
        (lambda: frechet_distance(x[0], -np.eye(2), x[0], np.eye(2)), "cov_a has the negative eigenvalue"),
        (lambda: frechet_distance(x[0], np.eye(2), x[0], np.array([[1.0, 1], [0, 1]])), "cov_b is not symmetric"),
        (lambda: frechet_distance(x[0], np.full((2, 2), np.inf), x[0], np.eye(2)), "cov_a is not finite"),
        (lambda: mmd2(x, np.zeros((4, 3))), "of 2 and of 3 dimensions"),
        (lambda: mmd2(x[:1], x), "two examples"),
        (lambda: kernel_distance(x, x), "blocks of 1000"),
        (lambda: neighbours.support(x, x, 4), "k=4 neighbours"),
        (lambda: scores.inception_score(x), "probabilities"),
        (lambda: scores.inception_score(np.ones((3, 1))), "3 examples in 10 parts"),
        (lambda: scores.clip_score(x, x[:2]), "4 pictures and 2 texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
