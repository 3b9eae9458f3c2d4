r"""Which operation of a program took how long, from the trace that JAX's profiler writes.

A trace is JSON, {"traceEvents": [{"ph": "X", "ts", "dur", "name", "pid", "tid", "args"}, ...]} in microseconds. Events
of operations carry `hlo_module` and `hlo_op`. On accelerators each kind of view is a line of its own: one is read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Seconds of each operation of a device and how often it ran; in which any ran; from first start to last end."""

    ops: dict[str, tuple[float, int]]
    busy: float
    span: float


def newest_trace(folder: Path) -> Path:
    """The trace last written below a folder; FileNotFoundError if there is none."""
    found = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no trace below {folder}")
    return found[-1]


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file."""
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def op_times(events: Iterable[dict[str, Any]], module: str, enclosing: Iterable[str] = ()) -> Times:
    """What the operations of a module took on one device. enclosing: operations that only hold others, left out."""
    events = list(events)
    named = (e for e in events if e.get("name") in ("process_name", "thread_name"))
    lines = {(e["pid"], e.get("tid")): e["args"].get("name", "") for e in named}
    outer = set(enclosing)
    chosen = [
        e for e in events
        if e.get("ph") == "X" and (args := e.get("args", {})).get("hlo_op") and args["hlo_op"] not in outer
        and args.get("hlo_module", "").split("(")[0] == module
    ]  # fmt: skip
    chosen = _one_device(chosen, lines)
    ops: dict[str, tuple[float, int]] = {}
    for e in chosen:
        name = e["args"]["hlo_op"]
        seconds, number = ops.get(name, (0.0, 0))
        ops[name] = (seconds + e["dur"] * 1e-6, number + 1)
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in chosen)
    return Times(ops, _covered(spans) * 1e-6, (max(end for _, end in spans) - spans[0][0]) * 1e-6 if spans else 0.0)


def _one_device(events: list[dict[str, Any]], lines: dict[tuple, str]) -> list[dict[str, Any]]:
    """The events of the first device, and of one view of it where there are several."""
    devices = sorted({e["pid"] for e in events if lines.get((e["pid"], None), "").startswith("/device:")})
    if devices:
        events = [e for e in events if e["pid"] == devices[0]]
    for view in ("XLA Ops", "Stream"):
        some = [e for e in events if lines.get((e["pid"], e.get("tid")), "").startswith(view)]
        if some:
            return some
    # Simulated devices share a process: the first one's events tell themselves apart.
    ordinals = {e["args"].get("device_ordinal") for e in events}
    first = min(ordinals, key=str) if ordinals else None
    return [e for e in events if e["args"].get("device_ordinal") == first]


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals sorted by their starts."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
