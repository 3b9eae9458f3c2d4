"""Drawing from the checkpoint of a run into a folder: what `make sample` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax import samplers
from diffusion_jax.experiment import Experiment, check_at_least, check_seed, initial_state
from diffusion_jax.training import checkpoint, hosts, media, writer
from diffusion_jax.training.generate import at_a_time, classes_of, make_draw, make_pictures
from diffusion_jax.training.mesh import make_mesh, replicated
from diffusion_jax.training.parameters import read_parameters
from diffusion_jax.training.snapshots import reconstruct
from diffusion_jax.training.state import dotted
from diffusion_jax.typing import Cond, InputError, Params, Sampler, Schedule

SAMPLERS: dict[str, Callable[[Schedule], Sampler]] = {
    "ddpm": samplers.ddpm,
    "ddpm_large": partial(samplers.ddpm, variance="large"),
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "euler": samplers.euler,
    "heun": samplers.heun,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_3m": samplers.dpmpp_3m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "unipc": samplers.unipc,
    "deis": samplers.deis,
}
PLACE = ("coordinator", "processes", "process")
"""The options that say which of several processes this one is; all others are the same for all."""


def draw_to_folder(experiment: Experiment, folder: Path, options: Mapping[str, Any]) -> str:
    """Draw options["n"] examples from the run in `folder` and write them; returns a line that says where.

    InputError for a run without checkpoints, or options that do not fit the experiment.
    """
    same = {key: value for key, value in options.items() if key not in PLACE}
    hosts.check_alike({"arguments": same}, folder=str(folder))
    check_at_least(1, n=options["n"])
    check_seed(options["seed"])
    labels, how = chosen_conditions(experiment, options), media.look(experiment)
    if how.kind == "array" and options["format"] != "npz":
        raise InputError(f"format={options['format']}: this experiment makes what cannot be shown; format=npz keeps it")
    draw = make_draw(
        experiment,
        sampler=chosen_sampler(experiment, options["sampler"]),
        steps=options["steps"],
        guidance=options["guidance"],
    )
    mesh = make_mesh(options["devices"])
    chosen = chosen_params(
        experiment, folder, options["checkpoint"], mesh, sigma_rel=options.get("ema"), file=options.get("params", "")
    )
    name = f"drawn-{chosen.named}-seed={options['seed']}{chosen.average}"
    out = Path(options["out"]) if options["out"] else folder / name
    hosts.on_first(lambda: out.mkdir(parents=True, exist_ok=True), "folder")
    pictures = make_pictures(draw, mesh, at_a_time(experiment), experiment.decode)
    parts = pictures(chosen.params, options["n"], options["seed"], labels)
    return _write(parts, out, options, labels if isinstance(labels, np.ndarray) else None, how)


class Chosen(NamedTuple):
    """Parameters to draw from: the step they are of, or the file, and what names their average, such as -ema=0.1."""

    params: Params
    named: str
    average: str


def chosen_params(
    experiment: Experiment, folder: Path, which: str, mesh: Mesh, *, sigma_rel: float | None = None, file: str = ""
) -> Chosen:
    """The parameters of a run in `folder` at checkpoint `which`: its average, another one, or those in a file.

    sigma_rel: the relative width of an average put together from snapshots. file: as `write_parameters` writes it.
    InputError for what is not there or does not fit the experiment's network.
    """
    if file:
        if sigma_rel is not None or which != "newest":
            raise InputError("params= is a file of its own: give no ema= and no checkpoint= with it")
        params = read_parameters(file)
        _check_fits(experiment, params, file)
        return Chosen(hosts.place(params, replicated(mesh)), f"params={Path(file).stem}", "")
    if sigma_rel is None:
        params, step = load_averaged(experiment, folder, which, mesh if hosts.several() else None)
        return Chosen(params, f"step={step}", "")
    if which != "newest" and not which.isdigit():
        raise InputError(f"checkpoint={which}: for ema={sigma_rel} give a step, or nothing for the newest")
    params, error, step = reconstruct(folder / "averages", sigma_rel, int(which) if which.isdigit() else None)
    if hosts.first():
        tqdm.write(f"ema={sigma_rel} at step {step}: its profile is met to {100 * error:.2g} %")
    return Chosen(hosts.place(params, replicated(mesh)), f"step={step}", f"-ema={sigma_rel}")


def _check_fits(experiment: Experiment, params: Params, file: str) -> None:
    """InputError, naming the first parameter, unless a file holds those of the experiment's network."""
    like = jax.eval_shape(partial(initial_state, experiment)).params
    want, have = ({dotted(p): leaf.shape for p, leaf in jax.tree.leaves_with_path(tree)} for tree in (like, params))
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise InputError(f"params={file} is of another network: {name} is {have.get(name)}, not {want.get(name)}")


