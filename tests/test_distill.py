"""Few-step losses on Gaussian data, where the consistency function and the average velocity are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_maps import LAW, MEAN, STD, average_velocity, consistency_model, exact_velocity, flow_map, pairs
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.distill import (
    adaptive,
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
TIMES = {name: [(0.9, 0.3), (0.6, 0.5), (0.3, 0.05)] for name in SCHEDULES} | {"edm": [(20.0, 0.5), (2.0, 1.0)]}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def basis(x, t, s=None):
    """Functions by which a model is disturbed: f[b 1] -> f[4 b 1]."""
    t = dj.bcast(t, x)
    s = 0.5 * t if s is None else dj.bcast(s, x)
    return jnp.stack([jnp.ones_like(x), x, t * x, jnp.cos(s) * x])


def disturbed(delta):
    return lambda *args: jnp.tensordot(delta, basis(*args), 1)


# Each: (delta, schedule, x0, t, s, eps) -> f[b], the loss of the exact model + delta . basis.
EXACT = {
    "distillation": lambda d, sch, x0, t, s, eps: consistency_distillation_loss(
        consistency_model(LAW, sch, disturbed(d)),
        flow_map(LAW, sch),
        sch,
        x0,
        t,
        s,
        eps,
        average=consistency_model(LAW, sch),
    ),
    "continuous_distillation": lambda d, sch, x0, t, s, eps: continuous_consistency_loss(
        consistency_model(LAW, sch, disturbed(d)), sch, x0, t, eps, sigma_data=0.5, teacher=mixtures.denoiser(LAW, sch)
    ),
    "shortcut": lambda d, sch, x0, t, s, eps: shortcut_loss(
        average_velocity(LAW, sch, disturbed(d)), sch, x0, t, s, eps, smallest=0.0
    ),
    "continuous_training": lambda d, sch, x0, t, s, eps: continuous_consistency_loss(
        consistency_model(LAW, sch, disturbed(d)), sch, x0, t, eps, sigma_data=0.5
    ),
    "continuous_training_raw": lambda d, sch, x0, t, s, eps: continuous_consistency_loss(
        consistency_model(LAW, sch, disturbed(d)), sch, x0, t, eps, sigma_data=0.5, normalize=None
    ),
    "mean_flow": lambda d, sch, x0, t, s, eps: mean_flow_loss(
        average_velocity(LAW, sch, disturbed(d)), sch, x0, t, s, eps
    ),
    "improved_mean_flow": lambda d, sch, x0, t, s, eps: improved_mean_flow_loss(
        average_velocity(LAW, sch, disturbed(d)), sch, x0, t, s, eps
    ),
}
TEACHERS = ("distillation", "continuous_distillation", "shortcut")


ON = [(name, schedule) for name in EXACT for schedule in ("rectified", "edm")]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*ON, ("distillation", "cosine"), ("continuous_training", "vp_linear"), ("mean_flow", "cosine")],
)
def test_the_exact_model_is_stationary(name, schedule, x64):
    """Expected gradient 0 to rounding at all times; with a teacher the loss itself is 0. Disturbed, neither."""
    sch = SCHEDULES[schedule]

    @jax.jit
    def go(delta, t, s):
        x0, eps, w = pairs(sch, t)

        def mean(delta):
            losses = EXACT[name](delta, sch, x0, jnp.full(len(w), t), jnp.full(len(w), s), eps)
            return jnp.sum(w * losses), losses

        return jax.value_and_grad(mean, has_aux=True)(delta)

    for t, s in TIMES[schedule]:
        (_, losses), gradient = go(jnp.zeros(4), t, s)
        (_, off_losses), off = go(jnp.array([0.1, -0.05, 0.1, 0.0]), t, s)
        size = float(jnp.linalg.norm(off))
        assert size > 1e-3, "the check could not fail"
        assert float(jnp.max(jnp.abs(gradient))) < 1e-10 * size, (t, s)
        if name in TEACHERS:
            assert float(jnp.max(losses)) < 1e-20 * float(jnp.max(off_losses))


@pytest.mark.parametrize("schedule", ["rectified", "cosine", "edm"])
def test_what_is_left_of_the_loss_at_the_exact_model(schedule, x64):
    """The variance of the pair's velocity given x_t, times the square of what the identity multiplies it by."""
    sch = SCHEDULES[schedule]
    zero = jnp.zeros(4)
    for t, s in TIMES[schedule]:
        x0, eps, w = pairs(sch, t)
        times = jnp.full(len(w), t), jnp.full(len(w), s)
        names = ("improved_mean_flow", "mean_flow", "continuous_training_raw")
        found = [jnp.sum(w * EXACT[name](zero, sch, x0, *times, eps)) for name in names]
        (alpha, sigma), (d_alpha, d_sigma) = sch(jnp.asarray(t)), dj.rates(sch, jnp.asarray(t))
        total, total_s = ((c.alpha * STD) ** 2 + c.sigma**2 for c in (sch(jnp.asarray(t)), sch(jnp.asarray(s))))
        variance = (d_alpha - d_sigma * alpha / sigma) ** 2 * (STD * sigma) ** 2 / total
        ahead, behind = (sch(jnp.asarray(t + h)) for h in (1e-5, -1e-5))
        rate = (jnp.arctan2(ahead.sigma, 0.5 * ahead.alpha) - jnp.arctan2(behind.sigma, 0.5 * behind.alpha)) / 2e-5
        cos = 0.5 * alpha / jnp.hypot(0.5 * alpha, sigma)
        expected = variance, variance * total_s / total, variance * STD**2 / total * (cos / rate) ** 2
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def wavy(schedule, scale=1.0):
    """A student that is neither linear nor exact, the same function of signal-to-noise ratio and x0 + ratio eps."""

    def denoiser(x, t, cond=None):
        alpha, sigma = schedule(t)
        ratio = dj.bcast(sigma / alpha, x)
        return dj.from_x0(schedule, x, t, scale * jnp.tanh(x / dj.bcast(alpha, x) + 0.3) / (1 + ratio) + 0.1 * ratio)

    return denoiser


