"""Our ADM and its classifier equal PyTorch, on random weights carried over by weights/adm.py.

The reference is a plain transcription of the equations of diffusion_jax.nets.adm with torch's own convolution, group
normalization, pooling and interpolation. It asks for its weights by the names of the published checkpoints, and a
weight that is asked for the first time is drawn at random: one run makes the state dict. diffusers' UNet2DModel with
the same options is a second reference.
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

from diffusion_jax.nets import adm, adm_classifier, adm_imagenet, count
from diffusion_jax.weights.adm import from_guided_diffusion, to_guided_diffusion

torch.set_num_threads(1)
GROUPS = 4


class Reference:
    """The transcription; `state` fills as it runs."""

    def __init__(
        self, *, channels: int, multipliers: tuple[float, ...], blocks: int, attends: tuple[bool, ...], order: str,
        heads: int | None, head_channels: int,
    ):  # fmt: skip
        self.channels, self.blocks, self.attends, self.order = channels, blocks, attends, order
        self.widths = [int(channels * m) for m in multipliers]
        self.heads, self.head_channels = heads, head_channels
        self.state: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def weight(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        if name not in self.state:
            self.state[name] = mean + scale * torch.randn(shape, generator=self.random)
        assert self.state[name].shape == shape, name
        return self.state[name]

    def affine(self, name: str, n_in: int, n_out: int, *widths: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = 1 / math.sqrt(n_in * math.prod(widths))
        weight = self.weight(f"{name}.weight", n_out, n_in, *widths, scale=scale)
        return weight, self.weight(f"{name}.bias", n_out, scale=0.1)

    def conv(self, name: str, x: torch.Tensor, n_out: int, width: int = 3) -> torch.Tensor:
        return F.conv2d(x, *self.affine(name, x.shape[1], n_out, width, width), padding=width // 2)

    def conv1d(self, name: str, x: torch.Tensor, n_out: int) -> torch.Tensor:
        return F.conv1d(x, *self.affine(name, x.shape[1], n_out, 1))

    def linear(self, name: str, x: torch.Tensor, n_out: int) -> torch.Tensor:
        return F.linear(x, *self.affine(name, x.shape[1], n_out))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        gamma = self.weight(f"{name}.weight", n, scale=0.2, mean=1.0)
        return F.group_norm(x, GROUPS, gamma, self.weight(f"{name}.bias", n, scale=0.2), eps=1e-5)

    def heads_of(self, n: int) -> int:
        return self.heads or n // self.head_channels

    def mix(self, qkv: torch.Tensor, order: str) -> torch.Tensor:
        """Attention of [b, 3 n, pixels], split into heads in one of the two published orders."""
        b, n, m = qkv.shape[0], qkv.shape[1] // 3, qkv.shape[2]
        h = self.heads_of(n)
        if order == "legacy":
            q, k, v = qkv.reshape(b, h, 3, n // h, m).unbind(2)
        else:
            q, k, v = (part.reshape(b, h, n // h, m) for part in qkv.split(n, dim=1))
        weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(n // h), dim=-1)
        return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, n, m)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        b, n, *pixels = x.shape
        qkv = self.conv1d(f"{name}.qkv", self.norm(f"{name}.norm", x).reshape(b, n, -1), 3 * n)
        h = self.conv1d(f"{name}.proj_out", self.mix(qkv, self.order), n)
        return x + h.reshape(b, n, *pixels)

    def block(self, name: str, x: torch.Tensor, emb: torch.Tensor, n_out: int, way: str = "") -> torch.Tensor:
        def resized(z: torch.Tensor) -> torch.Tensor:
            if way == "up":
                return F.interpolate(z, scale_factor=2, mode="nearest")
            return F.avg_pool2d(z, 2) if way == "down" else z

        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        h = self.conv(f"{name}.in_layers.2", resized(h), n_out)
        scale, shift = self.linear(f"{name}.emb_layers.1", F.silu(emb), 2 * n_out)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        h = self.conv(f"{name}.out_layers.3", F.silu(h), n_out)
        x = resized(x)
        return h + (x if x.shape[1] == n_out else self.conv(f"{name}.skip_connection", x, n_out, 1))

    def embedding(self, t: torch.Tensor, labels: torch.Tensor | None, classes: int | None) -> torch.Tensor:
        half = self.channels // 2
        angles = (
            t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)[None]
        )
        features = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        h = F.silu(self.linear("time_embed.0", features, 4 * self.channels))
        emb = self.linear("time_embed.2", h, 4 * self.channels)
        if classes is None:
            return emb
        table = self.weight("label_emb.weight", classes, 4 * self.channels)
        rows = torch.cat([table, torch.zeros(1, table.shape[1])])
        return emb + rows[labels]

    def down(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.conv("input_blocks.0.0", x, self.widths[0])
        skips = [x]
        for i, width in enumerate(self.widths):
            for _ in range(self.blocks):
                name = f"input_blocks.{len(skips)}"
                x = self.block(f"{name}.0", x, emb, width)
                x = self.attention(f"{name}.1", x) if self.attends[i] else x
                skips.append(x)
            if i < len(self.widths) - 1:
                x = self.block(f"input_blocks.{len(skips)}.0", x, emb, width, "down")
                skips.append(x)
        x = self.block("middle_block.0", x, emb, width)
        x = self.attention("middle_block.1", x)
        return self.block("middle_block.2", x, emb, width), skips

    def network(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, classes: int | None, n_out: int,
        small: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if small is not None:
            large = F.interpolate(small, x.shape[2:], mode="bilinear")
            x = torch.cat([x, large], dim=1)
        emb = self.embedding(t, labels, classes)
        x, skips = self.down(x, emb)
        stage = 0
        for i, width in reversed(list(enumerate(self.widths))):
            for j in range(self.blocks + 1):
                name, part = f"output_blocks.{stage}", 1
                x = self.block(f"{name}.0", torch.cat([x, skips.pop()], dim=1), emb, width)
                if self.attends[i]:
                    x, part = self.attention(f"{name}.1", x), 2
                if i > 0 and j == self.blocks:
                    x = self.block(f"{name}.{part}", x, emb, width, "up")
                stage += 1
        return self.conv("out.2", F.silu(self.norm("out.0", x)), n_out)

    def classifier(self, x: torch.Tensor, t: torch.Tensor, classes: int) -> torch.Tensor:
        x, _ = self.down(x, self.embedding(t, None, None))
        x = F.silu(self.norm("out.0", x)).flatten(2)
        x = torch.cat([x.mean(dim=2, keepdim=True), x], dim=2)
        n = x.shape[1]
        x = x + self.weight("out.2.positional_embedding", n, x.shape[2], scale=0.3)[None]
        x = self.mix(self.conv1d("out.2.qkv_proj", x, 3 * n), "new")
        return self.conv1d("out.2.c_proj", x, classes)[:, :, 0]


CASES = {
    "legacy": {"order": "legacy", "heads": None, "head_channels": 8},
    "new": {"order": "new", "heads": None, "head_channels": 8},
    "heads": {"order": "legacy", "heads": 4, "head_channels": 64},
}
SHAPE: dict[str, Any] = {"channels": 16, "multipliers": (0.5, 1, 2), "blocks": 1}
CLASSES = 5


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(3, 8, 8, 3)).astype(np.float32),
        rng.uniform(0, 999, 3).astype(np.float32),
        np.array([0, CLASSES - 1, CLASSES]),
    )


def chw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def state_of(reference: Reference) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in reference.state.items()}


def agree(ours: Any, theirs: np.ndarray) -> None:
    assert np.std(theirs) > 0.05
    assert np.max(np.abs(np.asarray(ours) - theirs)) < 1e-4 * max(1, np.max(np.abs(theirs)))


@pytest.mark.parametrize("case", CASES)
def test_network_equal(case):
    """Labels, one of them none; learned variance; with the case "heads" the low-resolution image of an upsampler."""
    x, t, labels = data()
    how, image = CASES[case], 2 if case == "heads" else None
    reference = Reference(**SHAPE, attends=(False, True, True), **how)
    small = np.random.default_rng(1).normal(size=(3, 4, 4, 2)).astype(np.float32)
    theirs = reference.network(
        chw(x), torch.from_numpy(t), torch.from_numpy(labels), CLASSES, 6, chw(small) if image else None
    )
    net = adm(
        (8, 8, 3), **SHAPE, attention=(4, 2), heads=how["heads"], head_channels=how["head_channels"], groups=GROUPS,
        classes=CLASSES, image=image,
    )  # fmt: skip
    params = from_guided_diffusion(state_of(reference), jax.eval_shape(net.init, jax.random.key(0)), **how)
    label = jnp.asarray(labels, jnp.int32)
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), {"label": label, "image": small} if image else label)
    agree(ours, np.moveaxis(theirs.numpy(), 1, -1))


def test_classifier_equal():
    x, t, _ = data()
    how = CASES["legacy"]
    reference = Reference(**SHAPE, attends=(False, True, True), **how)
    theirs = reference.classifier(chw(x), torch.from_numpy(t), CLASSES).numpy()
    net = adm_classifier((8, 8, 3), classes=CLASSES, **SHAPE, attention=(4, 2), head_channels=8, groups=GROUPS)
    params = from_guided_diffusion(state_of(reference), jax.eval_shape(net.init, jax.random.key(0)), **how)
    agree(jax.jit(net.apply)(params, x, jnp.asarray(t)), theirs)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_exact(case):
    x, t, labels = data()
    how = CASES[case]
    reference = Reference(**SHAPE, attends=(False, False, True), **how)
    reference.network(chw(x), torch.from_numpy(t), torch.from_numpy(labels), CLASSES, 6)
    net = adm(
        (8, 8, 3), **SHAPE, attention=(2,), heads=how["heads"], head_channels=how["head_channels"], groups=GROUPS,
        classes=CLASSES,
    )  # fmt: skip
    state = state_of(reference)
    params = from_guided_diffusion(state, jax.eval_shape(net.init, jax.random.key(0)), **how)
    back = to_guided_diffusion(params, **how)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_published_size_has_the_published_names():
    """On weights that take no memory: the reference for 64 pixels asks for exactly what our table gives."""
    reference = Reference(
        channels=192, multipliers=(1, 2, 3, 4), blocks=3, attends=(False, True, True, True), order="new", heads=None,
        head_channels=64,
    )  # fmt: skip
    names: dict[str, tuple[int, ...]] = {}

    def weight(name: str, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        assert names.setdefault(name, shape) == shape
        return torch.empty(shape, device="meta")

    reference.weight = weight
    reference.embedding = lambda t, labels, classes: _meta_embedding(reference, t, classes)
    x = torch.empty(1, 3, 64, 64, device="meta")
    reference.network(x, torch.empty(1, device="meta"), None, 1000, 6)
    params = jax.eval_shape(adm_imagenet(64).init, jax.random.key(0))
    assert count(params) == sum(math.prod(shape) for shape in names.values())
    ours = to_guided_diffusion(jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), params), order="new")
    assert {name: value.shape for name, value in ours.items()} == names


def _meta_embedding(reference: Reference, t: torch.Tensor, classes: int | None) -> torch.Tensor:
    features = torch.empty(t.shape[0], reference.channels, device="meta")
    reference.weight("label_emb.weight", classes or 0, 4 * reference.channels)
    h = reference.linear("time_embed.0", features, 4 * reference.channels)
    return reference.linear("time_embed.2", h, 4 * reference.channels)


def leaf(module: Any) -> dict[str, np.ndarray]:
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    return {"kernel": weight.T if weight.ndim == 2 else np.transpose(weight, (2, 3, 1, 0)), "bias": bias}


def resnet(module: Any) -> dict[str, Any]:
    names = {
        "in_norm": "norm1",
        "in_conv": "conv1",
        "emb_linear": "time_emb_proj",
        "out_norm": "norm2",
        "out_conv": "conv2",
    }
    p = {ours: leaf(getattr(module, theirs)) for ours, theirs in names.items()}
    return p if module.conv_shortcut is None else {**p, "skip_connection": leaf(module.conv_shortcut)}


def attention(module: Any) -> dict[str, Any]:
    q, k, v = (leaf(m) for m in (module.to_q, module.to_k, module.to_v))
    qkv = {name: np.concatenate([q[name], k[name], v[name]], axis=-1) for name in ("kernel", "bias")}
    return {"norm": leaf(module.group_norm), "qkv": qkv, "proj_out": leaf(module.to_out[0])}


def numbered(items: list[Any]) -> dict[str, Any]:
    return {str(i): item for i, item in enumerate(items)}


def from_model(model: UNet2DModel) -> dict[str, Any]:
    """diffusers' weights in our tree."""

    def stages(level: Any) -> list[list[Any]]:
        attentions = list(getattr(level, "attentions", [])) or [None] * len(level.resnets)
        pairs = zip(level.resnets, attentions, strict=True)
        return [[resnet(r)] + ([] if a is None else [attention(a)]) for r, a in pairs]

    inputs, outputs = [[leaf(model.conv_in)]], []
    for level in model.down_blocks:
        inputs += stages(level) + [[resnet(d)] for d in level.downsamplers or []]
    for level in model.up_blocks:
        last = stages(level)
        last[-1] += [resnet(u) for u in level.upsamplers or []]
        outputs += last
    mid = model.mid_block
    time = model.time_embedding
    middle = [resnet(mid.resnets[0]), attention(mid.attentions[0]), resnet(mid.resnets[1])]
    return {
        "time_embed": {"linear_1": leaf(time.linear_1), "linear_2": leaf(time.linear_2)},
        "label_emb": {"embedding": model.class_embedding.weight.detach().numpy()},
        "input_blocks": numbered([numbered(stage) for stage in inputs]), "middle_block": numbered(middle),
        "output_blocks": numbered([numbered(stage) for stage in outputs]),
        "out_norm": leaf(model.conv_norm_out), "out_conv": leaf(model.conv_out),
    }  # fmt: skip


def test_diffusers_equal():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=6, freq_shift=0, flip_sin_to_cos=True,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", attention_head_dim=8,
        norm_num_groups=GROUPS, attn_norm_num_groups=GROUPS, norm_eps=1e-5, num_class_embeds=CLASSES,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    x, t, labels = data()
    labels = labels % CLASSES
    with torch.no_grad():
        theirs = model(chw(x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    net = adm(
        (8, 8, 3), channels=16, multipliers=(1, 2), blocks=1, attention=(4,), head_channels=8, groups=GROUPS,
        classes=CLASSES,
    )  # fmt: skip
    ours = jax.jit(net.apply)(from_model(model), x, jnp.asarray(t), jnp.asarray(labels, jnp.int32))
    agree(ours, np.moveaxis(theirs.numpy(), 1, -1))
