"""Two and four real processes on this machine: the run of one process, checkpoints of any number, leaving together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, TOY, environment, last_logged, make, steps_saved
from PIL import Image

from diffusion_jax.training import records
from diffusion_jax.training.data import batch_indices
from diffusion_jax.training.draw import draw_to_folder
from diffusion_jax.training.loop import fit

OPTIONS = {"width": 32, "batch": 16, "log_every": 1, "dropout": 0.1, "checkpoint_every": 1000}
N = 1437
"""Pictures in the training split of the digits."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def described(by, port, n, i):
    """(arguments, environment) that tell process i of n of the others."""
    if by == "slurm":
        return [], {
            "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": f"{n}", "SLURM_STEP_NUM_TASKS": f"{n}", "SLURM_PROCID": f"{i}", "SLURM_LOCALID": f"{i}",
            "JAX_COORDINATOR_PORT": f"{port}",
        }  # fmt: skip
    if by == "ompi":
        return [], {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": f"{n}",
            "OMPI_COMM_WORLD_RANK": f"{i}", "OMPI_COMM_WORLD_LOCAL_RANK": f"{i}",
            "JAX_COORDINATOR_PORT": f"{port}",
        }  # fmt: skip
    return [f"coordinator=127.0.0.1:{port}", f"processes={n}", f"process={i}"], {}


class Several:
    """n processes of one command, each with its own log and `devices` simulated devices."""

    def __init__(self, cache, folder, n, *words, by="words", devices=1, own=lambda i: [], command="train", **extra):
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.logs = [folder / f"log{i}" for i in range(n)]
        self.fed = [folder / f"fed{i}.npz" for i in range(n)]
        self.children = []
        for i in range(n):
            arguments, surroundings = described(by, port, n, i)
            whole = [command, TOY, f"runs={folder}", "run=r", *words, *own(i), *arguments]
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
            with self.logs[i].open("w") as log:
                self.children.append(
                    subprocess.Popen(
                        [sys.executable, ROOT / "tests" / "long" / "several.py", *map(str, whole)],
                        stdout=log, stderr=log, cwd=ROOT,
                        env=environment(cache, FED=str(self.fed[i]), **flags, **surroundings, **extra),
                    )
                )  # fmt: skip

    def said(self, i):
        return self.logs[i].read_text().replace("\r", "\n")

    def everything(self):
        return "\n".join(f"== process {i}\n{self.said(i)}" for i in range(len(self.logs)))

    def codes(self, seconds=400):
        """Exit codes, in the order of the processes."""
        deadline = time.monotonic() + seconds
        try:
            return [child.wait(max(0.1, deadline - time.monotonic())) for child in self.children]
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"still running after {seconds} s\n{self.everything()}")

    def wait_for_step(self, run, step, seconds=400):
        deadline = time.monotonic() + seconds
        while last_logged(run) < step:
            broken = any(child.poll() not in (None, 0) for child in self.children)
            if broken or time.monotonic() > deadline:
                self.end()
                pytest.fail(self.everything())
            time.sleep(0.02)

    def wait_for_word(self, word, seconds=400):
        deadline = time.monotonic() + seconds
        while word not in self.said(0):
            if any(child.poll() is not None for child in self.children) or time.monotonic() > deadline:
                self.end()
                pytest.fail(self.everything())
            time.sleep(0.05)

    def end(self):
        for child in self.children:
            child.kill()
            child.wait()


@pytest.fixture
def several(cache):
    begun = []

    def begin(*arguments, **options):
        begun.append(Several(cache, *arguments, **options))
        return begun[-1]

    yield begin
    for group in begun:
        group.end()


def words(**options):
    return [f"{name}={value}" for name, value in (OPTIONS | options).items()]


def losses(run):
    return np.array([line["loss"] for line in records.read_lines(run / "metrics.jsonl") if "loss" in line])


@pytest.fixture(scope="module")
def preempted(cache, tmp_path_factory):
    """Two processes of two devices, of which process 1 was told to stop."""
    folder = tmp_path_factory.mktemp("preempted")
    group = Several(cache, folder, 2, *words(steps=100_000, dispatch=3), devices=2)
    try:
        group.wait_for_step(folder / "toy" / "r", 30)
        group.children[1].send_signal(signal.SIGTERM)
        group.result = group.codes()
    finally:
        group.end()
    return folder, group


@pytest.fixture(scope="module")
def stop(preempted):
    """The step at which they stopped."""
    return steps_saved(preempted[0] / "toy" / "r")[-1]


