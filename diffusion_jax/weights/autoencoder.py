"""The weights of diffusers' `AutoencoderKL` and `VQModel`, and of `diffusion_jax.nets.autoencoder` and `vq`.

The modules have the same names, and the attention layers the same history, as in `unet2d`, whose table this is:
files older than diffusers 0.18, Stable Diffusion's own among them, are read too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.nets.autoencoder import Autoencoder
from diffusion_jax.nets.vq import VectorAutoencoder
from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, unet2d


def from_diffusers(state: Mapping[str, np.ndarray], params_like: Any) -> dict[str, Any]:
    """The parameters of a `kl_autoencoder` or `vq_autoencoder` from the state dict of an `AutoencoderKL` or `VQModel`.

    params_like: the parameters, or what `jax.eval_shape(autoencoder.init, key)` gives; sets shapes and types.
    Raises ValueError listing every weight that is missing, left over or of another shape.
    """
    return unet2d.from_diffusers(state, params_like)


def to_diffusers(params: Any) -> dict[str, np.ndarray]:
    """The state dict of an `AutoencoderKL` or `VQModel` from the parameters here; inverse of `from_diffusers`.

    Raises ValueError listing every parameter that has no name there.
    """
    return unet2d.to_diffusers(params)


def load(path: str | os.PathLike[str], autoencoder: Autoencoder | VectorAutoencoder) -> dict[str, Any]:
    """The parameters of an autoencoder from safetensors in diffusers' layout: a file, an index or their folder.

    InputError for a file that cannot be read or holds another model; it names the first difference.
    """
    like = jax.eval_shape(autoencoder.init, jax.eval_shape(lambda: jax.random.key(0)))
    try:
        return from_diffusers(files.load(path), like)
    except InputError:
        raise
    except ValueError as error:
        first, *rest = str(error).splitlines()[1:] or [str(error)]
        more = f", and {len(rest)} more" if rest else ""
        raise InputError(f"{path} does not hold this autoencoder: {first.strip()}{more}") from error
