"""A denoiser of one schedule under another, against the exact denoiser of either; a learned uncertainty."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

import diffusion_jax as dj
from diffusion_jax.denoisers import reschedule
from diffusion_jax.evaluation import mixtures

LAW = mixtures.Mixture(np.array([0.3, 0.7]), np.array([[-1.0, 0.2], [0.8, 0.1]]), np.array([[0.04, 0.3], [0.25, 0.1]]))
NAMES = ("linear_betas", "cosine", "rectified", "edm", "sub_vp", "laplace")


@pytest.mark.parametrize(("old", "new"), [*itertools.pairwise((*NAMES, NAMES[0])), ("edm", "cosine")])
def test_rescheduled_denoiser_is_that_of_the_other_schedule(old, new):
    """At noise levels that both reach, a mixture's denoiser is moved exactly."""
    trained, schedule = CASES[old], CASES[new]
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2)))

        @jax.jit
        def both(x):
            value = jnp.linspace(4.0, -4.0, 5)
            t = dj.inverse_logsnr(schedule.schedule, value, schedule.end, schedule.start)
            moved = reschedule(
                mixtures.denoiser(LAW, trained.schedule),
                trained.schedule,
                schedule.schedule,
                trained.end,
                trained.start,
            )
            x = dj.bcast(jnp.hypot(*schedule.schedule(t)), x) * x
            return moved(x, t)[:2], mixtures.denoiser(LAW, schedule.schedule)(x, t)[:2]

        got, exact = both(x)
    np.testing.assert_allclose(got, exact, rtol=1e-7, atol=1e-8)


def test_beyond_the_trained_noise_levels():
    """A straight line begins without signal, a table of betas does not quite: x0 of its last time, and x = eps."""
    schedule, trained = dj.rectified(), dj.from_betas(dj.linear_betas(1000))
    denoiser = mixtures.denoiser(LAW, trained)
    x, t = jnp.asarray([[0.3, -1.2], [1.0, 0.4]]), jnp.asarray([1.0, 0.0])
    got = jax.jit(reschedule(denoiser, trained, schedule))(x, t)
    np.testing.assert_allclose(got.eps[0], x[0], rtol=1e-6)
    np.testing.assert_allclose(got.x0[0], denoiser(x, jnp.ones(2)).x0[0], rtol=1e-5)
    np.testing.assert_allclose(got.x0[1], x[1], rtol=1e-5)  # clean data on both
    assert np.all(np.isfinite(got.eps))


def test_sampling_with_another_schedule_reaches_the_same_flow():
    """A model of a beta table on the straight line, by Euler's method in the new time: the exact flow of a Gaussian."""
    law, schedule, trained = mixtures.gaussian(np.array([0.5]), np.array([0.09])), dj.rectified(), dj.vp_linear()
    x, times = jnp.asarray([[0.7], [-1.1]]), dj.uniform(200, 0.9, 0.05)
    moved = reschedule(mixtures.denoiser(law, trained), trained, schedule)
    got = jax.jit(lambda x: dj.sample(jax.random.key(0), dj.heun(schedule), moved, x, times))(x)
    np.testing.assert_allclose(got, mixtures.flow(law, schedule, x, jnp.float32(0.9), jnp.float32(0.05)), atol=2e-4)


def test_derivative_in_time_is_that_of_the_other_schedule():
    """What flow-map losses need: d/dt goes through the matched time too."""
    schedule, trained = dj.rectified(), dj.vp_linear()
    with jax.enable_x64(True):
        x, t = jnp.asarray([[0.3, -1.2], [1.0, 0.4]]), jnp.asarray([0.3, 0.8])
        moved = reschedule(mixtures.denoiser(LAW, trained), trained, schedule)
        got, exact = (
            jax.jit(lambda t, d=d: jax.jvp(lambda t: d(x, t)[:2], (t,), (jnp.ones(2),))[1])(t)
            for d in (moved, mixtures.denoiser(LAW, schedule))
        )
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def with_uncertainty(x, t, cond):
    """A network whose last channel is a number of each example's own level, at all pixels."""
    u = jnp.broadcast_to(dj.bcast(jnp.sin(3 * t), x), (*x.shape[:-1], 1))
    return jnp.concatenate([jnp.tanh(x) * (1 if cond is None else dj.bcast(cond, x)), u], axis=-1)


