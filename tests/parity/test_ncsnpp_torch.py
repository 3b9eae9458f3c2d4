"""Our NCSN++ equals a plain PyTorch transcription of the equations of diffusion_jax.nets.ncsnpp, on random weights.

Filtering is done as the papers define it: zeros between the values, zeros around them, correlation with the outer
product of the taps, every other value kept; the resampling convolutions as filtering of an extended picture and a
convolution without padding. Where diffusers has the network (its skip blocks), it has to agree as well.
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
from diffusers import UNet2DModel

from diffusion_jax.nets import count, ncsnpp, song_256, song_1024

torch.set_num_threads(1)
W = dict[str, Any]
S = math.sqrt(0.5)


def tensor(a: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def groups_of(n: int) -> int:
    return min(n // 4, 32)


def norm(p: W, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, groups_of(x.shape[1]), tensor(p["scale"]), tensor(p["bias"]), eps=1e-6)


def kernel(p: W) -> torch.Tensor:
    return tensor(p["kernel"]).permute(3, 2, 0, 1)


def conv(p: W, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, kernel(p), tensor(p["bias"]), padding=kernel(p).shape[-1] // 2)


def linear(p: W, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensor(p["kernel"]).T, tensor(p["bias"]))


def upfirdn(x: torch.Tensor, up: int, down: int, before: int, after: int) -> torch.Tensor:
    b, c, h, w = x.shape
    u = torch.zeros(b, c, h * up, w * up)
    u[:, :, ::up, ::up] = x
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    f = torch.outer(taps, taps).expand(c, 1, 4, 4) * up**2
    return F.conv2d(F.pad(u, (before, after, before, after)), f, groups=c)[:, :, ::down, ::down]


def resized(x: torch.Tensor, way: str, fir: bool) -> torch.Tensor:
    if way == "up":
        return upfirdn(x, 2, 1, 2, 1) if fir else F.interpolate(x, scale_factor=2, mode="nearest")
    if way == "down":
        return upfirdn(x, 1, 2, 1, 1) if fir else F.avg_pool2d(x, 2)
    return x


def resized_conv(p: W, x: torch.Tensor, way: str, fir: bool) -> torch.Tensor:
    p = p["conv"]
    if way == "up":
        return F.conv2d(upfirdn(x, 2, 1, 3, 2), kernel(p), tensor(p["bias"])) if fir else conv(p, resized(x, way, fir))
    if fir:
        return F.conv2d(upfirdn(x, 1, 1, 2, 2), kernel(p), tensor(p["bias"]), stride=2)
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel(p), tensor(p["bias"]), stride=2)


def attention(p: W, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    qkv = linear(p["qkv"], norm(p["norm"], x).permute(0, 2, 3, 1).reshape(b, h * w, c))
    q, k, v = qkv[..., :c], qkv[..., c : 2 * c], qkv[..., 2 * c :]
    weights = torch.softmax(torch.einsum("bqc,bkc->bqk", q, k) / math.sqrt(c), dim=-1)
    mixed = linear(p["proj"], torch.einsum("bqk,bkc->bqc", weights, v))
    return (x + mixed.reshape(b, h, w, c).permute(0, 3, 1, 2)) * S


def block(p: W, x: torch.Tensor, emb: torch.Tensor, fir: bool, way: str = "") -> torch.Tensor:
    h = (
        conv(p["conv1"], resized(F.silu(norm(p["norm1"], x)), way, fir))
        + linear(p["time_emb_proj"], emb)[..., None, None]
    )
    h = conv(p["conv2"], F.silu(norm(p["norm2"], h)))
    skip = conv(p["conv_shortcut"], resized(x, way, fir)) if "conv_shortcut" in p else resized(x, way, fir)
    y = (skip + h) * S
    return attention(p["attention"], y) if "attention" in p else y


def out(p: W, h: torch.Tensor) -> torch.Tensor:
    return conv(p["conv"], F.silu(norm(p["norm"], h)))


def sequence(p: W) -> list[W]:
    return [p[str(i)] for i in range(len(p))]


def embedding(params: W, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    angles = 2 * math.pi * t.double()[:, None] * tensor(params["time_proj"]["weight"]).double()[None]
    features = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    if labels is not None:
        features = features + tensor(params["class_embedding"]["embedding"])[labels]
    p = params["time_embedding"]
    return F.silu(linear(p["linear_2"], F.silu(linear(p["linear_1"], features))))


def transcription(
    params: W, x: torch.Tensor, emb: torch.Tensor, *, levels: int, blocks: int, fir: bool, into: str, outof: str,
    combine: str,
) -> torch.Tensor:  # fmt: skip
    encoder, decoder = sequence(params["encoder"]), sequence(params["decoder"])
    entries, exits = sequence(params.get("pyramid_in", {})), sequence(params.get("pyramid_out", {}))
    p, h = x, conv(params["conv_in"], x)
    skips = [h]
    for level in range(levels):
        if level:
            h = block(encoder.pop(0), h, emb, fir, "down")
            if into == "skip":
                p = resized(p, "down", fir)
                part = conv(entries.pop(0), p)
                h = h + part if combine == "sum" else torch.cat([part, h], dim=1)
            if into == "residual":
                h = p = (resized_conv(entries.pop(0), p, "down", fir) + h) * S
            skips.append(h)
        for _ in range(blocks):
            h = block(encoder.pop(0), h, emb, fir)
            skips.append(h)
    h = block(decoder.pop(0), h, emb, fir)
    h = block(decoder.pop(0), h, emb, fir)
    for level in reversed(range(levels)):
        if level < levels - 1:
            h = block(decoder.pop(0), h, emb, fir, "up")
        for _ in range(blocks + 1):
            h = block(decoder.pop(0), torch.cat([h, skips.pop()], dim=1), emb, fir)
        if outof != "none" and level == levels - 1:
            p = out(exits.pop(0), h)
        elif outof == "skip":
            p = resized(p, "up", fir) + out(exits.pop(0), h)
        elif outof == "residual":
            h = p = (resized_conv(exits.pop(0), p, "up", fir) + h) * S
    assert not encoder and not decoder and not skips and not entries and not exits
    return p if outof == "skip" else conv(params["conv_out"], F.silu(norm(params["norm_out"], h)))


def random_params(net: Any) -> Any:
    """The network's own start plus noise, so that nothing stays at zero or one."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + (0.1 * rng.normal(size=a.shape)).astype(np.float32), net.init(jax.random.key(0))
    )


