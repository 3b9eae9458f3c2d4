"""Folders in diffusers' layout: in and out bit for bit, every form that weights have in them, and names on the Hub."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import sd_shapes
from sd_shapes import same_bits

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, ldm_configs, model_folder, single_file
from diffusion_jax.weights.model_folder import Folder, load, save


def model(family="sd1", dtype=np.float32) -> Folder:
    hub = sd_shapes.model(family, dtype)
    return Folder({}, ldm_configs.configs(family, hub), hub, {})


def refused(match, path, **arguments):
    with pytest.raises(InputError, match=match) as error:
        load(path, **arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Written once; tests that change it copy it."""
    tokenizer = tmp_path_factory.mktemp("words") / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text("{}")
    return save(tmp_path_factory.mktemp("model") / "sd", model()._replace(tokenizers={"tokenizer": tokenizer}))


@pytest.fixture
def copied(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "sd")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl_refiner", "controlnet", "vae"])
def test_there_and_back_bit_for_bit(tmp_path, family, dtype):
    written = model(family, dtype)
    found = load(save(tmp_path / "m", written))
    assert found.configs == json.loads(json.dumps(written.configs))
    assert found.hub.keys() == written.hub.keys()
    for component, weights in written.hub.items():
        same_bits(found.hub[component], weights)
    again = load(save(tmp_path / "again", found))
    assert (again.index, again.configs) == (found.index, found.configs)


def test_the_layout_is_diffusers(folder):
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert load(folder).tokenizers == {"tokenizer": folder / "tokenizer"}


def test_a_component_alone(tmp_path, folder):
    path = save(tmp_path / "control", model("controlnet"))
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    same_bits(load(folder / "vae").hub["vae"], load(folder).hub["vae"])
    assert load(folder / "text_encoder").hub.keys() == {"text_encoder"}
    assert load(folder, components=("vae",)).hub.keys() == {"vae"}


def test_towers_without_the_name_of_their_model(copied):
    path = copied / "text_encoder" / "model.safetensors"
    state = files.load(path)
    files.save(path, {name.removeprefix("text_model."): value for name, value in state.items()})
    same_bits(load(copied).hub["text_encoder"], state)
    same_bits(load(copied / "text_encoder").hub["text_encoder"], state)


def test_a_single_file_becomes_a_folder_and_back(tmp_path):
    hub = sd_shapes.model("sdxl")
    state = single_file.write(single_file.of("sdxl", hub))
    found = single_file.read(state)
    configs = ldm_configs.configs(found.family, found.hub, found.extras)
    back = load(save(tmp_path / "xl", Folder({}, configs, found.hub, {})))
    assert back.index["_class_name"] == "StableDiffusionXLPipeline"
    same_bits(single_file.write(single_file.of("sdxl", back.hub)), state)


# Forms of weights -----------------------------------------------------------------------------------------------------


def test_parts_and_variants(tmp_path):
    half, full = model(dtype=np.float16), model()
    path = save(tmp_path / "m", half, variant="fp16", part_bytes=10_000)
    assert (path / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert any(p.name.startswith("diffusion_pytorch_model.fp16-00001-of-") for p in (path / "unet").iterdir())
    same_bits(load(path).hub["unet"], half.hub["unet"])  # the only variant
    save(path, full)
    same_bits(load(path).hub["unet"], full.hub["unet"])  # no variant comes first
    same_bits(load(path, variant="fp16").hub["unet"], half.hub["unet"])
    refused("no weights of the variant 'bf16'", path, variant="bf16")


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], None, ["model.fp16.safetensors"]),
        (["model.bf16.safetensors", "model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "bf16", ["model.bf16.safetensors"]),
        (["model.non_ema.safetensors"], None, ["model.non_ema.safetensors"]),
        (["pytorch_model.bin", "config.json"], None, ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", ["pytorch_model.fp16.bin"]),
        (
            ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "model.safetensors"], None,
            ["model.safetensors"],
        ),
        (
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json", "flax_model.msgpack"], None,
            ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
        ),
        (["model.safetensors"], "fp16", []),
        (["other.safetensors"], None, []),
    ],
)  # fmt: skip
def test_which_files_are_taken(names, variant, chosen):
    assert model_folder.choose(names, variant) == chosen


def test_types_are_cast_only_when_asked(folder):
    found = load(folder, dtype=np.float16).hub["unet"]
    assert {v.dtype for v in found.values()} == {np.dtype(np.float16)}
    state = {"ids": np.arange(3), "w": np.ones(2, ml_dtypes.bfloat16)}
    assert [v.dtype for v in model_folder.cast(state, np.float32).values()] == [np.int64, np.float32]


