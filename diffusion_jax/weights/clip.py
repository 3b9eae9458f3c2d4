"""The weights of CLIP's towers, as transformers writes them, and of `diffusion_jax.nets.clip`.

The modules have the same names. A file of the whole CLIP is read too: the other tower, the temperature, and the tables
of indices of older files (`position_ids`) are left out, and so is the projection of a text for a tower without one.
A tower for texts that was written alone may name its weights without the `text_model.` before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path

TEXT = ("text_model.", "text_projection.", "logit_scale")
VISION = ("vision_model.", "visual_projection.", "logit_scale")
BARE = ("embeddings.", "encoder.", "final_layer_norm.")


def from_transformers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `clip_vision` from the state dict of a CLIPVisionModelWithProjection or a CLIPModel.

    ValueError listing every weight that is missing, left over or of another shape.
    """
    return trees.read(_without(state, TEXT), params_like, _table)


def to_transformers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a CLIPVisionModelWithProjection; inverse of `from_transformers`."""
    return trees.write(params, _table, "CLIP")


def text_from_transformers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `clip_text` from the state dict of a CLIPTextModel, of one WithProjection or a CLIPModel.

    params_like: the parameters, or what `jax.eval_shape(encoder.init, key)` gives; sets shapes and types.
    ValueError listing every weight that is missing, left over or of another shape.
    """
    others = VISION if "text_projection" in params_like else (*VISION, "text_projection.")
    own = _without(state, others)
    named = {f"text_model.{name}" if name.startswith(BARE) else name: value for name, value in own.items()}
    return trees.read(named, params_like, trees.same_names)


def text_to_transformers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a CLIPTextModel, or of a CLIPTextModelWithProjection; inverse of `text_from_transformers`."""
    return trees.write(params, trees.same_names, "CLIP")


def _without(state: Mapping[str, np.ndarray], others: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {n: v for n, v in state.items() if not n.startswith(others) and not n.endswith("position_ids")}


def _table(path: Path) -> Leaf | None:
    return Leaf(".".join(path)) if path[-1] == "class_embedding" else trees.same_names(path)
