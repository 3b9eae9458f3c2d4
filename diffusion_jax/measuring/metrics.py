"""Which number needs what, and how it is had: the table behind `metrics=`.

A metric is a function of the features of samples X, of real training examples Y and of held-out ones Z,

    X with Y    fid sfid kid cmmd precision recall density coverage authenticity                          (1)
    X with Z    c2st                                                                                      (2)
    X, Y and Z  copy                                                                                      (3)
    X           is vendi clip_score accuracy                                                              (4)

and its real-versus-real floor puts other real examples in the place of X: part of Y in (2), Z in all others. `fid` and
`kid` are the names in Inception's features; in others they are `fd`, `kd`. The judge of c2st is a small perceptron on
the features, or a convolutional network on the pixels (`picture_test`), as the frozen protocol of Fashion-MNIST has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from diffusion_jax.arguments import closest
from diffusion_jax.evaluation import distances, neighbours, scores, two_sample
from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.evaluation.fashion_mnist import FOLDS
from diffusion_jax.measuring.stream import IMAGES, Gathered
from diffusion_jax.typing import InputError

FROZEN = ("fid", "kid", "c2st", "copy", "authenticity", "accuracy")
"""The metrics of Fashion-MNIST's frozen protocol."""
KID_BLOCK, PRECISION_K, DENSITY_K = 1000, 3, 5
"""The published block of the kernel distance, and numbers of neighbours of precision, recall and density, coverage."""
NAN = float("nan")


class Sides(NamedTuple):
    """X, Y and Z, and the CLIP features f32[n, d] of the texts that X was drawn for; None where there are none.

    shape: of a picture.
    """

    samples: Gathered
    train: Gathered | None
    test: Gathered | None
    texts: np.ndarray | None
    shape: tuple[int, ...]


class Metric(NamedTuple):
    """One or several numbers from the same work.

    gives: their names. feature: what of the network they are measured in; rows: they need each example's, not only the
    moments. against: the real examples in their protocol. value: (sides) -> an estimate for each name.
    """

    gives: tuple[str, ...]
    feature: str
    rows: bool
    against: Literal["train", "test", "nothing"]
    value: Callable[[Sides], tuple[Estimate, ...]]


def _frechet(feature: str) -> Callable[[Sides], tuple[Estimate, ...]]:
    def value(sides: Sides) -> tuple[Estimate, ...]:
        return (Estimate(distances.frechet_of(sides.samples.moments[feature], _train(sides).moments[feature]), NAN),)

    return value


