"""The shapes of Stable Diffusion's weights by diffusers' names, of any size, and weights of these shapes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (n_out, n_in), **({f"{name}.bias": (n_out,)} if bias else {})}


def conv(name: str, n_in: int, n_out: int, width: int = 3) -> Shapes:
    return {f"{name}.weight": (n_out, n_in, width, width), f"{name}.bias": (n_out,)}


def norm(name: str, n: int) -> Shapes:
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def resnet(name: str, n_in: int, n_out: int, time: int | None) -> Shapes:
    return {
        **norm(f"{name}.norm1", n_in), **conv(f"{name}.conv1", n_in, n_out), **norm(f"{name}.norm2", n_out),
        **conv(f"{name}.conv2", n_out, n_out), **(linear(f"{name}.time_emb_proj", time, n_out) if time else {}),
        **(conv(f"{name}.conv_shortcut", n_in, n_out, 1) if n_in != n_out else {}),
    }  # fmt: skip


def transformer(name: str, n: int, depth: int, tokens: int, project_linear: bool, only_cross: bool = False) -> Shapes:
    projection = linear if project_linear else lambda name, a, b: conv(name, a, b, 1)
    shapes = {**norm(f"{name}.norm", n), **projection(f"{name}.proj_in", n, n), **projection(f"{name}.proj_out", n, n)}
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, width in (("attn1", tokens if only_cross else n), ("attn2", tokens)):
            shapes |= linear(f"{block}.{attention}.to_q", n, n, False) | linear(f"{block}.{attention}.to_out.0", n, n)
            shapes |= linear(f"{block}.{attention}.to_k", width, n, False)
            shapes |= linear(f"{block}.{attention}.to_v", width, n, False)
        for k in (1, 2, 3):
            shapes |= norm(f"{block}.norm{k}", n)
        shapes |= linear(f"{block}.ff.net.0.proj", n, 8 * n) | linear(f"{block}.ff.net.2", 4 * n, n)
    return shapes


def unet(
    widths=(8, 16), blocks=1, depths=(1, 0), tokens=8, n_in=4, n_out=4, project_linear=False, vector=None, classes=None,
    only_cross=False, middle=None, decode=True,
) -> Shapes:  # fmt: skip
    """A UNet2DConditionModel; a depth of 0 is a level without attention, only_cross is on all levels but the widest."""
    time, last = 4 * widths[0], len(widths) - 1
    shapes = {**linear("time_embedding.linear_1", widths[0], time), **linear("time_embedding.linear_2", time, time)}
    if vector:
        shapes |= linear("add_embedding.linear_1", vector, time) | linear("add_embedding.linear_2", time, time)
    if classes:
        shapes |= {"class_embedding.weight": (classes, time)}
    shapes |= conv("conv_in", n_in, widths[0])
    skips, n = [widths[0]], widths[0]
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        head = f"down_blocks.{level}"
        for j in range(blocks):
            shapes |= resnet(f"{head}.resnets.{j}", n, width, time)
            if depth:
                crossed = only_cross and width != widths[-1]
                shapes |= transformer(f"{head}.attentions.{j}", width, depth, tokens, project_linear, crossed)
            n = width
            skips.append(n)
        if level < last:
            shapes |= conv(f"{head}.downsamplers.0.conv", n, n)
            skips.append(n)
    shapes |= resnet("mid_block.resnets.0", n, n, time) | resnet("mid_block.resnets.1", n, n, time)
    depth = middle or max(depths[-1], 1)
    shapes |= transformer("mid_block.attentions.0", n, depth, tokens, project_linear)
    if not decode:
        return shapes
    for level, (width, depth) in enumerate(zip(widths[::-1], depths[::-1], strict=True)):
        head = f"up_blocks.{level}"
        for j in range(blocks + 1):
            shapes |= resnet(f"{head}.resnets.{j}", n + skips.pop(), width, time)
            if depth:
                crossed = only_cross and width != widths[-1]
                shapes |= transformer(f"{head}.attentions.{j}", width, depth, tokens, project_linear, crossed)
            n = width
        if level < last:
            shapes |= conv(f"{head}.upsamplers.0.conv", n, n)
    return {**shapes, **norm("conv_norm_out", n), **conv("conv_out", n, n_out)}


def controlnet(hints=(4, 4, 8, 8), **arguments) -> Shapes:
    """A ControlNetModel of a U-Net with the same arguments."""
    shapes = unet(**arguments, decode=False)
    widths, blocks = arguments.get("widths", (8, 16)), arguments.get("blocks", 1)
    embedding = "controlnet_cond_embedding"
    shapes |= conv(f"{embedding}.conv_in", 3, hints[0]) | conv(f"{embedding}.conv_out", hints[-1], widths[0])
    for k, (a, b) in enumerate(pairwise(hints)):
        shapes |= conv(f"{embedding}.blocks.{2 * k}", a, a) | conv(f"{embedding}.blocks.{2 * k + 1}", a, b)
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * (blocks + (level < len(widths) - 1))
    for i, width in enumerate(skips):
        shapes |= conv(f"controlnet_down_blocks.{i}", width, width, 1)
    return {**shapes, **conv("controlnet_mid_block", widths[-1], widths[-1], 1)}


def vae(widths=(8, 16), blocks=1, channels=3, latent=4) -> Shapes:
    """An AutoencoderKL."""
    shapes: Shapes = {}
    for side, ends, order, n_blocks, resizer in (
        ("encoder", (channels, 2 * latent), widths, blocks, "down"),
        ("decoder", (latent, channels), widths[::-1], blocks + 1, "up"),
    ):  # fmt: skip
        n = order[0]
        shapes |= conv(f"{side}.conv_in", ends[0], n)
        for level, width in enumerate(order):
            head = f"{side}.{resizer}_blocks.{level}"
            for j in range(n_blocks):
                shapes |= resnet(f"{head}.resnets.{j}", n, width, None)
                n = width
            if level < len(order) - 1:
                shapes |= conv(f"{head}.{resizer}samplers.0.conv", n, n)
        wide = widths[-1]
        for j in (0, 1):
            shapes |= resnet(f"{side}.mid_block.resnets.{j}", wide, wide, None)
        attention = f"{side}.mid_block.attentions.0"
        shapes |= norm(f"{attention}.group_norm", wide)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{attention}.{name}", wide, wide)
        shapes |= norm(f"{side}.conv_norm_out", n) | conv(f"{side}.conv_out", n, ends[1])
    return {**shapes, **conv("quant_conv", 2 * latent, 2 * latent, 1), **conv("post_quant_conv", latent, latent, 1)}


def text(width=8, depth=2, mlp=16, vocab=20, length=7, n_out=None) -> Shapes:
    """A CLIPTextModel, or with n_out a CLIPTextModelWithProjection."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (vocab, width),
        "text_model.embeddings.position_embedding.weight": (length, width),
    }
    for i in range(depth):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", width, mlp) | linear(f"{layer}.mlp.fc2", mlp, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    shapes |= norm("text_model.final_layer_norm", width)
    return shapes | ({"text_projection.weight": (n_out, width)} if n_out else {})


