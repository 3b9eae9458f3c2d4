"""The command line: arguments, bad input, and what a run leaves behind.

Bad input gives one line on the error stream, no traceback and a non-zero exit, and costs nothing that was there.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import write_model

from diffusion_jax.__main__ import find_run, main, run_name
from diffusion_jax.arguments import Count, closest, describe, resolve, split_arguments
from diffusion_jax.experiment import Experiment, find_experiment, initial_state, loss_fn
from diffusion_jax.training import records
from diffusion_jax.training.generate import example_keys, make_draw
from diffusion_jax.training.roofline import batch_shapes
from diffusion_jax.training.state import parameter_count
from diffusion_jax.training.step import make_train_step
from diffusion_jax.typing import InputError

ROOT = Path(__file__).parent.parent
TOY = str(Path(__file__).parent / "toy.py")
EXPERIMENTS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py"))


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch):
    """In the repository, with JAX's own rules of promotion, which is how commands run."""
    monkeypatch.chdir(ROOT)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = before or str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", folder)
    yield
    if before is None:
        del os.environ["JAX_COMPILATION_CACHE_DIR"]


def fails(capsys, *words, code=2):
    """The one line that a command leaves on the error stream."""
    assert main(list(words)) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def complaint(text, code, expected=1):
    """The last line of a run that had already begun to talk; no line is of a traceback."""
    assert code == expected, text
    assert "Traceback" not in text, text
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert sum(line.startswith("error:") for line in lines) == 1, text
    assert lines[-1].startswith("error:"), text
    return lines[-1]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


# Arguments -----------------------------------------------------------------------------------------------------------


def function(
    *, a: Count = 1, b: float | None = None, c: tuple[int, ...] = (1, 2), d: bool = False, e: str = "x"
) -> dict:
    """A function.

    Args:
        a: a count.
    """
    return {"a": a, "b": b, "c": c, "d": d, "e": e}


def test_arguments_become_typed_values():
    assert resolve(function, {}, "f") == {"a": 1, "b": None, "c": (1, 2), "d": False, "e": "x"}
    given = split_arguments(["a=3", "--b=1e-3", "c=4,5,6", "d=True", "e=a=b"])
    assert resolve(function, given, "f") == {"a": 3, "b": 1e-3, "c": (4, 5, 6), "d": True, "e": "a=b"}
    assert resolve(function, {"b": "None"}, "f")["b"] is None
    assert split_arguments(["--learning-rate=1"]) == split_arguments(["learning_rate=1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "cannot read the argument 'a'"),
        (["a=1", "--a=2"], "given twice"),
        (["aa=1"], "no argument 'aa'; did you mean 'a'"),
        (["a=0"], "at least 1"),
        (["a=1.5"], "a=1.5: not a whole number"),
        (["b=much"], "b=much: not a number"),
        (["b=nan0"], "not a number"),
        (["d=perhaps"], "not True or False"),
        (["c=1,x"], "c=1,x: not"),
    ],
)
def test_what_cannot_be_read_is_named(words, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(function, split_arguments(words), "f")
    assert "\n" not in str(caught.value)


def test_help_names_every_argument():
    text = describe(function, "f")
    assert all(f"{name}=" in text for name in "abc")
    assert "a count" in text


def test_names_of_runs_are_stable_and_safe():
    assert run_name({"b": "1", "a": "2"}) == run_name({"a": "2", "b": "1"}) == "a=2,b=1"
    odd, other = run_name({"path": "/home/me/my pictures"}), run_name({"path": "/home/me/my-pictures"})
    assert odd != other
    assert not set("/ ") & set(odd)
    assert len(run_name({"path": "x" * 500})) < 120
    assert closest("digts", ["digits", "cifar10"]) == "; did you mean 'digits'?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage:"),
        (["trian", "digits"], "did you mean 'train'"),
        (["train", "digit"], "unknown experiment 'digit'; did you mean 'digits'"),
        (["train", "nothing/here.py"], "unknown experiment"),
        (["train", "digits", "widht=3"], "no argument 'widht'; did you mean 'width'"),
        (["train", "digits", "devcies=3"], "did you mean 'devices'"),
        (["train", "digits", "width=wide"], "width=wide: not a whole number"),
        (["train", "digits", "steps=-5"], "steps=-5 is not possible: it must be at least 1"),
        (["train", "digits", "batch=0"], "batch=0 is not possible"),
        (["train", "digits", "seed=-1"], "seed=-1 is not possible"),
        (["train", "digits", "seed=4294967296"], "seed=4294967296 is not possible"),
        (["train", "digits", "learning_rate=-1"], "learning_rate=-1"),
        (["train", "digits", "learning_rate=nan"], "learning_rate=nan"),
        (["train", "digits", "width=7"], "channels=7"),
        (["train", "cifar10", "precision=float8"], "precision=float8"),
        (["train", "cifar10", "batch=10", "accumulate=3"], "batch=10 does not divide into accumulate=3"),
        (["train", "cifar10", "sample_steps=2000"], "2000 sampling steps are not possible"),
        (["train", "digits", "devices=0"], "devices=0 is not possible"),
        (["train", "digits", "devices=999"], "devices=999: this machine has"),
        (["train", "folder"], "folder needs the argument path="),
        (["train", "folder", "path=/nowhere"], "/nowhere is missing"),
        (["sample", "digits", "run=nosuch", "runs=/nowhere"], "no run in /nowhere/digits: train first"),
        (["sample", "digits", "sampler=best"], "sampler=best: not of the type"),
        (["sample", "digits", "n=0"], "n=0 is not possible"),
        (["sample", "digits", "stepz=3"], "did you mean 'steps'"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, words, message):
    if words[:1] == ["train"]:
        words = [*words, f"runs={tmp_path}"]
    assert message in fails(capsys, *words)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["train", "help"], "devices="), (["train", "digits", "help"], "checkpoint_every="), (["sample", "--help"], "n=")],
)
def test_help_is_no_error(capsys, words, named):
    assert main(words) == 0
    assert named in capsys.readouterr().out


