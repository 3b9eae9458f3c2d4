"""A folder of anybody's pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_jax.training.data import Data
from diffusion_jax.training.sources.cache import CACHE_BYTES, decoded, digest, user_cache
from diffusion_jax.training.sources.decoding import read_image
from diffusion_jax.typing import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File names that `image_folder` takes for images, in any case."""


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int,
    channels: int = 3,
    cache_bytes: int = CACHE_BYTES,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Data:
    """The images under `path` as `size` x `size` x `channels`, centrally cropped and resized; channels is 1 or 3.

    The first level of subfolders are the classes; images directly in `path` are unlabelled. Of 100 images or more,
    about 5 % and at least 16 are held out by a hash of their names. Decoded images are kept in `cache_dir`.
    InputError for a folder that is missing, empty or mixes both layouts, and naming a file that cannot be read.
    """
    if size < 1 or channels not in (1, 3):
        raise InputError(f"image_folder needs size >= 1 and channels 1 or 3, got {size} and {channels}")
    root = Path(path).expanduser().resolve()
    names = _image_names(root)
    classes, labels = _classes(root, names)
    shape = (size, size, channels)
    splits = {
        split: _Folder(root, tuple(names[i] for i in rows), labels[rows], size, channels)
        for split, rows in zip(("train", "test"), _held_out(names), strict=True)
        if len(rows)
    }
    stats = [(name, (s := (root / name).stat()).st_size, s.st_mtime_ns) for name in names]
    home = Path(cache_dir).expanduser() if cache_dir is not None else user_cache()
    folder = home / "folders" / digest(str(root), shape) / digest(stats, labels.tolist())
    sources = decoded(tuple(splits), lambda: splits, shape, folder, cache_bytes)
    return Data(sources["train"], sources.get("test"), classes, shape)


def folder_classes(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The class names of an image folder, () without subfolders; reads no image. InputError as `image_folder`."""
    root = Path(path).expanduser().resolve()
    return _classes(root, _image_names(root))[0]


@dataclass(frozen=True)
class _Folder:
    """Images decoded when they are read."""

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        path = self.root / self.names[i]
        try:
            pixels = read_image(path, self.channels, self.size)
        except Exception as error:  # Pillow's decoders raise nearly every kind on broken files
            raise InputError(f"cannot read the image {path}: {error}") from error
        return {"image": pixels, "label": self.labels[i]}


def _image_names(root: Path) -> list[str]:
    """Sorted relative names of the images under `root`, hidden files and folders left out."""
    if not root.is_dir():
        raise InputError(f"{root} is {'not a folder' if root.exists() else 'missing'}: expected a folder of images")
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        above = {real, *real.parents}  # a link to one of these would go in circles
        subfolders[:] = [s for s in subfolders if s[0] != "." and Path(folder, s).resolve() not in above]
        found = (Path(folder, f) for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        names += [f.relative_to(root).as_posix() for f in found]
    if not names:
        raise InputError(f"no images under {root}: expected files ending in {', '.join(SUFFIXES)}")
    return sorted(names)


def _classes(root: Path, names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, () without subfolders, and `i32[n]` labels."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    if "" in tops and len(set(tops)) > 1:
        stray = names[tops.index("")]
        raise InputError(f"{root} has images in subfolders (classes) and also beside them ({stray}): move one kind")
    classes = tuple(sorted(set(tops) - {""}))
    number = {name: i for i, name in enumerate(classes)} | {"": 0}
    return classes, np.array([number[top] for top in tops], np.int32)


def _held_out(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: those of the smallest hashes, so that new images move few old ones."""
    count = max(16, len(names) // 20) if len(names) >= 100 else 0
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
    order = np.array(sorted(range(len(names)), key=hashes.__getitem__))
    return np.sort(order[count:]), np.sort(order[:count])
