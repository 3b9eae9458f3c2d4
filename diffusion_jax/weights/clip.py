"""The weights of CLIP's tower for pictures, as transformers writes them, and of `diffusion_jax.nets.clip`.

The modules have the same names. A file of the whole CLIP is read too: its text tower, the temperature, and the tables
of indices of older files (`position_ids`) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path

OTHERS = ("text_model.", "text_projection.", "logit_scale")


def from_transformers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `clip_vision` from the state dict of a CLIPVisionModelWithProjection or a CLIPModel.

    ValueError listing every weight that is missing, left over or of another shape.
    """
    own = {n: v for n, v in state.items() if not n.startswith(OTHERS) and not n.endswith("position_ids")}
    return trees.read(own, params_like, _table)


def to_transformers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a CLIPVisionModelWithProjection; inverse of `from_transformers`."""
    return trees.write(params, _table, "CLIP")


def _table(path: Path) -> Leaf | None:
    return Leaf(".".join(path)) if path[-1] == "class_embedding" else trees.same_names(path)
