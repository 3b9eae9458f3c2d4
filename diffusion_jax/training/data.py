"""What training reads: an image data set, and an endless stream of batches over it.

A batch is a pure function of (seed, step). With n examples, a batch of b and epoch e in the order pi_e,

    pi_e = the sorting permutation of n random words of the counter-based generator keyed by (seed, e)    (1)
    batch(seed, step)[j] = pi_{p // n}[p mod n],   p = step b + j                                         (2)

so the whole position of a stream is the integer `step`, every example comes once an epoch, batches run on over
the edge of an epoch, and a data set smaller than one batch simply passes through several epochs in it. All
streams obey (2): arrays that fit on the device stay there and only indices travel; anything else is read
ahead by Grain's threads or processes. All therefore give the same batches.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.ops import bcast, is_batched
from diffusion_jax.typing import Array, InputError, Key

Arrays = Mapping[str, np.ndarray]
"""Named arrays with a common leading axis, usually {"image": u8[n,h,w,c], "label": i32[n]}; memory maps included."""
_MAX_STEPS = 2**40


class RandomAccess(Protocol):
    """Examples read one at a time, from several threads: i -> {"image": u8[h,w,c], "label": i32[]}."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> Mapping[str, np.ndarray]: ...


Source = Arrays | RandomAccess


class Data(NamedTuple):
    """A data set. `classes` is () when it is unlabelled; `shape` is that of an example, (h, w, c) for pictures."""

    train: Source
    test: Source | None
    classes: tuple[str, ...]
    shape: tuple[int, ...]


class Feed(NamedTuple):
    """An endless stream of training batches whose position is JSON.

    next: (k) -> the next k steps' batches, leaves `[k, batch, ...]`.
    get_state, set_state: the position, {"step": int}; batches only read ahead do not count as given.
    close: stops the reading threads. Closing twice is harmless; a `next` after it starts them again.
    resident: arrays to hold on the device, or None. With them, next(k) is {"index": i32[k, batch]} into them.
    """

    next: Callable[[int], dict[str, np.ndarray]]
    get_state: Callable[[], dict[str, Any]]
    set_state: Callable[[dict[str, Any]], None]
    close: Callable[[], None]
    resident: Arrays | None


def size(source: Source) -> int:
    """Number of examples; InputError if named arrays differ in their first axis or there are none."""
    if not isinstance(source, Mapping):
        return len(source)
    lengths = {name: len(array) for name, array in source.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"the arrays of a data set need one common length, got {lengths}")
    return next(iter(lengths.values()))


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """pi_epoch of equation (1): `i32[n]`, read-only. NumPy promises the same random words in every version."""
    words = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def batch_indices(seed: int, step: int, n: int, batch: int) -> np.ndarray:
    """Equation (2): the examples of training step `step`, `i32[batch]`.

    >>> sorted(int(i) for s in range(5) for i in batch_indices(0, s, 10, 2))
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    return _consecutive(seed, step * batch, batch, n)


def _consecutive(seed: int, start: int, count: int, n: int) -> np.ndarray:
    """Positions start ... start + count of the endless order (2): `i32[count]`."""
    pieces = []
    while count > 0:
        epoch, offset = divmod(start, n)
        piece = epoch_order(seed, epoch, n)[offset : offset + count]
        pieces.append(piece)
        start, count = start + len(piece), count - len(piece)
    return np.concatenate(pieces)


def feed(
    source: Source,
    batch: int,
    seed: int,
    *,
    resident_bytes: int = 2**31,
    rows: slice | np.ndarray = slice(None),
    threads: int | None = None,
    processes: int = 0,
) -> Feed:
    """Batches of `batch` examples, shuffled anew each epoch, from step 0 on.

    Arrays of at most `resident_bytes` become a feed of indices. `rows` are the rows of each global batch that this
    process reads. `threads` read ahead (default: one for arrays, else one per core up to 16), in so many further
    `processes` if that is not 0: `benchmarks/data.py` measures which is faster. Processes want a script that keeps
    what it does under `if __name__ == "__main__"`. Raises InputError for an empty data set or a batch below 1.
    """
    n = size(source)
    if n < 1 or batch < 1:
        raise InputError(f"training needs at least one example and a batch of at least 1, got {n} and {batch}")
    if n >= 2**31:
        raise InputError(f"{n} examples are more than an int32 index can tell apart")
    if isinstance(source, Mapping) and sum(a.nbytes for a in source.values()) <= resident_bytes:
        return _index_feed(source, n, batch, seed, rows)
    if threads is None:
        threads = 1 if isinstance(source, Mapping) else min(16, os.cpu_count() or 1)
    read = functools.partial(_read_batch, source, n, batch, seed, rows)
    return _grain_feed(read, threads, processes)


def _index_feed(source: Arrays, n: int, batch: int, seed: int, rows: slice | np.ndarray) -> Feed:
    """Nothing but integers: a step costs microseconds and there is nothing to close."""
    step = 0

    def advance(k: int) -> dict[str, np.ndarray]:
        nonlocal step
        index = _consecutive(seed, step * batch, k * batch, n).reshape(k, batch)[:, rows]
        step += k
        return {"index": index}

    def set_state(state: dict[str, Any]) -> None:
        nonlocal step
        step = _step_of(state)

    return Feed(advance, lambda: {"step": step}, set_state, lambda: None, source)


def _read_batch(
    source: Source, n: int, batch: int, seed: int, rows: slice | np.ndarray, step: int
) -> dict[str, np.ndarray]:
    return take(source, batch_indices(seed, step, n, batch)[rows])


def _grain_feed(read: Callable[[int], dict[str, np.ndarray]], threads: int, processes: int) -> Feed:
    """Batches read ahead by Grain. It is opened at a step, so that resuming needs none of Grain's own state."""
    step, iterator = 0, None

    def advance(k: int) -> dict[str, np.ndarray]:
        nonlocal step, iterator
        if iterator is None:
            iterator = read_ahead(read, step, _MAX_STEPS, threads, processes)
        batches = [next(iterator) for _ in range(k)]
        step += k
        return {name: np.stack([b[name] for b in batches]) for name in batches[0]}

    def close() -> None:
        nonlocal iterator
        if iterator is not None:
            iterator.close()
        iterator = None

    def set_state(state: dict[str, Any]) -> None:
        nonlocal step
        close()
        step = _step_of(state)

    return Feed(advance, lambda: {"step": step}, set_state, close, None)


