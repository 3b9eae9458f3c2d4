"""Likelihoods against exact answers: densities of mixtures, closed forms for Gaussians, probabilities of bins."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import diffusion_jax as dj
from diffusion_jax import likelihood as lk
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.forward import q_posterior, variance_bounds
from diffusion_jax.losses import discretized_log_likelihood, variational_term
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import AlphaSigma

SCHEDULES = {  # and a time for u = 1 down to 0, from no signal to no noise, nearly even in the angle
    "vp_linear": (dj.vp_linear(), lambda u: u**1.5),
    "cosine": (dj.cosine(), lambda u: u),
    "rectified": (dj.rectified(), lambda u: u),
    "edm": (dj.edm(), lambda u: np.tan(u * np.arctan(1000.0))),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def law(d, seed=0):
    """Two Gaussians of mean zero together, each with a basis of its own."""
    rng = np.random.default_rng(seed)
    weights, means = np.array([0.4, 0.6]), rng.standard_normal((2, d))
    means -= weights @ means
    basis = np.linalg.qr(rng.standard_normal((2, d, d)))[0]
    return Mixture(weights, means / np.sqrt(d), rng.uniform(0.1, 1.0, (2, d)), basis)


def exact(mixture, x, alpha=1.0, sigma=0.0):
    """log p of alpha x0 + sigma eps: f64[n], from the covariances."""
    m = mixtures.marginal(mixture, alpha, sigma)
    parts = zip(m.weights, m.means, mixtures.covariances(m), strict=True)
    x = np.asarray(x, np.float64)
    return special.logsumexp([np.log(w) + stats.multivariate_normal(a, c).logpdf(x) for w, a, c in parts], axis=0)


def grid(name, n, last=0.0):
    return jnp.asarray(SCHEDULES[name][1](np.linspace(1, last, n + 1)))


def cosine_times(l_t):
    """Where cosine(0) has the log SNR l_t."""
    return jnp.asarray(2 / np.pi * np.arctan(np.exp(-np.asarray(l_t) / 2)))


def hermite(n):
    """A product rule of Gauss and Hermite: E_eps without error in few dimensions."""

    def rule(key, x0):
        z, w = np.polynomial.hermite_e.hermegauss(n)
        d = x0[0].size
        nodes = np.array(list(itertools.product(z, repeat=d))).reshape(-1, 1, *x0.shape[1:])
        weights = np.prod(np.array(list(itertools.product(w / w.sum(), repeat=d))), axis=1)
        return jnp.asarray(np.broadcast_to(nodes, (len(nodes), *x0.shape)), x0.dtype), jnp.asarray(weights, x0.dtype)

    return rule


def single(eps):
    """One given draw."""
    return lambda key, x0: (eps[None], jnp.ones(1, eps.dtype))


def within(values, expected, errors=4.5):
    """The mean of independent values is the expected one within so many standard errors (p = 7e-6)."""
    values = np.asarray(values, np.float64)
    z = np.abs(values.mean(0) - expected) / (values.std(0, ddof=1) / np.sqrt(len(values)))
    assert np.all(z < errors), f"off by {np.max(z):.1f} standard errors of {len(values)}"


# --- the probability flow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_flow_has_the_density_of_the_mixture(name):
    """Float32, at clean data, where rates of a schedule may be infinite, and in between: nats, in 8 dimensions."""
    schedule, mixture = SCHEDULES[name][0], law(8)
    denoiser = mixtures.denoiser(mixture, schedule)
    run = jax.jit(lambda x, times: lk.ode_log_density(denoiser, schedule, x, times).log_density)
    for last in (0.0, 0.3):
        times = grid(name, 48, last).astype(jnp.float32)
        at = [float(c) for c in schedule(times[-1])]
        x = mixtures.draw(np.random.default_rng(1), mixtures.marginal(mixture, *at), 16).astype(np.float32)
        np.testing.assert_allclose(run(jnp.asarray(x), times), exact(mixture, x, *at), atol=4e-4)


def test_flow_ends_at_the_prior_and_knows_its_variance(x64):
    """A Gaussian is carried to x sqrt(V_T / V_s), eq. (4) of mixtures, and with its variance the prior is exact."""
    schedule, v = dj.ve(0.01, 2.0), 0.5
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(3), np.full(3, v)), schedule)
    times = jnp.linspace(1.0, 0.0, 41)
    out = jax.jit(lambda: lk.ode_log_density(denoiser, schedule, x, times, data_variance=v))()
    np.testing.assert_allclose(out.x, x * np.sqrt((v + 2.0**2) / (v + 0.01**2)), rtol=1e-7)
    np.testing.assert_allclose(out.log_density, stats.norm(0, np.sqrt(v + 0.01**2)).logpdf(x).sum(1), rtol=1e-7)
    assert out.steps.tolist() == [40] * 5


def test_flow_is_of_order_four(x64):
    schedule, mixture = dj.rectified(), law(2)
    x = jnp.asarray(mixtures.draw(np.random.default_rng(1), mixture, 32))
    denoiser = mixtures.denoiser(mixture, schedule)
    run = jax.jit(lambda times: lk.ode_log_density(denoiser, schedule, x, times).log_density)
    errors = [np.abs(run(grid("rectified", n)) - exact(mixture, x)).mean() for n in (64, 128)]
    print(f"errors {errors}")
    assert abs(np.log2(errors[0] / errors[1]) - 4) < 0.1


@pytest.mark.slow
def test_adaptive_flow_keeps_its_tolerance_and_its_examples_apart(x64):
    """Both errors fall with the tolerance, and an example takes its own steps whatever the others are."""
    schedule, mixture = dj.cosine(), law(3)
    x = jnp.asarray(mixtures.draw(np.random.default_rng(1), mixture, 4))
    cond, times, denoiser = jnp.arange(4.0), jnp.asarray([1.0, 0.0]), mixtures.denoiser(mixture, schedule)

    def shifted(x, t, cond):  # uses cond, without effect
        return jax.tree.map(lambda a: a + 0 * dj.bcast(cond, x), denoiser(x, t))

    @jax.jit
    def run(x, tolerance):
        return lk.ode_log_density(shifted, schedule, x, times, cond, tolerance=(tolerance, tolerance))

    outs = {tolerance: run(x, tolerance) for tolerance in (1e-4, 1e-8)}
    for tolerance, out in outs.items():
        np.testing.assert_allclose(out.log_density, exact(mixture, x), atol=20 * tolerance)
    assert np.all(outs[1e-8].steps > 2 * outs[1e-4].steps)
    others = run(x.at[0].multiply(50), 1e-4)
    assert others.steps[0] != outs[1e-4].steps[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), others, outs[1e-4])
    assert np.isnan(run(x, 1e-40).log_density).all()  # runs out of steps


def test_flow_of_any_denoiser_is_a_density(x64):
    """It is a change of variables: it integrates to 1 whatever the denoiser, if the divergence is that of the flow."""
    schedule = dj.vp_linear()
    x = np.linspace(-8, 8, 801)

    def denoiser(x, t, cond=None):
        return dj.from_x0(schedule, x, t, 0.8 * jnp.tanh(2 * x + dj.bcast(t, x)))

    times = grid("vp_linear", 128, 0.1)
    p = jnp.exp(
        jax.jit(lambda x: lk.ode_log_density(denoiser, schedule, x, times).log_density)(jnp.asarray(x)[:, None])
    )
    np.testing.assert_allclose(np.trapezoid(p, x), 1, atol=1e-6)


@pytest.mark.slow
def test_flow_depends_on_the_schedule_by_its_angles_alone(x64):
    x, mixture, values = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2))), law(2), []
    angle = np.linspace(np.pi / 2, 0, 13)
    straight = np.sin(angle) / (np.sin(angle) + np.cos(angle))
    for schedule, times in ((dj.rectified(), straight), (dj.cosine(0.0), angle * 2 / np.pi)):
        denoiser = mixtures.denoiser(mixture, schedule)
        run = jax.jit(lambda t, d=denoiser, s=schedule: lk.ode_log_density(d, s, x, t).log_density)
        values.append(run(jnp.asarray(times)))
    np.testing.assert_allclose(*values, rtol=1e-9)


@pytest.mark.parametrize(("kind", "m"), [("rademacher", 1), ("rademacher", 4), ("gaussian", 1)])
def test_hutchinson_is_unbiased_and_its_variance_falls_as_one_over_probes(kind, m, x64):
    """For N(0, C) the flow integrates u^T J u to u^T M u, M = -log(C) / 2: mean tr M, variance 2 |M|^2 / m, without
    the diagonal for signs. n = 4000 draws."""
    d, n, schedule = 4, 4000, dj.rectified()
    variances, basis = law(d).variances[:1], law(d).basis[:1]
    gaussian = Mixture(np.ones(1), np.zeros((1, d)), variances, basis)
    x, denoiser = mixtures.draw(np.random.default_rng(1), gaussian, 1), mixtures.denoiser(gaussian, schedule)
    many, times = jnp.asarray(np.repeat(x, n, axis=0)), grid("rectified", 32)

    @jax.jit
    def run(keys):
        probes = lk.hutchinson_probes(keys, many, m, kind)
        return lk.ode_log_density(denoiser, schedule, many, times, probes=probes).log_density

    values, truth = np.asarray(run(jax.random.split(jax.random.key(m), n))), exact(gaussian, x)
    square = (basis[0] @ np.diag(np.log(variances[0]) / 2) @ basis[0].T) ** 2
    square = square if kind == "gaussian" else square * (1 - np.eye(d))
    within(values, truth)
    within((values - truth) ** 2, 2 * square.sum() / m)


@pytest.mark.slow
def test_adaptive_flow_takes_the_probes_of_each_example(x64):
    schedule, mixture = dj.rectified(), law(3)
    x = jnp.asarray(mixtures.draw(np.random.default_rng(1), mixture, 3))
    probes, times = lk.hutchinson_probes(jax.random.key(0), x, 2, "gaussian"), grid("rectified", 128)

    @jax.jit
    def run(x):
        given = {"denoiser": mixtures.denoiser(mixture, schedule), "schedule": schedule, "x": x, "times": times}
        return [lk.ode_log_density(**given, probes=probes, tolerance=t).log_density for t in (None, (1e-9, 1e-9))]

    np.testing.assert_allclose(*run(x), atol=1e-6)


def test_signs_have_no_error_where_the_jacobian_is_diagonal():
    schedule, x = dj.rectified(), jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32)
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(5), np.linspace(0.1, 1, 5)), schedule)
    probes = lk.hutchinson_probes(jax.random.key(0), x, 1)
    run = jax.jit(lambda p: lk.ode_log_density(denoiser, schedule, x, dj.uniform(32), probes=p).log_density)
    np.testing.assert_allclose(run(probes), stats.norm(0, np.linspace(0.1, 1, 5) ** 0.5).logpdf(x).sum(1), rtol=1e-4)


@pytest.mark.slow
def test_every_likelihood_takes_every_shape():
    """Points, audio, images, video: as if flattened. Here each likelihood runs once, and chunks change nothing."""
    schedule, d = dj.rectified(), 6
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, d)), jnp.float32)
    key, times, rule = jax.random.key(0), dj.uniform(4, 1.0, 0.05), lk.unit_rule(3)
    eps = jax.random.normal(key, (2, d))

    def all_of(shape, chunk):
        y, mixture = jnp.reshape(x, shape), law(d)
        means, variances = (a.reshape(2, *shape[1:]) for a in mixture[1:3])
        denoiser = mixtures.denoiser(mixture._replace(means=means, variances=variances, basis=None), schedule)
        noise = single(jnp.reshape(eps, shape))
        return (
            lk.ode_log_density(denoiser, schedule, y, times, chunk=chunk).log_density,
            lk.vlb(key, denoiser, schedule, y, times, noise=noise),
            lk.immse_log_density(key, denoiser, schedule, y, times, rule=rule, noise=noise),
        )

    points, *others = jax.jit(lambda: [all_of((2, 6), 64), all_of((2, 3, 2), 4), all_of((2, 1, 3, 2, 1), 1)])()
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), other, points)


@pytest.mark.slow
def test_bfloat16_examples_keep_a_float32_likelihood():
    schedule, mixture = dj.cosine(), law(4)
    x = jnp.asarray(mixtures.draw(np.random.default_rng(1), mixture, 8), jnp.bfloat16)
    denoiser, key = mixtures.denoiser(mixture, schedule), jax.random.key(0)
    times, noise = dj.uniform(16, 0.99, 0.01), lk.frames(1)

    @jax.jit
    def run(x):
        return (
            lk.ode_log_density(denoiser, schedule, x, times).log_density,
            lk.immse_log_density(key, denoiser, schedule, x, times, rule=lk.unit_rule(16), noise=noise),
        )

    values = run(x)
    assert all(value.dtype == jnp.float32 for value in values)
    np.testing.assert_allclose(values[0], exact(mixture, x), atol=0.2)
    np.testing.assert_allclose(values[1], exact(mixture, x), atol=1.0)


@pytest.mark.slow
def test_one_trace_serves_all_values_and_keys_are_per_example():
    schedule, mixture, traces = dj.rectified(), law(3), []
    denoiser, keys = mixtures.denoiser(mixture, schedule), jax.random.split(jax.random.key(0), 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)

    @jax.jit
    def run(keys, x, times):
        traces.append(1)
        probes = lk.hutchinson_probes(keys, x, 2)
        return (
            lk.ode_log_density(denoiser, schedule, x, times, probes=probes).log_density,
            lk.vlb(keys, denoiser, schedule, x, times, noise=lk.antithetic(1)).total(),
            jnp.sum(lk.vdm_bound(keys, denoiser, schedule, x, times, draws=2), axis=0),
            lk.dequantised_bound(keys, lk.uniform_dequantiser(0.1), lambda y: jnp.sum(y, axis=1), x, 2)[0],
            lk.frames(1)(keys, x)[0][0, :, 0],
        )

    first = run(keys, x, dj.uniform(4, 1.0, 0.1))
    run(jax.random.split(jax.random.key(1), 4), 2 * x, dj.uniform(4, 0.9, 0.2))
    assert len(traces) == 1
    others = run(keys.at[2:].set(keys[0]), x.at[2:].multiply(3), dj.uniform(4, 1.0, 0.1))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b[:2]), others, first)
    assert all(np.all(a[2:] != b[2:]) for a, b in zip(others, first, strict=True))


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 4])
def test_frames_have_the_moments_of_the_normal_law(d, x64):
    """Exactly: mean, covariance, odd moments, |eps|^4 and |eps|^6. Directions: Kolmogorov-Smirnov, n = 2000."""
    x0 = jnp.zeros((2000, d))
    eps, weight = (np.asarray(a) for a in jax.jit(lk.frames(2))(jax.random.key(0), x0))
    assert eps.shape == (8 * d, 2000, d)
    mean = functools.partial(np.einsum, "m,m...->...", weight)
    np.testing.assert_allclose(weight.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(mean(eps), 0, atol=1e-12)
    identity = np.broadcast_to(np.eye(d), (2000, d, d))
    np.testing.assert_allclose(mean(eps[..., None] * eps[..., None, :]), identity, atol=1e-12)
    np.testing.assert_allclose(mean(eps**3), 0, atol=1e-12)
    square = (eps**2).sum(-1)
    np.testing.assert_allclose(mean(square**2), d * (d + 2), rtol=1e-12)
    np.testing.assert_allclose(mean(square**3), d * (d + 2) * (d + 4), rtol=1e-12)
    if d == 1:
        np.testing.assert_allclose(mean(eps**4), 3, rtol=1e-12)
    else:  # every vector is uniform on the sphere
        unit = (eps / np.sqrt(square)[..., None])[: 2 * d].reshape(2 * d, -1, d)
        p = [stats.kstest(unit[k, :, j] ** 2, stats.beta(0.5, (d - 1) / 2).cdf).pvalue for k, j in np.ndindex(2 * d, d)]
        assert min(p) * len(p) > 0.01


def test_antithetic_noise_is_normal_and_odd():
    eps, weight = jax.jit(lk.antithetic(3))(jax.random.key(0), jnp.zeros((5000, 2)))
    np.testing.assert_allclose(jnp.tensordot(weight, eps**3, 1), 0, atol=1e-5)
    assert float(weight.sum()) == pytest.approx(1)
    assert stats.kstest(np.asarray(eps[:3]).ravel(), "norm").pvalue > 0.01


# --- bounds -----------------------------------------------------------------------------------------------------------


def gaussian_error(l_t, x, v):
    """|eps_hat - eps|^2 of N(0, v), in expectation over eps: f64[b], from x_t = a x + s eps, eps_hat = s x_t / V."""
    snr = np.exp(l_t)
    keep = 1 / (1 + snr * v)
    return ((snr * v * keep) ** 2 + snr * (keep * x) ** 2).sum(1)


def gaussian_bound(l_T, l_0, x, v):
    """Eq. (4) with (6) and the Gaussian decoder, for data N(0, v): f64[b]."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    levels = (l_0 - l_T) / 2 * nodes + (l_0 + l_T) / 2
    integral = (l_0 - l_T) / 4 * sum(w * gaussian_error(value, x, v) for w, value in zip(weights, levels, strict=True))
    end = 0.5 * gaussian_error(l_0, x, v) + 0.5 * x.shape[1] * (np.log(2 * np.pi) - l_0)
    return 0.5 * np.exp(l_T) * (x**2).sum(1) + integral + end


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp_linear", "edm"])
def test_terms_of_gaussian_data_are_the_closed_form(name, x64):
    """Eq. (5): (SNR_s / SNR_t - 1) / 2 E|eps_hat - eps|^2; with random frames, which have no error here."""
    schedule, v = SCHEDULES[name][0], np.array([0.2, 0.7, 1.5])
    x = np.random.default_rng(0).standard_normal((4, 3))
    denoiser, times = mixtures.denoiser(mixtures.gaussian(np.zeros(3), v), schedule), jnp.linspace(0.95, 0.05, 7)
    terms = jax.jit(lambda x: lk.vlb(jax.random.key(0), denoiser, schedule, x, times, noise=lk.frames(1)))(
        jnp.asarray(x)
    )
    l_t = np.asarray(logsnr(schedule, times))
    for i in range(6):
        expected = 0.5 * np.expm1(l_t[i + 1] - l_t[i]) * gaussian_error(l_t[i], x, v)
        np.testing.assert_allclose(terms.diffusion[i], expected, rtol=1e-9)
    np.testing.assert_allclose(terms.prior, 0.5 * np.exp(l_t[0]) * (x**2).sum(1), rtol=1e-9)
    end = 0.5 * gaussian_error(l_t[-1], x, v) + 1.5 * (np.log(2 * np.pi) - l_t[-1])
    np.testing.assert_allclose(terms.reconstruction, end, rtol=1e-9)


