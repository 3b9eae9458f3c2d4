"""Every network of Stable Diffusion equals diffusers' and transformers' when it has the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, VQModel
from safetensors.numpy import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_jax.nets import (
    clip_text,
    clip_vit_l_text,
    controlnet,
    count,
    openclip_g_text,
    openclip_h_text,
    sd2,
    sd2_controlnet,
    sd15,
    sd15_controlnet,
    sd_x4_upscaler,
    sdxl,
    sdxl_controlnet,
    sdxl_refiner,
    text_unet,
    vq_autoencoder,
)
from diffusion_jax.nets.controlnet import scaled
from diffusion_jax.nets.discriminator import patch_discriminator
from diffusion_jax.weights import autoencoder as autoencoder_weights
from diffusion_jax.weights import trees
from diffusion_jax.weights.clip import text_from_transformers, text_to_transformers
from diffusion_jax.weights.text_unet import from_diffusers, to_diffusers

torch.set_num_threads(1)
BOUND = 1e-5
"""The largest difference against the standard deviation, or 1, in float32; 2e-6 is the most that was seen."""


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random numbers in place of those that start at zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
            elif not p.any():
                p.normal_(std=float(np.prod(p.shape[1:])) ** -0.5)
    return model.eval()


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def like(net: Any) -> Any:
    return jax.eval_shape(net.init, jax.random.key(0))


def first(x: np.ndarray | jax.Array) -> torch.Tensor:
    """Channels first, for torch."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def close(ours: Any, theirs: torch.Tensor, *, pixels: bool = True) -> None:
    reference = theirs.detach().numpy()
    reference = np.moveaxis(reference, 1, -1) if pixels else reference
    assert 0.05 < np.std(reference) < 20
    error = float(np.max(np.abs(np.asarray(ours) - reference)) / max(1.0, float(np.std(reference))))
    assert error < BOUND, error


# Text towers ---------------------------------------------------------------------------------------------------------

TOWER: dict[str, Any] = {"width": 16, "depth": 3, "heads": 2, "mlp": 24, "vocab": 60, "length": 12}
IDS = np.array([[57, 3, 9, 58, 58, 58, 58], [57, 7, 58, 58, 58, 0, 0], [57, 59, 9, 8, 7, 6, 58]])


def text_peer(kind: type, *, act: str, eos: int, n_out: int = 6) -> Any:
    config = CLIPTextConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=60,
        max_position_embeddings=12, hidden_act=act, projection_dim=n_out, bos_token_id=57, eos_token_id=eos,
    )  # fmt: skip
    return shaken(kind(config))


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 58), ("gelu", 58), ("quick_gelu", 2)])
def test_text_towers(act, eos):
    """Also with the old configuration whose end of text is 2, which stands for the highest id of a text."""
    model, ids = text_peer(CLIPTextModelWithProjection, act=act, eos=eos), IDS[:2] if eos == 2 else IDS
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), output_hidden_states=True)
    last = clip_text(**TOWER, act=act, n_out=6, eos=58)
    params = text_from_transformers(state_of(model), like(last))
    states = jax.jit(last.apply)(params, jnp.asarray(ids, jnp.int32))
    close(states.hidden, theirs.last_hidden_state, pixels=False)
    close(states.pooled, theirs.text_embeds, pixels=False)
    for layer in (-2, -3):
        earlier = clip_text(**TOWER, act=act, n_out=6, layer=layer, normed=False)
        hidden = jax.jit(earlier.apply)(params, jnp.asarray(ids, jnp.int32)).hidden
        close(hidden, theirs.hidden_states[layer], pixels=False)


