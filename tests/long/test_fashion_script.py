"""The ten-minute script from one end to the other at toy size, stopped in the middle; CIFAR-10's speedrun rehearsed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffusion_jax.evaluation.results import read_result
from diffusion_jax.experiment import find_experiment
from diffusion_jax.measuring.command import eval_options, eval_page
from diffusion_jax.training import sources
from diffusion_jax.training.data import Data
from diffusion_jax.training.loop import fit

ROOT = Path(__file__).parent.parent.parent


def script(*words):
    command = [sys.executable, "benchmarks/fashion_mnist_10min.py", *words]
    options = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **options}, check=False).returncode


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The real data, which TFDS prepares once."""
    place = os.environ.get("TFDS_DATA_DIR") or str(tmp_path_factory.mktemp("tfds"))
    if not (sources.DEBIAN_FASHION_MNIST.is_dir() or (Path(place) / "fashion_mnist").is_dir()):
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    sources.tfds_images("fashion_mnist", place)
    return place


def test_all_pieces_run_and_a_stopped_script_goes_on(tmp_path, data_dir):
    words = ("--size", "toy", "--out", str(tmp_path), "--data-dir", data_dir)
    assert script(*words, "--seconds", "20") == 75, "it should not be done yet"
    before = {path.name: path.read_text() for path in (tmp_path / "pieces").glob("*.json")}
    assert script(*words) == 0
    after = {path.name: path.read_text() for path in (tmp_path / "pieces").glob("*.json")}
    assert before.items() <= after.items(), "what was done is not done again"
    report = (tmp_path / "README.md").read_text()
    for word in ("conditional | 35", "unconditional | 5", "student, ECT | 1", "student, MeanFlow | 2", "w = 2.0"):
        assert word in report
    for picture in ("curves.png", "quality.png", "pairs.png", "samples-conditional-35.png"):
        assert picture in report
        assert 500 < (tmp_path / picture).stat().st_size < 300_000
    results = json.loads((tmp_path / "results" / "measure-conditional-35.json").read_text())
    assert results["evaluations"] == 35
    assert [r["protocol"]["seeds"] for r in results["results"] if r["metric"] == "fd"] == [[0], [1]]


def test_a_time_to_each_distance_comes_from_the_snapshots_of_one_run(tmp_path, monkeypatch):
    """CIFAR-10's speedrun on made-up pictures: train, then measure the average as it was at each snapshot."""
    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(0)
    train, test = (
        {"image": rng.integers(0, 256, (n, 32, 32, 3), np.uint8), "label": np.zeros(n, np.int32)} for n in (48, 24)
    )
    arguments = {
        "width": 4, "blocks": 1, "steps": 6, "batch": 4, "precision": "float32", "dispatch": 2, "snapshot_every": 2,
        "sample_every": 0, "checkpoint_every": 3, "sample_steps": 2,
    }  # fmt: skip
    experiment = find_experiment("cifar10_speedrun")(**arguments)
    experiment = replace(experiment, data=lambda: Data(train, test, (), (32, 32, 3)))
    folder = tmp_path / "cifar10_speedrun" / "rehearsal"
    fit(experiment, folder, {"experiment": "cifar10_speedrun", "arguments": arguments})
    assert {path.name for path in (folder / "averages").glob("*.npz")} == {
        f"{step:07d}-{width}.npz" for step in (2, 4, 6) for width in (0.05, 0.1)
    }
    for step in ("2", "6"):
        options = eval_options(
            metrics=("kid",), features="pixels", n=20, ema=0.05, checkpoint=step, runs=str(tmp_path),
            out=str(tmp_path / f"{step}.jsonl"),
        )  # fmt: skip
        said = "\n".join(eval_page(experiment, "cifar10_speedrun", folder, options))
        found = [read_result(line) for line in (tmp_path / f"{step}.jsonl").read_text().splitlines()]
        assert f"ema=0.05 at step={step}" in said
        assert found[-1].protocol.evaluations == 3
        assert np.isfinite(found[-1].value)