def test_missing_data_says_which_files_to_put_where(capsys, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.create_connection", offline)
    monkeypatch.setattr("diffusion_jax.training.sources.tfds._unreachable", lambda urls: "www.cs.toronto.edu")
    line = fails(capsys, "train", "cifar10", "width=8", f"data_dir={tmp_path}/data", f"runs={tmp_path}/runs")
    assert "cifar-10-binary.tar.gz" in line
    assert str(tmp_path / "data") in line


def test_an_unreadable_picture_is_named(capsys, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 9, 3), 80 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"this is not a picture")
    line = fails(capsys, "train", "folder", f"path={folder}", "size=8", "width=8", f"runs={tmp_path}/runs")
    assert "broken.jpg" in line


@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_run_folder_that_cannot_be_written(capsys, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    runs = tmp_path / "file" / "runs" if place == "file" else "/proc/nothing"
    line = fails(capsys, "train", TOY, f"runs={runs}")
    assert "cannot write in the run folder" in line
    assert (tmp_path / "file").read_text() == "in the way"


# A small run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(runs):
    """The default experiment, tiny, from the command line to its last number."""
    words = ["train", "digits", "width=8", "steps=8", "batch=16", "sample_steps=3"]
    words += ["log_every=2", "sample_every=4", "checkpoint_every=4", f"runs={runs}", "run=tiny"]
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert main(words) == 0
    finally:
        os.chdir(here)
    return runs / "digits" / "tiny"


def test_a_run_leaves_everything_behind(digits_run):
    lines = lines_of(digits_run)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 8]
    assert lines[-1]["finished"]
    assert 0 <= lines[-1]["sample_accuracy"] <= 1
    assert lines[-1]["heldout_accuracy"] > 0.95
    assert lines[-1]["copy_ratio"] > 0
    assert list(lines[-1])[-1] == "sample_accuracy"
    assert steps_saved(digits_run) == [4, 8]
    record = json.loads((digits_run / "experiment.json").read_text())
    assert record["arguments"]["width"] == 8
    assert record["arguments"]["guidance"] == 1.5
    assert record["versions"]["jax"] == jax.__version__
    assert record["parameters"] > 0
    for name in ("samples.png", "samples/step_0000004.png"):
        with Image.open(digits_run / name) as picture:
            assert min(picture.size) > 500
    with Image.open(digits_run / "denoising.gif") as film:
        assert film.n_frames == 4
    assert not list(digits_run.rglob("*.part"))


