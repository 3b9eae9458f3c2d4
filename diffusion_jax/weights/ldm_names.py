"""What the modules of latent diffusion are called in its original files (CompVis, Stability) and in diffusers.

A table is {name of a module here: its name there}, here diffusers' and there the original one. A weight goes by the
longest part of its name that is in the table; what follows stays as it is. Tables are made from the names themselves,
of either side, so that they fit any number of levels and blocks.

    here                                       there
    U-Net                                                                                                           (1)
    conv_in, conv_norm_out, conv_out           input_blocks.0.0, out.0, out.2
    time_embedding.linear_1, _2                time_embed.0, .2
    add_embedding.linear_1, _2                 label_emb.0.0, .0.2                       XL
    class_embedding                            label_emb                                 the upscaler
    down_blocks.l.resnets.j, attentions.j      input_blocks.i.0, .1                      i counts from 1 over all (l, j)
    down_blocks.l.downsamplers.0.conv          input_blocks.i.0.op                       and the ends of levels
    mid_block.resnets.0, attentions.0          middle_block.0, .1
    mid_block.resnets.1                        middle_block.2
    up_blocks.l.resnets.j, attentions.j        output_blocks.i.0, .1                     i counts from 0
    up_blocks.l.upsamplers.0.conv              output_blocks.i.1.conv                    its last i; .2 if attended
        norm1, conv1, time_emb_proj            in_layers.0, in_layers.2, emb_layers.1    in a block
        norm2, conv2, conv_shortcut            out_layers.0, out_layers.3, skip_connection
    ControlNet, beside those of the U-Net                                                                           (2)
    controlnet_cond_embedding.conv_in          input_hint_block.0
        blocks.k, conv_out                     input_hint_block.2, .4, ...
    controlnet_down_blocks.i                   zero_convs.i.0
    controlnet_mid_block                       middle_block_out.0
    autoencoder, with L levels                                                                                      (3)
    encoder.down_blocks.l.resnets.j            encoder.down.l.block.j
    decoder.up_blocks.l.resnets.j              decoder.up.(L-1-l).block.j
    mid_block.resnets.j, attentions.0          mid.block_(j+1), mid.attn_1
    to_q, to_k, to_v, to_out.0  [c, c]         q, k, v, proj_out  [c, c, 1, 1]
    text tower, transformers'                  OpenCLIP's                                                           (4)
    self_attn.q_proj, k_proj, v_proj           attn.in_proj_weight, in_proj_bias         one below the other
    text_projection.weight                     text_projection                           transposed
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights.files import State, plain

Names = dict[str, str]

UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}  # fmt: skip
LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
LAYERS, RESBLOCKS = "text_model.encoder.layers", "transformer.resblocks"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Level(NamedTuple):
    """A level of a U-Net: how many blocks it has, whether it ends in a change of size, after an attention or not."""

    blocks: int
    resized: bool
    attended: bool


def renamed(state: State, names: Names) -> State:
    """Weights by their names in a table, which may be turned round; InputError listing those that have none."""
    found = {name: rename(name, names) for name in state}
    lost = sorted(name for name, other in found.items() if other is None)
    if lost:
        raise InputError(f"weights that this model does not have: {listed(lost)}")
    return {other: state[name] for name, other in found.items() if other is not None}


def rename(name: str, names: Names) -> str | None:
    """The other name of a weight, None if no part of its name is in the table.

    >>> rename("conv_in.weight", UNET)
    'input_blocks.0.0.weight'
    """
    end = len(name)
    while end > 0:
        if name[:end] in names:
            return names[name[:end]] + name[end:]
        end = name.rfind(".", 0, end)
    return None


def turned(names: Names) -> Names:
    """The table from there to here."""
    return {there: here for here, there in names.items()}


def listed(names: Iterable[str], most: int = 6) -> str:
    """Some names in a line, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name, 120) for name in names[:most]) + more


# U-Nets and ControlNets ----------------------------------------------------------------------------------------------


def unet(modules: Collection[str], here: bool) -> Names:
    """Table (1) for the weights' names, which are diffusers' if `here` and the original ones if not."""
    down, up = (_levels_here if here else _levels_there)(modules)
    names, i = dict(UNET), 1
    for level, (blocks, resized, _) in enumerate(down):
        for j in range(blocks):
            names |= _block(f"down_blocks.{level}", j, f"input_blocks.{i + j}")
        if resized:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{i + blocks}.0.op"
        i += blocks + resized
    names |= _resnet("mid_block.resnets.0", "middle_block.0")
    middle = any(name.startswith(("mid_block.attentions.", "middle_block.2.")) for name in modules)
    names |= {"mid_block.attentions.0": "middle_block.1"} if middle else {}
    return names | _resnet("mid_block.resnets.1", f"middle_block.{1 + middle}") | _up(up)