CASES = [
    # progressive_input, progressive_output, combine, fir
    ("residual", "none", "sum", True),
    ("skip", "skip", "sum", True),
    ("skip", "residual", "concatenation", True),
    ("residual", "residual", "sum", False),
    ("none", "skip", "sum", False),
]


@pytest.mark.parametrize(("into", "outof", "combine", "fir"), CASES)
def test_equal(into, outof, combine, fir):
    net = ncsnpp(
        (8, 8, 3), channels=16, multipliers=(1, 2, 2), blocks=1, attention=(4,), classes=5, fir=fir, fourier_scale=1.0,
        progressive_input=into, progressive_output=outof, combine=combine,
    )  # fmt: skip
    params = random_params(net)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 8, 8, 3)).astype(np.float32)
    t = rng.normal(size=3).astype(np.float32)
    labels = rng.integers(0, 6, 3)
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), jnp.asarray(labels, jnp.int32))
    theirs = transcription(
        params, tensor(np.moveaxis(x, -1, 1)), embedding(params, tensor(t), torch.from_numpy(labels)),
        levels=3, blocks=1, fir=fir, into=into, outof=outof, combine=combine,
    )  # fmt: skip
    reference = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.std(reference) > 0.05
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-4


def skip_model(size: int, widths: tuple[int, ...], blocks: int, attends: tuple[bool, ...]) -> UNet2DModel:
    """diffusers' NCSN++ with input and output skips."""
    names = [("AttnSkip" if a else "Skip") for a in attends]
    return UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3, time_embedding_type="fourier", freq_shift=0,
        flip_sin_to_cos=False, down_block_types=tuple(f"{name}DownBlock2D" for name in names),
        up_block_types=tuple(f"{name}UpBlock2D" for name in reversed(names)), block_out_channels=widths,
        layers_per_block=blocks, mid_block_scale_factor=math.sqrt(2), downsample_padding=1, norm_eps=1e-6,
        norm_num_groups=None, attention_head_dim=None, center_input_sample=False,
    ).eval()  # fmt: skip


