"""The networks, schedule and grid of a model from its configurations, which are in diffusers' words.

A word that asks for what is not built is an InputError that names it; words without a say in the result are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.nets import layers
from diffusion_jax.nets.autoencoder import Autoencoder, kl_autoencoder
from diffusion_jax.nets.clip import TextEncoder, clip_text
from diffusion_jax.nets.controlnet import controlnet
from diffusion_jax.nets.text_unet import SIZE_FEATURES, text_unet
from diffusion_jax.predictions import Predicts
from diffusion_jax.schedules import from_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from diffusion_jax.times import leading, trailing
from diffusion_jax.typing import InputError, Net, Schedule

Config = Mapping[str, Any]
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
WHOLE, WHOLES, WORDS = "a whole number", "a list of whole numbers", "a list of words"
_UNET = {
    "in_channels": (WHOLE,), "layers_per_block": (WHOLE,), "block_out_channels": (WHOLES,),
    "down_block_types": (WORDS,), "attention_head_dim": (WHOLE, WHOLES), "cross_attention_dim": (WHOLE,),
}  # fmt: skip
SETTINGS = {
    "unet": {"out_channels": (WHOLE,), **_UNET},
    "controlnet": _UNET,
    "vae": {
        "in_channels": (WHOLE,), "latent_channels": (WHOLE,), "block_out_channels": (WHOLES,),
        "layers_per_block": (WHOLE,),
    },
    "text_encoder": {name: (WHOLE,) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    )},
}  # fmt: skip
"""What the settings of a component must have."""


def text_encoder(config: Config, dtype: layers.DType, *, eos: int, before_last: bool, projected: bool) -> TextEncoder:
    """A text tower; before_last: its states are those before the last layer, not normalized, as SDXL takes them.

    eos: the tokenizer's; what old configurations say of it is wrong.
    """
    return clip_text(
        eos=eos, width=config["hidden_size"], depth=config["num_hidden_layers"], heads=config["num_attention_heads"],
        mlp=config["intermediate_size"], vocab=config["vocab_size"], length=config["max_position_embeddings"],
        act=config["hidden_act"], n_out=config["projection_dim"] if projected else None,
        layer=-2 if before_last else -1, normed=not before_last, dtype=dtype,
    )  # fmt: skip


def autoencoder(config: Config, dtype: layers.DType) -> Autoencoder:
    """A KL autoencoder."""
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        if config.get(name) is False:
            raise InputError(f"the autoencoder has {name}=False, which is not built here")
    return kl_autoencoder(
        widths=tuple(config["block_out_channels"]), blocks=config["layers_per_block"], channels=config["in_channels"],
        latent=config["latent_channels"], groups=config.get("norm_num_groups", 32), dtype=dtype,
    )  # fmt: skip


def unet(config: Config, latent: int, pooled: int, dtype: layers.DType, remat: layers.Remat = "none") -> Net:
    """A U-Net whose input has the latent's channels and perhaps more; pooled: width of the pooled text it may take."""
    _check(config)
    more = config["in_channels"] - latent
    if more < 0:
        raise InputError(f"the U-Net takes {config['in_channels']} channels, fewer than a latent's {latent}")
    return text_unet(
        n_in=latent, n_out=config["out_channels"], image=more or None, only_cross=_only_cross(config),
        classes=config.get("num_class_embeds"), remat=remat, dtype=dtype, **_shared(config, pooled),
    )  # fmt: skip


def control_network(config: Config, pooled: int, dtype: layers.DType) -> Net:
    """A ControlNet for pictures of three channels."""
    _check(config)
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise InputError("the ControlNet takes its pictures in the order bgr, which is not built here")
    return controlnet(
        n_in=config["in_channels"], hints=tuple(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256))),
        dtype=dtype, **_shared(config, pooled),
    )  # fmt: skip


def check_settings(configs: Mapping[str, Config]) -> None:
    """InputError for a setting of a component that is missing or of another kind than `SETTINGS` says."""
    for component, config in configs.items():
        for name, kinds in SETTINGS.get(component.removesuffix("_2"), {}).items():
            if _kind_of(config.get(name)) not in kinds:
                found = repr(config[name])[:40] if name in config else "missing"
                raise InputError(f"the settings of the {component}: {name} is {found}, and should be {kinds[0]}")


def check_together(configs: Mapping[str, Config]) -> None:
    """InputError for components that are not of one model, or not of one family."""
    config, vae = configs["unet"], configs["vae"]
    towers = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    if config["out_channels"] != vae["latent_channels"]:
        raise InputError(
            f"the vae has latents of {vae['latent_channels']} channels, and the unet gives {config['out_channels']}"
        )
    told = sum(tower["hidden_size"] for tower in towers)
    if told != config["cross_attention_dim"]:
        names = " and ".join(name for name in ("text_encoder", "text_encoder_2") if name in configs)
        raise InputError(f"{names}: {told} numbers a token, of which the unet takes {config['cross_attention_dim']}")
    features = config.get("projection_class_embeddings_input_dim") or 0
    pooled = towers[-1].get("projection_dim", 0)
    if features and (features - pooled) not in (5 * SIZE_FEATURES, 6 * SIZE_FEATURES):
        raise InputError(f"text_encoder_2: it projects to {pooled} numbers, which the unet does not take")
    control = configs.get("controlnet", config)
    for name in ("block_out_channels", "layers_per_block", "cross_attention_dim", "in_channels"):
        wanted = vae["latent_channels"] if name == "in_channels" else config[name]
        if control is not config and control[name] != wanted:
            raise InputError(f"the controlnet is for another model: its {name} is {control[name]}, here {wanted}")