def test_text_tower_without_a_projection_from_its_file_and_back(tmp_path):
    model = text_peer(CLIPTextModel, act="quick_gelu", eos=58)
    model.save_pretrained(tmp_path)
    ours = clip_text(**TOWER, eos=58)
    params = text_from_transformers(load_file(tmp_path / "model.safetensors"), like(ours))
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS))
    states = jax.jit(ours.apply)(params, jnp.asarray(IDS, jnp.int32))
    close(states.hidden, theirs.last_hidden_state, pixels=False)
    close(states.pooled, theirs.pooler_output, pixels=False)
    again = text_from_transformers(text_to_transformers(params), params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


# U-Nets --------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"widths": (8, 16), "blocks": 1, "attends": (True, False), "heads": 2, "groups": 4, "tokens": 6}
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "Stable Diffusion 1": (SMALL, (8, 8)),
    "two blocks, deep": (SMALL | {"blocks": 2, "depths": 2, "heads": (2, 4)}, (4, 8)),
    "odd sizes": (SMALL | {"widths": (8, 8, 16), "attends": (True, True, False), "heads": (2, 4, 2)}, (7, 9)),
    "Stable Diffusion 2": (SMALL | {"linear_projection": True, "heads": (2, 4)}, (8, 8)),
    "inpainting": (SMALL | {"image": 5}, (8, 8)),
    "InstructPix2Pix": (SMALL | {"image": 4}, (8, 6)),
    "XL": (
        SMALL | {"widths": (8, 8, 16), "attends": (False, True, True), "depths": (1, 2, 3), "heads": (1, 2, 4),
                 "linear_projection": True, "vector": 5, "sizes": 6}, (8, 8),
    ),
    "XL's refiner": (
        SMALL | {"widths": (8, 16, 16), "attends": (False, True, False), "depths": 2, "heads": (1, 2, 4),
                 "linear_projection": True, "vector": 5, "sizes": 5}, (8, 8),
    ),
    "upscaler": (
        SMALL | {"attends": (False, True), "only_cross": (True, False), "linear_projection": True, "classes": 7,
                 "image": 3}, (8, 8),
    ),
    "upscaler, the other way": (
        SMALL | {"attends": (True, True), "only_cross": (True, False), "classes": 7, "image": 3}, (5, 6),
    ),
}  # fmt: skip


