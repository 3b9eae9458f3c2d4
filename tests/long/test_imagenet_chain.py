"""From a folder of pictures to latents, to a trained transformer, to samples, by the commands of a user."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.__main__ import main
from diffusion_jax.nets import kl_autoencoder
from diffusion_jax.training.data import prepare
from diffusion_jax.training.latents import latents
from diffusion_jax.training.sources import imagenet
from diffusion_jax.weights import files
from diffusion_jax.weights.autoencoder import load, to_diffusers

SMALL = "model=S depth=1 width=16 heads=2 classes=3 precision=float32 batch=4 steps=2 sample_steps=2 log_every=1"


def command(words):
    assert main(words.split()) == 0


def write_folder(root):
    """Three classes of six smooth pictures in train, two in val."""
    rng = np.random.default_rng(0)
    for wnid in ("n01440764", "n01443537", "n02119789"):
        for split, n in (("train", 6), ("val", 2)):
            (root / split / wnid).mkdir(parents=True)
            for i in range(n):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
                coarse.resize((20 + 9 * i, 30), Image.Resampling.BICUBIC).save(root / split / wnid / f"{i}.JPEG")
    return root


def test_folder_latents_training_samples(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "imagenet")
    vae, weights, store = kl_autoencoder(widths=(8, 8)), tmp_path / "vae.safetensors", tmp_path / "store"
    files.save(weights, to_diffusers(vae.init(jax.random.key(0))))
    miniature = f"size=16 widths=8,8 autoencoder={weights}"
    command(f"latents imagenet256_dit_xl2 path={folder} out={store} batch=6 precision=float32 {miniature}")
    assert "24 latents in" in capfd.readouterr().out

    mean = latents(store).train["image"][7, 0, ..., :4]
    pixels = imagenet(16, folder, cache_bytes=0).train[7]["image"]
    q = jax.jit(vae.encode)(load(weights, vae), prepare(jnp.asarray(pixels[None])))
    np.testing.assert_allclose(mean, q.mean[0], atol=0.01 * float(jnp.abs(q.mean).max()))

    command(f"train imagenet256_dit_xl2 {miniature} latents={store} {SMALL} runs={tmp_path / 'runs'}")
    run = next((tmp_path / "runs" / "imagenet256_dit_xl2").iterdir())
    assert Image.open(run / "samples.png").mode == "RGB"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()

    command(f"sample imagenet256_dit_xl2 n=3 out={tmp_path / 'out'} runs={tmp_path / 'runs'}")
    assert Image.open(tmp_path / "out" / "000002.png").size == (16, 16)
