"""make eval, reference, sweep and average, from words to files: on a run of a tiny network, in pixels."""

import json
import os

import jax
import numpy as np
import pytest

from diffusion_jax.__main__ import main
from diffusion_jax.evaluation.results import read_result
from diffusion_jax.training.parameters import read_parameters

EXPERIMENT = '''
from dataclasses import replace

import toy

from diffusion_jax.experiment import Experiment
from diffusion_jax.training import ema


def experiment(*, steps: int = 20) -> Experiment:
    """The toy, with averages that others can be made of."""
    made = toy.experiment(steps=steps, checkpoint_every=steps, dispatch=5)
    return replace(made, ema=(ema.power_function(0.05), ema.power_function(0.1)), snapshot_every=5, guidance=1.0)
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run: (path of the experiment, folder of all runs, folder of the run)."""
    folder = tmp_path_factory.mktemp("measured")
    path = folder / "small.py"
    path.write_text(EXPERIMENT)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["train", str(path), f"runs={folder / 'runs'}"]) == 0
    return str(path), f"runs={folder / 'runs'}", folder / "runs" / "small" / "default"


@pytest.fixture
def command(trained, capsys):
    """A command on the run: its lines, or with code the last line of the error stream."""
    path, runs, _ = trained

    def run(name, *words, code=0):
        given = [name, path, runs, *words]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert main(given) == code
        said = capsys.readouterr()
        return said.err.replace("\r", "\n").strip().splitlines()[-1] if code else said.out.splitlines()

    return run


def lines_of(path):
    return [read_result(line) for line in path.read_text().splitlines()]


SMALL = ("features=pixels", "n=40", "batch=20")


@pytest.mark.slow
def test_a_run_is_measured_with_its_floor_and_protocol(command, trained):
    said = command("eval", *SMALL, "metrics=fid,recall", "seeds=2")
    assert said[0] == "pixels: no weights"
    assert [line.split()[0] for line in said[1:5]] == ["fd", "floor", "recall", "floor"]
    for part in ("+-", "n=40", "reference=small train(1437)", "default in 2 steps", "evaluations=2", "seeds=0,1"):
        assert part in said[1]
    found = lines_of(trained[2] / "evaluation.jsonl")
    each = {r.protocol.seeds: r.value for r in found if r.metric == "fd" and r.protocol.seeds}
    assert each[(0, 1)] == pytest.approx((each[(0,)] + each[(1,)]) / 2)
    assert [r.protocol.sampler for r in found if not r.protocol.seeds] == ["held-out data"] * 2
    assert any("40 examples give a singular covariance of 64 features" in line for line in said)


@pytest.mark.slow
def test_pictures_measure_like_the_run_that_drew_them(command, tmp_path):
    command("sample", "n=40", "format=npz", f"out={tmp_path}")
    command("eval", *SMALL, f"images={tmp_path / 'images.npz'}", f"out={tmp_path / 'a.jsonl'}")
    command("reference", "features=pixels", f"out={tmp_path / 'r.npz'}")
    against = [f"reference={tmp_path / 'r.npz'}", f"out={tmp_path / 'b.jsonl'}", f"against={tmp_path / 'a.jsonl'}"]
    difference = command("eval", *SMALL, *against)[-1].split()
    assert difference[0] == "fd"
    assert float(difference[1]) == pytest.approx(0, abs=1e-9)
    other = command("eval", "features=pixels", "n=30", *against, code=2)
    assert other == "error: these results cannot be compared, they differ in n: 30 and 40"


@pytest.mark.slow
def test_an_average_in_a_file_is_the_one_put_together(command, trained, tmp_path):
    assert "ema=0.08 at step 20" in command("average", "ema=0.08", f"out={tmp_path / 'p.npz'}")[0]
    assert read_parameters(tmp_path / "p.npz")
    for words, name in (([f"params={tmp_path / 'p.npz'}"], "a"), (["ema=0.08"], "b")):
        command("eval", *SMALL, *words, f"out={tmp_path / name}.jsonl")
    a, b = (lines_of(tmp_path / f"{name}.jsonl")[-1] for name in "ab")
    assert a.value == b.value
    assert (a.protocol.average, b.protocol.average) == ("params=p", "ema=0.08 at step=20")
    np.savez(tmp_path / "wrong.npz", w=np.zeros(3))
    assert "is of another network" in command("eval", *SMALL, f"params={tmp_path / 'wrong.npz'}", code=2)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(command, trained, tmp_path):
    words = [*SMALL, "metrics=fid", "sampler=ddim,heun", "ema=0,0.08", f"out={tmp_path}"]
    first = command("sweep", *words, "steps=2")
    rows = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert len(rows) == 4
    again = command("sweep", *words, "steps=2,3")
    more = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert more[:4] == rows
    assert len(more) == 8
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[4] for line in table[2:6]] == ["2", "3", "3", "5"]  # evaluations
    assert [line for line in first if "| heun | 2 " in line and line in again]
    assert (tmp_path / "sweep-fd.png").stat().st_size > 10_000
    assert json.loads(more[-1])["seconds"] > 0


@pytest.mark.slow
def test_bits_are_of_held_out_pictures(command, tmp_path):
    said = command("eval", "metrics=bits", "n=16", "batch=16", f"out={tmp_path / 'a.jsonl'}")
    assert "reference=small test(360)" in said[0]
    found = lines_of(tmp_path / "a.jsonl")[0]
    # 8 bits a pixel are what no model at all needs; this one has hardly been trained.
    assert 0 < found.value < 20
    assert found.standard_error > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metrics=fdi"], "metrics: there is no 'fdi'; did you mean 'fd'"),
        (["features=inception"], "features=inception needs weights=FILE: pt_inception-2015-12-05-6726825d.pth"),
        (["features=pixel"], "features=pixel: there are inception"),
        (["features=pixels", "metrics=cmmd"], "cmmd is defined in CLIP's features"),
        (["features=pixels", "images=gone.npz"], "gone.npz is neither a folder of pictures nor an .npz"),
        (["features=pixels", "reference=gone.npz"], "no statistics file gone.npz"),
        (["features=pixels", "sampler=ancestral", "n=8"], "needs a network with a learned variance"),
        (["features=pixels", "ema=0.5", "n=8"], "between 0 and 0.288"),
        (["features=pixels", "unconditional=True", "guidance=2", "n=8"], "guidance is for samples of given classes"),
        (["steps=0"], "at least 1"),
        (["width=3"], "has no argument 'width'"),
        (["run=other"], "no run 'other'"),
    ],
)
def test_bad_input_is_one_line(command, words, message):
    said = command("eval", *words, code=2)
    assert said.startswith("error: ")
    assert message in said


def test_a_sweep_refuses_a_bad_point_before_it_measures(command, tmp_path):
    words = [*SMALL, "sampler=heun,ancestral", f"out={tmp_path}"]
    assert "learned variance" in command("sweep", *words, code=2)
    assert not (tmp_path / "sweep.jsonl").exists()
    assert "bits do not depend on the sampler" in command("sweep", *SMALL, "metrics=bits", code=2)
