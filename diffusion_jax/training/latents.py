"""Latents of a data set, encoded once and kept on disk; training reads them as it would read pictures.

OUT/header.json              what was encoded, by which weights, and what was measured; "complete" comes last
    train-00000.moments.npy  f16[m, k, h, w, 2 c]: mean and log variance of m examples; k = 2 with mirrored copies
    train-00000.label.npy    i32[m]
    train-00000.json         the shard's sums, written when it is whole: a killed run goes on after the last of these

What a step trains on is drawn anew each time from the stored Gaussian of the example or its mirrored copy,

    x0 = scale (mean + exp(logvar / 2) eps),   eps ~ N(0, I)                                                    (1)

(Rombach et al. 2022, arXiv:2112.10752, appendix G). Of z = x0 / scale the mean and the standard deviation are
measured per channel c over all examples and pixels, E[z_c] = E[mean_c] and E[z_c^2] = E[mean_c^2 + exp(logvar_c)];
1 / std is the scale that the set itself asks for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from diffusion_jax.ops import bcast, fold, is_batched, normal_like
from diffusion_jax.training import hosts
from diffusion_jax.training.data import Data, Prepare, Source, read_ahead, size, take, to_uint8
from diffusion_jax.training.data import prepare as to_x
from diffusion_jax.training.mesh import on_mesh, replicated, split_axis
from diffusion_jax.training.records import write_whole
from diffusion_jax.typing import Array, InputError, Key, Params

SHARD = 4096
"""Examples a file holds: what a killed run loses at most, and a host's unit of work."""
IN_MEMORY = 2**31
"""Stores of at most so many bytes are read whole, so that they can stay on the device."""
_FIELDS = {"complete", "weights", "scale", "copies", "shard", "examples", "classes", "shape"}
Encode = Callable[[Params, Array], tuple[Array, Array]]
"""(params, x: f32[b h w c] in [-1, 1]) -> (mean, logvar), each f32[b h' w' c']."""


@dataclass(frozen=True)
class Encoding:
    """What `make latents` is to do: an experiment's function `latents` returns it.

    data: loads the pictures; source: says in words what they are. encode with params makes their moments; scale is
    that of (1). out: the folder to write. batch: pictures encoded at once. mirror: keep mirrored copies too.
    shard: examples a file. threads and processes read ahead, as in `data.feed`.
    """

    data: Callable[[], Data]
    source: str
    encode: Encode
    params: Params
    scale: float
    out: Path
    batch: int = 64
    mirror: bool = True
    shard: int = SHARD
    threads: int | None = None
    processes: int = 0


# Reading -------------------------------------------------------------------------------------------------------------


def latents(
    path: str | Path, *, weights: str | None = None, scale: float | None = None, mirrored: bool = False
) -> Data:
    """A store of latents as a data set: examples {"image": f16[h, w, 2 c], "label": i32[]}, shape (h, w, c).

    With mirrored copies in the store an image is f16[2, h, w, 2 c]; `mirrored` says that they are needed. weights: the
    digest of the autoencoder the store has to be from; scale: the one it was made for.
    InputError, one line, for a folder that is no store, is not complete, or is not what is asked for.
    """
    folder = Path(path).expanduser()
    header = read_header(folder)
    if not header["complete"]:
        raise InputError(f"the latents in {folder} are unfinished: give the same make latents command again")
    if weights is not None and header["weights"] != weights:
        raise InputError(
            f"the latents in {folder} are from another autoencoder (weights {header['weights'][:12]}) than the one "
            f"given ({weights[:12]})"
        )
    if scale is not None and header["scale"] != scale:
        raise InputError(f"the latents in {folder} are for a scale of {header['scale']}, not {scale}")
    if mirrored and header["copies"] < 2:
        raise InputError(
            f"the latents in {folder} have no mirrored copies: encode them with mirror=True, or flip=False"
        )
    splits = {name: _open_split(folder, name, header) for name, n in header["examples"].items() if n}
    return Data(splits["train"], splits.get("test"), tuple(header["classes"]), tuple(header["shape"]))


