"""Low-rank updates: they begin as nothing, they alone move, and the file that is written says what they do."""

import functools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from anywhere import params_like
from PIL import Image

from diffusion_jax.__main__ import main
from diffusion_jax.experiment import find_experiment
from diffusion_jax.generating.loading import load_model, read_files
from diffusion_jax.systems.tuning import (
    ATTENTION,
    EVERYTHING,
    as_lora,
    factors,
    halved,
    low_rank,
    merged,
    trained_alone,
)
from diffusion_jax.typing import InputError, Net
from diffusion_jax.weights import lora as lora_files
from diffusion_jax.weights import model_folder, text_unet, trees

ROOT = Path(__file__).parent.parent
KEY = jax.random.key(0)
UNET = tiny_models.network("unet", tiny_models.UNET)
PARAMS = params_like(UNET.init)
X = jax.random.normal(jax.random.key(1), (2, 6, 8, 4))
T = jnp.array([5.0, 800.0])
COND = {"tokens": jax.random.normal(jax.random.key(2), (2, 7, 16))}
fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def begun(rank, targets):
    return jax.jit(factors, static_argnums=(2, 3))(KEY, PARAMS, rank, targets)


def moved(lora, seed=3):
    """Factors after some training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype("f4"), lora)


@pytest.fixture(scope="module")
def plain():
    return fast(UNET.apply)


@pytest.mark.slow
def test_it_begins_as_the_network(plain):
    net = low_rank(UNET, rank=2, targets=EVERYTHING)
    lora = begun(2, EVERYTHING)
    found = plain(merged(PARAMS, lora, 1.0), X, T, COND)
    np.testing.assert_array_equal(found, plain(PARAMS, X, T, COND))
    shapes = jax.eval_shape(net.init, KEY)
    assert jax.tree.map(jnp.shape, shapes["lora"]) == jax.tree.map(jnp.shape, lora)
    assert all(np.any(part["down"]) and not np.any(part["up"]) for part in lora.values())


@pytest.mark.slow
def test_targets_are_the_kernels_of_attention_or_of_all_blocks():
    kernels = {".".join(path) for path, leaf in trees.leaves(PARAMS) if path[-1] == "kernel"}
    few, many = (set(begun(2, targets)) for targets in (ATTENTION, EVERYTHING))
    assert few < many < kernels
    assert few == {name for name in kernels if any(f".{part}." in name for part in ("attn1", "attn2"))}
    outside = ("conv_in", "conv_out", "time_embedding", "samplers", "conv_shortcut")
    assert kernels - many == {name for name in kernels if any(part in name for part in outside)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merged_kernels_by_the_equation(dtype):
    lora = moved(begun(2, EVERYTHING))
    frozen = halved(PARAMS, dtype)
    new = dict(trees.leaves(merged(frozen, lora, 1.5)))
    for path, kernel in trees.leaves(frozen):
        name = ".".join(path)
        if name not in lora:
            assert new[path] is kernel
            continue
        wanted = np.asarray(kernel, np.float64) + 1.5 * np.einsum(
            "...ir,ro->...io", *(np.asarray(lora[name][part], np.float64) for part in ("down", "up"))
        )
        assert new[path].dtype == dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(np.asarray(new[path], np.float64), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_step_moves_the_factors_alone(plain):
    """Through the network itself; no gradient reaches what is frozen, and no decay of weights either."""
    net = low_rank(UNET, rank=2, alpha=3.0)
    params = {"frozen": PARAMS, "lora": moved(begun(2, ATTENTION))}
    optimizer = optax.partition({"lora": optax.adamw(1e-2), "frozen": optax.set_to_zero()}, trained_alone)

    @fast
    def step(params):
        value, grads = jax.value_and_grad(lambda p: jnp.mean(net.apply(p, X, T, COND) ** 2))(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return value, grads, optax.apply_updates(params, updates)

    with jax.numpy_dtype_promotion("standard"):
        value, grads, after = step(params)
    wanted = jnp.mean(plain(merged(PARAMS, params["lora"], 1.5), X, T, COND) ** 2)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["frozen"]))
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], PARAMS)
    apart = jax.tree.map(lambda a, b: float(np.min(np.abs(a - b))), after["lora"], params["lora"])
    assert min(jax.tree.leaves(apart)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING])
def test_the_file_says_what_was_trained(plain, tmp_path, naming, targets):
    """Merged into the model by what merges any LoRA, it is the network that was trained."""
    lora = moved(begun(2, targets))
    path = lora_files.save(tmp_path / "lora.safetensors", as_lora(lora, 3.0), naming)
    hub = {"unet": text_unet.to_diffusers(PARAMS)}
    found = lora_files.merge(hub, [(lora_files.load(path, hub), 1.0)])
    there = text_unet.from_diffusers(found["unet"], PARAMS)
    here = plain(merged(PARAMS, lora, 1.5), X, T, COND)
    np.testing.assert_allclose(plain(there, X, T, COND), here, atol=1e-5 * float(np.max(np.abs(here))))
    assert np.max(np.abs(here - plain(PARAMS, X, T, COND))) > 0.1


def test_kernels_alone_are_halved():
    tree = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    assert halved(tree, None) is tree
    assert {name: leaf.dtype for name, leaf in halved(tree, jnp.bfloat16).items()} == {
        "kernel": jnp.bfloat16, "bias": jnp.float32,
    }  # fmt: skip
    net = low_rank(
        Net(lambda key: {"a": {"kernel": jnp.ones((2, 2))}}, lambda *_: None), targets="a", dtype=jnp.bfloat16
    )
    shapes = jax.eval_shape(net.init, KEY)
    assert shapes["frozen"]["a"]["kernel"].dtype == jnp.bfloat16
    assert shapes["lora"]["a.kernel"]["down"].dtype == jnp.float32


def test_what_it_refuses():
    with pytest.raises(InputError, match="rank=0"):
        low_rank(UNET, rank=0)
    with pytest.raises(InputError, match="matches no kernel"):
        jax.eval_shape(low_rank(UNET, targets="nowhere").init, KEY)


# The experiment -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and three pictures, two of them with captions."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny_models.write_model(folder / "model")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 18 + i, 3), np.uint8)).save(folder / "pictures" / f"{i}.png")
        if i:
            (folder / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    return folder


def train(place, runs, *words):
    """The command, as a user gives it."""
    small = ["size=16", "steps=4", "batch=2", "precision=float32", "remat=none", "log_every=1", "checkpoint_every=2"]
    given = dict(word.split("=", 1) for word in [*small, *words])
    words = [f"{name}={value}" for name, value in given.items()]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return main(["train", "stable_diffusion", f"model={place / 'model'}", f"path={place / 'pictures'}",
                     f"runs={runs}", "run=r", *words])  # fmt: skip


@pytest.mark.slow
def test_a_lora_from_pictures_goes_on_after_a_stop_and_is_a_file(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    run = tmp_path / "stable_diffusion" / "r"
    words = ["caption=a sks thing", "rank=2", "learning_rate=0.01"]
    assert train(place, tmp_path, *words, "steps=2") == 0
    first = lora_files.files.load(run / "lora.safetensors")
    assert train(place, tmp_path, *words) == 0
    assert "going on from step 2" in capfd.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    files = read_files(str(place / "model"))
    lora = lora_files.load(run / "lora.safetensors", files.hub)
    assert {update.down.shape[0] for update in lora["unet"].values()} == {2}
    assert all(np.any(update.up) for update in lora["unet"].values())
    later = lora_files.files.load(run / "lora.safetensors")
    assert any(np.any(later[name] != first[name]) for name in first)


@pytest.mark.slow
def test_a_whole_network_beside_its_kind(place, tmp_path, monkeypatch):
    """What comes out takes the place of the model's own."""
    monkeypatch.chdir(ROOT)
    words = ["method=full", "caption=a sks thing", f"kind={place / 'pictures'}", "kind_caption=a thing", "steps=2"]
    assert train(place, tmp_path, *words) == 0
    found = model_folder.load(tmp_path / "stable_diffusion" / "r" / "unet")
    files = read_files(str(place / "model"))
    assert found.hub["unet"].keys() == files.hub["unet"].keys()
    assert any(np.any(value != files.hub["unet"][name]) for name, value in found.hub["unet"].items())
    whole = files._replace(hub={**files.hub, **found.hub}, configs={**files.configs, **found.configs})
    load_model(
        whole, jnp.float32, {"vae": "", "controlnet": "", "lora": (), "embedding": (), "tokenizer": "", "tile": 0}
    )


@pytest.mark.slow
def test_what_the_experiment_refuses(place, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = find_experiment("stable_diffusion")
    model, path = str(place / "model"), str(place / "pictures")
    for given, message in (
        ({}, "model= and path= are needed"),
        ({"model": model, "path": path, "kind": path}, "belong together"),
        ({"model": model, "path": path, "size": 15}, "a multiple of 2 is needed"),
        ({"model": str(tmp_path), "path": path}, "holds no model"),
    ):
        with pytest.raises(InputError, match=message):
            experiment(**given)
    (tmp_path / "empty").mkdir()
    for given, message in (
        ({"path": path, "latents": str(tmp_path / "l")}, "0.png has no caption: give caption="),
        ({"path": str(tmp_path / "empty"), "caption": "x"}, "no pictures in"),
    ):
        with pytest.raises(InputError, match=message):
            experiment(model=model, size=16, **given).data()


@pytest.mark.slow
def test_models_that_are_not_tuned_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for kind in ("sdxl", "inpainting"):
        model = tiny_models.write_model(tmp_path / kind, kind)
        with pytest.raises(InputError, match="only models that draw from a text with one text encoder"):
            find_experiment("stable_diffusion")(model=str(model), path=str(tmp_path))
