"""What a run writes down: experiment.json, and metrics.jsonl with one line every so many steps.

Of several processes, process 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.training import hosts
from diffusion_jax.typing import InputError


class Meter(NamedTuple):
    """What has been measured since the last line of the log.

    losses, norms: one of each step. images: examples seen since the time `since` in seconds, which is None before the
    first dispatch: that one holds the compilation and says nothing of the speed. share: the model-FLOPs utilisation
    of one image a second, None where the devices' peak is not known.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    images: int = 0
    since: float | None = None
    share: float | None = None

    @property
    def speed(self) -> float:
        """Images a second, 0 if nothing was timed."""
        return self.images / max(time.perf_counter() - (self.since or 0.0), 1e-9)

    @property
    def shown(self) -> str:
        """The speed in words, with the utilisation if that is known."""
        speed = self.speed
        words = f"{speed:,.0f} images/s"
        return words if self.share is None else f"{words}, {100 * speed * self.share:.1f} % MFU"


def measured(meter: Meter, losses: np.ndarray, norms: np.ndarray, images: int) -> Meter:
    """The meter after some more steps, of `images` examples together."""
    grown = meter._replace(losses=(*meter.losses, *losses.tolist()), norms=(*meter.norms, *norms.tolist()))
    if meter.since is None:
        return restarted(grown)
    return grown._replace(images=meter.images + images)


def restarted(meter: Meter) -> Meter:
    """The meter with its clock set anew, to leave what came before, such as sampling, out of the speed."""
    return meter._replace(images=0, since=time.perf_counter())


def write_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line to metrics.jsonl."""
    if not hosts.first():
        return
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_meter(path: Path, step: int, meter: Meter) -> Meter:
    """Append the means of a meter as a line, if there is anything in it; returns a fresh one."""
    if not meter.losses:
        return meter
    line = {"step": step, "loss": float(np.mean(meter.losses)), "grad_norm": float(np.mean(meter.norms))}
    if meter.images:
        speed = meter.speed
        line["images_per_second"] = round(speed, 1)
        if meter.share is not None:
            line["mfu"] = round(speed * meter.share, 6)
    write_line(path, line)
    return restarted(Meter(share=meter.share))


def read_lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; half a line, which a killed run may leave, is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines after `step` and a result: those steps are made again."""
    lines = [line for line in read_lines(path) if line["step"] <= step and not line.get("finished")]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))


def result(path: Path, steps: int) -> dict | None:
    """The last line of a run that has finished all its steps, or None."""
    lines = read_lines(path)
    return lines[-1] if lines and lines[-1].get("finished") and lines[-1]["step"] >= steps else None


def read_record(path: Path) -> dict:
    """The content of experiment.json; InputError if it is damaged."""
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("arguments", {}), dict):
        raise InputError(f"{path} is damaged: give the training command again, which writes it anew")
    return record


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write experiment.json."""
    write_whole(path, json.dumps(record, indent=2) + "\n")


def changed_arguments(path: Path, record: Mapping[str, Any]) -> list[str]:
    """The arguments in which a record differs from the one on disk, as name: old -> new."""
    old: dict = {}
    with contextlib.suppress(InputError, FileNotFoundError):
        old = read_record(path).get("arguments", {})
    if not old:
        return []
    new = json.loads(json.dumps(record.get("arguments", {})))
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)]


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    if not hosts.first():
        return
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
