"""The unattended script: its driver on made-up pieces, and its plan; tests/long runs all of it at toy size."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


script, report = load("fashion_mnist_10min"), load("fashion_mnist_report")


def piece(name, text):
    return script.Piece(name, ["-c", text], name)


def test_pieces_are_done_once_and_in_order(tmp_path):
    log = tmp_path / "log"
    made = [piece(name, f"open({str(log)!r}, 'a').write({name!r})") for name in "abc"]
    assert script.drive(made, tmp_path, None) == 0
    assert script.drive(made, tmp_path, None) == 0
    assert log.read_text() == "abc"
    assert json.loads((tmp_path / "pieces" / "a.json").read_text())["bouts"] == 1


def test_a_piece_that_fails_stops_the_script_and_is_done_again(tmp_path):
    file = tmp_path / "there"
    made = [piece("a", f"import pathlib; pathlib.Path({str(file)!r}).read_text()"), piece("b", "")]
    assert script.drive(made, tmp_path, None) == 1
    assert not (tmp_path / "pieces" / "b.json").exists()
    file.write_text("")
    assert script.drive(made, tmp_path, None) == 0


@pytest.mark.slow
def test_a_piece_that_takes_too_long_is_told_to_stop_and_goes_on(tmp_path):
    # Like a run: SIGTERM makes it keep what it has, and the next bout goes on from there.
    count = tmp_path / "count"
    text = f"""
import pathlib, signal, sys, time
file = pathlib.Path({str(count)!r})
done = int(file.read_text()) if file.exists() else 0
signal.signal(signal.SIGTERM, lambda *_: (file.write_text(str(done + 1)), sys.exit(143)))
if done < 2:
    time.sleep(60)
"""
    assert script.drive([piece("slow", text)], tmp_path, None, limit=1.5) == 0
    assert count.read_text() == "2"
    assert json.loads((tmp_path / "pieces" / "slow.json").read_text())["bouts"] == 3


@pytest.mark.slow
def test_the_script_stops_after_so_many_seconds_and_says_that_there_is_more(tmp_path):
    assert script.drive([piece("a", ""), piece("b", "import time; time.sleep(60)")], tmp_path, 2.5) == script.MORE
    assert (tmp_path / "pieces" / "a.json").exists()
    assert json.loads((tmp_path / "pieces" / "b.partial").read_text())["bouts"] == 1
    assert script.drive([piece("a", "raise SystemExit(9)"), piece("b", "")], tmp_path, None) == 0


@pytest.mark.parametrize("size", script.SIZES)
def test_a_plan_names_each_piece_once_and_takes_arguments_that_the_experiments_have(size, tmp_path, monkeypatch):
    from diffusion_jax.arguments import resolve, split_arguments
    from diffusion_jax.experiment import find_experiment

    monkeypatch.chdir(ROOT)
    made = script.pieces(script.Place(size, tmp_path, "data"))
    assert len({p.name for p in made}) == len(made)
    assert made[-1].name == "report"
    trained = [p.words[3:] for p in made if p.words[:3] == ["-m", "diffusion_jax", "train"]]
    assert [words[0] for words in trained] == [script.TEACHER] * 2 + [script.STUDENT] * 2 + [script.NEON]
    for name, *words in trained:
        own = {k: v for k, v in split_arguments(words).items() if k not in ("run", "runs")}
        resolve(find_experiment(name), own, name)


def test_a_report_says_the_mean_and_the_spread_over_seeds():
    assert report._told([1.0, 2.0, 3.0]) == "2 ± 1"
    assert report._told([0.25]) == "0.25"
    assert report._told(None) == ""


def test_targets_are_reached_or_not(tmp_path):
    floor = {"fd": [1.0], "c2st": [0.5], "authenticity": [0.5]}
    good = {"fd": [0.9], "c2st": [0.52], "authenticity": [0.5]}
    bad = {"fd": [9.0], "c2st": [0.9], "authenticity": [0.5]}
    names = ("unconditional-35", "ect-1", "ect-2", "meanflow-1", "meanflow-2", "neon=1.0-35")
    reached = report._targets({"conditional-35": good} | dict.fromkeys(names, good), floor).count("| yes |")
    missed = report._targets({"conditional-35": good} | dict.fromkeys(names, bad), floor)
    assert reached == 6  # extrapolation would have to be a fifth lower still
    assert missed.count("| no |") == 4


def test_a_sheet_shows_every_picture_where_it_belongs(tmp_path):
    from PIL import Image

    images = np.zeros((7, 4, 4, 1), np.uint8)
    images[:] = np.arange(7)[:, None, None, None] * 30
    report._sheet(tmp_path / "sheet.png", images, 5)
    shown = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert shown.shape == (2 * 2 * 5, 5 * 2 * 5)
    assert shown[1, 11] == 30
    assert shown[11, 11] == 180
    assert shown[11, 41] == 60