TINY = {
    "sd1": {"unet": unet(), "vae": vae(), "text_encoder": text()},
    "sd2": {"unet": unet(project_linear=True), "vae": vae(), "text_encoder": text()},
    "sd_x4": {
        "unet": unet((8, 8, 16), 2, (0, 1, 1), 12, n_in=7, project_linear=True, classes=10, only_cross=True),
        "vae": vae(), "text_encoder": text(12),
    },
    "sdxl": {
        "unet": unet((8, 8, 16), 2, (0, 2, 3), 20, project_linear=True, vector=40), "vae": vae((4, 4, 8), 2),
        "text_encoder": text(), "text_encoder_2": text(12, 3, n_out=12),
    },
    "sdxl_refiner": {
        "unet": unet((8, 8, 16, 16), 1, (0, 1, 1, 0), 12, project_linear=True, vector=40, middle=1), "vae": vae(),
        "text_encoder_2": text(12, 3, n_out=10),
    },
    "controlnet": {"controlnet": controlnet()},
    "vae": {"vae": vae((4, 8, 8), 2)},
}  # fmt: skip
FULL = {
    "sd1": {
        "unet": unet((320, 640, 1280, 1280), 2, (1, 1, 1, 0), 768), "vae": vae((128, 256, 512, 512), 2),
        "text_encoder": text(768, 12, 3072, 49_408, 77),
    },
    "sd2": {
        "unet": unet((320, 640, 1280, 1280), 2, (1, 1, 1, 0), 1024, project_linear=True),
        "vae": vae((128, 256, 512, 512), 2), "text_encoder": text(1024, 23, 4096, 49_408, 77),
    },
    "sd_x4": {
        "unet": unet((256, 512, 512, 1024), 2, (0, 1, 1, 1), 1024, 7, 4, True, classes=1000, only_cross=True),
        "vae": vae((128, 256, 512), 2), "text_encoder": text(1024, 23, 4096, 49_408, 77),
    },
    "sdxl": {
        "unet": unet((320, 640, 1280), 2, (0, 2, 10), 2048, project_linear=True, vector=2816),
        "vae": vae((128, 256, 512, 512), 2), "text_encoder": text(768, 12, 3072, 49_408, 77),
        "text_encoder_2": text(1280, 32, 5120, 49_408, 77, 1280),
    },
    "sdxl_refiner": {
        "unet": unet((384, 768, 1536, 1536), 2, (0, 4, 4, 0), 1280, project_linear=True, vector=2560, middle=4),
        "vae": vae((128, 256, 512, 512), 2), "text_encoder_2": text(1280, 32, 5120, 49_408, 77, 1280),
    },
    "controlnet": {
        "controlnet": controlnet(
            (16, 32, 96, 256), widths=(320, 640, 1280, 1280), blocks=2, depths=(1, 1, 1, 0), tokens=768
        ),
    },
}  # fmt: skip


def weights(shapes: Shapes, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights of these shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def model(family: str, dtype=np.float32) -> dict[str, dict[str, np.ndarray]]:
    """A small model of random weights."""
    return {part: weights(shapes, seed, dtype) for seed, (part, shapes) in enumerate(TINY[family].items())}


def without_memory(shapes: Shapes) -> dict[str, np.ndarray]:
    """Zeros that take no place."""
    return {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name
