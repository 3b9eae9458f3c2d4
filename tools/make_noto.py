"""Make the captioned Noto Emoji that ship with the project, from the package that has them.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/make_noto.py package

The base pictures of Emoji 16.0 on white, 64 pixels wide, without flags and without those that equal an earlier one: as
one sheet without loss, and a list of captions, aliases and categories in its order. Run once; the result is committed.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_jax.training.sources.noto import CAPTIONS, COLUMNS, SHEET, SIZE


def on_white(path: Path) -> np.ndarray:
    """A picture of any mode as u8[SIZE, SIZE, 3] on white."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((SIZE, SIZE)))


def main(package: Path) -> None:
    seen, pictures, captions = set(), [], []
    for entry in sorted(json.loads((package / "emoji.json").read_text()), key=lambda e: e["sort_order"]):
        if entry["category"] == "Flags" or not entry["has_img_google"]:
            continue
        picture = on_white(package / "img" / "google" / "64" / entry["image"])
        if picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        pictures.append(picture)
        aliases = [re.sub(r"_|(?<=\w)-(?=\w)", " ", name) for name in entry["short_names"]]
        captions.append({"caption": entry["name"].lower(), "aliases": aliases, "category": entry["category"]})
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows, COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    sheet.reshape(-1, SIZE, SIZE, 3)[: len(pictures)] = pictures
    joined = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(joined).save(SHEET, lossless=True, quality=100, method=6)
    CAPTIONS.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in captions) + "\n]\n")
    print(f"{len(pictures)} pictures, {SHEET.stat().st_size / 1e6:.2f} MB, {CAPTIONS.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