def read_header(path: str | Path) -> dict[str, Any]:
    """header.json of a store; InputError if there is none or it is damaged."""
    file = Path(path).expanduser() / "header.json"
    if not file.is_file():
        raise InputError(f"there are no latents in {file.parent}: make them with make latents EXP=… ARGS='out=…'")
    try:
        header = json.loads(file.read_text())
    except (OSError, ValueError):
        header = None
    if not isinstance(header, dict) or not header.keys() >= _FIELDS:
        raise InputError(f"{file} is damaged: remove {file.parent} and encode again")
    return header


def draw_from_moments(scale: float) -> Prepare:
    """Equation (1) as an experiment's `prepare`: (moments f16[b, (2,) h, w, 2 c], key, flip) -> x0 f32[b, h, w, c].

    With `flip`, each example is its mirrored copy, where there is one, with probability 1/2. Without a key, x0 is scale
    times the mean. A `[b]` array of keys decides each example by its own. ValueError for flips without a key, or for
    examples that are not numbers.
    """

    def prepare(moments: Array, key: Key | None = None, flip: bool = False) -> Array:
        if not jnp.issubdtype(moments.dtype, jnp.floating):
            raise ValueError(f"moments of latents are floating-point, not {moments.dtype}")
        mean, logvar = jnp.split(_chosen(moments, key, flip).astype(jnp.float32), 2, axis=-1)
        if key is None:
            return scale * mean
        return scale * (mean + jnp.exp(0.5 * logvar) * normal_like(fold(key, 1), mean))

    return prepare


def _chosen(moments: Array, key: Key | None, flip: bool) -> Array:
    """One of the copies of each example."""
    if flip and key is None:
        raise ValueError("random flips need a key")
    if moments.ndim == 4:
        return moments
    if not flip or key is None:
        return moments[:, 0]
    key, n = fold(key, 0), moments.shape[0]
    draw = jax.vmap(jax.random.bernoulli)(key) if is_batched(key) else jax.random.bernoulli(key, shape=(n,))
    return jnp.where(bcast(draw, moments[:, 0]), moments[:, 1], moments[:, 0])


def false_colours(latent: Array) -> Array:
    """Latents of about unit deviation as pictures, f32[..., c] -> u8[..., 3]: three channels as red, green and blue.

    For want of a decoder. The first three, repeated where there are fewer; three deviations each way are shown.
    """
    channels = jnp.stack([latent[..., i % latent.shape[-1]] for i in range(3)], axis=-1)
    return to_uint8(channels / 3.0)


