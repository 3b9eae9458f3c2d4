"""The run of a trained model that another run begins from: its experiment, and the parameters it came to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from diffusion_jax.experiment import Experiment, find_experiment
from diffusion_jax.training import records
from diffusion_jax.training.draw import load_averaged
from diffusion_jax.training.parameters import read_parameters
from diffusion_jax.training.snapshots import reconstruct
from diffusion_jax.training.state import dotted
from diffusion_jax.typing import InputError, Net, Params


class Teacher(NamedTuple):
    """A run, what it was started with, and the function of its experiment's file that takes those arguments."""

    experiment: Experiment
    arguments: Mapping[str, Any]
    function: Callable[..., Experiment]
    folder: Path | None


def find_teacher(folder: str, **changed: Any) -> Teacher:
    """The teacher in a run folder, its experiment made with the recorded arguments, some of them `changed`.

    Changes that are None, or that its experiment does not know, are left out. InputError for a folder that is no run,
    whose experiment is not there, or which was started with arguments that are gone.
    """
    path = Path(folder) / "experiment.json"
    if not path.is_file():
        raise InputError(f"teacher={folder}: no trained run is there, which would have an experiment.json")
    record = records.read_record(path)
    function = find_experiment(str(record.get("experiment")))
    known = inspect.signature(function).parameters
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in record.get("arguments", {}).items()}
    gone = sorted(arguments.keys() - known.keys())
    if gone:
        raise InputError(f"teacher={folder} was trained with {gone[0]!r}, which its experiment no longer has")
    return untrained_teacher(function, arguments, **changed)._replace(folder=Path(folder))


def untrained_teacher(function: Callable[..., Experiment], arguments: Mapping[str, Any], **changed: Any) -> Teacher:
    """The same without a run: what a student that learns from the data alone takes its network and data from."""
    known = inspect.signature(function).parameters
    wanted = {name: value for name, value in changed.items() if value is not None and name in known}
    merged = {name: parameter.default for name, parameter in known.items()} | dict(arguments) | wanted
    return Teacher(function(**merged), merged, function, None)


def network_with(teacher: Teacher, **more: Any) -> Net:
    """The teacher's network made with `more` arguments, such as vector=16, by the function `network` of its file.

    InputError for a file without such a function, or one that does not take those.
    """
    function = teacher.function.__globals__.get("network")
    known = inspect.signature(function).parameters if function is not None else {}
    if function is None or not more.keys() <= known.keys():
        where = Path(teacher.function.__code__.co_filename).name
        raise InputError(f"{where} has no function network(..., {', '.join(more)}=...), which this student needs")
    return function(**{name: teacher.arguments[name] for name in known if name not in more}, **more)


def teacher_params(teacher: Teacher, sigma_rel: float | None = None, file: str = "") -> Params:
    """The averaged parameters of a teacher, fp32 on the host: the newest, or of the relative width `sigma_rel`.

    file: parameters of the same network, such as extrapolated ones, that are taken instead. InputError if there are
    none, or if they are those of another network.
    """
    if teacher.folder is None:
        raise InputError("an untrained teacher has no parameters")
    if file:
        params, said = read_parameters(file), file
    elif sigma_rel is None:
        params, step = load_averaged(teacher.experiment, teacher.folder)
        said = f"{teacher.folder} at step {step}"
    else:
        params, error, step = reconstruct(teacher.folder / "averages", sigma_rel)
        said = f"{teacher.folder} at step {step}, ema={sigma_rel}, its profile met to {100 * error:.2g} %"
    wanted = jax.eval_shape(teacher.experiment.net.init, jax.random.key(0))
    check_same(wanted, params, said)
    if jax.process_index() == 0:
        tqdm.write(f"beginning from {said}")
    return jax.device_get(params)


def check_same(wanted: Params, params: Params, name: str) -> None:
    """InputError that names the first parameter by which `params` differ from what a network wants."""
    want, have = ({dotted(p): tuple(v.shape) for p, v in jax.tree.leaves_with_path(tree)} for tree in (wanted, params))
    for leaf in sorted(want.keys() | have.keys()):
        if want.get(leaf) != have.get(leaf):
            shapes = [list(s) if s is not None else "none" for s in (want.get(leaf), have.get(leaf))]
            raise InputError(f"{name} is of another network: {leaf} has shape {shapes[1]} there, {shapes[0]} here")
