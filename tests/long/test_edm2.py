"""The ImageNet experiment with EDM2 from a folder of pictures to samples, at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
from commands import ROOT, environment
from PIL import Image

from diffusion_jax.experiment import find_experiment, initial_state
from diffusion_jax.training.state import dotted

WORDS = {"size": 8, "width": 4, "blocks": 1, "classes": 3, "batch": 4, "steps": 2, "precision": "float32"}


def test_trains_on_a_generated_folder(tmp_path, monkeypatch):
    """Two updates and the last samples, by the command line, at a rate that moves weights within the warm-up.

    Both averages are kept, and are nearly the newest parameters: weights that moved and still have unit magnitude,
    and the random frequencies of the start.
    """
    rng = np.random.default_rng(0)
    for name in ("n01440764", "n01443537", "n02119789"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20 + i, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{name}_{i}.JPEG")
    words = {
        **WORDS,
        "path": tmp_path / "data",
        "learning_rate": 1e5,
        "snapshot_every": 2,
        "sample_every": 0,
        "sample_steps": 2,
    }
    command = [sys.executable, "-m", "diffusion_jax", "train", "imagenet64_edm2_s", f"runs={tmp_path}", "run=r"]
    subprocess.run(
        [*command, *(f"{name}={value}" for name, value in words.items()), "log_every=1"],
        check=True,
        cwd=ROOT,
        env=environment(
            tmp_path / "compiled",
            DIFFUSION_JAX_CACHE=str(tmp_path / "cache"),
            XLA_FLAGS="--xla_backend_optimization_level=0",
        ),
    )
    run = tmp_path / "imagenet64_edm2_s" / "r"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert np.all(np.isfinite(losses))
    assert Image.open(run / "samples.png").size[0] >= 8 * 3

    monkeypatch.chdir(ROOT)
    start = initial_state(find_experiment("imagenet64_edm2_s")(**WORDS)).params
    first = {dotted(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(start)}
    for width in ("0.05", "0.1"):
        with np.load(run / "averages" / f"0000002-{width}.npz") as kept:
            assert set(kept) == set(first)
            moved = {path for path, a in first.items() if np.max(np.abs(kept[path] - a)) > 0.01}
            assert moved >= {path for path in first if path.endswith("conv_res1.kernel")}
            for path, a in first.items():
                if path.endswith("kernel"):
                    size = np.sqrt(np.mean(np.float32(kept[path]) ** 2, axis=tuple(range(a.ndim - 1))))
                    np.testing.assert_allclose(size, 1, atol=0.01, err_msg=path)
                elif path.endswith(("freqs", "phases")):
                    np.testing.assert_allclose(kept[path], a, rtol=1e-5)
