"""CLIP's tower for texts: its sizes, what a place sees, where the end of a text is, and its weights' names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.nets import count
from diffusion_jax.nets.clip import (
    TextStates,
    clip_text,
    clip_vit_l_text,
    gelu,
    openclip_g_text,
    openclip_h_text,
    quick_gelu,
)
from diffusion_jax.typing import InputError
from diffusion_jax.weights.clip import from_transformers, text_from_transformers, text_to_transformers

TINY: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "mlp": 24, "vocab": 12, "length": 7, "n_out": 6, "eos": 9}
IDS = jnp.array([[8, 1, 2, 9, 9, 9], [8, 3, 9, 11, 9, 10]])
KEY = jax.random.key(0)


def tower(**more: Any):
    return clip_text(**{**TINY, **more})


@pytest.fixture(scope="module")
def tiny():
    encoder = tower()
    return jax.jit(encoder.apply), encoder.init(KEY)


@pytest.mark.parametrize(
    ("make", "size", "width", "pooled"),
    [
        # Radford et al. 2021 and OpenCLIP; the same as those of transformers' modules (tests/parity).
        (clip_vit_l_text, 123_060_480, 768, 768),
        (openclip_h_text, 340_387_840, 1024, 1024),
        (openclip_g_text, 694_659_840, 1280, 1280),
    ],
    ids=["ViT-L/14", "ViT-H/14", "ViT-bigG/14"],
)
def test_published_sizes(make, size, width, pooled):
    encoder = make()
    params = jax.eval_shape(encoder.init, KEY)
    states = jax.eval_shape(encoder.apply, params, jax.ShapeDtypeStruct((2, 77), jnp.int32))
    assert count(params) == size
    assert (states.hidden.shape, states.pooled.shape) == ((2, 77, width), (2, pooled))
    assert (encoder.width, encoder.length) == (width, 77)


@pytest.mark.slow
def test_a_place_sees_what_is_before_it_only(tiny):
    apply, params = tiny
    hidden, other = apply(params, IDS).hidden, apply(params, IDS.at[:, 3].set(5)).hidden
    np.testing.assert_allclose(hidden[:, :3], other[:, :3], atol=1e-6)
    assert np.abs(hidden[:, 3:] - other[:, 3:]).max(axis=2).min() > 1e-3


def test_pooled_is_the_first_end_of_text_whatever_comes_after(tiny):
    apply, params = tiny
    pooled, last = apply(params, IDS).pooled, tower(n_out=None)
    bare = {"text_model": params["text_model"]}
    hidden, unprojected = jax.jit(last.apply)(bare, IDS)
    for row, place in enumerate((3, 2)):  # the highest id, which is no end of text, stands after it
        np.testing.assert_allclose(unprojected[row], hidden[row, place], atol=1e-6)
        expected = hidden[row, place] @ params["text_projection"]["kernel"]
        np.testing.assert_allclose(pooled[row], expected, atol=1e-5)
    np.testing.assert_allclose(apply(params, IDS.at[:, 4:].set(0)).pooled, pooled, atol=1e-6)


@pytest.mark.slow
def test_an_earlier_layer_is_that_of_a_shorter_tower(tiny):
    """State -2 of two layers is state -1 of one layer with the same weights, normalized or not; so is -3 the words."""
    _, params = tiny
    layers = params["text_model"]["encoder"]["layers"]
    short = {**params, "text_model": {**params["text_model"], "encoder": {"layers": {"0": layers["0"]}}}}
    for normed in (True, False):
        earlier = tower(layer=-2, normed=normed).apply(params, IDS).hidden
        shorter = tower(depth=1, normed=normed).apply(short, IDS).hidden
        np.testing.assert_allclose(earlier, shorter, atol=1e-6)
    words = tower(layer=-3, normed=False).apply(params, IDS).hidden
    tables = params["text_model"]["embeddings"]
    expected = tables["token_embedding"]["embedding"][IDS] + tables["position_embedding"]["embedding"][None, :6]
    np.testing.assert_allclose(words, expected)


@pytest.mark.slow
def test_activations_are_what_they_are_called():
    x = jnp.linspace(-3.0, 3.0, 13)
    np.testing.assert_allclose(gelu(x), x * jax.scipy.stats.norm.cdf(x), atol=1e-6)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    results = [tower(act=act).apply(tower().init(KEY), IDS).hidden for act in ("gelu", "quick_gelu")]
    assert 1e-5 < np.abs(results[0] - results[1]).max() < 0.1


def test_bfloat16_is_close_and_gives_float32(tiny):
    apply, params = tiny
    half = jax.jit(tower(dtype=jnp.bfloat16, remat="full").apply)(params, IDS)
    for a, b in zip(half, apply(params, IDS), strict=True):
        assert a.dtype == jnp.float32
        assert 0 < np.abs(a - b).max() < 0.05 * np.abs(b).max()


def test_names_are_those_of_transformers_and_come_back(tiny):
    params = tiny[1]
    state = text_to_transformers(params)
    for name, shape in {
        "text_model.embeddings.token_embedding.weight": (12, 16),
        "text_model.embeddings.position_embedding.weight": (7, 16),
        "text_model.encoder.layers.1.self_attn.out_proj.weight": (16, 16),
        "text_model.encoder.layers.0.mlp.fc1.weight": (24, 16),
        "text_model.encoder.layers.0.layer_norm2.bias": (16,),
        "text_model.final_layer_norm.weight": (16,),
        "text_projection.weight": (6, 16),
    }.items():
        assert state[name].shape == shape
    jax.tree.map(np.testing.assert_array_equal, text_from_transformers(state, params), params)


def test_whole_models_and_bare_names_are_read(tiny):
    params = tiny[1]
    state = text_to_transformers(params)
    more = {"vision_model.post_layernorm.bias": np.zeros(3), "visual_projection.weight": np.zeros((2, 3)),
            "logit_scale": np.zeros(()), "text_model.embeddings.position_ids": np.arange(7)[None]}  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, text_from_transformers(state | more, params), params)
    bare = {name.removeprefix("text_model."): value for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, text_from_transformers(bare, params), params)
    without = {"text_model": params["text_model"]}
    jax.tree.map(np.testing.assert_array_equal, text_from_transformers(state, without), without)


def test_total_or_an_error(tiny):
    params = tiny[1]
    state = text_to_transformers(params)
    less = {name: value for name, value in state.items() if name != "text_projection.weight"}
    with pytest.raises(ValueError, match=r"missing: text_projection\.weight"):
        text_from_transformers(less, params)
    with pytest.raises(ValueError, match="left over: head.weight"):
        text_from_transformers(state | {"head.weight": np.zeros(2)}, params)
    with pytest.raises(ValueError, match="missing"):
        from_transformers(state, params)  # the other tower's reader


def test_what_it_refuses(tiny):
    for more in ({"act": "relu"}, {"layer": 0}, {"layer": -4}, {"heads": 3}):
        with pytest.raises(InputError):
            tower(**more)
    apply, params = tiny
    for ids in (IDS[0], jnp.zeros((1, 8), int), jnp.zeros((1, 4))):
        with pytest.raises(ValueError, match="ids must be int"):
            apply(params, ids)
    assert isinstance(apply(params, IDS[:, :1]), TextStates)
