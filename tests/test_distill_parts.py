"""Few-step losses: distribution matching, couplings, models and times, and what all the losses promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_maps import LAW, MEAN, STD, average_velocity, drawn, flow_map, wavy
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.distill import (
    adaptive_error,
    average_velocity_denoiser,
    average_velocity_map,
    consistency_distillation_loss,
    consistency_precondition,
    consistency_training_loss,
    continuous_consistency_loss,
    distribution_matching_loss,
    doubling_levels,
    draw_levels,
    draw_two_times,
    easy_mapping,
    improved_mean_flow_loss,
    mean_flow_loss,
    optimal_transport_coupling,
    progressive_distillation_loss,
    pseudo_huber,
    shortcut_loss,
    solver_map,
    squared_error,
)
from diffusion_jax.evaluation import mixtures

SCHEDULES = {"rectified": dj.rectified(), "cosine": dj.cosine(0.0), "vp_linear": dj.vp_linear(), "edm": dj.edm()}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- distribution matching --------------------------------------------------------------------------------------------


def kl(m1, v1, m2, v2):
    return jnp.sum(0.5 * (jnp.log(v2 / v1) - 1 + v1 / v2 + (m1 - m2) ** 2 / v2))


@pytest.mark.parametrize("schedule", ["rectified", "vp_linear", "edm"])
def test_distribution_matching_has_the_gradient_of_kl(schedule, x64):
    """Generator m + exp(l) z, weight alpha^2 / sigma^2: the exact gradient of KL at time t; nothing when laws agree."""
    sch, t = SCHEDULES[schedule], 0.4
    alpha, sigma = sch(jnp.asarray(t))
    z, w = np.polynomial.hermite_e.hermegauss(8)
    z, eps = (jnp.asarray(a.reshape(-1, 1)) for a in np.meshgrid(z, z))
    w = jnp.asarray(np.outer(w, w).reshape(-1)) / w.sum() ** 2
    times = jnp.full(len(w), t)

    @jax.jit
    def matched(params, own):
        def mean(params):
            fake = mixtures.denoiser(mixtures.Mixture(np.ones(1), *(a[None] for a in own)), sch)
            x = params[0][None] + jnp.exp(params[1])[None] * z
            real = mixtures.denoiser(LAW, sch)
            return jnp.sum(w * distribution_matching_loss(x, real, fake, sch, times, eps, weight=dj.snr_weight))

        return jax.grad(mean)(params)

    def divergence(params):
        at = alpha * params[0], alpha**2 * jnp.exp(2 * params[1]) + sigma**2
        return kl(*at, alpha * MEAN, (alpha * STD) ** 2 + sigma**2)

    for params in ((jnp.array([-0.3]), jnp.array([0.2])), (jnp.array([MEAN]), jnp.log(jnp.array([STD])))):
        own = params[0], jnp.exp(2 * params[1])
        np.testing.assert_allclose(matched(params, own), jax.grad(divergence)(params), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_distribution_matching_has_the_published_gradient_and_value(x64):
    """(x0_fake - x0_real) / mean |x - x0_real|, per dimension, and it does not depend on the denoisers' derivatives."""
    sch = dj.cosine(0.0)
    x, eps = drawn()
    t = jnp.linspace(0.2, 0.8, len(x))
    real, fake = wavy(sch), wavy(sch, 0.4)
    loss, pull = jax.vjp(lambda x: distribution_matching_loss(x, real, fake, sch, t, eps), x)
    x_t = dj.q_sample(sch, x, t, eps)
    g = fake(x_t, t).x0 - real(x_t, t).x0
    g = g / jnp.mean(jnp.abs(x - real(x_t, t).x0), axis=1, keepdims=True)
    np.testing.assert_allclose(pull(jnp.ones(len(x)))[0], g / x.shape[1], rtol=1e-10)
    np.testing.assert_allclose(loss, jnp.mean(g**2, axis=1) / 2, rtol=1e-10)


# --- couplings --------------------------------------------------------------------------------------------------------


def cost(x0, eps):
    return np.sum((np.asarray(x0) - np.asarray(eps)) ** 2)