def test_a_finished_run_is_not_made_again(digits_run, capsys):
    before = (digits_run / "metrics.jsonl").read_text()
    words = ["width=8", "steps=8", "batch=16", "sample_steps=3", f"runs={digits_run.parent.parent}", "run=tiny"]
    assert main(["train", "digits", *words]) == 0
    said = capsys.readouterr()
    assert "already finished at step 8" in said.err
    assert said.out.strip().splitlines()[-1].startswith("sample_accuracy: ")
    assert (digits_run / "metrics.jsonl").read_text() == before


def draw(digits_run, tmp_path, name, *words):
    out = tmp_path / name
    arguments = [f"runs={digits_run.parent.parent}", f"out={out}", *words]
    assert main(["sample", "digits", *arguments]) == 0
    return out


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.slow
def test_pictures_depend_on_their_seed_alone(digits_run, tmp_path):
    many = draw(digits_run, tmp_path, "many", "n=13", "seed=3")
    few = draw(digits_run, tmp_path, "few", "n=5", "seed=3", "format=npz")
    names = sorted(p.name for p in many.glob("0*.png"))
    assert len(names) == 13
    arrays = np.load(few / "images.npz")
    assert arrays["labels"].tolist() == [0, 1, 2, 3, 4]
    for name, image in zip(names, arrays["images"], strict=False):
        np.testing.assert_array_equal(pixels(many / name), image[..., 0])
    settings = json.loads((few / "settings.json").read_text())
    assert settings["seed"] == 3


@pytest.mark.slow
def test_samplers_steps_guidance_labels_checkpoints(digits_run, tmp_path):
    chosen = draw(
        digits_run, tmp_path, "a", "n=3", "sampler=heun", "steps=2", "guidance=3", "label=7", "checkpoint=best",
        "format=npz",
    )  # fmt: skip
    arrays = np.load(chosen / "images.npz")
    assert arrays["labels"].tolist() == [7, 7, 7]
    older = draw(digits_run, tmp_path, "b", "n=3", "checkpoint=4", "format=grid")
    assert sorted(p.name for p in older.iterdir()) == ["grid.png", "settings.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=tinny"], "no run 'tinny'"),
        (["label=10"], "label=10: this experiment has the classes 0 to 9"),
        (["checkpoint=5"], "checkpoint=5: there are newest, best, 4, 8"),
        (["sampler=ancestral"], "learned variance"),
        (["devices=99"], "devices=99"),
        (["seed=99999999999"], "seed=99999999999 is not possible"),
    ],
)
def test_samples_that_cannot_be_drawn(digits_run, capsys, words, message):
    assert message in fails(capsys, "sample", "digits", f"runs={digits_run.parent.parent}", *words)


def test_another_architecture_names_the_first_parameter(digits_run, capsys):
    before = sorted(str(p) for p in digits_run.rglob("*"))
    runs = digits_run.parent.parent
    assert main(["train", "digits", "width=16", "batch=16", "run=tiny", f"runs={runs}"]) == 2
    said = capsys.readouterr().err
    assert "of another architecture: the first difference is params." in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(str(p) for p in digits_run.rglob("*")) == before


def test_a_damaged_record_and_a_vanished_argument(digits_run, capsys, tmp_path):
    run = tmp_path / "digits" / "r"
    run.mkdir(parents=True)
    (run / "experiment.json").write_text('{"arguments": {"wid')
    assert "damaged" in fails(capsys, "sample", "digits", f"runs={tmp_path}")
    (run / "experiment.json").write_text('{"arguments": {"wide": 3}}')
    assert "'wide', which digits no longer has" in fails(capsys, "sample", "digits", f"runs={tmp_path}")
    (run / "experiment.json").write_text('{"arguments": {"width": 8}}')
    assert "no checkpoint in" in fails(capsys, "sample", "digits", f"runs={tmp_path}")
    assert find_run(tmp_path / "digits", "") == run


