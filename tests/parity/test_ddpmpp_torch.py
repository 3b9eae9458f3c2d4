"""Our DDPM++ equals a plain PyTorch transcription of the equations of diffusion_jax.nets.ncsnpp, on random weights.

The transcription works on NCHW tensors with torch's own convolution, group normalization, attention, pooling and
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

from diffusion_jax.nets import ddpmpp

W = dict[str, Any]


def tensor(a: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def conv(p: W, x: torch.Tensor) -> torch.Tensor:
    kernel = tensor(p["kernel"]).permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, tensor(p["bias"]), padding=kernel.shape[-1] // 2)


def linear(p: W, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensor(p["kernel"]).T, tensor(p["bias"]))


def norm(p: W, x: torch.Tensor, groups: int) -> torch.Tensor:
    return F.group_norm(x, groups, tensor(p["scale"]), tensor(p["bias"]), eps=1e-6)


def attention(p: W, x: torch.Tensor, groups: int) -> torch.Tensor:
    b, c, h, w = x.shape
    qkv = linear(p["qkv"], norm(p["norm"], x, groups).permute(0, 2, 3, 1).reshape(b, h * w, c))
    q, k, v = qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]
    weights = torch.softmax(torch.einsum("bqc,bkc->bqk", q, k) / math.sqrt(c), dim=-1)
    mixed = linear(p["proj"], torch.einsum("bqk,bkc->bqc", weights, v))
    return (x + mixed.reshape(b, h, w, c).permute(0, 3, 1, 2)) / math.sqrt(2)


def block(p: W, x: torch.Tensor, emb: torch.Tensor, groups: int, resample: str) -> torch.Tensor:
    def r(z: torch.Tensor) -> torch.Tensor:
        if resample == "up":
            return F.interpolate(z, scale_factor=2, mode="nearest")
        return F.avg_pool2d(z, 2) if resample == "down" else z

    h = conv(p["conv1"], r(F.silu(norm(p["norm1"], x, groups)))) + linear(p["time_emb_proj"], emb)[:, :, None, None]
    h = conv(p["conv2"], F.silu(norm(p["norm2"], h, groups)))
    skip = conv(p["conv_shortcut"], r(x)) if "conv_shortcut" in p else r(x)
    y = (skip + h) / math.sqrt(2)
    return attention(p["attention"], y, groups) if "attention" in p else y


def transcription(
    p: W, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, *, channels: int, levels: int, blocks: int
) -> torch.Tensor:
    groups = min(32, channels // 4)
    half = channels // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64) / (half - 1))
    angles = t.double()[:, None] * rates[None]
    features = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    if labels is not None:
        features = features + tensor(p["class_embedding"]["embedding"])[labels]
    mlp = p["time_embedding"]
    emb = F.silu(linear(mlp["linear_2"], F.silu(linear(mlp["linear_1"], features))))
    encoder, decoder = ([p[name][str(i)] for i in range(len(p[name]))] for name in ("encoder", "decoder"))
    x = conv(p["conv_in"], x)
    skips = [x]
    for level in range(levels):
        for j in range(blocks + (level > 0)):
            x = block(encoder.pop(0), x, emb, groups, "down" if level > 0 and j == 0 else "")
            skips.append(x)
    x = block(decoder.pop(0), x, emb, groups, "")
    x = block(decoder.pop(0), x, emb, groups, "")
    for level in reversed(range(levels)):
        if level < levels - 1:
            x = block(decoder.pop(0), x, emb, groups, "up")
        for _ in range(blocks + 1):
            x = block(decoder.pop(0), torch.cat([x, skips.pop()], dim=1), emb, groups, "")
    assert not encoder and not decoder and not skips
    return conv(p["conv_out"], F.silu(norm(p["norm_out"], x, groups)))


def random_params(net: Any) -> Any:
    """The network's own start plus noise, so that nothing stays at zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + (0.1 * rng.normal(size=a.shape)).astype(np.float32), net.init(jax.random.key(0))
    )


@pytest.mark.parametrize(
    ("shape", "arguments", "classes"),
    [
        ((8, 8, 3), {"channels": 16, "multipliers": (1, 2), "blocks": 2, "attention": (4,)}, None),
        ((8, 8, 1), {"channels": 16, "multipliers": (2, 2, 1), "blocks": 1, "attention": (8,)}, 5),
    ],
)
def test_equal(shape, arguments, classes):
    net = ddpmpp(shape, classes=classes, **arguments)
    params = random_params(net)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    t = rng.normal(size=3).astype(np.float32)
    labels = None if classes is None else rng.integers(0, classes + 1, 3)
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), None if labels is None else jnp.asarray(labels, jnp.int32))
    theirs = transcription(
        params, tensor(np.moveaxis(x, -1, 1)), tensor(t), None if labels is None else torch.from_numpy(labels),
        channels=arguments["channels"], levels=len(arguments["multipliers"]), blocks=arguments["blocks"],
    )  # fmt: skip
    reference = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.std(reference) > 0.05
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-4
