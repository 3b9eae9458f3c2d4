"""The patch discriminator: its size, whom it judges by what, and its losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anywhere import params_like

from diffusion_jax.nets import count
from diffusion_jax.nets.discriminator import feature_distance, freeze, hinge, patch_discriminator
from diffusion_jax.typing import InputError

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 1)), jnp.float32)
T = jnp.zeros(2)


@pytest.fixture(scope="module")
def tiny():
    net = patch_discriminator(1, width=8, depth=2)
    return jax.jit(net.apply), params_like(net.init)


def test_published_size():
    # The 70 x 70 network of Zhu et al. 2017, whose normalization has no parameters, has 2,764,737.
    net = patch_discriminator()
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert count(params) == 2_764_737 + 2 * (128 + 256 + 512)
    x, t = jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    judged = jax.eval_shape(net.apply, params, x, t)
    assert judged.logits.shape == (2, 8, 4)
    assert [f.shape[1:] for f in judged.features] == [(32, 16, 64), (16, 8, 128), (8, 4, 256), (8, 4, 512)]


def test_examples_are_judged_by_themselves(tiny):
    apply, params = tiny
    judged, other = apply(params, X, T), apply(params, X.at[1].set(5.0), T)
    np.testing.assert_allclose(judged.logits[0], other.logits[0], atol=1e-6)
    assert np.max(np.abs(judged.logits[1] - other.logits[1])) > 1e-2


def test_hinge_wants_real_above_one_and_fake_below_minus_one():
    assert float(hinge(jnp.array([1.0, 7.0]), jnp.array([-1.0, -9.0]))) == 0.0
    assert float(hinge(jnp.array([0.5, -1.0]), jnp.array([-0.5, 2.0]))) == pytest.approx(0.5 * (2.5 / 2 + 3.5 / 2))
    grads = jax.grad(hinge, argnums=(0, 1))(jnp.array([0.0, 2.0]), jnp.array([0.0, -2.0]))
    assert [g.tolist() for g in grads] == [[-0.25, 0.0], [0.25, 0.0]]


def test_features_are_measured_against_their_size(tiny):
    apply, params = tiny
    a, b = apply(params, X, T).features, apply(params, X + 0.1, T).features
    assert float(feature_distance(a, a)) == 0.0
    distance = float(feature_distance(a, b))
    larger = [tuple(10 * f for f in features) for features in (a, b)]
    assert distance > 0
    np.testing.assert_allclose(feature_distance(*larger), distance, rtol=1e-4)


def test_frozen_parameters_pass_gradients_to_pictures_only(tiny):
    apply, params = tiny

    def score(params, x):
        return jnp.sum(apply(freeze(params), x, T).logits)

    of_params, of_x = jax.grad(score, argnums=(0, 1))(params, X)
    assert all(not np.any(g) for g in jax.tree.leaves(of_params))
    assert np.any(of_x)


def test_what_it_refuses():
    for more in ({"width": 6}, {"width": 0}, {"depth": 0}):
        with pytest.raises(InputError):
            patch_discriminator(**more)
