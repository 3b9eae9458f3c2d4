"""`make conformance`, `python -m conformance [out=FOLDER]`: measure everything, print and write the table, draw."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from diffusion_jax.arguments import resolve, split_arguments
from diffusion_jax.typing import InputError

# Each worker has one thread: two of them share two cores better than XLA and BLAS do within one.
ONE_THREAD = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def conformance(out: str = "runs/conformance") -> int:
    """Measure everything against exact answers; 0 if all that is claimed holds.

    Args:
        out: the folder for README.md, conformance.json, gallery.md and the pictures.
    """
    os.environ.update(ONE_THREAD)
    start, folder = time.perf_counter(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    from conformance import gallery, report
    from conformance.run import measure_all

    results, paths, captions = measure_all(folder)
    captions["trajectories"] = gallery.trajectories(folder, paths)
    captions["convergence"] = gallery.convergence(folder, results["samplers"])
    gallery.summary(folder, results["samplers"])
    gallery.write(folder, captions)
    page, held = report.write(folder, results, time.perf_counter() - start)
    print(page)
    print(f"written to {folder}")
    return 0 if held else 1


if __name__ == "__main__":
    try:
        sys.exit(conformance(**resolve(conformance, split_arguments(sys.argv[1:]), "conformance")))
    except InputError as error:
        sys.exit(str(error))
