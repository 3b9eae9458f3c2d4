"""ImageNet (ILSVRC 2012; Russakovsky et al. 2015, arXiv:1409.0575), class-conditional, from what people have of it.

    FOLDER/train/n01440764/*.JPEG    and, if there is one, FOLDER/val/n01440764/*.JPEG                          (1)
    DATA_DIR/imagenet2012/5.1.0      prepared by TensorFlow Datasets, as array_record or tfrecord               (2)

Classes are the sorted folder names, which is TFDS's order too. Pixels are those of ADM's preprocessing
(`decoding.read_square`). Of 1,281,167 pictures only names, or places in files, are held in memory: the list is kept on
disk under a digest of the folders' or files' times, and is made anew when one of them changes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.training import tfds_without_tf
from diffusion_jax.training.data import Data, RandomAccess
from diffusion_jax.training.sources.cache import decoded, digest, user_cache
from diffusion_jax.training.sources.decoding import read_square
from diffusion_jax.training.sources.folders import SUFFIXES
from diffusion_jax.training.sources.tfds import TfdsSplit, is_labelled
from diffusion_jax.typing import InputError

IMAGENET_CACHE_BYTES = 2**34
"""Decoded pictures of at most 16 GiB are kept on disk: all of ImageNet at 64 pixels (16.4 GB), not at 128."""


def imagenet(
    size: int,
    path: str | os.PathLike[str] | None = None,
    *,
    cache_bytes: int = IMAGENET_CACHE_BYTES,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Data:
    """ImageNet at `size` x `size` x 3 from a folder (1) or (2); the held-out pictures are its validation set.

    path: default IMAGENET_DIR, else TFDS_DATA_DIR, else ~/tensorflow_datasets. Pictures are decoded when they are
    read, or once into `cache_dir` if that takes at most `cache_bytes` and the disk has room. A val folder without class
    folders is left out. InputError, one line, says what belongs where, or names a picture that cannot be read.
    """
    if size < 1:
        raise InputError(f"imagenet needs size >= 1, got {size}")
    root = _root(path)
    home = (Path(cache_dir).expanduser() if cache_dir is not None else user_cache()) / "imagenet" / digest(str(root))
    found = _from_folder(root, size, home) if (root / "train").is_dir() else _from_tfds(root, size, home)
    shape = (size, size, 3)
    folder = home / f"{size}" / found.state
    sources = decoded(tuple(found.splits), lambda: found.splits, shape, folder, cache_bytes)
    return Data(sources["train"], sources.get("test"), found.classes, shape)


class _Found(NamedTuple):
    """An opened set. `state` is a digest of all that its pixels depend on."""

    splits: Mapping[str, RandomAccess]
    classes: tuple[str, ...]
    state: str


def _root(path: str | os.PathLike[str] | None) -> Path:
    given = path or os.environ.get("IMAGENET_DIR") or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(given).expanduser().absolute()
    if (root / "train").is_dir() or _prepared_versions(root):
        return root
    raise InputError(
        f"ImageNet is not in {root}: put its pictures there as train/n01440764/*.JPEG (and val/n01440764/*.JPEG), or "
        "TFDS's prepared imagenet2012, or give another folder as path=FOLDER or in IMAGENET_DIR"
    )


# A folder of class folders -------------------------------------------------------------------------------------------


def _from_folder(root: Path, size: int, home: Path) -> _Found:
    train = _listing(root / "train", home)
    if not len(train.names):
        raise InputError(f"no pictures in {root / 'train'}: expected class folders, train/n01440764/*.JPEG")
    splits: dict[str, RandomAccess] = {"train": _ClassFolders(root / "train", train.names, train.labels, size)}
    states = [train.state]
    if (root / "val").is_dir():
        held = _listing(root / "val", home)
        strange = sorted(set(held.classes) - set(train.classes))
        if strange:
            raise InputError(f"{root / 'val'} has the class {strange[0]}, which {root / 'train'} lacks")
        if len(held.names):
            number = np.array([train.classes.index(c) for c in held.classes], np.int32)
            splits["test"] = _ClassFolders(root / "val", held.names, number[held.labels], size)
            states.append(held.state)
    return _Found(splits, train.classes, digest(*states))


@dataclass(frozen=True)
class _ClassFolders:
    """Pictures of a list decoded when they are read; names: bytes[n], relative to the folder."""

    folder: Path
    names: np.ndarray
    labels: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        path = self.folder / os.fsdecode(self.names[i])
        try:
            pixels = read_square(path, self.size)
        except Exception as error:  # Pillow's decoders raise nearly every kind on broken files
            raise InputError(f"cannot read the image {path}: {error}") from error
        return {"image": pixels, "label": self.labels[i]}


class _Listing(NamedTuple):
    """The pictures of class folders: names bytes[n], labels i32[n], and a digest of the folders' times."""

    classes: tuple[str, ...]
    names: np.ndarray
    labels: np.ndarray
    state: str


