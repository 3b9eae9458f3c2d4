"""Pictures in and out: what is read to start from, and PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from diffusion_jax._version import __version__
from diffusion_jax.training.pictures import replace
from diffusion_jax.typing import InputError

Size = tuple[int, int]
"""Height and width in pixels."""


def parse_size(text: str, step: int = 8) -> Size:
    """WIDTHxHEIGHT as (height, width); InputError unless both are multiples of `step`.

    >>> parse_size("512x768")
    (768, 512)
    """
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdigit() for word in words):
        raise InputError(f"size={text}: give WIDTHxHEIGHT, such as 512x512")
    width, height = (int(word) for word in words)
    if width % step or height % step or not width or not height:
        near = "x".join(str(max(step, round(v / step) * step)) for v in (width, height))
        raise InputError(f"size={text}: width and height must be multiples of {step}, such as {near}")
    return height, width


def read_picture(path: str, size: Size | None = None, step: int = 8) -> np.ndarray:
    """A picture file as f32[h, w, 3] in [-1, 1], upright; resized and cropped at its centre to `size`.

    Without `size` it keeps its own, cut to multiples of `step`. InputError for a file that is missing or no picture.
    """
    picture = _opened(path, "RGB")
    if size is None:
        size = (picture.height // step * step, picture.width // step * step)
        if not all(size):
            raise InputError(f"{path} has {picture.width}x{picture.height} pixels: at least {step}x{step} are needed")
        picture = picture.crop((0, 0, size[1], size[0]))
    elif (picture.height, picture.width) != size:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 127.5 - 1.0


def read_mask(path: str, like: Size, size: Size) -> np.ndarray:
    """A mask as f32[*size, 1] of 0 and 1, 1 where it is white, brought to `size` as its picture of size `like` was.

    InputError unless it is as large as the picture.
    """
    mask = _opened(path, "L")
    own = (mask.height, mask.width)
    if own != like:
        raise InputError(
            f"the mask {path} has {own[1]}x{own[0]} pixels, the picture {like[1]}x{like[0]}: they must be the same"
        )
    cut = all(0 <= whole - part < 64 and part % 8 == 0 for whole, part in zip(own, size, strict=True))
    if own != size and cut:
        mask = mask.crop((0, 0, size[1], size[0]))
    elif own != size:
        mask = ImageOps.fit(mask, (size[1], size[0]), Image.Resampling.NEAREST)
    return (np.asarray(mask)[:, :, None] >= 128).astype(np.float32)


def picture_size(path: str) -> Size:
    """(height, width) of a picture file; InputError as `read_picture`."""
    picture = _opened(path, "RGB")
    return picture.height, picture.width


def extended(image: np.ndarray, mask: np.ndarray, expand: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Picture and mask with room at the left, top, right and bottom, to be filled; the edge is repeated into it.

    image: f32[h, w, 3]; mask: f32[h, w, 1]; both come back larger, the mask with 1 in what is new.
    """
    left, top, right, bottom = expand
    room = ((top, bottom), (left, right), (0, 0))
    return np.pad(image, room, mode="edge"), np.pad(mask, room, constant_values=1.0)


def parse_expand(text: str, step: int = 8) -> tuple[int, int, int, int]:
    """LEFT,TOP,RIGHT,BOTTOM; InputError unless these are four multiples of `step`, not all 0."""
    words = text.split(",")
    if len(words) != 4 or not all(word.isdigit() for word in words):
        raise InputError(f"expand={text}: give LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,128,0")
    left, top, right, bottom = (int(word) for word in words)
    if any(v % step for v in (left, top, right, bottom)) or not left + top + right + bottom:
        raise InputError(f"expand={text}: these must be multiples of {step}, and one of them above 0")
    return left, top, right, bottom


def save_with_settings(path: Path, image: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Write u8[h, w, 3] as PNG with its settings as text: "parameters" for people, "diffusion_jax" as JSON."""
    info = PngInfo()
    shown = {
        key: value for key, value in settings.items() if key not in ("prompt", "negative") and value not in ("", None)
    }
    line = ", ".join(f"{key}: {value}" for key, value in shown.items())
    negative = f"Negative prompt: {settings['negative']}\n" if settings.get("negative") else ""
    info.add_itxt("parameters", f"{settings.get('prompt', '')}\n{negative}{line}")
    info.add_itxt("diffusion_jax", json.dumps({"version": __version__, **settings}))
    replace(path, lambda p: Image.fromarray(image).save(p, format="PNG", pnginfo=info))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG of `save_with_settings`; InputError for another file."""
    try:
        with Image.open(path) as picture:
            return json.loads(getattr(picture, "text", {})["diffusion_jax"])
    except (OSError, KeyError, ValueError):
        raise InputError(f"{path} holds no settings of diffusion_jax") from None


def read_latents(path: str, n: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The noise in a .npy file, f32[n, h, w, c]; InputError for another kind of file or another shape."""
    try:
        array = np.load(Path(path).expanduser(), allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"latents={path}: there is no such file") from None
    except (OSError, ValueError, EOFError):
        raise InputError(f"latents={path} is not an array of numbers in a .npy file") from None
    wanted = (n, *shape)
    if array.shape != wanted or not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"latents={path} holds {array.dtype}{list(array.shape)}; here f32{list(wanted)} is needed")
    if not np.isfinite(array).all():
        raise InputError(f"latents={path} holds numbers that are not finite")
    return array.astype(np.float32)


def _opened(path: str, mode: str) -> Image.Image:
    file = Path(path).expanduser()
    try:
        with Image.open(file) as picture:
            upright = ImageOps.exif_transpose(picture)
            if mode == "RGB" and upright.mode in ("RGBA", "LA", "PA", "P"):
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                upright = Image.alpha_composite(white, upright)
            return upright.convert(mode)
    except FileNotFoundError:
        raise InputError(f"there is no picture {path}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} cannot be read as a picture: {' '.join(str(error).split())[:120]}") from None
