"""All measures and pictures, in worker processes.

Beside `__main__`, because a worker that is spawned can import functions from any module but that one.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conformance import gallery, likelihood, posterior, samplers
from conformance.table import SAMPLERS

LIMIT = 1800.0  # seconds after which it gives up, where a shared machine takes 300


def measure_sampler(name: str) -> tuple[dict[str, Any], Any]:
    """The row of a sampler, and its paths for the gallery (None if it cannot run)."""
    row = samplers.measure(name)
    return row, gallery.path(name) if "laws" in row else None


def measure_all(folder: Path, workers: int = 2) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Results, paths of the samplers, captions of the pictures: everything, the longest first, in worker processes."""
    parts = [posterior.ROWS[i : i + 6] for i in range(0, len(posterior.ROWS), 6)]
    jobs: dict[tuple[str, Any], tuple[Callable[..., Any], Any]] = {("likelihood", 0): (likelihood.measure, ())}
    jobs |= {("posterior", i): (posterior.measure, (part,)) for i, part in enumerate(parts)}
    jobs |= {("sampler", name): (measure_sampler, (name,)) for name in SAMPLERS}
    jobs |= {("picture", name): (draw, (folder,)) for name, draw in gallery.PICTURES.items()}
    done = run(jobs | {("floor", 0): (samplers.measure_floor, ())}, workers)
    measured = {name: done["sampler", name] for name in SAMPLERS}
    results = {
        "samplers": [row for row, _ in measured.values()],
        "floor": done["floor", 0],
        "likelihood": done["likelihood", 0],
        "posterior": [row for i in range(len(parts)) for row in done["posterior", i]],
    }
    paths = {name: path for name, (_, path) in measured.items() if path is not None}
    return results, paths, {name: done["picture", name] for name in gallery.PICTURES}


def run(jobs: dict[Any, tuple[Callable[..., Any], Any]], workers: int) -> dict[Any, Any]:
    """The result of each job. The first error, or `LIMIT`, stops the workers and is raised."""
    end = time.monotonic() + LIMIT
    with multiprocessing.get_context("spawn").Pool(workers) as pool, tqdm(total=len(jobs), unit="measure") as bar:
        waiting = {
            name: pool.apply_async(function, arguments, callback=lambda _: bar.update())
            for name, (function, arguments) in jobs.items()
        }
        return {name: result.get(max(end - time.monotonic(), 0)) for name, result in waiting.items()}
