"""LoRA: diffusers' pipelines fuse what we write into the weights that our merge gives, and the other way round."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))
import sd_shapes

from diffusion_jax.weights import ldm_configs, lora, model_folder, textual_inversion

torch.set_num_threads(1)
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj"],
    "text_encoder": ["q_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "out_proj", "fc2"],
}


def tower(config, weights):
    kind = CLIPTextModelWithProjection if "WithProjection" in config["architectures"][0] else CLIPTextModel
    plain = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    module = kind(CLIPTextConfig(**plain))
    bare = kind is CLIPTextModel and not any(n.startswith("text_model.") for n in module.state_dict())
    return filled(module, {n.removeprefix("text_model.") if bare else n: v for n, v in weights.items()})


def filled(module, weights):
    module.load_state_dict({n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in weights.items()})
    return module.eval()


def pipeline(family: str):
    """A pipeline of diffusers with the weights of our model."""
    hub = sd_shapes.model(family)
    configs = ldm_configs.configs(family, hub)
    parts = {
        "unet": filled(UNet2DConditionModel.from_config(configs["unet"]), hub["unet"]),
        "vae": filled(AutoencoderKL.from_config(configs["vae"]), hub["vae"]),
        **{c: tower(configs[c], hub[c]) for c in hub if c.startswith("text_encoder")},
        "scheduler": DDIMScheduler.from_config(configs["scheduler"]), "tokenizer": None,
    }  # fmt: skip
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer_2=None, add_watermarker=False), hub
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False), hub  # fmt: skip


def weights_of(pipe, hub):
    """The weights in a pipeline by the names of our hub."""
    found = {}
    for component in hub:
        state = {n: v.numpy() for n, v in getattr(pipe, component).state_dict().items()}
        bare = component.startswith("text_encoder")
        found[component] = {
            f"text_model.{n}" if bare and n.startswith(model_folder.BARE) else n: v for n, v in state.items()
        }
    return found


def close(a, b):
    """Float32 up to 1e-6 of the largest number in a weight."""
    assert a.keys() == b.keys()
    for component in a:
        for name, value in a[component].items():
            scale = float(np.max(np.abs(value)))
            np.testing.assert_allclose(b[component][name], value, atol=1e-6 * scale, rtol=0, err_msg=name)


def random_lora(hub, alpha, varied=False) -> lora.Lora:
    """Of several ranks, and `varied` of several alphas, too."""
    rng = np.random.default_rng(0)
    found: lora.Lora = {}
    for component, targets in TARGETS.items():
        for i, (name, w) in enumerate(hub.get(component, {}).items()):
            if name.removesuffix(".weight").endswith(tuple(f".{target}" for target in targets)):
                rank = 2 + i % 3
                down = rng.normal(size=(rank, *w.shape[1:])).astype(np.float32)
                up = rng.normal(size=(len(w), rank, *(1 for _ in w.shape[2:]))).astype(np.float32)
                found.setdefault(component, {})[name] = lora.Update(down, up, None, alpha and alpha + varied * (i % 2))
    return found


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_we_write_is_fused_by_diffusers_to_what_we_merge(tmp_path, family, naming, alpha):
    pipe, hub = pipeline(family)
    # In kohya's names diffusers 0.42 overlooks, with a warning, an attention's alpha that is not the others'.
    ours = random_lora(hub, alpha, varied=naming == "diffusers")
    assert all(len(updates) >= 6 for updates in ours.values()) and len(ours) == (3 if family == "sdxl" else 2)
    lora.save(tmp_path / "x.safetensors", ours, naming)
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    merged = lora.merge(hub, [(lora.load(tmp_path / "x.safetensors", hub), 0.7)])
    changed = [n for n in hub["unet"] if not np.array_equal(merged["unet"][n], hub["unet"][n])]
    assert set(changed) == set(ours["unet"])
    close(weights_of(pipe, hub), merged)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_diffusers_writes_is_merged_to_what_it_fuses(tmp_path, family):
    pipe, hub = pipeline(family)
    layers, metadata = {}, {}
    for component, targets in TARGETS.items():
        module = getattr(pipe, component, None)
        if module is None:
            continue
        config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        torch.manual_seed(0)
        module.add_adapter(config)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        metadata[f"{component}_lora_adapter_metadata"] = config.to_dict()
    type(pipe).save_lora_weights(tmp_path, **layers, **metadata)
    other, _ = pipeline(family)
    other.load_lora_weights(str(tmp_path))
    other.fuse_lora(lora_scale=-0.3)
    other.unload_lora_weights()
    found = lora.load(tmp_path / "pytorch_lora_weights.safetensors", hub)
    assert all(update.alpha == 6 for updates in found.values() for update in updates.values())
    close(weights_of(other, hub), lora.merge(hub, [(found, -0.3)]))


def test_two_at_once_equal_set_adapters(tmp_path):
    pipe, hub = pipeline("sd1")
    first, second = random_lora(hub, 1.0), {"unet": random_lora(hub, None)["unet"]}
    for name, found in (("a", first), ("b", second)):
        lora.save(tmp_path / f"{name}.safetensors", found, "kohya")
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, -1.5])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    close(weights_of(pipe, hub), lora.merge(hub, [(first, 0.5), (second, -1.5)]))


def test_embeddings_that_torch_writes(tmp_path):
    vectors = torch.randn(2, 8)
    plain = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat", "step": 7}
    kept = {**plain, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})}
    for content in (plain, kept, {**plain, "string_to_token": {"*": torch.tensor(265)}}):
        torch.save(content, tmp_path / "cat.pt")
        found = textual_inversion.load(tmp_path / "cat.pt")
        assert found.word == "cat"
        np.testing.assert_array_equal(found.vectors["text_encoder"], vectors)
    torch.save({"<cat>": vectors[0]}, tmp_path / "learned_embeds.bin")
    found = textual_inversion.load(tmp_path / "learned_embeds.bin")
    assert found.word == "<cat>"
    np.testing.assert_array_equal(found.vectors["text_encoder"], vectors[:1])


def test_an_embedding_that_we_write_is_loaded_by_diffusers(tmp_path):
    from transformers import CLIPTokenizer

    from diffusion_jax.text import tokenizer

    pipe, hub = pipeline("sd1")
    vocab = {token: i for i, token in enumerate([*"abcdefghij", "a</w>", "cat</w>", tokenizer.BOS, tokenizer.EOS])}
    vocab |= {f"filler{i}": i for i in range(len(vocab), 20)}
    pipe.tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    vectors = np.arange(16, dtype=np.float32).reshape(2, 8)
    embedding = textual_inversion.Embedding("<cat>", {"text_encoder": vectors})
    textual_inversion.save(tmp_path / "cat.safetensors", embedding)
    pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"))
    theirs = pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    grown = textual_inversion.added(hub["text_encoder"], [embedding])
    np.testing.assert_array_equal(grown[textual_inversion.TABLE], theirs)
    ids = pipe.tokenizer(pipe.maybe_convert_prompt("<cat>", pipe.tokenizer), add_special_tokens=False)["input_ids"]
    assert tuple(ids) == textual_inversion.places(20, [embedding])["<cat>"]
