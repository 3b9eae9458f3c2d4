"""Students trained from scratch on Gaussian data, progressive halving and reflow, against the exact flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow_maps import LAW, MEAN, STD, flow_map, over_times

import diffusion_jax as dj
from diffusion_jax.distill import (
    average_velocity_map,
    consistency_distillation_loss,
    consistency_precondition,
    consistency_training_loss,
    continuous_consistency_loss,
    easy_mapping,
    improved_mean_flow_loss,
    mean_flow_loss,
    optimal_transport_coupling,
    progressive_distillation_loss,
    reflow_pairs,
    shortcut_loss,
    solver_map,
)
from diffusion_jax.evaluation import mixtures


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def powers(u, degree):
    """Chebyshev polynomials of u in [0, 1], by their recurrence: f[b] -> f[b degree + 1]."""
    columns = [jnp.ones_like(u), 2 * u - 1]
    while len(columns) <= degree:
        columns.append(2 * (2 * u - 1) * columns[-1] - columns[-2])
    return jnp.stack(columns, axis=1)


def affine(features, params, x):
    """A model linear in x: f[b k], f[k 2] -> f[b 1]."""
    slope, offset = (features @ params).T
    return slope[:, None] * x + offset[:, None]


def train(loss, params, steps=6000, rate=0.05):
    """Adam with a cosine decay on (params, progress in [0, 1]) -> f[]; one scan."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def body(carry, i):
        params, state = carry
        gradient = jax.grad(loss)(params, i / steps)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integers
            updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(body, (p, optimizer.init(p)), jnp.arange(float(steps)))[0][0])
    return run(params)


# --- consistency models, in EDM's time and in TrigFlow's --------------------------------------------------------------

EDM, TRIG, DEGREE = dj.edm(), dj.cosine(0.0), 6
TOP = 0.98  # of the angle atan(sigma / STD) in units of a right angle


def edm_student(params):
    def net(x, noise, cond):
        return affine(powers(jnp.arctan(jnp.exp(4 * noise) / STD) * 2 / np.pi, DEGREE), params, x)

    return consistency_precondition(net, EDM, 0.0, STD)


def trig_student(params):
    return dj.parameterize(lambda x, t, cond: affine(powers(t, DEGREE), params, x), TRIG, "v")


def grid(n):
    """n steps of noise levels, equal in angle, from TOP to 0."""
    return STD * jnp.tan(jnp.linspace(TOP, 0, n + 1) * np.pi / 2)


def weighted(schedule, times, loss):
    x0, eps, columns, w = over_times(schedule, times)
    return lambda params, progress: jnp.sum(w * loss(params, progress, x0, eps, *columns))


def steps_of(n):
    levels = grid(n)
    return jnp.stack([levels[:-1], levels[1:]], axis=1)


def per_angle(t, s):
    """A weight by which all steps are learned about equally fast."""
    return 1 / (t * (jnp.arctan(t / STD) - jnp.arctan(s / STD)))


def distillation(n):
    teacher = solver_map(dj.heun(EDM), mixtures.denoiser(LAW, EDM))

    def loss(params, progress, x0, eps, t, s):
        return per_angle(t, s) * consistency_distillation_loss(edm_student(params), teacher, EDM, x0, t, s, eps)

    return weighted(EDM, steps_of(n), loss)


def training(n):
    def loss(params, progress, x0, eps, t, s):
        return per_angle(t, s) * consistency_training_loss(edm_student(params), EDM, x0, t, s, eps)

    return weighted(EDM, steps_of(n), loss)


def easy():
    def loss(params, progress, x0, eps, t):
        r = easy_mapping(t, jnp.floor(5 * progress))
        return consistency_training_loss(edm_student(params), EDM, x0, t, r, eps) / (t - r)

    return weighted(EDM, grid(16)[:-1, None], loss)


def continuous(teacher):
    def loss(params, progress, x0, eps, t):
        return continuous_consistency_loss(
            trig_student(params),
            TRIG,
            x0,
            t,
            eps,
            sigma_data=STD,
            teacher=teacher,
            warmup=jnp.minimum(1, 4 * progress),
            log_weight=-jnp.log(TRIG(t).alpha),
        )

    return weighted(TRIG, np.polynomial.legendre.leggauss(16)[0][:, None] / 2 + 0.5, loss)


# name -> (loss, largest error). What is left is the bias of the last step, and for the others the basis.
CONSISTENCY = {
    "distillation": (lambda: distillation(24), 0.02),
    "training_24": (lambda: training(24), 0.11),
    "training_48": (lambda: training(48), 0.055),
    "easy": (easy, 0.15),
    "continuous_distillation": (lambda: continuous(mixtures.denoiser(LAW, TRIG)), 0.002),
    "continuous_training": (lambda: continuous(None), 0.002),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSISTENCY)