def size_numbers(config: Config, pooled: int) -> int:
    """How many numbers about sizes a U-Net takes beside a pooled text: 6 in SDXL, 5 in its refiner, 0 in others."""
    features = config.get("projection_class_embeddings_input_dim") or 0
    return (features - pooled) // SIZE_FEATURES if features else 0


def schedule(config: Config) -> tuple[Schedule, int, Predicts]:
    """The schedule of discrete noise levels, their number, and what the network predicts."""
    table, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    makers = {"scaled_linear": scaled_linear_betas, "linear": linear_betas}
    if config.get("trained_betas"):
        betas = np.asarray(config["trained_betas"], np.float64)
    elif kind in makers:
        betas = makers[kind](table, *ends)
    else:
        raise InputError(f"the scheduler's beta_schedule={kind} is none of {', '.join(makers)}")
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise InputError(f"the scheduler's prediction_type={predicts} is none of {', '.join(PREDICTS)}")
    if config.get("rescale_betas_zero_snr"):
        betas = zero_terminal_snr(betas)
    return from_betas(betas), table, PREDICTS[predicts]


def grid(config: Config) -> Callable[[int, str], np.ndarray]:
    """(number of steps, name of the sampler) -> times f32[n + 1], spaced as the model's scheduler says.

    They end at 0, but for ddim and ddpm where `set_alpha_to_one` is false: at the first of the noise levels.
    """
    table, offset = config.get("num_train_timesteps", 1000), config.get("steps_offset", 0)
    spacing = config.get("timestep_spacing", "leading")
    clean = config.get("set_alpha_to_one", True)

    def times(n: int, sampler: str) -> np.ndarray:
        if spacing == "trailing":
            found = np.array(trailing(n, table))
        elif spacing == "linspace":
            levels = np.linspace(0, table - 1, n)[::-1].round()
            found = np.append((levels + 1) / table, 0).astype(np.float32)
        else:
            found = np.array(leading(n, table, offset))
        if sampler in ("ddim", "ddpm") and not clean and found[-2] > 1 / table:
            found[-1] = 1 / table
        return found

    return times


def _shared(config: Config, pooled: int) -> dict[str, Any]:
    """What U-Nets and ControlNets are made of alike."""
    down, widths = config["down_block_types"], config["block_out_channels"]
    numbers = size_numbers(config, pooled)
    return {
        "widths": tuple(widths),
        "blocks": config["layers_per_block"],
        "attends": tuple(DOWN[kind] for kind in down),
        "depths": _each(config.get("transformer_layers_per_block", 1), len(widths)),
        "heads": _each(config.get("num_attention_heads") or config["attention_head_dim"], len(widths)),
        "groups": config.get("norm_num_groups", 32),
        "tokens": config["cross_attention_dim"],
        "linear_projection": config.get("use_linear_projection", False),
        "vector": pooled if numbers else None,
        "sizes": numbers or None,
    }


def _kind_of(value: Any) -> str:
    """What a setting is, in the words of `SETTINGS`."""
    if isinstance(value, list | tuple) and value:
        inside = {_kind_of(part) for part in value}
        return {"a word": WORDS, WHOLE: WHOLES}.get(inside.pop(), "") if len(inside) == 1 else ""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return WHOLE
    return "a word" if isinstance(value, str) else ""


def _each(value: Any, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def _only_cross(config: Config) -> Any:
    value = config.get("only_cross_attention", False)
    return tuple(value) if isinstance(value, list | tuple) else value


def _check(config: Config) -> None:
    """InputError for kinds of blocks and conditions that are not built."""
    strange = [kind for kind in config["down_block_types"] if kind not in DOWN]
    if strange:
        raise InputError(f"the network has blocks of the kind {strange[0]}; {' and '.join(DOWN)} are built here")
    for name, known in {
        "addition_embed_type": (None, "text_time"), "class_embed_type": (None,), "time_embedding_type": ("positional",),
        "act_fn": ("silu",), "dual_cross_attention": (False,), "resnet_time_scale_shift": ("default",),
        "encoder_hid_dim_type": (None,), "time_cond_proj_dim": (None,), "upcast_attention": (False, True, None),
    }.items():  # fmt: skip
        if config.get(name, known[0]) not in known:
            raise InputError(f"the network has {name}={config[name]}, which is not built here")
    if config.get("addition_time_embed_dim", SIZE_FEATURES) not in (None, SIZE_FEATURES):
        raise InputError(f"the network has addition_time_embed_dim={config['addition_time_embed_dim']}, not 256")