def theirs_of(a: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of diffusers' modules from ours."""
    levels = len(a["widths"])
    heads, depths = (list(v) if isinstance(v, tuple) else [v] * levels for v in (a.get("heads", 8), a.get("depths", 1)))
    added = a.get("vector", 0) + 256 * a.get("sizes", 0)
    return {
        "in_channels": 4 + a.get("image", 0), "block_out_channels": a["widths"], "layers_per_block": a["blocks"],
        "down_block_types": tuple("CrossAttnDownBlock2D" if x else "DownBlock2D" for x in a["attends"]),
        "attention_head_dim": heads, "transformer_layers_per_block": depths, "norm_num_groups": a.get("groups", 32),
        "cross_attention_dim": a.get("tokens", 768), "use_linear_projection": a.get("linear_projection", False),
        "addition_embed_type": "text_time" if added else None, "addition_time_embed_dim": 256 if added else None,
        "projection_class_embeddings_input_dim": added or None, **more,
    }  # fmt: skip


def unet_peer(a: dict[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **theirs_of(
            a, sample_size=8, out_channels=4, num_class_embeds=a.get("classes"),
            up_block_types=tuple("CrossAttnUpBlock2D" if x else "UpBlock2D" for x in reversed(a["attends"])),
            only_cross_attention=list(a.get("only_cross", [False] * len(a["widths"]))),
        )
    )  # fmt: skip


def inputs(a: dict[str, Any], size: tuple[int, int], batch: int = 2) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    cond: dict[str, Any] = {"tokens": normal(batch, 5, a["tokens"])}
    if "image" in a:
        cond["image"] = normal(batch, *size, a["image"])
    if "classes" in a:
        cond["label"] = np.arange(2, 2 + batch, dtype=np.int32)
    if "vector" in a:
        cond["vector"] = normal(batch, a["vector"])
        cond["sizes"] = np.float32(
            [[1024, 768, 0, 64, 1024, 512][: a["sizes"]], [512, 512, 32, 0, 6, 2.5][: a["sizes"]]]
        )
    return normal(batch, *size, 4), np.float32([3, 977][:batch]), cond


def call(model: torch.nn.Module, x: np.ndarray, t: np.ndarray, cond: dict[str, Any], **more: Any) -> Any:
    added = {"text_embeds": torch.from_numpy(cond["vector"]), "time_ids": torch.from_numpy(cond["sizes"])} if (
        "vector" in cond
    ) else None  # fmt: skip
    beside = [first(x), first(cond["image"])] if "image" in cond else [first(x)]
    labels = torch.from_numpy(cond["label"]) if "label" in cond else None
    with torch.no_grad():
        return model(
            torch.cat(beside, 1), torch.from_numpy(t), torch.from_numpy(cond["tokens"]), class_labels=labels,
            added_cond_kwargs=added, **more,
        )  # fmt: skip


@pytest.mark.parametrize(("arguments", "size"), CASES.values(), ids=CASES)
def test_unets(arguments, size):
    model, net = shaken(unet_peer(arguments)), text_unet(**arguments)
    state = state_of(model)
    params = from_diffusers(state, like(net))
    x, t, cond = inputs(arguments, size)
    close(jax.jit(net.apply)(params, x, t, cond), call(model, x, t, cond).sample)
    back = to_diffusers(params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_tokens_may_be_masked():
    arguments, size = CASES["Stable Diffusion 1"]
    model, net = shaken(unet_peer(arguments)), text_unet(**arguments)
    x, t, cond = inputs(arguments, size)
    mask = np.array([[True, True, False, True, False], [True] * 5])
    theirs = call(model, x, t, cond, encoder_attention_mask=torch.from_numpy(mask)).sample
    params = from_diffusers(state_of(model), like(net))
    close(jax.jit(net.apply)(params, x, t, cond | {"tokens_mask": mask}), theirs)


def test_unet_from_its_file(tmp_path):
    arguments, size = CASES["XL"]
    model, net = shaken(unet_peer(arguments)), text_unet(**arguments)
    model.save_pretrained(tmp_path)
    params = from_diffusers(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), like(net))
    x, t, cond = inputs(arguments, size)
    close(jax.jit(net.apply)(params, x, t, cond), call(model, x, t, cond).sample)


@pytest.mark.parametrize("kind", ["Stable Diffusion 1", "XL", "odd sizes"])
def test_controlnet_and_the_unet_it_controls(kind):
    arguments, size = CASES[kind]
    hints = (4, 6, 8)
    model, unet_model = (
        shaken(ControlNetModel(**theirs_of(arguments, conditioning_embedding_out_channels=hints))),
        shaken(unet_peer(arguments)),
    )
    net, unet = controlnet(**arguments, hints=hints), text_unet(**arguments)
    state = state_of(model)
    params, unet_params = from_diffusers(state, like(net)), from_diffusers(state_of(unet_model), like(unet))
    x, t, cond = inputs(arguments, size)
    picture = np.random.default_rng(1).uniform(size=(2, 4 * size[0], 4 * size[1], 3)).astype(np.float32)
    down, middle = call(model, x, t, cond, controlnet_cond=first(picture), conditioning_scale=0.7, return_dict=False)
    residuals = scaled(jax.jit(net.apply)(params, x, t, cond | {"image": picture}), 0.7)
    for ours, theirs in zip(residuals, (*down, middle), strict=True):
        close(ours, theirs)
    controlled = call(
        unet_model, x, t, cond, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    close(jax.jit(unet.apply)(unet_params, x, t, cond | {"residuals": residuals}), controlled)
    back = to_diffusers(params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


# Codebook ------------------------------------------------------------------------------------------------------------


def vq_peer(*, widths, blocks, channels, latent, codes, code_width, groups) -> VQModel:
    return VQModel(
        in_channels=channels, out_channels=channels, latent_channels=latent, layers_per_block=blocks,
        block_out_channels=widths, norm_num_groups=groups, num_vq_embeddings=codes, vq_embed_dim=code_width,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip


def test_codebook():
    arguments = {"widths": (8, 16), "blocks": 1, "channels": 3, "latent": 4, "codes": 12, "code_width": 3, "groups": 4}
    model, ours = shaken(vq_peer(**arguments)), vq_autoencoder(**arguments)
    x = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    with torch.no_grad():
        h = model.encode(first(x)).latents
        near = torch.movedim(h, 1, -1).reshape(-1, 3)[::4]
        model.quantize.embedding.weight.copy_(near + 0.02 * torch.randn_like(near))  # all of them are in use
        z, loss, (_, _, ids) = model.quantize(h)
        decoded = model.decode(h).sample
    state = state_of(model)
    params = autoencoder_weights.from_diffusers(state, like(ours))
    q = ours.quantize(params, jax.jit(ours.encode)(params, x))
    close(jax.jit(ours.encode)(params, x), h)
    np.testing.assert_array_equal(np.ravel(q.ids), ids.numpy())
    assert len(np.unique(q.ids)) > 6
    close(q.z, z)
    np.testing.assert_allclose(np.mean(q.codebook + model.quantize.beta * q.commitment), loss.numpy(), rtol=1e-5)
    close(jax.jit(ours.decode)(params, q.z), decoded)
    back = autoencoder_weights.to_diffusers(params)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


# Discriminator -------------------------------------------------------------------------------------------------------


def test_discriminator():
    """Against torch's own layers, put together from the paper."""
    torch.manual_seed(0)
    pad, act = torch.nn.ZeroPad2d((1, 2, 1, 2)), torch.nn.LeakyReLU(0.2)
    layers = [
        torch.nn.Conv2d(3, 8, 4, 2, 1), act,
        torch.nn.Conv2d(8, 16, 4, 2, 1), torch.nn.GroupNorm(1, 16), act,
        pad, torch.nn.Conv2d(16, 32, 4), torch.nn.GroupNorm(1, 32), act,
        pad, torch.nn.Conv2d(32, 1, 4),
    ]  # fmt: skip
    model = shaken(torch.nn.Sequential(*layers))
    net = patch_discriminator(3, width=8, depth=2)
    names = {"0": "convs.0", "2": "convs.1", "3": "norms.0", "6": "convs.2", "7": "norms.1", "10": "out"}
    state = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value for name, value in state_of(model).items()}
    params = trees.read(state, like(net), trees.same_names)
    x = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(first(x))
    close(jax.jit(net.apply)(params, x, np.zeros(2, np.float32)).logits[..., None], theirs)


# Published sizes -----------------------------------------------------------------------------------------------------

SD15: dict[str, Any] = {"widths": (320, 640, 1280, 1280), "blocks": 2, "attends": (True, True, True, False)}
SD2: dict[str, Any] = SD15 | {"heads": (5, 10, 20, 20), "tokens": 1024, "linear_projection": True}
SDXL: dict[str, Any] = {
    "widths": (320, 640, 1280), "blocks": 2, "attends": (False, True, True), "depths": (1, 2, 10), "heads": (5, 10, 20),
    "tokens": 2048, "linear_projection": True, "vector": 1280, "sizes": 6,
}  # fmt: skip
REFINER: dict[str, Any] = {
    "widths": (384, 768, 1536, 1536), "blocks": 2, "attends": (False, True, True, False), "depths": 4,
    "heads": (6, 12, 24, 24), "tokens": 1280, "linear_projection": True, "vector": 1280, "sizes": 5,
}  # fmt: skip
UPSCALER: dict[str, Any] = {
    "widths": (256, 512, 512, 1024), "blocks": 2, "attends": (False, True, True, True), "tokens": 1024, "image": 3,
    "only_cross": (True, True, True, False), "linear_projection": True, "classes": 1000,
}  # fmt: skip
TOWERS = {
    clip_vit_l_text: (CLIPTextModel, 768, 12, 12, "quick_gelu"),
    openclip_h_text: (CLIPTextModel, 1024, 23, 16, "gelu"),
    openclip_g_text: (CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
}


def same_weights(net: Any, model: torch.nn.Module) -> None:
    """Names, shapes and the number of all weights, without any of them in memory."""
    ours = {
        (leaf := trees.required(trees.same_names, path)).name: leaf.there(
            np.broadcast_to(np.float32(0), value.shape)
        ).shape
        for path, value in trees.leaves(like(net))
    }
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if not any(name.startswith("text_model.") for name in theirs):
        ours = {name.removeprefix("text_model."): shape for name, shape in ours.items()}
    assert ours == theirs
    assert count(like(net)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (sd15, SD15),
        (lambda: sd15(image=5), SD15 | {"image": 5}),
        (lambda: sd15(image=4), SD15 | {"image": 4}),
        (sd2, SD2),
        (lambda: sd2(image=5), SD2 | {"image": 5}),
        (sdxl, SDXL),
        (sdxl_refiner, REFINER),
        (sd_x4_upscaler, UPSCALER),
    ],
    ids=["1", "1 inpainting", "1 InstructPix2Pix", "2", "2 inpainting", "XL", "XL's refiner", "upscaler"],
)
def test_published_unets_have_the_same_weights(make, arguments):
    with torch.device("meta"):
        model = unet_peer(arguments)
    same_weights(make(), model)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(sd15_controlnet, SD15), (sd2_controlnet, SD2), (sdxl_controlnet, SDXL)],
    ids=["1", "2", "XL"],
)
def test_published_controlnets_have_the_same_weights(make, arguments):
    with torch.device("meta"):
        model = ControlNetModel(**theirs_of(arguments))
    same_weights(make(), model)


@pytest.mark.parametrize("make", TOWERS, ids=["L", "H", "bigG"])
def test_published_towers_have_the_same_weights(make):
    kind, width, depth, heads, act = TOWERS[make]
    config = CLIPTextConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        hidden_act=act, projection_dim=1280,
    )  # fmt: skip
    with torch.device("meta"):
        model = kind(config)
    same_weights(make(), model)


def test_published_codebook_has_the_same_weights():
    with torch.device("meta"):
        model = vq_peer(widths=(128, 256, 512), blocks=2, channels=3, latent=3, codes=8192, code_width=None, groups=32)
    same_weights(vq_autoencoder(), model)
