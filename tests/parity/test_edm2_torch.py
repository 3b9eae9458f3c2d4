"""Our EDM2 equals a plain PyTorch transcription of equations (1)-(10) of diffusion_jax.nets.edm2, on random weights.

The transcription works on NCHW tensors with torch's own convolution, attention, pooling and interpolation, in the
order in which Karras et al. 2024 draw the network, and takes its weights from our parameters by name.
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

from diffusion_jax.nets import edm2

torch.set_num_threads(1)
W = dict[str, Any]


def tensor(a: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def normalized(a: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return a / (a.square().mean(dims, keepdim=True).sqrt() + 1e-4)


def weight(p: W) -> torch.Tensor:
    """[n_out, n_in, *widths], each output's numbers of length 1."""
    w = tensor(p["kernel"])
    w = w.T if w.ndim == 2 else w.permute(3, 2, 0, 1)
    return normalized(w, tuple(range(1, w.ndim))) / math.sqrt(w[0].numel())


def conv(p: W, x: torch.Tensor) -> torch.Tensor:
    w = weight(p)
    return F.conv2d(x, w, padding=w.shape[-1] // 2)


def silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) / 0.596


def add(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation (5) with t = 1/2, where it is sqrt((n_a + n_b) / 2) times each part over the root of its width."""
    n_a, n_b = a.shape[1], b.shape[1]
    return math.sqrt((n_a + n_b) / 2) * torch.cat([a / math.sqrt(n_a), b / math.sqrt(n_b)], dim=1)


def fourier(p: W, t: torch.Tensor) -> torch.Tensor:
    angles = t.double()[:, None] * tensor(p["freqs"]).double()[None] + tensor(p["phases"]).double()[None]
    return (math.sqrt(2) * angles.cos()).float()


def attention(p: W, x: torch.Tensor, heads: int) -> torch.Tensor:
    b, c, h, w = x.shape
    q, k, v = (normalized(z, (2,)) for z in conv(p["attn_qkv"], x).reshape(b, 3, heads, c // heads, h * w).unbind(1))
    weights = torch.softmax(torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(c // heads), dim=3)
    mixed = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(b, c, h, w)
    return add(x, conv(p["attn_proj"], mixed), 0.3)


def block(p: W, x: torch.Tensor, emb: torch.Tensor, name: str, *, encodes: bool, head_width: int) -> torch.Tensor:
    if name.endswith("down"):
        x = F.avg_pool2d(x, 2)
    if name.endswith("up"):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    h = conv(p["conv_skip"], x) if "conv_skip" in p else x
    if encodes:
        x = h = normalized(h, (1,))
    modulation = 1 + tensor(p["emb_gain"]) * F.linear(emb, weight(p["emb_linear"]))
    y = conv(p["conv_res1"], silu(conv(p["conv_res0"], silu(x)) * modulation[:, :, None, None]))
    x = add(h, y, 0.3)
    return attention(p, x, max(1, x.shape[1] // head_width)) if "attn_qkv" in p else x


def transcription(
    p: W, x: torch.Tensor, t: torch.Tensor, labels: list[int] | None, *, levels: int, blocks: int, classes: int | None,
    head_width: int,
) -> torch.Tensor:  # fmt: skip
    emb = F.linear(fourier(p["emb_fourier"], t), weight(p["emb_noise"]))
    if labels is not None:
        assert classes is not None
        rows = []
        for i, label in enumerate(labels):
            onehot = F.one_hot(torch.tensor([min(label, classes - 1)]), classes).float() * math.sqrt(classes)
            row = emb[i : i + 1]
            rows.append(row if label == classes else add(row, F.linear(onehot, weight(p["emb_label"])), 0.5))
        emb = torch.cat(rows)
    emb = silu(emb)
    height = x.shape[2]
    enc, dec = dict(p["enc"]), dict(p["dec"])

    def run(part: W, name: str, x: torch.Tensor) -> torch.Tensor:
        return block(part.pop(name), x, emb, name, encodes=part is enc, head_width=head_width)

    def size(level: int) -> str:
        return f"{height >> level}x{height >> level}"

    x = conv(enc.pop(f"{size(0)}_conv"), torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
    skips = [x]
    for level in range(levels):
        for name in (["down"] if level else []) + [f"block{j}" for j in range(blocks)]:
            x = run(enc, f"{size(level)}_{name}", x)
            skips.append(x)
    for level in reversed(range(levels)):
        for name in ["in0", "in1"] if level == levels - 1 else ["up"]:
            x = run(dec, f"{size(level)}_{name}", x)
        for j in range(blocks + 1):
            x = run(dec, f"{size(level)}_block{j}", join(x, skips.pop()))
    assert not enc and not dec and not skips
    out = tensor(p["out_gain"]) * conv(p["out_conv"], x)
    if "logvar_linear" not in p:
        return out
    u = F.linear(fourier(p["logvar_fourier"], t), weight(p["logvar_linear"]))
    return torch.cat([out, u[:, :, None, None].expand(-1, 1, *out.shape[2:])], dim=1)


def random_params(net: Any) -> Any:
    """The network's own start plus noise, gains of order one, and weights of any length."""
    rng = np.random.default_rng(0)

    def change(a: Any) -> np.ndarray:
        return (np.asarray(a) + 0.3 * rng.normal(size=a.shape) + (0.7 if a.ndim == 0 else 0)).astype(np.float32)

    return jax.tree.map(change, net.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("shape", "arguments", "classes"),
    [
        ((8, 8, 3), {"channels": 16, "multipliers": (1, 2), "blocks": 2, "attention": (4,), "head_width": 16}, None),
        (
            (8, 8, 1),
            {
                "channels": 12, "multipliers": (1, 1, 2), "blocks": 1, "attention": (8,), "head_width": 12,
                "uncertainty": True,
            },
            5,
        ),
    ],
)  # fmt: skip
def test_equal(shape, arguments, classes):
    net = edm2(shape, classes=classes, **arguments)
    params = random_params(net)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    t = rng.normal(size=3).astype(np.float32) / 2
    labels = None if classes is None else [0, classes - 1, classes]
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), None if labels is None else jnp.asarray(labels, jnp.int32))
    theirs = transcription(
        params, tensor(np.moveaxis(x, -1, 1)), tensor(t), labels, levels=len(arguments["multipliers"]),
        blocks=arguments["blocks"], classes=classes, head_width=arguments["head_width"],
    )  # fmt: skip
    reference = np.moveaxis(theirs.numpy(), 1, -1)
    assert ours.shape == reference.shape
    assert np.std(reference[..., : shape[-1]]) > 0.2
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-4