def drawn(b=5, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 0.5, (b, d))), jnp.asarray(rng.standard_normal((b, d)))


def test_the_continuous_loss_does_not_depend_on_the_schedule(x64):
    """The same student, pairs and signal-to-noise ratios under three schedules: the same losses."""
    x0, eps = drawn()
    ratio = jnp.asarray([0.01, 0.1, 0.6, 2.0, 30.0])
    times = {"rectified": ratio / (1 + ratio), "cosine": 2 / np.pi * jnp.arctan(ratio), "edm": ratio}

    def losses(name, sigma_data):
        sch = SCHEDULES[name]
        return continuous_consistency_loss(wavy(sch), sch, x0, times[name], eps, sigma_data=sigma_data, warmup=0.7)

    for sigma_data in (0.5, 1.0):
        found = [jax.jit(losses, static_argnums=0)(name, sigma_data) for name in times]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
        np.testing.assert_allclose(found[2], found[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["rectified", "edm"])
@pytest.mark.parametrize("teach", [False, True])
def test_the_tangent_is_the_derivative_along_the_path(name, teach, x64):
    """g = cos(a) df/da by central differences along the pair, or along the teacher's velocity; and its two halves."""
    sch, sd, h = SCHEDULES[name], 0.7, 1e-5
    x0, eps = drawn()
    t = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    student = wavy(sch)
    teacher = wavy(sch, 0.5) if teach else None

    def tangent(warmup):
        """From the gradient by a constant added to F: d loss / d constant = -2 g / d."""

        def loss(constant):
            def moved(x, t, cond=None):
                alpha, sigma = sch(t)
                norm = jnp.hypot(alpha * sd, sigma)
                p = student(x, t)
                # F + c: x0 - sin(a) sd c, and eps + cos(a) c.
                x0 = p.x0 - dj.bcast(sigma / norm * sd, x) * constant
                return dj.Prediction(x0, p.eps + dj.bcast(alpha * sd / norm, x) * constant)

            return jnp.sum(
                continuous_consistency_loss(
                    moved, sch, x0, t, eps, sigma_data=sd, teacher=teacher, normalize=None, warmup=warmup
                )
            )

        return jax.grad(loss)(jnp.zeros_like(x0)) * x0.shape[1] / -2

    def along(h):
        x = dj.q_sample(sch, x0, t, eps)
        if teach:
            return x + h * dj.to_velocity(sch, teacher(x, t), t)
        return dj.q_sample(sch, x0, t + h, eps)

    def angle(t):
        alpha, sigma = sch(t)
        return jnp.arctan2(sigma, sd * alpha)

    x = dj.q_sample(sch, x0, t, eps)
    cos, sin = (dj.bcast(f(angle(t)), x0) for f in (jnp.cos, jnp.sin))
    df = student(along(h), t + h).x0 - student(along(-h), t - h).x0
    expected = cos * df / dj.bcast(angle(t + h) - angle(t - h), x0)
    full, half, first = (tangent(r) for r in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(full, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(half, (full + first) / 2, rtol=1e-9, atol=1e-12)
    truth, guess = (teacher(x, t) if teach else dj.Prediction(x0, eps)), student(x, t)
    difference = cos * sd * (guess.eps - truth.eps) - sin * (guess.x0 - truth.x0)
    np.testing.assert_allclose(first, -(cos**2) * difference, rtol=1e-9, atol=1e-12)


def test_targets_pass_no_gradient(x64):
    """The gradient is that of the student's own call against a constant, here computed apart and held fixed."""
    sch, h = dj.rectified(), 1e-5
    x0, eps = drawn()
    t, s = jnp.linspace(0.5, 0.9, len(x0)), jnp.linspace(0.1, 0.8, len(x0))
    x, v, d = dj.q_sample(sch, x0, t, eps), eps - x0, dj.bcast(t - s, x0)

    def f(p, x, t):
        return wavy(sch, p)(x, t).x0

    def u(p, x, t, s):
        return p * jnp.tanh(x * dj.bcast(1 + t * s, x)) + p**2 * dj.bcast(t - s, x)

    def du(v, p=0.7):
        return (u(p, x + h * v, t + h, s) - u(p, x - h * v, t - h, s)) / (2 * h)

    def close(loss, student, target):
        def own(p):
            return jnp.sum((student(p) - target) ** 2)

        found = jax.grad(lambda p: jnp.sum(loss(p)) * x0.shape[1])(0.7)
        np.testing.assert_allclose(found, jax.grad(own)(0.7), rtol=1e-7)

    def model(p):
        return lambda x, t, s, cond: u(p, x, t, s)

    data = x0, t, s, eps
    close(
        lambda p: consistency_training_loss(wavy(sch, p), sch, *data),
        lambda p: f(p, x, t),
        f(0.7, dj.q_sample(sch, x0, s, eps), s),
    )
    close(lambda p: mean_flow_loss(model(p), sch, *data), lambda p: u(p, x, t, s), v - d * du(v))
    close(
        lambda p: improved_mean_flow_loss(model(p), sch, *data),
        lambda p: u(p, x, t, s),
        v - d * du(u(0.7, x, t, t)),
    )
    m = (t + s) / 2
    first = u(0.7, x, t, m)
    second = u(0.7, x - d / 2 * first, m, s)
    close(lambda p: shortcut_loss(model(p), sch, *data, smallest=0.0), lambda p: u(p, x, t, s), (first + second) / 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_mean_flow_identity(schedule, x64):
    """u + (t - s) du/dt = v, eq. (2): with the posterior means as the pair, whose velocity is v, both losses are 0."""
    sch = SCHEDULES[schedule]
    t, s = (jnp.asarray(column) for column in zip(*TIMES[schedule], strict=True))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((len(t), 1)))
    means = mixtures.denoiser(LAW, sch)(x, t)

    @jax.jit
    def go(delta):
        u = average_velocity(LAW, sch, disturbed(delta))
        identity = [loss(u, sch, means.x0, t, s, means.eps) for loss in (mean_flow_loss, improved_mean_flow_loss)]
        continuous = continuous_consistency_loss(
            consistency_model(LAW, sch, disturbed(delta)), sch, means.x0, t, means.eps, sigma_data=STD
        )
        return jnp.stack([*identity, continuous])

    assert float(jnp.max(go(jnp.zeros(4)))) < 1e-20
    assert float(jnp.min(go(jnp.full(4, 0.1)))) > 1e-6


def test_mean_flow_learns_the_guided_flow(x64):
    """With omega and kappa the stationary u(x, t, t) is the velocity guided with scale omega / (1 - kappa)."""
    law = mixtures.Mixture(np.array([0.4, 0.6]), np.array([[MEAN], [-1.0]]), np.array([[STD**2], [0.2]]))
    sch, t, omega, kappa = dj.rectified(), 0.6, 1.2, 0.4
    x0, eps, w = pairs(sch, t)  # of component 0
    times, label, null = jnp.full(len(w), t), jnp.zeros(len(w), jnp.int32), jnp.asarray(2)

    def gradient(scale):
        guided = dj.classifier_free(mixtures.conditional(law, sch), null, scale)

        def mean(delta):
            def u(x, t, s, cond):
                change = jnp.where(dj.bcast(cond, x) == 2, 0, disturbed(delta)(x, t, s))
                plain = dj.to_velocity(sch, mixtures.conditional(law, sch)(x, t, cond), t)
                return jnp.where(dj.bcast(cond, x) == 2, plain, dj.to_velocity(sch, guided(x, t, cond), t)) + change

            losses = mean_flow_loss(u, sch, x0, times, times, eps, label, null=null, omega=omega, kappa=kappa)
            return jnp.sum(w * losses)

        return jnp.max(jnp.abs(jax.jit(jax.grad(mean))(jnp.zeros(4))))

    assert float(gradient(omega / (1 - kappa))) < 1e-12
    assert float(gradient(omega)) > 1e-2


def consistency_gradient(loss, sch, t, h):
    """The expected gradient at the exact consistency function, divided by the step h."""
    x0, eps, w = pairs(sch, t)

    def mean(delta):
        student, exact = (consistency_model(LAW, sch, change) for change in (disturbed(delta), None))
        return jnp.sum(w * loss(student, exact, x0, jnp.full(len(w), t), jnp.full(len(w), t - h), eps))

    return jax.grad(mean)(jnp.zeros(4)) / h


@pytest.mark.parametrize(
    ("name", "order"),
    [("training", 1), ("distillation_euler", 1), ("distillation_heun", 2), ("distillation_2_heun", 2)],
)
def test_the_order_of_the_bias_in_the_step(name, order, x64):
    """At the exact function discrete losses are biased: by O(h) from data, by the solver's order from a teacher."""
    sch = dj.rectified()
    denoiser = mixtures.denoiser(LAW, sch)
    solvers = {"euler": solver_map(dj.euler(sch), denoiser), "heun": solver_map(dj.heun(sch), denoiser)}
    solvers["2_heun"] = solver_map(dj.heun(sch), denoiser, steps=2)

    def loss(student, exact, x0, t, s, eps):
        if name == "training":
            return consistency_training_loss(student, sch, x0, t, s, eps, average=exact)
        solver = solvers[name.removeprefix("distillation_")]
        return consistency_distillation_loss(student, solver, sch, x0, t, s, eps, average=exact)

    go = jax.jit(lambda h: jnp.linalg.norm(consistency_gradient(loss, sch, 0.7, h)))
    coarse, fine = float(go(0.01)), float(go(0.005))
    print(f"{name}: {coarse:.2e}, {fine:.2e}, order {np.log2(coarse / fine):.2f}")
    assert abs(np.log2(coarse / fine) - order) < 0.1


def given(law, schedule, x, t, n=12):
    """Nodes x0, eps f64[k n, 1] and weights of an expectation given x_t = x, for data of a mixture."""
    alpha, sigma = (float(c) for c in schedule(jnp.asarray(t)))
    z, node_weights = np.polynomial.hermite_e.hermegauss(n)
    m, v = law.means[:, 0], law.variances[:, 0]
    total = alpha**2 * v + sigma**2
    share = law.weights * stats.norm.pdf(x, alpha * m, np.sqrt(total))
    centre, spread = m + alpha * v / total * (x - alpha * m), np.sqrt(v * sigma**2 / total)
    x0 = (centre[:, None] + spread[:, None] * z).reshape(-1, 1)
    w = np.outer(share / share.sum(), node_weights / node_weights.sum()).reshape(-1)
    return jnp.asarray(x0), jnp.asarray((x - alpha * x0) / sigma), jnp.asarray(w)


@pytest.mark.parametrize("robust", ["pseudo_huber", "adaptive", "normalized"])
def test_weights_by_the_error_move_the_minimum_unless_the_data_is_symmetric(robust, x64):
    """At the exact answer, given x_t: no gradient with squared errors, nor for one Gaussian; some for two."""
    sch, t, x = dj.rectified(), 0.5, 0.3
    single = mixtures.Mixture(np.ones(1), np.array([[MEAN]]), np.array([[STD**2]]))
    double = mixtures.Mixture(np.array([0.2, 0.8]), np.array([[1.0], [-1.0]]), np.array([[0.01], [0.01]]))

    def gradient(law, robust):
        x0, eps, w = given(law, sch, x, t)
        v = exact_velocity(law, sch, jnp.full((1, 1), x), jnp.full(1, t))
        times = jnp.full(len(w), t)

        def mean(delta):
            if robust in ("normalized", "raw"):  # any function with df/dt = 0 along v at this point

                def student(y, r, cond=None):
                    return dj.from_x0(sch, y, r, (1 + delta) * (y - v * dj.bcast(r - t, y)))

                size = 0.1 if robust == "normalized" else None
                losses = continuous_consistency_loss(student, sch, x0, times, eps, sigma_data=1.0, normalize=size)
            else:
                metric = {"squared": squared_error, "pseudo_huber": pseudo_huber(0.1), "adaptive": adaptive()}[robust]
                losses = mean_flow_loss(lambda y, *_: v + delta * y, sch, x0, times, times, eps, metric=metric)
            return jnp.sum(w * losses)

        return abs(float(jax.grad(mean)(0.0)))

    exact = "raw" if robust == "normalized" else "squared"
    assert max(gradient(law, exact) for law in (single, double)) < 1e-12
    assert gradient(single, robust) < 1e-12
    assert gradient(double, robust) > 1e-2


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
            alone = dj.sample(jax.random.key(1), sampler, denoiser, x[i : i + 1], times, labels[i : i + 1])
            np.testing.assert_allclose(y[i : i + 1], alone, rtol=1e-10)


def test_metrics(x64):
    error = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 5)))
    norm = jnp.sqrt(jnp.sum(error**2, axis=(1, 2)))
    c = 0.00054 * np.sqrt(10)
    np.testing.assert_allclose(squared_error(error), norm**2 / 10, rtol=1e-12)
    np.testing.assert_allclose(pseudo_huber()(error), jnp.sqrt(norm**2 + c**2) - c, rtol=1e-12)
    np.testing.assert_allclose(adaptive(0.0)(error), norm**2, rtol=1e-12)
    np.testing.assert_allclose(adaptive(0.5, 0.1)(error), norm**2 / jnp.sqrt(norm**2 + 0.1), rtol=1e-12)
    gradient = jax.grad(lambda e: jnp.sum(adaptive(0.5, 0.1)(e)))(error)
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
        "mean_flow": mean_flow_loss(u, *common, metric=adaptive()),
        "improved_mean_flow": improved_mean_flow_loss(u, *common),
        "shortcut": shortcut_loss(u, *common),
        "matching": distribution_matching_loss(student(x0, t).x0, teacher, student, sch, t, eps),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2,), (5, 2), (3, 3, 1), (2, 3, 3, 1)])
