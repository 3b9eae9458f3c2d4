"""Checkpoints: train state, data position and experiment in one atomic step, through Orbax.

A step's folder holds `state` (sharded arrays), `metrics` (JSON: what decides which is the best) and `meta` (JSON: the
position of the data, the resolved experiment, the shape of every array, a digest of all bits of the state, and one of
meta itself). Saving is asynchronous; a folder appears under its final name only when it is complete, so that a killed
run always finds whole ones. Restoring checks the digests, and goes back to the previous step if one cannot be read.
Of several processes each writes and reads the parts of its own devices; process 0 decides, for all, what is kept.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffusion_jax.training import hosts
from diffusion_jax.training.state import TrainState, digest
from diffusion_jax.typing import InputError

METRIC = "metric"
Report = Callable[[str], None]


def open_checkpoints(folder: Path, report: Report, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of a folder: the newest `keep` are kept, and the one whose metric is smallest.

    Those whose metric cannot be read are reported and set aside: Orbax could not open the folder.
    """

    def set_damaged_aside() -> list[int]:
        damaged = [step for step, metric in metrics(folder).items() if metric is None]
        _set_aside(folder, damaged)
        return damaged

    for step in hosts.on_first(set_damaged_aside, "damaged checkpoints"):
        report(f"checkpoint {step} in {folder} is damaged and set aside (its metrics cannot be read)")

    def metric(metrics: Any) -> float:
        return metrics[METRIC]

    policy = policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.BestN(get_metric_fn=metric, reverse=True, n=1)]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=metric,
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def open_read_only(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints of a folder, to read from only: nothing in it is changed, and no process waits for another."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="reader"
    )
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def metrics(folder: Path) -> dict[int, float | None]:
    """The metric of each step there is, None if it cannot be read."""
    found: dict[int, float | None] = {}
    for path in folder.glob("*/metrics/metrics"):
        if path.parts[-3].isdigit():
            found[int(path.parts[-3])] = None
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found[int(path.parts[-3])] = float(json.loads(path.read_text())[METRIC])
    return found


def save(manager: ocp.CheckpointManager, state: TrainState, position: dict, experiment: dict, metric: float) -> None:
    """Begin to save a state; what could not be written is raised here, at the next save or by `wait`, as OSError."""
    meta = {
        "position": position,
        "experiment": experiment,
        "shapes": shapes(state),
        "digest": _digest(state),
    }
    meta["crc"] = _crc(meta)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with _as_os_error(manager.directory):
        manager.save(int(state.step), args=items, metrics={METRIC: metric})


def wait(manager: ocp.CheckpointManager) -> None:
    """Return when all saves are complete; OSError if one failed."""
    with _as_os_error(manager.directory):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager,
    like: TrainState,
    report: Report,
    step: int | None = None,
    read_only: bool = False,
) -> tuple[TrainState, dict] | None:
    """The newest readable checkpoint, or that of `step`: (state, meta), or None if there is none at all.

    like: a tree of `ShapeDtypeStruct` with shardings, which may be of another mesh than the one that saved. A
    checkpoint that is truncated or fails its digest is reported, and the previous one is taken; then those that could
    not be read are set aside (unless `read_only`), to make room for the steps that will be made again. InputError if
    none can be read, or if a parameter has another shape than in `like`; it is named. What one of several processes
    cannot read, none of them takes.
    """
    steps = hosts.from_first(sorted(manager.all_steps(), reverse=True) if step is None else [step], "checkpoints")
    for i, candidate in enumerate(steps):
        try:
            restored = _restore_one(manager, candidate, like)
        except InputError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own kinds for a damaged file.
            before = f"; going back to checkpoint {steps[i + 1]}" if i + 1 < len(steps) else ""
            report(f"checkpoint {candidate} in {manager.directory} cannot be read ({_reason(error)}){before}")
            continue
        if i and not read_only:
            folder, unreadable = Path(str(manager.directory)), steps[:i]
            hosts.on_first(functools.partial(_set_aside, folder, unreadable), "unreadable checkpoints")
            manager.reload()
        return restored
    if steps:
        raise InputError(f"no checkpoint in {manager.directory} can be read: remove the folder to start again")
    return None


def shapes(state: TrainState) -> dict[str, list[int]]:
    """The shape of every array by its dotted path, parameters first."""
    leaves = jax.tree_util.tree_flatten_with_path({"params": state.params, "opt_state": state.opt_state})[0]
    paths = {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}
    return dict(sorted(paths.items(), key=lambda item: not item[0].startswith("params.")))


def _restore_one(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict]:
    with hosts.all_or_none(f"checkpoint {step}"), _reader(manager) as reader:
        state, meta = _read(reader, step, like)
    if _digest(state) != meta["digest"]:
        raise OSError("its contents do not match their digest")
    return state, meta


@contextlib.contextmanager
def _reader(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    """The manager, or one for this process alone: an error of one must not leave the others waiting."""
    if not hosts.several():
        yield manager
        return
    reader = open_read_only(Path(str(manager.directory)))
    try:
        yield reader
    finally:
        reader.close()


def _read(manager: ocp.CheckpointManager, step: int, like: TrainState) -> tuple[TrainState, dict]:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if _crc(meta) != meta["crc"]:
        raise OSError("its meta does not match its checksum")
    _check_shapes(meta["shapes"], shapes(like), f"checkpoint {step} in {manager.directory}")
    state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (state, like)]
    if kinds[0] != kinds[1]:
        raise OSError("its contents do not match their digest")
    return state, meta


@functools.cache
def _digest_on(where: jax.sharding.Sharding) -> Callable[[TrainState], jax.Array]:
    return jax.jit(digest, out_shardings=where)


def _digest(state: TrainState) -> list[int]:
    """The digest of a state; that of several processes is computed by all of them together."""
    where = state.step.sharding  # of a scalar: every device has all of it
    return [int(word) for word in np.asarray(_digest_on(where)(state))]


def _check_shapes(saved: dict, wanted: dict, where: str) -> None:
    for path in [*wanted, *saved]:
        if saved.get(path) != wanted.get(path):
            has, needs = (table.get(path, "absent") for table in (saved, wanted))
            raise InputError(
                f"{where} is of another architecture: the first difference is {path}, {has} there and {needs} here"
            )


def _set_aside(folder: Path, steps: list[int]) -> None:
    for step in steps:
        names = (f"unreadable-{step}" + "'" * n for n in itertools.count())
        (folder / str(step)).rename(next(path for path in map(folder.joinpath, names) if not path.exists()))


def _crc(meta: dict) -> int:
    content = {key: value for key, value in meta.items() if key != "crc"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextlib.contextmanager
def _as_os_error(folder: Any) -> Iterator[None]:
    """Orbax raises what its writer threads raised, of many kinds; a user's disk is the cause of all of them."""
    try:
        yield
    except Exception as error:
        raise OSError(f"a checkpoint could not be written in {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error of Orbax or TensorStore comes down to, in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    system = re.search(r"([^:]+) \[os_error_code", text)
    return system[1].strip() if system else text[:200]


def quieten() -> None:
    """Keep off the error stream what Orbax, asyncio and TensorStore say at length of failures that are raised too.

    For command lines: it changes the logging and the warnings of the whole process.
    """
    logging.getLogger("absl").addFilter(_not_of_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    sys.unraisablehook = _unraisable


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _unraisable(unraisable: Any) -> None:
    """Report an exception that nothing could catch, except what is left of coroutines when a read or write fails."""
    if "Event loop is closed" not in str(unraisable.exc_value) and "<coroutine object" not in repr(unraisable.object):
        sys.__unraisablehook__(unraisable)
