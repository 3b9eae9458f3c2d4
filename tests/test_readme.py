"""The README is true: its example runs, its commands exist, its Colab cells leave the runtime's jax alone."""

import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    text = README.split(f"# {title}\n", 1)[1]
    outside = re.sub(r"```.*?```", lambda block: block[0].replace("\n#", "\n "), text, flags=re.S)
    heading = re.search(r"^#+ ", outside, re.M)
    return text[: heading.start()] if heading else text


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_notebook_example_draws_two_moons_within_a_minute(monkeypatch):
    monkeypatch.setattr(matplotlib.rcParams, "backend", "agg", raising=False)
    matplotlib.use("agg")
    (code,) = blocks(section("In a notebook"), "python")
    names: dict = {}
    start = time.perf_counter()
    # A user's session broadcasts freely; only our own code promises not to.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), names)
    names["fig"].canvas.draw()
    seconds = time.perf_counter() - start
    data, samples = np.asarray(names["data"]), np.asarray(names["path"][-1])
    assert samples.shape == (2048, 2)
    near = NearestNeighbors(n_neighbors=1).fit(data).kneighbors(samples)[0]
    covered = NearestNeighbors(n_neighbors=1).fit(samples).kneighbors(data)[0]
    # Gaussian samples of the same mean and covariance reach about 0.3 in the first.
    assert np.mean(near < 0.1) > 0.9
    assert np.mean(covered < 0.2) > 0.95
    assert seconds < 60


def test_every_make_target_and_experiment_it_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z -]*):", makefile, re.M))
    known = {word for line in targets for word in line.split()}
    shell = "\n".join(blocks(README, "bash")) + "\n".join(re.findall(r"`(make [^`]*)`", README))
    named = set(re.findall(r"\bmake ((?:[a-z-]+ ?)+?)(?= |$|\n)", shell))
    used = {word for words in named for word in words.split()}
    assert {"train", "test", "sample"} <= used <= known
    experiments = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert set(re.findall(r"EXP=([a-z][a-z0-9_]*)\b(?!/)", README)) - {"path", "name"} <= experiments
    table = set(re.findall(r"^\| `(\w+)` \|", section("Experiments"), re.M))
    assert table == experiments


def test_the_colab_cells_do_not_touch_the_runtimes_jax(tmp_path):
    cells = "".join(blocks(section("Colab TPU"), "python"))
    pin, install = re.findall(r"^!(python3 -c .*|pip install .*)$", cells, re.M)
    assert "-c runtime.txt" in install
    assert "PY=python3" in cells
    script = pin.replace("python3", sys.executable, 1).replace("runtime.txt", str(tmp_path / "runtime.txt"))
    subprocess.run(script, shell=True, check=True)
    pins = (tmp_path / "runtime.txt").read_text().split()
    assert pins == [f"{name}=={version(name)}" for name in ("jax", "jaxlib", "numpy")]
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "-c", str(tmp_path / "runtime.txt")]
    done = subprocess.run([*words, "jax>=0.10", "jaxlib>=0.10"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot look at its index here: {done.stderr.strip().splitlines()[-1]}")
    assert "Would install" not in done.stdout