def test_torchs_own_files_are_read_where_there_are_no_others(copied):
    from test_torch_files import file_of

    state = {"a.weight": np.arange(6, dtype=np.float16).reshape(2, 3)}
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copied / "vae" / "diffusion_pytorch_model.bin").write_bytes(file_of("archive", state))
    same_bits(load(copied).hub["vae"], state)


# Errors ---------------------------------------------------------------------------------------------------------------


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_other_models_are_named(copied):
    index, nothing = copied / "model_index.json", [None, None]
    change(index, _class_name="FluxPipeline", unet=nothing, transformer=["diffusers", "FluxTransformer2DModel"])
    refused("holds a FluxPipeline, which is not of Stable Diffusion's kind", copied)
    change(index, _class_name="IFPipeline", unet=["diffusers", "UNet2DConditionModel"],
           text_encoder=["transformers", "T5EncoderModel"])  # fmt: skip
    refused("holds a IFPipeline, whose text_encoder is a T5EncoderModel instead of a CLIPTextModel", copied)
    change(index, text_encoder=nothing, unet=["diffusers", "UNetSpatioTemporal\nConditionModel"])
    refused("UNetSpatioTemporal ConditionModel instead of a UNet2DConditionModel", copied)
    change(copied / "vae" / "config.json", _class_name="VQModel")
    refused("holds a VQModel; AutoencoderKL, ", copied / "vae")


def test_missing_and_damaged_files_are_named(copied):
    change(copied / "unet" / "config.json", _class_name="ControlNetModel")
    refused("is of a ControlNetModel instead of a UNet2DConditionModel", copied)
    for content in ("{", "[]", "[" * 100_000, "\xff"):
        (copied / "unet" / "config.json").write_text(content, encoding="latin-1")
        refused("config.json is damaged", copied)
    (copied / "unet" / "config.json").unlink()
    refused("config.json is missing", copied)
    for file in (copied / "vae").iterdir():
        file.unlink()
    refused("vae holds no weights", copied, components=("vae",))
    refused("holds no model: model_index.json or config.json is missing", copied / "vae")
    (copied / "vae").rmdir()
    refused("vae is missing", copied, components=("vae",))
    refused("is a file, not a folder", copied / "model_index.json")
    refused("there is no model at .*: give the path", copied / "gone")


def test_parts_without_an_index_are_told(copied):
    unet = copied / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    for part in ("00001", "00002"):
        files.save(unet / f"diffusion_pytorch_model-{part}-of-00002.safetensors", {part: np.ones(1)})
    refused("holds parts of weights", copied)


def test_weights_without_a_configuration_are_not_written(tmp_path):
    with pytest.raises(InputError, match="unet has no configuration"):
        save(tmp_path, Folder({}, {}, sd_shapes.model("sd1"), {}))


# The Hub --------------------------------------------------------------------------------------------------------------

REPOSITORY = [
    "README.md", "model_index.json", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "feature_extractor/config.json",
    "safety_checker/config.json", "safety_checker/model.safetensors", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin",
]  # fmt: skip


def test_only_what_is_needed_is_fetched():
    wanted = set(model_folder.wanted(REPOSITORY))
    assert wanted == {
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert "text_encoder/model.fp16.safetensors" in model_folder.wanted(
        [name for name in REPOSITORY if not name.startswith("vae")], "fp16"
    )
    assert model_folder.wanted(["config.json", "diffusion_pytorch_model.safetensors", "x.bin"]) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    with pytest.raises(InputError, match="pickles are not fetched"):
        model_folder.wanted(["model_index.json", "vae/diffusion_pytorch_model.bin"])
    assert "vae/config.json" not in model_folder.wanted(REPOSITORY, components=("unet",))


class Hub(SimpleNamespace):
    """A huggingface_hub that keeps one model, with a network or without."""

    def __init__(self, folder, online):
        self.folder, self.online, self.asked = folder, online, []

    def HfApi(self):
        return self

    def model_info(self, name, *, timeout):
        if not self.online:
            raise OSError("no\nnetwork")
        found = (str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in found])

    def snapshot_download(self, name, *, allow_patterns, local_files_only):
        self.asked.append((name, allow_patterns, local_files_only))
        if self.folder is None:
            raise RuntimeError("nothing kept")
        return str(self.folder)


def test_names_on_the_hub(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for online in (True, False):
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(folder, online))
        assert load("somebody/some-model.v1").hub.keys() == {"unet", "vae", "text_encoder"}
        ((name, patterns, local),) = hub.asked
        assert (name, local, patterns is None) == ("somebody/some-model.v1", not online, not online)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(None, False))
    refused("there is no folder a/b, and the model of that name cannot be had: no network", "a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(r"pip install 'diffusion-jax\[hub\]' is needed", "a/b")
    refused("there is no model at a/b/c", "a/b/c")
    (tmp_path / "a" / "b").mkdir(parents=True)  # a path comes first
    refused("a/b holds no model", "a/b")
