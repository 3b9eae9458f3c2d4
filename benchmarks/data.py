"""Pictures a second that the input pipelines deliver, alone, without a model behind them.

    python benchmarks/data.py [path=FOLDER] [pictures=512] [workers=2]

ImageNet-like JPEGs (500x375, about 110 kB; made here unless `path` is an ImageNet folder) through ADM's preprocessing
at 64 and 256 pixels, batch 64: Grain's threads, Grain's processes and, where torch is installed, its DataLoader with as
many processes and the same decoding function. Before them the processor time of decoding one picture, which is the same
on a busy machine and whose inverse bounds what a core can deliver. Then what needs no decoding: a memory map of 64
pixels, and a store of 32x32x4 latents with mirrored copies. One JSON line each, the median of three stretches.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_jax.training import latents
from diffusion_jax.training.data import feed
from diffusion_jax.training.sources import imagenet

BATCH, STRETCHES = 64, 3


def write_pictures(folder: Path, n: int) -> Path:
    """Class folders of JPEGs with the detail of photographs: smooth shapes and some grain."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(np.float32) + rng.normal(0, 12, (375, 500, 1))
        target = folder / "train" / f"n{i % 4:08d}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(target / f"{i}.JPEG", quality=92)
    return folder


def speed(next_batch, batches: int) -> float:
    """Pictures a second, the median of some stretches of so many batches, after one for warming up."""
    found = []
    for _ in range(STRETCHES + 1):
        start = time.perf_counter()
        for _ in range(batches):
            next_batch()
        found.append(BATCH * batches / (time.perf_counter() - start))
    return statistics.median(found[1:])


def decoding(source) -> float:
    """Milliseconds of processor time for one picture, the median of 48."""
    found = []
    for i in range(48):
        start = time.thread_time()
        source[i]
        found.append(1000 * (time.thread_time() - start))
    return statistics.median(found)


def of_feed(source, batches: int, **options) -> float:
    stream = feed(source, BATCH, 0, resident_bytes=0, **options)
    try:
        return speed(lambda: stream.next(1), batches)
    finally:
        stream.close()


def of_torch(source, workers: int, batches: int) -> float | None:
    """A plain DataLoader over the same examples, shuffled, endless; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        source, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True, prefetch_factor=4,
        multiprocessing_context="forkserver",
    )  # fmt: skip

    def endless():
        while True:
            yield from loader

    stream = endless()
    return speed(lambda: next(stream), batches)


def write_latents(folder: Path, n: int) -> Path:
    """A store of made-up moments, as `make latents` writes it."""
    moments = np.random.default_rng(0).normal(size=(n, 2, 32, 32, 8)).astype(np.float16)
    latents._write_shard(folder / "train-00000", moments, np.zeros(n, np.int32))
    header = {"complete": True, "weights": "", "scale": 1.0, "copies": 2, "shard": n, "classes": ["a"]}
    header |= {"examples": {"train": n}, "shape": [32, 32, 4]}
    (folder / "header.json").write_text(json.dumps(header))
    return folder


def report(what: str, value: float | None, **more) -> None:
    if value is not None:
        print(json.dumps({"measurement": f"data: {what}", "images_per_second": round(value), "batch": BATCH} | more))


def main(path: str = "", pictures: str = "512", workers: str = "") -> None:
    n, cores = int(pictures), len(os.sched_getaffinity(0))
    count = int(workers) if workers else min(16, cores)
    where = {"workers": count, "cores": cores}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DIFFUSION_JAX_CACHE"] = scratch
        os.environ["PYTHONWARNINGS"] = "ignore"  # torch warns of arrays that may not be written to
        folder = Path(path) if path else write_pictures(Path(scratch) / "pictures", n)
        for size in (64, 256):
            source, batches = imagenet(size, folder, cache_bytes=0).train, max(2, n // BATCH // 2)
            line = {"measurement": f"data: JPEG to {size}, processor time", "milliseconds": round(decoding(source), 2)}
            print(json.dumps(line))
            report(f"JPEG to {size}, threads", of_feed(source, batches, threads=count), **where)
            report(f"JPEG to {size}, processes", of_feed(source, batches, threads=1, processes=count), **where)
            report(f"JPEG to {size}, torch DataLoader", of_torch(source, count, batches), **where)
        if not path:
            mapped = imagenet(64, folder).train
            report("64 pixels from a memory map", of_feed(mapped, 100, threads=1), workers=1, cores=cores)
        latents.IN_MEMORY = 0
        store = latents.latents(write_latents(Path(scratch), n)).train
        report("latents 32x32x4 from a store", of_feed(store, 50, threads=count), **where)


if __name__ == "__main__":
    main(**dict(word.split("=", 1) for word in sys.argv[1:]))
