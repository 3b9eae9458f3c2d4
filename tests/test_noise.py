"""One Brownian path for all step sizes: its law, its consistency, its range, and strong convergence along it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, at_scalar_time, exact_denoiser
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.samplers.exponential import dpmpp_2m_sde
from diffusion_jax.samplers.noise import brownian
from diffusion_jax.samplers.stochastic import euler_maruyama, reverse_diffusion

KEY = jax.random.key(0)
# schedule, start, end: SNR from 1e-4 to 1e8, or 1e4 where t = 0 is not without noise
PATHS = {
    "vp_linear": (dj.vp_linear(), 1.0, 1e-4),
    "rectified": (dj.rectified(), 0.99, 1e-4),
    "edm": (dj.edm(), 80.0, 0.002),
}


def levels(name, n):
    """n + 1 times from start to end, equal in log SNR."""
    schedule, start, end = PATHS[name]
    low, high = (float(dj.logsnr(schedule, jnp.float32(t))) for t in (start, end))
    inner = dj.inverse_logsnr(schedule, jnp.linspace(low, high, n + 1, dtype=jnp.float32)[1:-1], end, start)
    return np.concatenate([[start], inner, [end]])


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_increments_are_independent_standard_normals(name):
    """Over steps of very different lengths, n = 10,000: all variances and correlations, and KS, corrected."""
    schedule, start, end = PATHS[name]
    times, n = levels(name, 40)[[0, 1, 2, 10, 11, 20, 37, 38, 39, 40]], 10_000
    noise, x = brownian(KEY, schedule, start, end), jnp.zeros((1, n))

    @jax.jit
    def increments(times):
        return jax.lax.map(lambda ts: noise(KEY, x, *ts)[0], (times[:-1], times[1:]))

    z = np.asarray(increments(jnp.asarray(times, jnp.float32)))
    k = len(z)
    error = np.abs(z @ z.T / n - np.eye(k)) * np.sqrt(n) / np.where(np.eye(k), np.sqrt(2), 1)
    assert error.max() < stats.norm.isf(0.0005 / (k * (k + 1) / 2)), f"{error.max():.1f} standard errors"
    assert min(stats.kstest(row, "norm").pvalue for row in z) > 0.01 / k


def walk(sampler, denoiser, x, grids):
    """Where x comes to on each grid, by Python loops over one compiled step with a key of its own."""
    denoise = at_scalar_time(denoiser)
    step = jax.jit(lambda i, x, state, t, s: sampler.step(jax.random.fold_in(KEY, i), x, state, t, s, denoise))
    ends = []
    for times in grids:
        y, state = x, sampler.init(x)
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            y, state = step(i, y, state, t, s)
        ends.append(y)
    return ends


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-11)])
@pytest.mark.parametrize("name", PATHS)
def test_with_a_constant_x0_many_steps_equal_one(name, dtype, tolerance):
    """DDIM at eta = 1 in one step, in two and in 37, in units of the last noise level; and fresh noise does not."""
    schedule, start, end = PATHS[name]

    def denoiser(x, t, cond):
        return dj.from_x0(schedule, x, t, jnp.zeros_like(x))

    with jax.enable_x64(dtype == "float64"):
        fine = levels(name, 37).astype(dtype)
        x = jax.random.normal(jax.random.key(1), (4, 3), dtype)
        grids = fine[[0, -1]], fine[[0, 20, -1]], fine
        noise, unit = brownian(jax.random.key(3), schedule, start, end), schedule(jnp.asarray(fine[-1])).sigma
        one, *others = (y / unit for y in walk(dj.ddim(schedule, 1.0, noise), denoiser, x, grids))
        assert one.dtype == dtype
        for other in others:
            np.testing.assert_allclose(other, one, atol=tolerance)
        fresh = walk(dj.ddim(schedule, 1.0), denoiser, x, grids[:2])
        assert np.abs(fresh[0] - fresh[1]).max() / unit > 0.1


@pytest.mark.slow
def test_from_no_signal_to_no_noise_and_one_path_per_key():
    """Steps from lambda = -inf and to +inf are finite; example i follows from key i, whatever its batch; bfloat16."""
    schedule, keys = dj.rectified(), jax.random.split(KEY, 3)
    x = jnp.zeros((3, 16), jnp.bfloat16)

    @jax.jit
    def draw(keys, x, t, s):
        return brownian(keys, schedule, 0.999, 0.001, depth=6)(KEY, x, t, s)

    z = draw(keys, x, 0.6, 0.4)
    assert z.dtype == x.dtype and z.shape == x.shape
    np.testing.assert_array_equal(draw(keys[::-1], x, 0.6, 0.4)[::-1], z)
    assert len(np.unique(np.asarray(z, np.float32))) > 40
    for t, s in ((1.0, 0.5), (0.5, 0.0), (1.0, 0.0)):
        assert np.all(np.isfinite(np.asarray(draw(keys, x, t, s), np.float32)))


STRONG = {
    "ddpm": lambda s, noise: dj.ddpm(s, "small", noise),
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "dpmpp_2m_sde": lambda s, noise: dpmpp_2m_sde(s, noise=noise),
}


@pytest.mark.slow
def test_strong_convergence():
    """Path by path, 400 of them: doubling n halves what the next doubling changes, and all samplers come to one end."""
    schedule, ends = dj.vp_linear(), {}
    with jax.enable_x64(True):
        noise, denoiser = brownian(KEY, schedule, 1.0, 0.01, depth=10), exact_denoiser(BELL, schedule)
        x = jax.random.normal(jax.random.key(1), (400, 3))
        grids = [np.linspace(0.9, 0.1, n + 1) for n in (100, 200, 400)]
        for name, make in STRONG.items():
            ends[name] = np.stack(walk(make(schedule, noise), denoiser, x, grids))
            order = np.log2(np.divide(*np.sqrt(np.mean(np.diff(ends[name], axis=0) ** 2, axis=(1, 2)))))
            print(f"{name}: strong order {order:.2f}")
            assert order == pytest.approx(1, abs=0.15)
        for end in ends.values():
            apart = np.sqrt(np.mean((end - ends["ddpm"]) ** 2, axis=(1, 2)))
            assert apart[2] < 0.01 and apart[2] <= 0.6 * apart[1]


def test_bad_input():
    for start, end in ((1.0, 0.1), (0.9, 0.0), (0.1, 0.9), (0.5, 0.5)):
        with pytest.raises(ValueError, match="log SNR must be finite and rise"):
            brownian(KEY, dj.rectified(), start, end)
