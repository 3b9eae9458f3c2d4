"""The U-Net in one to three axes with all its conditions, against a plain PyTorch transcription of its equations and,
for attention to tokens, against diffusers' own layer.

The transcription works on channels-first tensors with torch's convolutions, group normalization, softmax and
interpolation, and takes its weights from our parameters by name.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from flax import nnx

from diffusion_jax.nets import functional, unet
from diffusion_jax.nets.conditioning import CrossAttention
from diffusion_jax.nets.layers import Options

torch.set_num_threads(1)
W = dict[str, Any]
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def tensor(a: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def convolve(x: torch.Tensor, kernel: Any, stride: list[int]) -> torch.Tensor:
    """Padding as JAX's "SAME": for width 3 one on each side, with stride 2 and an even size one behind only."""
    ndim = x.ndim - 2
    weight = tensor(kernel).permute(ndim + 1, ndim, *range(ndim))
    pads = []
    for width, step in reversed(list(zip(weight.shape[2:], stride, strict=True))):
        pads += [0, 0] if width == 1 else [1 if step == 1 else 0, 1]
    return CONVOLVE[ndim](F.pad(x, pads), weight, stride=tuple(stride))


def conv(p: W, x: torch.Tensor, stride: list[int] | None = None) -> torch.Tensor:
    stride = stride or [1] * (x.ndim - 2)
    if "time_kernel" in p:
        x = convolve(convolve(x, p["kernel"], [1, *stride[1:]]), p["time_kernel"], [stride[0], 1, 1])
    else:
        x = convolve(x, p["kernel"], stride)
    return x + tensor(p["bias"]).view(1, -1, *[1] * (x.ndim - 2))


def linear(p: W, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensor(p["kernel"]).T, tensor(p["bias"]))


def norm(p: W, x: torch.Tensor, groups: int) -> torch.Tensor:
    return F.group_norm(x, groups, tensor(p["scale"]), tensor(p["bias"]), eps=1e-6)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Equation (3) on `[b, heads, n, d]`, by complex multiplication."""
    d, n = x.shape[-1], x.shape[-2]
    rates = 10000.0 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
    phase = torch.polar(torch.ones(n, d // 2, dtype=torch.float64), torch.arange(n).double()[:, None] * rates[None])
    z = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * phase
    return torch.cat([z.real, z.imag], dim=-1).float()


def softmax_attention(q, k, v, heads: int, places: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`[b, n, c]` over `[b, m, c]`."""
    q, k, v = (z.reshape(z.shape[0], z.shape[1], heads, -1).transpose(1, 2) for z in (q, k, v))
    if places:
        q, k = turned(q), turned(k)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -1e30)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def self_attention(p: W, x: torch.Tensor, groups: int, heads: int, over: str) -> torch.Tensor:
    h = torch.movedim(norm(p["group_norm"], x, groups), 1, -1)
    b, *pixels, c = h.shape
    if over == "time":
        rows = h.movedim(1, -2).reshape(-1, pixels[0], c)
    else:
        rows = h.reshape(b * pixels[0], -1, c) if over == "frame" else h.reshape(b, -1, c)
    q, k, v = (linear(p[name], rows) for name in ("to_q", "to_k", "to_v"))
    y = linear(p["to_out"]["0"], softmax_attention(q, k, v, heads, places=over == "time"))
    y = y.reshape(b, *pixels[1:], pixels[0], c).movedim(-2, 1) if over == "time" else y.reshape(h.shape)
    return x + torch.movedim(y, -1, 1)


def cross_attention(p: W, x: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor, groups: int, heads: int):
    h = torch.movedim(norm(p["group_norm"], x, groups), 1, -1)
    q = linear(p["to_q"], h.flatten(1, -2))
    k, v = linear(p["to_k"], tokens), linear(p["to_v"], tokens)
    y = linear(p["to_out"]["0"], softmax_attention(q, k, v, heads, mask=mask)).reshape(h.shape)
    return x + torch.movedim(y, -1, 1) * mask.any(dim=1).view(-1, *[1] * (x.ndim - 1))


def resnet(p: W, x: torch.Tensor, emb: torch.Tensor, groups: int) -> torch.Tensor:
    h = conv(p["conv1"], F.silu(norm(p["norm1"], x, groups)))
    h = h + linear(p["time_emb_proj"], emb).view(*emb.shape[:1], -1, *[1] * (x.ndim - 2))
    h = conv(p["conv2"], F.silu(norm(p["norm2"], h, groups)))
    return h + (conv(p["conv_shortcut"], x) if "conv_shortcut" in p else x)


