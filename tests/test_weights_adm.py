"""The table of published ADM weights: there and back, both orders of attention, totality."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from diffusion_jax.nets import adm, adm_classifier
from diffusion_jax.weights.adm import from_guided_diffusion, to_guided_diffusion

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 4}
MAKERS = {
    "network": functools.partial(adm, (8, 8, 3), **SMALL, classes=3),
    "upsampler": functools.partial(adm, (8, 8, 3), **SMALL, image=3),
    "classifier": functools.partial(adm_classifier, (8, 8, 3), **SMALL, classes=3),
}
HEADS = [{"heads": 4}, {"head_channels": 8}]


def like(make, heads):
    return jax.eval_shape(make(**heads).init, jax.random.key(0))


def random(params):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)


@pytest.mark.parametrize("heads", HEADS, ids=["heads", "head_channels"])
@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_there_and_back_exact(make, order, heads):
    params = random(like(make, heads))
    state = to_guided_diffusion(params, order=order, **heads)
    back = from_guided_diffusion(state, params, order=order, **heads)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert sum(value.size for value in state.values()) == sum(a.size for a in jax.tree.leaves(params))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_names_of_the_published_files(make):
    state = to_guided_diffusion(random(like(make, HEADS[0])), order="new", heads=4)
    shapes = {name: value.shape for name, value in state.items()}
    assert shapes["time_embed.0.weight"] == (64, 16)
    assert shapes["input_blocks.0.0.weight"] == (16, 6 if make is MAKERS["upsampler"] else 3, 3, 3)
    assert shapes["input_blocks.1.0.emb_layers.1.weight"] == (32, 64)
    assert shapes["input_blocks.3.0.skip_connection.weight"] == (32, 16, 1, 1)
    assert shapes["input_blocks.3.1.qkv.weight"] == (96, 32, 1)
    assert shapes["middle_block.1.proj_out.weight"] == (32, 32, 1)
    assert shapes["out.0.weight"] == ((32,) if make is MAKERS["classifier"] else (16,))
    if make is MAKERS["classifier"]:
        assert shapes["out.2.positional_embedding"] == (32, 17)
        assert shapes["out.2.c_proj.weight"] == (3, 32, 1)
    else:
        assert shapes["output_blocks.1.2.in_layers.2.weight"] == (32, 32, 3, 3)
        assert shapes["out.2.weight"] == (6, 16, 3, 3)
    assert ("label_emb.weight" in shapes) == (make is MAKERS["network"])


def test_orders_of_attention():
    """Channel (part, head, c) of the new order is channel (head, part, c) of the legacy one."""
    params = random(like(MAKERS["network"], HEADS[1]))
    name = "input_blocks.3.1.qkv.weight"
    legacy, new = (to_guided_diffusion(params, order=order, head_channels=8)[name] for order in ("legacy", "new"))
    np.testing.assert_array_equal(new.reshape(3, 4, 8, 32, 1).transpose(1, 0, 2, 3, 4), legacy.reshape(4, 3, 8, 32, 1))


def test_half_precision_is_read():
    params = like(MAKERS["classifier"], HEADS[1])
    state = to_guided_diffusion(random(params), order="legacy", head_channels=8)
    half = {name: value.astype(np.float16) for name, value in state.items()}
    read = from_guided_diffusion(half, params, order="legacy", head_channels=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(np.float32)}


def test_total_or_error():
    params = like(MAKERS["network"], HEADS[1])
    read = functools.partial(from_guided_diffusion, params_like=params, order="legacy", head_channels=8)
    state = to_guided_diffusion(random(params), order="legacy", head_channels=8)
    name = "middle_block.1.qkv.bias"
    with pytest.raises(ValueError, match=f"missing: {name}"):
        read({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=r"left over: input_blocks\.99\.0\.weight"):
        read({**state, "input_blocks.99.0.weight": np.zeros(3)})
    for wrong in (np.zeros(95, np.float32), np.zeros((96, 2), np.float32), np.float32(0)):
        with pytest.raises(ValueError, match=f"shape of {name}"):
            read({**state, name: wrong})
    with pytest.raises(ValueError, match=r"shape of middle_block\.1\.qkv\.weight"):
        read({**state, "middle_block.1.qkv.weight": np.zeros((96, 32), np.float32)})
    both = {"out.9.bias": np.zeros(1), **{key: value for key, value in state.items() if key != name}}
    with pytest.raises(ValueError) as failure:
        read(both)
    assert "left over: out.9.bias" in str(failure.value) and f"missing: {name}" in str(failure.value)
    with pytest.raises(ValueError, match=r"without a name in guided-diffusion.*\n.*out_conv\.gain"):
        to_guided_diffusion({"out_conv": {"gain": np.zeros(3)}}, order="new")
    with pytest.raises(ValueError, match="order='old' is not one of legacy, new"):
        read(state, order="old")
