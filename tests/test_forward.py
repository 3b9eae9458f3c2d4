"""The forward process against Gaussian conditioning done independently, and the oracles against quadrature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures

PAIRS = ((0.98, 0.97), (0.9, 0.5), (0.5, 0.02), (0.3, 0.29))
NAMES = tuple(CASES)


def times(case):
    """Pairs (t, s), scaled to the interval of the schedule."""
    return np.asarray(PAIRS).T * (40.0 if case.start > 1 else 1.0)


@functools.cache
def facts(name):
    case = CASES[name]

    @jax.jit
    def compute(t, s, x_t, x0):
        return {
            "t": case.schedule(t),
            "s": case.schedule(s),
            "transition": dj.transition(case.schedule, t, s),
            "posterior": dj.q_posterior(case.schedule, x_t, x0, t, s),
            "bounds": dj.variance_bounds(case.schedule, t, s),
        }

    with jax.enable_x64(True):
        x_t, x0 = (jax.random.normal(jax.random.key(i), (len(PAIRS), 3)) for i in range(2))
        return jax.tree.map(np.asarray, (x_t, x0, compute(*map(jnp.asarray, times(case)), x_t, x0)))


def condition(mean, covariance, value):
    """Mean and variance of u given w, for (u, w) ~ N(mean, covariance)."""
    gain = covariance[0, 1] / covariance[1, 1]
    return mean[0] + gain * (value - mean[1]), covariance[0, 0] - gain * covariance[0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_bayes_rule(name):
    """(x_s, x_t) given x0 is jointly Gaussian: x_s = a_s x0 + s_s e, x_t = a_ts x_s + sqrt(var_ts) e'."""
    x_t, x0, f = facts(name)
    mean, variance = f["posterior"]
    for i, (a_t, s_t, a_s, s_s) in enumerate(zip(*f["t"], *f["s"], strict=True)):
        covariance = np.array([[s_s**2, a_t / a_s * s_s**2], [a_t / a_s * s_s**2, s_t**2]])
        for j in range(3):
            m, v = condition((a_s * x0[i, j], a_t * x0[i, j]), covariance, x_t[i, j])
            assert mean[i, j] == pytest.approx(m, rel=1e-7, abs=1e-9)
            assert variance[i] == pytest.approx(v, rel=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_transition_composes_to_the_marginal(name):
    """a_ts a_s = a_t and a_ts^2 s_s^2 + var_ts = s_t^2: going by way of s has the law of going at once."""
    _, _, f = facts(name)
    a_ts, var_ts = f["transition"]
    np.testing.assert_allclose(a_ts * f["s"].alpha, f["t"].alpha, rtol=1e-12)
    np.testing.assert_allclose(a_ts**2 * f["s"].sigma ** 2 + var_ts, f["t"].sigma ** 2, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_variance_bounds(name):
    """The posterior's variance, right for a point; var_ts, right for standard normal data if variance is preserved."""
    _, _, f = facts(name)
    lower, upper = f["bounds"]
    np.testing.assert_allclose(np.exp(lower), f["posterior"][1], rtol=1e-12)
    np.testing.assert_allclose(np.exp(upper), f["transition"][1], rtol=1e-12)
    (a_t, s_t), (a_s, s_s) = f["t"], f["s"]
    preserving = np.allclose(a_t**2 + s_t**2, 1)
    for data, bound in ((1e-12, lower), (1.0, upper)) if preserving else ((1e-12, lower),):
        cross = a_t / a_s * (a_s**2 * data + s_s**2)
        exact = a_s**2 * data + s_s**2 - cross**2 / (a_t**2 * data + s_t**2)
        np.testing.assert_allclose(np.log(exact), bound, atol=1e-5)


def test_zero_signal_and_zero_noise_ends_are_exact():
    """t = 1 without any signal and s = 0 without any noise: from x_t alone one knows nothing, from x0 everything."""
    x_t, x0, s = jnp.full((1, 2), 0.7), jnp.full((1, 2), -0.3), jnp.float32(0.5)
    for schedule in (dj.cosine(), dj.cosine(0.0), dj.rectified()):

        @jax.jit
        def compute(one, zero, schedule=schedule):
            first = dj.q_posterior(schedule, x_t, x0, one, s)
            last = dj.q_posterior(schedule, x_t, x0, s, zero)
            return schedule(s), first, last, dj.variance_bounds(schedule, s, zero)[0]

        (alpha, sigma), (mean, variance), last, lower = compute(jnp.float32(1.0), jnp.float32(0.0))
        np.testing.assert_allclose(mean, alpha * x0, rtol=1e-6)
        np.testing.assert_allclose(variance, sigma**2, rtol=1e-6)
        np.testing.assert_allclose(last[0], x0, rtol=1e-6)
        assert float(last[1]) == 0 and float(lower) == -np.inf


def check_moments(x, mean, variance):
    """Sample mean and variance of every column within 4.5 standard errors."""
    n = x.shape[0]
    assert np.all(np.abs(x.mean(0) - mean) < 4.5 * np.sqrt(variance / n))
    assert np.all(np.abs(x.var(0) - variance) < 4.5 * variance * np.sqrt(2 / n))


@pytest.mark.parametrize("name", ["linear_betas", "cosine", "ve", "rectified"])
def test_moments_of_q_sample_renoise_and_prior(name):
    schedule = CASES[name].schedule
    x0 = jnp.broadcast_to(jnp.asarray([[1.5, -0.5]]), (20_000, 2))
    s, t = jnp.float32(0.3), jnp.float32(0.6)

    @jax.jit
    def compute(key):
        k1, k2, k3 = jax.random.split(key, 3)
        x_s = dj.q_sample(schedule, x0, s, dj.normal_like(k1, x0))
        return x_s, dj.renoise(k2, schedule, x_s, s, t), dj.prior(k3, schedule, x0.shape, t)

    x_s, x_t, start = compute(jax.random.key(3))
    for x, (alpha, sigma) in ((x_s, schedule(s)), (x_t, schedule(t))):
        check_moments(np.asarray(x, np.float64), float(alpha) * np.array([1.5, -0.5]), float(sigma) ** 2)
    check_moments(np.asarray(start, np.float64), np.zeros(2), float(schedule(t).sigma) ** 2)
    # x_t and x_s share the noise of x_s: the covariance of the chain, not only its marginals.
    (a_t, s_t), (a_s, s_s) = ((float(c) for c in schedule(u)) for u in (t, s))
    got = np.mean((np.asarray(x_s) - a_s * np.array([1.5, -0.5])) * (np.asarray(x_t) - a_t * np.array([1.5, -0.5])))
    assert got == pytest.approx(a_t / a_s * s_s**2, abs=4.5 * s_s * s_t / np.sqrt(20_000))


def test_keys_per_example_do_not_depend_on_the_batch():
    keys = jax.random.split(jax.random.key(0), 5)
    x, s, t = jnp.ones((5, 3)), jnp.float32(0.2), jnp.float32(0.7)
    schedule = dj.rectified()
    whole = dj.prior(keys, schedule, (5, 3), t), dj.renoise(keys, schedule, x, s, t)
    part = dj.prior(keys[1:3], schedule, (2, 3), t), dj.renoise(keys[1:3], schedule, x[1:3], s, t)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[1:3], b)
        assert len(np.unique(a)) == a.size
    alone = dj.prior(keys[2], schedule, (3,), t)
    np.testing.assert_array_equal(whole[0][2], alone)


def test_dtype_of_x_is_kept():
    x, t = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32)
    key, schedule = jax.random.key(0), dj.cosine()
    assert jax.eval_shape(lambda x, t: dj.q_sample(schedule, x, t, x), x, t).dtype == jnp.bfloat16
    mean, variance = jax.eval_shape(lambda x, t: dj.q_posterior(schedule, x, x, t, t), x, t)
    assert mean.dtype == jnp.bfloat16 and variance.dtype == jnp.float32
    assert jax.eval_shape(lambda x, t: dj.renoise(key, schedule, x, t, t), x, t).dtype == jnp.bfloat16