def read_ahead(read: Callable[[int], Any], start: int, stop: int, threads: int, processes: int = 0) -> Any:
    """An iterator over read(start), ..., read(stop - 1), a few ahead of their use: memory stays flat. To be closed.

    With `processes`, each of them reads with `threads`; `read` and what it holds are sent to them.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2 if threads else 0)
    items = grain.MapDataset.range(start, stop).map(read)
    if not processes:
        return iter(items.to_iter_dataset(options))
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes take absl's flags along and refuse unparsed ones
    workers = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
    return iter(items.to_iter_dataset(options).mp_prefetch(workers))


def take(source: Source, index: np.ndarray) -> dict[str, np.ndarray]:
    """The examples at `index`, stacked."""
    if isinstance(source, Mapping):
        return {name: array[index] for name, array in source.items()}
    examples = [source[int(i)] for i in index]
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


def _step_of(state: dict[str, Any]) -> int:
    step = state.get("step")
    if not isinstance(step, int) or not 0 <= step < _MAX_STEPS:
        raise ValueError(f'the state of a feed is {{"step": a number of steps}}, got {state}')
    return step


def gather(resident: Mapping[str, Array], index: Array) -> dict[str, Array]:
    """The batch at `index: i32[b]` of arrays held on the device; an index out of range is not checked."""
    return {name: array.at[index].get(mode="promise_in_bounds") for name, array in resident.items()}


Prepare = Callable[[Array, Key | None, bool], Array]
"""(examples as stored, key or None, whether to mirror at random) -> x0: f32[b *d]."""


def prepare(images: Array, key: Key | None = None, flip: bool = False) -> Array:
    """`u8[b *d] -> f32[b *d]` in [-1, 1], each picture mirrored left to right with probability 1/2 if `flip`.

    Floating-point examples, such as sound, are taken as they are. The flips are a function of the key alone; a `[b]`
    array of keys decides each example by its own. ValueError for other types, or for flips without a key.
    """
    if images.dtype == jnp.uint8:
        x = (2.0 * images.astype(jnp.float32) - 255.0) / 255.0  # one rounding: compiled and eager agree to the bit
    elif jnp.issubdtype(images.dtype, jnp.floating):
        x = images.astype(jnp.float32)
    else:
        raise ValueError(f"prepare: pixels must be uint8 or floating-point, got {images.dtype}")
    if not flip:
        return x
    if key is None:
        raise ValueError("prepare: random flips need a key")
    draw = jax.vmap(jax.random.bernoulli)(key) if is_batched(key) else jax.random.bernoulli(key, shape=x.shape[:1])
    return jnp.where(bcast(draw, x), jnp.flip(x, axis=-2), x)


def to_uint8(x: Array) -> Array:
    """The inverse of `prepare` without flips: `f32[...]` in [-1, 1] -> `u8[...]`, rounded and clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
