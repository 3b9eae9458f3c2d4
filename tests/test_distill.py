"""Few-step losses on Gaussian data, where the consistency function and the average velocity are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_maps import LAW, MEAN, STD, average_velocity, consistency_model, drawn, exact_velocity, flow_map, pairs, wavy
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.distill import (
    adaptive_error,
    consistency_distillation_loss,
    consistency_training_loss,
    continuous_consistency_loss,
    improved_mean_flow_loss,
    mean_flow_loss,
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
        ema=consistency_model(LAW, sch),
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
    names = ("improved_mean_flow", "mean_flow", "continuous_training_raw")

    def angle(t):
        alpha, sigma = sch(t)
        return jnp.arctan2(sigma, 0.5 * alpha)

    @jax.jit
    def go(t, s):
        x0, eps, w = pairs(sch, t)
        times = jnp.full(len(w), t), jnp.full(len(w), s)
        found = [jnp.sum(w * EXACT[name](jnp.zeros(4), sch, x0, *times, eps)) for name in names]
        (alpha, sigma), (d_alpha, d_sigma) = sch(t), dj.rates(sch, t)
        total, total_s = ((c.alpha * STD) ** 2 + c.sigma**2 for c in (sch(t), sch(s)))
        variance = (d_alpha - d_sigma * alpha / sigma) ** 2 * (STD * sigma) ** 2 / total
        slope = STD / jnp.sqrt(total) * jnp.cos(angle(t)) / jax.grad(angle)(t)  # of cos(a) df/da in the velocity
        return found, [variance, variance * total_s / total, variance * slope**2]

    for t, s in TIMES[schedule]:
        np.testing.assert_allclose(*go(t, s), rtol=1e-10)


@pytest.mark.slow
def test_the_continuous_loss_does_not_depend_on_the_schedule(x64):
    """The same student, pairs and signal-to-noise ratios under three schedules: the same losses."""
    x0, eps = drawn()
    ratio = jnp.asarray([0.01, 0.1, 0.6, 2.0, 30.0])
    times = {"rectified": ratio / (1 + ratio), "cosine": 2 / np.pi * jnp.arctan(ratio), "edm": ratio}

    def losses(name, sigma_data, log_weight=None):
        sch, options = SCHEDULES[name], {"sigma_data": sigma_data, "warmup": 0.7, "log_weight": log_weight}
        return continuous_consistency_loss(wavy(sch), sch, x0, times[name], eps, **options)

    for sigma_data in (0.5, 1.0):
        found = [jax.jit(losses, static_argnums=0)(name, sigma_data) for name in times]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
        np.testing.assert_allclose(found[2], found[0], rtol=1e-9)
    w = jnp.linspace(-1, 1, len(x0))
    np.testing.assert_allclose(losses("edm", 1.0, w), jnp.exp(w) * found[0] - w, rtol=1e-9)


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

        return jax.jit(jax.grad(loss))(jnp.zeros_like(x0)) * x0.shape[1] / -2

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

        found, expected = jax.jit(lambda p: (jax.grad(lambda p: jnp.sum(loss(p)))(p), jax.grad(own)(p)))(0.7)
        np.testing.assert_allclose(found * x0.shape[1], expected, rtol=1e-7)

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
    close(
        lambda p: improved_mean_flow_loss(model(p), sch, *data, velocity=lambda x, t, cond: p * jnp.cos(x)),
        lambda p: u(p, x, t, s),
        v - d * du(0.7 * jnp.cos(x)),
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
            return consistency_training_loss(student, sch, x0, t, s, eps, ema=exact)
        solver = solvers[name.removeprefix("distillation_")]
        return consistency_distillation_loss(student, solver, sch, x0, t, s, eps, ema=exact)

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


@pytest.mark.slow
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
                metrics = {"squared": squared_error, "pseudo_huber": pseudo_huber(0.1), "adaptive": adaptive_error()}
                metric = metrics[robust]
                losses = mean_flow_loss(lambda y, *_: v + delta * y, sch, x0, times, times, eps, metric=metric)
            return jnp.sum(w * losses)

        return abs(float(jax.jit(jax.grad(mean))(0.0)))

    exact = "raw" if robust == "normalized" else "squared"
    assert max(gradient(law, exact) for law in (single, double)) < 1e-12
    assert gradient(single, robust) < 1e-12
    assert gradient(double, robust) > 1e-2
