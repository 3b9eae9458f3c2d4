"""Few-step samplers on Gaussian data, where the consistency function and the flow map are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, law_at, law_propagator

import diffusion_jax as dj
from conformance.table import PROBLEMS
from diffusion_jax.evaluation import mixtures
from diffusion_jax.samplers.few_step import consistency, jump, undershoot

KEY = jax.random.key(0)


def flow_map(schedule):
    """The exact flow of BELL between any two times, per example."""

    def move(x, t, s, cond=None):
        return jax.vmap(lambda x, t, s: mixtures.flow(BELL, schedule, x[None], t, s)[0])(x, t, s)

    return move


def consistency_function(schedule, end):
    """As a denoiser: x0 is the state at `end`."""
    move = flow_map(schedule)

    def denoiser(x, t, cond=None):
        return dj.from_x0(schedule, x, t, move(x, t, jnp.full_like(t, end)))

    return denoiser


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("problem", "end"), [("edm", 0.0), ("edm", 0.02), ("rectified", 0.0), ("cosine", 0.0)])
def test_consistency_sampling_is_exact_for_the_exact_function(problem, end, steps):
    """Mean and covariance at the end by `oracles`, eq. (1), from the law at the first time; and not for a denoiser."""
    schedule, times = PROBLEMS[problem].schedule, np.linspace(0.9 * PROBLEMS[problem].top, end, steps + 1)
    make, wanted = (lambda noise: consistency(schedule, end, noise)), law_at(BELL, schedule, end)
    mean, covariance = law_propagator(make, schedule, BELL, consistency_function(schedule, end))(times)
    np.testing.assert_allclose(mean, wanted.means[0], atol=1e-9)
    np.testing.assert_allclose(covariance, np.diag(wanted.variances[0]), atol=1e-9)
    mean, covariance = law_propagator(make, schedule, BELL)(times)
    assert np.abs(np.diag(covariance) - wanted.variances[0]).max() > 0.03


def test_consistency_is_algorithm_1_of_song():
    """x <- f(x, t), then x + sqrt(t^2 - epsilon^2) z, in NumPy on EDM's time, down to epsilon."""
    schedule, end = dj.edm(), 0.002
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)) * 80)
        times, denoiser = np.array([80.0, 5.0, 1.0, end]), consistency_function(schedule, end)
        y = jax.jit(lambda x, times: dj.sample(KEY, consistency(schedule, end), denoiser, x, times))(
            x, jnp.asarray(times)
        )
        m, v, expected = BELL.means[0], BELL.variances[0], np.asarray(x)
        for i, t in enumerate(times[:-1]):
            expected = m + np.sqrt((v + end**2) / (v + t**2)) * (expected - m)
            if i < 2:
                z = np.asarray(dj.normal_like(dj.fold(KEY, i), x))
                expected = expected + np.sqrt(times[i + 1] ** 2 - end**2) * z
    np.testing.assert_allclose(y, expected, rtol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_undershooting_a_flow_map_keeps_the_law(gamma):
    """By jumps of the exact flow and noise, n = 20,000: each variance of BELL within its standard errors, p > 0.001."""
    schedule, n = dj.rectified(), 20_000
    sampler = undershoot(jump(flow_map(schedule)), schedule, gamma)
    x = jax.random.normal(KEY, (n, 3))
    y = np.asarray(jax.jit(lambda x: dj.sample(KEY, sampler, None, x, jnp.asarray([1.0, 0.6, 0.3, 0.0])))(x))
    assert np.abs(y.mean(0) - BELL.means[0]).max() < 3.6 * np.sqrt(1 / n)
    np.testing.assert_allclose(y.var(0), BELL.variances[0], rtol=3.6 * np.sqrt(2 / n))


def test_undershoot_of_ddim_is_tcd_and_its_ends_are_ddim_and_consistency():
    """Zheng et al. 2024: x_r = alpha_r x0 + sigma_r eps at r = (1 - gamma) s, then the forward process from r to s."""
    schedule, denoiser, t, s = dj.cosine(), mixtures.denoiser(BELL, dj.cosine()), 0.8, 0.5

    def step(sampler, x):
        denoise = lambda x, t: denoiser(x, jnp.broadcast_to(t, x.shape[:1]))  # noqa: E731
        return sampler.step(KEY, x, sampler.init(x), jnp.asarray(t), jnp.asarray(s), denoise)[0]

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
        tcd = functools.partial(undershoot, dj.ddim(schedule), schedule)
        z = np.asarray(dj.normal_like(dj.fold(KEY, 1), x))

        @jax.jit
        def go(x):
            ends = step(tcd(0.0), x), step(dj.ddim(schedule), x), step(tcd(1.0), x)
            return ends, step(tcd(0.3), x), denoiser(x, jnp.full(4, t)), schedule(jnp.asarray([s, 0.7 * s]))

        (none, ddim, all_), some, p, (alpha, sigma) = jax.tree.map(np.asarray, go(x))
    np.testing.assert_allclose(none, ddim, rtol=1e-12)
    np.testing.assert_allclose(all_, alpha[0] * p.x0 + sigma[0] * z, rtol=1e-9)
    ratio = alpha[0] / alpha[1]
    down = alpha[1] * p.x0 + sigma[1] * p.eps
    np.testing.assert_allclose(some, ratio * down + np.sqrt(1 - ratio**2) * z, rtol=1e-9)


def test_jump_is_the_flow_map_in_any_number_of_steps():
    """With its condition, with t and s per example, and without a denoiser."""
    schedule, seen = dj.rectified(), []

    def move(x, t, s, cond):
        seen.append((t.shape, s.shape))
        return flow_map(schedule)(x, t, s) + dj.bcast(cond, x) * 0

    x = jax.random.normal(KEY, (4, 3))
    go = jax.jit(lambda x, times: dj.sample(KEY, jump(move, jnp.ones(4)), None, x, times))
    wanted = mixtures.flow(BELL, schedule, x, jnp.float32(1.0), jnp.float32(0.0))
    for times in (dj.uniform(1), dj.uniform(7)):
        np.testing.assert_allclose(go(x, times), wanted, rtol=1e-5, atol=1e-6)
    assert set(seen) == {((4,), (4,))}


def test_bad_input():
    with pytest.raises(ValueError, match="gamma"):
        undershoot(dj.ddim(dj.cosine()), dj.cosine(), 1.5)
