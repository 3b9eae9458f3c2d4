"""The hub: every parameterization into (x0, eps) and back, over every schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion_jax as dj
from diffusion_jax.predictions import FROM, TO, lookup

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)


@functools.cache
def round_trip(name):
    """x0, eps, t -> for each of the five quantities, the prediction recovered from it and from x_t."""
    schedule = CASES[name].schedule

    @jax.jit
    def compute(x0, eps, t):
        x, truth = dj.q_sample(schedule, x0, t, eps), dj.Prediction(x0, eps)
        back = {k: FROM[k](schedule, x, t, TO[k](schedule, truth, t))[:2] for k in FROM}
        (alpha, sigma), rate = schedule(t), dj.rates(schedule, t)
        return x, back, {k: TO[k](schedule, truth, t) for k in TO}, (alpha, sigma, *rate)

    return compute


@pytest.mark.parametrize("name", CASES)
@quick
@given(data=st.data())
def test_round_trips_and_definitions(name, data):
    case = CASES[name]
    number = st.floats(-3, 3, width=32)
    x0, eps = (np.array(data.draw(st.lists(number, min_size=3, max_size=3)))[None] for _ in range(2))
    time = data.draw(st.floats(case.low, case.high))
    with jax.enable_x64(True):
        x, back, to, (a, s, da, ds) = jax.tree.map(
            np.asarray, round_trip(name)(jnp.asarray(x0), jnp.asarray(eps), jnp.asarray([time]))
        )
    scale = 1e-9 * max(1.0, s[0] / a[0], a[0] / s[0])
    for got_x0, got_eps in back.values():
        np.testing.assert_allclose(got_x0, x0, atol=10 * scale)
        np.testing.assert_allclose(got_eps, eps, atol=10 * scale)
        np.testing.assert_allclose(a * got_x0 + s * got_eps, x, atol=10 * scale * max(1.0, s[0]))
    np.testing.assert_allclose(to["score"], -(x - a * x0) / s**2, atol=1e-9 / s[0] ** 2)
    np.testing.assert_allclose(to["v"], a * eps - s * x0, atol=1e-12 * (1 + s[0]))
    np.testing.assert_allclose(to["velocity"], da * x0 + ds * eps, rtol=1e-9, atol=1e-9)


def test_v_is_the_derivative_with_respect_to_the_angle():
    """Salimans & Ho: for (cos, sin), v = d x / d angle, so the velocity of cosine(0) is pi / 2 v."""
    x0, eps, t = jnp.asarray([[0.4]]), jnp.asarray([[-1.1]]), jnp.asarray([0.3])
    prediction, schedule = dj.Prediction(x0, eps), dj.cosine(0.0)
    np.testing.assert_allclose(
        dj.to_velocity(schedule, prediction, t), np.pi / 2 * dj.to_v(schedule, prediction, t), rtol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_ends_are_finite(name):
    """alpha = 0, sigma = 0: what x determines is exact, the undetermined half is a number."""
    schedule = CASES[name].schedule
    x = jnp.asarray([[0.5, -2.0], [1.0, 0.0]])

    @jax.jit
    def compute(t):
        return schedule(t), {k: f(schedule, x, t, 0.25 * x)[:2] for k, f in FROM.items()}

    for end in ("start", "end"):
        (alpha, sigma), back = compute(jnp.full((2,), getattr(CASES[name], end), jnp.float32))
        for kind, (x0, eps) in back.items():
            assert np.all(np.isfinite(x0)) and np.all(np.isfinite(eps)), kind
            if float(sigma[0]) == 0 and kind != "x0":
                np.testing.assert_allclose(x0, x, rtol=1e-6, err_msg=kind)
            if float(alpha[0]) == 0 and kind not in ("eps", "score"):
                np.testing.assert_allclose(eps, x, rtol=1e-6, err_msg=kind)


def test_bfloat16_x_with_a_float32_schedule():
    x, t = jax.ShapeDtypeStruct((2, 4), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.float32)

    def both(kind, x, t):
        prediction = FROM[kind](dj.cosine(), x, t, x)
        return prediction, TO[kind](dj.cosine(), prediction, t)

    for kind in FROM:
        for value in jax.tree.leaves(jax.eval_shape(functools.partial(both, kind), x, t)):
            assert value.dtype == jnp.bfloat16 and value.shape == (2, 4), kind


def test_parameterize():
    """All five readings of the same truth give the same denoiser; the network sees its own time; channels split."""
    schedule, seen = dj.cosine(), []
    x0, eps, t = jnp.asarray([[0.5, -0.5]]), jnp.asarray([[1.0, 0.2]]), jnp.asarray([0.25])
    x = dj.q_sample(schedule, x0, t, eps)
    for kind, to in TO.items():

        def net(x, time, cond, to=to):
            seen.append(float(time[0]))
            return to(schedule, dj.Prediction(x0, eps), t)

        prediction = dj.parameterize(net, schedule, kind, time=dj.discrete_time(1000))(x, t, None)
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-5)
        np.testing.assert_allclose(prediction.eps, eps, atol=1e-5)
    assert seen == [249.0] * 5
    learned = dj.parameterize(
        lambda x, t, c: jnp.concatenate([eps, jnp.asarray([[-1.0, 0.5]])], -1), schedule, "eps", learned_variance=True
    )(x, t, None)
    np.testing.assert_allclose(learned.variance_fraction, [[0.0, 0.75]])
    np.testing.assert_allclose(learned.x0, x0, atol=1e-5)


def test_bad_input():
    schedule = dj.rectified()
    with pytest.raises(ValueError, match="x0, eps, score, v, velocity"):
        lookup(FROM, "noise")
    with pytest.raises(ValueError, match="'flow'"):
        dj.parameterize(lambda x, t, c: x, schedule, "flow")
    x, t = jnp.ones((2, 4)), jnp.full(2, 0.5)
    for kind, convert in FROM.items():
        with pytest.raises(ValueError, match=rf"from_{kind}: the output has shape \(2, 1\), and x \(2, 4\)"):
            convert(schedule, x, t, x[:, :1])
        with pytest.raises(ValueError, match=rf"from_{kind}: t must be a scalar or \[b\] .*\(2, 4\), got shape \(4,\)"):
            convert(schedule, x, jnp.full(4, 0.5), x)
        with pytest.raises(ValueError, match=r"rectified: t must lie in \[0, 1\], got \[500\.0"):
            convert(schedule, x, 1000 * t, x)
    with pytest.raises(ValueError, match="returned"):
        dj.parameterize(lambda x, t, c: x[:, :1], schedule, "eps")(jnp.ones((2, 4)), jnp.ones(2), None)
