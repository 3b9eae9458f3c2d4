"""An autoencoder by tiles is the autoencoder itself where that looks no further than a tile shows, and has no seams."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image
from tiny_models import write_model

from diffusion_jax.generating.loading import load_model, read_files
from diffusion_jax.nets import layers, tiles
from diffusion_jax.nets.autoencoder import Autoencoder, Gaussian, kl_autoencoder
from diffusion_jax.nets.tiles import tiled
from diffusion_jax.systems import stable_diffusion as sd
from diffusion_jax.typing import InputError

TILE, OVERLAP = 32, 16
"""Pixels. Latents are two of them wide, so that the two latents at a tile's edge do not count."""


def local():
    """Convolutions that look at two latents around at most, and take no statistics."""
    shapes = {"down": (3, 3, 3, 4), "moments": (3, 3, 4, 4), "up": (3, 3, 2, 4), "out": (3, 3, 4, 3)}

    def init(key):
        return {name: 0.3 * jax.random.normal(key, shape) for name, shape in shapes.items()}

    def encode(params, x):
        moments = layers.conv(jnp.tanh(layers.conv(x, params["down"], 2)), params["moments"])
        return Gaussian(*jnp.split(moments, 2, axis=-1))

    def decode(params, z):
        return layers.conv(jnp.tanh(layers.conv(layers.upsample(z), params["up"])), params["out"])

    return Autoencoder(init, encode, decode)


def toned():
    """Pixels themselves, less a third of the mean of all that is seen: tiles differ in tone and in nothing else."""

    def shifted(x):
        return x - jnp.mean(x, axis=(1, 2), keepdims=True) / 3

    return Autoencoder(
        lambda key: {}, lambda params, x: Gaussian(shifted(x), jnp.zeros_like(x)), lambda params, z: shifted(z)
    )


PLAIN, TILED = local(), tiled(local(), TILE, OVERLAP, factor=2)
PARAMS = PLAIN.init(jax.random.key(0))
SIZE = (70, 100)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("size", [(34, 32), SIZE, (20, 90)])
def test_it_is_the_autoencoder_itself_where_that_looks_no_further_than_the_overlap(size):
    x = drawn(2, *size, 3)
    q, wanted = TILED.encode(PARAMS, x), PLAIN.encode(PARAMS, x)
    np.testing.assert_allclose(q.mean, wanted.mean, atol=1e-5)
    np.testing.assert_allclose(q.logvar, wanted.logvar, atol=1e-5)
    np.testing.assert_allclose(TILED.decode(PARAMS, q.mean), PLAIN.decode(PARAMS, q.mean), atol=1e-5)


def test_and_not_where_it_looks_further():
    narrow, x = tiled(local(), TILE, 4, factor=2), drawn(1, *SIZE, 3)
    assert np.abs(narrow.encode(PARAMS, x).mean - PLAIN.encode(PARAMS, x).mean).max() > 1e-2


def test_its_gradient_is_that_of_the_autoencoder():
    x = drawn(1, *SIZE, 3)

    def loss(autoencoder, params, x):
        return jnp.sum(jnp.square(autoencoder.decode(params, autoencoder.encode(params, x).mean)))

    found, wanted = (jax.jit(jax.grad(lambda p, x, a=a: loss(a, p, x), (0, 1)))(PARAMS, x) for a in (TILED, PLAIN))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, wanted)


