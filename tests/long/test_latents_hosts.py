"""Two real processes encode one store: each its shards, the same bytes as one process writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from diffusion_jax.nets import kl_autoencoder
from diffusion_jax.training.latents import latents
from diffusion_jax.weights import files
from diffusion_jax.weights.autoencoder import to_diffusers

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def encode(out, folder, weights, *words):
    miniature = [f"path={folder}", f"autoencoder={weights}", "size=16", "widths=8,8", "batch=6", "precision=float32"]
    command = [
        sys.executable,
        "-m",
        "diffusion_jax",
        "latents",
        "imagenet256_dit_xl2",
        f"out={out}",
        *miniature,
        *words,
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "DIFFUSION_JAX_CACHE": str(out.parent / "cache")}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(child):
    printed, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    return printed


def test_two_processes_write_the_store_of_one(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 4)):
        for i in range(n):
            target = tmp_path / "pictures" / split / f"n{i % 2:08d}"
            target.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize((24, 20), Image.Resampling.BICUBIC).save(target / f"{i}.JPEG")
    vae, weights = kl_autoencoder(widths=(8, 8)), tmp_path / "vae.safetensors"
    files.save(weights, to_diffusers(vae.init(jax.random.key(0))))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(encode(alone, tmp_path / "pictures", weights))
    words = [f"coordinator=127.0.0.1:{free_port()}", "processes=2"]
    both = [encode(shared, tmp_path / "pictures", weights, *words, f"process={i}") for i in range(2)]
    assert "12 latents in" in finish(both[0])
    finish(both[1])
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in shared.iterdir())
    for name in names:
        assert (alone / name).read_bytes() == (shared / name).read_bytes(), name
    assert json.loads((shared / "header.json").read_text())["complete"]
    assert len(latents(shared).test["label"]) == 4
