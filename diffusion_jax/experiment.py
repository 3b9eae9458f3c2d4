"""An experiment: a frozen dataclass of objects, made by one typed function whose arguments are the command line.

experiments/digits.py:    def experiment(*, width: int = 32, steps: int = 2000, ...) -> Experiment
command line:             make train EXP=digits ARGS="width=64 steps=200"
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import optax

from diffusion_jax.arguments import closest
from diffusion_jax.denoisers import BoundNet
from diffusion_jax.training.data import Data, Prepare, prepare, to_uint8
from diffusion_jax.training.ema import Decays, PowerFunction, several
from diffusion_jax.training.state import TrainState, init_state
from diffusion_jax.training.step import LossFn, Objective, make_loss_fn
from diffusion_jax.typing import Array, Cond, Denoiser, FlowMap, InputError, Key, Net, Params, Sampler, Schedule


@dataclass(frozen=True)
class Experiment:
    """Everything a run is made of.

    data: loads the data set when called. shape: of an example, (h, w, c) for pictures. prepare: turns stored examples
    into x0, decode: turns the model's x into what is kept: u8[h,w,c] for pictures, u8[t,h,w,c] for video, f32[time,c]
    for sound and other series. sample_rate: of sound, in Hz; None if it is not heard. frame_rate: of video, a second.
    read: turns the bound network into a denoiser. objective: the loss of each example.
    times: number of steps -> grid, for sampling with `sampler` in `sample_steps` steps; `guidance` is the default
    scale of classifier-free guidance and `null` the label for "no label" (None: unconditional), or what stands for no
    condition of another kind; it replaces conditions with probability `drop` in training. `clip` limits x0 to [-1, 1]
    while sampling.
    ema: the decay of the average that is judged and drawn from, or several, of which the first is; () for what a
    schedule-free optimizer averages itself. Every `snapshot_every` steps those that are `ema.power_function`s are kept
    in runs/.../averages, from which any other can be made later. partition: for tensor parallelism, regular expression
    on dotted parameter paths -> axis to split, as the network's module gives it.
    batch examples a step for `steps` steps; `dispatch` steps go to the device at once; every `checkpoint_every` steps a
    checkpoint, of which the newest `keep` and the best are kept, and every `sample_every` steps a grid of samples.
    start: gives the parameters to begin with, of the network's names and shapes, in place of its own initial ones; a
    run that begins calls it once. staged: the objective changes as the run goes on; it takes `step` as a keyword, the
    number of updates made, which is absent where it judges. flow_map: turns the denoiser of a model of two times into
    its flow map; samples then are jumps of that along `times`, unless another sampler is asked for.
    read_texts: texts -> a condition that leads with [n], for what is conditioned on texts; `texts` are drawn in grids.
    drawing: (params, keys: [b], labels) -> f32[b *d], what is shown and drawn in place of samples, as of autoencoders.
    export: (averaged params, folder of the run) -> None, writes the result at the end as files that others read.
    evaluate: (draw) -> named numbers at the end of training, with draw(labels i32[n], seed) -> the decoded examples.
    """

    data: Callable[[], Data]
    shape: tuple[int, ...]
    net: Net
    schedule: Schedule
    read: Callable[[BoundNet], Denoiser]
    objective: Objective
    optimizer: optax.GradientTransformation
    ema: Decays
    sampler: Sampler
    times: Callable[[int], Array]
    sample_steps: int
    steps: int
    batch: int
    seed: int = 0
    null: Cond = None
    drop: float = 0.0
    guidance: float = 1.0
    clip: bool = False
    learned_variance: bool = False
    flip: bool = False
    prepare: Prepare = prepare
    decode: Callable[[Array], Array] = to_uint8
    sample_rate: int | None = None
    frame_rate: float = 8.0
    accumulate: int = 1
    dispatch: int = 1
    log_every: int = 100
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 2
    snapshot_every: int = 0
    partition: Mapping[str, int] = field(default_factory=dict)
    start: Callable[[], Params] | None = None
    staged: bool = False
    flow_map: Callable[[Denoiser], FlowMap] | None = None
    read_texts: Callable[[Sequence[str]], Cond] | None = None
    texts: tuple[str, ...] = ()
    drawing: Callable[[Params, Key, Cond], Array] | None = None
    export: Callable[[Params, Path], None] | None = None
    evaluate: Callable[[Callable[[np.ndarray, int], np.ndarray]], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        for name in ("sample_steps", "steps", "batch", "accumulate", "dispatch", "log_every", "keep"):
            check_at_least(1, **{name: getattr(self, name)})
        check_at_least(0, sample_every=self.sample_every, checkpoint_every=self.checkpoint_every)
        check_at_least(0, snapshot_every=self.snapshot_every)
        if self.snapshot_every and not any(isinstance(decay, PowerFunction) for decay in several(self.ema)):
            raise InputError("snapshot_every: only averages by ema.power_function can be put together afterwards")
        check_at_least(1, frame_rate=self.frame_rate, sample_rate=self.sample_rate or 1)
        check_seed(self.seed)
        if self.batch % self.accumulate:
            raise InputError(f"batch={self.batch} does not divide into accumulate={self.accumulate} parts")
        if not 0 <= self.drop <= 1:
            raise InputError(f"drop={self.drop}: a probability is between 0 and 1")


def initial_state(experiment: Experiment, params: Params | None = None) -> TrainState:
    """The state of a run before its first update, a function of the experiment's seed, or of `params` if given."""
    averages = len(several(experiment.ema))
    return init_state(jax.random.key(experiment.seed), experiment.net, experiment.optimizer, averages, params)


def loss_fn(experiment: Experiment, train: bool = True) -> LossFn:
    """The mean loss of a batch, (params, batch, key) -> f32[]: what a run trains on or, without `train`, judges by."""
    return make_loss_fn(
        experiment.net,
        experiment.read,
        experiment.objective,
        null=experiment.null,
        drop=experiment.drop,
        flip=experiment.flip,
        prepare=experiment.prepare,
        train=train,
    )


def check_at_least(low: float, **values: float) -> None:
    """InputError unless every named value is at least `low`."""
    for name, value in values.items():
        if not value >= low:
            raise InputError(f"{name}={value} is not possible: it must be at least {low}")


def check_seed(seed: int) -> None:
    """InputError unless `jax.random.key` tells the seed apart from all others: 0 to 2**32 - 1."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} is not possible: it must be between 0 and {2**32 - 1}")


def find_source(name: str) -> Path:
    """The file of an experiment, experiments/NAME.py below the current folder, or the path itself if it ends in .py."""
    folder = Path("experiments")
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))
        raise InputError(f"unknown experiment {name!r}{closest(name, known)}; there are: {', '.join(known) or 'none'}")
    return path


def find_experiment(name: str) -> Callable[..., Experiment]:
    """The function `experiment` of experiments/NAME.py below the current folder, or of a path that ends in .py.

    InputError for an unknown name, with the closest one there is.
    """
    path = find_source(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.spec_from_file_location(f"experiments.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "experiment"):
        raise InputError(f"{path} has no function named experiment")
    return module.experiment
