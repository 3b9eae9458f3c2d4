"""The notebooks run as they are written, with a model that is tiny and random in place of the one they name."""

import re
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_models

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CELL = re.compile(r"^```python(?P<tags>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)


def run(notebook, **parameters):
    """The names that a notebook's cells leave behind; `parameters` replace those of its cell of that tag."""
    names: dict = {"__name__": "__main__"}
    for cell in CELL.finditer(notebook.read_text()):
        line = notebook.read_text()[: cell.start("code")].count("\n")
        exec(compile("\n" * line + cell["code"], str(notebook), "exec"), names)
        if "parameters" in cell["tags"]:
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return names


@pytest.fixture
def quick(monkeypatch):
    """A user's rules of promotion, programs that are not optimized, and figures that are not shown."""
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_every_notebook_is_run_here():
    assert [path.stem for path in NOTEBOOKS.glob("*.md")] == ["stable_diffusion"]


@pytest.mark.slow
def test_from_prompt_to_picture(quick, tmp_path):
    model = tiny_models.write_model(tmp_path / "sd15")
    names = run(NOTEBOOKS / "stable_diffusion.md", MODEL=str(model), SIZE=(16, 24), STEPS=3)
    drawn = {name: np.asarray(names[name]) for name in ("pictures", "changed", "repainted")}
    assert {pictures.shape for pictures in drawn.values()} == {(2, 16, 24, 3)}
    assert all(pictures.std() > 0.05 and np.abs(pictures).max() <= 1 for pictures in drawn.values())
    # The way by hand ends where the function ends; there is more of the picture in what was begun with it.
    assert len(names["frames"]) == 4
    np.testing.assert_allclose(names["frames"][-1], drawn["pictures"][0], atol=1e-4)
    kept = np.asarray(names["mask"][0]) == 0
    apart = [np.abs(drawn["repainted"] - drawn["pictures"][0])[:, where[..., 0]].mean() for where in (kept, ~kept)]
    assert apart[0] < apart[1]
