"""Traces, and the page that make profile prints of one."""

import gzip
import json
import re

import pytest
import toy

from diffusion_jax.planning.profile import profile
from diffusion_jax.planning.trace import newest_trace, op_times, read_trace
from diffusion_jax.training import records
from diffusion_jax.training.records import Meter
from diffusion_jax.typing import InputError


def line(pid, tid, process, thread):
    return [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}},
        {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": thread}},
    ]


def ran(pid, tid, op, start, length, module="jit_f", **more):
    args = {"hlo_op": op, "hlo_module": module, **more}
    return {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": length, "name": op, "args": args}


def test_overlaps_gaps_and_enclosing_operations():
    events = [
        *line(1, 1, "/host:CPU", "tf_XLA"),
        ran(1, 1, "while.1", 0, 100),
        ran(1, 1, "dot.1", 0, 10),
        ran(1, 2, "dot.1", 5, 10),  # beside the other one
        ran(1, 1, "add.1", 25, 5),
        ran(1, 1, "add.1", 40, 5, module="jit_g"),
        {"ph": "X", "pid": 1, "tid": 1, "ts": 0, "dur": 50, "name": "python"},
    ]
    times = op_times(events, "jit_f", ["while.1"])
    assert times.ops == {"dot.1": (pytest.approx(20e-6), 2), "add.1": (pytest.approx(5e-6), 1)}
    assert times.busy == pytest.approx(20e-6)
    assert times.span == pytest.approx(30e-6)


@pytest.mark.parametrize("view", ["XLA Ops", "Stream #7(compute)"])
def test_one_view_of_one_device(view):
    events = [
        *line(1, 1, "/device:XPU:0", view),
        *line(1, 2, "/device:XPU:0", "Framework Ops"),
        *line(2, 1, "/device:XPU:1", view),
        ran(1, 1, "dot", 0, 10),
        ran(1, 2, "dot", 0, 10),
        ran(2, 1, "dot", 0, 10),
    ]
    assert op_times(events, "jit_f").ops == {"dot": (pytest.approx(10e-6), 1)}


def test_simulated_devices_are_told_apart():
    events = [ran(1, 1, "dot", 0, 10, device_ordinal="0"), ran(1, 2, "dot", 0, 30, device_ordinal="1")]
    assert op_times(events, "jit_f").ops == {"dot": (pytest.approx(10e-6), 1)}


def test_nothing_ran():
    assert op_times([], "jit_f").span == 0


def test_the_newest_trace_is_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        newest_trace(tmp_path)
    path = tmp_path / "a" / "x.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"ph": "M"}]}).encode()))
    assert read_trace(newest_trace(tmp_path)) == [{"ph": "M"}]


@pytest.mark.slow
def test_the_page_of_a_real_run(tmp_path):
    page = profile(toy.experiment(batch=16, width=64), tmp_path, made_up=True, steps=2, peak="1e11")
    head, kinds, top, path = page.split("\n\n")
    assert "utilisation (MFU)" in head
    assert newest_trace(tmp_path).samefile(path)
    shares = [float(share) for share in re.findall(r"([\d.]+) %", kinds)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "matrix product" in kinds
    assert len(top.splitlines()) <= 21


def test_devices_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="devices=99"):
        profile(toy.experiment(), tmp_path, devices=99)


def test_utilisation_is_written_where_it_is_known(tmp_path):
    for share in (None, 1e-3):
        path = tmp_path / f"{share}.jsonl"
        meter = Meter(losses=(1.0,), norms=(1.0,), images=100, since=0.0, share=share)
        fresh = records.write_meter(path, 1, meter)
        (written,) = records.read_lines(path)
        assert fresh.share == share
        assert ("mfu" in written) == (share is not None) == ("MFU" in meter.shown)
        if share:
            assert written["mfu"] == pytest.approx(written["images_per_second"] * share, abs=1e-4)
