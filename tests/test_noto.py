"""The captioned pictures that ship with the project."""

import hashlib

import numpy as np
import pytest

from diffusion_jax.training.sources import captioned_emoji, noto
from diffusion_jax.training.sources.noto import FOLDER, held_out
from diffusion_jax.typing import InputError


@pytest.fixture(scope="module")
def full():
    return noto()


def test_all_of_them_are_there_and_none_twice(full):
    assert full.images.shape == (1636, 64, 64, 3)
    assert full.images.dtype == np.uint8
    assert len(full.names) == len(full.categories) == 1636
    assert len({hashlib.sha256(image.tobytes()).digest() for image in full.images}) == 1636
    captions = [names[0] for names in full.names]
    assert len(set(captions)) >= 1635  # Unicode calls two of them "man in tuxedo"
    assert all(name == name.strip() and name for names in full.names for name in names)
    assert all(len(set(names)) == len(names) for names in full.names)
    assert not any((image == image[0, 0]).all() for image in full.images)


def test_captions_fit_their_pictures(full):
    """A green heart is green and a blue one is blue."""
    middles = {names[0]: image[20:44, 20:44].mean((0, 1)) for names, image in zip(full.names, full.images, strict=True)}
    assert middles["green heart"].argmax() == 1
    assert middles["blue heart"].argmax() == 2
    red, yellow = middles["heavy black heart"], middles["yellow heart"]  # the former's name is older than colours
    assert red[0] > 2 * max(red[1:])
    assert min(yellow[:2]) > 2 * yellow[2]


def test_no_flags(full):
    flags = {names[0] for names in full.names if any("flag" in name for name in names)}
    assert all("mailbox" in name for name in flags - {"carp streamer", "flag in hole"})
    assert "Flags" not in full.categories


def test_smaller_pictures_are_means_of_the_large_ones(full):
    for size in (32, 16, 8):
        small, factor = noto(size).images, 64 // size
        assert small.shape == (1636, size, size, 3)
        corner = full.images[:, :factor, -factor:].astype(np.float64).mean((1, 2))
        assert np.abs(small[:, 0, -1] - corner).max() <= 0.5
    with pytest.raises(InputError, match="size=20"):
        noto(20)


def test_what_is_held_out_is_fixed_and_a_twentieth(full):
    data, again = captioned_emoji(16), captioned_emoji(8)
    train, test = data.train["label"], data.test["label"]
    assert sorted([*train, *test]) == list(range(1636))
    assert 0.04 < len(test) / 1636 < 0.06
    np.testing.assert_array_equal(test, again.test["label"])
    np.testing.assert_array_equal(data.test["image"], noto(16).images[test])
    backwards = held_out(full.names[::-1])
    np.testing.assert_array_equal(backwards[::-1], held_out(full.names))
    assert data.shape == (16, 16, 3)


def test_the_licence_lies_beside_them():
    assert "Apache License" in (FOLDER / "LICENSE").read_text()
