"""The weights of diffusers' `UNet2DModel` and of `diffusion_jax.nets.unet`.

The modules have the same names, so the table is one of leaves:

    here                               there
    kernel [*widths, n_in, n_out]      weight [n_out, n_in, *widths]                                            (1)
    scale, embedding                   weight
    bias                               bias

Files older than diffusers 0.18 name the attention layers query, key, value, proj_attn; they are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def from_diffusers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `unet` from the state dict of a `UNet2DModel`, by table (1).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    Raises ValueError listing every weight that is missing, left over or of another shape.
    """
    source = {_modern(name): value for name, value in state.items()}
    if len(source) != len(state):
        raise ValueError("two weights have the same name once the old attention names are replaced")
    return trees.read(source, params_like, trees.same_names)


def to_diffusers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of a `UNet2DModel` from the parameters of a `unet`, by table (1); inverse of `from_diffusers`.

    Raises ValueError listing every parameter that has no name there.
    """
    return trees.write(params, trees.same_names, "diffusers")


def _modern(name: str) -> str:
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name)
