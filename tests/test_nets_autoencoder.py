"""The KL autoencoder: its sizes, the law of its latents, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.nets import count, layers
from diffusion_jax.nets.autoencoder import Gaussian, draw_latent, kl_autoencoder, kl_to_standard, sd_vae
from diffusion_jax.nets.unet import Resample
from diffusion_jax.typing import InputError

TINY = {"widths": (8, 16), "blocks": 1, "latent": 2, "groups": 4}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def tiny():
    """The compiled functions of a tiny autoencoder, and its parameters."""
    autoencoder = kl_autoencoder(**TINY)
    compiled = autoencoder._replace(encode=jax.jit(autoencoder.encode), decode=jax.jit(autoencoder.decode))
    return compiled, autoencoder.init(jax.random.key(0))


def test_stable_diffusions_autoencoder_has_its_published_size():
    # 83.65M in the model cards of stabilityai/sd-vae-ft-mse and CompVis/stable-diffusion; diffusers' own module has
    # the same number of weights (tests/parity).
    vae = sd_vae()
    params = jax.eval_shape(vae.init, jax.random.key(0))
    assert count(params) == 83_653_863
    q = jax.eval_shape(vae.encode, params, jax.ShapeDtypeStruct((1, 256, 512, 3), jnp.float32))
    assert q.mean.shape == q.logvar.shape == (1, 32, 64, 4)
    x = jax.eval_shape(vae.decode, params, jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32))
    assert x.shape == (1, 256, 256, 3)


@pytest.mark.slow
def test_each_half_needs_only_its_own_parameters(tiny):
    autoencoder, params = tiny
    left = {name: params[name] for name in ("encoder", "quant_conv")}
    right = {name: params[name] for name in ("decoder", "post_quant_conv")}
    assert {**left, **right}.keys() == params.keys()
    q = autoencoder.encode(left, X)
    assert q.mean.shape == (2, 4, 6, 2)
    assert autoencoder.decode(right, q.mean).shape == X.shape
    with pytest.raises(ValueError, match="lack decoder"):
        autoencoder.decode(left, q.mean)


@pytest.mark.slow
def test_computing_in_bfloat16_gives_float32_close_by(tiny):
    params = tiny[1]
    q, half = tiny[0].encode(params, X), jax.jit(kl_autoencoder(**TINY, dtype=jnp.bfloat16).encode)(params, X)
    assert half.mean.dtype == half.logvar.dtype == jnp.float32
    np.testing.assert_allclose(half.mean, q.mean, atol=0.05 * float(jnp.abs(q.mean).max()))
    assert float(jnp.abs(half.mean - q.mean).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(tiny, policy):
    params, z = tiny[1], jnp.ones((1, 2, 2, 2))

    def gradient(remat):
        decode = kl_autoencoder(**TINY, remat=remat).decode
        return jax.make_jaxpr(jax.grad(lambda p: jnp.sum(decode(p, z) ** 2)))(params), decode

    (plain, kept), (again, remade) = gradient("none"), gradient(policy)
    assert len(str(again)) > len(str(plain))  # something is computed again
    np.testing.assert_allclose(jax.jit(remade)(params, z), jax.jit(kept)(params, z), rtol=1e-5, atol=1e-6)


def test_downsampling_pads_after_and_not_before():
    """Which outputs of a 3x3 window of ones, moved by 2, see one lit pixel: window i covers rows 2 i to 2 i + 2."""
    resample = Resample(nnx.Rngs(0), 1, layers.Options(1, 1, 0.0, jnp.float32), up=False)
    resample.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    for pixel, seen in ((0, [[1, 0], [0, 0]]), (2, [[1, 1], [1, 1]]), (3, [[0, 0], [0, 1]])):
        lit = np.zeros((1, 4, 4, 1), np.float32)
        lit[0, pixel, pixel, 0] = 1
        np.testing.assert_array_equal(resample(jnp.asarray(lit))[0, :, :, 0], seen)


def test_latents_have_the_law_of_their_gaussian():
    q = Gaussian(jnp.full((20_000, 2), 0.5), jnp.broadcast_to(jnp.log(jnp.array([[4.0, 0.25]])), (20_000, 2)))
    z = draw_latent(jax.random.key(0), q)
    np.testing.assert_allclose(z.mean(0), [0.5, 0.5], atol=0.06)
    np.testing.assert_allclose(z.std(0), [2.0, 0.5], rtol=0.03)
    keys = jax.random.split(jax.random.key(1), 20_000)
    np.testing.assert_array_equal(
        draw_latent(keys, q)[5:7], draw_latent(keys[5:7], Gaussian(q.mean[5:7], q.logvar[5:7]))
    )


@pytest.mark.slow
def test_the_divergence_is_the_mean_log_ratio():
    q = Gaussian(jnp.full((1, 3), 0.7), jnp.full((1, 3), -0.4))
    z = draw_latent(jax.random.key(0), Gaussian(*(jnp.broadcast_to(m, (200_000, 3)) for m in q)))
    log_q = -0.5 * ((z - 0.7) ** 2 * jnp.exp(0.4) - 0.4)
    estimate = jnp.mean(jnp.sum(log_q + 0.5 * z**2, axis=1))
    np.testing.assert_allclose(kl_to_standard(q)[0], estimate, rtol=0.02)
    assert kl_to_standard(Gaussian(jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)))).tolist() == [0.0, 0.0]


def test_log_variances_are_clipped(tiny):
    autoencoder, params = tiny
    large = jax.tree.map(lambda leaf: leaf, params)
    large["quant_conv"] = {name: 1e6 * jnp.ones_like(leaf) for name, leaf in params["quant_conv"].items()}
    logvar = autoencoder.encode(large, X).logvar
    assert float(logvar.max()) <= 20.0
    assert float(logvar.min()) >= -30.0


def test_what_it_refuses(tiny):
    autoencoder, params = tiny
    for bad in (X[:, :7], X[..., :2], X[0]):
        with pytest.raises(ValueError, match="divisible by 2"):
            autoencoder.encode(params, bad)
    with pytest.raises(ValueError, match=r"z must be \[b h w 2\]"):
        autoencoder.decode(params, jnp.zeros((1, 4, 4, 3)))
    for options in ({"widths": ()}, {"blocks": 0}, {"widths": (8, 9)}, {"latent": 0}):
        with pytest.raises(InputError):
            kl_autoencoder(**{**TINY, **options})