@pytest.fixture(scope="module")
def alone(cache, stop, tmp_path_factory):
    """One process with one device that was never told anything."""
    folder = tmp_path_factory.mktemp("alone")
    fit(make(**OPTIONS, steps=stop + 12), folder, {})
    return folder


def copy_of(preempted, to):
    """The preempted run in another folder."""
    shutil.copytree(preempted[0] / "toy" / "r", to / "toy" / "r")
    return to / "toy" / "r"


def assert_same_losses(run, alone, stop):
    ours, one = losses(run), losses(alone)
    print("largest relative difference", np.max(np.abs(ours / one[: len(ours)] - 1)), "in", len(ours), "steps")
    # float32 sums in another order, which Adam's division makes grow slowly: 1e-7 at first.
    np.testing.assert_allclose(ours[:30], one[:30], rtol=1e-5)
    np.testing.assert_allclose(ours, one[: len(ours)], rtol=2e-3)
    assert len(ours) >= stop


def test_a_signal_to_one_process_stops_all_at_one_step(preempted, stop):
    folder, group = preempted
    assert group.result == [143, 143], group.everything()
    assert stop >= 30
    assert f"stopped by SIGTERM at step {stop} of 100000, all saved in" in group.said(0).splitlines()[-1]
    assert not any("Traceback" in group.said(i) for i in range(2))
    assert steps_saved(folder / "toy" / "r") == [stop]
    assert last_logged(folder / "toy" / "r") == stop


def test_the_batches_are_those_of_one_process_each_row_read_once(preempted, stop):
    _, group = preempted
    parts = [np.load(path) for path in group.fed]
    assert all(part["indices"].shape[1] == 8 for part in parts)
    for part in parts:
        np.testing.assert_array_equal(part["steps"], np.arange(len(part["steps"])))
    for step in range(stop):
        rows = np.concatenate([part["indices"][step] for part in parts])
        np.testing.assert_array_equal(rows, batch_indices(0, step, N, 16))


def test_the_loss_curve_is_that_of_one_process(preempted, stop, alone):
    assert_same_losses(preempted[0] / "toy" / "r", alone, stop)


def test_a_checkpoint_of_two_processes_goes_on_with_one(preempted, stop, alone, tmp_path):
    run = copy_of(preempted, tmp_path)
    fit(make(**OPTIONS, steps=stop + 12), run, {})
    assert len(losses(run)) == stop + 12
    assert_same_losses(run, alone, stop)


def test_a_checkpoint_of_two_processes_goes_on_with_four_on_another_mesh(several, preempted, stop, alone, tmp_path):
    """Started as SLURM would; parameters split; the end draws its pictures with all of them."""
    run = copy_of(preempted, tmp_path)
    group = several(tmp_path, 4, *words(steps=stop + 12), "split=True", by="slurm")
    assert group.codes() == [0] * 4, group.everything()
    assert f"going on from step {stop}" in group.said(0)
    assert not any("going on" in group.said(i) or "it/s" in group.said(i) for i in (1, 2, 3)), "process 0 alone talks"
    assert len(losses(run)) == stop + 12
    assert_same_losses(run, alone, stop)
    for i, path in enumerate(group.fed):
        expected = batch_indices(0, stop, N, 16)[4 * i : 4 * i + 4]
        np.testing.assert_array_equal(np.load(path)["indices"][0], expected)
    ours, one = (np.asarray(Image.open(folder / "samples.png"), int) for folder in (run, alone))
    assert one.std() > 10
    assert np.max(np.abs(ours - one)) <= 2
    assert (run / "denoising.gif").is_file()


def test_two_processes_draw_the_pictures_of_one(several, preempted, tmp_path):
    run = copy_of(preempted, tmp_path)
    record = json.loads((run / "experiment.json").read_text())
    assert record["arguments"]["width"] == 32
    group = several(
        tmp_path, 2, "n=37", "format=npz", f"out={tmp_path}/two", command="sample", by="ompi", devices=2
    )  # fmt: skip
    assert group.codes() == [0, 0], group.everything()
    draw_to_folder(
        make(**OPTIONS), run,
        {"n": 37, "seed": 0, "sampler": "default", "steps": None, "guidance": None, "label": None, "format": "npz",
         "checkpoint": "newest", "out": f"{tmp_path}/one", "devices": None, "ema": None},
    )  # fmt: skip
    two, one = (np.load(tmp_path / name / "images.npz")["images"] for name in ("two", "one"))
    assert one.shape == (37, 8, 8, 1)
    assert one.std() > 10
    np.testing.assert_array_equal(two, one)


