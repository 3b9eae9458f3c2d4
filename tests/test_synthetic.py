"""Sound and video made on the spot, and the numbers that are printed of generated ones."""

import numpy as np
import pytest

from diffusion_jax.evaluation.media import (
    brightest_window,
    centres,
    harmonic_share,
    in_tune,
    jolt,
    steadiness,
    strongest_frequency,
)
from diffusion_jax.training.data import size
from diffusion_jax.training.sources import digits
from diffusion_jax.training.synthetic import NOTES, PITCHES, moving_digits, reflect, tones
from diffusion_jax.typing import InputError

RATE = 4000


@pytest.fixture(scope="module")
def sounds():
    return tones(train=64, test=32)


@pytest.fixture(scope="module")
def videos():
    return moving_digits(copies=1)


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_tones_are_a_function_of_the_seed(sounds):
    again, other = tones(train=64, test=32), tones(train=64, test=32, seed=1)
    assert equal(sounds.train, again.train) and equal(sounds.test, again.test)
    assert not np.array_equal(sounds.train["image"], other.train["image"])
    assert not np.array_equal(sounds.train["image"][:32], sounds.test["image"])


def test_tones_sound_as_their_class_says(sounds):
    x, wanted = sounds.train["image"][..., 0], np.asarray(PITCHES)[sounds.train["label"]]
    assert sounds.train["image"].shape == (64, *sounds.shape) and x.dtype == np.float32
    assert np.bincount(sounds.train["label"]).tolist() == [8] * len(NOTES) == [8] * len(sounds.classes)
    assert np.max(np.abs(x), axis=1).min() >= 0.49 and np.max(np.abs(x)) <= 0.95
    assert in_tune(x, RATE, wanted) == 1
    assert harmonic_share(x, RATE, wanted) > 0.98
    assert pytest.approx(440.0) == PITCHES[list(NOTES).index("A4")]


def test_tones_have_nothing_above_half_the_rate():
    """A harmonic that did not fit would come back as a frequency that is no multiple of the pitch."""
    data = tones(2048, 1200, train=64, test=8)
    assert harmonic_share(data.train["image"][..., 0], 1200, np.asarray(PITCHES)[data.train["label"]]) > 0.98
    with pytest.raises(InputError, match="rate=1000: the highest note has 523 Hz"):
        tones(rate=1000)


def test_videos_are_a_function_of_the_seed(videos):
    assert equal(videos.train, moving_digits(copies=1).train)
    assert not np.array_equal(videos.train["image"], moving_digits(copies=1, seed=1).train["image"])


def test_a_moving_digit_is_the_same_picture_everywhere(videos):
    """Each frame is a picture of its own split, somewhere in the frame and black around it."""
    for part, source in ((videos.train, digits().train), (videos.test, digits().test)):
        assert part["image"].shape == (size(source), *videos.shape)
        np.testing.assert_array_equal(part["label"], source["label"])
        light = np.sum(part["image"], axis=(2, 3, 4), dtype=np.int64)
        wanted = np.sum(source["image"], axis=(1, 2, 3), dtype=np.int64)
        np.testing.assert_array_equal(light, np.broadcast_to(wanted[:, None], light.shape))
        for video, picture in zip(part["image"][:20], source["image"][:20], strict=True):
            for frame in video:
                windows = np.lib.stride_tricks.sliding_window_view(frame[..., 0], (8, 8))
                assert np.any(np.all(windows == picture[..., 0], axis=(2, 3)))


def test_a_digit_moves_at_its_speed():
    """Over many frames a step is the speed, but for bounces; whole pixels change it by at most one in each axis."""
    data = moving_digits(frames=6, size=64, copies=1, speed=(3.0, 3.0))
    steps = np.linalg.norm(np.diff(centres(data.train["image"]), axis=1), axis=2)
    assert np.max(steps) <= 3 + np.sqrt(2)
    assert np.median(steps) == pytest.approx(3, abs=0.2)
    with pytest.raises(InputError, match="size=8"):
        moving_digits(size=8)


def test_reflect_is_a_walk_between_walls():
    y = np.linspace(-50, 50, 1001)
    folded = reflect(y, 7.0)
    assert folded.min() >= 0 and folded.max() <= 7
    np.testing.assert_allclose(np.abs(np.diff(folded)), 0.1, atol=1e-9)
    np.testing.assert_allclose(reflect(y + 14.0, 7.0), folded, atol=1e-9)
    np.testing.assert_allclose(reflect(np.linspace(0, 7, 5), 7.0), np.linspace(0, 7, 5))


def test_frequencies_of_sines():
    t, f = np.arange(1024) / RATE, np.array([262.0, 500.0, 1234.5])
    x = np.sin(2 * np.pi * f[:, None] * t)
    np.testing.assert_allclose(strongest_frequency(x, RATE), f, atol=0.3)
    assert in_tune(x, RATE, f) == 1 and in_tune(x, RATE, f * 2 ** (0.6 / 12)) == 0
    assert harmonic_share(x, RATE, f) > 0.99 > 0.01 > harmonic_share(x, RATE, 1.3 * f)


def test_noise_is_out_of_tune():
    """White noise has the share of its energy near the harmonics that these have of all frequencies."""
    noise = np.random.default_rng(0).normal(size=(200, 1024))
    pitch = np.full(200, 400.0)
    assert in_tune(noise, RATE, pitch) < 0.1
    assert harmonic_share(noise, RATE, pitch) == pytest.approx(40 * 4.5 / 2000, abs=0.01)


def test_the_brightest_window_is_the_digit():
    rng = np.random.default_rng(0)
    pictures = rng.integers(1, 256, (20, 8, 8), dtype=np.uint8)
    corners = rng.integers(0, 9, (20, 2))
    frames = np.zeros((20, 16, 16, 1), np.uint8)
    for frame, picture, (i, j) in zip(frames, pictures, corners, strict=True):
        frame[i : i + 8, j : j + 8, 0] = picture
    found, where = brightest_window(frames)
    np.testing.assert_array_equal(found[..., 0], pictures)
    np.testing.assert_array_equal(where, corners)


def test_what_moves_straight_and_what_jumps():
    rng = np.random.default_rng(0)
    picture, straight = rng.integers(1, 256, (8, 8), dtype=np.uint8), np.zeros((1, 8, 24, 24, 1), np.uint8)
    jumping = straight.copy()
    for n in range(8):
        i, j = rng.integers(0, 16, 2)
        straight[0, n, n : n + 8, 2 * n : 2 * n + 8, 0] = picture
        jumping[0, n, i : i + 8, j : j + 8, 0] = picture
    assert jolt(straight) < 1e-9 and jolt(jumping) > 3
    assert steadiness(straight) == pytest.approx(1)
    changing = rng.integers(1, 256, (4, 8, 16, 16, 1), dtype=np.uint8)
    assert abs(steadiness(changing)) < 0.3