@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 30), st.sampled_from([1, 2, 8]))
@settings(max_examples=100, deadline=None)
def test_tiles_cover_an_axis_and_count_one_in_all(n, overlap, more, pixels):
    tile = 2 * overlap + more
    begins = tiles.starts(n, tile, overlap)
    shares = tiles.shares_of(begins, n, tile, overlap, pixels)
    total = np.zeros(n * pixels)
    for s, share in zip(begins, shares, strict=True):
        total[s * pixels : s * pixels + len(share)] += share
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert begins[0] == 0 and begins[-1] + min(tile, n) == n
    assert (np.diff(begins) <= tile - overlap).all()
    assert len(begins) <= -(-n // (tile - overlap))


def test_a_picture_that_fits_in_a_tile_is_left_to_the_autoencoder():
    x = drawn(1, TILE, TILE - 8, 3)
    q = PLAIN.encode(PARAMS, x)
    np.testing.assert_array_equal(TILED.encode(PARAMS, x).mean, q.mean)
    np.testing.assert_array_equal(TILED.decode(PARAMS, q.mean), PLAIN.decode(PARAMS, q.mean))


def test_what_the_autoencoder_refuses_is_refused():
    by_tiles = tiled(kl_autoencoder(widths=(8, 16), blocks=1, latent=2, groups=4), 16, 4, factor=2)
    for bad in (drawn(1, 33, 40, 3), drawn(33, 40, 3)):
        with pytest.raises(ValueError, match="divisible by 2"):
            by_tiles.encode({}, bad)


def test_no_line_of_a_photograph_shows_where_tiles_meet():
    """What tiles add to the step from one line of pixels to the next, in mean over the line."""
    photograph = load_sample_image("china.jpg")[None, :256, :320].astype(np.float32) / 127.5 - 1
    wanted, found = (
        np.asarray(a.decode({}, jnp.asarray(photograph))) for a in (toned(), tiled(toned(), 64, 16, factor=1))
    )
    corners = [[(i, j) for j in tiles.starts(320, 64, 16)] for i in tiles.starts(256, 64, 16)]
    tones = np.asarray([[photograph[0, i : i + 64, j : j + 64].mean((0, 1)) / 3 for i, j in row] for row in corners])
    for axis in (1, 2):
        apart = np.abs(np.diff(tones, axis=axis - 1)).max()
        assert apart > 0.2  # of 2, from black to white: an edge would show
        others = tuple(a for a in range(4) if a != axis)
        added = np.abs(np.diff(found - wanted, axis=axis)).mean(others)
        own = np.abs(np.diff(wanted, axis=axis)).mean(others)
        assert added.max() < apart / 8  # the ramp is half of the overlap, eight pixels
        assert added.max() < np.median(own) / 3  # far less than what lines of the picture differ by
        assert np.median(added) < 1e-6  # within tiles nothing changes


@pytest.mark.slow
def test_memory_is_that_of_a_tile():
    plain = kl_autoencoder(widths=(8, 8), blocks=1, latent=2, groups=4)
    params = jax.eval_shape(plain.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((1, 128, 128, 2), jnp.float32)

    def temporaries(decode, gradient):
        def loss(params, z):
            return jnp.sum(jnp.square(decode(params, z)))

        compiled = jax.jit(jax.grad(loss) if gradient else decode).lower(params, z).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    by_tiles = tiled(plain, 32, 8, factor=2)
    picture = 128 * 128 * 4 * 3 * 4
    for gradient in (False, True):
        assert temporaries(by_tiles.decode, gradient) < 4 * picture + temporaries(plain.decode, gradient) / 8


@pytest.mark.parametrize(("tile", "overlap"), [(33, 8), (32, 7), (32, 18), (32, 0), (0, 0)])
def test_tiles_that_do_not_fit(tile, overlap):
    with pytest.raises(InputError, match="multiples of 2"):
        tiled(local(), tile, overlap, factor=2)


@pytest.mark.slow
def test_a_model_from_files_takes_the_size_of_its_tiles(tmp_path):
    files = read_files(str(write_model(tmp_path / "model")))
    options = {"embedding": (), "tokenizer": ""}
    plain, by_tiles = (load_model(files, jnp.float32, {**options, "tile": tile}) for tile in (0, 16))
    z = drawn(1, 8, 12, 4)
    one, other = (jax.jit(partial(sd.decode, m.model))(m.params, z) for m in (plain, by_tiles))
    assert one.shape == other.shape == (1, 16, 24, 3)
    assert 0 < np.abs(one - other).max() < 1
    with pytest.raises(InputError, match="tile=24: a multiple of 16"):
        load_model(files, jnp.float32, {**options, "tile": 24})
