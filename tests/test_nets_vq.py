"""The autoencoder with a codebook: nearest rows, where gradients go, and its sizes and names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anywhere import params_like

from diffusion_jax.nets import count
from diffusion_jax.nets.vq import codebook, nearest, perplexity, quantized, vq_autoencoder
from diffusion_jax.typing import InputError
from diffusion_jax.weights.autoencoder import from_diffusers, to_diffusers

TINY: dict[str, Any] = {"widths": (8, 16), "blocks": 1, "latent": 4, "codes": 12, "code_width": 3, "groups": 4}
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Z, ROWS = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((2, 5, 4, 3), (12, 3)))
X = jnp.asarray(RNG.normal(size=(2, 8, 12, 3)), jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    return vq_autoencoder(**TINY), params_like(vq_autoencoder(**TINY).init)


def test_published_size():
    # The network of Rombach et al. 2022 with f = 4 and 8,192 rows of 3; diffusers' module has the same (tests/parity).
    ours = vq_autoencoder()
    params = jax.eval_shape(ours.init, KEY)
    assert count(params) == 55_322_782
    z = jax.eval_shape(ours.encode, params, jax.ShapeDtypeStruct((1, 256, 128, 3), jnp.float32))
    assert z.shape == (1, 64, 32, 3)
    assert jax.eval_shape(ours.decode, params, z).shape == (1, 256, 128, 3)


@pytest.mark.slow
def test_every_place_gets_its_nearest_row():
    distances = np.sum((np.asarray(Z)[..., None, :] - np.asarray(ROWS)) ** 2, axis=-1)
    q = quantized(Z, ROWS)
    np.testing.assert_array_equal(q.ids, distances.argmin(-1))
    np.testing.assert_allclose(q.z, ROWS[q.ids], atol=1e-6)
    np.testing.assert_allclose(q.codebook, distances.min(-1).mean(axis=(1, 2)) / 3, rtol=1e-5)
    np.testing.assert_array_equal(q.codebook, q.commitment)
    assert nearest(jnp.zeros((1, 3)), jnp.ones((4, 3))).tolist() == [0]


def test_gradients_go_where_they_should():
    """Through z_q to z as if nothing had happened; the losses to the rows alone and to z alone."""

    def parts(z, rows):
        q = quantized(z, rows)
        return jnp.sum(jnp.sin(q.z)), jnp.sum(q.codebook), jnp.sum(q.commitment)

    of_z, of_rows = jax.jit(jax.jacrev(parts, argnums=0))(Z, ROWS), jax.jit(jax.jacrev(parts, argnums=1))(Z, ROWS)
    e = ROWS[nearest(Z, ROWS)]
    np.testing.assert_allclose(of_z[0], jnp.cos(e), atol=1e-6)
    np.testing.assert_allclose(of_z[2], 2 * (Z - e) / (5 * 4 * 3), atol=1e-6)
    assert not np.any(of_z[1])
    assert not np.any(of_rows[0])
    assert not np.any(of_rows[2])
    assert np.any(of_rows[1])


def test_the_codebook_loss_is_k_means():
    """A step along its gradient, of the size that a row's share asks for, puts each row in the middle of its places."""
    ids, grad = nearest(Z, ROWS), jax.grad(lambda rows: jnp.sum(quantized(Z, rows).codebook))(ROWS)
    uses = np.bincount(np.ravel(ids), minlength=12)
    moved = np.asarray(ROWS) - np.asarray(grad) * (5 * 4 * 3) / (2 * np.maximum(uses, 1))[:, None]
    for row in np.flatnonzero(uses):
        np.testing.assert_allclose(moved[row], np.asarray(Z)[np.asarray(ids) == row].mean(0), atol=1e-5)


def test_perplexity_counts_the_rows_in_use():
    assert float(perplexity(jnp.zeros((3, 4), int), 8)) == pytest.approx(1.0)
    assert float(perplexity(jnp.arange(24) % 6, 8)) == pytest.approx(6.0, rel=1e-5)
    share = np.bincount([0, 0, 0, 1], minlength=2) / 4
    assert float(perplexity(jnp.array([0, 0, 0, 1]), 8)) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.slow
def test_there_and_back_by_parts(tiny):
    ours, params = tiny
    z = jax.jit(ours.encode)({name: params[name] for name in ("encoder", "quant_conv")}, X)
    q = ours.quantize({"quantize": params["quantize"]}, z)
    assert q.z.shape == (2, 4, 6, 3)
    np.testing.assert_allclose(q.z, codebook(params)[q.ids], atol=1e-6)
    x = jax.jit(ours.decode)({name: params[name] for name in ("decoder", "post_quant_conv")}, q.z)
    assert x.shape == X.shape
    with pytest.raises(ValueError, match="lack quantize"):
        ours.quantize({}, z)


@pytest.mark.slow
def test_starts_with_rows_near_zero():
    rows = codebook(vq_autoencoder(**TINY).init(KEY))
    assert rows.shape == (12, 3)
    assert 0.5 / 12 < np.max(np.abs(rows)) <= 1 / 12


def test_names_are_those_of_diffusers_and_come_back(tiny):
    params = tiny[1]
    state = to_diffusers(params)
    for name, shape in {
        "quantize.embedding.weight": (12, 3),
        "quant_conv.weight": (3, 4, 1, 1),
        "post_quant_conv.weight": (4, 3, 1, 1),
        "encoder.conv_out.weight": (4, 16, 3, 3),
        "decoder.conv_in.weight": (16, 4, 3, 3),
    }.items():
        assert state[name].shape == shape
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(state, params), params)


def test_what_it_refuses(tiny):
    ours, params = tiny
    for more in ({"codes": 0}, {"widths": ()}, {"widths": (8, 9)}, {"code_width": -1}):
        with pytest.raises(InputError):
            vq_autoencoder(**{**TINY, **more})
    with pytest.raises(ValueError, match="divisible by 2"):
        ours.encode(params, X[:, :7])
    for function in (ours.quantize, ours.decode):
        with pytest.raises(ValueError, match=r"z must be \[b h w 3\]"):
            function(params, jnp.zeros((1, 4, 4, 4)))
