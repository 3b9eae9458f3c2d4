"""kill -9 at twenty random moments: the run goes on from a complete checkpoint and loses at most one interval."""

import random
import re
import signal
import time

from commands import assert_same_state, begin, last_logged, make, steps_saved

from diffusion_jax.training.loop import fit

EVERY, KILLS = 100, 20
OPTIONS = {"rows": 200, "dropout": 0.2, "batch": 16, "log_every": 5, "checkpoint_every": EVERY}


def wait_for(condition, child, log):
    deadline = time.monotonic() + 120
    while not condition():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


def in_flight(run):
    """The checkpoints that were being written when the run was killed: at most one."""
    return [int(p.name.split(".")[0]) for p in (run / "checkpoints").glob("[0-9]*.orbax-checkpoint-tmp")]


def test_killed_twenty_times(cache, tmp_path):
    rng = random.Random(0)
    words = [f"{name}={value}" for name, value in OPTIONS.items()] + ["steps=1000000"]
    run, log = tmp_path / "toy" / "r", tmp_path / "log"
    during_saves, most_lost = 0, 0
    for kill in range(KILLS + 1):
        made, complete, begun = last_logged(run), steps_saved(run), in_flight(run)
        child = begin(cache, tmp_path, *words, log=log)
        if complete:
            wait_for(lambda: "going on from step" in log.read_text(), child, log)
            start = int(re.search(r"going on from step (\d+)", log.read_text())[1])
            assert "cannot be read" not in log.read_text()
            assert start == complete[-1]
            most_lost = max(most_lost, made - start)
            # An interval counts from the checkpoint that was begun: saving is asynchronous, and training goes on for
            # at most another one while it is being written.
            assert made - start <= EVERY or (begun == [start + EVERY] and made - begun[0] <= EVERY)
        if kill == KILLS:
            break
        if kill % 7 == 6:
            time.sleep(rng.uniform(0, 0.5))  # while it starts
        else:
            wait_for(lambda before=complete: steps_saved(run) != before, child, log)
            time.sleep(rng.uniform(0, 0.4))
        child.kill()
        child.wait()
        during_saves += bool(in_flight(run))
    assert during_saves >= 3, "too few kills hit a save to prove anything"
    before = steps_saved(run)
    wait_for(lambda: steps_saved(run) != before, child, log)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM
    end = steps_saved(run)[-1]
    assert end > KILLS * EVERY / 2
    options = OPTIONS | {"steps": end, "checkpoint_every": 0}
    fit(make(**options), tmp_path / "reference", {})
    assert_same_state(run, tmp_path / "reference", make(**options), end)
    print(f"{KILLS} kills, {during_saves} during a save, at most {most_lost} of {EVERY} steps lost, {end} steps in all")
