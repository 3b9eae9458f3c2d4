"""Two honest numbers for class-conditional samples of a small labelled set: are they right, and are they new?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from diffusion_jax.evaluation.neighbours import copy_ratio


def recognised(train: np.ndarray, labels: np.ndarray, images: np.ndarray, wanted: np.ndarray) -> float:
    """Share of `images` u8[n,h,w,c] that a classifier fitted to the training pictures gives the label `wanted`.

    The classifier is scikit-learn's support vector machine with its default radial kernel, on pixels in [0, 1].
    """
    from sklearn.svm import SVC

    machine = SVC(C=10.0).fit(_flat(train), labels)
    return float(np.mean(machine.predict(_flat(images)) == wanted))


def evaluate_classes(
    draw: Callable[[np.ndarray, int], np.ndarray],
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    per_class: int = 50,
    seed: int = 1,
) -> dict[str, float]:
    """sample_accuracy, heldout_accuracy and copy_ratio of a class-conditional model of ten classes.

    draw: (labels i32[n], seed) -> u8[n,h,w,c]; train, test: {"image": u8[n,h,w,c], "label": i32[n]}.
    """
    wanted = np.arange(10 * per_class) % 10
    images = draw(wanted, seed)
    return {
        "copy_ratio": copy_ratio(_flat(train["image"]), _flat(test["image"]), _flat(images)),
        "heldout_accuracy": recognised(train["image"], train["label"], test["image"], test["label"]),
        "sample_accuracy": recognised(train["image"], train["label"], images, wanted),
    }


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64) / 255
