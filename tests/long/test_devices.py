"""1 device and 8 simulated ones: the same losses and the same samples, parameters replicated and split."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, environment, make, saved_state
from PIL import Image

from diffusion_jax.training import records
from diffusion_jax.training.loop import fit

OPTIONS = {"width": 64, "batch": 32, "log_every": 1, "checkpoint_every": 10, "dropout": 0.1}


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("devices")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "long" / "eight_devices.py", out],
        env=environment(cache, XLA_FLAGS="--xla_force_host_platform_device_count=8"),
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def losses(run):
    return np.array([line["loss"] for line in records.read_lines(run / "metrics.jsonl") if "loss" in line])


def test_batches_and_parameters_really_are_split(trained):
    found = json.loads((trained / "found.json").read_text())
    assert found["one"] == {"split": 0, "share": 1.0, "rows": [32], "devices": 1}
    assert found["eight"] == {"split": 0, "share": 1.0, "rows": [4] * 8, "devices": 8}
    assert found["split"]["rows"] == [4] * 8
    assert found["split"]["split"] > 10
    assert found["split"]["share"] < 0.2  # an eighth, and the small arrays that stay whole


@pytest.mark.parametrize("name", ["eight", "split"])
def test_the_loss_curve_is_that_of_one_device(trained, name):
    one, other = losses(trained / "one"), losses(trained / name)
    assert len(one) == len(other) == 30
    print(name, "largest relative difference", np.max(np.abs(other / one - 1)))
    # float32 sums in another order: a few 1e-7 a step; Adam's division makes them grow slowly.
    np.testing.assert_allclose(other, one, rtol=1e-5)


@pytest.mark.parametrize("name", ["eight", "split"])
def test_the_samples_after_training_are_those_of_one_device(trained, name):
    one, other = (np.asarray(Image.open(trained / run / "samples.png"), int) for run in ("one", name))
    assert one.std() > 10
    # The parameters differ in their last bits, which may round a pixel the other way.
    assert np.max(np.abs(one - other)) <= 1
    assert np.mean(one != other) < 0.01


def test_the_same_parameters_give_the_same_pictures_to_the_bit(trained):
    drawn = np.load(trained / "drawn.npz")
    assert drawn["one"].shape == (37, 8, 8, 1)
    assert drawn["one"].std() > 10
    np.testing.assert_array_equal(drawn["one"], drawn["eight"])


@pytest.mark.parametrize("name", ["eight", "split"])
def test_a_checkpoint_of_eight_devices_goes_on_with_one(trained, name):
    assert saved_state(trained / name, make(**OPTIONS), 30)[1] == {"step": 30}
    fit(make(**OPTIONS, steps=40), trained / name, {}, devices=1)
    fit(make(**OPTIONS, steps=40), trained / "one", {}, devices=1)
    np.testing.assert_allclose(losses(trained / name), losses(trained / "one"), rtol=1e-5)