def _listing(folder: Path, home: Path) -> _Listing:
    """The pictures in the folders of `folder`, from the list kept in `home` if no class folder has changed since."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    state = digest(str(folder), [(name, (folder / name).stat().st_mtime_ns) for name in classes])
    kept = home / f"{folder.name}-{state}.npz"
    try:
        with np.load(kept) as arrays:
            names, labels = arrays["names"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        names, labels = _list(folder, classes)
        _keep(kept, names, labels)
    present = np.unique(labels)
    if len(present) < len(classes):  # folders without pictures are no classes
        classes, labels = [classes[i] for i in present], np.searchsorted(present, labels).astype(np.int32)
    return _Listing(tuple(classes), names, labels, state)


def _list(folder: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    def inside(name: str) -> list[bytes]:
        found = (entry.name for entry in os.scandir(folder / name))
        return [
            os.fsencode(f"{name}/{file}")
            for file in sorted(found)
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]

    with ThreadPoolExecutor(16) as pool:  # a network's file system answers one request a few milliseconds
        lists = list(pool.map(inside, classes))
    labels = np.repeat(np.arange(len(lists), dtype=np.int32), [len(names) for names in lists])
    return np.array([name for names in lists for name in names], np.bytes_), labels


def _keep(path: Path, names: np.ndarray, labels: np.ndarray) -> None:
    """Write a list whole or not at all. What cannot be kept is read again next time."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, names=names, labels=labels)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)


# Prepared by TFDS ----------------------------------------------------------------------------------------------------


def _prepared_versions(root: Path) -> list[Path]:
    """The prepared folders at `root`, oldest first: the folder itself, its versions, or those of its imagenet2012."""
    for pattern in ("dataset_info.json", "*/dataset_info.json", "imagenet2012/*/dataset_info.json"):
        found = [info.parent for info in root.glob(pattern) if (info.parent / "features.json").is_file()]
        if found:
            return sorted(found, key=lambda folder: [int(n) if n.isdigit() else 0 for n in folder.name.split(".")])
    return []


def _from_tfds(root: Path, size: int, home: Path) -> _Found:
    import tensorflow_datasets as tfds

    folder = _prepared_versions(root)[-1]
    builder = tfds.builder_from_directory(folder)
    features: Any = builder.info.features
    if features is None or "image" not in features or not is_labelled(features):
        raise InputError(f"{folder} is not a set of labelled pictures")
    present = {"train": "train", "test": "validation"}
    splits = {
        key: TfdsSplit(f"{builder.name}'s {split} split", records, features, True, partial(read_square, size=size))
        for key, split in present.items()
        if split in builder.info.splits and len(records := tfds_without_tf.records(builder, split, home))
    }
    if "train" not in splits:
        raise InputError(f"{folder} has no train split, only {', '.join(builder.info.splits)}")
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.is_file())
    return _Found(splits, tuple(features["label"].names), digest(str(folder), files))
