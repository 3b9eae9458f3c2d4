"""Sets of pictures that are read as they are needed: a data set, a folder, an archive; each with a hash of its bits.

    folder            image files of one size, sorted by name           sha256 of the files
    .npz              `images` u8[n, h, w, c], or `arr_0`; `labels`      sha256 of the file
    arrays            `image` u8[n, h, w, c] and `label` of a data set   sha256 of the array
    read one by one   a data set too large for that                      sha256 of its length and 64 examples of it

`make sample format=npz` writes `images` and `labels`, ADM's samples are `arr_0`. Nothing is resized on the way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion_jax.evaluation.results import sha256
from diffusion_jax.training.data import Source, size, take
from diffusion_jax.training.sources import SUFFIXES
from diffusion_jax.typing import InputError

PART = 256
"""Pictures that are read at a time."""
SPREAD = 64


class PictureSet(NamedTuple):
    """n pictures of one shape: read(index i[k]) -> u8[k, h, w, c]; their name, and `digest()`, a sha256.

    labels: i[n], where they are classes and at hand.
    """

    name: str
    n: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray]
    digest: Callable[[], str]
    labels: np.ndarray | None = None


def parts(pictures: PictureSet, index: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """All pictures, or those at `index` i[m], a part at a time."""
    index = np.arange(pictures.n) if index is None else index
    return (pictures.read(index[i : i + PART]) for i in range(0, len(index), PART))


def some(pictures: PictureSet, n: int, seed: int = 0) -> np.ndarray:
    """The places of n random pictures of a set, each at most once, in rising order; of all if it has no more."""
    if n >= pictures.n:
        return np.arange(pictures.n)
    return np.sort(np.random.default_rng(seed).permutation(pictures.n)[:n])


def of_source(source: Source, name: str) -> PictureSet:
    """The pictures of a data set; InputError where its examples are not pictures."""
    n = size(source)
    if n == 0:
        raise InputError(f"{name} has no examples")
    first = take(source, np.arange(1)).get("image")
    if first is None or first.dtype != np.uint8 or first.ndim != 4:
        what = "no image" if first is None else f"{first.dtype}{list(first.shape[1:])}"
        raise InputError(f"the examples of {name} are not pictures ({what}): give reference= a folder, .npz or file")
    if isinstance(source, Mapping):
        images = source["image"]
        labels = source.get("label")
        return PictureSet(name, n, images.shape[1:], lambda i: images[i], lambda: sha256({"image": images}), labels)
    each = _threaded(lambda i: source[int(i)]["image"])
    spread = np.unique(np.linspace(0, n - 1, SPREAD).astype(int))
    return PictureSet(
        name, n, first.shape[1:], each, lambda: sha256({"n": np.asarray(n), "some": each(spread)})
    )  # fmt: skip


def of_path(path: str | Path) -> PictureSet:
    """The pictures of a folder or an .npz; InputError for anything else, and for pictures of several shapes."""
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.suffix != ".npz" or not path.is_file():
        raise InputError(f"{path} is neither a folder of pictures nor an .npz")
    images = archive(path)
    if images is None:
        raise InputError(f"{path} has no array `images` or `arr_0` of pictures u8[n, h, w, c]")
    with np.load(path) as file:
        labels = file.get("labels")
    return PictureSet(path.name, len(images), images.shape[1:], lambda i: images[i], lambda: sha256(path), labels)


def archive(path: Path) -> np.ndarray | None:
    """The pictures u8[n, h, w, c] in an .npz, or None if it holds others; InputError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            name = next((name for name in ("images", "arr_0") if name in file), None)
            images = None if name is None else file[name]
    except Exception as error:  # whatever NumPy's reader of damaged archives comes to raise
        raise InputError(f"{path} cannot be read as arrays ({' '.join(str(error).split())})") from None
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape):
        raise InputError(f"{path}: pictures are u8[n, h, w, c], these are {images.dtype}{list(images.shape)}")
    return images


def _of_folder(path: Path) -> PictureSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    files = [file for file in files if file.name != "grid.png"]  # the sheet that `make sample` lays beside them
    if not files:
        raise InputError(f"no images under {path}: expected files ending in {', '.join(SUFFIXES)}")
    shape = _read_picture(files[0]).shape

    def one(i: int) -> np.ndarray:
        pixels = _read_picture(files[i])
        if pixels.shape != shape:
            raise InputError(
                f"{files[i]} is {list(pixels.shape)} and {files[0].name} {list(shape)}: one size is needed"
            )
        return pixels

    def digest() -> str:
        hashed = hashlib.sha256()
        for file in files:
            hashed.update(file.read_bytes())
        return hashed.hexdigest()

    return PictureSet(path.name, len(files), shape, _threaded(one), digest)


def _read_picture(file: Path) -> np.ndarray:
    """u8[h, w, 1] of a grey picture, u8[h, w, 3] of others."""
    try:
        with Image.open(file) as picture:
            grey = picture.mode in ("1", "L", "LA")
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    except Exception as error:  # Pillow's decoders raise nearly every kind on broken files
        raise InputError(f"cannot read the image {file}: {error}") from error
    return pixels[:, :, None] if grey else pixels


def _threaded(one: Callable[[int], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def read(index: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(one, index.tolist())))

    return read
