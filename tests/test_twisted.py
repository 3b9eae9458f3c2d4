"""Twisted sequential Monte Carlo: unbiased evidence, convergence, the posterior of a 64-dimensional mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
from conformance import posterior as conformance
from diffusion_jax import inverse, operators
from diffusion_jax.evaluation import mixtures

KEY = jax.random.key(3)


def seen(x, widened=0.0):
    """log of the likelihood of y = sin(2 x) + 0.6 n = 0.8: not linear, and of many modes."""
    return -0.5 * (0.8 - jnp.sum(jnp.sin(2 * x), axis=1)) ** 2 / (0.6**2 + widened)


def unit_normal(n, runs, threshold=0.5):
    """Twisted SMC for x0 ~ N(0, 1) on vp_linear, where `ddpm` with its large variance has the exact law in any steps.

    The twist is the likelihood of x0^ with its width grown by guess.
    """
    schedule, law = dj.vp_linear(), mixtures.gaussian(np.zeros(1), np.ones(1))
    times = jnp.linspace(1.0, 0.0, 13) ** 2

    def twist(x0, t):
        return seen(x0, 2 * schedule(t).sigma ** 2)

    def run(key, threshold):
        x = jax.random.normal(jax.random.fold_in(key, 0), (n, 1))
        key, denoiser = jax.random.fold_in(key, 1), mixtures.denoiser(law, schedule)
        return inverse.twisted_smc(key, denoiser, schedule, twist, x, times, threshold=threshold)

    go = jax.jit(jax.vmap(run, in_axes=(0, None)))
    return lambda threshold: go(jax.random.split(KEY, runs), threshold)


@functools.cache
def quadrature():
    """E[x | y], E[x^2 | y] and log p(y) in one dimension, x ~ N(0, 1)."""
    x = np.linspace(-8, 8, 4001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * np.exp(np.asarray(seen(jnp.asarray(x[:, None], jnp.float32))))
    total = np.sum(density)
    return np.sum(x * density) / total, np.sum(x**2 * density) / total, np.log(total * (x[1] - x[0]))


@pytest.mark.slow
def test_evidence_is_unbiased():
    """E[Z] = p(y) for 16 particles, resampled at times, always, and never; 2000 runs, 4 standard errors."""
    run = unit_normal(16, 2000)
    for threshold in (0.5, 1.1, 0.0):
        z = np.exp(np.asarray(run(threshold).log_evidence, np.float64) - quadrature()[2])
        error = z.std() / np.sqrt(len(z))
        print(f"threshold {threshold}: {z.mean():.4f} +- {error:.4f}")
        assert abs(z.mean() - 1) < 4 * error < 0.02


@pytest.mark.slow
def test_particles_converge():
    """Errors of E[x | y], E[x^2 | y] and log p(y) fall like 1 / sqrt(n): by 4 for 16 times as many, within noise."""
    rms = []
    for n in (64, 1024):
        p = unit_normal(n, 300)(0.5)
        w, x = np.exp(np.asarray(p.log_weights)), np.asarray(p.x)[..., 0]
        estimates = np.stack([(w * x).sum(1), (w * x**2).sum(1), np.asarray(p.log_evidence)], axis=1)
        rms.append(np.sqrt(np.mean((estimates - quadrature()) ** 2, axis=0)))
        np.testing.assert_allclose(w.sum(1), 1, rtol=1e-4)
        assert p.ess.shape == (300, 13) and np.all((p.ess > 0.99) & (p.ess < n * 1.001))
    print("rms errors", *rms)
    assert np.all(rms[0] / rms[1] > 3) and np.all(rms[1] < 0.1)


def test_the_small_variance_and_an_end_above_zero():
    """The target is the law of `ddpm` on the grid: small variance for a point; sigma > 0 at the end asks for x0^."""
    schedule = dj.vp_linear()
    law = mixtures.gaussian(np.full(2, 0.7), np.zeros(2))
    twist = inverse.gaussian_twist(schedule, operators.identity(), jnp.ones((1, 2)), 0.5)

    def run(times):
        x = jax.random.normal(KEY, (50, 2))
        return inverse.twisted_smc(KEY, mixtures.denoiser(law, schedule), schedule, twist, x, times, variance="small")

    small, early = jax.jit(lambda: [run(jnp.linspace(1.0, end, 9)) for end in (0.0, 1e-4)])()
    want = -np.log(2 * np.pi * 0.25) - 0.5 * 2 * (0.3 / 0.5) ** 2  # N(1; 0.7, 0.25) twice
    np.testing.assert_allclose(small.x, 0.7, atol=1e-5)
    np.testing.assert_allclose(small.log_evidence, want, rtol=1e-4)
    np.testing.assert_allclose(early.log_evidence, want, rtol=2e-3)  # its twist is still a little wide


def test_without_a_likelihood_the_particles_are_ddpm():
    schedule = dj.vp_linear()
    law, times = mixtures.denoiser(mixtures.gaussian(np.ones(4), np.full(4, 0.3)), schedule), jnp.linspace(1.0, 0.0, 9)
    x = jax.random.normal(KEY, (30, 4))
    large = dj.ddpm(schedule, "large")
    same_keys = dj.Sampler(large.init, lambda key, *rest: large.step(jax.random.fold_in(key, 1), *rest))

    @jax.jit
    def compute(x):
        particles = inverse.twisted_smc(KEY, law, schedule, lambda x0, t: jnp.zeros_like(t), x, times)
        return particles, dj.sample(KEY, same_keys, law, x, times[:-1])

    particles, want = compute(x)
    np.testing.assert_allclose(particles.ess, 30, rtol=1e-5)
    np.testing.assert_allclose(particles.log_weights, -np.log(30), rtol=1e-5)
    np.testing.assert_allclose(particles.log_evidence, 0, atol=1e-5)
    noise = np.asarray(particles.x) - np.asarray(jax.jit(lambda x: law(x, jnp.full(30, 0.125)).x0)(want))
    sigma = float(schedule(jnp.float32(0.125)).sigma)
    assert np.std(noise) == pytest.approx(sigma, rel=4 / np.sqrt(2 * noise.size))  # the last step's, large variance


@pytest.mark.parametrize("name", ["mask", "bicubic", "nonlinear"])
def test_gaussian_twist(name):
    """At sigma = 0 the likelihood of y; before, for isotropic data and linear A, log p(y | x_t) up to a function of t.

    An operator without a spectrum, linear as it is, gets another covariance.
    """
    schedule, d, t, v = dj.vp_linear(), 12, 0.5, 0.4
    known, bicubic = np.arange(d) % 3 != 1, operators.bicubic(2, axes=1)
    operator = {"mask": operators.masking(known), "bicubic": bicubic}.get(name, operators.latent(bicubic, lambda z: z))
    denoiser = mixtures.denoiser(mixtures.gaussian(np.linspace(-1, 1, d), np.full(d, v)), schedule)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a = np.asarray(jax.jit(operator.apply)(jnp.eye(d))).T
        observed = np.any(a != 0, axis=1)
        x0, x, y = (jnp.asarray(rng.standard_normal(shape)) for shape in ((5, d), (5, d), (1, len(a))))
        y, m = jnp.where(observed, y, 0), int(observed.sum())

        @jax.jit
        def compute(x0, x, y):
            twist = inverse.gaussian_twist(schedule, operator, y, 0.3, variance=v, measurements=m)
            p = denoiser(x, jnp.full(5, t), None)
            return twist(x0, jnp.zeros(5)), twist(p.x0, jnp.full(5, t)), p.x0, schedule(jnp.asarray(t))

        clean, warm, mean, (alpha, sigma) = jax.tree.map(np.asarray, compute(x0, x, y))
    r = np.asarray(y) - np.asarray(x0) @ a.T
    np.testing.assert_allclose(clean, -0.5 * (r**2).sum(1) / 0.09 - 0.5 * m * np.log(2 * np.pi * 0.09), rtol=1e-8)
    spread = np.full(d, v * sigma**2 / (alpha**2 * v + sigma**2))
    exact = [conformance.exact_posterior(mixtures.gaussian(x0, spread), a, np.asarray(y)[0], 0.3)[1] for x0 in mean]
    assert (np.ptp(warm - exact) < 1e-8) == (name != "nonlinear")


def test_systematic_resampling():
    """Counts are n w rounded down or up, and n w on average; a weight of 0 is never drawn."""
    rng = np.random.default_rng(0)
    w = rng.exponential(size=200)
    w[::7] = 0
    w /= w.sum()
    draw = jax.jit(jax.vmap(lambda key: inverse.systematic_resampling(key, jnp.log(jnp.asarray(w, jnp.float32)))))
    picks = np.asarray(draw(jax.random.split(KEY, 4000)))
    counts = np.stack([np.bincount(p, minlength=200) for p in picks])
    assert np.all(np.abs(counts - 200 * w) < 1 + 1e-3)
    assert np.all(counts[:, ::7] == 0)
    share = 200 * w % 1
    error = np.abs(counts.mean(0) - 200 * w) / np.sqrt(np.maximum(share * (1 - share), 1e-3) / 4000)
    assert error.max() < 4.5


@pytest.mark.slow
def test_particles_reach_the_sampling_floor():
    """In 64 dimensions: at most 1.2 times the distance of exact samples from exact samples; coverage, mean and std too.

    Pi-GDM, on the same problem, does not: it takes the covariance for isotropic.
    """
    smc, pigdm = conformance.measure([("mask", "twisted_smc"), ("mask", "pigdm")])
    for row in (smc, pigdm):
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    assert smc["ratio"] < 1.2 and abs(smc["coverage"] - 0.9) < 0.01
    assert smc["mean_error"] < 0.06 and abs(smc["std_error"]) < 0.02
    assert pigdm["ratio"] > 2
    assert smc["evaluations"] == pigdm["evaluations"] == conformance.STEPS


def test_bad_input():
    schedule, x, phase = dj.vp_linear(), jnp.ones((2, 12)), operators.phase_retrieval()
    law = mixtures.denoiser(mixtures.gaussian(np.zeros(12), np.ones(12)), schedule)
    smc = functools.partial(inverse.twisted_smc, denoiser=law, schedule=schedule)
    zero, times = lambda x0, t: jnp.zeros_like(t), jnp.asarray([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"at least 2 particles, got x of shape \(1, 12\)"):
        smc(KEY, twist=zero, x=x[:1], times=times)
    with pytest.raises(ValueError, match="one key for all particles"):
        smc(jax.random.split(KEY, 2), twist=zero, x=x, times=times)
    with pytest.raises(ValueError, match=r"the twist returned shape \(\)"):
        smc(KEY, twist=lambda x0, t: jnp.zeros(()), x=x, times=times)
    with pytest.raises(ValueError, match=r"times must be f32\[n \+ 1\]"):
        smc(KEY, twist=zero, x=x, times=jnp.ones(()))
    with pytest.raises(ValueError, match="gaussian_twist: y has shape"):
        smc(KEY, twist=inverse.gaussian_twist(schedule, phase, x, 0.1), x=x, times=times)
    with pytest.raises(ValueError, match="'small' or 'large', got 'medium'"):
        smc(KEY, twist=zero, x=x, times=times, variance="medium")
    with pytest.raises(ValueError, match="sigma_y must be positive, got 0.0"):
        inverse.gaussian_twist(schedule, phase, x, 0.0)
