"""Pictures written while more are drawn: nothing lost, nothing piling up, errors told."""

import time
import weakref

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.training import writer


def parts(n=37, size=8, channels=3):
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, channels), np.uint8)
    return images, [(start, images[start : start + size]) for start in range(0, n, size)]


@pytest.mark.parametrize("channels", [1, 3])
def test_every_picture_has_its_file(tmp_path, channels):
    images, pieces = parts(channels=channels)
    with writer.png_files(tmp_path, threads=3) as write:
        for start, part in pieces:
            write(start, part)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:06d}.png" for i in range(len(images))]
    for i, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{i:06d}.png")).reshape(image.shape), image)


@pytest.mark.parametrize("labels", [None, np.arange(37)], ids=["without labels", "labels"])
def test_the_archive_is_what_numpy_would_have_written(tmp_path, labels):
    images, pieces = parts()
    with writer.npz_file(tmp_path / "images.npz", len(images), labels) as write:
        for start, part in pieces:
            assert not (tmp_path / "images.npz").exists()
            write(start, part)
    with np.load(tmp_path / "images.npz") as archive:
        assert sorted(archive) == ["images"] if labels is None else ["images", "labels"]
        np.testing.assert_array_equal(archive["images"], images)
        assert archive["images"].dtype == np.uint8
        if labels is not None:
            np.testing.assert_array_equal(archive["labels"], labels)
    assert [p.name for p in tmp_path.iterdir()] == ["images.npz"]


def test_drawing_and_writing_overlap(tmp_path):
    """Each takes 30 ms a batch; together they take what one takes, and a batch."""
    began = time.perf_counter()
    with writer.png_files(tmp_path, threads=1, save=lambda path, image: time.sleep(0.03)) as write:
        for i in range(20):
            time.sleep(0.03)
            write(i, np.zeros((1, 8, 8, 1), np.uint8))
    taken = time.perf_counter() - began
    print(f"{taken:.2f} s; one after the other: {20 * 0.06:.2f} s")
    assert 20 * 0.03 < taken < 0.75 * 20 * 0.06


def test_a_slow_disk_does_not_fill_the_memory(tmp_path):
    alive = []
    most = 0
    with writer.png_files(tmp_path, threads=2, save=lambda path, image: time.sleep(0.005)) as write:
        for i in range(30):
            part = np.zeros((2, 8, 8, 1), np.uint8)
            alive.append(weakref.ref(part))
            write(2 * i, part)
            del part
            most = max(most, sum(ref() is not None for ref in alive))
    assert most <= writer.AHEAD + 1


def test_what_cannot_be_written_is_raised(tmp_path):
    def full(path, image):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), writer.png_files(tmp_path, save=full) as write:
        for i in range(100):
            write(i, np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(FileNotFoundError), writer.npz_file(tmp_path / "nowhere" / "images.npz", 1):
        pass


def test_an_archive_that_was_not_finished_does_not_appear(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer.npz_file(tmp_path / "images.npz", 16) as write:
        write(0, np.zeros((8, 8, 8, 1), np.uint8))
        raise KeyboardInterrupt
    assert not (tmp_path / "images.npz").exists()
