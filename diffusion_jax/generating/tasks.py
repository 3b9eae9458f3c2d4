"""Which of the uses of `systems.stable_diffusion` the options ask for, as one function of arrays.

A model says by the input of its U-Net what it is for: the latent alone, or beside it a mask and a masked picture, the
picture to be edited, or the picture to be enlarged. One for enlarging or refining may follow in the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from diffusion_jax import samplers
from diffusion_jax.generating.loading import Loaded
from diffusion_jax.ops import fold, normal_like
from diffusion_jax.systems import stable_diffusion as sd
from diffusion_jax.typing import Array, InputError, Key, Params, Sampler

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "dpmpp_2m": samplers.dpmpp_2m,
    "ddim": samplers.ddim,
    "euler": samplers.euler,
    "heun": samplers.heun,
    "unipc": samplers.unipc,
    "deis": samplers.deis,
    "dpmpp_3m": samplers.dpmpp_3m,
    "euler_ancestral": samplers.euler_ancestral,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "ddpm": samplers.ddpm,
}


class Stage(NamedTuple):
    """What one model is asked for: prompt, what to stay away from, and the times of its part of the way."""

    prompt: sd.Prompt
    negative: sd.Prompt
    times: Array


class Common(NamedTuple):
    """What all pictures share. stages: by name, "main" and perhaps "refiner", "upscaler".

    pictures: "init" and "control", each f32[1, h, w, 3], and "mask". numbers: the options of that name, f32[].
    """

    stages: Mapping[str, Stage]
    pictures: Mapping[str, Array]
    numbers: Mapping[str, Array]


def chosen_use(options: Mapping[str, Any], loaded: Mapping[str, Loaded]) -> Use:
    """The use that fits options and models; InputError for a model that cannot do what is asked."""
    main, marked = loaded["main"], bool(options["mask"] or options["expand"])
    _check_kinds(options, loaded, marked)
    kind: str = main.kind
    if kind == "plain":
        kind = "blending" if marked else "image" if options["init"] else "refined" if "refiner" in loaded else "text"
    return partial(_then_enlarged, USES[kind]) if "upscaler" in loaded else USES[kind]


def _check_kinds(options: Mapping[str, Any], loaded: Mapping[str, Loaded], marked: bool) -> None:
    kind = loaded["main"].kind
    if kind == "inpainting" and not marked:
        raise InputError("this model is for inpainting: give init= and mask= (or expand=)")
    if kind in ("editing", "upscaling") and not options["init"]:
        raise InputError(f"this model is for {kind}: give init=, the picture to begin with")
    if kind in ("editing", "upscaling") and marked:
        raise InputError(f"mask= and expand= are not for a model for {kind}")
    if "refiner" in loaded and (options["init"] or kind != "plain" or options["control"]):
        raise InputError(
            "refiner= goes on from what was drawn from a text alone: give no init= and no control= with it"
        )
    if "upscaler" in loaded and loaded["upscaler"].kind != "upscaling":
        raise InputError(f"upscale={options['upscale']}: this model is not one for upscaling")


def request(common: Common, name: str, noise: Array) -> sd.Request:
    """What the model of a stage is asked for."""
    stage = common.stages[name]
    return sd.Request(stage.prompt, stage.negative, common.numbers["guidance"], stage.times, noise)


Use = Callable[["Parts", Key, Common, Array], Array]
"""(parts, keys, common, noise) -> pictures f32[b, H, W, 3]."""


class Parts(NamedTuple):
    """The models of a program, with their parameters and samplers, by stage."""

    loaded: Mapping[str, Loaded]
    params: Mapping[str, Params]
    samplers: Mapping[str, Sampler]

    def of(self, name: str) -> tuple[sd.Model, Params, Sampler]:
        return self.loaded[name].model, self.params[name], self.samplers[name]


def _control(common: Common) -> sd.Control | None:
    if "control" not in common.pictures:
        return None
    return sd.Control((common.pictures["control"] + 1) / 2, common.numbers["control_scale"])


def _text(parts: Parts, keys: Key, common: Common, noise: Array) -> Array:
    model, params, sampler = parts.of("main")
    return sd.text_to_image(model, params, keys, request(common, "main", noise), sampler, _control(common))


def _refined(parts: Parts, keys: Key, common: Common, noise: Array) -> Array:
    models, params, chosen = zip(*(parts.of(name) for name in ("main", "refiner")), strict=True)
    asked = request(common, "main", noise), request(common, "refiner", noise)
    return sd.text_to_image_refined(models, params, keys, asked, chosen)


def _image(parts: Parts, keys: Key, common: Common, noise: Array) -> Array:
    model, params, sampler = parts.of("main")
    asked, init = request(common, "main", noise), common.pictures["init"]
    return sd.image_to_image(model, params, keys, asked, sampler, init, _control(common))


def _inpaint(parts: Parts, keys: Key, common: Common, noise: Array, *, own: bool) -> Array:
    model, params, sampler = parts.of("main")
    asked, (init, mask) = request(common, "main", noise), (common.pictures[name] for name in ("init", "mask"))
    whole, control = common.numbers["strength"] >= 1, _control(common)
    return sd.inpaint(model, params, keys, asked, sampler, init, mask, whole=whole, own=own, control=control)


def _edit(parts: Parts, keys: Key, common: Common, noise: Array) -> Array:
    model, params, sampler = parts.of("main")
    asked, init = request(common, "main", noise), common.pictures["init"]
    return sd.edit(model, params, keys, asked, sampler, init, common.numbers["image_guidance"])


def _upscale(parts: Parts, keys: Key, common: Common, noise: Array, *, name: str = "main") -> Array:
    model, params, sampler = parts.of(name)
    asked, init = request(common, name, noise), common.pictures["init"]
    return sd.upscale(model, params, keys, asked, sampler, init, common.numbers["noise_level"])


def _then_enlarged(first: Use, parts: Parts, keys: Key, common: Common, noise: Array) -> Array:
    x = first(parts, fold(keys, 0), common, noise)
    fresh = normal_like(fold(keys, 1), jnp.zeros((*x.shape[:3], parts.loaded["upscaler"].model.channels)))
    return _upscale(parts, fold(keys, 2), common._replace(pictures={"init": x}), fresh, name="upscaler")


USES: dict[str, Use] = {
    "text": _text,
    "refined": _refined,
    "image": _image,
    "blending": partial(_inpaint, own=False),
    "inpainting": partial(_inpaint, own=True),
    "editing": _edit,
    "upscaling": _upscale,
}
