"""The frozen protocol of Fashion-MNIST: what is measured of samples, and what real pictures would get.

With X the samples, Y all 60,000 training pictures, Z as many of the 10,000 test pictures as there are samples (compare
numbers of equal n), and f the features of the frozen classifier (`features.fashion_mnist`):

    fd            Frechet distance of f(X) and f(Y)                              floor: f(Z) and f(Y)                (1)
    kd            kernel distance of f(X) and f(Y), unbiased                     floor: f(Z) and f(Y)                (2)
    c2st          accuracy of a convolutional network that is taught to          floor: part of Y against Z          (3)
                  tell the pixels of X from those of Z (`picture_test`),
                  each half of them by one that was taught the other half
    copy          median distance of f(X) to the nearest of f(Y), over           floor: Z in the place of X          (4)
                  that of the whole test set
    authenticity  share of X that are no nearer to their nearest of f(Y)         floor: Z in the place of X          (5)
                  than that one's own nearest
    accuracy      share of X that the classifier takes for what was asked        floor: that of Z with its labels    (6)

A perfect model reaches the floor of each within its error; lower (4) and (5) mean copies. What each can be fooled by,
as `python tools/fashion_gaussians.py` measures it (docs/evaluation-fashion-mnist.md has the table):

    (1)  by its definition Gaussian features of the right moments: it sees two moments and no more. Gaussian pixels
         do not reach it. Copies of the training set do better than the floor.
    (2)  copies.
    (3)  copies: it only asks whether they look like test pictures. No Gaussian, of all or of each class.
    (4), (5)  anything far from the data: noise is as authentic as can be. Read them beside (1)-(3) only.
    (6)  a model without variety; a Gaussian for each class goes far.
"""

from __future__ import annotations

import math
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from diffusion_jax.evaluation import neighbours
from diffusion_jax.evaluation.distances import Estimate, frechet_of, kernel_distance
from diffusion_jax.evaluation.features import fashion_mnist as classifier
from diffusion_jax.evaluation.features.fashion_mnist import fashion_mnist as fashion_mnist
from diffusion_jax.evaluation.moments import Moments, moments
from diffusion_jax.evaluation.picture_test import convolutional
from diffusion_jax.evaluation.results import Protocol, Result, sha256
from diffusion_jax.evaluation.two_sample import c2st
from diffusion_jax.typing import InputError, Params

AT_ONCE, ROWS, NAN = 500, 512, float("nan")
FOLDS = 2
"""Of the two-sample test: each trains a network of its own."""
JUDGE = "pixels, convolutional network of 3 layers"
METRICS = ("fd", "kd", "c2st", "copy", "authenticity", "accuracy")


class Seen(NamedTuple):
    """Pictures u8[n, 28, 28, 1], their labels i[n] or None, features f32[n, 128], and classes i[n] as they look."""

    images: np.ndarray
    labels: np.ndarray | None
    features: np.ndarray
    looks: np.ndarray


class Real(NamedTuple):
    """The real pictures as the classifier sees them, made once by `real`.

    train, test: what the protocol compares with. moments: of the features of train. nearest: the median distance of the
    features of test to train. hashes: sha256 of the pictures of train and of test.
    """

    train: Seen
    test: Seen
    moments: Moments
    nearest: float
    hashes: tuple[str, str]