# Runs that go wrong --------------------------------------------------------------------------------------------------


def train_toy(capfd, tmp_path, *words):
    code = main(["train", TOY, f"runs={tmp_path}", "run=r", *words])
    return code, capfd.readouterr().err, tmp_path / "toy" / "r"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(capfd, tmp_path):
    code, said, run = train_toy(capfd, tmp_path, "breaks_at=12", "checkpoint_every=5", "dispatch=3")
    line = complaint(said, code)
    assert "the loss is nan at step 13; the last good checkpoint is step 10" in line
    assert "learning rate" in line
    assert steps_saved(run) == [5, 10]
    # From there on it goes on with other arguments.
    code, said, run = train_toy(capfd, tmp_path, "checkpoint_every=5", "learning_rate=1e-4")
    assert code == 0
    assert "going on from step 10" in said
    assert "breaks_at: 12 -> 0" in said
    assert steps_saved(run)[-1] == 20


@pytest.mark.slow
def test_parameters_that_broke_after_the_last_loss_are_not_saved(capfd, tmp_path):
    code, said, run = train_toy(capfd, tmp_path, "breaks_at=10", "checkpoint_every=5")
    assert "is nan at step 10; the last good checkpoint is step 5" in complaint(said, code)
    assert steps_saved(run) == [5]


def test_nothing_saved_yet(capfd, tmp_path):
    code, said, run = train_toy(capfd, tmp_path, "breaks_at=2", "checkpoint_every=0")
    assert "at step 3; no checkpoint had been saved" in complaint(said, code)
    assert steps_saved(run) == []


@pytest.mark.slow
def test_a_batch_that_does_not_split_over_devices(tmp_path):
    """Eight simulated devices need a process of their own."""
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = command(["-m", "diffusion_jax", "train", TOY, "batch=12", f"runs={tmp_path}"], **eight)
    line = complaint(done.stderr, done.returncode, 2)
    assert "a batch of 12 cannot be split evenly over 8 devices" in line


def environment(**extra):
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def command(words, **extra):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment(**extra), cwd=ROOT, timeout=300
    )


@pytest.fixture(scope="module")
def trained_toy(tmp_path_factory):
    """A finished toy run of 10 steps with checkpoints 5 and 10."""
    runs = tmp_path_factory.mktemp("toy")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["train", TOY, f"runs={runs}", "run=r", "steps=10"]) == 0
    return runs


