"""Latent diffusion by the commands of a user: an autoencoder, its latents, a network told in words, pictures."""

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from anywhere import params_like

from diffusion_jax.__main__ import main
from diffusion_jax.experiment import find_experiment
from diffusion_jax.systems.sentences import PACKAGE
from diffusion_jax.training import sources
from diffusion_jax.training.parameters import write_parameters

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the text encoder is not installed: make .venv/text_encoder"
)
NOTO = sys.modules["diffusion_jax.training.sources.noto"]  # its name in the package is that of its function
SMALL = "steps=3 batch=4 log_every=1 sample_every=0 checkpoint_every=2"
CASES = {
    "emoji": ("emoji", "data=emoji size=16", "size=16", (16, 16)),
    "emoji with a codebook": ("emoji", "data=emoji size=16 codes=8", "size=16", (16, 16)),
    "fashion_mnist": ("ldm_fashion_mnist", "data=fashion_mnist data_dir={folder}/data", "", (28, 28)),
}


def command(words, *more):
    assert main([*words.split(), *more]) == 0


def options(words):
    """The experiment's own of some words."""
    given = dict(word.split("=", 1) for word in words.split())
    return {name: int(value) if value.isdigit() else value for name, value in given.items() if name != "runs"}


def some_captions(path):
    """The first forty of Noto's, so that there are few texts to encode."""
    path.write_text(json.dumps(json.loads(NOTO.CAPTIONS.read_text())[:40]))
    return path


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def pictures(folder):
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize("case", CASES)
def test_autoencoder_latents_training_pictures(tmp_path, monkeypatch, capfd, case):
    name, first, second, size = CASES[case]
    if name == "ldm_fashion_mnist" and not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    monkeypatch.setattr(NOTO, "CAPTIONS", some_captions(tmp_path / "captions.json"))
    runs, coder = tmp_path / "runs", tmp_path / "runs" / "autoencoder" / "a"
    second = f"autoencoder={coder} {second} width=8 sample_steps=2 runs={runs}"
    command(f"train autoencoder {first.format(folder=tmp_path)} width=8 start=1 {SMALL} runs={runs} run=a")
    with Image.open(coder / "samples.png") as shown:
        assert shown.width > shown.height  # pictures beside what comes back of them
    command(f"train {name} {second} {SMALL} run=r")
    assert json.loads((coder / "latents" / "header.json").read_text())["complete"]
    for run in (coder, runs / name / "r"):
        assert len(losses(run)) == 3
        assert np.isfinite(losses(run)).all()

    # A network of three steps hardly looks at a text, one of random numbers does.
    experiment = find_experiment(name)(**options(second))
    params = write_parameters(tmp_path / "params.npz", params_like(experiment.net.init))
    drawn = {}
    for out, prompt, more in (("a", "a red apple", params), ("b", "a train", params), ("c", "a red apple", None)):
        words = f"sample {name} n=2 guidance=4 runs={runs} out={tmp_path / out}"
        command(words, f"prompt={prompt}", *([f"params={more}"] if more else []))
        drawn[out] = pictures(tmp_path / out)
    assert drawn["c"].shape == (2, *size, 3)
    assert np.any(drawn["a"] != drawn["b"])
    capfd.readouterr()
    for wrong, message in (
        ("latent=3", "the data has examples of shape"),
        (f"autoencoder={tmp_path}", "experiment.json"),
    ):
        given = [word for word in second.split() if word.split("=")[0] != wrong.split("=")[0]]
        assert main(["train", name, *given, "run=other", wrong]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert message in line


def test_the_script_at_toy_size(tmp_path):
    if not sources.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    command = [sys.executable, ROOT / "benchmarks" / "latent_diffusion.py", "--size", "toy", "--out", tmp_path]
    subprocess.run([*command, "--data-dir", tmp_path / "data"], check=True, cwd=ROOT)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"seconds", "reconstruction", "floor", "guidance 1.5"}
    for name in ("reconstruction", "floor", "guidance 1.5"):
        assert all(0 <= found[name][rate] <= 1 for rate in ("class", "tone", "class and tone", "c2st", "accuracy"))
        assert found[name]["class and tone"] <= found[name]["class"]
    assert found["floor"]["tone"] == 1  # by what a tone is
    assert found["floor"]["fd"] < found["guidance 1.5"]["fd"]
    assert found["guidance 1.5"]["pictures"] == 60
    page = (tmp_path / "README.md").read_text()
    pictures = re.findall(r"\]\((.+\.png)\)", page)
    assert sorted(pictures) == sorted(path.name for path in tmp_path.glob("*.png"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "latent_diffusion.py"))
    seconds = module["train"](tmp_path, module["SIZES"]["toy"], "")
    assert seconds == found["seconds"], "what was trained is not trained again"
