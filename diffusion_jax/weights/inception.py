"""The weights of FID's InceptionV3 in torch's layout, as pytorch-fid and torch-fidelity publish them.

The modules have the same names; kernels are turned, the normalization's `scale` is `weight` there. Counters of training
batches (`num_batches_tracked`) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees
from diffusion_jax.weights.trees import Leaf, Path


def from_torch(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters from a state dict; ValueError listing all that is missing, left over or of another shape."""
    own = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    return trees.read(own, params_like, _table)


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """The state dict from the parameters; inverse of `from_torch`."""
    return trees.write(params, _table, "InceptionV3")


def _table(path: Path) -> Leaf | None:
    return Leaf(".".join(path)) if path[-1].startswith("running_") else trees.same_names(path)
