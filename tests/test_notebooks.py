"""Every notebook runs from its first cell to its last, with a tiny model of random weights."""

import re
from pathlib import Path

import jax
import matplotlib
import pytest
from tiny_models import write_model

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("MODEL", str(write_model(tmp_path / "model")))
    monkeypatch.setenv("STEPS", "3")
    cells = re.findall(r"^```python\n(.*?)^```", notebook.read_text(), re.DOTALL | re.MULTILINE)
    assert len(cells) > 4
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in cells:
            exec(compile(cell, notebook.name, "exec"), names)
    assert names["filled"].shape == names["picture"].shape
    outside = names["mask"][0, :, :, 0] == 0
    assert bool((outside.any()) and (names["filled"] != names["picture"]).any())
