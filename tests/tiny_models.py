"""Models of Stable Diffusion's kinds with tiny random networks, as folders in diffusers' layout."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from anywhere import params_like

from diffusion_jax.generating import networks
from diffusion_jax.text.tokenizer import BOS, EOS, byte_letters
from diffusion_jax.weights import autoencoder, clip, model_folder, text_unet

LETTERS = list(byte_letters().values())
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), BOS, EOS]
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.18215,
}  # fmt: skip
TEXT = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": 16,
    "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 77,
    "projection_dim": 16, "vocab_size": len(TOKENS), "eos_token_id": len(TOKENS) - 1,
}  # fmt: skip
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "block_out_channels": [8, 16], "layers_per_block": 1,
    "attention_head_dim": 2, "cross_attention_dim": 16, "norm_num_groups": 4,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False,
}  # fmt: skip
CONTROLNET = {
    **{k: v for k, v in UNET.items() if k not in ("_class_name", "out_channels", "sample_size")},
    "_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [4, 4], "conditioning_channels": 3,
}  # fmt: skip
TEXT_2 = {**TEXT, "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "projection_dim": 24}
XL = {
    "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 24 + 6 * 256, "use_linear_projection": True,
}  # fmt: skip
UNETS = {
    "sd15": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
    "sdxl": XL,
    "sdxl_refiner": {**XL, "cross_attention_dim": 16, "projection_class_embeddings_input_dim": 24 + 5 * 256},
    "inpainting": {"in_channels": 9},
    "editing": {"in_channels": 8},
    "upscaling": {"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": [True, False]},
}


def write_model(folder: Path, kind: str = "sd15", seed: int = 0, dtype=np.float32) -> Path:
    """A whole model of a kind of `UNETS`, all of its weights random."""
    configs = {"unet": UNET | UNETS[kind], "vae": VAE, "scheduler": SCHEDULER}
    if kind != "sdxl_refiner":
        configs["text_encoder"] = TEXT if kind != "sd2" else {**TEXT, "hidden_act": "gelu"}
    if kind in ("sdxl", "sdxl_refiner"):
        configs["text_encoder_2"] = TEXT_2
    if kind == "sd2":
        configs["scheduler"] = {**SCHEDULER, "prediction_type": "v_prediction"}
    if kind == "upscaling":
        configs["low_res_scheduler"] = {
            **SCHEDULER,
            "_class_name": "DDPMScheduler",
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
    hub = {name: weights(name, config, seed + i) for i, (name, config) in enumerate(configs.items()) if name in WRITERS}
    hub = {name: {n: a.astype(dtype) for n, a in state.items()} for name, state in hub.items()}
    names = [name.replace("text_encoder", "tokenizer") for name in configs if name.startswith("text_encoder")]
    tokenizers = {name: write_tokenizer(folder.parent / f"{folder.name}-{name}") for name in names}
    model = model_folder.Folder({}, configs, hub, tokenizers)
    return model_folder.save(folder, model._replace(index=model_folder.index_of(model)))


def write_component(folder: Path, name: str, config: dict, seed: int = 5) -> Path:
    """One component alone, such as a ControlNet."""
    return model_folder.save(folder, model_folder.Folder({}, {name: config}, {name: weights(name, config, seed)}, {}))


def write_tokenizer(folder: Path) -> Path:
    """CLIP's kind of tokenizer whose words are letters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": EOS}))
    return folder


def weights(name: str, config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random weights of a component, none of them zero or one, by their names in diffusers."""
    params = params_like(network(name, config).init, seed)
    return WRITERS[name](params)


def network(name: str, config: dict):
    f32, pooled = jnp.float32, TEXT_2["projection_dim"]
    if name == "unet":
        return networks.unet(config, 4, pooled, f32)
    if name == "controlnet":
        return networks.control_network(config, pooled, f32)
    if name == "vae":
        return networks.autoencoder(config, f32)
    eos = len(TOKENS) - 1
    return networks.text_encoder(config, f32, eos=eos, before_last=False, projected=name == "text_encoder_2")


WRITERS = {
    "unet": text_unet.to_diffusers, "controlnet": text_unet.to_diffusers, "vae": autoencoder.to_diffusers,
    "text_encoder": clip.text_to_transformers, "text_encoder_2": clip.text_to_transformers,
}  # fmt: skip