def transcription(p: W, x, t, cond: W, *, channels: int, groups: int, heads: int, factor: list[int]) -> torch.Tensor:
    """Equations (1) to (3) and those of `conditioning`, for parameters p of a network with two levels."""
    half = channels // 2
    angles = t.double()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(half).double() / (half - 1))[None]
    emb = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    emb = linear(p["time_embedding"]["linear_2"], F.silu(linear(p["time_embedding"]["linear_1"], emb)))
    if "label" in cond:
        emb = emb + tensor(p["class_embedding"]["embedding"])[cond["label"]]
    if "vector" in cond:
        v = p["vector_embedding"]
        e = linear(v["linear_2"], F.silu(linear(v["linear_1"], cond["vector"])))
        emb = emb + e * cond["vector_mask"][:, None]
    emb = F.silu(emb)

    def block(level: W, i: int, h: torch.Tensor) -> torch.Tensor:
        h, name = resnet(level["resnets"][str(i)], h, emb, groups), str(i)
        if name in level.get("attentions", {}):
            apart = "temp_attentions" in level
            h = self_attention(level["attentions"][name], h, groups, heads, "frame" if apart else "all")
            if apart:
                h = self_attention(level["temp_attentions"][name], h, groups, heads, "time")
        if name in level.get("cross_attentions", {}):
            tokens, mask = cond["tokens"], cond["tokens_mask"]
            h = cross_attention(level["cross_attentions"][name], h, tokens, mask, groups, heads)
        return h

    x = conv(p["conv_in"], torch.cat([x, cond["image"]], dim=1) if "image" in cond else x)
    skips = [x]
    for j in ("0", "1"):
        level = p["down_blocks"][j]
        for i in range(len(level["resnets"])):
            x = block(level, i, x)
            skips.append(x)
        if "downsamplers" in level:
            x = conv(level["downsamplers"]["0"]["conv"], x, factor)
            skips.append(x)
    x = block(p["mid_block"], 1, block(p["mid_block"], 0, x))
    for j in ("0", "1"):
        level = p["up_blocks"][j]
        for i in range(len(level["resnets"])):
            x = block(level, i, torch.cat([x, skips.pop()], dim=1))
        if "upsamplers" in level:
            x = conv(level["upsamplers"]["0"]["conv"], F.interpolate(x, scale_factor=tuple(map(float, factor))))
    assert not skips
    return conv(p["conv_out"], F.silu(norm(p["conv_norm_out"], x, groups)))


def random_params(net: Any) -> Any:
    """The network's own start plus noise, so that nothing stays at zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + (0.1 * rng.normal(size=a.shape)).astype(np.float32), net.init(jax.random.key(0))
    )


def conditions(rng: np.random.Generator, b: int, pixels: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        "label": rng.integers(0, 4, b).astype(np.int32),
        "vector": rng.normal(size=(b, 3)).astype(np.float32),
        "vector_mask": np.array([True, False, True]),
        "tokens": rng.normal(size=(b, 6, 5)).astype(np.float32),
        "tokens_mask": np.arange(6)[None] < np.array([[6], [2], [0]]),
        "image": rng.normal(size=(b, *pixels, 1)).astype(np.float32),
    }


APART = {"attention_over": "space_then_time", "convolution": "space_then_time"}


@pytest.mark.parametrize(
    ("shape", "arguments", "factor"),
    [
        ((16, 2), {"attention": (8,)}, [2]),
        ((8, 8, 2), {"attention": (4,)}, [2, 2]),
        ((4, 8, 8, 2), {"attention": (2,)}, [2, 2, 2]),
        ((4, 8, 8, 2), APART | {"attention": (4,)}, [2, 2, 2]),
        ((3, 8, 8, 2), APART | {"attention": (4,), "resample_time": False}, [1, 2, 2]),
        ((3, 8, 8, 2), APART | {"attention": (8, 4), "resample_time": False, "convolution": "space"}, [1, 2, 2]),
    ],
)
@pytest.mark.parametrize("conditioned", [False, True])
def test_equal(shape, arguments, factor, conditioned):
    kinds = {"classes": 4, "vector": 3, "tokens": 5, "image": 1} if conditioned else {}
    net = unet(shape, channels=16, multipliers=(1, 2), blocks=1, heads=2, **arguments, **kinds)
    params, rng = random_params(net), np.random.default_rng(1)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    t = rng.uniform(0, 1000, 3).astype(np.float32)
    cond = conditions(rng, 3, shape[:-1]) if conditioned else {}
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), jax.tree.map(jnp.asarray, cond))
    there = {name: tensor(value) for name, value in cond.items()}
    if conditioned:
        there["image"] = torch.movedim(there["image"], -1, 1)
    first = torch.movedim(tensor(x), -1, 1)
    theirs = transcription(params, first, tensor(t), there, channels=16, groups=4, heads=2, factor=factor)
    reference = torch.movedim(theirs, 1, -1).numpy()
    assert np.std(reference) > 0.05
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-4


@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_tokens_is_that_of_diffusers(masked):
    """The layer by itself, with diffusers' names of the weights."""

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.layer = CrossAttention(rngs, 16, 5, Options(4, 2, 0.0, jnp.float32))

        def __call__(self, x, t, cond, *, key):
            return self.layer(x, cond["tokens"], cond.get("mask"))

    torch.manual_seed(0)
    peer = Attention(
        query_dim=16, cross_attention_dim=5, heads=2, dim_head=8, bias=True, norm_num_groups=4, eps=1e-6,
        residual_connection=True,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    state = {name: value.detach().numpy() for name, value in peer.state_dict().items()}
    params: W = {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        branch = params
        for part in path:
            branch = branch.setdefault(part, {})
        here = "bias" if leaf == "bias" else "scale" if path == ["group_norm"] else "kernel"
        branch[here] = value.T if here == "kernel" else value
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6, 16)).astype(np.float32)
    tokens = rng.normal(size=(3, 7, 5)).astype(np.float32)
    mask = np.arange(7)[None] < np.array([[7], [3], [1]])
    cond = {"tokens": jnp.asarray(tokens)} | ({"mask": jnp.asarray(mask)} if masked else {})
    ours = jax.jit(functional(Layer).apply)({"layer": params}, jnp.asarray(x), jnp.zeros(3), cond)
    bias = torch.where(torch.from_numpy(mask), 0.0, -1e30)[:, None, :] if masked else None
    with torch.no_grad():
        theirs = peer(torch.movedim(tensor(x), -1, 1), tensor(tokens), attention_mask=bias)
    reference = torch.movedim(theirs, 1, -1).numpy()
    assert np.std(reference - x) > 0.05
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-5
