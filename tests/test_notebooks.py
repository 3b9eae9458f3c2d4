"""The notebooks run as they are written, with a model that is tiny and random in place of the one they name."""

import json
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_models

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(notebook, **parameters):
    """The names that a notebook's cells leave behind; `parameters` replace those of its cell of that tag."""
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
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
    assert [path.stem for path in NOTEBOOKS.glob("*.ipynb")] == ["stable_diffusion"]


@pytest.mark.slow
def test_from_prompt_to_picture(quick, tmp_path):
    model = tiny_models.write_model(tmp_path / "sd15")
    names = run(NOTEBOOKS / "stable_diffusion.ipynb", MODEL=str(model), SIZE=(16, 24), STEPS=3)
    drawn = {name: np.asarray(names[name]) for name in ("pictures", "changed", "repainted")}
    assert {pictures.shape for pictures in drawn.values()} == {(2, 16, 24, 3)}
    assert all(pictures.std() > 0.05 and np.abs(pictures).max() <= 1 for pictures in drawn.values())
    # The way by hand ends where the function ends; there is more of the picture in what was begun with it.
    assert len(names["frames"]) == 4
    np.testing.assert_allclose(names["frames"][-1], drawn["pictures"][0], atol=1e-4)
    kept = np.asarray(names["mask"][0]) == 0
    apart = [np.abs(drawn["repainted"] - drawn["pictures"][0])[:, where[..., 0]].mean() for where in (kept, ~kept)]
    assert apart[0] < apart[1]
