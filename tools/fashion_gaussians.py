"""What the Fashion-MNIST protocol can be fooled by: the table of docs/evaluation-fashion-mnist.md.

    python tools/fashion_gaussians.py [--n 2000] [--real real.npz] [--data-dir DIR]

Sets of pictures that are not samples of any trained model go through the protocol: Gaussians fitted to the training
pixels, as a whole and for each class, copies of the training set, and damaged test pictures. A Gaussian fitted to the
features themselves is no set of pictures, so that only the distances can be asked. --real keeps the features of the
real pictures, which take minutes on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.evaluation import fashion_mnist as protocol
from diffusion_jax.evaluation.distances import frechet_of, kernel_distance
from diffusion_jax.evaluation.moments import moments
from diffusion_jax.evaluation.two_sample import c2st
from diffusion_jax.training.sources import tfds_images


def gaussian(rng: np.random.Generator, x: np.ndarray, n: int) -> np.ndarray:
    """n draws f64[n, d] from the Gaussian with the moments of x [m, d]."""
    m = moments([x])
    values, vectors = np.linalg.eigh(m.covariance)
    return m.mean + (rng.standard_normal((n, len(m.mean))) * np.sqrt(np.maximum(values, 0))) @ vectors.T


def pictures(x: np.ndarray) -> np.ndarray:
    """Flattened pixels as pictures u8[n, 28, 28, 1]."""
    return np.clip(np.rint(x), 0, 255).astype(np.uint8).reshape(-1, 28, 28, 1)


def blurred(x: np.ndarray) -> np.ndarray:
    """Pictures under the 3 x 3 filter [1, 2, 1] / 4."""
    y = x.astype(float)
    for axis in (1, 2):
        y = (np.roll(y, 1, axis) + 2 * y + np.roll(y, -1, axis)) / 4
    return pictures(y)


def sets(real: protocol.Real, n: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, pictures u8[n, 28, 28, 1], labels i[n])."""
    rng = np.random.default_rng(0)
    train, labels = real.train.images.reshape(len(real.train.images), -1), real.train.labels
    test, kept = real.test, np.random.default_rng(1).permutation(len(real.test.images))[:n]
    assert labels is not None
    assert test.labels is not None
    rows = rng.permutation(len(train))[:n]
    yield "copies of training pictures", pictures(train[rows]), labels[rows]
    yield "Gaussian, pixels", pictures(gaussian(rng, train, n)), labels[rows]
    wanted = np.arange(n) % 10
    each = np.zeros((n, train.shape[1]))
    for c in range(10):
        each[wanted == c] = gaussian(rng, train[labels == c], int(np.sum(wanted == c)))
    yield "Gaussian of each class, pixels", pictures(each), wanted
    yield "test pictures, blurred", blurred(test.images[kept]), test.labels[kept]
    noise = rng.integers(0, 9, (len(kept), 28, 28, 1))
    yield (
        "test pictures, noise of 0 to 8",
        np.clip(test.images[kept] + noise, 0, 255).astype(np.uint8),
        test.labels[kept],
    )
    yield "test pictures, mirrored", test.images[kept][:, :, ::-1], test.labels[kept]


def of_features(real: protocol.Real, n: int) -> dict[str, float]:
    """The distances of a Gaussian fitted to the features of the training set; C2ST in features, by a small network."""
    x = gaussian(np.random.default_rng(0), real.train.features, n)
    test = real.test.features[np.random.default_rng(1).permutation(len(real.test.features))[:n]]
    return {
        "fd": frechet_of(moments([x]), real.moments),
        "kd": kernel_distance(x, real.train.features, block=min(1000, n // 5)).value,
        "c2st": c2st(x, test, folds=2).value,
    }


def line(name: str, values: dict[str, Any], note: str = "") -> str:
    cells = [f"{values[m]:.4g}{note if m == 'c2st' else ''}" if m in values else "" for m in protocol.METRICS]
    return "| " + " | ".join([name, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--data-dir")
    given = parser.parse_args()
    if given.real and given.real.is_file():
        real = protocol.read_real(given.real)
    else:
        data = tfds_images("fashion_mnist", given.data_dir)
        real = protocol.real(data.train, data.test)
        if given.real:
            protocol.write_real(given.real, real)
    print(f"accuracy of the classifier on all test pictures: {np.mean(real.test.looks == real.test.labels):.4f}")
    print("| pictures | " + " | ".join(protocol.METRICS) + " |\n" + "| --- " * (len(protocol.METRICS) + 1) + "|")
    floor = {result.metric: result.value for result in protocol.floors(given.n, real)}
    print(line("**real pictures** (the floor)", floor), flush=True)
    for name, images, labels in sets(real, given.n):
        print(line(name, {r.metric: r.value for r in protocol.measure(images, labels, real)}), flush=True)
    print(line("Gaussian, features", of_features(real, given.n), " (in features)"))


if __name__ == "__main__":
    main()