def controlnet(modules: Collection[str], here: bool) -> Names:
    """Table (2), with (1), as `unet`."""
    hints = _count(modules, "controlnet_cond_embedding.blocks" if here else "input_hint_block")
    hints = hints if here else hints // 2 - 1  # every other one is an activation, the first and the last have names
    zeros = _count(modules, "controlnet_down_blocks" if here else "zero_convs")
    embedding = "controlnet_cond_embedding"
    return {
        **unet(modules, here),
        f"{embedding}.conv_in": "input_hint_block.0",
        **{f"{embedding}.blocks.{k}": f"input_hint_block.{2 * k + 2}" for k in range(hints)},
        f"{embedding}.conv_out": f"input_hint_block.{2 * hints + 2}",
        **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(zeros)},
        "controlnet_mid_block": "middle_block_out.0",
    }


def _up(up: list[Level]) -> Names:
    names, i = {}, 0
    for level, (blocks, resized, attended) in enumerate(up):
        for j in range(blocks):
            names |= _block(f"up_blocks.{level}", j, f"output_blocks.{i + j}")
        if resized:
            last = f"output_blocks.{i + blocks - 1}.{1 + attended}"
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"{last}.conv"
            if not attended:
                del names[f"up_blocks.{level}.attentions.{blocks - 1}"]
        i += blocks
    return names


def _block(here: str, j: int, there: str) -> Names:
    return {**_resnet(f"{here}.resnets.{j}", f"{there}.0"), f"{here}.attentions.{j}": f"{there}.1"}


def _resnet(here: str, there: str, names: Names = RESNET) -> Names:
    return {f"{here}.{a}": f"{there}.{b}" for a, b in names.items()}


def _levels_here(names: Collection[str]) -> tuple[list[Level], list[Level]]:
    heads = _heads(names, 4)

    def levels(side: str, resizer: str) -> list[Level]:
        return [
            Level(
                n := _count(heads, f"{side}.{level}.resnets"), f"{side}.{level}.{resizer}.0" in heads,
                f"{side}.{level}.attentions.{n - 1}" in heads,
            )
            for level in range(_count(heads, side))
        ]  # fmt: skip

    return levels("down_blocks", "downsamplers"), levels("up_blocks", "upsamplers")


def _levels_there(names: Collection[str]) -> tuple[list[Level], list[Level]]:
    heads = _heads(names, 4)
    down = [(f"input_blocks.{i}.0.op" in heads, False) for i in range(1, _count(heads, "input_blocks"))]
    up = [
        (bool({f"output_blocks.{i}.1.conv", f"output_blocks.{i}.2.conv"} & heads), f"output_blocks.{i}.2.conv" in heads)
        for i in range(_count(heads, "output_blocks"))
    ]
    return _cut(down, 0), _cut(up, 1)


def _cut(blocks: list[tuple[bool, bool]], own: int) -> list[Level]:
    """Levels from (ends here in a change of size, has an attention); that end is a block itself if `own`."""
    levels, n = [], 0
    for resized, attended in blocks:
        n += own if resized else 1
        if resized:
            levels.append(Level(n, True, attended))
            n = 0
    return [*levels, Level(n, False, False)] if n else levels


def _heads(names: Iterable[str], n: int) -> set[str]:
    """The first 1 to n words of all names."""
    return {name.rsplit(".", name.count(".") - k)[0] for name in names for k in range(min(n, name.count(".") + 1))}


def _count(names: Iterable[str], module: str) -> int:
    """How many numbered modules are in one: 1 + the largest number, or 0."""
    numbers = (re.match(rf"{re.escape(module)}\.(\d{{1,3}})(?:\.|$)", name) for name in names)
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)


# Autoencoders --------------------------------------------------------------------------------------------------------


