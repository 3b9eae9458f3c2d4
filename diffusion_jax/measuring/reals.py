"""Real examples, measured once: their moments and features in files beside the runs, named by all that they depend on.

    FOLDER/NETWORK-DATA-DIGEST.npz       statistics, as `evaluation.statistics` reads and writes them
    FOLDER/NETWORK-DATA-DIGEST.pooled.npy       features f32[n, d], where a metric needed them, mapped into memory

with DIGEST of the network's name, hash and resize, and of the pictures' hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation.features import Opened
from diffusion_jax.evaluation.results import sha256
from diffusion_jax.evaluation.statistics import Reference, load_reference, save_reference
from diffusion_jax.measuring.pictures import PictureSet, archive, of_path, parts
from diffusion_jax.measuring.stream import Gathered, feature_batches, gather
from diffusion_jax.typing import InputError

FEATURES = {"pooled": "moments", "spatial": "spatial"}
"""Where a `Reference` has the moments of a feature."""


class Real(NamedTuple):
    """A measured set of real examples: what its protocol says of it, and its features."""

    name: str
    digest: str
    n: int
    gathered: Gathered


class Lens(NamedTuple):
    """How pictures become features: an opened network, the devices, pictures on each of them, and a progress bar."""

    opened: Opened
    mesh: Mesh
    batch: int | None = None
    watch: Callable[[Iterable[np.ndarray], int, str], Iterable[np.ndarray]] = lambda parts, n, what: parts

    def look(
        self, pictures: Iterable[np.ndarray], n: int, what: str, names: Sequence[str], keep: Sequence[str]
    ) -> Gathered:
        """The features `names` of n pictures, and the rows of those to keep."""
        seen: Iterator[np.ndarray] = iter(self.watch(pictures, n, what))
        net, params = self.opened.net, self.opened.params
        return gather(feature_batches(net, params, seen, self.mesh, names=names, batch=self.batch), keep)

    def protocol(self) -> dict[str, str]:
        """What a statistics file says of the network."""
        net = self.opened.net
        return {"features": net.name, "features_hash": self.opened.sha256, "resize": net.resize}


def measured(lens: Lens, pictures: PictureSet, names: Sequence[str], keep: Sequence[str], folder: Path | None) -> Real:
    """The features of a set of pictures, from the files in `folder` if they are there, else written to it."""
    digest = pictures.digest()
    path = None if folder is None else folder / f"{_stem(lens, pictures, digest)}.npz"
    found = None if path is None else _cached(path, names, keep)
    if found is None:
        names = tuple(dict.fromkeys([*names, *keep]))
        found = lens.look(parts(pictures), pictures.n, f"features of {pictures.name}", names, keep)
        if path is not None and "pooled" in names:
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, rows in found.kept.items():
                _save_rows(path.with_suffix(f".{name}.npy"), rows)
            save_reference(path, as_reference(lens, pictures.name, digest, found))
    return Real(pictures.name, digest, pictures.n, found._replace(labels=pictures.labels))


def as_reference(lens: Lens, name: str, digest: str, found: Gathered) -> Reference:
    """The statistics to be written of a measured set."""
    protocol = lens.protocol() | {"reference": name, "reference_hash": digest}
    return Reference(found.moments["pooled"], found.moments.get("spatial"), protocol)


def of_reference(lens: Lens, path: str, names: Sequence[str], keep: Sequence[str], folder: Path | None) -> Real:
    """What `reference=` names: pictures in a folder or an .npz, or a file of statistics.

    InputError for statistics of another network or width, and where the examples themselves are needed.
    """
    file = Path(path).expanduser()
    if file.is_dir() or (file.suffix == ".npz" and file.is_file() and archive(file) is not None):
        return measured(lens, of_path(file), names, keep, folder)
    reference = load_reference(file)
    if keep:
        raise InputError(
            f"reference={path} holds means and covariances, these metrics compare single examples: give the pictures, "
            "or ask for fid and sfid alone"
        )
    for key, value in lens.protocol().items():
        if reference.protocol.get(key, value) != value:
            raise InputError(f"reference={path} was made with {key} {reference.protocol[key]}, here it is {value}")
    moments = {name: m for name, field in FEATURES.items() if (m := getattr(reference, field)) is not None}
    missing = [name for name in names if name not in moments and name in FEATURES]
    if missing:
        raise InputError(f"reference={path} has no statistics of the {missing[0]} features")
    told = reference.protocol
    n = reference.moments.n
    return Real(told["reference"], told.get("reference_hash") or sha256(file), n, Gathered(n, moments, {}))


def _stem(lens: Lens, pictures: PictureSet, digest: str) -> str:
    text = "\n".join([*lens.protocol().values(), digest])
    words = [lens.opened.net.name, pictures.name]
    safe = [re.sub(r"[^\w.]+", "_", word)[:40] for word in words]
    return f"{'-'.join(safe)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _cached(path: Path, names: Sequence[str], keep: Sequence[str]) -> Gathered | None:
    """What is in the files, or None if they lack something that is wanted."""
    files = {name: path.with_suffix(f".{name}.npy") for name in keep}
    if not path.is_file() or not all(file.is_file() for file in files.values()):
        return None
    reference = load_reference(path)
    moments = {name: m for name, field in FEATURES.items() if (m := getattr(reference, field)) is not None}
    if any(name not in moments for name in names if name in FEATURES):
        return None
    rows = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
    return Gathered(reference.moments.n, moments, rows)


def _save_rows(path: Path, rows: np.ndarray) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.save(file, rows)
    part.replace(path)