def test_bad_input():
    x, key, schedule = jnp.ones((2, 3)), jax.random.key(0), dj.rectified()
    with pytest.raises(ValueError, match="shape"):
        dj.q_sample(schedule, x, jnp.ones(2), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"q_sample: t must be a scalar or \[b\] .*\(2, 3\), got shape \(3,\)"):
        dj.q_sample(schedule, x, jnp.ones(3), x)
    with pytest.raises(ValueError, match=r"q_sample: t .*\(2, 3\), got shape \(2, 1\)"):
        dj.q_sample(schedule, x, jnp.ones((2, 1)), x)
    with pytest.raises(ValueError, match=r"cosine: t must lie in \[0, 1\], got \[7\.0\]"):
        dj.q_sample(dj.cosine(), x, jnp.asarray([0.5, 7.0]), x)
    with pytest.raises(ValueError, match=r"q_posterior: x0 has shape \(1, 3\), and x \(2, 3\)"):
        dj.q_posterior(schedule, x, x[:1], jnp.float32(0.5), jnp.float32(0.2))
    with pytest.raises(ValueError, match=r"q_posterior: t .*\(2, 3\), got shape \(3,\)"):
        dj.q_posterior(schedule, x, x, jnp.full(3, 0.5), jnp.full(3, 0.2))
    with pytest.raises(ValueError, match="does not lead"):
        dj.bcast(jnp.ones(3), x)
    with pytest.raises(ValueError, match="more axes"):
        dj.bcast(jnp.ones((2, 3, 1)), x)
    with pytest.raises(ValueError, match="3 keys"):
        dj.prior(jax.random.split(key, 3), schedule, (2, 3), jnp.float32(1.0))
    with pytest.raises(ValueError, match="3 keys"):
        dj.normal_like(jax.random.split(key, 3), x)
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        dj.normal_like(jnp.zeros(2, jnp.uint32), x)


