"""One Brownian path for all step sizes: its law, its consistency, its range, and strong convergence along it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, at_scalar_time, exact_denoiser, measured_order
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.samplers.noise import brownian

SCHEDULES = {
    "vp_linear": (dj.vp_linear(), 1.0, 0.0001),
    "rectified": (dj.rectified(), 0.99, 0.0001),
    "edm": (dj.edm(), 80.0, 0.002),
}
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_increments_are_independent_standard_normals(name):
    """Over steps of very different lengths, n = 20,000: all variances and correlations, and KS, corrected."""
    schedule, start, end = SCHEDULES[name]
    times = dj.logsnr_uniform(41, schedule, start, end)[:-1]
    times = jnp.concatenate([times[:3], times[10:12], times[20:24:3], times[38:]])
    x, n = jnp.zeros((1, 20_000)), 20_000
    noise = brownian(KEY, schedule, start, end)
    z = np.asarray(jax.jit(lambda times: jax.lax.map(lambda ts: noise(KEY, x, *ts)[0], (times[:-1], times[1:])))(times))
    k = len(z)
    error = np.abs(z @ z.T / n - np.eye(k)) * np.sqrt(n) / np.where(np.eye(k), np.sqrt(2), 1)
    assert error.max() < stats.norm.isf(0.0005 / (k * (k + 1) / 2)), f"{error.max():.1f} standard errors"
    assert min(stats.kstest(row, "norm").pvalue for row in z) > 0.01 / k


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_a_constant_x0_many_steps_equal_one(name, dtype, tolerance):
    """DDIM at eta = 1 from start to end, over a SNR of 1e-4 to 1e8, in 1 and in 37 steps of uneven length."""
    schedule, start, end = SCHEDULES[name]
    with jax.enable_x64(dtype == "float64"):
        x = jax.random.normal(jax.random.key(1), (4, 3), dtype)
        sampler = dj.ddim(schedule, 1.0, brownian(KEY, schedule, start, end))
        denoise = lambda x, t, cond: dj.from_x0(schedule, x, t, jnp.full_like(x, 0.3))
        go = jax.jit(lambda times: dj.sample(KEY, sampler, denoise, x, times))
        fine = np.asarray(dj.logsnr_uniform(38, schedule, start, end)[:-1], dtype)
        one, many = go(jnp.asarray(fine[[0, -1]])), go(jnp.asarray(fine))
        np.testing.assert_allclose(
            (many - 0.3) / schedule(fine[-1]).sigma, (one - 0.3) / schedule(fine[-1]).sigma, atol=tolerance * 10
        )
        assert not np.allclose(one, go(jnp.asarray(fine)) + 1)


STRONG = {
    "ddpm": lambda s, noise: dj.ddpm(s, "small", noise),
}


def strong(name):
    schedule, high, low = dj.vp_linear(), 0.9, 0.1
    key = jax.random.key(3)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (2000, 3))
        noise = brownian(key, schedule, 1.0, 0.01)
        denoiser = exact_denoiser(BELL, schedule)
        sampler = STRONG[name](schedule, noise)
        go = jax.jit(lambda times: dj.sample(KEY, sampler, denoiser, x, times))
        ys = [go(jnp.linspace(high, low, n + 1)) for n in (32, 64, 1024)]
        return [float(jnp.sqrt(jnp.mean((y - ys[-1]) ** 2))) for y in ys[:-1]]
