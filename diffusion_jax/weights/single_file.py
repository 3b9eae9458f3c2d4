"""Checkpoints of one file, in the layout that Stable Diffusion was published in, as components in diffusers' layout.

What the components are called in a file, by family (what their weights are called is in `ldm_names`):

    family         unet                      vae                   text_encoder                       text_encoder_2
    sd1            model.diffusion_model.    first_stage_model.    cond_stage_model.transformer.                    (1)
    sd2, sd_x4     the same                  the same              cond_stage_model.model. (OpenCLIP)
    sdxl           the same                  the same              conditioner.embedders.0.transformer.
                                                                                   conditioner.embedders.1.model.
    sdxl_refiner   the same                  the same                              conditioner.embedders.0.model.
    controlnet     (or with any of them)     controlnet: control_model., or nothing
    vae            an autoencoder alone      nothing

Networks for inpainting and for edits by instruction are those of their family with more channels at the input. Any of
the components may be missing, as in a file of a U-Net alone.

What is none of these weights is kept as it is in `extras`, under its own name, and written back: the schedule's tables,
averages of the weights (model_ema., which `read(..., ema=True)` puts in the place of the U-Net's), position_ids and
logit_scale, parts that only training used (loss., low_scale_model.), and flags (v_pred, ztsnr). Stable Diffusion 2 uses
all but the last layer of OpenCLIP's tower, so that diffusers' text encoder lacks it: it is an extra, too, as is the
projection after it. A file that is made without it gets a last layer of zeros there, which is the identity.

Anything else in a file is an error that lists it. `write` is the inverse of `read`, weight for weight and bit for bit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, ldm_names, torch_files
from diffusion_jax.weights.files import State

Hub = dict[str, State]
"""A model: the weights of its components by diffusers' names of both."""


class Place(NamedTuple):
    """Where a component is in a file: before its names, and the layout (`KINDS`) of what follows."""

    prefix: str
    kind: str


class SingleFile(NamedTuple):
    """A checkpoint: its family (1), where its components are, their weights, and everything else by its own name."""

    family: str
    places: Mapping[str, Place]
    hub: Hub
    extras: State