def leaf(module: Any) -> W:
    """Parameters of a torch layer in our layout."""
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    return {"kernel": weight.T if weight.ndim == 2 else np.transpose(weight, (2, 3, 1, 0)), "bias": bias}


def resnet(module: Any, attention: Any = None) -> W:
    names = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    p = {name: leaf(getattr(module, name)) for name in names}
    if module.conv_shortcut is not None:
        p["conv_shortcut"] = leaf(module.conv_shortcut)
    if attention is not None:
        q, k, v = (leaf(m) for m in (attention.to_q, attention.to_k, attention.to_v))
        qkv = {name: np.concatenate([q[name], k[name], v[name]], axis=-1) for name in ("kernel", "bias")}
        p["attention"] = {"norm": leaf(attention.group_norm), "qkv": qkv, "proj": leaf(attention.to_out[0])}
    return p


def numbered(items: list[W]) -> W:
    return {str(i): item for i, item in enumerate(items)}


def from_model(model: UNet2DModel) -> W:
    """Its weights in our tree; the last level's output there is conv_norm_out and conv_out."""
    encoder, entries, decoder, exits = [], [], [], []
    for down in model.down_blocks:
        attentions = list(getattr(down, "attentions", [])) or [None] * len(down.resnets)
        encoder += [resnet(m, a) for m, a in zip(down.resnets, attentions, strict=True)]
        if down.resnet_down is not None:
            encoder.append(resnet(down.resnet_down))
            entries.append(leaf(down.skip_conv))
    mid = model.mid_block
    decoder += [resnet(mid.resnets[0], mid.attentions[0]), resnet(mid.resnets[1])]
    for up in model.up_blocks:
        attention = next(iter(getattr(up, "attentions", [])), None)
        last = len(up.resnets) - 1
        decoder += [resnet(m, attention if j == last else None) for j, m in enumerate(up.resnets)]
        if up.resnet_up is not None:
            exits.append({"norm": leaf(up.skip_norm), "conv": leaf(up.skip_conv)})
            decoder.append(resnet(up.resnet_up))
    exits.append({"norm": leaf(model.conv_norm_out), "conv": leaf(model.conv_out)})
    e = model.time_embedding
    return {
        "conv_in": leaf(model.conv_in), "time_proj": {"weight": model.time_proj.weight.detach().numpy()},
        "time_embedding": {"linear_1": leaf(e.linear_1), "linear_2": leaf(e.linear_2)}, "encoder": numbered(encoder),
        "pyramid_in": numbered(entries), "decoder": numbered(decoder), "pyramid_out": numbered(exits),
    }  # fmt: skip


def test_diffusers_equal():
    """Attention there has 32 groups whatever the width, so the width is 128."""
    torch.manual_seed(0)
    model = skip_model(8, (128, 128), 1, (False, True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    net = ncsnpp(
        (8, 8, 3), multipliers=(1, 1), blocks=1, attention=(4,), progressive_input="skip", progressive_output="skip"
    )
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    sigma = np.array([0.3, 5.0], np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(sigma)).sample
    ours = jax.jit(net.apply)(from_model(model), x, jnp.log(sigma)) / sigma[:, None, None, None]
    reference = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.std(reference) > 0.05
    assert np.max(np.abs(np.asarray(ours) - reference)) < 1e-4 * max(1, np.max(np.abs(reference)))


@pytest.mark.parametrize(
    ("preset", "size", "widths", "blocks", "attends"),
    [
        (song_256, 256, (128, 128, 256, 256, 256, 256, 256), 2, 4),
        (song_1024, 1024, (16, 32, 64, 128, 256, 512, 512, 512), 1, 6),
    ],
)
def test_counts_of_the_large_networks_are_those_of_diffusers(preset, size, widths, blocks, attends):
    with torch.device("meta"):
        model = skip_model(size, widths, blocks, tuple(i == attends for i in range(len(widths))))
    theirs = sum(p.numel() for p in model.parameters())
    assert count(jax.eval_shape(preset().init, jax.random.key(0))) == theirs
