"""The weights of DINOv2, as Meta and as transformers publish them, and of `evaluation.features.dinov2`.

The modules have the names of transformers' Dinov2Model; other names of the same, and Meta's, are

    here, transformers 5                             transformers' files               Meta
    encoder.layer.I.attention.q_proj, k_, v_         attention.attention.query, …      blocks.I.attn.qkv, three in one
    encoder.layer.I.attention.o_proj                 attention.output.dense            blocks.I.attn.proj
    encoder.layer.I.layer_scale1.lambda1                                               blocks.I.ls1.gamma
    encoder.layer.I.norm1, mlp.fc1, …                                                  blocks.I.norm1, mlp.fc1, …
    embeddings.cls_token, position_embeddings                                          cls_token, pos_embed
    embeddings.patch_embeddings.projection                                             patch_embed.proj
    layernorm                                                                          norm

`mask_token`, which only training uses, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path

META = (
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
)
OLDER = (
    (r"^dinov2\.", ""),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
AS_THEY_ARE = ("cls_token", "position_embeddings", "lambda1")


def from_published(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters from a state dict of either source, by the table above.

    ValueError listing every weight that is missing, left over or of another shape, by transformers' names.
    """
    named = _renamed(state)
    named.pop("embeddings.mask_token", None)
    return trees.read(named, params_like, _table)


def to_transformers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a Dinov2Model of transformers 5, without its mask token."""
    return trees.write(params, _table, "DINOv2")


def _renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in state.items():
        for pattern, other in (*META, *OLDER):
            name = re.sub(pattern, other, name)
        if ".attn.qkv." in name:
            for part, third in zip("qkv", np.split(np.asarray(value), 3), strict=True):
                found[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = third
        else:
            found[name] = value
    return found


def _table(path: Path) -> Leaf | None:
    return Leaf(".".join(path)) if path[-1] in AS_THEY_ARE else trees.same_names(path)
