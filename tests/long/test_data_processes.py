"""Batches read ahead by processes are those read by threads."""

import numpy as np
from PIL import Image

from diffusion_jax.training.data import feed
from diffusion_jax.training.sources import imagenet


def test_processes_give_the_batches_of_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    for i in range(18):
        folder = tmp_path / "train" / f"n{i % 3:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 30), (10 * i, 0, 255 - i)).save(folder / f"{i}.JPEG")
    source = imagenet(8, tmp_path, cache_bytes=0).train
    streams = [feed(source, 4, 2, threads=2), feed(source, 4, 2, threads=1, processes=2)]
    a, b = (stream.next(7) for stream in streams)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    for stream in streams:
        stream.set_state({"step": 3})
        np.testing.assert_array_equal(stream.next(2)["image"], a["image"][3:5])
        stream.close()