SMALL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
runpy.run_module("diffusion_jax", run_name="__main__", alter_sys=True)
"""
"""The limit on the size of a file stands for a full disk, which only root could make: writing fails in both."""


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_saved(trained_toy, tmp_path):
    shutil.copytree(trained_toy, tmp_path, dirs_exist_ok=True)
    words = ["train", TOY, f"runs={tmp_path}", "run=r", "steps=30"]
    failed = command(["-c", SMALL_DISK, *words])
    line = complaint(failed.stderr, failed.returncode)
    assert "free space" in line
    assert steps_saved(tmp_path / "toy" / "r") == [5, 10]
    # There is nothing to clean up by hand: the same command goes on.
    with_space = command(["-m", "diffusion_jax", *words])
    assert with_space.returncode == 0, with_space.stderr
    assert "going on from step 10" in with_space.stderr
    assert steps_saved(tmp_path / "toy" / "r")[-1] == 30


@pytest.mark.slow
def test_a_full_disk_while_metrics_are_written(capfd, tmp_path, monkeypatch):
    whole = records.write_line

    def full(path, line):
        if line["step"] >= 8:
            raise OSError(28, "No space left on device", str(path))
        whole(path, line)

    monkeypatch.setattr(records, "write_line", full)
    code, said, run = train_toy(capfd, tmp_path, "log_every=4")
    line = complaint(said, code)
    assert "No space left on device" in line
    assert "metrics.jsonl" in line
    assert steps_saved(run) == [5]


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over_in_one_line(trained_toy, tmp_path):
    shutil.copytree(trained_toy, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "toy" / "r" / "checkpoints" / "10" / "state"
    for path in state.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:100])
    done = command(["-m", "diffusion_jax", "train", TOY, f"runs={tmp_path}", "run=r", "steps=10"])
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert "checkpoint 10" in lines[0]
    assert "going back to checkpoint 5" in lines[0]
    assert "going on from step 5" in lines[1]
    assert not any("Traceback" in line or "Error" in line for line in lines[1:]), done.stderr
    assert steps_saved(tmp_path / "toy" / "r") == [5, 10]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_data_is_loaded(tmp_path, number):
    """Nothing to save yet: it leaves at once, in one line."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import dataclasses, importlib.util, sys, time\n"
        f"sys.path.insert(0, {str(Path(TOY).parent)!r})\n"
        "import toy\n"
        "def data():\n    print('loading', flush=True)\n    time.sleep(60)\n"
        "def experiment(): return dataclasses.replace(toy.experiment(), data=data)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "diffusion_jax", "train", str(slow), f"runs={tmp_path}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores Ctrl-C
    )  # fmt: skip
    assert child.stdout.readline() == "loading\n"
    start = time.monotonic()
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert child.returncode == 128 + number
    assert said.strip().splitlines() == [
        "stopped at once; what was complete stays, the same command goes on from there"
    ]


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_shortage_of_memory_is_explained(capsys, monkeypatch, command):
    """With what the plan says of the state, the switches that are not on yet, and the command of the whole plan."""

    def short(name, words):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nlong story")

    monkeypatch.setitem(sys.modules["diffusion_jax.__main__"].COMMANDS, command, (short, lambda: {}))
    said = fails(capsys, command, TOY, *(["width=24", "accumulate=2"] if command == "train" else []), code=1)
    assert said.startswith("error: out of memory: ")
    assert "allocate 99 bytes" in said
    if command == "train":
        net = find_experiment(TOY)(width=24).net
        assert f"parameters {4 * parameter_count(net) / 2**10:.1f} KiB" in said
        assert f'make plan EXP={TOY} ARGS="width=24 accumulate=2"' in said
        assert "batch (" in said
        assert "accumulate=2 (" not in said
        assert "split=True (" not in said, "there is one device"


# Every experiment ----------------------------------------------------------------------------------------------------


def arguments_of(name, tmp_path):
    if name not in ("folder", "stable_diffusion"):
        return {}
    if name == "stable_diffusion":
        return {"path": str(tmp_path), "model": str(write_model(tmp_path / "model"))}
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.fromarray(np.full((20, 17, 3), 60 * i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    return {"path": str(tmp_path)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_how_it_is_run(name, tmp_path):
    made = find_experiment(name)
    module = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    text = module.loader.get_source(name)
    documentation = text.split('"""')[1]
    command = "make train" if name == "digits" else f"make train EXP={name}"
    assert command in documentation
    assert "Data:" in documentation or name == "folder"
    experiment = made(**arguments_of(name, tmp_path))
    assert isinstance(experiment, Experiment)
    explained = describe(made, name)
    assert all(f"{argument}=" in explained for argument in ("steps", "batch", "learning_rate", "seed"))


def test_cifar10_has_the_papers_network():
    assert parameter_count(find_experiment("cifar10")().net) == 35_746_307


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_makes_a_step_of_its_own_size(name, tmp_path):
    """Traced, not run: shapes and types of a whole step at the default size; tests/long runs small ones."""
    experiment = find_experiment(name)(**arguments_of(name, tmp_path))
    step = make_train_step(loss_fn(experiment), experiment.optimizer, experiment.ema, accumulate=experiment.accumulate)
    state = jax.eval_shape(lambda: initial_state(experiment))
    new, metrics = jax.eval_shape(step, state, batch_shapes(experiment))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {m.shape for m in metrics.values()} == {()}
    shape = jax.eval_shape(make_draw(experiment), state.ema, example_keys(0, 0, 3), None)
    side, *rest = experiment.shape
    beside = experiment.drawing is not None  # a reconstruction at the right of its original
    assert shape.shape == ((3, side, 2 * rest[0], *rest[1:]) if beside else (3, side, *rest))
