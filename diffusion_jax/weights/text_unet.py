"""The weights of diffusers' `UNet2DConditionModel` and `ControlNetModel`, and of `diffusion_jax.nets.text_unet` and
`controlnet`.

The modules have the same names, so the table is one of leaves:

    here                               there
    kernel [*widths, n_in, n_out]      weight [n_out, n_in, *widths]                                            (1)
    scale, embedding                   weight
    bias                               bias
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.weights import trees


def from_diffusers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `text_unet` or a `controlnet` from the state dict of diffusers' module, by (1).

    params_like: the network's parameters, or what `jax.eval_shape(net.init, key)` gives; sets shapes and types.
    Raises ValueError listing every weight that is missing, left over or of another shape.
    """
    return trees.read(state, params_like, trees.same_names)


def to_diffusers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of diffusers' module from the parameters here, by (1); inverse of `from_diffusers`.

    Raises ValueError listing every parameter that has no name there.
    """
    return trees.write(params, trees.same_names, "diffusers")
