"""The loop's host memory stays flat over 10,000 steps: data on the device, data read by Grain, many checkpoints."""

import json
import subprocess
import sys

import pytest
from commands import ROOT, environment

SCRIPT = """
import json, os, sys
from pathlib import Path
from commands import make
from diffusion_jax.training import loop, records

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

seen, write = [], records.write_meter
def watched(path, step, meter):
    seen.append((step, resident_bytes()))
    return write(path, step, meter)
records.write_meter = watched
loop.fit(make(steps=10_000, log_every=100, **json.loads(sys.argv[2])), Path(sys.argv[1]), {})
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        # A batch of 16 pictures kept at each of the 7,000 steps between would be 8 MiB, any Python object 0.4 MiB.
        ({"checkpoint_every": 0}, 2),
        ({"checkpoint_every": 0, "grain": True}, 2),
        # 14 states of 6 MiB are saved between, 84 MiB if they were kept; buffers for one and Orbax's records may be.
        ({"checkpoint_every": 500, "width": 256}, 30),
    ],
    ids=["resident", "grain", "saves"],
)
def test_memory_is_flat(cache, tmp_path, options, bound):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run", json.dumps(options)],
        env=environment(cache) | {"PYTHONPATH": f"{environment(cache)['PYTHONPATH']}:{ROOT / 'tests' / 'long'}"},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    # The largest of ten readings: what is freed between two of them is no leak.
    early = max(size for step, size in seen if 2000 <= step < 3000)
    late = max(size for step, size in seen if 9000 <= step <= 10_000)
    print(f"{options}: {early / 2**20:.1f} MiB after 2,000 steps, {late / 2**20:.1f} MiB after 10,000")
    assert late - early < bound * 2**20
