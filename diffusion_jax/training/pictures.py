"""Arrays as picture files, through Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUND = 255


def grid(images: np.ndarray, columns: int, scale: int = 1) -> np.ndarray:
    """Tile `u8[n,h,w,c]` row by row into one picture `u8[H,W,c]`, each pixel enlarged to scale x scale.

    >>> grid(np.zeros((6, 8, 8, 1), np.uint8), columns=3).shape
    (22, 32, 1)
    """
    images = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    n, h, w, c = images.shape
    rows, gap = -(-n // columns), max(2, scale)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[y : y + h, x : x + w] = image
    return sheet


def fitting_scale(width: int, columns: int, target: int = 640) -> int:
    """The enlargement at which a sheet of so many columns is about `target` pixels wide, at least 1."""
    return max(1, round(target / (columns * width)))


def save_picture(path: Path, image: np.ndarray) -> None:
    """Write `u8[h,w,c]`, c = 1, 3 or 4, as PNG; the file appears whole or not at all."""
    replace(path, lambda p: _to_pil(image).save(p, format="PNG"))


def save_animation(path: Path, frames: list[np.ndarray], milliseconds: int = 60, hold: int = 1500) -> None:
    """Write frames `u8[h,w,c]` as an endless GIF that rests on the last one."""
    pictures = [_to_pil(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [hold]
    replace(
        path,
        lambda p: pictures[0].save(
            p, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        ),
    )


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under another name, and put it at `path` when it is whole."""
    part = path.with_name(f".{path.name}.part")
    write(part)
    part.replace(path)
