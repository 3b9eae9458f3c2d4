"""TFDS without TensorFlow: the few of its names that preparing and reading image sets lean on (TFDS 4.9.10).

TFDS imports TensorFlow lazily, as a name `tf` in its modules. While `prepare` runs, that name is a stand-in with the
file functions builders use, and images are encoded by Pillow; both are put back afterwards. Where TensorFlow is
installed nothing is replaced. TFDS reads its random-access format by itself; `TFRecords` adds its default one.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import hashlib
import importlib.util
import io
import os
import shutil
import struct
import sys
import types
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.typing import InputError


def is_installed() -> bool:
    """Whether TensorFlow can be imported."""
    return importlib.util.find_spec("tensorflow") is not None


def prepare(builder: Any, config: Any) -> None:
    """`builder.download_and_prepare`, with or without TensorFlow. Raises what TFDS raises."""
    if is_installed():
        builder.download_and_prepare(download_config=config)
        return
    with _stand_in(builder):
        builder.download_and_prepare(download_config=config)


def cached_download(builder: Any, url: str, checksum: str) -> bool:
    """Whether TFDS already holds the verified download of `url`."""
    from tensorflow_datasets.core.download import resource

    name = resource.get_dl_fname(url, checksum)
    root = builder.data_dir_root / "downloads"
    return any(resource.is_locally_cached(folder / name) for folder in (root / builder.name, root))


def preparation_errors() -> tuple[type[Exception], ...]:
    """What goes wrong outside this program while TFDS prepares: network, disk, archives, manual steps."""
    from tensorflow_datasets.core.download import download_manager, extractor, util

    theirs = (extractor.ExtractError, extractor.UnsafeArchiveError, util.DownloadError)
    return (OSError, EOFError, AssertionError, download_manager.NonMatchingChecksumError, *theirs)


@contextlib.contextmanager
def _stand_in(builder: Any) -> Iterator[None]:
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature

    modules = [extractor, *(sys.modules[c.__module__] for c in type(builder).__mro__ if c.__module__ in sys.modules)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if "tf" in vars(module):
                stack.enter_context(_replaced(module, "tf", _tensorflow()))
        stack.enter_context(_replaced(image_feature._ImageEncoder, "_encode_image", _encode))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _tensorflow() -> types.SimpleNamespace:
    """The file functions that TFDS's image builders call."""
    gfile = types.SimpleNamespace(
        GFile=open, exists=os.path.exists, isdir=os.path.isdir, listdir=os.listdir, glob=glob.glob, walk=os.walk,
        makedirs=lambda path: os.makedirs(path, exist_ok=True), copy=shutil.copyfile,
    )  # fmt: skip
    text = types.SimpleNamespace(
        as_text=lambda s: s if isinstance(s, str) else s.decode(),
        as_bytes=lambda s: s if isinstance(s, bytes) else s.encode(),
    )
    return types.SimpleNamespace(io=types.SimpleNamespace(gfile=gfile), compat=text)


def _encode(self: Any, image: np.ndarray) -> bytes:
    """TFDS's `_ImageEncoder._encode_image` by Pillow: PNG is exact, JPEG has TensorFlow's quality of 95."""
    from PIL import Image
    from tensorflow_datasets.core.features import image_feature

    image_feature._validate_np_array(image, shape=self.shape, dtype=self.np_dtype)
    buffer = io.BytesIO()
    options = {"compress_level": 1} if self.encoding_format == "png" else {"quality": 95}
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, self.encoding_format, **options)
    return buffer.getvalue()


def records(builder: Any, split: str, keep: Path | None = None) -> Sequence[bytes]:
    """The serialised examples of a prepared split by index; InputError for a file format that needs TensorFlow.

    keep: a folder for what `TFRecords.open` finds out, if it is to be found out once only.
    """
    import tensorflow_datasets as tfds

    file_format = builder.info.file_format.value
    if file_format == "tfrecord":
        return TFRecords.open([os.fspath(p) for p in builder.info.splits[split].filepaths], keep)
    if file_format == "array_record":
        return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    raise InputError(f"{builder.data_dir} is in the format {file_format}; array_record and tfrecord can be read")


@dataclass(frozen=True)
class TFRecords(Sequence[bytes]):
    """TFRecord files by index. A record is length u64, its crc u32, the bytes, their crc u32.

    `offsets[f]` are the positions of file f's records' bytes, `lengths[f]` their lengths, `ends` the running count.
    The checksums are not verified: the images inside carry their own.
    """

    paths: tuple[str, ...]
    offsets: tuple[np.ndarray, ...]
    lengths: tuple[np.ndarray, ...]
    ends: tuple[int, ...]

    @classmethod
    def open(cls, paths: Sequence[str], keep: Path | None = None) -> TFRecords:
        """Index the files by one pass over the lengths; InputError names a missing or truncated file.

        With a folder `keep`, the index is kept there, under a digest of the files' names, sizes and times.
        """
        kept = None if keep is None else keep / f"records-{_state(paths)}.npz"
        found = _kept(kept, len(paths)) if kept is not None else None
        if found is None:
            with ThreadPoolExecutor(16) as pool:  # a network's file system takes its time for each request
                found = list(pool.map(_index, map(Path, paths)))
            if kept is not None:
                _keep(kept, found)
        ends = tuple(int(n) for n in np.cumsum([len(o) for o, _ in found]))
        return cls(tuple(paths), tuple(o for o, _ in found), tuple(n for _, n in found), ends)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        f = bisect.bisect_right(self.ends, i)
        j = i - (self.ends[f - 1] if f else 0)
        with open(self.paths[f], "rb") as file:
            file.seek(int(self.offsets[f][j]))
            return file.read(int(self.lengths[f][j]))


def _state(paths: Sequence[str]) -> str:
    try:
        stats = [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _kept(path: Path, files: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """An index that was kept, or None if there is none or it is damaged."""
    try:
        with np.load(path) as arrays:
            offsets, lengths, counts = (arrays[name] for name in ("offsets", "lengths", "counts"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(counts) != files or not sum(counts) == len(offsets) == len(lengths):
        return None
    return list(zip(*(np.split(a, np.cumsum(counts)[:-1]) for a in (offsets, lengths)), strict=True))


def _keep(path: Path, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write an index whole or not at all; what cannot be kept is found again next time."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    offsets, lengths = (np.concatenate(part) for part in zip(*found, strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(file, offsets=offsets, lengths=lengths, counts=[len(o) for o, _ in found])
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)


def _index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the records' bytes begin, and how long they are: two `i64[n]`."""
    offsets, lengths, position = [], [], 0
    try:
        with path.open("rb") as file:
            end = path.stat().st_size
            while position < end:
                file.seek(position)
                (length,) = struct.unpack("<Q", file.read(12)[:8])
                offsets.append(position + 12)
                lengths.append(length)
                position += 12 + length + 4
    except (OSError, struct.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if position != end:
        raise InputError(f"{path} ends inside a record: prepare the data set again")
    return np.asarray(offsets, np.int64), np.asarray(lengths, np.int64)