def test_trained_consistency_models_are_the_exact_function(name, x64):
    """The largest error of f, in standard deviations of the data, over x_t within 2 deviations and all noise levels."""
    make, tolerance = CONSISTENCY[name]
    schedule, student = (TRIG, trig_student) if name.startswith("continuous") else (EDM, edm_student)
    params = train(make(), jnp.zeros((DEGREE + 1, 2)))
    t = jnp.linspace(0.1, 0.95, 9) if schedule is TRIG else grid(10)[:-1]
    worst = 0.0
    for z in (-2.0, 0.0, 2.0):
        alpha, sigma = schedule(t)
        x = (alpha * MEAN + z * jnp.sqrt((alpha * STD) ** 2 + sigma**2))[:, None]
        exact = flow_map(LAW, schedule)(x, t, jnp.zeros_like(t))
        worst = max(worst, float(jnp.max(jnp.abs(student(params)(x, t).x0 - exact))) / STD)
    print(f"{name}: {worst:.1e}")
    assert worst < tolerance


# --- average velocities -----------------------------------------------------------------------------------------------

ORDER = 4


def two_times(n=100, same=20):
    """n pairs s < t, spread over the triangle, and some s = t."""
    rng = np.random.default_rng(0)
    t, s = np.sort(rng.uniform(0, 1, (n, 2)), axis=1)[:, ::-1].T
    level = (np.arange(same) + 0.5) / same
    return np.stack([np.append(t, level), np.append(s, level)], axis=1)


def products(t, s):
    """Products of powers of t and of s, of total degree ORDER."""
    i, j = np.array([(i, j) for i in range(ORDER + 1) for j in range(ORDER + 1 - i)]).T
    return powers(t, ORDER)[:, i] * powers(s, ORDER)[:, j]