@pytest.mark.slow
def test_a_term_is_the_divergence_of_two_gaussians(x64):
    """For any denoiser and one eps, from q_posterior and variance_bounds; and it is that of `variational_term`."""
    schedule, table = dj.vp_linear(), 20
    rng = np.random.default_rng(0)
    x0, eps, fraction = rng.integers(0, 256, (3, 2)) / 127.5 - 1, rng.standard_normal((3, 2)), rng.uniform(0, 1, (3, 2))

    def denoiser(x, t, cond=None):
        return dj.from_x0(schedule, x, t, jnp.sin(3 * x))._replace(variance_fraction=jnp.asarray(fraction))

    times, noise = jnp.asarray([12, 11, 7]) / table, single(jnp.asarray(eps))
    got = jax.jit(
        lambda: lk.vlb(jax.random.key(0), denoiser, schedule, jnp.asarray(x0), times, noise=noise)
    )().diffusion
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        x_t = dj.q_sample(schedule, jnp.asarray(x0), t, jnp.asarray(eps))
        prediction = denoiser(x_t, t)
        mean, variance = q_posterior(schedule, x_t, jnp.asarray(x0), t, s)
        guess = q_posterior(schedule, x_t, prediction.x0, t, s)[0]
        low, high = variance_bounds(schedule, t, s)
        p = np.exp(fraction * float(high) + (1 - fraction) * float(low))
        kl = 0.5 * (np.log(p / float(variance)) + (float(variance) + (mean - guess) ** 2) / p - 1)
        np.testing.assert_allclose(got[i], kl.sum(1), rtol=1e-9)
        if i == 0:
            bits = variational_term(prediction, schedule, jnp.asarray(x0), x_t, jnp.full(3, t), table=table)
            np.testing.assert_allclose(got[i], bits * 2 * np.log(2), rtol=1e-9)


