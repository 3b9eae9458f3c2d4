"""The configurations, in diffusers' words, of a checkpoint that has none: read off the shapes of its weights.

Widths, blocks, depths of transformers, channels and the widths of conditions are in the shapes. What is not follows
from the family, as its models were published:

    heads of the U-Net      8 in sd1 and sd_x4 and their ControlNets, of 64 channels in the others
    heads of text towers    of 64 channels
    activation              quick_gelu in CLIP's own towers, gelu in OpenCLIP's
    scale of latents        0.18215; 0.13025 in sdxl and its refiner; 0.08333 in sd_x4
    betas                   0.00085 to 0.012, 0.0001 to 0.02 in sd_x4, linear in their roots, 1000 of them
    prediction              v in sd2 and sd_x4, or where there is a flag v_pred; eps else                            (1)

An sd2 "base" model predicts eps and has the same weights as one that predicts v: a caller who knows says so, and a
number of training steps in the file, 875,000 of the base model, tells, too. Where the file holds `alphas_cumprod` and
they are not those of its family, their betas are in the configuration as `trained_betas`. An autoencoder alone gets the
scale of sd1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import ldm_names
from diffusion_jax.weights.files import State, plain

Config = dict[str, Any]
GROUPS, HEAD = 32, 64
SCALES = {"sdxl": 0.13025, "sdxl_refiner": 0.13025, "sd_x4": 0.08333}
SIZES = {"sd1": 64, "sd2": 96, "sd_x4": 128, "sdxl": 128, "sdxl_refiner": 128}
"""Latents of the size that a family was trained at."""


def configs(
    family: str, hub: Mapping[str, State], extras: State | None = None, *, prediction: str | None = None
) -> dict[str, Config]:
    """The configuration of each component of a hub, and of its "scheduler".

    prediction: "epsilon" or "v_prediction" instead of (1). InputError for weights that are no such component.
    """
    makers = {"unet": unet, "controlnet": controlnet, "vae": vae, "text_encoder": text, "text_encoder_2": text}
    try:
        found = {component: makers[component](family, weights) for component, weights in hub.items()}
        return {**found, "scheduler": scheduler(family, extras or {}, prediction)} if "unet" in hub else found
    except InputError:
        raise
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"the weights are not those of {family}: {plain(error)}") from error


def unet(family: str, weights: State) -> Config:
    """A UNet2DConditionModel's."""
    common, depths = _common(family, weights)
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SIZES.get(family, 64),
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": weights["conv_out.weight"].shape[0],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": family == "sd_x4" and [level < len(depths) - 1 for level in range(len(depths))],
        **common,
    }
    if "class_embedding.weight" in weights:
        config["num_class_embeds"] = weights["class_embedding.weight"].shape[0]
    return config


def controlnet(family: str, weights: State) -> Config:
    """A ControlNetModel's."""
    embedding = "controlnet_cond_embedding"
    names = ["conv_in", *(f"blocks.{k}" for k in range(1, _number(weights, f"{embedding}.blocks"), 2))]
    return {
        "_class_name": "ControlNetModel",
        "in_channels": weights["conv_in.weight"].shape[1],
        "conditioning_channels": weights[f"{embedding}.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": [weights[f"{embedding}.{name}.weight"].shape[0] for name in names],
        **_common(family, weights)[0],
    }


def vae(family: str, weights: State) -> Config:
    """An AutoencoderKL's."""
    levels = _number(weights, "encoder.down_blocks")
    widths = [weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": _number(weights, "encoder.down_blocks.0.resnets"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": math.gcd(GROUPS, *widths),
        "act_fn": "silu",
        "sample_size": 8 * SIZES.get(family, 64),
        "scaling_factor": SCALES.get(family, 0.18215),
    }


def text(family: str, weights: State) -> Config:
    """A CLIPTextModel's, or one's with a projection where there is one."""
    vocab, width = weights["text_model.embeddings.token_embedding.weight"].shape
    projection = weights.get("text_projection.weight")
    own = family in ("sd1", "sdxl") and projection is None
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu" if own else "gelu",
        "hidden_size": width,
        "intermediate_size": weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(1, width // HEAD),
        "num_hidden_layers": ldm_names.clip_layers(weights),
        "max_position_embeddings": weights["text_model.embeddings.position_embedding.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "vocab_size": vocab,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # what the published files say; the encoder then looks for the largest id
    }


def scheduler(family: str, extras: State, prediction: str | None = None) -> Config:
    """A DDIMScheduler's, by (1)."""
    start, end = (0.0001, 0.02) if family == "sd_x4" else (0.00085, 0.012)
    step = int(extras["global_step"].ravel()[0]) if extras.get("global_step", np.zeros(0)).size else 0
    by_v = "v_pred" in extras or (family in ("sd2", "sd_x4") and step != 875_000)
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction or ("v_prediction" if by_v else "epsilon"),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "rescale_betas_zero_snr": "ztsnr" in extras,
    }
    return config | _trained_betas(extras, start, end)


def _trained_betas(extras: State, start: float, end: float) -> Config:
    products = extras.get("alphas_cumprod")
    if products is None or products.ndim != 1 or not products.size:
        return {}
    products = products.astype(np.float64)
    betas = np.linspace(start**0.5, end**0.5, len(products)) ** 2
    if len(products) == 1000 and np.allclose(products, np.cumprod(1 - betas), rtol=1e-3, atol=1e-5):
        return {}
    before = np.concatenate([[1.0], products[:-1]])
    trained = 1 - products / np.where(before == 0, 1, before)
    if not (np.isfinite(trained).all() and (trained >= 0).all() and (trained <= 1).all()):
        raise InputError("alphas_cumprod in the file do not fall from 1 to 0")
    return {"num_train_timesteps": len(products), "trained_betas": trained.tolist()}


def _common(family: str, weights: State) -> tuple[Config, list[int]]:
    """What U-Nets and ControlNets share, and the depths of their levels."""
    middle = "mid_block.attentions.0"
    widths, depths = _levels(weights, _number(weights, f"{middle}.transformer_blocks"))
    linear = weights[f"{middle}.proj_in.weight"].ndim == 2
    eight = family in ("sd1", "sd_x4") or not linear
    config: Config = {
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "block_out_channels": widths,
        "layers_per_block": _number(weights, "down_blocks.0.resnets"),
        "cross_attention_dim": weights[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": 8 if eight else [max(1, width // HEAD) for width in widths],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(GROUPS, *widths),
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    config["transformer_layers_per_block"][-1] = _number(weights, f"{middle}.transformer_blocks")
    if "add_embedding.linear_1.weight" in weights:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": weights["add_embedding.linear_1.weight"].shape[1],
        }
    return config, depths


def _levels(weights: State, middle: int) -> tuple[list[int], list[int]]:
    """Widths and depths of the levels, 0 without attention; the last depth is the middle's in a configuration."""
    levels = range(_number(weights, "down_blocks"))
    widths = [weights[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in levels]
    depths = [_number(weights, f"down_blocks.{level}.attentions.0.transformer_blocks") for level in levels]
    if not depths or depths[-1] not in (0, middle):
        raise ValueError(f"transformers of {depths} blocks on the levels and {middle} in the middle")
    return widths, depths


def _number(weights: State, module: str) -> int:
    numbers = (re.match(rf"{re.escape(module)}\.(\d{{1,3}})\.", name) for name in weights)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)
