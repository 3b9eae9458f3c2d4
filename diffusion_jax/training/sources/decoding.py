"""Compressed images as arrays, through Pillow.

`read_image` takes whatever people have in folders. `read_square` is the preprocessing of ADM (Dhariwal & Nichol 2021,
arXiv:2105.05233), which ImageNet results since, and their reference statistics, are for: while the shorter side is
at least twice the wanted size, halve both by the mean of 2x2 pixels; scale bicubically so that the shorter side is
the size; cut out the middle.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np


def read_image(file: Path | bytes, channels: int, size: int | None = None) -> np.ndarray:
    """Any image Pillow reads as `u8[h,w,channels]`; with `size`, its central square at `size` x `size`.

    The first frame of an animation, upright by its EXIF tag, transparency on white, 16 bits scaled to 8.
    Raises what Pillow raises for a file that cannot be read.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        if size is not None:
            image.draft(None, (2 * size, 2 * size))  # JPEG: decode at a reduced scale, still twice what is needed
        image.load()
        upright = _eight_bits(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
    if size is not None:
        side = min(upright.size)
        left, top = ((extent - side) / 2 for extent in upright.size)
        upright = upright.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    pixels = np.asarray(upright)
    return pixels[:, :, None] if channels == 1 else pixels


def _eight_bits(image: Any, mode: str) -> Any:
    """A Pillow image of any mode in `mode`, L or RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.clip(np.asarray(image, np.float64), 0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def read_square(file: Path | bytes, size: int) -> np.ndarray:
    """Any image Pillow reads as `u8[size,size,3]` by ADM's preprocessing: box-halved, bicubic, cut in the middle.

    As there, the camera's orientation tag and transparency are ignored. Raises what Pillow raises.
    """
    from PIL import Image

    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        image.load()
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.convert("RGB").crop((left, top, left + size, top + size)))