def test_bound_is_above_and_its_gap_is_of_first_order(x64):
    """A mixture in two dimensions, expectations by quadrature, 20 points; without the decoder's gap of about 1e-6."""
    schedule, mixture = dj.cosine(0.0), law(2)
    x = mixtures.draw(np.random.default_rng(1), mixture, 20)
    denoiser, key = mixtures.denoiser(mixture, schedule), jax.random.key(0)

    def gap(n):
        times = cosine_times(np.linspace(-9, 9, n + 1))
        bound = jax.jit(lambda x: lk.vlb(key, denoiser, schedule, x, times, noise=hermite(16)).total())(jnp.asarray(x))
        return np.asarray(bound + exact(mixture, x))

    coarse, fine = gap(150), gap(300)
    print(f"gaps {coarse.mean()} and {fine.mean()}")
    assert np.all(coarse > fine) and np.all(fine > 0)
    assert abs(np.log2(coarse.mean() / fine.mean()) - 1) < 0.1
    assert np.all(np.abs(2 * fine - coarse) < 0.05 * coarse)  # and so tends to 0


def test_bound_has_no_gap_with_the_true_reverse_variance(x64):
    """For Gaussian data q(x_s | x_t) is Gaussian: with its variance the bound is -log p in 5 steps, of any length.

    For each point, from no signal to sigma / alpha = 1e-3, where the decoder's own gap is below 1e-10.
    """
    schedule, v, n = dj.cosine(0.0), np.array([0.3, 2.0]), 5
    end = float(cosine_times(2 * np.log(1e3)))
    times, step = jnp.linspace(1.0, end, n + 1), (1.0 - end) / n
    gaussian = mixtures.gaussian(np.zeros(2), v)
    denoiser = mixtures.denoiser(gaussian, schedule, next_time=lambda t: jnp.maximum(t - step, end))
    x = mixtures.draw(np.random.default_rng(1), gaussian, 5)

    @jax.jit
    def run(x):
        return lk.vlb(jax.random.key(0), denoiser, schedule, x, times, noise=lk.frames(1)).total()

    np.testing.assert_allclose(run(jnp.asarray(x)), -stats.norm(0, np.sqrt(v)).logpdf(x).sum(1), rtol=1e-9)


