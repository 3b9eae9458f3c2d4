"""Stable Diffusion and its kin: a text becomes a condition, noise becomes a latent, the latent a picture.

With text encoders T, an autoencoder (E, D) of scale c and a denoiser of latents, each use is one chain of

    z(x) = c E x,   x = D(z / c)                                                                                 (1)
    text to image      z_T = noise, sampled with guidance from T(negative) to T(prompt)                          (2)
    image to image     z_t = alpha_t z(x) + sigma_t noise, and from there on as in (2)                           (3)
    inpainting         (2) or (3), and after each step to s, with mask m = 1 where something new is wanted,
                       z_s <- m z_s + (1 - m) (alpha_s z(x) + sigma_s noise)                                     (4)
      by its own U-Net (2) or (3), the network seeing (m, z((1 - m) x)) beside z_t                               (5)
    upscaling          (2), the network seeing x, noised to a level of its own, beside z_t                       (6)
    editing            (2), the network seeing E x beside z_t, with guidance over the text and over x            (7)
    control            any of these, another network adding to the U-Net's skips what it sees in a picture       (8)

(1) to (5) Rombach et al. 2022, arXiv:2112.10752; (3) Meng et al. 2021, arXiv:2108.01073; SDXL's conditions Podell et
al. 2023, arXiv:2307.01952, section 2.2; (7) Brooks et al. 2023, arXiv:2211.09800, eq. 3; (8) Zhang et al. 2023,
arXiv:2302.05543. Whatever is not a shape or a sampler is an array: seed, scale, strength and, up to the length of
the grid, the times, so that none of them compiles anew; `fill` makes grids of several lengths one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import discrete_time, parameterize
from diffusion_jax.forward import q_sample
from diffusion_jax.guidance import classifier_free, two_conditions
from diffusion_jax.nets.autoencoder import Autoencoder
from diffusion_jax.nets.clip import TextEncoder
from diffusion_jax.ops import fold, is_concrete, normal_like
from diffusion_jax.predictions import Predicts
from diffusion_jax.samplers import sample, skipping
from diffusion_jax.text.prompts import weighted
from diffusion_jax.typing import Array, Denoise, Denoiser, InputError, Key, Net, Params, Sampler, Schedule

BUCKETS = (1, 2, 4, 8, 12, 16, 20, 25, 30, 40, 50, 75, 100, 150, 200, 250, 500, 1000)
"""Lengths of grids that are compiled for; a shorter one is filled up."""


class Model(NamedTuple):
    """The networks of a model and how they speak to each other; its parameters are {name of a network: its own}.

    texts: the text encoders by name, in the order in which their token states are joined. control: a ControlNet.
    table: noise levels the schedule was trained on. scale: c of (1). factor: pixels a latent is wide.
    pooled: the text as a whole, by the last encoder, is a condition too. noised: the schedule of (6)'s own noise.
    """

    texts: Mapping[str, TextEncoder]
    unet: Net
    vae: Autoencoder
    schedule: Schedule
    predicts: Predicts = "eps"
    table: int = 1000
    scale: float = 0.18215
    factor: int = 8
    channels: int = 4
    pooled: bool = False
    noised: Schedule | None = None
    control: Net | None = None


class Prompt(NamedTuple):
    """What b pictures should show: by text encoder, ids i32[b, chunks, n] and how much each token counts, f32 likewise.

    sizes: f32[b, k], the numbers that SDXL is told of a picture: the height and width it had, top and left of what was
    cut out of it, and its height and width; its refiner takes an aesthetic score for the last two.
    """

    ids: Mapping[str, Array]
    weights: Mapping[str, Array]
    sizes: Array | None = None


class Request(NamedTuple):
    """What is asked for: b pictures of `prompt` and against `negative`, by so much guidance: f32[] or f32[b].

    One prompt may stand for all pictures, as may one picture where there are some in a use; either leads with 1 then.
    times: f32[n + 1], falling from where to start, filled up with the last one. noise: f32[b, h, w, c] latents.
    """

    prompt: Prompt
    negative: Prompt
    guidance: Array
    times: Array
    noise: Array


class Control(NamedTuple):
    """Equation (8): image f32[b, H, W, 3] with pixels in [0, 1], and how much it counts, f32[]."""

    image: Array
    scale: Array


def text_to_image(
    model: Model, params: Params, key: Key, request: Request, sampler: Sampler, control: Control | None = None
) -> Array:
    """Equation (2): pictures f32[b, H, W, 3], pixels in [-1, 1]. The key drives a stochastic sampler alone."""
    z = latents(model, params, key, request, request.noise, sampler, control=control)
    return decode(model, params, z)


def text_to_image_refined(
    models: tuple[Model, Model], params: tuple[Params, Params], key: Key, requests: tuple[Request, Request],
    samplers: tuple[Sampler, Sampler],
) -> Array:  # fmt: skip
    """Equation (2) by two models of one space of latents, the second of which takes over where the times of the first
    end (Podell et al. 2023, section 2.5)."""
    z = latents(models[0], params[0], fold(key, 0), requests[0], requests[0].noise, samplers[0])
    z = latents(models[1], params[1], fold(key, 1), requests[1], z, samplers[1])
    return decode(models[1], params[1], z)


def image_to_image(
    model: Model, params: Params, key: Key, request: Request, sampler: Sampler, image: Array,
    control: Control | None = None,
) -> Array:  # fmt: skip
    """Equation (3) for an image f32[b, H, W, 3]; the first time says how much of it is left."""
    z0 = _for_all(encode(model, params, image), request)
    start = q_sample(model.schedule, z0, request.times[0], request.noise)
    return decode(model, params, latents(model, params, key, request, start, sampler, control=control))


def inpaint(
    model: Model, params: Params, key: Key, request: Request, sampler: Sampler, image: Array, mask: Array,
    *, whole: Array, own: bool = False, control: Control | None = None,
) -> Array:  # fmt: skip
    """New content for the pixels of an image where mask: f32[b, H, W, 1] is 1, by (4); by (5) if the U-Net is its own.

    whole: bool[], start from noise alone; otherwise from the image as in (3).
    """
    z0, m = (_for_all(z, request) for z in (encode(model, params, image), shrink(mask, model.factor)))
    start = jnp.where(whole, request.noise, q_sample(model.schedule, z0, request.times[0], request.noise))
    if own:
        known = encode(model, params, image * (mask < 0.5).astype(image.dtype))
        seen = jnp.concatenate([m, _for_all(known, request)], axis=-1)
        z = latents(model, params, key, request, start, sampler, {"image": seen}, control=control)
    else:
        blended = blend(sampler, model.schedule, z0, m, request.noise)
        z = latents(model, params, key, request, start, blended, control=control)
        z = m * z + (1 - m) * z0
    return decode(model, params, z)


def upscale(
    model: Model, params: Params, key: Key, request: Request, sampler: Sampler, image: Array, level: Array
) -> Array:
    """Equation (6): image f32[b, h, w, 3], noised to `level`, i32[] of its schedule's table, `factor` times as large.

    Latents are as large as the image.
    """
    if model.noised is None:
        raise ValueError("upscale: the model has no schedule for the noise of what it enlarges")
    image = _for_all(image, request)
    t = (level.astype(jnp.float32) + 1) / model.table
    seen = q_sample(model.noised, image, t, normal_like(fold(key, 1), image))
    more = {"image": seen, "label": jnp.broadcast_to(level.astype(jnp.int32), image.shape[:1])}
    return decode(model, params, latents(model, params, fold(key, 0), request, request.noise, sampler, more))


def edit(
    model: Model, params: Params, key: Key, request: Request, sampler: Sampler, image: Array, image_guidance: Array
) -> Array:
    """Equation (7): the image changed as the prompt says; `image_guidance` is how much of it should be kept."""
    seen = _for_all(model.vae.encode(params["vae"], image).mean, request)
    cond, null = conditions(model, params, request, {"image": seen})
    bare = denoiser(model, params)
    nothing = {**null, "image": jnp.zeros_like(seen)}
    guided = two_conditions(bare, null, nothing, request.guidance, image_guidance)
    z = sample(key, skipping(sampler), guided, request.noise, _falling(request.times), cond)
    return decode(model, params, z)


def latents(
    model: Model, params: Params, key: Key, request: Request, start: Array, sampler: Sampler,
    more: Mapping[str, Array] | None = None, *, control: Control | None = None,
) -> Array:  # fmt: skip
    """The latents f32[b, h, w, c] that a sampler comes to from `start` along the times of the request.

    more: further entries of the condition, the same with and without the prompt.
    """
    cond, null = conditions(model, params, request, {} if more is None else more)
    bare = denoiser(model, params, control)
    guided = classifier_free(bare, null, request.guidance)
    return sample(key, skipping(sampler), guided, start, _falling(request.times), cond)


def conditions(model: Model, params: Params, request: Request, more: Mapping[str, Array]) -> tuple[dict, dict]:
    """The U-Net's condition with the prompt, and with the negative one; see `nets.text_unet` for the entries."""

    def entries(prompt: Prompt) -> dict[str, Array]:
        encoded = encode_prompt(model, params, prompt)
        return {name: _for_all(value, request) for name, value in {**encoded, **more}.items()}

    return entries(request.prompt), entries(request.negative)