def test_the_coupling_costs_least_and_is_a_permutation():
    """Against all 720 permutations of 6 images; jitted, batched, and under the gradient of what made x0."""
    x0, eps = (a.astype(jnp.float32).reshape(6, 2, 2, 3) for a in drawn(6, 12))
    moved = jax.jit(optimal_transport_coupling)(x0, eps)
    rows = {row.tobytes() for row in np.asarray(eps)}
    assert {row.tobytes() for row in np.asarray(moved)} == rows and len(rows) == 6
    least = min(cost(x0, np.asarray(eps)[list(order)]) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(cost(x0, moved), least, rtol=1e-6)
    assert cost(x0, eps) > 1.02 * least
    both = jax.vmap(optimal_transport_coupling)(jnp.stack([x0, -x0]), jnp.stack([eps, eps]))
    np.testing.assert_array_equal(both[0], moved)
    np.testing.assert_allclose(cost(-x0, both[1]), cost(-x0, optimal_transport_coupling(-x0, eps)), rtol=1e-6)
    gradient = jax.grad(lambda scale: jnp.sum(optimal_transport_coupling(scale * x0, eps) * scale * x0))(1.0)
    np.testing.assert_allclose(gradient, jnp.sum(moved * x0), rtol=1e-5)


# --- models, metrics, times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["rectified", "cosine", "edm"])
def test_a_consistency_model_is_the_identity_at_the_data(schedule, x64):
    """f = x / alpha at sigma_min whatever the network, which may be 0; elsewhere f is the paper's formula."""
    sch, sd = SCHEDULES[schedule], 0.7

    def net(x, time, cond):
        return jnp.sin(3 * x) + dj.bcast(time, x) ** 2

    x = drawn()[0]
    for sigma_min in (0.0, 0.02):
        model = consistency_precondition(net, sch, sigma_min, sd)
        t = (
            dj.inverse_logsnr(sch, jnp.full(len(x), -2 * np.log(sigma_min)), 0.0, 1.0)
            if sigma_min
            else jnp.zeros(len(x))
        )
        x0 = model(x, t).x0
        np.testing.assert_allclose(x0, x / dj.bcast(sch(t).alpha, x), rtol=1e-10)
        t = jnp.linspace(0.1, 0.9, len(x))
        alpha, sigma = (dj.bcast(c, x) for c in sch(t))
        y, sigma = x / alpha, sigma / alpha
        skip = sd**2 / ((sigma - sigma_min) ** 2 + sd**2)
        out = sd * (sigma - sigma_min) / jnp.sqrt(sigma**2 + sd**2)
        inner = net(y / jnp.sqrt(sigma**2 + sd**2), jnp.log(sigma[:, 0]) / 4, None)
        np.testing.assert_allclose(model(x, t).x0, skip * y + out * inner, rtol=1e-10)


@pytest.mark.slow
def test_average_velocities_as_maps_and_denoisers(x64):
    """The exact average velocity jumps to where the flow goes and holds the exact denoiser."""
    sch = dj.cosine(0.0)
    x = jnp.asarray([[0.3], [-1.0]])
    t, s = jnp.asarray([0.9, 0.4]), jnp.asarray([0.0, 0.3])
    u = average_velocity(LAW, sch)
    np.testing.assert_allclose(average_velocity_map(u)(x, t, s), flow_map(LAW, sch)(x, t, s), rtol=1e-12)
    found, exact = average_velocity_denoiser(u, sch)(x, t), mixtures.denoiser(LAW, sch)(x, t)
    np.testing.assert_allclose(found.x0, exact.x0, rtol=1e-10)
    np.testing.assert_allclose(found.eps, exact.eps, rtol=1e-10)


@pytest.mark.slow
def test_a_solver_map_is_the_sampler_run_per_example(x64):
    """Any sampler, with history or branches, at times of each example's own; conditions stay with their examples."""
    sch = dj.rectified()
    law = mixtures.Mixture(np.array([0.4, 0.6]), np.array([[0.5, 0.0], [-1.0, 0.3]]), np.full((2, 2), 0.2))
    x, labels = drawn(3, 2)[0], jnp.asarray([0, 2, 1])
    t, s = jnp.asarray([0.9, 0.6, 0.5]), jnp.asarray([0.0, 0.5, 0.1])
    denoiser = mixtures.conditional(law, sch)
    for sampler in (dj.ddim(sch), dj.heun(sch), dj.dpmpp_2m(sch)):
        y = jax.jit(solver_map(sampler, denoiser, 4))(x, t, s, labels)
        for i in range(3):
            times = t[i] + (s[i] - t[i]) * jnp.linspace(0, 1, 5)
            one = slice(i, i + 1)
            run = jax.jit(lambda *data, sampler=sampler: dj.sample(jax.random.key(1), sampler, denoiser, *data))
            alone = run(x[one], times, labels[one])
            np.testing.assert_allclose(y[i : i + 1], alone, rtol=1e-10)


def test_metrics(x64):
    error = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5)))
    norm = jnp.sqrt(jnp.sum(error**2, axis=(1, 2)))
    c = 0.00054 * np.sqrt(10)
    np.testing.assert_allclose(squared_error(error), norm**2 / 10, rtol=1e-12)
    np.testing.assert_allclose(pseudo_huber()(error), jnp.sqrt(norm**2 + c**2) - c, rtol=1e-12)
    np.testing.assert_allclose(adaptive_error(0.0)(error), norm**2, rtol=1e-12)
    np.testing.assert_allclose(adaptive_error(0.5, 0.1)(error), norm**2 / jnp.sqrt(norm**2 + 0.1), rtol=1e-12)
    gradient = jax.grad(lambda e: jnp.sum(adaptive_error(0.5, 0.1)(e)))(error)
    half = jax.grad(lambda e: jnp.sum(pseudo_huber(0.1**0.5)(e)))(error)
    np.testing.assert_allclose(gradient, 2 * half, rtol=1e-12)


