"""Langevin dynamics: exact stationary laws on Gaussians, with the bias of a finite step; Song & Ermon's algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import at_scalar_time, exact_denoiser, run_law
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.samplers.langevin import annealed_langevin, langevin_dynamics, underdamped_langevin
from diffusion_jax.samplers.stochastic import reverse_diffusion

KEY = jax.random.key(0)
VARIANCE = np.array([0.3, 1.0, 4.0])


def within(x, variance, p=0.001):
    """Variances of n independent examples, each within its standard errors."""
    n = len(x)
    error = np.abs(np.var(x, axis=0) / variance - 1) * np.sqrt(n / 2)
    return bool(error.max() < stats.norm.isf(p / 2 / x.shape[1]))


def test_unadjusted_langevin_has_its_own_variance():
    """V / (1 - e / 2V) and not V: started at either, it ends at the former; n = 20,000."""
    e, score = 0.15, lambda x: -x / jnp.asarray(VARIANCE[None], x.dtype)
    biased = VARIANCE / (1 - e / (2 * VARIANCE))
    start = jax.random.normal(jax.random.key(1), (20_000, 3)) * jnp.sqrt(jnp.asarray(VARIANCE[None], jnp.float32))
    y = jax.jit(lambda x, e: langevin_dynamics(KEY, score, x, e, 200))(start, e)
    assert within(y, biased) and not within(y, VARIANCE)


def test_baoab_has_the_right_law_of_x_and_not_of_v():
    """V for x, but 1 - h^2 / 4V for v, which is 0.7 for the narrowest; n = 20,000."""
    h, score = 0.6, lambda x: -x / jnp.asarray(VARIANCE[None], x.dtype)
    start = 3 * jax.random.normal(jax.random.key(1), (20_000, 3))
    x, v = jax.jit(lambda x, h: underdamped_langevin(KEY, score, x, h, 100))(start, h)
    assert within(x, VARIANCE)
    assert within(v, 1 - h**2 / (4 * VARIANCE)) and not within(v, np.ones(3))


def test_baoab_is_its_five_parts():
    """Two steps in NumPy: B, A, O, A, B, with c = e^(-friction h); the first velocity comes from fold_in(key, n)."""
    h, friction, score = 0.4, 0.7, lambda x: jnp.sin(x)
    with jax.enable_x64(True):
        start = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
        got = jax.jit(lambda x: underdamped_langevin(KEY, score, x, h, 2, friction))(start)
        z = [np.asarray(dj.normal_like(dj.fold(KEY, i), start)) for i in range(3)]
    x, v, c = np.asarray(start), z[2], np.exp(-friction * h)
    for i in range(2):
        v = v + h / 2 * np.sin(x)
        x = x + h / 2 * v
        v = c * v + np.sqrt(1 - c**2) * z[i]
        x = x + h / 2 * v
        v = v + h / 2 * np.sin(x)
    np.testing.assert_allclose(got, (x, v), rtol=1e-12)


@pytest.mark.parametrize("move", [langevin_dynamics, lambda *a: underdamped_langevin(*a)[0]])
def test_any_score_function_and_one_key_per_example(move):
    """A mixture's own score, images, bfloat16; example i is the same in any batch."""
    law = Mixture(np.array([0.3, 0.7]), np.array([[1.0] * 16, [-1.0] * 16]), np.full((2, 16), 0.2))
    score = lambda x: mixtures.score(law, dj.edm(), x, jnp.zeros(x.shape[:1]))  # noqa: E731
    go = jax.jit(lambda keys, x: move(keys, score, x, 0.02, 30))
    keys, x = jax.random.split(KEY, 4), jax.random.normal(KEY, (4, 16))
    y = go(keys, x)
    assert np.all(np.isfinite(y))
    np.testing.assert_array_equal(go(keys[::-1], x[::-1])[::-1], y)
    images = jax.ShapeDtypeStruct((3, 4, 4, 1), "bfloat16")
    out = jax.eval_shape(lambda x: move(KEY, lambda x: -x, x, 0.02, 3), images)
    assert out.shape == images.shape and out.dtype == images.dtype


