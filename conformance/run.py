"""All measures and pictures, in worker processes.

Beside `__main__`, because a worker that is spawned can import functions from any module but that one.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conformance import gallery, likelihood, posterior, samplers
from conformance.table import SAMPLERS


def measure_sampler(name: str) -> tuple[dict[str, Any], Any]:
    """The row of a sampler, and its paths for the gallery (None if it cannot run)."""
    row = samplers.measure(name)
    return row, gallery.path(name) if "laws" in row else None


def measure_all(folder: Path, workers: int = 2) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Results, paths of the samplers, captions of the pictures: everything, the longest first, in worker processes."""
    parts = [posterior.ROWS[i : i + 6] for i in range(0, len(posterior.ROWS), 6)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        triangle = pool.submit(likelihood.measure)
        inverse = [pool.submit(posterior.measure, part) for part in parts]
        rows = {name: pool.submit(measure_sampler, name) for name in SAMPLERS}
        floor = pool.submit(samplers.measure_floor)
        pictures = {name: pool.submit(draw, folder) for name, draw in gallery.PICTURES.items()}
        wait([triangle, *inverse, *rows.values(), floor, *pictures.values()], pool)
    measured = {name: future.result() for name, future in rows.items()}
    results = {
        "samplers": [row for row, _ in measured.values()],
        "floor": floor.result(),
        "likelihood": triangle.result(),
        "posterior": [row for part in inverse for row in part.result()],
    }
    paths = {name: path for name, (_, path) in measured.items() if path is not None}
    return results, paths, {name: future.result() for name, future in pictures.items()}


def wait(futures: list[Future], pool: ProcessPoolExecutor) -> None:
    """Show progress until all are done; the first error ends it."""
    for future in tqdm(as_completed(futures), total=len(futures), unit="measure"):
        if future.exception():
            pool.shutdown(wait=False, cancel_futures=True)
            future.result()