def encode_prompt(model: Model, params: Params, prompt: Prompt) -> dict[str, Array]:
    """{"tokens": f32[b, chunks n, d]}, and for SDXL {"vector": f32[b, d'], "sizes": f32[b, k]}.

    Each chunk is read by itself; the token states of the encoders are joined along the channels. The text as a whole
    is that of the first chunk.
    """
    hidden, pooled = [], []
    for name, encoder in model.texts.items():
        ids, weights = prompt.ids[name], prompt.weights[name]
        b, chunks, n = ids.shape
        states = encoder.apply(params[name], jnp.reshape(ids, (b * chunks, n)))
        tokens = jnp.reshape(states.hidden, (b, chunks * n, -1))
        hidden.append(weighted(tokens, jnp.reshape(weights, (b, chunks * n)), keep_mean=not model.pooled))
        pooled.append(jnp.reshape(states.pooled, (b, chunks, -1))[:, 0])
    found = {"tokens": jnp.concatenate(hidden, axis=-1)}
    if model.pooled:
        found["vector"] = pooled[-1]
    if prompt.sizes is not None:
        found["sizes"] = prompt.sizes
    return found


def encode(model: Model, params: Params, image: Array) -> Array:
    """z(x) of equation (1) by the mean of the autoencoder's Gaussian: f32[b, H, W, 3] -> f32[b, h, w, c]."""
    return model.scale * model.vae.encode(params["vae"], image).mean


