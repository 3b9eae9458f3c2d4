"""One evaluation: what is measured, in which features, against which real examples; shared by eval and sweep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.evaluation.features import open_features
from diffusion_jax.evaluation.features.clip import clip_texts
from diffusion_jax.evaluation.results import Protocol, Result
from diffusion_jax.experiment import Experiment
from diffusion_jax.measuring import bits, evaluate, models
from diffusion_jax.measuring.evaluate import Reals
from diffusion_jax.measuring.metrics import FROZEN, Wanted, wanted
from diffusion_jax.measuring.pictures import PictureSet, of_path, of_source, parts, some
from diffusion_jax.measuring.reals import Lens, Real, measured, of_reference
from diffusion_jax.measuring.stream import Gathered
from diffusion_jax.training.data import size
from diffusion_jax.training.generate import classes_of
from diffusion_jax.typing import InputError

SAMPLES = 50_000
"""How many samples are drawn unless n= says it, as for published distances."""
FASHION_SAMPLES = 10_000
"""The same for Fashion-MNIST: as many as there are test pictures, whose distance is the floor."""
BITS_CELLS = 100


@dataclass(frozen=True)
class Session:
    """What is the same for all sets of samples. n: samples of a set. lens: None where only bits are asked for."""

    experiment: Experiment
    label: str
    mesh: Mesh
    options: Mapping[str, Any]
    want: Wanted
    lens: Lens | None
    images: PictureSet | None
    n: int
    reals: Reals

    @cached_property
    def _floors(self) -> tuple[list[Result], list[str]]:
        return ([], []) if self.lens is None else evaluate.floors(self.want, self.lens, self.reals)

    @property
    def floors(self) -> list[Result]:
        """Real examples measured against real examples."""
        return self._floors[0]

    @property
    def warned(self) -> list[str]:
        """What there is to warn of in the floors."""
        return self._floors[1]


def open_session(experiment: Experiment, label: str, mesh: Mesh, options: Mapping[str, Any]) -> Session:
    """The network with its weights, and the real examples measured; InputError for bad input, before any work."""
    options = with_defaults(experiment, label, options)
    want = wanted([name for name in options["metrics"] if name != "bits"], options["features"], options["judge"])
    images = of_path(options["images"]) if options["images"] else None
    if images is not None and "bits" in options["metrics"]:
        raise InputError("metrics: bits are those of a model, not of the pictures in images=")
    n = options["n"] or (SAMPLES if images is None else images.n)
    if images is not None and n > images.n:
        raise InputError(f"n={n}: images={options['images']} has {images.n} pictures")
    lens, reals = None, Reals(None, None)
    if want.metrics:
        shape = experiment.shape if images is None else images.shape
        lens = make_lens(options, shape[-1], mesh)
        reals = _reals(experiment, label, lens, want, n, options)._replace(shape=tuple(shape))
    return Session(experiment, label, mesh, options, want, lens, images, n, reals)


def with_defaults(experiment: Experiment, label: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with what they leave open: the frozen protocol for experiments on Fashion-MNIST, FID for others."""
    fashion = label.startswith("fashion_mnist") and options["features"] in ("", "fashion_mnist")
    conditional = classes_of(experiment) is not None and not options["unconditional"] and not options["images"]
    usual = tuple(name for name in FROZEN if conditional or name != "accuracy") if fashion else ("fid",)
    return {
        **options,
        "features": options["features"] or ("fashion_mnist" if fashion else "inception"),
        "metrics": options["metrics"] or usual,
        "judge": ("pixels" if fashion else "features") if options["judge"] == "default" else options["judge"],
        "n": options["n"] or (FASHION_SAMPLES if fashion and not options["images"] else None),
    }


def make_lens(options: Mapping[str, Any], channels: int, mesh: Mesh) -> Lens:
    """The feature network of options features, weights, precision and batch."""
    opened = open_features(options["features"], options["weights"], channels, options["precision"])
    return Lens(opened, mesh, options["batch"], _watched)


def of_split(experiment: Experiment, label: str, split: str) -> PictureSet:
    """The pictures of an experiment's training or test data; InputError if it has none."""
    source = getattr(experiment.data(), split)
    if source is None:
        raise InputError(f"{label} has no {split} set")
    return of_source(source, f"{label} {split}")


def of_run(session: Session, folder: Path) -> Iterator[tuple[dict[str, Any], Gathered]]:
    """Samples of each seed from the run in `folder`, with what their protocol tells of the model."""
    options = session.options
    if session.lens is None:
        return
    model = models.make_model(session.experiment, session.mesh, options)
    chosen = models.load(session.experiment, folder, session.mesh, options)
    for seed in range(options["seed"], options["seed"] + options["seeds"]):
        told = {**model.told, "average": models.average_of(chosen), "seeds": (seed,)}
        pictures = model.draw(chosen.params, session.n, seed)
        yield told, look(session, pictures, f"samples of seed {seed}", model.labels(session.n))


