r"""Extrapolation after training: away from where training on one's own samples leads.

A model of parameters theta is trained for a short while on samples of its own, which gives theta_self, and then

    theta_w = (1 + w) theta - w theta_self = theta + w (theta - theta_self)                                     (1)

(Neon; Alemohammad et al. 2025, arXiv:2510.03597). A sampler that draws from another law than the model's, as one of few
steps does, makes training on its samples go the way of the sampler's error, so that (1) goes against it. For w = 0
nothing changes; w = -1 is theta_self.

Gaussian data of variance v, a model that knows v, and a sampler that draws k v, too narrow or too wide, show it.
Training on the samples moves the model to v_self = v + h (k - 1) v with a rate h in (0, 1], so that by (1) it has, and
draws,

    v_w = v (1 + w h (1 - k)),   k v_w,   which is v for w = 1 / (k h)                                          (2)

The distance of k v_w from v falls from w = 0 until there, however good the model was: what is mended is the sampler's
error; where it has none, k = 1, nothing moves. What w is best has to be measured:

    d(w) = d_0 + c (w - w_best)^2   about its minimum, from measured distances d by least squares               (3)

Cost, in evaluations of the network forwards, of which an update takes three an example:

    share = (n evaluations + 3 batch steps) / (3 batch' steps')    n samples drawn, primes for the first training (4)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from diffusion_jax.experiment import Experiment
from diffusion_jax.training.draw import load_averaged
from diffusion_jax.training.parameters import write_parameters
from diffusion_jax.training.records import read_record
from diffusion_jax.training.teacher import check_same, find_teacher
from diffusion_jax.typing import InputError, Params


def extrapolate(params: Params, self_trained: Params, w: float) -> Params:
    """Equation (1), leaf by leaf. InputError for parameters of two networks, or a w that is not finite.

    >>> float(extrapolate({"a": np.float32(2.0)}, {"a": np.float32(1.5)}, 2.0)["a"])
    3.0
    """
    if not np.isfinite(w):
        raise InputError(f"w={w} is not a number to extrapolate by")
    check_same(params, self_trained, "what was trained on its own samples")
    return jax.tree.map(lambda base, other: base + np.float32(w) * (base - other), params, self_trained)


def best_weight(weights: Sequence[float], distances: Sequence[float]) -> float:
    """The w of least distance by equation (3), through the smallest measured distance and those beside it.

    At an end of `weights` that end itself: the minimum may lie beyond. InputError unless three or more are given, each
    once and finite.

    >>> round(best_weight([0.0, 1.0, 2.0], [3.0, 1.5, 1.0]), 6)
    2.0
    >>> round(best_weight([0.0, 1.0, 2.0], [2.0, 1.0, 2.0]), 6)
    1.0
    """
    w, d = np.asarray(weights, np.float64), np.asarray(distances, np.float64)
    if w.shape != d.shape or w.ndim != 1 or len(set(w.tolist())) < max(3, len(w)) or not np.isfinite([w, d]).all():
        raise InputError("a best weight needs three or more weights, each once, with a finite distance each")
    w, d = w[np.argsort(w)], d[np.argsort(w)]
    i = int(np.argmin(d))
    if i in (0, len(w) - 1):
        return float(w[i])
    curve = np.polyfit(w[i - 1 : i + 2] - w[i], d[i - 1 : i + 2], 2)
    return float(w[i] - curve[1] / (2 * curve[0]))


def extrapolate_run(
    experiment: Experiment, folder: Path, weights: Sequence[float], out: Path, evaluations: Callable[[Experiment], int]
) -> Iterator[str]:
    """Write out/extrapolated-w=….npz for each weight, from the run in `folder` and what it began from; yields lines.

    evaluations: of the network for one sample of an experiment. InputError for a run that began from nothing.
    """
    if experiment.start is None:
        raise InputError("an extrapolation is away from a run that began with another's parameters; this one did not")
    base, (tuned, step) = experiment.start(), load_averaged(experiment, folder)
    tuned = jax.device_get(tuned)
    moved = _norm(jax.tree.map(np.subtract, tuned, base)) / _norm(base)
    yield f"{step} updates moved the parameters by {100 * moved:.2g} % of their length; {_cost(folder, evaluations)}"
    for w in weights:
        path = out / f"extrapolated-w={w}.npz"
        yield f"w={w}: {write_parameters(path, extrapolate(base, tuned, w), w=str(w), run=str(folder))}"


def extra_compute(drawn: int, evaluations: int, tuned: int, trained: int) -> float:
    """Equation (4), with the examples batch * steps of the short training and of the first one.

    >>> extra_compute(6000, 35, 256 * 100, 512 * 20_000)
    0.0093359375
    """
    return (drawn * evaluations + 3 * tuned) / (3 * trained)


def _cost(folder: Path, evaluations: Callable[[Experiment], int]) -> str:
    given = read_record(folder / "experiment.json").get("arguments", {})
    if not given.get("teacher") or not given.get("samples"):
        return "what that cost is not known without teacher= and samples="
    teacher = find_teacher(given["teacher"]).experiment
    with np.load(given["samples"]) as file:
        drawn = len(file["images"])
    share = extra_compute(drawn, evaluations(teacher), given["batch"] * given["steps"], teacher.batch * teacher.steps)
    return f"{drawn} samples and these updates took {100 * share:.2g} % of the teacher's training"


def _norm(params: Params) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(params))))
