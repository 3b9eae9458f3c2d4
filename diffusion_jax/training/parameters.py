"""Parameters in a file of their own, out of any run: NAME.npz with one array for each dotted path.

The format is that of the snapshots (`snapshots`), at full precision; NumPy alone can read it.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np

from diffusion_jax.training.state import dotted, nested
from diffusion_jax.typing import InputError, Params


def write_parameters(path: str | Path, params: Params, **texts: str) -> Path:
    """Write parameters, and texts that say what they are under names that begin with a dot; whole or not at all."""
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path}: parameters are written to a file that ends in .npz")
    arrays = {dotted(where): np.asarray(leaf) for where, leaf in jax.tree.leaves_with_path(params)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays, **{f".{name}": np.asarray(text) for name, text in texts.items()})  # pyright: ignore
    return partial.replace(path)


def read_parameters(path: str | Path) -> Params:
    """The parameters in a file, fp32; InputError if it is missing, damaged or something else."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith(".")}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a file of parameters (.npz): {error}") from None
    return nested({name: array.astype(np.float32) for name, array in arrays.items()})