def test_levels_double_as_published():
    """N(k) of the paper's table 1 at every step, for its numbers of steps and levels; traced."""
    go = jax.jit(doubling_levels, static_argnums=(1, 2, 3))
    for steps, first, last in ((800, 10, 1280), (1000, 10, 1280), (50, 3, 20)):
        k = np.arange(steps + 5)
        period = np.floor(steps / (np.log2(np.floor(last / first)) + 1))
        expected = np.minimum(first * 2 ** np.floor(k / period), last) + 1
        np.testing.assert_array_equal(go(jnp.asarray(k), steps, first, last), expected)


def test_levels_are_drawn_with_the_published_law():
    """Chi-square against p_i ~ erf(...) - erf(...) for two numbers of levels, in one compilation; neighbours, s < t."""
    from scipy.special import erf

    go = jax.jit(draw_levels(), static_argnums=1)
    for n in (11, 21):
        t, s = (np.asarray(a, np.float64) for a in go(jax.random.key(n), 20_000, n))
        grid = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), n) ** 7
        i = np.abs(np.log(grid[None] / s[:, None])).argmin(1)
        np.testing.assert_allclose(s, grid[i], rtol=1e-5)
        np.testing.assert_allclose(t, grid[i + 1], rtol=1e-5)
        p = np.diff(erf((np.log(grid) + 1.1) / (np.sqrt(2) * 2.0)))
        p /= p.sum()
        enough = 20_000 * p > 5
        assert (
            stats.chisquare(np.bincount(i, minlength=n - 1)[enough], 20_000 * p[enough], sum_check=False).pvalue > 0.01
        )
    assert go._cache_size() == 1


def test_two_times_and_the_easy_mapping():
    t, s = draw_two_times(dj.draw_uniform(), apart=0.25)(jax.random.key(0), 20_000)
    assert bool(jnp.all(s <= t))
    assert stats.binomtest(int(jnp.sum(s < t)), 20_000, 0.25).pvalue > 0.01
    np.testing.assert_allclose(jnp.mean((t - s)[s < t]), 1 / 3, atol=0.02)  # of two uniform draws
    t = jnp.asarray([0.01, 0.5, 3.0, 80.0])
    previous = jnp.zeros_like(t)
    for stage in range(8):
        r = easy_mapping(t, stage, q=4.0)
        np.testing.assert_allclose(r / t, np.maximum(1 - (1 + 8 / (1 + np.exp(t))) / 4 ** (stage + 1), 0), atol=1e-6)
        assert bool(jnp.all((r >= previous) & (r < t)))
        previous = r


# --- contract ---------------------------------------------------------------------------------------------------------


def all_losses(sch, params, x0, t, s, eps):
    """Every loss of this module on models with one parameter, of any shape."""

    def student(x, t, cond=None):
        return dj.from_x0(sch, x, t, params.astype(x.dtype) * jnp.tanh(x) * dj.bcast(1 - t / 2, x))

    def u(x, t, s, cond=None):
        return params.astype(x.dtype) * jnp.tanh(x) * dj.bcast(1 + t * s, x)

    def teacher(x, t, cond=None):
        return dj.from_x0(sch, x, t, 0.5 * x)

    step = solver_map(dj.ddim(sch), teacher)
    common = sch, x0, t, s, eps
    return {
        "progressive": progressive_distillation_loss(student, teacher, *common),
        "distillation": consistency_distillation_loss(student, step, *common),
        "training": consistency_training_loss(student, *common, metric=pseudo_huber()),
        "continuous": continuous_consistency_loss(student, sch, x0, t, eps, sigma_data=0.5, log_weight=0.1 * t),
        "continuous_distillation": continuous_consistency_loss(
            student, sch, x0, t, eps, sigma_data=0.5, teacher=teacher, warmup=jnp.float32(0.5)
        ),
        "mean_flow": mean_flow_loss(u, *common, metric=adaptive_error()),
        "improved_mean_flow": improved_mean_flow_loss(u, *common),
        "shortcut": shortcut_loss(u, *common),
        "matching": distribution_matching_loss(student(x0, t).x0, teacher, student, sch, t, eps),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 3, 1), (2, 3, 3, 1)])
