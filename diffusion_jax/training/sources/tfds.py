"""Image sets of TensorFlow Datasets, with or without TensorFlow."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from diffusion_jax.training import tfds_without_tf
from diffusion_jax.training.data import Data
from diffusion_jax.training.sources.cache import CACHE_BYTES, Shape, decoded, digest, user_cache
from diffusion_jax.training.sources.decoding import read_image
from diffusion_jax.typing import InputError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def tfds_images(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    size: int | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Data:
    """An image data set of TFDS, with or without TensorFlow; held-out images are its test or validation split.

    Read from `data_dir` (default: TFDS_DATA_DIR, else ~/tensorflow_datasets) when prepared there; else prepared from
    the archives in <data_dir>/downloads/manual, from Debian's dataset-fashion-mnist, or by one download. `size` crops
    and resizes, and is needed where images differ in size. InputError says what is missing and where it belongs.
    """
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()
    builder = _prepared(name, root)
    features = builder.info.features
    shape = _image_shape(name, features, size)
    labelled = is_labelled(features)
    classes = tuple(features["label"].names) if labelled else ()
    present = [s for s in ("train", "test", "validation") if s in builder.info.splits]
    if "train" not in present:
        raise InputError(f"{name} has no train split, only {', '.join(builder.info.splits)}")
    splits = dict(zip(("train", "test"), present, strict=False))

    def open_splits() -> dict[str, TfdsSplit]:
        found = {key: tfds_without_tf.records(builder, split) for key, split in splits.items()}
        read = partial(read_image, channels=shape[-1], size=size)
        return {k: TfdsSplit(f"{name}'s {k} split", r, features, labelled, read) for k, r in found.items()}

    folder = _cache_beside(Path(builder.data_dir), shape)
    sources = decoded(tuple(splits), open_splits, shape, folder, cache_bytes)
    return Data(sources["train"], sources.get("test"), classes, shape)


@dataclass(frozen=True)
class TfdsSplit:
    """Prepared examples decoded by `read` when they are read."""

    name: str
    records: Sequence[bytes]
    features: Any
    labelled: bool
    read: Callable[[bytes], np.ndarray]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        from tensorflow_datasets import decode

        try:
            example = self.features.deserialize_example_np(self.records[i], decoders={"image": decode.SkipDecoding()})
            pixels = self.read(example["image"])
        except Exception as error:  # protobuf, TFDS and Pillow each have their own for broken bytes
            raise InputError(f"cannot read example {i} of {self.name}: {error}") from error
        label = example["label"] if self.labelled else 0
        return {"image": pixels, "label": np.asarray(label, np.int32)}


def is_labelled(features: Any) -> bool:
    import tensorflow_datasets as tfds

    return "label" in features and isinstance(features["label"], tfds.features.ClassLabel)


def _image_shape(name: str, features: Any, size: int | None) -> Shape:
    """(h, w, c) of the decoded images; InputError for a data set without images or with images of many sizes."""
    if "image" not in features or len(features["image"].shape or ()) != 3:
        raise InputError(f"{name} is not a set of single images: its features are {', '.join(features)}")
    height, width, channels = features["image"].shape
    if channels not in (1, 3):
        raise InputError(f"{name} has images of {channels} channels; 1 and 3 can be read")
    if size is not None:
        return size, size, channels
    if height is None or width is None:
        raise InputError(f"the images of {name} differ in size: say to which they shall be resized (size=64)")
    return height, width, channels


def _cache_beside(prepared: Path, shape: Shape) -> Path:
    """A place for decoded images in the prepared set's folder, or in the user's cache where that is read-only."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in prepared.iterdir() if f.is_file())
    home = prepared if os.access(prepared, os.W_OK) else user_cache() / "tfds" / digest(str(prepared))
    return home / f"decoded-{'x'.join(map(str, shape))}" / digest(files)


