"""The loop's host memory stays flat over 10,000 steps, for data on the device and for data read by Grain."""

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
loop.fit(make(steps=10_000, log_every=100, checkpoint_every=1000, grain=sys.argv[2] == "grain"), Path(sys.argv[1]), {})
print(json.dumps(seen))
"""


@pytest.mark.parametrize("feed", ["resident", "grain"])
def test_memory_is_flat(cache, tmp_path, feed):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run", feed],
        env=environment(cache) | {"PYTHONPATH": f"{environment(cache)['PYTHONPATH']}:{ROOT / 'tests' / 'long'}"},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    # The largest of ten readings: what is freed between two of them is no leak.
    early = max(size for step, size in seen if 2000 <= step < 3000)
    late = max(size for step, size in seen if 9000 <= step <= 10_000)
    print(f"{feed}: {early / 2**20:.1f} MiB after 2,000 steps, {late / 2**20:.1f} MiB after 10,000")
    # 7,000 steps lie between: one batch of 16 pictures kept a step would be 8 MiB, its metrics and keys as Python objects
    # as much. 6 MiB allow for the allocator's fragments and not for that.
    assert late - early < 6 * 2**20
