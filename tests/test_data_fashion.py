"""The real Fashion-MNIST, from Debian's package, through TFDS's own builder and checksums."""

import time

import numpy as np
import pytest

from diffusion_jax.training import sources

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sources.DEBIAN_FASHION_MNIST.is_dir(),
        reason="Fashion-MNIST is not here: apt-get install dataset-fashion-mnist",
    ),
]


def test_fashion_mnist_is_prepared_from_debians_files_and_opens_at_once_afterwards(tmp_path):
    data = sources.tfds_images("fashion_mnist", tmp_path)
    assert data.train["image"].shape == (60_000, 28, 28, 1)
    assert data.test["image"].shape == (10_000, 28, 28, 1)
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    np.testing.assert_array_equal(np.bincount(data.train["label"]), [6000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test["label"]), [1000] * 10)
    assert data.train["image"].mean() == pytest.approx(72.9404, abs=1e-3)
    begin = time.perf_counter()
    again = sources.tfds_images("fashion_mnist", tmp_path)
    assert time.perf_counter() - begin < 2
    np.testing.assert_array_equal(again.train["label"], data.train["label"])
