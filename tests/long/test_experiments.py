"""One training step of every experiment, run for real at a tiny size on made-up data."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import write_model

from diffusion_jax.experiment import find_experiment, initial_state, loss_fn
from diffusion_jax.systems.sentences import PACKAGE
from diffusion_jax.training.roofline import batch_shapes
from diffusion_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "digits": {"width": 8},
    "fashion_mnist": {"width": 4, "precision": "bfloat16"},
    "fashion_mnist_10min": {"width": 4, "blocks": 1},
    "fashion_mnist_student": {"width": 4},
    "fashion_mnist_neon": {"width": 4},
    "cifar10": {"width": 4},
    "cifar10_speedrun": {"width": 4, "blocks": 1},
    "cifar10_edm": {"width": 4, "blocks": 1},
    "cifar10_ddpmpp": {"width": 4, "blocks": 1},
    "folder": {"width": 4, "size": 16},
    "moving_digits": {"width": 8},
    "tones": {"width": 8},
    "imagenet256_dit_xl2": {"model": "S", "depth": 1, "width": 16, "heads": 2, "size": 64, "classes": 3},
    "imagenet64_edm2_s": {"width": 4, "blocks": 1, "size": 8, "classes": 3},
    "autoencoder": {"width": 8, "size": 16},
    "emoji": {"width": 8, "size": 16, "autoencoder": "nowhere"},
    "ldm_fashion_mnist": {"width": 8, "autoencoder": "nowhere"},
    "stable_diffusion": {"size": 32, "precision": "float32"},
}


NAMES = sorted(p.stem for p in (ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in NAMES), ("cifar10", {"learned_variance": True})])
def test_every_experiment_makes_a_step(name, more, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = SMALL[name] | more
    if name == "folder":
        Image.new("RGB", (20, 17)).save(tmp_path / "a.png")
        options["path"] = str(tmp_path)
    if name == "stable_diffusion":
        options |= {"path": str(tmp_path), "model": str(write_model(tmp_path / "model"))}
    if name == "ldm_fashion_mnist" and importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("the text encoder is not installed: make .venv/text_encoder")
    experiment = find_experiment(name)(**options, batch=4)
    rng = np.random.default_rng(0)
    stored = batch_shapes(experiment)["image"]
    pixels = rng.integers(0, 256, stored.shape) if stored.dtype == np.uint8 else rng.normal(size=stored.shape)
    batch = {"image": jax.numpy.asarray(pixels, stored.dtype)}
    if "cond" in (shapes := batch_shapes(experiment)):
        batch["cond"] = jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), shapes["cond"])
    else:
        batch["label"] = jax.numpy.asarray(rng.integers(0, experiment.null or 1, 4, np.int32))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = jax.jit(
            make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        # A new network puts out zeros, past which no gradient reaches what is tuned.
        before = initial_state(experiment, experiment.start() if name == "stable_diffusion" else None)
        state, metrics = step(before, batch)
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["grad_norm"] > 0
    assert int(state.step) == 1
