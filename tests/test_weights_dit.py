"""Weight tables of the transformers: exact round trips in both directions, and errors that name what differs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from diffusion_jax.nets import dit
from diffusion_jax.nets.dit import position_table
from diffusion_jax.weights import trees
from diffusion_jax.weights.dit import from_dit, from_sit, positions, to_dit, to_sit

KIT = {"norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True, "in_context": (3, 1), "bottleneck": 5}
JOINT = {"tokens": 5, "context": "joint"}
VARIANTS = {"plain": {}, "kit": KIT, "cross": {"tokens": 5}, "joint": JOINT}


def example(**options):
    """The shapes of a small network's parameters, and values for them."""
    like = jax.eval_shape(dit((2, 16, 2), 2, (4, 4, 3), classes=3, **options).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return like, jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), like)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_exact(name):
    """From our parameters there and back, every value and every name once."""
    like, params = example(**VARIANTS[name])
    rotary = name == "kit"
    state = to_dit(params, grid=(2, 2), rotary=rotary)
    jax.tree.map(np.testing.assert_array_equal, from_dit(state, like, rotary=rotary), params)
    assert len(state) == 1 + len(jax.tree.leaves(like))
    again = to_dit(from_dit(state, like, rotary=rotary), grid=(2, 2), rotary=rotary)
    assert all(np.array_equal(again[key], state[key]) for key in state)


def test_fused_layouts():
    """Rows (q | k | v), each head after head; with rotary positions neighbours are what are pairs here."""
    _, params = example(**KIT)
    kernel = params["blocks"]["0"]["attn"]["qkv"]["kernel"]  # [16, 3, 2, 8]
    plain, turned = (to_dit(params, rotary=rotary)["blocks.0.attn.qkv.weight"] for rotary in (False, True))
    np.testing.assert_array_equal(plain[16 + 8 + 5], kernel[:, 1, 1, 5])  # k, head 1, channel 5
    np.testing.assert_array_equal(turned[16 + 8 + 5], kernel[:, 1, 1, 4 + 2])  # the partner of 4 there, of 2 here
    np.testing.assert_array_equal(turned[32:], plain[32:])
    w12 = to_dit(params)["blocks.1.mlp.w12.weight"]
    np.testing.assert_array_equal(w12[42 + 3], params["blocks"]["1"]["mlp"]["w12"]["kernel"][:, 1, 3])


def test_patches_keep_the_order_of_a_convolution():
    _, params = example()
    weight = to_dit(params)["x_embedder.proj.weight"]
    assert weight.shape == (16, 3, 2, 2)
    np.testing.assert_array_equal(weight[:, 2, 0, 1], params["x_embedder"]["proj"]["kernel"][0, 1, 2])


def test_positions_are_those_computed():
    np.testing.assert_allclose(positions(3, 5, 32), position_table(3, 5, 32), atol=1e-5)
    like, params = example()
    state = to_dit(params, grid=(4, 4))
    from_dit({name: value for name, value in state.items() if name != "pos_embed"}, like)
    with pytest.raises(ValueError, match="pos_embed is not the table.*differs by up to 0.01"):
        from_dit({**state, "pos_embed": state["pos_embed"] + np.float32(0.01)}, like)
    with pytest.raises(ValueError, match="not that of a square"):
        from_dit({**state, "pos_embed": state["pos_embed"][:, :15]}, like)


def test_total_or_error():
    like, params = example()
    state = to_dit(params)
    name = "blocks.1.attn.qkv.bias"
    changed = {key: value for key, value in state.items() if key != name}
    changed |= {"blocks.2.attn.qkv.bias": state[name], "t_embedder.mlp.0.bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError) as error:
        from_dit(changed, like)
    for part in ("left over: blocks.2.attn.qkv.bias", f"missing: {name}", "shape of t_embedder.mlp.0.bias"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"without a name in DiT:\n  blocks.0.gain"):
        to_dit({**params, "blocks": {**params["blocks"], "0": {**params["blocks"]["0"], "gain": np.zeros(2)}}})


def test_sit_leaves_out_what_it_does_not_use():
    (like, params), (_, wide) = example(learned_variance=False), example()
    there = to_dit(wide)
    here = from_sit(there, like)
    kernel, theirs = here["final_layer"]["linear"]["kernel"], wide["final_layer"]["linear"]["kernel"]
    np.testing.assert_array_equal(kernel.reshape(16, 4, 3), theirs.reshape(16, 4, 6)[..., :3])
    jax.tree.map(np.testing.assert_array_equal, from_sit(to_sit(params), like), params)
    unused = to_sit(params)["final_layer.linear.weight"].reshape(4, 6, 16)[:, 3:]
    assert unused.size and not np.any(unused)


def test_trees():
    """The helpers that all tables share."""
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trees.nested(dict(trees.leaves(tree))) == tree
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    np.testing.assert_array_equal(trees.kernel_here(weight)[2, 1, 0, 1], weight[1, 0, 2, 1])
    np.testing.assert_array_equal(trees.kernel_there(trees.kernel_here(weight)), weight)
    assert trees.same_names(("a", "gain")) is None