def of_images(session: Session) -> Iterator[tuple[dict[str, Any], Gathered]]:
    """The pictures of images=."""
    assert session.images is not None
    index, labels = some(session.images, session.n), session.images.labels
    found = look(session, parts(session.images, index), session.images.name, None if labels is None else labels[index])
    yield {"sampler": f"pictures of {session.images.name}"}, found


def look(session: Session, pictures: Iterable[np.ndarray], what: str, labels: np.ndarray | None = None) -> Gathered:
    """The features of n pictures that the metrics need; labels i[n] that they were asked for."""
    assert session.lens is not None
    found = session.lens.look(pictures, session.n, what, session.want.names, session.want.keep)
    return found._replace(labels=labels)


def results(session: Session, told: dict[str, Any], samples: Gathered) -> tuple[list[Result], list[str]]:
    """The results of one set of samples, and warnings."""
    assert session.lens is not None
    texts = _texts(session.options["texts"], samples.n, session.options["weights"])
    return evaluate.results(session.want, session.lens, samples, session.reals, told, texts)


def bits_of(session: Session, folder: Path) -> list[Result]:
    """The bits per dimension of held-out pictures, if they are asked for."""
    options = session.options
    if "bits" not in options["metrics"]:
        return []
    held_out = session.experiment.data().test
    if held_out is None:
        raise InputError(f"metrics: bits are measured on held-out pictures, and {session.label} has none")
    pictures = of_source(held_out, f"{session.label} test")
    index = some(pictures, session.n)
    chosen = models.load(session.experiment, folder, session.mesh, options)
    how = {"cells": BITS_CELLS, "batch": options["batch"] or 8, "seed": options["seed"]}
    found = bits.bits(session.experiment, chosen.params, held_out, index, session.mesh, **how)
    protocol = Protocol(
        "none", "", "none", pictures.name, pictures.digest(), pictures.n, len(index),
        sampler=f"variational bound, {BITS_CELLS} draws", evaluations=BITS_CELLS + 4,
        average=models.average_of(chosen), seeds=(options["seed"],),
    )  # fmt: skip
    return [Result("bits", found.value, found.standard_error, protocol)]


def _reals(experiment: Experiment, label: str, lens: Lens, want: Wanted, n: int, options: Mapping[str, Any]) -> Reals:
    """The real examples that the metrics and their floors need, from caches where they are there."""
    cache, names, given = Path(options["runs"]) / label / "references", want.names, options["reference"]
    alone = bool(given and options["images"])  # then the experiment has nothing to do with it
    test_set = None if alone else _held_out(experiment, label, optional=bool(given) or not want.needs("test"))
    train: Real | None = None
    if want.needs("train"):
        if given:
            train = of_reference(lens, given, names, want.real, cache)
        else:
            train = measured(lens, of_split(experiment, label, "train"), names, want.real, cache)
    if test_set is None:
        return Reals(train, None)
    test = measured(lens, test_set, names, want.keep, cache)
    floor = test if n >= test_set.n else _part(lens, test_set, n, want)
    of_test = None
    if want.needs("test") and any(m.against == "test" for m in want.metrics):
        of_test = _part(lens, of_split(experiment, label, "train"), n, want)
    return Reals(train, test, floor, of_test)


def _held_out(experiment: Experiment, label: str, optional: bool) -> PictureSet | None:
    """The test set; None where there is none, or where it is not at hand and only a floor would need it."""
    try:
        source = experiment.data().test
        return None if source is None or size(source) == 0 else of_source(source, f"{label} test")
    except (InputError, OSError):
        if optional:
            return None
        raise


def _part(lens: Lens, pictures: PictureSet, n: int, want: Wanted) -> Real:
    """n random pictures of a set; nothing of them is kept on disk."""
    index = some(pictures, n)
    what = f"{len(index)} of {pictures.name}"
    found = lens.look(parts(pictures, index), len(index), what, want.names, want.keep)
    labels = None if pictures.labels is None else pictures.labels[index]
    return Real(pictures.name, "", len(index), found._replace(labels=labels))


def _texts(path: str, n: int, weights: str) -> np.ndarray | None:
    """Features of the texts in a .npy, or of the lines of a .txt by the text tower in the file of the weights."""
    if not path:
        return None
    if path.endswith(".txt"):
        return clip_texts(weights, _lines(path, n))
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"texts={path} cannot be read as an .npy of CLIP's features ({error})") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or len(rows) < n:
        raise InputError(f"texts={path}: features of {n} texts are needed, f32[n, 768]")
    return rows[:n]


def _lines(path: str, n: int) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"texts={path} cannot be read ({error})") from None
    if len(lines) < n:
        raise InputError(f"texts={path} has {len(lines)} lines, and {n} pictures need one each")
    return lines[:n]


def _watched(pictures: Iterable[np.ndarray], n: int, what: str) -> Iterator[np.ndarray]:
    with tqdm(total=n, desc=what, unit="picture", dynamic_ncols=True, leave=False) as bar:
        for part in pictures:
            yield part
            bar.update(len(part))
