"""Reference statistics of a data set in files: ours, and those of pytorch-fid, ADM and EDM.

    ours             .npz   n, mean, scatter, and `protocol`: JSON with features, features_hash, resize, reference
    pytorch-fid, EDM .npz   mu, sigma                            (the number of examples is not in the file)
    ADM              .npz   mu, sigma, mu_s, sigma_s             (the last two: of the spatial features of sFID)

A file that would need unpickling, as EDM2's .pkl do, is refused: it could run code.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.evaluation.moments import Moments
from diffusion_jax.typing import InputError

UNKNOWN = 50_000
"""The number of examples taken for a file that does not say: both papers' statistics have as many or more."""


class Reference(NamedTuple):
    """The moments of real features, those of the spatial features if there are any, and what is known of them."""

    moments: Moments
    spatial: Moments | None
    protocol: dict[str, str]


def save_reference(path: Path, reference: Reference) -> None:
    """Write our format; the file appears whole or not at all."""
    arrays = {f"{name}_{key}": getattr(m, key) for name, m in _named(reference) for key in ("n", "mean", "scatter")}
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, protocol=np.asarray(json.dumps(reference.protocol)), **arrays)
    part.replace(path)


def load_reference(path: Path) -> Reference:
    """Read any of the formats above; InputError for a missing, damaged or pickled file, or one of another kind."""
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise InputError(f"{path}: a pickle can run code when it is read; statistics are taken from .npz files only")
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
    except FileNotFoundError:
        raise InputError(f"no statistics file {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as statistics ({error})") from None
    if "protocol" in content:
        return Reference(_ours(content, "", path), _spatial(content, path), json.loads(str(content["protocol"])))
    if {"mu", "sigma"} <= content.keys():
        return Reference(
            _theirs(content, "mu", "sigma", path), _theirs_spatial(content, path), {"reference": path.stem}
        )
    raise InputError(f"{path} holds {', '.join(sorted(content))}: not statistics of a known kind (mu and sigma)")


def _named(reference: Reference) -> list[tuple[str, Moments]]:
    both = [("pooled", reference.moments), ("spatial", reference.spatial)]
    return [(name, moments) for name, moments in both if moments is not None]


def _ours(content: dict[str, np.ndarray], name: str, path: Path) -> Moments:
    name = name or "pooled"
    try:
        n, mean, scatter = (content[f"{name}_{key}"] for key in ("n", "mean", "scatter"))
    except KeyError as error:
        raise InputError(f"{path} lacks {error.args[0]}") from None
    return _checked(Moments(int(n), mean, scatter), path)


def _spatial(content: dict[str, np.ndarray], path: Path) -> Moments | None:
    return _ours(content, "spatial", path) if "spatial_mean" in content else None


def _theirs(content: dict[str, np.ndarray], mean: str, covariance: str, path: Path) -> Moments:
    return _checked(
        Moments(UNKNOWN, content[mean].astype(np.float64), content[covariance].astype(np.float64) * (UNKNOWN - 1)), path
    )


def _theirs_spatial(content: dict[str, np.ndarray], path: Path) -> Moments | None:
    return _theirs(content, "mu_s", "sigma_s", path) if {"mu_s", "sigma_s"} <= content.keys() else None


def _checked(moments: Moments, path: Path) -> Moments:
    d = moments.mean.size
    if moments.mean.shape != (d,) or moments.scatter.shape != (d, d):
        raise InputError(f"{path}: a mean of shape {moments.mean.shape} with a covariance of {moments.scatter.shape}")
    if not (np.isfinite(moments.mean).all() and np.isfinite(moments.scatter).all()):
        raise InputError(f"{path} holds numbers that are not finite")
    return moments