def test_any_shape_and_dtype_with_times_in_float32(shape, dtype):
    x0, eps = (jnp.asarray(a, dtype).reshape(4, *shape) for a in drawn(4, int(np.prod(shape))))
    t, s = jnp.linspace(0.3, 0.9, 4), jnp.linspace(0.1, 0.7, 4)

    def total(params):
        losses = all_losses(dj.rectified(), params, x0, t, s, eps)
        return sum(jnp.sum(loss) for loss in losses.values()), losses

    (_, losses), gradient = jax.eval_shape(jax.value_and_grad(total, has_aux=True), jnp.float32(0.8))
    assert all(loss.shape == (4,) and loss.dtype == jnp.float32 for loss in losses.values())
    assert gradient.dtype == jnp.float32


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
    with pytest.raises(ValueError, match=r"shortcut_loss: times are one per example, t has shape \(2,\) and s \(3,\)"):
        jax.eval_shape(lambda s: shortcut_loss(u, sch, x, ones, s, x), jnp.ones(3))
    with pytest.raises(ValueError, match=r"t has shape \(\) for x of shape \(2, 3\)"):
        continuous_consistency_loss(model, sch, x, jnp.asarray(0.5), x, sigma_data=1.0)
    with pytest.raises(ValueError, match=r"x0 has shape \(2, 3\) and eps \(2, 2\)"):
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