def _kernel(sides: Sides) -> tuple[Estimate, ...]:
    x, y = _rows(sides.samples), _rows(_train(sides))
    block = min(KID_BLOCK, max(2, min(len(x), len(y)) // 5))  # small sets still give an error of five blocks
    return (distances.kernel_distance(x, y, block=block),)


def _cmmd(sides: Sides) -> tuple[Estimate, ...]:
    return (Estimate(distances.cmmd(_rows(sides.samples), _rows(_train(sides))), NAN),)


def _support(k: int, names: tuple[str, ...]) -> Callable[[Sides], tuple[Estimate, ...]]:
    def value(sides: Sides) -> tuple[Estimate, ...]:
        found = neighbours.support(_rows(_train(sides)), _rows(sides.samples), k)
        return tuple(Estimate(getattr(found, name), NAN) for name in names)

    return value


def _c2st(sides: Sides) -> tuple[Estimate, ...]:
    return (two_sample.c2st(_rows(sides.samples), _rows(_test(sides, "c2st"))),)


def _c2st_of_pixels(sides: Sides) -> tuple[Estimate, ...]:
    from diffusion_jax.evaluation.picture_test import convolutional

    test = _test(sides, "c2st")
    judge = convolutional(sides.shape)
    return (two_sample.c2st(sides.samples.kept[IMAGES], test.kept[IMAGES], fit=judge, folds=FOLDS),)


def _copy(sides: Sides) -> tuple[Estimate, ...]:
    rows = _rows(_train(sides)), _rows(_test(sides, "copy")), _rows(sides.samples)
    return (Estimate(neighbours.copy_ratio(*rows), NAN),)


def _authenticity(sides: Sides) -> tuple[Estimate, ...]:
    x = _rows(sides.samples)
    share = neighbours.authenticity(_rows(_train(sides)), x)
    return (Estimate(share, float(np.sqrt(share * (1 - share) / len(x)))),)


def _inception_score(sides: Sides) -> tuple[Estimate, ...]:
    return (scores.inception_score(sides.samples.kept["probabilities"]),)


def _accuracy(sides: Sides) -> tuple[Estimate, ...]:
    if sides.samples.labels is None:
        raise InputError("metrics: accuracy is for samples of given classes")
    looks = np.argmax(sides.samples.kept["logits"], axis=1)
    share = float(np.mean(looks == sides.samples.labels))
    return (Estimate(share, float(np.sqrt(share * (1 - share) / len(looks)))),)


def _vendi(sides: Sides) -> tuple[Estimate, ...]:
    return (Estimate(scores.vendi_score(_rows(sides.samples)), NAN),)


def _clip_score(sides: Sides) -> tuple[Estimate, ...]:
    if sides.texts is None:
        raise InputError("clip_score needs texts=FILE.txt, the samples' texts, or FILE.npy, CLIP's features of them")
    return (scores.clip_score(_rows(sides.samples), sides.texts),)


TABLE = (
    Metric(("fid",), "pooled", False, "train", _frechet("pooled")),
    Metric(("sfid",), "spatial", False, "train", _frechet("spatial")),
    Metric(("kid",), "pooled", True, "train", _kernel),
    Metric(("cmmd",), "pooled", True, "train", _cmmd),
    Metric(("precision", "recall"), "pooled", True, "train", _support(PRECISION_K, ("precision", "recall"))),
    Metric(("density", "coverage"), "pooled", True, "train", _support(DENSITY_K, ("density", "coverage"))),
    Metric(("c2st",), "pooled", True, "test", _c2st),
    Metric(("copy",), "pooled", True, "train", _copy),
    Metric(("authenticity",), "pooled", True, "train", _authenticity),
    Metric(("is",), "probabilities", True, "nothing", _inception_score),
    Metric(("vendi",), "pooled", True, "nothing", _vendi),
    Metric(("clip_score",), "pooled", True, "nothing", _clip_score),
    Metric(("accuracy",), "logits", True, "nothing", _accuracy),
)
OTHER_NAMES = {"fd": "fid", "kd": "kid"}
NAMES = (*(name for metric in TABLE for name in metric.gives), *OTHER_NAMES, "bits")
"""What `metrics=` takes; `bits` is no function of samples, see `bits`."""
LOWER_IS_BETTER = ("fid", "fd", "sfid", "kid", "kd", "cmmd", "c2st", "bits")


class Wanted(NamedTuple):
    """The metrics asked for, the names to tell, and what the network is to give: `names`, of which rows of `keep`."""

    metrics: tuple[Metric, ...]
    told: tuple[str, ...]
    names: tuple[str, ...]
    keep: tuple[str, ...]

    @property
    def real(self) -> tuple[str, ...]:
        """Those of `keep` that are wanted of training examples too."""
        used = {m.feature for m in self.metrics if m.rows and m.against == "train"}
        return tuple(name for name in self.keep if name in used)

    def needs(self, side: str) -> bool:
        """Whether a metric looks at those real examples: train, or test."""
        if side == "train":
            return any(m.against == "train" for m in self.metrics)
        return any(m.against == "test" or m.gives == ("copy",) for m in self.metrics)


def wanted(names: Sequence[str], network: str, judge: str = "features") -> Wanted:
    """What the metrics of these names need; InputError for unknown names, and features that they are not defined in.

    judge: of c2st, features or pixels.
    """
    for name in names:
        if name not in NAMES:
            raise InputError(f"metrics: there is no {name!r}{closest(name, NAMES)}; there are: {', '.join(NAMES)}")
        if name in ("cmmd", "clip_score") and not network.startswith("clip"):
            raise InputError(f"metrics: {name} is defined in CLIP's features: features=clip, not {network}")
        if name in ("sfid", "is") and not network.startswith("inception"):
            raise InputError(f"metrics: {name} is defined in Inception's features: features=inception, not {network}")
        if name == "accuracy" and network != "fashion_mnist":
            raise InputError(f"metrics: {name} is that of features=fashion_mnist, not {network}")
    canonical = {OTHER_NAMES.get(name, name) for name in names}
    of_pixels = Metric(("c2st",), IMAGES, True, "test", _c2st_of_pixels)
    table = [of_pixels if m.gives == ("c2st",) and judge == "pixels" else m for m in TABLE]
    metrics = tuple(m for m in table if canonical & set(m.gives))
    features = tuple(dict.fromkeys(m.feature for m in metrics))
    keep = tuple(dict.fromkeys(m.feature for m in metrics if m.rows))
    return Wanted(metrics, tuple(n for m in metrics for n in m.gives if n in canonical), features, keep)


def shown(name: str, network: str) -> str:
    """The name a number goes by: fid and kid are reserved for Inception's features."""
    return name if network.startswith("inception") else {"fid": "fd", "kid": "kd"}.get(name, name)


def _rows(side: Gathered) -> np.ndarray:
    return side.kept["pooled"]


def _train(sides: Sides) -> Gathered:
    if sides.train is None:
        raise InputError("these metrics compare with real examples: give reference=")
    return sides.train


def _test(sides: Sides, name: str) -> Gathered:
    if sides.test is None:
        raise InputError(f"metrics: {name} needs held-out examples, and there are none here")
    return sides.test