@pytest.mark.parametrize("enabled", [False, True])
def test_any_shape_and_dtype_with_times_in_float32(shape, dtype, enabled):
    x0, eps = (jnp.asarray(a, dtype).reshape(4, *shape) for a in drawn(4, int(np.prod(shape))))
    t, s = jnp.linspace(0.3, 0.9, 4), jnp.linspace(0.1, 0.7, 4)

    def total(params):
        losses = all_losses(dj.rectified(), params, x0, t, s, eps)
        return sum(jnp.sum(loss) for loss in losses.values()), losses

    with jax.enable_x64(enabled):
        (_, losses), gradient = jax.eval_shape(jax.value_and_grad(total, has_aux=True), jnp.float32(0.8))
    assert all(loss.shape == (4,) and loss.dtype == jnp.float32 for loss in losses.values())
    assert gradient.dtype == jnp.float32


@pytest.mark.slow
def test_losses_are_finite_and_of_their_own_example(x64):
    """Also at t = 1, where alpha = 0, and at s = 0; example i of a batch gives what it gives alone."""
    x0, eps = drawn(4, 3)
    t, s = jnp.asarray([0.3, 0.5, 0.9, 1.0]), jnp.asarray([0.0, 0.4, 0.2, 0.0])
    go = jax.jit(lambda *data: all_losses(dj.rectified(), jnp.asarray(0.8), *data))
    together = go(x0, t, s, eps)
    reverse = go(*(a[::-1] for a in (x0, t, s, eps)))
    gradient = jax.jit(jax.jacobian(lambda p: all_losses(dj.rectified(), p, x0, t, s, eps)))(jnp.asarray(0.8))
    for name, loss in together.items():
        assert bool(jnp.all(jnp.isfinite(loss)) & jnp.all(jnp.isfinite(gradient[name]))), name
        np.testing.assert_allclose(reverse[name][::-1], loss, rtol=1e-12)


def test_bad_input_is_named():
    sch, ones, half = dj.rectified(), jnp.ones(2), jnp.full(2, 0.5)
    x = jnp.zeros((2, 3))

    def u(x, t, s, cond=None):
        return x

    def model(x, t, cond=None):
        return dj.Prediction(x, x)

    def short(x, t, cond=None):
        return dj.Prediction(x[:, :2], x[:, :2])

    with pytest.raises(ValueError, match=r"mean_flow_loss: a step goes from t to s <= t"):
        mean_flow_loss(u, sch, x, half, ones, x)
    mean_flow_loss(u, sch, x, half, half, x)
    with pytest.raises(ValueError, match=r"consistency_training_loss: a step goes from t to s < t"):
        consistency_training_loss(model, sch, x, half, half, x)
    with pytest.raises(ValueError, match=r"shortcut_loss: t and s are one per example, got \[\(2,\), \(3,\)\]"):
        jax.eval_shape(lambda s: shortcut_loss(u, sch, x, ones, s, x), jnp.ones(3))
    with pytest.raises(ValueError, match=r"got \[\(\)\] for x of shape \(2, 3\)"):
        continuous_consistency_loss(model, sch, x, jnp.asarray(0.5), x, sigma_data=1.0)
    with pytest.raises(ValueError, match=r"q_sample: .*eps.*\(2, 2\)"):
        improved_mean_flow_loss(u, sch, x, ones, half, x[:, :2])
    with pytest.raises(ValueError, match=r"the teacher returned \(2, 2\) for x of shape \(2, 3\)"):
        progressive_distillation_loss(model, short, sch, x, ones, half, x)
    with pytest.raises(ValueError, match=r"the teacher returned \(2, 2\)"):
        consistency_distillation_loss(model, lambda x, t, s, cond: x[:, :2], sch, x, ones, half, x)
    with pytest.raises(ValueError, match=r"the teacher returned \(2, 2\)"):
        continuous_consistency_loss(model, sch, x, half, x, sigma_data=1.0, teacher=short)
    with pytest.raises(ValueError, match=r"the student returned \(2, 2\)"):
        consistency_training_loss(short, sch, x, ones, half, x)
    with pytest.raises(ValueError, match=r"the student returned \(2, 2\)"):
        mean_flow_loss(lambda x, t, s, cond: x[:, :2], sch, x, ones, half, x)
    with pytest.raises(ValueError, match=r"the fake returned \(2, 2\)"):
        distribution_matching_loss(x, model, short, sch, half, x)
    with pytest.raises(ValueError, match=r"x0 has shape \(2, 3\) and eps \(2, 2\)"):
        optimal_transport_coupling(x, x[:, :2])
    with pytest.raises(ValueError, match="3 steps are too few"):
        doubling_levels(0, 3)
    # Values cannot be seen under a trace: no error there.
    jax.eval_shape(lambda t, s: mean_flow_loss(u, sch, x, t, s, x), half, ones)