def decode(model: Model, params: Params, z: Array) -> Array:
    """Pictures of latents by equation (1), their pixels cut to [-1, 1]."""
    return jnp.clip(model.vae.decode(params["vae"], z / model.scale), -1, 1)


def blend(inner: Sampler, schedule: Schedule, z0: Array, mask: Array, noise: Array) -> Sampler:
    """Equation (4) after each step of `inner`: what is known comes back, always with the same noise."""

    def step(key: Key, x: Array, state: Any, t: Array, s: Array, denoise: Denoise) -> tuple[Array, Any]:
        x, state = inner.step(key, x, state, t, s, denoise)
        known = q_sample(schedule, z0, s, noise)
        return mask * x + (1 - mask) * known, state

    return Sampler(inner.init, step)


def shrink(mask: Array, factor: int) -> Array:
    """A mask of pixels as one of latents, each taking the value of the pixel at its corner, at least half being 1.

    f32[b, H, W, 1] -> f32[b, H / factor, W / factor, 1] of zeros and ones.
    """
    return (mask[:, ::factor, ::factor] >= 0.5).astype(jnp.float32)


def fill(times: np.ndarray, buckets: tuple[int, ...] = BUCKETS) -> np.ndarray:
    """Times f32[n + 1] filled up with the last one to the next length of `buckets` that holds them, plus one.

    >>> fill(np.asarray([1.0, 0.5, 0.2, 0.0])).tolist()
    [1.0, 0.5, 0.20000000298023224, 0.0, 0.0]
    """
    n = len(times) - 1
    length = next((size for size in buckets if size >= n), n)
    return np.append(times, np.full(length - n, times[-1])).astype(np.float32)


def from_strength(times: np.ndarray, strength: float) -> np.ndarray:
    """The last part of a grid for (3): of n steps the last int(n strength), the image being left alone at strength 0.

    InputError unless 0 < strength <= 1 leaves a step.
    """
    n = len(times) - 1
    left = int(n * strength) if 0 < strength <= 1 else 0
    if left < 1:
        raise InputError(f"strength={strength} leaves none of {n} steps: it is above 0, up to 1, and n strength >= 1")
    return times[n - left :]


def _falling(times: Array) -> Array:
    """Without what fills them up, where their values are known: `sample` then checks that times fall."""
    if not is_concrete(times):
        return times
    known = np.asarray(times)
    steps = np.flatnonzero(np.diff(known))
    return jnp.asarray(known[: steps[-1] + 2]) if steps.size else times


def _for_all(x: Array, request: Request) -> Array:
    """What leads with 1, for each of the pictures asked for."""
    return jnp.broadcast_to(x, (request.noise.shape[0], *x.shape[1:]))


def denoiser(model: Model, params: Params, control: Control | None = None) -> Denoiser:
    """The U-Net, and the ControlNet where there is one, as a denoiser of latents."""
    if control is None:
        net = partial(model.unet.apply, params["unet"])
        return parameterize(net, model.schedule, model.predicts, discrete_time(model.table))
    if model.control is None:
        raise ValueError("control was asked for, and the model has no ControlNet")
    helper = model.control

    def controlled(x: Array, t: Array, cond: Any) -> Array:
        image = jnp.concatenate([control.image] * (x.shape[0] // control.image.shape[0]))
        skips = helper.apply(params["controlnet"], x, t, {**cond, "image": image})
        residuals = jax.tree.map(lambda skip: control.scale * skip, skips)
        return model.unet.apply(params["unet"], x, t, {**cond, "residuals": residuals})

    return parameterize(controlled, model.schedule, model.predicts, discrete_time(model.table))