def digital():
    """Data on four of the 256 values, as Gaussians without width: probabilities and levels."""
    return np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 100, 130, 255]) / 127.5 - 1


@pytest.mark.slow
def test_bound_of_8_bit_data_tends_to_its_probability(x64):
    """With the discretised decoder the bound is on -log P, and its gap halves with the steps."""
    schedule, (p, levels) = dj.cosine(0.0), digital()
    mixture = Mixture(p, levels[:, None], np.zeros((4, 1)))
    x, denoiser = jnp.asarray(levels)[:, None], mixtures.denoiser(mixture, schedule)
    gaps = []
    for n in (200, 400):
        times = cosine_times(np.linspace(-14, 14, n + 1))
        given = {"noise": hermite(60), "decoder": discretized_log_likelihood}
        terms = jax.jit(lambda x, times=times, g=given: lk.vlb(jax.random.key(0), denoiser, schedule, x, times, **g))(x)
        np.testing.assert_allclose(terms.reconstruction, 0, atol=1e-3)
        gaps.append(p @ np.asarray(terms.total()) - stats.entropy(p))
    print(f"gaps {gaps} of {stats.entropy(p):.3f}")
    assert 0 < gaps[1] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1)


# --- continuous time --------------------------------------------------------------------------------------------------


def curved(eta, low=-6.0, high=7.0):
    """Variance preserving, log SNR from `high` at t = 0 to `low` at t = 1, bent by eta."""

    def schedule(t):
        value = high + (low - high) * (t + eta * t * (1 - t))
        return AlphaSigma(jnp.sqrt(jax.nn.sigmoid(value)), jnp.sqrt(jax.nn.sigmoid(-value)))

    return schedule


