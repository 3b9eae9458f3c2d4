"""Our U-Net equals diffusers' UNet2DModel when it has the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from diffusion_jax.nets import count, unet
from diffusion_jax.weights.unet2d import from_diffusers, to_diffusers

SMALL: dict[str, Any] = {"channels": 16, "multipliers": (1, 2), "blocks": 2, "attention": (4,), "classes": 10}


def peer(shape: tuple[int, int, int], *, channels, multipliers, blocks, attention, classes=None) -> UNet2DModel:
    """The UNet2DModel with the same arguments, of random weights: also those that ours starts at zero or one."""
    attends = [min(shape[:2]) >> i in attention for i in range(len(multipliers))]
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=shape[:2], in_channels=shape[2], out_channels=shape[2], freq_shift=1, flip_sin_to_cos=False,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(channels * m for m in multipliers), layers_per_block=blocks, downsample_padding=0,
        attention_head_dim=None, norm_num_groups=min(32, channels // 4), norm_eps=1e-6,
        class_embed_type=None, num_class_embeds=None if classes is None else classes + 1,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.2 * torch.randn_like(p))
    return model


def state_of(model: UNet2DModel) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def distance(shape: tuple[int, int, int], batch: int, arguments: dict[str, Any]) -> float:
    model, net = peer(shape, **arguments), unet(shape, **arguments)
    params = from_diffusers(state_of(model), jax.eval_shape(net.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, *shape)).astype(np.float32)
    t = rng.uniform(0, 1000, batch).astype(np.float32)
    classes = arguments.get("classes")
    labels = None if classes is None else rng.integers(0, classes + 1, batch)
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(np.moveaxis(x, -1, 1)), torch.from_numpy(t),
            None if labels is None else torch.from_numpy(labels),
        ).sample  # fmt: skip
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), None if labels is None else jnp.asarray(labels, jnp.int32))
    reference = np.moveaxis(theirs.numpy(), 1, -1)
    assert np.std(reference) > 0.05
    return float(np.max(np.abs(np.asarray(ours) - reference)))


@pytest.mark.parametrize("classes", [None, 10])
def test_small_equal(classes):
    assert distance((8, 8, 3), 3, {**SMALL, "classes": classes}) < 1e-4


def test_not_square_three_levels():
    arguments = {"channels": 8, "multipliers": (1, 2, 3), "blocks": 1, "attention": (8, 2)}
    assert distance((8, 12, 1), 2, arguments) < 1e-4


@pytest.mark.slow
def test_cifar10_equal():
    arguments = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,)}
    assert distance((32, 32, 3), 2, arguments) < 1e-4
    net = unet((32, 32, 3))
    theirs = sum(p.numel() for p in peer((32, 32, 3), **arguments).parameters())
    assert count(jax.eval_shape(net.init, jax.random.key(0))) == theirs == 35_746_307


def test_round_trip_exact():
    state = state_of(peer((8, 8, 3), **SMALL))
    like = jax.eval_shape(unet((8, 8, 3), **SMALL).init, jax.random.key(0))
    back = to_diffusers(from_diffusers(state, like))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


def test_old_attention_names():
    state = state_of(peer((8, 8, 3), **SMALL))
    like = jax.eval_shape(unet((8, 8, 3), **SMALL).init, jax.random.key(0))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(state)
    for name in state:
        for new_part, old_part in old.items():
            if new_part in name:
                renamed[name.replace(new_part, old_part)] = renamed.pop(name)
    assert renamed.keys() != state.keys()
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(renamed, like), from_diffusers(state, like))


def test_total_or_error():
    state = state_of(peer((8, 8, 3), **SMALL))
    like = jax.eval_shape(unet((8, 8, 3), **SMALL).init, jax.random.key(0))
    missing = {name: value for name, value in state.items() if name != "mid_block.attentions.0.to_q.bias"}
    with pytest.raises(ValueError, match="missing: mid_block.attentions.0.to_q.bias"):
        from_diffusers(missing, like)
    with pytest.raises(ValueError, match="left over: conv_more.weight"):
        from_diffusers({**state, "conv_more.weight": np.zeros(3)}, like)
    with pytest.raises(ValueError, match="shape of conv_in.bias"):
        from_diffusers({**state, "conv_in.bias": np.zeros(3, np.float32)}, like)
    with pytest.raises(ValueError, match="without a name"):
        to_diffusers({"conv_in": {"gain": np.zeros(3)}})
