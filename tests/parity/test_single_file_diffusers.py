"""Single files: what we write is what diffusers' own converters read, and our configurations make the same networks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils as peer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))
import sd_shapes
from test_text import write_folder

from diffusion_jax.weights import files, ldm_configs, model_folder, single_file

torch.set_num_threads(1)
FAMILIES = ("sd1", "sd2", "sd_x4", "sdxl", "sdxl_refiner", "controlnet")
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "controlnet": ControlNetModel}


def tensors(state):
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def tower(config):
    kind = CLIPTextModelWithProjection if "WithProjection" in config["architectures"][0] else CLIPTextModel
    return kind(CLIPTextConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")}))


def shapes(module) -> dict[str, tuple[int, ...]]:
    """By published names: transformers 5 names a tower alone without the model it is of."""
    found = {name: tuple(value.shape) for name, value in module.state_dict().items() if "position_ids" not in name}
    bare = isinstance(module, CLIPTextModel)
    return {f"text_model.{n}" if bare and n.startswith(model_folder.BARE) else n: s for n, s in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_configurations_make_networks_of_the_same_weights(family, size):
    """And so prove that the shapes the other tests are made of are those of diffusers and transformers."""
    parts = (sd_shapes.TINY if size == "tiny" else sd_shapes.FULL)[family]
    hub = {component: sd_shapes.without_memory(s) for component, s in parts.items()}
    configs = ldm_configs.configs(family, hub)
    for component, expected in parts.items():
        with torch.device("meta"):
            kind = CLASSES.get(component)
            module = tower(configs[component]) if kind is None else kind.from_config(configs[component])
        assert shapes(module) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_we_write_are_what_diffusers_reads(family):
    hub = sd_shapes.model(family)
    state = tensors(single_file.write(single_file.of(family, hub)))
    configs = ldm_configs.configs(family, hub)
    found = {}
    if "unet" in hub:
        found["unet"] = peer.convert_ldm_unet_checkpoint(dict(state), configs["unet"])
        found["vae"] = peer.convert_ldm_vae_checkpoint(dict(state), configs["vae"])
    if "controlnet" in hub:
        found["controlnet"] = peer.convert_controlnet_checkpoint(dict(state), configs["controlnet"])
    if family in ("sd1", "sdxl"):
        found["text_encoder"] = peer.convert_ldm_clip_checkpoint(dict(state))
    for component, prefix in {
        "sd2": {"text_encoder": "cond_stage_model.model."}, "sd_x4": {"text_encoder": "cond_stage_model.model."},
        "sdxl": {"text_encoder_2": "conditioner.embedders.1.model."},
        "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    }.get(family, {}).items():  # fmt: skip
        found[component] = peer.convert_open_clip_checkpoint(tower(configs[component]), dict(state), prefix)
    assert found.keys() == hub.keys()
    for component, weights in hub.items():
        # It leaves out only the 24th layer of OpenCLIP by name: of ours it also converts the last, unused one.
        theirs = {n: v.numpy() for n, v in found[component].items() if n in weights or ".layers.2." not in n}
        assert theirs.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_array_equal(theirs[name], value, err_msg=name)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_whole_files_are_loaded_as_pipelines(tmp_path, family):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    hub = sd_shapes.model(family)
    names = ("tokenizer",) if family == "sd1" else ("tokenizer", "tokenizer_2")
    words = {name: write_folder(tmp_path / name) for name in names}
    model = model_folder.Folder({}, ldm_configs.configs(family, hub), hub, words)
    path = single_file.save(tmp_path / "m.safetensors", single_file.of(family, hub))
    settings = model_folder.save(tmp_path / "m", model._replace(hub={}, index=model_folder.index_of(model)))
    kind = StableDiffusionPipeline if family == "sd1" else StableDiffusionXLPipeline
    pipeline = kind.from_single_file(str(path), config=str(settings), local_files_only=True)
    for component, weights in hub.items():
        module = getattr(pipeline, component)
        bare = isinstance(module, CLIPTextModel)
        found = {n: v.numpy() for n, v in module.state_dict().items()}
        found = {f"text_model.{n}" if bare and n.startswith(model_folder.BARE) else n: v for n, v in found.items()}
        sd_shapes.same_bits({n: found[n] for n in weights}, weights)


def test_averages_are_those_that_diffusers_takes():
    hub = sd_shapes.model("sd1")
    state = single_file.write(single_file.of("sd1", hub))
    unet = {n: v for n, v in state.items() if n.startswith("model.diffusion_model.")}
    state |= {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v + 1 for n, v in unet.items()}
    assert sum(name.startswith("model_ema") for name in state) > 100  # fewer are not taken for averages there
    config = ldm_configs.configs("sd1", hub)["unet"]
    theirs = peer.convert_ldm_unet_checkpoint(tensors(state), config, extract_ema=True)
    ours = single_file.read(state, ema=True).hub["unet"]
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].numpy(), ours[name]) for name in ours)


@pytest.mark.parametrize("component", CLASSES)
def test_folders_that_we_write_are_loaded_by_diffusers_and_back(tmp_path, component):
    family = "controlnet" if component == "controlnet" else "sdxl"
    hub = sd_shapes.model(family)
    configs = ldm_configs.configs(family, hub)
    path = model_folder.save(
        tmp_path / "ours", model_folder.Folder({}, configs, hub, {}), variant="fp16", part_bytes=20_000
    )
    folder = path if family == "controlnet" else path / component
    module = CLASSES[component].from_pretrained(folder, variant="fp16")
    assert module.dtype == torch.float32
    assert all(np.array_equal(v.numpy(), hub[component][n]) for n, v in module.state_dict().items())
    module.save_pretrained(tmp_path / "theirs")
    back = model_folder.load(tmp_path / "theirs").hub[component]
    sd_shapes.same_bits({n: np.ascontiguousarray(v) for n, v in back.items()}, hub[component])


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_towers_that_we_write_are_loaded_by_transformers_and_back(tmp_path, component):
    hub = sd_shapes.model("sdxl")
    configs = ldm_configs.configs("sdxl", hub)
    path = model_folder.save(tmp_path / "ours", model_folder.Folder({}, configs, hub, {}))
    kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
    module = kind.from_pretrained(path / component)
    module.save_pretrained(tmp_path / "theirs")
    back = model_folder.load(tmp_path / "theirs").hub[component]
    sd_shapes.same_bits(back, hub[component])


def test_a_file_of_diffusers_is_read_whole(tmp_path):
    """A pipeline that diffusers writes, all of its parts at once."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    hub = sd_shapes.model("sd1", np.float16)
    configs = ldm_configs.configs("sd1", hub)
    modules = {c: CLASSES[c].from_config(configs[c]) for c in ("unet", "vae")}
    text = tower(configs["text_encoder"])
    pipeline = StableDiffusionPipeline(
        **modules, text_encoder=text, tokenizer=None, scheduler=DDIMScheduler.from_config(configs["scheduler"]),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(torch.bfloat16)  # fmt: skip
    pipeline.save_pretrained(tmp_path / "whole")
    found = model_folder.load(tmp_path / "whole")
    assert found.index["_class_name"] == "StableDiffusionPipeline" and not found.tokenizers
    assert {c: {n: v.shape for n, v in w.items()} for c, w in found.hub.items()} == sd_shapes.TINY["sd1"]
    for component, module in modules.items():
        for name, value in module.state_dict().items():
            ours = found.hub[component][name]
            assert ours.dtype.name == "bfloat16"
            assert ours.view(np.int16).tobytes() == value.view(torch.int16).numpy().tobytes()
    assert found.configs["unet"]["block_out_channels"] == [8, 16]
    assert found.configs["scheduler"]["beta_end"] == 0.012


def test_files_are_of_safetensors(tmp_path):
    from safetensors.torch import load_file

    hub = sd_shapes.model("sd2")
    path = single_file.save(tmp_path / "sd2.safetensors", single_file.of("sd2", hub))
    theirs, ours = load_file(path), files.load(path)
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].numpy(), ours[name]) for name in ours)