@jax.jit
def vdm_moments(eta):
    """Mean of the loss and of its square over t, eps and two points of a mixture, by quadrature."""
    schedule, x0 = curved(eta), jnp.asarray([[0.3], [-1.2]])
    mixture = Mixture(np.array([0.3, 0.7]), np.array([[1.0], [-0.5]]), np.array([[0.1], [0.05]]))
    (t, w_t), (eps, w_eps) = lk.unit_rule(80), hermite(40)(None, x0)

    def loss(t, eps):
        denoiser = mixtures.denoiser(mixture, schedule)
        return lk.vdm_loss(denoiser, schedule, x0, jnp.full(2, t), eps)

    values = jnp.mean(jax.vmap(lambda t: jax.vmap(lambda e: loss(t, e))(eps))(t), axis=-1)
    return w_t @ values @ w_eps, w_t @ values**2 @ w_eps


@pytest.mark.slow
def test_continuous_bound_does_not_depend_on_the_schedule_and_trains_its_variance(x64):
    """Between equal ends: the same value, no gradient; but one of the variance, and a step along it lowers it."""
    means, squares = zip(*(vdm_moments(jnp.asarray(eta)) for eta in (-0.8, 0.0, 0.5)), strict=True)
    np.testing.assert_allclose(means, means[0], rtol=1e-7)
    assert np.ptp(squares) > 0.1
    gradients = jax.jacfwd(vdm_moments)(jnp.asarray(0.5))
    assert abs(gradients[0]) < 1e-6 * abs(gradients[1])
    assert vdm_moments(0.5 - 0.1 * jnp.sign(gradients[1]))[1] < squares[2]


