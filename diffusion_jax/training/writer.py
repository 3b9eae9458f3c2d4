"""Writing many examples while more are being drawn: one file each, or one archive of them all.

Files are written by threads in the background, which hold at most `AHEAD` batches: memory does not grow with the number
of pictures, and whoever draws waits only if the disk is slower than the device.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffusion_jax.training.pictures import save_picture

AHEAD = 4
"""Batches that may wait to be written."""
Write = Callable[[int, np.ndarray], None]
"""(number of the first example, [k, *d]): begin to write examples that follow those before; errors come later."""


@contextlib.contextmanager
def png_files(
    folder: Path, threads: int | None = None, save: Callable[[Path, np.ndarray], None] = save_picture,
    suffix: str = ".png",
) -> Iterator[Write]:  # fmt: skip
    """Each picture as folder/000000.png and so on, whole or not at all. OSError here or from `Write`.

    save, suffix: how one example becomes one file, for those that are no pictures.
    """
    threads = threads or min(8, os.cpu_count() or 1)

    def save_all(start: int, images: np.ndarray) -> None:
        for i, image in enumerate(images):
            save(folder / f"{start + i:06d}{suffix}", image)

    with _in_background(threads) as submit:

        def write(start: int, images: np.ndarray) -> None:
            share = -(-len(images) // threads)
            submit([(save_all, start + i, images[i : i + share]) for i in range(0, len(images), share)])

        yield write


@contextlib.contextmanager
def npz_file(path: Path, n: int, labels: np.ndarray | None = None) -> Iterator[Write]:
    """n pictures as the array `images` of one .npz, and their `labels`: whole or not at all. OSError as above."""
    part = path.with_name(f".{path.name}.part")
    with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
        if labels is not None:
            with archive.open("labels.npy", "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(labels))
        with archive.open("images.npy", "w", force_zip64=True) as file, _in_background(1) as submit:

            def save(start: int, images: np.ndarray) -> None:
                if start == 0:
                    header = {"descr": images.dtype.str, "fortran_order": False, "shape": (n, *images.shape[1:])}
                    np.lib.format.write_array_header_2_0(file, header)
                file.write(np.ascontiguousarray(images).data)

            yield lambda start, images: submit([(save, start, images)])
    part.replace(path)


@contextlib.contextmanager
def nothing() -> Iterator[Write]:
    """Writes nothing."""
    yield lambda start, images: None


@contextlib.contextmanager
def _in_background(threads: int) -> Iterator[Callable[[list[tuple]], None]]:
    """A function that runs calls, given as (function, *arguments), on threads; what they raise is raised here."""
    waiting: deque[list[Future]] = deque()

    def finish(batches: int) -> None:
        while len(waiting) > batches:
            for future in waiting.popleft():
                future.result()

    with ThreadPoolExecutor(threads) as pool:

        def submit(calls: list[tuple]) -> None:
            finish(AHEAD - 1)
            waiting.append([pool.submit(*call) for call in calls])

        try:
            yield submit
            finish(0)
        finally:
            pool.shutdown(cancel_futures=True)
