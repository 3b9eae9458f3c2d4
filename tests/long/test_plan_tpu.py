"""Plans for devices that are not there: 8 simulated ones, with communication worked out by hand, and a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import ROOT, TOY, environment, make

COMPILER = ROOT / ".venv-tpu"


def plan(cache, out, *words, path=""):
    """The numbers of `plan`, and what it said."""
    folders = filter(None, [str(path), str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_jax", "plan", *words, f"json={out}", "cache=False"],
        env={**environment(cache), "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return json.loads(Path(out).read_text()) if Path(out).exists() else None, done


def test_gradients_of_eight_devices_are_reduced_once(cache, tmp_path):
    result, done = plan(cache, tmp_path / "plan.json", str(TOY), "topology=cpu:8", "chip=v5e", "width=64", "batch=32")
    assert done.returncode == 0, done.stderr
    params = jax.eval_shape(make(width=64).net.init, jax.random.key(0))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    reduced = [c for c in result["programs"]["train"]["collectives"] if c["kind"] == "all-reduce"]
    assert {c["size"] for c in reduced} == {8}
    total = sum(c["bytes"] * c["times"] for c in reduced)
    assert gradients <= total < 1.05 * gradients + 1024  # besides, the loss and its like
    assert sum(c["sent"] for c in reduced) == pytest.approx(2 * total * 7 / 8)
    assert result["state"]["parameters"] == gradients
    assert "all-reduce" in done.stdout


def test_split_parameters_take_an_eighth(cache, tmp_path):
    words = [str(TOY), "topology=cpu:8", "width=64", "batch=32"]
    whole, _ = plan(cache, tmp_path / "a.json", *words)
    split, done = plan(cache, tmp_path / "b.json", *words, "split=True")
    assert done.returncode == 0, done.stderr
    assert split["state"]["optimizer"] < 0.2 * whole["state"]["optimizer"]
    assert any(c["kind"] == "all-gather" for c in split["programs"]["train"]["collectives"])


def test_bad_input_is_one_line(cache, tmp_path):
    for words, said in (
        (["topology=v9:1x1"], "v5e:16x16"),
        (["topology=cpu:8", "batch=12"], "cannot be split evenly over 8"),
        (["topology=cpu:8", "tensor=3"], "tensor=3 does not divide"),
        (["topolgy=cpu:8"], "did you mean 'topology'"),
    ):
        _, done = plan(cache, tmp_path / "no.json", str(TOY), *words)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not (COMPILER / "ready").exists(), reason="no TPU compiler"
)
def test_digits_fit_a_single_v5e(cache, tmp_path):
    result, done = plan(
        cache, tmp_path / "plan.json", "digits", "topology=v5e:1x1", "sample=False", path=COMPILER
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train = result["programs"]["train"]
    assert result["chip"]["name"] == "TPU v5e"
    assert result["fits"]
    # XLA leaves out taps on padding, of which pictures of 8 x 8 have many.
    assert 0.7 * result["model_flops"] < train["flops"] < result["model_flops"]
    assert train["memory"]["total"] < 2**30
    assert train["cycles"] > 0
