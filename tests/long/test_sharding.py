"""Steps on one device and on eight: the same numbers however arrays are laid out, and they really are laid out so."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, environment

MESHES = ("data", "split", "2x4", "4x2", "4x2 split")
OTHERS = [f"{name}, 4x2 split" for name in ("muon", "schedule free", "projected")]
PARTS = [f"adamw, {mesh}, accumulate" for mesh in ("data", "split", "4x2 split")]


@pytest.fixture(scope="module")
def steps(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("steps")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "long" / "sharded_steps.py", out],
        env=environment(cache, XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"),
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("name", [f"adamw, {mesh}" for mesh in MESHES] + OTHERS + PARTS)
def test_parameters_and_averages_are_those_of_one_device(steps, name):
    out, found = steps
    one = name.split(",")[0] + ", one"
    np.testing.assert_allclose(found[name]["losses"], found[one]["losses"], rtol=2e-6)
    assert found[name]["grad_norm"] == pytest.approx(found[one]["grad_norm"], rel=1e-5)
    mine, wanted = np.load(out / f"{name}.npz"), np.load(out / f"{one}.npz")
    worst = max(float(np.max(np.abs(mine[key] - wanted[key]))) for key in wanted)
    print(name, "largest difference", worst)
    # float32 sums in another order; three updates of up to 0.01 were made.
    assert worst < 1e-5
    losses = found[one]["losses"]
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("name", "share", "rows"),
    [("one", 1, [16]), ("data", 1, [2] * 8), ("split", 0.125, [2] * 8), ("2x4", 0.25, [8] * 8), ("4x2", 0.5, [4] * 8)],
)
def test_each_device_holds_its_share(steps, name, share, rows):
    found = steps[1][f"adamw, {name}"]
    assert found["rows"] == rows
    assert found["laid out"]
    for part in ("params", "averages", "moments"):
        # Small arrays stay whole, and tensor parallelism splits the blocks alone, without their adaLN.
        assert share <= found[part] < {1: 1.01, 0.125: 0.16, 0.25: 0.65, 0.5: 0.75}[share]


def test_both_together_hold_less_than_tensor_parallelism_alone(steps):
    both, tensor, split = (steps[1][f"adamw, {name}"]["params"] for name in ("4x2 split", "4x2", "split"))
    assert split - 0.01 < both < 0.5 * tensor


def test_weights_are_gathered_once_unless_rematerialised(steps):
    """What `mesh` says of gathered weights, read off the compiled programs."""
    found = steps[1]
    assert found["plain"]["gathers"] == 8
    assert found["remat"]["gathers"] > 12
    assert found["parts"]["gathers"] == 8
    # The sums of gradients are carried through the loop over the parts in shards.
    assert found["parts"]["sums"][0] >= 8
