"""Snapshots of power-function averages during a run, and the averages that are made of them afterwards.

runs/NAME/RUN/averages/0001000-0.05.npz      sigma_rel 0.05 after 1,000 updates: one array for each dotted path

Half precision is what the paper keeps them in (Karras et al. 2024, arXiv:2312.02696, section 3.2); it rounds a weight
by less than bfloat16 does when the network computes. Arrays of fewer than `SMALL` elements stay float32: they cost
nothing, and some, such as the random frequencies of a time embedding, are multiplied by large numbers. The files are
complete or absent, and NumPy alone can read them, which checks the checksum of each array.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.training.ema import Decays, PowerFunction, reconstruction, several
from diffusion_jax.training.state import TrainState, dotted, nested
from diffusion_jax.typing import InputError, Params

NEGLIGIBLE = 1e-9
"""Snapshots whose weight is smaller are not read: 1,000 of them would move a weight less than float32 rounds it."""
SMALL = 4096
"""Arrays with fewer elements are kept in float32."""


class Snapshot(NamedTuple):
    """A file and what it holds: the average of relative width `sigma_rel` after `step` updates."""

    step: int
    sigma_rel: float
    path: Path


def save_snapshots(folder: Path, state: TrainState, decays: Decays) -> None:
    """Write those averages of a state that are power functions. All processes take part, the first one writes."""
    step = int(state.step)
    for average, decay in zip(state.averages, several(decays), strict=True):
        if isinstance(decay, PowerFunction):
            _write(folder / f"{step:07d}-{decay.sigma_rel}.npz", average)


def snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, by step and width."""
    found = []
    for path in folder.glob("*.npz"):
        match = re.fullmatch(r"(\d+)-(\d\.\d+)\.npz", path.name)
        if match:
            found.append(Snapshot(int(match[1]), float(match[2]), path))
    return sorted(found)


def keep_until(folder: Path, step: int) -> None:
    """Remove the snapshots of later steps, which a run that goes on from `step` will make again."""
    if jax.process_index() == 0:
        for snapshot in snapshots(folder):
            if snapshot.step > step:
                snapshot.path.unlink()


def reconstruct(folder: Path, sigma_rel: float, step: int | None = None) -> tuple[Params, float, int]:
    """The average of relative width `sigma_rel` after `step` updates (by default of the last snapshot), fp32.

    It is the least-squares combination of all snapshots until then, see `ema`, whether or not that width was tracked.
    Also the error of the profile it has, relative to the one asked for (0.01 is a good one, 0.3 is not), and the step.
    InputError if there are no snapshots, or one cannot be read; it is named.
    """
    there = snapshots(folder)
    last = max((s.step for s in there), default=0) if step is None else step
    used = [s for s in there if s.step <= last]
    if not used:
        raise InputError(f"no snapshots in {folder} until step {last}: train with snapshot_every=… to have them")
    weights, error = reconstruction([s.step for s in used], [s.sigma_rel for s in used], last, sigma_rel)
    total: dict[str, np.ndarray] = {}
    for snapshot, weight in zip(used, weights, strict=True):
        if abs(weight) >= NEGLIGIBLE:
            for name, array in _read(snapshot.path).items():
                total[name] = total.get(name, np.zeros(())) + weight * array.astype(np.float64)
    return nested({name: array.astype(np.float32) for name, array in total.items()}), error, last


def _write(path: Path, params: Params) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if jax.process_index():
        for _, leaf in leaves:
            _whole(leaf)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Array by array: the host never holds more than one of them whole.
    with zipfile.ZipFile(partial, "w") as archive:
        for where, leaf in leaves:
            with archive.open(f"{dotted(where)}.npy", "w", force_zip64=True) as file:
                kept = np.float16 if leaf.size >= SMALL else np.float32
                np.lib.format.write_array(file, _whole(leaf).astype(kept))
    partial.rename(path)


def _whole(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"the snapshot {path} cannot be read ({error}): remove it to do without") from None
