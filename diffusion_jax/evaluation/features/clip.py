"""Image embeddings of OpenAI's CLIP, by the two protocols that are published with them.

    "cmmd"    ViT-L/14 at 336: the square in the middle, Pillow's bicubic      CMMD (Jayasumana et al. 2024,
                                                                               arXiv:2401.09603)
    "openai"  224 or 336: the shorter side by Pillow's bicubic, then the       CLIP score (Hessel et al. 2021,
              square in the middle, as CLIP was trained                        arXiv:2104.08718)

both then (x / 255 - mean) / deviation with CLIP's own constants. Square pictures come out the same by either.

    pooled  W N h_0 of `nets.clip`, not scaled to length 1      f32[b, 768]

`clip_texts` gives the embeddings of texts by the other tower of the same file, for the CLIP score.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.features import net
from diffusion_jax.evaluation.features.resize import pillow_short_side, pillow_square
from diffusion_jax.nets.clip import TextEncoder, clip_vision, clip_vit_l_text
from diffusion_jax.text import tokenizer as tokenizers
from diffusion_jax.typing import Array, InputError, Net, Params
from diffusion_jax.weights.clip import from_transformers, text_from_transformers

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Protocol = Literal["cmmd", "openai"]


def clip_image(protocol: Protocol = "cmmd", *, size: int = 336, precision: str = "highest") -> net.FeatureNet:
    """CLIP ViT-L/14 at 336 or 224 pixels. precision: as `jax.default_matmul_precision`.

    load reads transformers' `openai/clip-vit-large-patch14-336` or `clip-vit-large-patch14` (size=224), the whole
    CLIP or its tower. InputError for other protocols and sizes.
    """
    if protocol not in get_args(Protocol) or size not in (224, 336):
        raise InputError(f"clip_image: protocol {protocol!r} at {size} is none of cmmd, openai at 224 or 336")
    return clip_features(f"clip_vit_l14_{size}", clip_vision(size=size), size, protocol, precision)


def clip_features(name: str, tower: Net, size: int, protocol: Protocol, precision: str = "highest") -> net.FeatureNet:
    """The feature network of any `clip_vision` that takes pictures of this size."""
    resize = {"cmmd": pillow_square, "openai": pillow_short_side}[protocol]
    told = {"cmmd": f"middle square, {size} pillow bicubic", "openai": f"shorter side {size} pillow bicubic, middle"}

    def prepare(images: np.ndarray) -> np.ndarray:
        return resize(net.pictures(images), size)

    def apply(params: Params, images: Array) -> net.Features:
        net.check_traced(images)
        x = net.normalised(images.astype(jnp.float32), MEAN, DEVIATION)
        with jax.default_matmul_precision(precision):
            return {"pooled": tower.apply(params, x, jnp.zeros(()))}

    load = net.loader(f"the picture tower of {name}", tower.init, from_transformers)
    return net.FeatureNet(net.named(name, precision), told[protocol], tower.init, prepare, apply, load)


def clip_texts(
    path: str | os.PathLike[str], texts: Sequence[str], *, encoder: TextEncoder | None = None, at_once: int = 64
) -> np.ndarray:
    """Embeddings f32[n, 768] of n texts by the text tower in a file of the whole CLIP; what is beyond 77 tokens is cut.

    The tokenizer is that of the folder which the file is in, or else an installed open_clip's. encoder: ViT-L/14's with
    its projection unless given. InputError for a file without such a tower, and where there is no tokenizer.
    """
    tower = encoder or clip_vit_l_text(n_out=768)
    folder = Path(path).expanduser() if Path(path).expanduser().is_dir() else Path(path).expanduser().parent
    there = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    words = tokenizers.load(folder if there else None)
    params = net.loader("a text tower of CLIP", tower.init, text_from_transformers)(path).params
    ids = tokenizers.tokenize(words, texts, tower.length)
    program = jax.jit(lambda params, ids: tower.apply(params, ids).pooled)
    found = []
    with jax.default_matmul_precision("highest"):
        for start in range(0, len(ids), at_once):
            rows = ids[start : start + at_once]
            filled = np.concatenate([rows, np.repeat(rows[-1:], at_once - len(rows), 0)])
            found.append(np.asarray(program(params, filled))[: len(rows)])
    return np.concatenate(found) if found else np.zeros((0, tower.width), np.float32)