DIFFUSION = {"unet": Place("model.diffusion_model.", "unet"), "vae": Place("first_stage_model.", "vae")}
CONTROL = {"controlnet": Place("control_model.", "controlnet")}
FAMILIES: dict[str, dict[str, Place]] = {
    "sd1": {**DIFFUSION, "text_encoder": Place("cond_stage_model.transformer.", "clip"), **CONTROL},
    "sd2": {**DIFFUSION, "text_encoder": Place("cond_stage_model.model.", "open_clip_penultimate"), **CONTROL},
    "sd_x4": {**DIFFUSION, "text_encoder": Place("cond_stage_model.model.", "open_clip_penultimate")},
    "sdxl": {
        **DIFFUSION, "text_encoder": Place("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": Place("conditioner.embedders.1.model.", "open_clip"), **CONTROL,
    },
    "sdxl_refiner": {**DIFFUSION, "text_encoder_2": Place("conditioner.embedders.0.model.", "open_clip")},
    "controlnet": CONTROL,
    "vae": {"vae": Place("", "vae")},
}  # fmt: skip
EXTRAS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|global_step|v_pred|ztsnr|edm_\w+|denoiser\..*|model_ema\..*|low_scale_model\..*"
    r"|(first_stage_model\.)?(loss|model_ema)\..*|(optimizer_states|callbacks|lr_schedulers|loops)\..*"
    r"|.*\bposition_ids|.*\blogit_scale|.*\battn_mask)"
)
UNETS = ("model.diffusion_model.", "diffusion_model.", "")
OTHERS = (
    (r"lora_(down|up|mid|A|B|unet|te)|\.lora\.|_lora\.|\.hada_|\.lokr_", "LoRA weights: give them as lora="),
    (r"^(string_to_param|emb_params|clip_[lg]$)", "a textual-inversion embedding: give it as embedding="),
    (r"double_blocks\.\d", "Flux"),
    (r"joint_blocks\.\d", "Stable Diffusion 3"),
    (r"time_stack\.", "Stable Video Diffusion"),
    (r"motion_modules\.", "motion modules of AnimateDiff"),
    (r"^noise_augmentor\.|^embedder\.", "Stable Diffusion unCLIP"),
    (r"^depth_model\.", "Stable Diffusion 2 for depth maps"),
    (r"^(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"^(down_blocks|mid_block|up_blocks)\.|^(en|de)coder\.(down|up)_blocks\.", "a part of a diffusers folder"),
    (r"^(text_model|text_projection)\.|^transformer\.resblocks\.", "a text encoder alone"),
    (r"^(visual|vision_model)\.", "an image encoder"),
    (r"^(model\.diffusion_model\.)?(transformer_)?blocks\.\d", "a diffusion transformer"),
)  # fmt: skip


def load(path: str | os.PathLike[str], *, ema: bool = False) -> SingleFile:
    """The checkpoint in a .safetensors file, or, by the reader that runs no code, in one of torch's own (.ckpt, .pt).

    InputError, one line, for a file that cannot be read or holds something else, which it names.
    """
    own = Path(path).suffix in torch_files.SUFFIXES
    state = torch_files.load(path) if own else files.load(path)
    try:
        return read(state, ema=ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(path: str | os.PathLike[str], checkpoint: SingleFile) -> Path:
    """Write a checkpoint as one .safetensors file; inverse of `load`."""
    return files.save(path, write(checkpoint))


def read(state: Mapping[str, np.ndarray], *, ema: bool = False) -> SingleFile:
    """The components in a state dict, by (1); what torch's `Trainer` wraps in "state_dict" is taken out of it.

    ema: the averages of the U-Net's weights instead of the weights. InputError for another family, which it names, for
    weights that no component has, and for averages that are not there.
    """
    state = _unwrapped(state)
    family, places = detect(state)
    parts: Hub = {component: {} for component in places}
    extras: State = {}
    for name, value in state.items():
        component = next((c for c, place in places.items() if name.startswith(place.prefix)), None)
        if component is None or EXTRAS.fullmatch(name):
            extras[name] = value
        else:
            parts[component][name.removeprefix(places[component].prefix)] = value
    strange = sorted(name for name in extras if not EXTRAS.fullmatch(name))
    if strange:
        raise InputError(f"this looks like {family}, which does not have the weights {ldm_names.listed(strange)}")
    if ema:
        parts["unet"], extras = _averaged(parts.get("unet", {}), places, extras)
    hub: Hub = {}
    for component, place in places.items():
        hub[component], more = KINDS[place.kind].here(parts[component])
        extras |= {place.prefix + name: value for name, value in more.items()}
    return SingleFile(family, places, hub, extras)


def write(checkpoint: SingleFile) -> State:
    """The state dict of one file from its components; inverse of `read`.

    InputError listing weights that have no name there, and for two of the same name.
    """
    found: State = {}
    for component, weights in checkpoint.hub.items():
        if component not in checkpoint.places:
            raise InputError(f"a file of the family {checkpoint.family} has no {component}")
        prefix, kind = checkpoint.places[component]
        inside = {n.removeprefix(prefix): v for n, v in checkpoint.extras.items() if prefix and n.startswith(prefix)}
        found |= {prefix + name: value for name, value in KINDS[kind].there(weights, inside).items()}
    twice = sorted(found.keys() & checkpoint.extras.keys())
    if twice:
        raise InputError(f"both a component and the extras hold {ldm_names.listed(twice)}")
    return {**found, **checkpoint.extras}


def of(family: str, hub: Mapping[str, Mapping[str, np.ndarray]]) -> SingleFile:
    """A checkpoint of a family (1) from its components; InputError for a family or component that there is not."""
    if family not in FAMILIES:
        raise InputError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    lost = hub.keys() - FAMILIES[family].keys()
    if lost:
        raise InputError(f"a file of the family {family} has no {ldm_names.listed(sorted(lost))}")
    places = {c: place for c, place in FAMILIES[family].items() if c in hub}
    return SingleFile(family, places, {c: dict(weights) for c, weights in hub.items()}, {})


# Which family ---------------------------------------------------------------------------------------------------------


def detect(state: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Place]]:
    """The family of a state dict and the places of the components it has; InputError, saying what it looks like."""
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in state):
            raise InputError(f"this looks like {what}, not like a checkpoint of Stable Diffusion")
    if "input_hint_block.0.weight" in state:
        return "controlnet", {"controlnet": Place("", "controlnet")}
    if any(name.startswith(("encoder.conv_in.", "decoder.conv_in.")) for name in state):
        return "vae", FAMILIES["vae"]
    unet = next((p for p in UNETS if f"{p}input_blocks.0.0.weight" in state), None)
    family = _by_text(state) or (_by_unet(state, unet) if unet is not None else _by_rest(state))
    places = dict(FAMILIES[family])
    if unet is not None and "unet" in places:
        places["unet"] = Place(unet, "unet")
    text = places.get("text_encoder")
    if text and text.kind == "clip" and f"{text.prefix}embeddings.token_embedding.weight" in state:
        places["text_encoder"] = Place(text.prefix, "bare_clip")
    return family, {c: p for c, p in places.items() if any(name.startswith(p.prefix) for name in state)}


def _by_text(state: Mapping[str, np.ndarray]) -> str | None:
    """The family by the text towers, which differ most."""
    markers = {
        "conditioner.embedders.1.model.": "sdxl", "conditioner.embedders.0.transformer.": "sdxl",
        "conditioner.embedders.0.model.": "sdxl_refiner", "cond_stage_model.transformer.": "sd1",
    }  # fmt: skip
    for prefix, family in markers.items():
        if any(name.startswith(prefix) for name in state):
            return family
    if any(name.startswith("cond_stage_model.model.") for name in state):
        return "sd_x4" if "model.diffusion_model.label_emb.weight" in state else "sd2"
    return None


