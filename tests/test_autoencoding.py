"""Training the autoencoder of latent diffusion: who learns from what, and that it learns."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anywhere import params_like

from diffusion_jax.experiment import find_experiment, initial_state, loss_fn
from diffusion_jax.nets.autoencoder import kl_autoencoder, kl_to_standard
from diffusion_jax.nets.discriminator import feature_distance, hinge, patch_discriminator
from diffusion_jax.nets.vq import vq_autoencoder
from diffusion_jax.systems.autoencoding import (
    Weights,
    absorbed,
    balance,
    beside_their_originals,
    objective,
    with_discriminator,
)
from diffusion_jax.training.data import prepare
from diffusion_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 1)), jnp.float32)
T = jnp.zeros(2)
VAE = kl_autoencoder(widths=(8, 8), blocks=1, channels=1, latent=2)
JUDGE = patch_discriminator(1, width=8, depth=1)
WEIGHTS = Weights(features=0.7, rate=0.02, adversarial=0.5, start=10)
fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def by_hand(inner, judge, x, weights, w):
    """Equations (1) and (2) with lambda as a number: the loss of the autoencoder alone."""
    phi = JUDGE.apply(judge, x, T).features

    def kept(y):
        return jnp.mean(jnp.abs(y - x)) + weights.features * feature_distance(JUDGE.apply(judge, y, T).features, phi)

    def fooled(y):
        return -jnp.mean(JUDGE.apply(judge, y, T).logits)

    q = VAE.encode(inner, x)
    decoded = VAE.decode(inner, q.mean)
    first, second = (jax.grad(f)(jax.lax.stop_gradient(decoded)) for f in (kept, fooled))
    share = w * jnp.sqrt(jnp.sum(first**2)) / jnp.sqrt(jnp.sum(second**2))
    return kept(decoded) + weights.rate * jnp.mean(kl_to_standard(q)) / x[0].size + share * fooled(decoded)


@pytest.fixture(scope="module")
def gradients():
    """step -> (gradients of the whole objective, those of each part by itself, by w)."""
    params = params_like(with_discriminator(VAE, JUDGE).init)

    def of_all(params, step):
        network = partial(with_discriminator(VAE, JUDGE).apply, params)
        return jnp.mean(objective(WEIGHTS)(jax.random.key(0), network, X, None, step=step))

    def of_judge(judge):
        decoded = VAE.decode(params["autoencoder"], VAE.encode(params["autoencoder"], X).mean)
        return hinge(JUDGE.apply(judge, X, T).logits, JUDGE.apply(judge, decoded, T).logits)

    def of_inner(inner, w):
        return by_hand(inner, params["discriminator"], X, WEIGHTS, w)

    whole = fast(jax.grad(of_all))
    apart = fast(lambda w: (jax.grad(of_inner)(params["autoencoder"], w), jax.grad(of_judge)(params["discriminator"])))
    return lambda step: whole(params, jnp.int32(step)), lambda w: apart(jnp.float32(w))


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), a, b)


@pytest.mark.slow
def test_each_of_the_two_learns_from_its_own_loss_alone(gradients):
    whole, apart = gradients
    found, (inner, judge) = whole(WEIGHTS.start), apart(WEIGHTS.adversarial)
    same(found["autoencoder"], inner)
    same(found["discriminator"], judge)
    assert all(np.any(leaf) for part in ("convs", "norms") for leaf in jax.tree.leaves(judge[part]))


@pytest.mark.slow
def test_before_its_start_the_discriminator_learns_and_is_not_obeyed(gradients):
    whole, apart = gradients
    found, (inner, judge) = whole(WEIGHTS.start - 1), apart(0.0)
    same(found["autoencoder"], inner)
    same(found["discriminator"], judge)
    later = whole(WEIGHTS.start)["autoencoder"]["decoder"]["conv_out"]["kernel"]
    assert np.max(np.abs(later - inner["decoder"]["conv_out"]["kernel"])) > 1e-3


def test_balance_is_the_ratio_of_the_gradients_and_has_none():
    a, b, x = jnp.asarray([3.0, 4.0]), jnp.asarray([0.0, 2.0]), jnp.ones(2)

    def ratio(x, scale=1.0):
        return balance(lambda y: jnp.sum(a * y) + 7.0, lambda y: scale * jnp.sum(b * y), x)

    assert float(ratio(x)) == pytest.approx(2.5, rel=1e-5)
    assert float(ratio(x, 0.0)) == 1e4
    assert jax.grad(lambda x: balance(lambda y: jnp.sum(y**2), lambda y: jnp.sum(y**3), x))(x).tolist() == [0.0, 0.0]


@pytest.mark.slow
def test_a_codebook_stands_for_the_gaussian():
    vq = vq_autoencoder(widths=(8, 8), blocks=1, channels=1, latent=2, codes=6)
    net = with_discriminator(vq, JUDGE)
    params = params_like(net.init)

    @fast
    def both(params):
        inner = params["autoencoder"]
        z = vq.encode(inner, X)
        found = vq.quantize(inner, z)
        seen = net.apply(params, X, T)
        return (seen.decoded, seen.rate), (vq.decode(inner, found.z), found.codebook + 0.25 * found.commitment), (
            absorbed(vq).encode(inner, X), z, absorbed(vq).decode(inner, z))  # fmt: skip

    seen, wanted, (q, z, decoded) = both(params)
    same(seen, wanted)
    np.testing.assert_array_equal(q.mean, z)
    assert np.max(q.logvar) <= -30
    np.testing.assert_allclose(decoded, wanted[0], atol=1e-6)


def test_pictures_lie_beside_what_comes_back():
    x, y = jnp.zeros((2, 3, 4, 1)), jnp.ones((2, 3, 4, 1))
    both = beside_their_originals(x, y)
    assert both.shape == (2, 3, 8, 1)
    assert not np.any(both[:, :, :4]) and np.all(both[:, :, 4:])


@pytest.mark.slow
@pytest.mark.parametrize("codes", [0, 16])
def test_a_tiny_one_learns(monkeypatch, codes):
    """The experiment itself, on emoji of 16 x 16 pixels: what comes back is nearer, and is what is drawn."""
    monkeypatch.chdir(ROOT)
    experiment = find_experiment("autoencoder")(
        data="emoji", size=16, width=8, codes=codes, steps=40, batch=8, learning_rate=5e-3, warmup=5, start=30
    )
    images = experiment.data().train["image"]
    rng = np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = fast(make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema, staged=True))
        draw = fast(experiment.drawing)
        state, errors = initial_state(experiment), []
        keys = jax.random.split(jax.random.key(0), 8)
        for _ in range(2):
            shown = np.asarray(draw(state.params, keys, None))
            errors.append(np.abs(shown[:, :, 16:] - shown[:, :, :16]).mean())
            for _ in range(40):
                rows = rng.integers(0, len(images), 8)
                state, metrics = step(state, {"image": images[rows]})
                assert np.isfinite(metrics["loss"])
    assert shown.shape == (8, 16, 32, 3)
    held_out = np.asarray(prepare(jnp.asarray(experiment.data().test["image"])))
    assert all(np.abs(held_out - one[None, :, :16]).max((1, 2, 3)).min() == 0 for one in shown)
    assert errors[1] < 0.75 * errors[0]
