"""Checkpoints of one file: every family there and back, bit for bit; what is in one is used or named in an error."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
import sd_shapes
from sd_shapes import same_bits

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, ldm_configs, ldm_names, single_file
from diffusion_jax.weights.single_file import of, read, write

MODELS = {family: sd_shapes.model(family) for family in sd_shapes.TINY}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_bit_for_bit(family, dtype):
    model = sd_shapes.model(family, dtype)
    state = write(of(family, model))
    assert len(state) == len({id(value) for value in state.values()})
    found = read(state)
    assert found.family == family
    assert found.hub.keys() == model.keys()
    for component, weights in model.items():
        same_bits(found.hub[component], weights)
    same_bits(write(found), state)


# As in the published files, v1-5-pruned.safetensors and others.
PUBLISHED = {
    "sd1": {
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.emb_layers.1.weight": (320, 1280),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.11.0.out_layers.3.bias": (1280,),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.bias": (1280,),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (640, 960, 1, 1),
        "model.diffusion_model.output_blocks.11.1.proj_out.bias": (320,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.norm_out.weight": (128,),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    },
    "sd2": {
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (320, 320),
        "cond_stage_model.model.token_embedding.weight": (49_408, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.ln_final.weight": (1024,),
        "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.bias": (1024,),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
    },
    "sd_x4": {
        "model.diffusion_model.label_emb.weight": (1000, 1024),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_k.weight": (512, 1024),
        "model.diffusion_model.input_blocks.0.0.weight": (256, 7, 3, 3),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10_240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": (320, 640, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.ln_2.bias": (1280,),
    },
    "sdxl_refiner": {
        "model.diffusion_model.middle_block.1.transformer_blocks.3.norm3.weight": (1536,),
        "conditioner.embedders.0.model.text_projection": (1280, 1280),
    },
    "controlnet": {
        "control_model.zero_convs.11.0.weight": (1280, 1280, 1, 1),
        "control_model.input_hint_block.14.weight": (320, 256, 3, 3),
        "control_model.middle_block_out.0.bias": (1280,),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_names_and_shapes_of_published_files(family):
    shapes = sd_shapes.FULL[family]
    state = write(of(family, {c: sd_shapes.without_memory(s) for c, s in shapes.items()}))
    for name, shape in PUBLISHED[family].items():
        assert state[name].shape == shape, name
    found = read(state)
    assert (found.family, {c: {n: v.shape for n, v in w.items()} for c, w in found.hub.items()}) == (family, shapes)


def test_numbers_of_weights_of_published_files():
    counts = {family: {c: len(s) for c, s in parts.items()} for family, parts in sd_shapes.FULL.items()}
    assert counts["sd1"] == {"unet": 686, "vae": 248, "text_encoder": 196}
    assert counts["sdxl"] == {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517}


# Extras ---------------------------------------------------------------------------------------------------------------


def with_extras(family: str) -> tuple[dict, dict]:
    state = write(of(family, MODELS[family]))
    text = {"sd1": "cond_stage_model.transformer.text_model.embeddings.", "sd2": "cond_stage_model.model.",
            "sdxl": "conditioner.embedders.0.transformer.text_model.embeddings."}[family]  # fmt: skip
    extras = {
        "betas": np.ones(3, np.float32), "alphas_cumprod": np.linspace(0.9, 0.1, 3), "logvar": np.zeros(3),
        "sqrt_recip_alphas_cumprod": np.ones(3), "model_ema.decay": np.float32(0.9999),
        "model_ema.num_updates": np.int64(3), f"{text}position_ids": np.arange(7)[None],
        "first_stage_model.loss.discriminator.main.0.weight": np.ones((2, 2)),
    }  # fmt: skip
    if family == "sd2":
        extras |= {f"{text}text_projection": np.eye(8), f"{text}logit_scale": np.float32(4.6)}
    return state, {name: np.asarray(value) for name, value in extras.items()}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_extras_are_kept_under_their_names(family):
    state, extras = with_extras(family)
    found = read({**state, **extras})
    same_bits({n: v for n, v in found.extras.items() if n in extras}, extras)
    for component, weights in MODELS[family].items():
        same_bits(found.hub[component], weights)
    same_bits(write(found), {**state, **extras})


def test_the_last_layer_of_open_clip_is_kept_or_the_identity():
    state = write(of("sd2", MODELS["sd2"]))
    prefix = "cond_stage_model.model.transformer.resblocks.2."
    last = {name: value for name, value in state.items() if name.startswith(prefix)}
    assert len(last) == 12 and not any(value.any() for value in last.values())
    full = {**state, **{name: np.ones_like(value) for name, value in last.items()}}
    found = read(full)
    assert "text_model.encoder.layers.2.mlp.fc1.bias" not in found.hub["text_encoder"]
    same_bits(write(found), full)
    changed = found._replace(hub={**found.hub, "text_encoder": sd_shapes.weights(sd_shapes.text(), 9)})
    assert write(changed)[f"{prefix}ln_1.weight"].all()


def test_averages_take_the_place_of_the_weights():
    state = write(of("sd1", MODELS["sd1"]))
    unet = {n: v for n, v in state.items() if n.startswith("model.diffusion_model.")}
    averages = {f"model_ema.{n.removeprefix('model.').replace('.', '')}": v + 1 for n, v in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    full = {**state, **averages, "model_ema.decay": np.ones(())}
    same_bits(read(full).hub["unet"], MODELS["sd1"]["unet"])
    found = read(full, ema=True)
    same_bits(found.hub["unet"], {n: v + 1 for n, v in MODELS["sd1"]["unet"].items()})
    same_bits(found.hub["vae"], MODELS["sd1"]["vae"])
    assert not any(name.startswith("model_ema") for name in found.extras)
    with pytest.raises(InputError, match="no averages"):
        read(state, ema=True)


# Other forms of the same ----------------------------------------------------------------------------------------------


def test_parts_of_a_checkpoint_and_other_prefixes():
    for family in ("sd1", "sd2", "sdxl", "sdxl_refiner", "sd_x4"):
        alone = write(of(family, {"unet": MODELS[family]["unet"]}))
        for prefix in ("model.diffusion_model.", "diffusion_model.", ""):
            renamed = {prefix + n.removeprefix("model.diffusion_model."): v for n, v in alone.items()}
            found = read(renamed)
            assert found.family == family and found.hub.keys() == {"unet"}
            same_bits(found.hub["unet"], MODELS[family]["unet"])
            same_bits(write(found), renamed)
    vae = write(of("sd1", {"vae": MODELS["sd1"]["vae"]}))
    same_bits(read(vae).hub["vae"], MODELS["sd1"]["vae"])
    bare = {n.removeprefix("control_model."): v for n, v in write(of("controlnet", MODELS["controlnet"])).items()}
    same_bits(read(bare).hub["controlnet"], MODELS["controlnet"]["controlnet"])
    same_bits(write(read(bare)), bare)


def test_a_controlnet_in_a_whole_checkpoint():
    both = {**MODELS["sd1"], **MODELS["controlnet"]}
    found = read(write(of("sd1", both)))
    assert found.family == "sd1"
    for component, weights in both.items():
        same_bits(found.hub[component], weights)


def test_what_trainers_wrap_and_old_names():
    state = write(of("sd1", MODELS["sd1"]))
    wrapped = {f"state_dict.{n}": v for n, v in state.items()} | {"optimizer_states.0.state.0.exp_avg": np.zeros(2)}
    same_bits(write(read(wrapped)), state)
    bare = {n.replace("transformer.text_model.", "transformer."): v for n, v in state.items()}
    found = read(bare)
    same_bits(found.hub["text_encoder"], MODELS["sd1"]["text_encoder"])
    same_bits(write(found), bare)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae = {}
    for name, value in MODELS["sd1"]["vae"].items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        vae[name] = value
    assert "decoder.mid_block.attentions.0.query.weight" in vae
    same_bits(write(of("sd1", {**MODELS["sd1"], "vae": vae})), state)


def test_files(tmp_path):
    path = single_file.save(tmp_path / "model.safetensors", of("sdxl", MODELS["sdxl"]))
    found = single_file.load(path)
    for component, weights in MODELS["sdxl"].items():
        same_bits(found.hub[component], weights)
    files.save(path, {"a.weight": np.ones(2)})
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: this is no checkpoint") as error:
        single_file.load(path)
    assert "\n" not in str(error.value)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "looks like LoRA weights"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "looks like LoRA weights"),
        (["lora_te_x.hada_w1_a"], "looks like LoRA weights"),
        (["emb_params"], "textual-inversion"),
        (["clip_l", "clip_g"], "textual-inversion"),
        (["double_blocks.0.img_attn.qkv.weight"], "looks like Flux"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "looks like Stable Diffusion 3"),
        (["model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight"], "Stable Video Diffusion"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a part of a diffusers folder"),
        (["encoder.down_blocks.0.resnets.0.conv1.weight"], "a part of a diffusers folder"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        (["transformer.resblocks.0.ln_1.weight"], "a text encoder alone"),
        (["transformer_blocks.0.attn.to_q.weight"], "a diffusion transformer"),
        (
            ["a.weight", "b.weight"],
            "no checkpoint of Stable Diffusion that is known; its weights are a.weight, b.weight",
        ),
        ([], "its weights are none at all"),
    ],
)
def test_other_files_are_told_by_what_they_look_like(names, match):
    with pytest.raises(InputError, match=match) as error:
        read({name: np.zeros((2, 2), np.float32) for name in names})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", MODELS)
def test_every_weight_is_used_or_named(family):
    state = write(of(family, MODELS[family]))
    prefixes = {place.prefix for place in read(state).places.values()}
    for strange in ["strange.weight", *(f"{prefix}strange.0.weight" for prefix in prefixes)]:
        with pytest.raises(InputError, match="strange") as error:
            read({**state, strange: np.zeros(2)})
        assert "\n" not in str(error.value)
    for component in MODELS[family]:
        hub = {**MODELS[family], component: {**MODELS[family][component], "strange.weight": np.zeros(2)}}
        if component != "text_encoder" or family in ("sd2", "sd_x4"):
            with pytest.raises(InputError, match=r"does not have: strange\.weight"):
                write(of(family, hub))


def test_wrong_families_and_components():
    with pytest.raises(InputError, match="family='sd9' is not one of sd1, sd2"):
        of("sd9", {})
    with pytest.raises(InputError, match="family vae has no unet"):
        of("vae", {"unet": {}})
    checkpoint = of("sd1", MODELS["sd1"])
    with pytest.raises(InputError, match="both a component and the extras hold"):
        write(checkpoint._replace(extras={"model.diffusion_model.out.0.bias": np.zeros(1)}))
    less = {n: v for n, v in MODELS["sdxl"]["text_encoder_2"].items() if ".0.self_attn.k_proj.bias" not in n}
    with pytest.raises(InputError, match="lacks its k_proj"):
        write(of("sdxl", {"text_encoder_2": less}))
    state = write(of("sdxl", MODELS["sdxl"]))
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(InputError, match="not three matrices"):
        read({**state, name: np.zeros(10)})


# Configurations -------------------------------------------------------------------------------------------------------

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CONFIGS = {  # from the config.json of the published models
    "sd1": {
        "in_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
        "cross_attention_dim": 768, "down_block_types": [CROSS, CROSS, CROSS, PLAIN], "use_linear_projection": False,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "norm_num_groups": 32,
    },
    "sd2": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sd_x4": {
        "in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": [True, True, True, False],
        "block_out_channels": [256, 512, 512, 1024], "down_block_types": [PLAIN, CROSS, CROSS, CROSS],
        "attention_head_dim": 8,
    },
    "sdxl": {
        "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816, "down_block_types": [PLAIN, CROSS, CROSS],
    },
    "sdxl_refiner": {
        "attention_head_dim": [6, 12, 24, 24], "projection_class_embeddings_input_dim": 2560,
        "cross_attention_dim": 1280, "down_block_types": [PLAIN, CROSS, CROSS, PLAIN],
    },
}  # fmt: skip
OTHER_CONFIGS = {
    ("sd1", "vae"): {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": 0.18215},
    ("sdxl", "vae"): {"latent_channels": 4, "scaling_factor": 0.13025},
    ("sd_x4", "vae"): {"block_out_channels": [128, 256, 512], "scaling_factor": 0.08333},
    ("sd1", "text_encoder"): {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    ("sd2", "text_encoder"): {"num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
    ("sdxl", "text_encoder"): {"hidden_size": 768, "hidden_act": "quick_gelu", "intermediate_size": 3072},
    ("sdxl", "text_encoder_2"): {"num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"},
    ("controlnet", "controlnet"): {
        "conditioning_embedding_out_channels": [16, 32, 96, 256], "attention_head_dim": 8, "conditioning_channels": 3,
    },
    ("sd1", "scheduler"): {"beta_end": 0.012, "beta_start": 0.00085, "prediction_type": "epsilon"},
    ("sd2", "scheduler"): {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    ("sd_x4", "scheduler"): {"beta_end": 0.02, "prediction_type": "v_prediction"},
}  # fmt: skip


@pytest.mark.parametrize("family", sd_shapes.FULL)
def test_configurations_are_those_of_the_published_models(family):
    hub = {c: sd_shapes.without_memory(s) for c, s in sd_shapes.FULL[family].items()}
    found = ldm_configs.configs(family, hub)
    assert found.keys() - {"scheduler"} == hub.keys()
    known = {("unet", family): CONFIGS[family]} if family in CONFIGS else {}
    known |= {(component, f): config for (f, component), config in OTHER_CONFIGS.items() if f == family}
    for (component, _), config in known.items():
        assert {key: found[component][key] for key in config} == config


def test_what_is_predicted_and_other_betas():
    scheduler = ldm_configs.scheduler
    assert scheduler("sd2", {}, "epsilon")["prediction_type"] == "epsilon"
    assert scheduler("sd2", {"global_step": np.array(875_000)})["prediction_type"] == "epsilon"
    flags = {"v_pred": np.zeros(0), "ztsnr": np.zeros(0)}
    assert scheduler("sdxl", flags)["prediction_type"] == "v_prediction"
    assert scheduler("sdxl", flags)["rescale_betas_zero_snr"] and not scheduler("sdxl", {})["rescale_betas_zero_snr"]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    own = {"alphas_cumprod": np.cumprod(1 - betas).astype(np.float32)}
    assert "trained_betas" not in scheduler("sd1", own)
    other = {"alphas_cumprod": np.cumprod(1 - np.linspace(1e-4, 0.02, 100))}
    np.testing.assert_allclose(scheduler("sd1", other)["trained_betas"], np.linspace(1e-4, 0.02, 100), rtol=1e-6)
    with pytest.raises(InputError, match="do not fall"):
        scheduler("sd1", {"alphas_cumprod": np.array([0.5, 0.9])})


def test_weights_without_a_configuration_are_told():
    for component, weights in (
        ("unet", {}),
        ("vae", {"a.weight": np.zeros(2)}),
        ("text_encoder", {}),
        ("controlnet", {}),
    ):
        with pytest.raises(InputError, match="not those of sd1"):
            ldm_configs.configs("sd1", {component: weights})


def test_a_name_without_a_place_is_none():
    assert ldm_names.rename("conv_in", {"conv_in": "a.0"}) == "a.0"
    assert ldm_names.rename("conv_inner.weight", {"conv_in": "a.0"}) is None