def test_reverse_gradient_reaches_a_learned_schedule():
    x0, eps, t = (jnp.asarray(np.random.default_rng(i).uniform(0.1, 0.9, (4, 2)), jnp.float32) for i in range(3))
    mixture = law(2)

    @jax.jit
    @jax.grad
    def gradient(eta):
        denoiser = mixtures.denoiser(mixture, curved(eta))
        return jnp.mean(lk.vdm_loss(denoiser, curved(eta), x0, t[:, 0], eps) ** 2)

    assert np.isfinite(gradient(0.1)) and gradient(0.1) != 0


def test_draws_of_the_continuous_bound_are_unbiased():
    """Gaussian data, in closed form; n = 20000 draws for each of three points."""
    schedule, v, ends = curved(0.0), np.array([0.3]), jnp.asarray([1.0, 0.0])
    denoiser, x = mixtures.denoiser(mixtures.gaussian(np.zeros(1), v), schedule), np.array([[0.2], [-0.9], [0.6]])
    x32 = jnp.asarray(x, jnp.float32)
    draws = jax.jit(lambda x: lk.vdm_bound(jax.random.key(1), denoiser, schedule, x, ends, draws=20_000))(x32)
    within(draws, gaussian_bound(*(float(logsnr(schedule, t)) for t in ends), x, v))


# --- I-MMSE -----------------------------------------------------------------------------------------------------------


