"""Ctrl-C and SIGTERM save and leave; the same command goes on; the end is that of a run that was left alone."""

import signal
import time

import pytest
from commands import assert_same_state, begin, last_logged, make, steps_saved

from diffusion_jax.training.loop import fit

# 100 examples in batches of 16: an epoch is 6.25 steps, so that every stop is inside or at the edge of an epoch.
OPTIONS = {"rows": 100, "dropout": 0.2, "batch": 16, "log_every": 7, "checkpoint_every": 400}


@pytest.mark.parametrize(
    ("number", "feed"), [(signal.SIGINT, "resident"), (signal.SIGTERM, "grain")], ids=["resident", "grain"]
)
def test_interrupted_twice_equals_uninterrupted(number, feed, cache, tmp_path):
    options = {**OPTIONS, "grain": feed == "grain", "dispatch": 3 if feed == "resident" else 1, "steps": 3000}
    words = [f"{name}={value}" for name, value in options.items()]
    run, log = tmp_path / "toy" / "r", tmp_path / "log"
    stops = []
    for _ in range(2):
        child = begin(cache, tmp_path, *words, log=log)
        before = last_logged(run)
        while last_logged(run) <= before + 30:
            assert child.poll() is None, log.read_text()
            time.sleep(0.01)
        child.send_signal(number)
        assert child.wait(60) == 128 + number, log.read_text()
        said = log.read_text()
        stop = steps_saved(run)[-1]
        assert f"stopped by {signal.Signals(number).name} at step {stop} of 3000" in said.splitlines()[-1]
        assert "give the same command again" in said.splitlines()[-1]
        assert "Traceback" not in said
        stops.append(stop)
    assert 0 < stops[0] < stops[1] < 3000
    assert any(stop % 400 for stop in stops)
    assert begin(cache, tmp_path, *words, log=log).wait(120) == 0, log.read_text()
    assert f"going on from step {stops[1]}" in log.read_text()
    reference = tmp_path / "reference"
    fit(make(**options), reference, {})
    assert_same_state(run, reference, make(**options), 3000)


def test_a_signal_during_compilation(tmp_path):
    """It waits for the compiler, which cannot be interrupted, and then leaves as at any other time."""
    log = tmp_path / "log"
    child = begin(tmp_path / "empty cache", tmp_path, "steps=1000000", "dispatch=7", log=log)
    while "compiling" not in log.read_text():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait(120) == 128 + signal.SIGINT, log.read_text()
    stop = steps_saved(tmp_path / "toy" / "r")
    assert len(stop) == 1
    assert stop[0] <= 7
    assert f"stopped by SIGINT at step {stop[0]} of 1000000, all saved" in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()


def test_the_loss_of_every_step_is_the_same_too(cache, tmp_path):
    """In one process, over the edge of an epoch, one step after the other: metrics and batches, not only the end."""
    from diffusion_jax.training import records

    options = {**OPTIONS, "log_every": 1, "checkpoint_every": 5}
    fit(make(**options, steps=13), tmp_path / "whole", {})
    for steps in (4, 6, 7, 13):  # stops before, at and after the edge between the first two epochs
        fit(make(**options, steps=steps), tmp_path / "parts", {})
    lines = (records.read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    whole, parts = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in run if "loss" in line] for run in lines
    )
    assert len(whole) == 13
    assert whole == parts
    assert_same_state(tmp_path / "parts", tmp_path / "whole", make(**options), 13)
