"""Captioned colour pictures that ship with the project: Noto Emoji.

1,636 pictures of 64 x 64 pixels on white with a caption each ("steam locomotive") and shorter names for some. Noto
Emoji is Copyright Google Inc., Apache License 2.0, which lies beside the files; `tools/make_noto.py` made them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.training.data import Data
from diffusion_jax.typing import InputError

SIZE, COLUMNS = 64, 40
FOLDER = Path(__file__).parent / "noto_emoji"
SHEET, CAPTIONS = FOLDER / "noto.webp", FOLDER / "captions.json"


class Captioned(NamedTuple):
    """Pictures u8[n, size, size, 3], what each is called (the first name is its caption), and its category."""

    images: np.ndarray
    names: list[tuple[str, ...]]
    categories: list[str]


def noto(size: int = 64) -> Captioned:
    """All pictures, `size` pixels wide by the mean of neighbours; InputError unless size is 64, 32, 16 or 8."""
    if size not in (64, 32, 16, 8):
        raise InputError(f"size={size}: the pictures are 64 pixels wide, or 32, 16 or 8")
    from PIL import Image

    entries = json.loads(CAPTIONS.read_text())
    with Image.open(SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows = pixels.shape[0] // SIZE
    cut = pixels.reshape(rows, SIZE, COLUMNS, SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIZE, SIZE, 3)
    names = [tuple(dict.fromkeys((entry["caption"], *entry["aliases"]))) for entry in entries]
    return Captioned(_smaller(cut[: len(entries)], SIZE // size), names, [entry["category"] for entry in entries])


def captioned_emoji(size: int = 64) -> Data:
    """The pictures as a data set: examples are {"image", "label"}, the label being the picture's number in `noto`.

    About 5 % are held out. InputError as `noto`.
    """
    found = noto(size)
    test = held_out(found.names)
    label = np.arange(len(test), dtype=np.int32)
    train, rest = ({"image": found.images[rows], "label": label[rows]} for rows in (~test, test))
    return Data(train, rest, (), (size, size, 3))


def held_out(names: list[tuple[str, ...]], share: float = 0.05) -> np.ndarray:
    """bool[n]: the pictures that are not trained on, by a hash of their captions."""
    hashes = [int.from_bytes(hashlib.sha256(name[0].encode()).digest()[:8], "big") / 2**64 for name in names]
    return np.asarray(hashes) < share


def _smaller(images: np.ndarray, factor: int) -> np.ndarray:
    n, size = len(images), images.shape[1] // factor
    means = images.reshape(n, size, factor, size, factor, 3).mean((2, 4), dtype=np.float32)
    return np.round(means).astype(np.uint8)