def test_immse_is_exact_point_by_point_and_second_order_in_its_ends(x64):
    schedule, mixture = dj.edm(), law(2)
    x = mixtures.draw(np.random.default_rng(1), mixture, 8)
    denoiser, key = mixtures.denoiser(mixture, schedule), jax.random.key(0)

    @jax.jit
    def run(x, times):
        return lk.immse_log_density(key, denoiser, schedule, x, times, rule=lk.unit_rule(60), noise=hermite(24))

    errors = {}
    for small in (0.1, 0.05, 0.025):
        got = run(jnp.asarray(x), jnp.asarray([1 / small, small]))
        errors[small] = np.abs(got - exact(mixture, x)).mean()
    print(f"errors {errors}")
    assert errors[0.025] < 1e-4
    assert np.log2(errors[0.05] / errors[0.025]) == pytest.approx(4, abs=0.3)  # of second order in sigma^2


@pytest.mark.slow
def test_importance_sampled_immse_is_unbiased(x64):
    """Over n = 400 stratified draws of 4 levels, against (6) and (4) in closed form; frames have no error here."""
    schedule, v = dj.vp_linear(), np.array([0.2, 0.7])
    x, times = np.array([[0.3, -0.5], [1.0, 0.2]]), jnp.asarray([1.0, 0.02])
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(2), v), schedule)

    def run(key):
        rule, noise = lk.unit_rule(4, key), lk.frames(1)
        return lk.immse_log_density(key, denoiser, schedule, jnp.asarray(x), times, rule=rule, noise=noise)

    values = jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(1), 400))
    within(-values, gaussian_bound(*np.asarray(logsnr(schedule, times)), x, v))


def test_a_wrong_denoiser_can_only_lower_it(x64):
    schedule, mixture = dj.vp_linear(), law(2)
    x = jnp.asarray(mixtures.draw(np.random.default_rng(1), mixture, 64))
    wrong, times = mixtures.denoiser(mixture._replace(means=0.7 * mixture.means), schedule), jnp.asarray([1.0, 0.01])
    run = jax.jit(
        lambda x: lk.immse_log_density(
            jax.random.key(0), wrong, schedule, x, times, rule=lk.unit_rule(40), noise=hermite(16)
        )
    )
    assert np.mean(run(x)) < np.mean(exact(mixture, x)) - 1e-3


# --- bits per dimension -----------------------------------------------------------------------------------------------


def test_bits_of_uniform_8_bit_data_are_eight():
    """A density that is constant on the 256 bins: 8 bits, log2(127.5) of which are the offset of [-1, 1]."""
    log_p = jnp.full(10, -3 * np.log(256 * lk.EIGHT_BIT))
    bits = lk.bits_per_dim(log_p, 3, lk.EIGHT_BIT)
    np.testing.assert_allclose(bits, [8, 0, 0], atol=1e-6)
    np.testing.assert_allclose(lk.bits_per_dim(jnp.log(jnp.asarray([0.25, 0.25])), 2, 1.0)[0], 1, rtol=1e-6)


def test_error_bars_are_the_spread_of_repeated_experiments():
    """Bits of b = 30 examples with r = 5 draws: the errors predict how means scatter, over 4000 repetitions, to 5 %."""
    d, rng = 4, np.random.default_rng(0)
    draws = 0.8 * rng.standard_normal((4000, 5, 30))
    value = np.log(2) * d * (2 * rng.standard_normal((4000, 1, 30)) + draws)
    out = jax.jit(jax.vmap(lambda a: lk.bits_per_dim(a, d, 1.0)))(jnp.asarray(value, jnp.float32))
    rms = [np.sqrt(np.mean(np.square(a))) for a in out[1:]]
    np.testing.assert_allclose(rms[0], np.std(out.value), rtol=0.05)
    np.testing.assert_allclose(rms[1], np.std(draws.mean((1, 2))), rtol=0.05)