def _open_split(folder: Path, split: str, header: Mapping[str, Any]) -> Source:
    store = _Store(folder, split, header["examples"][split], header["shard"])
    found = [store.arrays(i) for i in range(-(-store.n // store.shard))]
    if sum(moments.nbytes for moments, _ in found) > IN_MEMORY:
        return store
    images, labels = zip(*found, strict=True)
    return {"image": np.concatenate(images), "label": np.concatenate(labels)}


@dataclass(frozen=True)
class _Store:
    """The examples of a split, read from memory-mapped shards."""

    folder: Path
    split: str
    n: int
    shard: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        moments, labels = self.arrays(i // self.shard)
        return {"image": moments[i % self.shard], "label": labels[i % self.shard]}

    def arrays(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = min(self.shard, self.n - shard * self.shard)
        return _mapped(self.folder / _name(self.split, shard), wanted)


@functools.lru_cache(maxsize=65_536)
def _mapped(stem: Path, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The moments and labels of a shard; InputError if a file is missing or damaged."""
    try:
        moments = np.asarray(np.load(f"{stem}.moments.npy", mmap_mode="r"))
        labels = np.load(f"{stem}.label.npy")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {stem}.*.npy, a part of a store of latents: {error}") from error
    if not len(moments) == len(labels) == wanted:
        raise InputError(f"{stem}.*.npy has {len(moments)} latents and {len(labels)} labels instead of {wanted}")
    return moments if moments.shape[1] > 1 else moments[:, 0], labels


def _name(split: str, shard: int) -> str:
    return f"{split}-{shard:05d}"


# Writing -------------------------------------------------------------------------------------------------------------


def encode_to_store(encoding: Encoding, devices: int | None = None) -> dict[str, Any]:
    """Encode a data set into `encoding.out`, or go on where that stopped; returns the header of the whole store.

    Batches are split over this host's devices, shards over the hosts. InputError, before anything is
    encoded, for a folder of other pictures' or another autoencoder's latents, a disk without room, or a batch that does
    not divide.
    """
    mesh = _local_mesh(devices, encoding.batch)
    data = encoding.data()
    splits = {name: s for name, s in (("train", data.train), ("test", data.test)) if s is not None}
    header = _header(encoding, data, splits)
    whole = hosts.first_then_others(lambda: _begin(encoding.out, header), "latents begun")
    if whole is not None:
        return whole
    hosts.check_shared(encoding.out)
    shards = [(split, i) for split, n in header["examples"].items() for i in range(-(-n // encoding.shard))]
    own = shards[jax.process_index() :: jax.process_count()]
    todo = [s for s in own if not (encoding.out / f"{_name(*s)}.json").is_file()]
    _encode_shards(encoding, splits, todo, mesh)
    hosts.gather(None, "latents encoded")
    header |= {"complete": True, **hosts.on_first(lambda: _measured(encoding.out, shards), "latents measured")}
    write_whole(encoding.out / "header.json", json.dumps(header, indent=2) + "\n")
    return header


def weights_digest(params: Params) -> str:
    """SHA-256 of a tree of arrays: names, types, shapes and values, whatever file they came from."""
    sha = hashlib.sha256()
    for path, leaf in sorted(
        jax.tree_util.tree_leaves_with_path(params), key=lambda item: jax.tree_util.keystr(item[0])
    ):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _header(encoding: Encoding, data: Data, splits: Mapping[str, Source]) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, *data.shape), jnp.float32)
    mean, _ = jax.eval_shape(encoding.encode, encoding.params, image)
    return {
        "complete": False,
        "weights": weights_digest(encoding.params),
        "source": encoding.source,
        "pictures": list(data.shape),
        "examples": {name: size(source) for name, source in splits.items()},
        "classes": list(data.classes),
        "shape": list(mean.shape[1:]),
        "scale": encoding.scale,
        "copies": 2 if encoding.mirror else 1,
        "shard": encoding.shard,
    }


def _begin(out: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """Write the header of a new store, or check that of one there is, which is returned if it is complete."""
    if (out / "header.json").exists():
        there = read_header(out)
        for name in header.keys() - {"complete"}:
            if there.get(name) != header[name]:
                old, new = (str(h.get(name))[:40] for h in (there, header))
                kind = f"another {name} ({old} there, {new} now)"
                raise InputError(f"{out} holds latents of {kind}: give another out=, or remove it")
        return there if there["complete"] else None
    needed = sum(header["examples"].values()) * header["copies"] * math.prod(header["shape"]) * 4
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if needed > 0.95 * free:
            raise InputError(f"the latents take {needed / 1e9:.1f} GB, and {out} has {free / 1e9:.1f} GB left")
        write_whole(out / "header.json", json.dumps(header, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write in {out}: {error.strerror}") from None
    return None


def _encode_shards(encoding: Encoding, splits: Mapping[str, Source], todo: list[tuple[str, int]], mesh: Mesh) -> None:
    """Encode and write the shards of `todo`; pictures are read ahead over their edges."""
    rows = {item: _shard_rows(size(splits[item[0]]), item[1], encoding) for item in todo}
    plan = [(item[0], batch) for item in todo for batch in rows[item]]
    if not plan:
        return
    few = all(isinstance(source, Mapping) for source in splits.values())
    threads = encoding.threads if encoding.threads is not None else 1 if few else min(16, os.cpu_count() or 1)

    def read(i: int) -> dict[str, np.ndarray]:
        return take(splits[plan[i][0]], plan[i][1])

    total = sum(len(np.unique(batch)) for _, batch in plan)
    bar = tqdm(total=total, desc="encoding", unit="image", dynamic_ncols=True, disable=not hosts.first())
    with bar, contextlib.closing(read_ahead(read, 0, len(plan), threads, encoding.processes)) as batches:
        encoded = _encoded(encoding, batches, mesh)
        for item in todo:
            moments, labels = [], []
            for batch in rows[item]:
                both, kept = next(encoded), len(np.unique(batch))
                moments.append(both[0][:kept])
                labels.append(both[1][:kept])
                bar.update(kept)
            _write_shard(encoding.out / _name(*item), np.concatenate(moments), np.concatenate(labels))


def _shard_rows(n: int, shard: int, encoding: Encoding) -> list[np.ndarray]:
    """The examples of a shard in batches, all of one size: the last one repeats its last example."""
    start, stop = shard * encoding.shard, min(n, (shard + 1) * encoding.shard)
    return [np.minimum(np.arange(i, i + encoding.batch), stop - 1) for i in range(start, stop, encoding.batch)]


def _encoded(
    encoding: Encoding, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(moments f16[b, k, h, w, 2 c], labels) of each batch; one is fetched while the next is computed."""

    def moments(params: Params, images: Array) -> Array:
        x = to_x(images)
        copies = [x, jnp.flip(x, axis=-2)] if encoding.mirror else [x]
        pairs = [jnp.concatenate(encoding.encode(params, copy), axis=-1) for copy in copies]
        return jnp.stack(pairs, axis=1).astype(jnp.float16)

    rows = split_axis(mesh)
    program = jax.jit(on_mesh(moments, mesh), in_shardings=(replicated(mesh), rows), out_shardings=rows)
    params = jax.device_put(encoding.params, replicated(mesh))
    waiting = None
    for batch in batches:
        started = program(params, jax.device_put(batch["image"], rows)), batch["label"]
        if waiting is not None:
            yield np.asarray(waiting[0]), waiting[1]
        waiting = started
    if waiting is not None:
        yield np.asarray(waiting[0]), waiting[1]


def _write_shard(stem: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    """The two arrays and then the sums of a shard, each whole or not at all."""
    mean, logvar = np.split(moments[:, 0].astype(np.float64), 2, axis=-1)
    axes = tuple(range(mean.ndim - 1))
    sums = {"sum": mean.sum(axes).tolist(), "square": (mean**2 + np.exp(logvar)).sum(axes).tolist()}
    if not np.isfinite([*sums["sum"], *sums["square"]]).all():
        raise InputError(f"the moments of {stem.name} are not finite: encode in float32, or check the weights")
    for name, array in (("moments", moments), ("label", labels.astype(np.int32))):
        part = Path(f"{stem}.{name}.part")
        with part.open("wb") as file:
            np.save(file, array)
        part.replace(f"{stem}.{name}.npy")
    part = Path(f"{stem}.json.part")  # of any host; `write_whole` is for what the first one writes
    part.write_text(json.dumps({"pixels": mean[..., 0].size, **sums}) + "\n")
    part.replace(f"{stem}.json")


def _measured(out: Path, shards: list[tuple[str, int]]) -> dict[str, list[float]]:
    """Mean and standard deviation of z for each channel, over the training examples."""
    sums = [json.loads((out / f"{_name(*item)}.json").read_text()) for item in shards if item[0] == "train"]
    pixels = sum(part["pixels"] for part in sums)
    mean = np.sum([part["sum"] for part in sums], axis=0) / pixels
    variance = np.sum([part["square"] for part in sums], axis=0) / pixels - mean**2
    return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist()}


def _local_mesh(devices: int | None, batch: int) -> Mesh:
    """This host's first `devices` devices; InputError if there are not that many or the batch does not divide."""
    available = jax.local_devices()
    n = len(available) if devices is None else devices
    if not 1 <= n <= len(available):
        raise InputError(f"devices={n}: this machine has {len(available)} ({available[0].platform})")
    if batch < 1 or batch % n:
        raise InputError(f"a batch of {batch} cannot be split evenly over {n} devices: change batch or devices")
    grid = np.asarray(available[:n]).reshape(n, 1)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