def test_annealed_langevin_is_algorithm_1():
    """Song & Ermon 2019 in NumPy: alpha_i = epsilon sigma_i^2 / sigma_L^2, x += alpha_i / 2 score + sqrt(alpha_i) z."""
    schedule, epsilon, steps, levels = dj.edm(), 2e-5, 3, np.geomspace(1.0, 0.01, 10)
    law = mixtures.gaussian(np.array([0.2, -0.3]), np.array([0.4, 0.1]))
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 2)))
        sampler, denoiser = annealed_langevin(schedule, epsilon, 0.01, steps), exact_denoiser(law, schedule)
        y = jax.jit(lambda x, times: dj.sample(KEY, sampler, denoiser, x, times))(x, jnp.append(levels, 0.0))
        expected = np.asarray(x)
        for i, sigma in enumerate(levels):
            alpha = epsilon * sigma**2 / 0.01**2
            for j in range(steps):
                z = np.asarray(dj.normal_like(dj.fold(dj.fold(KEY, i), j), x))
                score = -(expected - law.means[0]) / (law.variances[0] + sigma**2)
                expected = expected + alpha / 2 * score + np.sqrt(alpha) * z
    np.testing.assert_allclose(y, expected, rtol=1e-9)


@pytest.mark.slow
def test_annealed_langevin_follows_the_levels_while_they_are_like_the_data():
    """A mixture in 16 dimensions, n = 2000, 100 steps at each of 60 levels, to the last level but one."""
    run_law(dj.langevin(dj.ve(0.05, 10.0), 0.15, 100), "ve_noisy", steps=60, index=-2)


def test_langevin_has_the_right_law_in_two_dimensions():
    """That of its time, but for the finite step, which raises V to V / (1 - e / 2 V)."""
    schedule, t = dj.ve(0.05, 10.0), 0.3
    sigma, variance = float(schedule(jnp.asarray(t)).sigma), np.array([0.3, 2.0])
    total, e = variance + sigma**2, 2 * (0.16 * sigma) ** 2
    expected = total / (1 - e / (2 * total))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20_000, 2)) * np.sqrt(expected), jnp.float32)
    denoise = at_scalar_time(exact_denoiser(mixtures.gaussian(np.zeros(2), variance), schedule))
    y = jax.jit(lambda x, t: dj.langevin(schedule, 0.16, 100).step(KEY, x, (), t, t, denoise)[0])(x, t)
    assert within(y, expected)


@pytest.mark.parametrize(("d", "least", "most"), [(2, 5.0, np.inf), (16, 1.1, 1.6), (256, 0.97, 1.1)])
def test_a_step_that_looks_at_the_score_has_another_law(d, least, most):
    """Why `langevin` does not use 2 (snr |z| / |score|)^2: the variance reached from N(0, I), where it should stay."""

    def step(x, key):
        z, score = jax.random.normal(key, x.shape), -x
        e = 2 * (0.16 * jnp.linalg.norm(z, axis=1) / jnp.linalg.norm(score, axis=1))[:, None] ** 2
        return x + e * score + jnp.sqrt(2 * e) * z, None

    x = jax.random.normal(jax.random.key(0), (2000, d))
    x, _ = jax.jit(lambda x, keys: jax.lax.scan(step, x, keys))(x, jax.random.split(jax.random.key(1), 400))
    print(f"variance at d = {d}: {float(jnp.var(x)):.2f}")
    assert least < float(jnp.var(x)) < most


def test_predictor_corrector_of_a_variance_exploding_process():
    """`chain(langevin, reverse_diffusion)` from the prior, n = 2000: the law of a mixture in 16 dimensions."""
    schedule = dj.ve(0.05, 10.0)
    run_law(dj.chain(dj.langevin(schedule, 0.05), reverse_diffusion(schedule)), "ve", steps=200)


def test_bad_input():
    schedule = dj.ve()
    for call, match in (
        (lambda: dj.langevin(schedule, 0.0), "snr"),
        (lambda: dj.langevin(schedule, 0.1, 0), "steps"),
        (lambda: annealed_langevin(schedule, 0.0), "epsilon"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