@pytest.mark.slow
def test_dequantisation_bounds_the_probability_of_a_bin(x64):
    """A mixture on the line in bins of width 1/2. Uniform: the gap is KL(q || p(y | x)); exact: no draw has one."""
    w, mean, std, width = np.array([0.4, 0.6]), np.array([-0.5, 0.8]), np.array([0.2, 0.4]), 0.5
    x = np.arange(-4, 5)[:, None] * width

    def cdf(y):
        return special.ndtr((y[..., None] - mean) / std) @ w

    def log_p(y):
        z = (y - jnp.asarray(mean)[None]) / jnp.asarray(std)[None]
        return jax.nn.logsumexp(-0.5 * z**2 - np.log(std * np.sqrt(2 * np.pi))[None] + np.log(w)[None], axis=1)

    mass = np.log(cdf(x + width / 2) - cdf(x - width / 2))[:, 0]
    u, weights = np.polynomial.legendre.leggauss(40)
    gap = mass - np.array([weights @ log_p(a + width / 2 * u[:, None]) / 2 for a in x]) - np.log(width)

    def exact_dequantiser(key, x):  # by inversion, on a fine table of each bin
        fine = jnp.asarray(np.linspace(-width / 2, width / 2, 2001))[None] + x
        table = jax.vmap(lambda y: jnp.exp(log_p(y[:, None])))(fine)
        total = jnp.concatenate([0 * table[:, :1], jnp.cumsum(table[:, 1:] + table[:, :-1], axis=1)], axis=1)
        level = jax.random.uniform(key, (len(x),)) * total[:, -1]
        y = jax.vmap(jnp.interp)(level, total, fine)[:, None]
        return y, log_p(y) - jnp.asarray(mass)

    def draws(dequantiser, n):
        return jax.jit(lambda k: lk.dequantised_bound(k, dequantiser, log_p, jnp.asarray(x), n))(jax.random.key(0))

    assert np.all(gap > 0) and gap.max() > 0.5
    within(draws(lk.uniform_dequantiser(width), 20_000), mass - gap)
    learned = draws(exact_dequantiser, 50)
    np.testing.assert_allclose(learned, np.broadcast_to(mass, learned.shape), atol=1e-12)
    bits = lk.bits_per_dim(learned, 1, 1.0)
    np.testing.assert_allclose(bits.value, -mass.mean() / np.log(2), rtol=1e-9)


# --- all together, and bad input --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_flow_and_immse_agree():
    """The triangle in 8 dimensions, float32; in 64 it is `conformance.likelihood`."""
    schedule, mixture = dj.vp_linear(), law(8)
    x = mixtures.draw(np.random.default_rng(1), mixture, 4).astype(np.float32)
    denoiser = mixtures.denoiser(mixture, schedule)
    end = float(inverse_logsnr(schedule, jnp.asarray(8.0), 0.0, 1.0))
    flow = jax.jit(lambda x: lk.ode_log_density(denoiser, schedule, x, grid("vp_linear", 32)).log_density)
    times, noise = jnp.asarray([1.0, end]), lk.frames(64)
    immse = jax.jit(
        lambda k, x: lk.immse_log_density(k, denoiser, schedule, x, times, rule=lk.unit_rule(16), noise=noise)
    )
    truth, x = exact(mixture, x) / 8, jnp.asarray(x)
    np.testing.assert_allclose(flow(x) / 8, truth, atol=1e-4)
    integrals = np.stack([immse(jax.random.key(i), x) for i in range(6)]) / 8
    print(f"standard error {integrals.std(0, ddof=1) / np.sqrt(6)}")
    np.testing.assert_allclose(integrals.mean(0), truth, atol=3e-4)


X = jnp.ones((2, 3))
UP, DOWN = jnp.asarray([0.1, 1.0]), jnp.asarray([1.0, 0.1])
DENOISER = mixtures.denoiser(law(3), dj.rectified())
BAD = {
    "rising grid": (lambda: lk.ode_log_density(DENOISER, dj.rectified(), X, UP), r"ode_log_density.*\(2,\).*decrease"),
    "no grid": (lambda: lk.ode_log_density(DENOISER, dj.rectified(), X, DOWN[:1]), r"times must be.*\(1,\)"),
    "probes": (
        lambda: lk.ode_log_density(DENOISER, dj.rectified(), X, DOWN, probes=jnp.ones((4, 3, 3))),
        r"probes of shape \(4, 3, 3\) for x of shape \(2, 3\)",
    ),
    "kind": (lambda: lk.hutchinson_probes(jax.random.key(0), X, 1, "uniform"), "'uniform'"),
    "keys": (lambda: lk.hutchinson_probes(jax.random.split(jax.random.key(0), 5), X, 1), "5 keys for a batch of 2"),
    "rising bound": (
        lambda: lk.vlb(jax.random.key(0), DENOISER, dj.rectified(), X, UP, noise=lk.frames(1)),
        "vlb: times",
    ),
    "no noise": (
        lambda: lk.vlb(jax.random.key(0), DENOISER, dj.rectified(), X, DOWN.at[1].set(0), noise=lk.frames(1)),
        "sigma > 0",
    ),
    "rank": (lambda: lk.bits_per_dim(jnp.ones((1, 1, 1)), 3, 1.0), r"\(1, 1, 1\)"),
    "width": (lambda: lk.bits_per_dim(jnp.ones(1), 3, 0.0), "width > 0"),
    "bits": (lambda: discretized_log_likelihood(0.4 / 127.5 * X, X, X), r"\(2, 3\) has values that 8 bits do not"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