def test_what_one_of_them_cannot_read_none_takes_and_a_death_ends_all(several, tmp_path):
    """kill -9 of one of two, then of one of four, which first go back to a checkpoint that is whole."""
    run = tmp_path / "toy" / "r"
    group = several(tmp_path, 2, *words(steps=1_000_000, checkpoint_every=20))
    group.wait_for_step(run, 70)
    assert killed(group, 1) < 30
    newest = steps_saved(run)[-1]
    for path in (run / "checkpoints" / str(newest) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 5000:
            path.write_bytes(path.read_bytes()[:100])
    older = steps_saved(run)[-2]
    group = several(tmp_path, 4, *words(steps=1_000_000, checkpoint_every=20))
    group.wait_for_word("going on from step")
    group.wait_for_step(run, older + 25)
    said = group.said(0)
    assert f"checkpoint {newest} in {run}/checkpoints cannot be read" in said, group.everything()
    assert f"going on from step {older} " in said
    assert any(path.name.startswith(f"unreadable-{newest}") for path in (run / "checkpoints").iterdir())
    assert killed(group, 2) < 30


def killed(group, victim):
    """Seconds from kill -9 of one process to the end of the last; all others must name it."""
    began = time.monotonic()
    group.children[victim].kill()
    codes = group.codes(200)
    seconds = time.monotonic() - began
    print(f"process {victim} of {len(codes)} killed, all gone after {seconds:.1f} s, codes {codes}")
    for i, code in enumerate(codes):
        if i != victim:
            assert code != 0
            assert re.search(rf"error: process {victim} \(.*\) died: this run cannot go on", group.said(i)), group.said(
                i
            )
            assert code == 1 or victim == 0, group.said(i)
    return seconds


def test_the_death_of_process_0_ends_all(several, tmp_path):
    group = several(tmp_path, 2, *words(steps=1_000_000))
    group.wait_for_step(tmp_path / "toy" / "r", 20)
    assert killed(group, 0) < 30


def test_a_silent_process_counts_as_dead(several, tmp_path):
    """Stopped, it is to the others as if its machine were lost: no connection breaks."""
    group = several(tmp_path, 2, *words(steps=1_000_000), SILENCE="6")
    group.wait_for_step(tmp_path / "toy" / "r", 20)
    began = time.monotonic()
    group.children[1].send_signal(signal.SIGSTOP)
    assert group.children[0].wait(200) == 1, group.said(0)
    print(f"gone after {time.monotonic() - began:.1f} s at a limit of 6 s")
    assert re.search(r"error: process 1 \(.*\) has not been heard of for 6 s", group.said(0)), group.said(0)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda i: [f"width={32 + 2 * i}"], r"width is 32 on process 0 \(.*\) and 34 on process 1 \(.*\)"),
        (lambda i: ["nothing=1"] if i else [], r"toy.py has no argument 'nothing'"),
        (lambda i: ["batch=15"], r"batch of 15 cannot be split evenly over 2 devices"),
    ],
    ids=["arguments", "refused by one", "refused by all"],
)
def test_what_does_not_fit_is_refused_everywhere_before_compilation(several, tmp_path, own, message):
    group = several(tmp_path, 2, own=own)
    assert group.codes(200) == [2, 2], group.everything()
    for i in range(2):
        lines = [line for line in group.said(i).splitlines() if "error: " in line]
        assert len(lines) == 1, group.said(i)
        assert re.search(message, lines[0]), lines[0]
        assert "Traceback" not in group.said(i)
        assert "compiling" not in group.said(i)


def test_other_code_is_refused(several, tmp_path):
    """Process 1 runs a copy of the package in which one file has one more line."""
    shutil.copytree(ROOT / "diffusion_jax", tmp_path / "other" / "diffusion_jax")
    with (tmp_path / "other" / "diffusion_jax" / "ops.py").open("a") as file:
        file.write("\n# another version\n")
    path = os.pathsep.join([str(tmp_path / "other"), str(ROOT / "tests")])
    port = free_port()
    children = []
    for i, code in enumerate((str(ROOT), str(tmp_path / "other"))):
        arguments, _ = described("words", port, 2, i)
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path if i else f"{code}{os.pathsep}{ROOT / 'tests'}"}
        command = [sys.executable, "-m", "diffusion_jax", "train", str(TOY), f"runs={tmp_path}", "run=r", *arguments]
        cwd = Path(code) if i else ROOT
        children.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd)
        )
    for child in children:
        _, said = child.communicate(timeout=200)
        assert child.returncode == 2, said
        assert "not started alike: " in said
        assert re.search(r'the code of diffusion_jax is "\w+" on process 0 .* and "\w+" on process 1', said), said