# --- the oracles themselves ------------------------------------------------------------------------------------------

MIXTURE = mixtures.Mixture(np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([[0.04], [0.25]]))


def test_oracle_denoiser_is_the_posterior_mean_by_quadrature():
    """E[x0 | x_t] = int x0 p(x0) N(x_t; alpha x0, sigma^2) dx0 / int ..., on a fine grid."""
    grid = np.linspace(-5, 5, 200_001)
    prior = sum(w * np.exp(-0.5 * (grid - m) ** 2 / v) / np.sqrt(v) for w, (m,), (v,) in zip(*MIXTURE[:3], strict=True))
    x = np.array([-1.2, 0.1, 2.0])
    with jax.enable_x64(True):
        got = jax.jit(mixtures.denoiser(MIXTURE, dj.cosine()))(jnp.asarray(x[:, None]), jnp.full(3, 0.4), None)
        alpha, sigma = (float(c) for c in dj.cosine()(jnp.asarray(0.4)))
    weight = prior * np.exp(-0.5 * ((x[:, None] - alpha * grid) / sigma) ** 2)
    expected = (weight * grid).sum(1) / weight.sum(1)
    np.testing.assert_allclose(got.x0[:, 0], expected, rtol=1e-8)
    np.testing.assert_allclose(got.eps[:, 0], (x - alpha * expected) / sigma, rtol=1e-8)


def test_oracle_score_is_the_gradient_of_the_log_density():
    with jax.enable_x64(True):
        x, t, schedule = jnp.asarray([[-1.2], [0.1], [2.0]]), jnp.full(3, 0.4), dj.vp_linear()

        @jax.jit
        def compute(x):
            prediction = mixtures.denoiser(MIXTURE, schedule)(x, t, None)
            return (
                jax.grad(lambda y: jnp.sum(mixtures.log_density(MIXTURE, schedule, y, t)))(x),
                mixtures.score(MIXTURE, schedule, x, t),
                dj.to_score(schedule, prediction, t),
                prediction.x0,
                mixtures.conditional(MIXTURE, schedule)(x, t, jnp.full(3, 2)).x0,
            )

        auto, exact, by_hub, x0, null = compute(x)
    np.testing.assert_allclose(exact, auto, rtol=1e-10)
    np.testing.assert_allclose(by_hub, auto, rtol=1e-10)
    np.testing.assert_allclose(null, x0, rtol=1e-12)