def _prepared(name: str, root: Path) -> Any:
    """TFDS's builder of `name`, prepared in `root`."""
    import tensorflow_datasets as tfds

    builder = _builder(name, root)
    if builder.is_prepared():
        return builder
    builder = _builder(name, root, file_format="array_record")
    try:
        downloads = root / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        if builder.name == "fashion_mnist":
            _restore_fashion_mnist(downloads / "manual")
        _check_archives(builder, downloads / "manual")
        # A folder of its own: TFDS would take an earlier archive's extraction of the same name for this one's.
        with tempfile.TemporaryDirectory(prefix="extracting-", dir=downloads) as extracting:
            config = tfds.download.DownloadConfig(extract_dir=extracting, try_download_gcs=False)
            tfds_without_tf.prepare(builder, config)
    except tfds_without_tf.preparation_errors() as error:
        cause = _cause(error)
        raise InputError(f"{name} could not be prepared in {root}: {' '.join(str(cause).split())}") from cause
    except (AttributeError, ModuleNotFoundError) as error:
        if tfds_without_tf.is_installed():
            raise
        raise InputError(f"preparing {name} needs TensorFlow: pip install tensorflow ({error})") from error
    if not builder.is_prepared():
        raise InputError(f"{builder.data_dir} is there but is not a prepared data set: remove it")
    return _builder(name, root)


def _cause(error: BaseException) -> BaseException:
    """What failed: TFDS removes its folder then, which fails too while its other downloads still write there."""
    while isinstance(error, OSError) and error.errno == errno.ENOTEMPTY and error.__context__ is not None:
        error = error.__context__
    return error


def _builder(name: str, root: Path, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        with _quiet():
            return tfds.builder(name, data_dir=root, **options)
    except (ValueError, AssertionError) as error:
        close = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), 3)
        first = f"did you mean {' or '.join(close)}?" if close else next(iter(str(error).strip().splitlines()), "")
        raise InputError(f"TFDS has no data set {name!r}: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """TFDS warns of every folder that is not prepared yet."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_archives(builder: Any, manual: Path) -> None:
    """InputError if an archive in `manual` is not the right one, or if one is neither there nor to be downloaded."""
    missing = {}
    for url, info in (builder.url_infos or {}).items():
        archive = manual / (info.filename or "")
        if archive.is_file():
            _check_sum(builder.name, archive, info.checksum, url)
        elif not tfds_without_tf.cached_download(builder, url, info.checksum):
            missing[url] = info.filename or url.rsplit("/", 1)[-1]
    why = _unreachable(list(missing)) if missing else None
    if why is None:
        return
    files = ", ".join(f"{filename} ({url})" for url, filename in list(missing.items())[:8])
    debian = ", or apt-get install dataset-fashion-mnist" if builder.name == "fashion_mnist" else ""
    raise InputError(
        f"{builder.name} is not prepared in {manual.parent.parent} and {why}: put {files} into {manual}, "
        f"or set TFDS_DATA_DIR to the folder of a prepared copy{debian}"
    )


def _check_sum(name: str, archive: Path, expected: str, url: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{archive} is not {name}'s: its SHA-256 is {found}, that of {url} is {expected}")


def _unreachable(urls: Sequence[str], seconds: float = 5.0) -> str | None:
    """Why the hosts of `urls` cannot be downloaded from, or None. One short request each; TFDS would take minutes."""
    answers: dict[str, str | None] = {}

    def ask(host: str, url: str) -> None:
        import requests

        try:
            with requests.get(url, stream=True, timeout=seconds) as reply:
                answers[host] = f"answers {reply.status_code}" if reply.status_code >= 400 else None
        except requests.RequestException:
            answers[host] = "cannot be reached"

    hosts = {urlsplit(url).netloc: url for url in urls}
    # Daemon threads, because looking up a host's name has no time limit of its own.
    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in hosts.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    failed = [f"{h} {why}" for h in hosts if (why := answers.get(h, "does not answer")) is not None]
    return failed[0] if failed else None


def _restore_fashion_mnist(manual: Path) -> None:
    """Put Debian's files into `manual` as upstream published them, unless they are there.

    Debian rewrote the gzip headers; with name and time back (RFC 1952, FNAME and MTIME) the checksums are TFDS's.
    """
    written = {"train": 1504176606, "t10k": 1504176627}
    for part, mtime in written.items():
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{part}-{kind}-ubyte"
            source, target = DEBIAN_FASHION_MNIST / f"{name}.gz", manual / f"{name}.gz"
            if target.exists() or not source.exists():
                continue
            raw = source.read_bytes()
            header = b"\x1f\x8b\x08\x08" + struct.pack("<I", mtime) + raw[8:10] + name.encode() + b"\0"
            manual.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".unfinished")
            unfinished.write_bytes(header + raw[10:])
            unfinished.rename(target)
