"""Features of any number of pictures, a batch at a time, on all devices.

    host thread     read pictures -> prepare -> pad -> send to the devices           batch k + 2          (1)
    devices         apply                                                            batch k + 1          (2)
    host            float64 moments, kept features                                   batch k              (3)

all at the same time, so that the devices wait for neither (1) nor (3) while these are faster than (2). Every batch has
the same shape, the last one is padded, and one program is compiled. Pictures live from (1) to (2); what stays is a mean
and a scatter matrix, and the features themselves only where a metric needs them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation.features.net import FeatureNet
from diffusion_jax.evaluation.moments import Moments, joined, moments
from diffusion_jax.training.mesh import on_mesh, replicated, split_axis
from diffusion_jax.typing import Array, InputError, Params

AHEAD = 2
"""Batches that are prepared before they are needed."""


MOMENTS = ("pooled", "spatial")
"""The features that are measured by their mean and covariance."""
IMAGES = "images"
"""The name of the pixels themselves, u8[n, h w c], which no network gives."""


class Gathered(NamedTuple):
    """What is known of n pictures: moments of features by name, rows [n, d] of those kept, labels i[n] or None."""

    n: int
    moments: dict[str, Moments]
    kept: dict[str, np.ndarray]
    labels: np.ndarray | None = None


def at_once(platform: str | None = None) -> int:
    """Pictures a device is given at a time."""
    return 8 if (platform or jax.default_backend()) == "cpu" else 256


def feature_batches(
    net: FeatureNet,
    params: Params,
    images: Iterable[np.ndarray],
    mesh: Mesh,
    *,
    names: Sequence[str] = ("pooled",),
    batch: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The features `names` of pictures u8[k, h, w, c] that come in parts of any size: f32[m, d], in their order.

    `batch` pictures on each device of the mesh, the parameters on all. Among `names` may be IMAGES. InputError for
    pictures that the network does not take, parts of different shapes, and names that it does not give.
    """
    rows, everywhere = split_axis(mesh), replicated(mesh)
    size = (batch or at_once()) * mesh.shape["data"]

    program = _program(net, tuple(names), mesh)
    params = jax.device_put(params, everywhere)
    ready = _prepared(net, images, size)

    def load() -> tuple[Array, np.ndarray] | None:
        found = next(ready, None)
        return found and (jax.device_put(found[0], rows), found[1])

    def fetched(features: dict[str, Array], raw: np.ndarray) -> dict[str, np.ndarray]:
        host = {name: np.asarray(value)[: len(raw)] for name, value in features.items()}
        return host | ({IMAGES: raw.reshape(len(raw), -1)} if IMAGES in names else {})

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(load) for _ in range(AHEAD))
        flying: deque[tuple[dict[str, Array], np.ndarray]] = deque()
        while (found := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(load))
            flying.append((program(params, found[0]), found[1]))
            if len(flying) > 1:
                yield fetched(*flying.popleft())
        while flying:
            yield fetched(*flying.popleft())


def gather(batches: Iterable[Mapping[str, np.ndarray]], keep: Sequence[str] = ()) -> Gathered:
    """The float64 moments of all features, and the rows of those to `keep`; ValueError for no batch, or for NaN."""
    total: dict[str, Moments] = {}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in keep}
    n = 0
    for batch in batches:
        for name, part in batch.items():
            if name in rows:
                rows[name].append(part)
            if name in MOMENTS:
                more = moments([part])
                total[name] = joined(total[name], more) if name in total else more
        n += len(next(iter(batch.values())))
    if n == 0:
        raise ValueError("gather: no pictures were given")
    return Gathered(n, total, {name: np.concatenate(parts) for name, parts in rows.items()})


@lru_cache(maxsize=8)
def _program(net: FeatureNet, names: tuple[str, ...], mesh: Mesh) -> Callable[[Params, Array], dict[str, Array]]:
    """Compiled once for all sets of pictures."""

    def wanted(params: Params, images: Array) -> dict[str, Array]:
        features = net.apply(params, images)
        missing = [name for name in names if name not in features and name != IMAGES]
        if missing:
            raise InputError(f"{net.name} has no features {missing[0]!r}: it gives {', '.join(features)}")
        return {name: features[name] for name in names if name != IMAGES}

    return jax.jit(on_mesh(wanted, mesh), out_shardings=split_axis(mesh))


def _prepared(net: FeatureNet, images: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches ready for the devices, each of `size` pictures, and the pictures they are of, which may be fewer."""
    for part in _of_size(images, size):
        ready = net.prepare(part)
        if len(part) < size:
            ready = np.concatenate([ready, np.repeat(ready[-1:], size - len(part), axis=0)])
        yield ready, part


def _of_size(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same pictures in parts of `size`, the last one smaller."""
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        if held and part.shape[1:] != held[0].shape[1:]:
            raise InputError(f"pictures of {list(held[0].shape[1:])} and of {list(part.shape[1:])} in one set")
        held.append(part)
        count += len(part)
        if count >= size:
            whole = np.concatenate(held) if len(held) > 1 else part
            full = count - count % size
            yield from (whole[i : i + size] for i in range(0, full, size))
            held, count = ([whole[full:]] if count > full else []), count - full
    if count:
        yield np.concatenate(held)
