"""Students trained from scratch on Gaussian data, progressive halving and reflow, against the exact flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flow_maps import LAW, MEAN, STD, average_velocity, flow_map, over_times, pairs

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


def train(loss, params, steps=4000, rate=0.02):
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


def distillation(n):
    teacher = solver_map(dj.heun(EDM), mixtures.denoiser(LAW, EDM))

    def loss(params, progress, x0, eps, t, s):
        return consistency_distillation_loss(edm_student(params), teacher, EDM, x0, t, s, eps) / t

    return weighted(EDM, steps_of(n), loss)


def training(n):
    def loss(params, progress, x0, eps, t, s):
        return consistency_training_loss(edm_student(params), EDM, x0, t, s, eps) / (t - s)

    return weighted(EDM, steps_of(n), loss)


def easy(n):
    def loss(params, progress, x0, eps, t):
        r = easy_mapping(t, jnp.floor(8 * progress))
        return consistency_training_loss(edm_student(params), EDM, x0, t, r, eps) / (t - r)

    return weighted(EDM, grid(n)[:-1, None], loss)


def continuous(teacher, normalize):
    def loss(params, progress, x0, eps, t):
        return continuous_consistency_loss(
            trig_student(params), TRIG, x0, t, eps, sigma_data=STD, teacher=teacher, normalize=normalize,
            warmup=jnp.minimum(1, 4 * progress),
        )

    return weighted(TRIG, np.polynomial.legendre.leggauss(16)[0][:, None] / 2 + 0.5, loss)


CONSISTENCY = {
    "distillation": (lambda: distillation(24), 5e-3),
    "training_24": (lambda: training(24), 0.1),
    "training_48": (lambda: training(48), 0.05),
    "easy": (lambda: easy(24), 0.02),
    "continuous_distillation": (lambda: continuous(mixtures.denoiser(LAW, TRIG), 0.1), 1e-3),
    "continuous_training": (lambda: continuous(None, 0.1), 1e-3),
}


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
