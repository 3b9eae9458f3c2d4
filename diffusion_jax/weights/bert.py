"""The weights of BERT, as transformers writes them, and of `diffusion_jax.nets.bert`; the modules have the same names.

What lies on top of the encoder in older files (`pooler`, `cls`), the prefix "bert." and tables of indices are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees

OTHERS = ("pooler.", "cls.", "embeddings.position_ids")


def from_transformers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `bert` from the state dict of a BertModel.

    ValueError listing every weight that is missing, left over or of another shape.
    """
    plain = {name.removeprefix("bert."): value for name, value in state.items()}
    return trees.read({n: v for n, v in plain.items() if not n.startswith(OTHERS)}, params_like, trees.same_names)


def to_transformers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a BertModel without its pooler; inverse of `from_transformers`."""
    return trees.write(params, trees.same_names, "BERT")
