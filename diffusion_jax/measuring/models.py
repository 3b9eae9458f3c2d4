"""What is measured: a trained model that draws, told by the words of its protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment, check_seed
from diffusion_jax.measuring.evaluations import evaluations
from diffusion_jax.training import media
from diffusion_jax.training.draw import Chosen, chosen_labels, chosen_params, chosen_sampler
from diffusion_jax.training.generate import at_a_time, classes_of, make_draw, make_pictures
from diffusion_jax.training.mesh import replicated
from diffusion_jax.typing import InputError, Params

TIMED, AT_LEAST = 5, 0.5
"""Batches that the time of a sample is the median of: so many, and for so many seconds."""


@dataclass(frozen=True)
class Model:
    """A sampler of one experiment, compiled once for any parameters.

    draw: (params, n, seed) -> parts of u8[k, h, w, c]. labels: (n) -> the classes i[n] that are asked for, or None.
    told: sampler, evaluations and guidance, as in `Protocol`.
    """

    draw: Callable[[Params, int, int], Iterator[np.ndarray]]
    labels: Callable[[int], np.ndarray | None]
    batch: int
    told: dict[str, Any]


def make_model(experiment: Experiment, mesh: Mesh, options: Mapping[str, Any]) -> Model:
    """The model of options sampler, steps, guidance, unconditional and batch; InputError unless it makes pictures."""
    kind = media.look(experiment).kind
    if kind != "picture":
        raise InputError(f"this experiment makes {media.NOUN[kind]}: only pictures have these feature networks")
    conditional = classes_of(experiment) is not None and not options["unconditional"]
    if not conditional and options["guidance"] is not None:
        raise InputError("guidance is for samples of given classes")
    how = {
        "sampler": chosen_sampler(experiment, options["sampler"]),
        "steps": options["steps"],
        "guidance": options["guidance"],
    }
    batch = options["batch"] or at_a_time(experiment)
    pictures = make_pictures(make_draw(experiment, **how), mesh, batch, experiment.decode)

    def labels(n: int) -> np.ndarray | None:
        return chosen_labels(experiment, {"n": n, "label": None, "guidance": None}) if conditional else None

    def draw(params: Params, n: int, seed: int) -> Iterator[np.ndarray]:
        check_seed(seed)
        return pictures(params, n, seed, labels(n))

    guidance = experiment.guidance if options["guidance"] is None else options["guidance"]
    steps = options["steps"] or experiment.sample_steps
    told = {
        "sampler": f"{options['sampler']} in {steps} steps{'' if conditional else ', unconditional'}",
        "evaluations": evaluations(experiment, conditional=conditional, **how),
        "guidance": float(guidance) if conditional else 1.0,
    }
    return Model(draw, labels, batch * mesh.shape["data"], told)


def load(experiment: Experiment, folder: Path, mesh: Mesh, options: Mapping[str, Any]) -> Chosen:
    """The parameters of options checkpoint, ema and params, whole on every device of the mesh."""
    chosen = chosen_params(
        experiment, folder, options["checkpoint"], mesh, sigma_rel=options["ema"], file=options["params"]
    )
    return chosen._replace(params=jax.device_put(chosen.params, replicated(mesh)))


def average_of(chosen: Chosen) -> str:
    """The words of `Protocol.average`.

    >>> average_of(Chosen({}, "step=600", "-ema=0.1")), average_of(Chosen({}, "step=600", ""))
    ('ema=0.1 at step=600', "the run's at step=600")
    """
    if chosen.named.startswith("params="):
        return chosen.named
    return f"{chosen.average.removeprefix('-') or 'the run' + chr(39) + 's'} at {chosen.named}"


def seconds_per_sample(model: Model, params: Params) -> float:
    """The median over some batches of the time to draw one, after one that is not counted, over its pictures."""
    times: list[float] = []
    while len(times) <= TIMED or sum(times[1:]) < AT_LEAST:
        start = time.perf_counter()
        for _part in model.draw(params, model.batch, 0):
            pass
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:])) / model.batch
