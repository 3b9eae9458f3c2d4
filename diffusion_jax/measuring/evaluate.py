"""From features to results: values, floors, and means over seeds, each with its protocol."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.evaluation.fashion_mnist import JUDGE
from diffusion_jax.evaluation.results import Protocol, Result, difference, over_seeds, read_result
from diffusion_jax.measuring.metrics import Metric, Sides, Wanted, shown
from diffusion_jax.measuring.reals import Lens, Real
from diffusion_jax.measuring.stream import IMAGES, Gathered
from diffusion_jax.typing import InputError

HELD_OUT, TRAINING = "held-out data", "training data"
"""The `sampler` of a real-versus-real floor."""


class Reals(NamedTuple):
    """Training examples, held-out ones, and as many of each as there are samples, for the floors; None: none.

    shape: of a picture.
    """

    train: Real | None
    test: Real | None
    floor: Real | None = None
    floor_of_test: Real | None = None
    shape: tuple[int, ...] = ()


def results(
    want: Wanted,
    lens: Lens,
    samples: Gathered,
    reals: Reals,
    told: dict[str, Any],
    texts: np.ndarray | None = None,
) -> tuple[list[Result], list[str]]:
    """A result for each metric asked for, and what there is to warn of. told: the rest of the protocol."""
    found, warned = [], []
    for metric in want.metrics:
        sides = Sides(samples, _gathered(reals.train), _gathered(reals.test), texts, reals.shape)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            values = _valued(metric, sides)
        warned += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        found += _told(want, metric, values, protocol_of(lens, metric, samples.n, reals, told), lens.opened.net.name)
    return found, list(dict.fromkeys(warned))


def floors(want: Wanted, lens: Lens, reals: Reals) -> tuple[list[Result], list[str]]:
    """The same metrics with other real examples in the place of samples, where there are such; and the warnings."""
    found: list[Result] = []
    warned: list[str] = []
    for metric in want.metrics:
        real, name = (reals.floor_of_test, TRAINING) if metric.against == "test" else (reals.floor, HELD_OUT)
        if real is None or metric.gives == ("clip_score",):
            continue
        only = want._replace(metrics=(metric,))
        more, said = results(only, lens, real.gathered, reals, {"sampler": name})
        found, warned = found + more, warned + said
    return found, warned


def protocol_of(lens: Lens, metric: Metric, n: int, reals: Reals, told: dict[str, Any]) -> Protocol:
    """The protocol of a metric on n samples."""
    real = {"train": reals.train, "test": reals.test, "nothing": None}[metric.against]
    name, digest, count = ("none", "", 0) if real is None else (real.name, real.digest, real.n)
    if metric.against == "test":
        n = min(n, count)  # as many as there are of the others
    if metric.feature == IMAGES:
        return Protocol(JUDGE, "", "none", name, digest, count, n, **told)
    net = lens.opened.net
    return Protocol(net.name, lens.opened.sha256, net.resize, name, digest, count, n, **told)


def mean_over_seeds(runs: Sequence[Sequence[Result]]) -> list[Result]:
    """For each metric the mean of its results, those of one seed each."""
    return [over_seeds(list(same)) for same in zip(*runs, strict=True)]


def page(found: Sequence[Result], floor: Sequence[Result], warned: Iterable[str]) -> str:
    """One line for each result, the floor under it, and the warnings."""
    under = {result.metric: result for result in floor}
    lines = []
    for result in found:
        lines.append(result.line())
        if result.metric in under:
            real = under[result.metric]
            error = "" if math.isnan(real.standard_error) else f" +- {real.standard_error:.2g}"
            lines.append(f"  floor {real.value:.4g}{error}  n={real.protocol.n} of {real.protocol.sampler}")
    return "\n".join([*lines, *(f"warning: {text}" for text in warned)])


def write(path: Path, found: Sequence[Result]) -> None:
    """Append results to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(result.json() + "\n" for result in found)


def read(path: Path) -> list[Result]:
    """The results in a JSONL file; InputError for a missing file or a line that is none."""
    if not path.is_file():
        raise InputError(f"there is no file of results at {path}")
    return [read_result(line) for line in path.read_text().splitlines() if line.strip()]


def compared(found: Sequence[Result], path: Path) -> str:
    """The difference of each result from the last of its metric in a file, a line each.

    InputError with the reason where a protocol differs, or the file has no such metric.
    """
    last = {r.metric: r for r in read(path) if r.protocol.sampler not in (HELD_OUT, TRAINING)}
    lines = []
    for result in found:
        if result.metric not in last:
            raise InputError(f"{path} has no {result.metric}: it has {', '.join(last) or 'nothing'}")
        other = last[result.metric]
        value, error = difference(result, other)
        sure = "" if math.isnan(error) else f" +- {error:.2g}"
        lines.append(f"{result.metric} {value:+.4g}{sure} against {other.value:.4g} in {path}")
    return "\n".join(lines)


def _valued(metric: Metric, sides: Sides) -> tuple[Estimate, ...]:
    try:
        return metric.value(sides)
    except ValueError as error:  # what the mathematics refuses, such as two examples for a covariance
        raise InputError(f"metrics: {', '.join(metric.gives)} cannot be had here: {error}") from None


def _told(want: Wanted, metric: Metric, values: Sequence[Estimate], protocol: Protocol, network: str) -> list[Result]:
    return [
        Result(shown(name, network), value.value, value.standard_error, protocol)
        for name, value in zip(metric.gives, values, strict=True)
        if name in want.told
    ]


def _gathered(real: Real | None) -> Gathered | None:
    return None if real is None else real.gathered