def vae(names: Collection[str], here: bool) -> Names:
    """Table (3), as `unet`."""
    table = {name: name for name in ("quant_conv", "post_quant_conv", "quantize")}
    for side, module, there, resizer in (
        ("encoder", "down_blocks", "down", "downsample"), ("decoder", "up_blocks", "up", "upsample"),
    ):  # fmt: skip
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for j in (0, 1):
            table |= _resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", VAE_RESNET)
        table |= _resnet(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", VAE_ATTENTION)
        n = _count(names, f"{side}.{module if here else there}")
        for level in range(n):
            a, b = f"{side}.{module}.{level}", f"{side}.{there}.{n - 1 - level if side == 'decoder' else level}"
            table[f"{a}.{resizer}rs.0"] = f"{b}.{resizer}"
            for j in range(_count(names, f"{a}.resnets" if here else f"{b}.block")):
                table |= _resnet(f"{a}.resnets.{j}", f"{b}.block.{j}", VAE_RESNET)
                table |= _resnet(f"{a}.attentions.{j}", f"{b}.attn.{j}", VAE_ATTENTION)
    return table


def vae_here(state: State) -> State:
    """An autoencoder in diffusers' layout from the original one, by (3)."""
    found = renamed(state, turned(vae(state, False)))
    return {
        name: value[:, :, 0, 0] if _projects(name) and value.shape[2:] == (1, 1) else value
        for name, value in found.items()
    }


def vae_there(state: State) -> State:
    """Inverse of `vae_here`; attention layers named as before diffusers 0.18 are read too."""
    state = {modern(name): value for name, value in state.items()}
    found = renamed(state, vae(state, True))
    squares = {new for new, old in zip(found, state, strict=True) if _projects(old)}
    return {name: v[:, :, None, None] if name in squares and v.ndim == 2 else v for name, v in found.items()}


def modern(name: str) -> str:
    """The name of an attention layer since diffusers 0.18.

    >>> modern("mid_block.attentions.0.query.weight")
    'mid_block.attentions.0.to_q.weight'
    """
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", name)


def _projects(name: str) -> bool:
    return re.search(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$", name) is not None


# Text towers ---------------------------------------------------------------------------------------------------------


def open_clip(layers: int) -> Names:
    """Table (4) without the matrices that are put together."""
    pairs = (_resnet(f"{LAYERS}.{i}", f"{RESBLOCKS}.{i}", LAYER) for i in range(layers))
    return {**OPEN_CLIP, **{a: b for pair in pairs for a, b in pair.items()}}


def open_clip_here(state: State) -> State:
    """A CLIPTextModel's weights from OpenCLIP's, by (4)."""
    inner = {name: value for name, value in state.items() if ".attn.in_proj_" in name}
    rest = {name: value for name, value in state.items() if name not in inner}
    found = renamed(rest, turned(open_clip(_count(rest, RESBLOCKS))))
    if "text_projection.weight" in found:
        found["text_projection.weight"] = found["text_projection.weight"].T
    for name, value in inner.items():
        layer, kind = _in_proj(name)
        if value.ndim == 0 or len(value) % 3:
            raise InputError(f"{plain(name)} has the shape {value.shape}, which is not three matrices")
        for part, third in zip("qkv", np.split(value, 3), strict=True):
            found[f"{LAYERS}.{layer}.self_attn.{part}_proj.{kind}"] = third
    return found


def open_clip_there(state: State) -> State:
    """Inverse of `open_clip_here`."""
    inner = {name: value for name, value in state.items() if re.search(r"\.self_attn\.[qkv]_proj\.", name)}
    rest = {name: value for name, value in state.items() if name not in inner}
    found = renamed(rest, open_clip(_count(rest, LAYERS)))
    if "text_projection" in found:
        found["text_projection"] = found["text_projection"].T
    for name in [name for name in inner if ".q_proj." in name]:
        parts = [inner.pop(name.replace(".q_proj.", f".{part}_proj."), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise InputError(f"the text encoder has {plain(name)} and lacks its k_proj or v_proj")
        there = name.replace(LAYERS, RESBLOCKS).replace(".self_attn.q_proj.", ".attn.in_proj_")
        found[there] = np.concatenate([part for part in parts if part is not None])
    if inner:
        raise InputError(f"weights that this model does not have: {listed(sorted(inner))}")
    return found


def _in_proj(name: str) -> tuple[str, str]:
    found = re.fullmatch(rf"{re.escape(RESBLOCKS)}\.(\d+)\.attn\.in_proj_(weight|bias)", name)
    if found is None:
        raise InputError(f"weights that this model does not have: {plain(name)}")
    return found[1], found[2]


def clip_layers(state: Mapping[str, object]) -> int:
    """How many layers a text tower has, in either layout."""
    return _count(state, LAYERS) or _count(state, RESBLOCKS)