def load_averaged(
    experiment: Experiment, folder: Path, which: str = "newest", mesh: Mesh | None = None
) -> tuple[Params, int]:
    """The averaged parameters of a run and their step; `which` is newest, best, or a step.

    They lie on the first device, or whole on all those of a mesh.
    """
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"no checkpoint in {folder}: train first")
    manager = checkpoint.open_read_only(folder / "checkpoints")
    try:
        steps = manager.all_steps()
        if which not in ("newest", "best") and which not in map(str, steps):
            raise InputError(f"checkpoint={which}: there are newest, best, {', '.join(map(str, sorted(steps)))}")
        step = int(which) if which.isdigit() else _best(folder) if which == "best" else None
        init = partial(initial_state, experiment)
        whole = replicated(mesh or make_mesh(1))
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), jax.eval_shape(init))
        restored = checkpoint.restore(manager, like, tqdm.write, step, read_only=True)
    finally:
        manager.close()
    if restored is None:
        raise InputError(f"no checkpoint in {folder}: train first")
    return restored[0].ema, int(restored[0].step)


def _best(folder: Path) -> int | None:
    known = {step: m for step, m in checkpoint.metrics(folder / "checkpoints").items() if m is not None}
    return min(known, key=lambda step: known[step], default=None)


def chosen_conditions(experiment: Experiment, options: Mapping[str, Any]) -> Cond:
    """What options["prompt"] stands for, n times, or `chosen_labels`. InputError for what does not fit."""
    prompt, n = options.get("prompt", ""), options["n"]
    if experiment.read_texts is None:
        if prompt:
            raise InputError("prompt= is for experiments that are conditioned on texts; this one is not")
        return chosen_labels(experiment, options)
    if options["label"] is not None:
        raise InputError("label= is for experiments with classes; this one takes prompt=")
    texts = [prompt] * n if prompt else [experiment.texts[i % len(experiment.texts)] for i in range(n)]
    return jax.tree.map(np.asarray, experiment.read_texts(texts))


def chosen_labels(experiment: Experiment, options: Mapping[str, Any]) -> np.ndarray | None:
    """i32[n]: all classes in turn, or options["label"] alone; None without classes. InputError for a wrong one."""
    n, label, classes = options["n"], options["label"], classes_of(experiment)
    if classes is None:
        if label is not None or options["guidance"] is not None:
            raise InputError("label and guidance are for class-conditional experiments; this one has no classes")
        return None
    if label is not None and not 0 <= label < classes:
        raise InputError(f"label={label}: this experiment has the classes 0 to {classes - 1}")
    return (np.arange(n) % classes if label is None else np.full(n, label)).astype(np.int32)


def chosen_sampler(experiment: Experiment, name: str) -> Sampler | None:
    """The sampler of this name for the experiment, None for its own; InputError if its network does not fit."""
    if name == "ancestral" and not experiment.learned_variance:
        raise InputError("sampler=ancestral needs a network with a learned variance; use ddpm or ddpm_large")
    return None if name == "default" else SAMPLERS[name](experiment.schedule)


def _write(parts: Any, out: Path, options: Mapping[str, Any], labels: np.ndarray | None, how: media.Look) -> str:
    """Write what is drawn while more is drawn; of several processes, process 0."""
    n, shown, written = options["n"], [], options["format"] if hosts.first() else "nothing"
    most, suffix, names = (100 if how.kind == "picture" else 20), media.SUFFIX.get(how.kind, ""), []
    writers = {
        "png": lambda: writer.png_files(out, save=partial(media.save_example, how=how), suffix=suffix),
        "npz": lambda: writer.npz_file(out / "images.npz", n, labels),
        "grid": writer.nothing,
        "nothing": writer.nothing,
    }
    bar = tqdm(total=n, desc="drawing", unit=how.kind, dynamic_ncols=True, disable=not hosts.first())
    start = 0
    with bar, writers[written]() as write:
        for part in parts:
            write(start, part)
            shown += list(part[: max(0, most - len(shown))])
            start += len(part)
            bar.update(len(part))
    if hosts.first():
        columns = 10 if len(shown) >= 10 else len(shown)
        names = media.save_sheet(out / "grid.png", np.stack(shown), columns, how)
        settings = {key: value for key, value in options.items() if key not in PLACE}
        (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    return f"{n} {media.NOUN[how.kind]} in {out}: " + ", ".join(
        names + {"png": [f"000000{suffix} …"], "npz": ["images.npz"], "grid": []}[options["format"]]
    )