def velocity_student():
    """params -> average velocity; the features are made orthonormal over the times of training."""
    features = np.asarray(products(*jnp.asarray(two_times()).T))
    whiten = jnp.asarray(np.linalg.inv(np.linalg.cholesky(features.T @ features / len(features))).T)
    return lambda params: lambda x, t, s, cond=None: affine(products(t, s) @ whiten, params, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "tolerance"), [(mean_flow_loss, 0.004), (improved_mean_flow_loss, 0.004), (shortcut_loss, 0.008)]
)
def test_trained_average_velocities_are_exact(loss, tolerance, x64):
    """The largest error of x_s, in standard deviations of the data, over jumps of all lengths, one step among them."""
    student = velocity_student()
    mean = weighted(TRIG, two_times(), lambda p, _, x0, eps, t, s: loss(student(p), TRIG, x0, t, s, eps))
    params = train(mean, jnp.zeros(((ORDER + 1) * (ORDER + 2) // 2, 2)), steps=2000)
    t, s = (jnp.asarray(a) for a in ([1.0, 1.0, 0.8, 0.5, 0.9], [0.0, 0.5, 0.1, 0.3, 0.85]))
    worst = 0.0
    for z in (-2.0, 0.0, 2.0):
        alpha, sigma = TRIG(t)
        x = (alpha * MEAN + z * jnp.sqrt((alpha * STD) ** 2 + sigma**2))[:, None]
        error = average_velocity_map(student(params))(x, t, s) - flow_map(LAW, TRIG)(x, t, s)
        worst = max(worst, float(jnp.max(jnp.abs(error))) / STD)
    print(f"{loss.__name__}: {worst:.1e}")
    assert worst < tolerance


# --- progressive distillation -----------------------------------------------------------------------------------------

N = 16


def table_denoiser(schedule, slopes, offsets):
    """x0 = slope x + offset, looked up at the times i / N."""

    def denoiser(x, t, cond=None):
        i = jnp.round(t * N).astype(jnp.int32)
        return dj.from_x0(schedule, x, t, dj.bcast(slopes[i], x) * x + dj.bcast(offsets[i], x))

    return denoiser


def halve(schedule, teacher, steps, target):
    """The student of `steps` steps that minimises the loss: quadratic in its table, so one Newton step is exact."""
    t = np.arange(N, 0, -(N // steps)) / N
    x0, eps, (t, s), w = over_times(schedule, np.stack([t, t - 1 / steps], axis=1))

    def mean(table):
        student = table_denoiser(schedule, table[: N + 1], table[N + 1 :])
        losses = progressive_distillation_loss(student, teacher, schedule, x0, t, s, eps, target=target)
        return jnp.sum(w * losses)

    start = jnp.zeros(2 * N + 2)

    @jax.jit
    def minimum(p):
        table = p - jnp.linalg.lstsq(jax.hessian(mean)(p), jax.grad(mean)(p), rcond=1e-12)[0]
        return table, mean(table)

    table, least = minimum(start)
    assert float(least) < 1e-18
    return table_denoiser(schedule, table[: N + 1], table[N + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), [("rectified", "v"), ("cosine", "x0")])
def test_progressive_halving_keeps_the_teachers_map(name, target, x64):
    """16 -> 8 -> 4 -> 2 -> 1: a linear student can follow each teacher exactly, so that one step is the first 16."""
    schedule = {"rectified": dj.rectified(), "cosine": dj.cosine(0.0)}[name]
    first = mixtures.denoiser(LAW, schedule)
    x = jnp.asarray([[-1.5], [0.2], [2.0]])

    def drawn(model, steps):
        times = jnp.linspace(1, 0, steps + 1)
        return jax.jit(lambda x: dj.sample(jax.random.key(0), dj.ddim(schedule), model, x, times))(x)

    model, exact = first, drawn(first, N)
    for steps in (8, 4, 2, 1):
        model = halve(schedule, model, steps, target)
        np.testing.assert_allclose(drawn(model, steps), exact, rtol=1e-8)
    assert float(jnp.max(jnp.abs(exact - flow_map(LAW, schedule)(x, jnp.ones(3), jnp.zeros(3))))) > 1e-3


# --- reflow -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reflow_of_a_gaussian_is_straight(x64):
    """Lines of pairs do not cross: the right student has no loss at any t, and one Euler step is the teacher's flow."""
    schedule, eps = dj.rectified(), jnp.asarray(np.random.default_rng(0).standard_normal((64, 1)))
    x0, same = reflow_pairs(flow_map(LAW, schedule), schedule, eps)
    np.testing.assert_allclose(x0, MEAN + STD * eps, rtol=1e-12)
    assert same is eps

    def student(x, t, cond=None):
        t = dj.bcast(t, x)
        noise = (x - (1 - t) * MEAN) / ((1 - t) * STD + t)
        return dj.Prediction(MEAN + STD * noise, noise)

    t = jnp.linspace(0.01, 1, 64)
    losses = dj.denoising_loss(student, schedule, x0, t, eps, target="velocity")
    independent = dj.denoising_loss(student, schedule, x0[::-1], t, eps, target="velocity")
    assert float(jnp.max(losses)) < 1e-20 and float(jnp.mean(independent)) > 0.1
    step = solver_map(dj.euler(schedule), student)(eps, jnp.ones(64), jnp.zeros(64))
    np.testing.assert_allclose(step, x0, rtol=1e-10)


def test_couplings_cost_less_than_independence_and_keep_the_law():
    """Mean |x0 - eps|^2 of a mixture: independent > reflow and minibatch transport (Liu et al. 2023, theorem 3.5)."""
    schedule, rng, n = dj.rectified(), np.random.default_rng(0), 512
    law = mixtures.Mixture(np.array([0.3, 0.7]), np.array([[2.0, 0.0], [-1.0, 0.5]]), np.full((2, 2), 0.1))
    eps = jnp.asarray(rng.standard_normal((n, 2)), jnp.float32)
    teacher = solver_map(dj.heun(schedule), mixtures.denoiser(law, schedule), 64)
    x0, _ = jax.jit(lambda eps: reflow_pairs(teacher, schedule, eps))(eps)
    mean, covariance = mixtures.moments(law)
    independent = np.trace(covariance) + mean @ mean + 2
    np.testing.assert_allclose(np.mean(x0, axis=0), mean, atol=4 * np.sqrt(covariance.max() / n))
    np.testing.assert_allclose(np.cov(np.asarray(x0).T), covariance, atol=0.3)
    reflow = float(jnp.mean(jnp.sum((x0 - eps) ** 2, axis=1)))
    fresh = jnp.asarray(mixtures.draw(rng, law, n), jnp.float32)
    transport = float(jnp.mean(jnp.sum((fresh - optimal_transport_coupling(fresh, eps)) ** 2, axis=1)))
    print(f"independent {independent:.2f}, reflow {reflow:.2f}, transport of {n} {transport:.2f}")
    assert reflow < 0.7 * independent and transport < 0.7 * independent


@pytest.mark.slow
def test_reflow_pairs_converge_with_the_solver(x64):
    """Pairs of a numerical teacher approach the exact ones with its order, 2 for Heun."""
    schedule, eps = dj.rectified(), jnp.asarray([[-1.0], [0.5], [2.0]])
    exact = reflow_pairs(flow_map(LAW, schedule), schedule, eps)[0]

    def error(n):
        teacher = solver_map(dj.heun(schedule), mixtures.denoiser(LAW, schedule), n)
        return float(jnp.max(jnp.abs(reflow_pairs(teacher, schedule, eps, end=0.01)[0] - at_end)))

    at_end = flow_map(LAW, schedule)(eps, jnp.ones(3), jnp.full(3, 0.01))
    assert float(jnp.max(jnp.abs(at_end - exact))) > 1e-3
    order = np.log2(error(64) / error(128))
    assert abs(order - 2) < 0.1, order