def test_uncertainty_is_split_off_and_changes_nothing_else():
    x, t, schedule = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), jnp.asarray([0.1, 0.4, 0.9]), dj.cosine()
    bare = dj.edm_precondition(lambda *a: with_uncertainty(*a)[..., :-1], schedule, 0.5)
    carrying = dj.edm_precondition(with_uncertainty, schedule, 0.5, uncertainty=True)
    plain, split = jax.jit(lambda x, t: (bare(x, t), carrying(x, t)))(x, t)
    assert plain.uncertainty is None
    np.testing.assert_array_equal(plain.x0, split.x0)
    np.testing.assert_array_equal(plain.eps, split.eps)
    alpha, sigma = (np.asarray(a) for a in schedule(t))
    np.testing.assert_allclose(split.uncertainty, np.sin(3 * np.log(sigma / alpha) / 4), rtol=1e-4)
    with pytest.raises(ValueError, match="the output has shape"):
        jax.eval_shape(dj.edm_precondition(with_uncertainty, schedule, 0.5), x[..., :1], t)


GUIDED = {
    "classifier_free": lambda d, scale: dj.classifier_free(d, 0.3, scale),
    "cfg_rescale": lambda d, scale: dj.cfg_rescale(d, dj.edm(), 0.3, scale, 0.7),
    "cfg_pp": lambda d, scale: dj.cfg_pp(d, 0.3, scale),
    "apg": lambda d, scale: dj.apg(d, dj.edm(), 0.3, scale, eta=0.0),
    "perpendicular": lambda d, scale: dj.perpendicular(d, 0.3, [0.7], scale, [0.5]),
    "two_conditions": lambda d, scale: dj.two_conditions(d, 0.7, 0.3, scale, 1.5),
    "autoguidance": lambda d, scale: dj.autoguidance(d, lambda x, t, c: d(x, t, c / 2), scale),
    "classifier": lambda d, scale: dj.classifier(d, dj.edm(), lambda x, t, c: -jnp.sum(x**2, (1, 2, 3)), scale),
    "static_threshold": lambda d, scale: dj.static_threshold(d, dj.edm()),
    "dynamic_threshold": lambda d, scale: dj.dynamic_threshold(d, dj.edm(), 0.9),
    "reschedule": lambda d, scale: reschedule(d, dj.edm(), dj.edm(), 0.01, 80.0),
}


@pytest.mark.parametrize("name", GUIDED)
def test_what_takes_denoisers_takes_one_with_an_uncertainty(name):
    """Traced with a scale of each level's own, so that both sides of every condition are seen."""
    x, t = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    denoiser = dj.edm_precondition(with_uncertainty, dj.edm(), 0.5, uncertainty=True)
    guided = GUIDED[name](denoiser, lambda t: jnp.where(t < 1, 1.0, 2.0))
    out = jax.eval_shape(guided, x, t, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert out.x0.shape == out.eps.shape == x.shape


def test_sampling_and_vectors_with_an_uncertainty():
    """A sampler's result does not depend on it; a denoiser of pytrees may carry it."""
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 1)), jnp.asarray([0.1, 1.0])
    split = dj.edm_precondition(with_uncertainty, dj.edm(), 0.5, uncertainty=True)
    plain = dj.edm_precondition(lambda *a: with_uncertainty(*a)[..., :-1], dj.edm(), 0.5)
    drawn = [
        jax.jit(lambda x, d=d: dj.sample(jax.random.key(0), dj.heun(dj.edm()), d, 80 * x, dj.karras(3)))(x)
        for d in (split, plain)
    ]
    np.testing.assert_allclose(*drawn, rtol=1e-5)
    flat, ravel, _ = dj.ravelled(split, x[0])
    pair = jax.jit(lambda x, t: (flat(ravel(x), t).x0, ravel(plain(x, t).x0)))(x, t)
    np.testing.assert_allclose(*pair, rtol=1e-6)


def test_dtypes_and_what_is_dropped():
    """bfloat16 x with a float32 schedule; a learned variance does not survive."""

    def net(x, t, cond):
        return jnp.concatenate([x, x], -1)

    inner = dj.parameterize(net, dj.cosine(), "v", learned_variance=True)
    x, t = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32)
    out = jax.eval_shape(reschedule(inner, dj.cosine(), dj.rectified()), x, t)
    assert out.x0.shape == out.eps.shape == x.shape and out.x0.dtype == out.eps.dtype == jnp.bfloat16
    assert out.variance_fraction is None