def _by_unet(state: Mapping[str, np.ndarray], prefix: str) -> str:
    """The family by the U-Net: 1 projects by convolutions into its transformers, the refiner has one level more."""
    if f"{prefix}label_emb.weight" in state:
        return "sd_x4"
    if f"{prefix}label_emb.0.0.weight" in state:
        table = ldm_names.unet([name.removeprefix(prefix) for name in state if name.startswith(prefix)], False)
        return "sdxl_refiner" if any(name.startswith("down_blocks.3.") for name in table) else "sdxl"
    projections = (v.ndim for name, v in state.items() if name.startswith(prefix) and name.endswith(".proj_in.weight"))
    return "sd2" if next(projections, 4) == 2 else "sd1"


def _by_rest(state: Mapping[str, np.ndarray]) -> str:
    for family, prefix in (("controlnet", "control_model."), ("sd1", "first_stage_model.")):
        if any(name.startswith(prefix) for name in state):
            return family
    some = ldm_names.listed(sorted(state), 3) or "none at all"
    raise InputError(f"this is no checkpoint of Stable Diffusion that is known; its weights are {some}")


def _unwrapped(state: Mapping[str, np.ndarray]) -> State:
    inside = {n.removeprefix("state_dict."): v for n, v in state.items() if n.startswith("state_dict.")}
    return inside or dict(state)


def _averaged(unet: State, places: Mapping[str, Place], extras: State) -> tuple[State, State]:
    """The U-Net with the averages in the place of its weights, and the extras without them."""
    prefix = places["unet"].prefix.removeprefix("model.") if "unet" in places else ""
    names = {name: f"model_ema.{(prefix + name).replace('.', '')}" for name in unet}
    lost = sorted(there for there in names.values() if there not in extras)
    if lost or not names:
        raise InputError(f"there are no averages (ema) of the weights in it: it lacks {ldm_names.listed(lost, 2)}")
    rest = {name: value for name, value in extras.items() if not name.startswith("model_ema.")}
    return {name: extras[there] for name, there in names.items()}, rest


# Layouts --------------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A layout. here: weights there -> (weights here, extras there); there: (weights here, extras) -> weights there."""

    here: Callable[[State], tuple[State, State]]
    there: Callable[[State, State], State]


def _by_table(table: Callable[[Collection[str], bool], dict[str, str]]) -> Kind:
    return Kind(
        lambda state: (ldm_names.renamed(state, ldm_names.turned(table(state, False))), {}),
        lambda state, _: ldm_names.renamed(state, table(state, True)),
    )


def _penultimate_here(state: State) -> tuple[State, State]:
    """OpenCLIP without its last layer and its projection, which are extras."""
    last = f"{ldm_names.RESBLOCKS}.{ldm_names.clip_layers(state) - 1}."
    more = {n: v for n, v in state.items() if n.startswith(last) or n == "text_projection"}
    return ldm_names.open_clip_here({n: v for n, v in state.items() if n not in more}), more


def _penultimate_there(state: State, extras: State) -> State:
    """With a last layer of zeros where the extras have none."""
    state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    found, n = ldm_names.open_clip_there(state), ldm_names.clip_layers(state)
    if n and not any(name.startswith(f"{ldm_names.RESBLOCKS}.{n}.") for name in extras):
        layer = f"{ldm_names.RESBLOCKS}.{n - 1}."
        ours = {name: value for name, value in found.items() if name.startswith(layer)}
        found |= {name.replace(layer, f"{ldm_names.RESBLOCKS}.{n}."): np.zeros_like(v) for name, v in ours.items()}
    return found


def _open_clip_there(state: State, _: State) -> State:
    return ldm_names.open_clip_there({n: v for n, v in state.items() if not n.endswith("position_ids")})


def _clip(prefix: str) -> Kind:
    """transformers' own names, without `prefix` there; a projection, which only some tools write, is not used."""

    def here(state: State) -> tuple[State, State]:
        more = {name: value for name, value in state.items() if name.startswith("text_projection")}
        found = {prefix + name: value for name, value in state.items() if name not in more}
        lost = sorted(name for name in found if not name.startswith("text_model."))
        if lost:
            raise InputError(f"weights that this model does not have: {ldm_names.listed(lost)}")
        return found, more

    return Kind(here, lambda state, _: {name.removeprefix(prefix): value for name, value in state.items()})


KINDS = {
    "unet": _by_table(ldm_names.unet),
    "controlnet": _by_table(ldm_names.controlnet),
    "vae": Kind(lambda state: (ldm_names.vae_here(state), {}), lambda state, _: ldm_names.vae_there(state)),
    "clip": _clip(""),
    "bare_clip": _clip("text_model."),
    "open_clip": Kind(lambda state: (ldm_names.open_clip_here(state), {}), _open_clip_there),
    "open_clip_penultimate": Kind(_penultimate_here, _penultimate_there),
}