def look(images: Any, labels: Any = None, params: Params | None = None) -> Seen:
    """Pictures as the frozen classifier sees them; InputError for pictures or labels of another kind.

    params: of the classifier, by default the frozen ones.
    """
    net = fashion_mnist()
    images = net.prepare(images)
    if labels is not None:
        labels = _checked(labels, len(images))
    params = net.load(classifier.WEIGHTS).params if params is None else params
    parts = [_looked(params, images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
    if not parts:
        raise InputError("there are no pictures to look at")
    features, logits = (np.concatenate([part[name] for part in parts]) for name in ("pooled", "logits"))
    return Seen(images, labels, features, np.argmax(logits, axis=1))


def real(train: Any, test: Any, params: Params | None = None) -> Real:
    """The real pictures, {"image": u8[n, 28, 28, 1], "label": i[n]} of each set: minutes on a CPU, so keep it."""
    return real_of(look(train["image"], train["label"], params), look(test["image"], test["label"], params))


def real_of(train: Seen, test: Seen) -> Real:
    """The same from what was seen before."""
    nearest = float(np.median(neighbours.nearest(test.features, train.features)[0]))
    hashes = tuple(sha256({"image": seen.images}) for seen in (train, test))
    return Real(train, test, moments([train.features]), nearest, (hashes[0], hashes[1]))


def write_real(path: Path, real: Real) -> None:
    """Keep the real pictures as they are seen, 60 MB, in a file that appears whole or not at all."""
    arrays: dict[str, Any] = {"weights": np.asarray(classifier.SHA256)}
    for name, seen in (("train", real.train), ("test", real.test)):
        arrays |= {f"{name}.{field}": value for field, value in seen._asdict().items()}
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def read_real(path: Path) -> Real:
    """What `write_real` kept; InputError for a file of another kind, or of another classifier."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        train, test = (Seen(*(arrays[f"{name}.{field}"] for field in Seen._fields)) for name in ("train", "test"))
        weights = str(arrays["weights"])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} does not hold real pictures as `write_real` keeps them ({error})") from None
    if weights != classifier.SHA256:
        raise InputError(f"{path} was made with another classifier: remove it")
    return real_of(train, test)


def measure(
    samples: Any, labels: Any, real: Real, *, params: Params | None = None, seed: int = 0, **told: Any
) -> list[Result]:
    """Equations (1)-(6) of samples u8[n, 28, 28, 1], and the labels i[n] that they were asked for; None: without (6).

    told: of the model, as in `Protocol`: sampler, evaluations, guidance, average, seeds. seed: of (2) and (3).
    InputError for pictures or labels of another kind, or fewer than ten.
    """
    return _measured(look(samples, labels, params), real, _part(real.test, len(samples), seed), seed, told)


def floors(n: int, real: Real, *, seed: int = 0, labels: bool = True) -> list[Result]:
    """Equations (1)-(6) of n real pictures in the place of samples: the floor under each number."""
    test = _part(real.test, n, seed)
    held_out = test if labels else test._replace(labels=None)
    found = _measured(held_out, real, None, seed, {"sampler": "held-out data"})
    other = _part(real.train, n, seed)
    judged = _result("c2st", _told_apart(other, test, seed), real, n, {"sampler": "training data"})
    return [*found[:2], judged, *found[2:]]


def nearest_training(samples: np.ndarray, real: Real) -> np.ndarray:
    """The nearest training picture of each sample by its pixels: u8[n, 28, 28, 1]."""
    flat = [np.reshape(x, (len(x), -1)).astype(np.float32) / 255 for x in (samples, real.train.images)]
    return real.train.images[neighbours.nearest(*flat)[1]]


def table(found: list[Result], floor: list[Result]) -> str:
    """One line for each result, and the floor under it."""
    under, lines = {result.metric: result for result in floor}, []
    for result in found:
        lines.append(result.line())
        if result.metric in under:
            low = under[result.metric]
            error = "" if math.isnan(low.standard_error) else f" +- {low.standard_error:.2g}"
            lines.append(f"  floor {low.value:.4g}{error}  n={low.protocol.n} of {low.protocol.sampler}")
    return "\n".join(lines)


def _measured(x: Seen, real: Real, test: Seen | None, seed: int, told: dict[str, Any]) -> list[Result]:
    """The metrics of what was seen; (3) where there is a test set to tell it from."""
    n = len(x.images)
    if n < 10:
        raise InputError(f"{n} samples: the protocol needs at least 10, and says something from about 1000 on")
    block = min(1000, n // 5)
    found = [
        ("fd", Estimate(frechet_of(moments([x.features]), real.moments), NAN)),
        ("kd", kernel_distance(x.features, real.train.features, block=block, seed=seed)),
    ]
    if test is not None:
        found.append(("c2st", _told_apart(x, test, seed)))
    distances, nearest = neighbours.nearest(x.features, real.train.features)
    found.append(("copy", Estimate(float(np.median(distances)) / real.nearest, NAN)))
    found.append(("authenticity", _share(_own_nearest(real.train.features, nearest) <= distances)))
    if x.labels is not None:
        found.append(("accuracy", _share(x.looks == x.labels)))
    return [_result(name, value, real, n, told) for name, value in found]


def _told_apart(x: Seen, y: Seen, seed: int) -> Estimate:
    flat = [np.reshape(seen.images, (len(seen.images), -1)) for seen in (x, y)]
    return c2st(*flat, fit=convolutional(classifier.SHAPE), folds=FOLDS, seed=seed)


def _share(right: np.ndarray) -> Estimate:
    p = float(np.mean(right))
    return Estimate(p, math.sqrt(p * (1 - p) / len(right)))


def _own_nearest(train: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The distance of the training examples at `index` to the nearest other one: f64[n]."""
    y, which = train.astype(np.float64), np.unique(index)
    squares, own = np.sum(y * y, axis=1), np.zeros(len(y))
    for i in range(0, len(which), ROWS):
        rows = which[i : i + ROWS]
        squared = squares[rows, None] + squares[None, :] - 2 * (y[rows] @ y.T)
        squared[np.arange(len(rows)), rows] = np.inf
        own[rows] = np.sqrt(np.maximum(squared.min(axis=1), 0))
    return own[index]


def _result(metric: str, value: Estimate, real: Real, n: int, told: dict[str, Any]) -> Result:
    judged = metric == "c2st"
    against, name, digest = (real.test, "test", real.hashes[1]) if judged else (real.train, "train", real.hashes[0])
    features, weights = (JUDGE, "") if judged else ("fashion_mnist", classifier.SHA256)
    count = min(n, len(against.images)) if judged else len(against.images)
    protocol = Protocol(features, weights, "none", f"fashion_mnist {name}", digest, count, n, **told)
    return Result(metric, value.value, value.standard_error, protocol)


def _part(seen: Seen, n: int, seed: int) -> Seen:
    """n of them at random, or all."""
    rows = np.random.default_rng(seed).permutation(len(seen.images))[:n]
    return Seen(*(None if value is None else value[rows] for value in seen))  # pyright: ignore[reportArgumentType]


def _checked(labels: ArrayLike, n: int) -> np.ndarray:
    found = np.asarray(labels)
    if found.shape != (n,) or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"labels are i[{n}], one for each picture, got {found.dtype}{list(found.shape)}")
    if n and not 0 <= found.min() <= found.max() < classifier.CLASSES:
        raise InputError(f"labels are 0 to {classifier.CLASSES - 1}, these are {found.min()} to {found.max()}")
    return found


@lru_cache(maxsize=1)
def _program() -> Any:
    return jax.jit(fashion_mnist().apply)


def _looked(params: Params, images: np.ndarray) -> dict[str, np.ndarray]:
    padded = np.concatenate([images, np.zeros((AT_ONCE - len(images), *classifier.SHAPE), np.uint8)])
    return {name: np.asarray(value)[: len(images)] for name, value in _program()(params, padded).items()}
