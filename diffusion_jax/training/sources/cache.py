"""Decoded images on disk: uint8 arrays, memory-mapped."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion_jax.training.data import RandomAccess, Source
from diffusion_jax.typing import InputError

Shape = tuple[int, int, int]
CACHE_BYTES = 2**33
"""Decoded images of at most 8 GiB are kept on disk."""
LONG = 50_000
"""From so many images on, decoding shows its progress."""


def decoded(
    names: Sequence[str], open_splits: Callable[[], Mapping[str, RandomAccess]], shape: Shape, folder: Path, most: int
) -> Mapping[str, Source]:
    """The named splits as memory-mapped arrays from `folder`, written first if need be.

    Splits of more than `most` bytes, or more than the disk has room for, are returned as they are.
    """
    if not folder.is_dir():
        splits = open_splits()
        wanted = sum(len(s) for s in splits.values()) * (math.prod(shape) + 4)
        if wanted > most:
            return splits
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot keep decoded images in {folder.parent}: {error.strerror}") from error
        if wanted > 0.8 * shutil.disk_usage(folder.parent).free:
            return splits
        _write(splits, shape, folder)
    return {name: {k: _mapped(folder / f"{name}_{k}.npy") for k in ("image", "label")} for name in names}


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def _write(splits: Mapping[str, RandomAccess], shape: Shape, folder: Path) -> None:
    """Decode into a temporary folder, rename it to `folder`, remove the caches it replaces."""
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        for name, source in splits.items():
            _decode_all(source, shape, unfinished / f"{name}_image.npy", unfinished / f"{name}_label.npy")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its cache is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for other in folder.parent.iterdir():
        if other != folder and (other.name[0] != "." or other.stat().st_mtime < time.time() - 86400):
            shutil.rmtree(other, ignore_errors=True)


def _decode_all(source: RandomAccess, shape: Shape, image_path: Path, label_path: Path) -> None:
    n, block = len(source), 64
    images = np.lib.format.open_memmap(image_path, mode="w+", dtype=np.uint8, shape=(n, *shape))
    labels = np.zeros((n,), np.int32)

    def decode(start: int) -> None:
        for i in range(start, min(start + block, n)):
            example = source[i]
            images[i], labels[i] = example["image"], example["label"]

    pool = ThreadPoolExecutor(os.cpu_count())
    bar = tqdm(total=n, desc="decoding once", unit="image", dynamic_ncols=True, disable=n < LONG)
    try:
        for _ in pool.map(decode, range(0, n, block)):
            bar.update(block)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    images.flush()
    np.save(label_path, labels)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def user_cache() -> Path:
    """`$DIFFUSION_JAX_CACHE`, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("DIFFUSION_JAX_CACHE") or f"{base}/diffusion_jax").expanduser()
