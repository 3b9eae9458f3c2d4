"""The U-Net of latent diffusion with a text: its sizes, what its conditions do, and its weights' names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anywhere import params_like
from flax import nnx

from diffusion_jax.guidance import classifier_free
from diffusion_jax.nets import conditioning, count, layers
from diffusion_jax.nets.text_unet import (
    Downsample,
    Upsample,
    sd2,
    sd15,
    sd_x4_upscaler,
    sdxl,
    sdxl_refiner,
    text_unet,
)
from diffusion_jax.typing import InputError, Prediction
from diffusion_jax.weights.text_unet import from_diffusers, to_diffusers

KEY = jax.random.key(0)
B, H, W, CLASSES = 2, 5, 6, 4
T = jnp.array([3.0, 800.0])
ALL: dict[str, Any] = {
    "n_in": 2, "n_out": 3, "widths": (8, 16), "blocks": 1, "attends": (True, False), "heads": (2, 4), "groups": 4,
    "tokens": 6, "vector": 5, "sizes": 2, "classes": CLASSES, "image": 1,
}  # fmt: skip
RESIDUALS = [(H, W, 8), (H, W, 8), (3, 3, 8), (3, 3, 16), (3, 3, 16)]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def conditions():
    return conditioning.with_masks(
        {
            "label": jnp.array([1, 3]),
            "vector": normal(2, B, 5),
            "sizes": jnp.array([[512.0, 64.0], [768.0, 0.0]]),
            "tokens": normal(3, B, 4, 6),
            "tokens_mask": jnp.array([[True] * 4, [True, True, False, False]]),
            "image": normal(4, B, H, W, 1),
            "residuals": tuple(normal(10 + i, B, *shape) for i, shape in enumerate(RESIDUALS)),
        }
    )


@pytest.fixture(scope="module")
def everything():
    net = text_unet(**ALL)
    return jax.jit(net.apply), params_like(net.init), normal(1, B, H, W, 2)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "more", "size", "kinds"),
    [
        # The numbers of weights of diffusers' modules with the published configurations (tests/parity).
        (sd15, {}, 859_520_964, {"tokens": 768}),
        (sd15, {"image": 5}, 859_535_364, {"tokens": 768, "image": 5}),
        (sd15, {"image": 4}, 859_532_484, {"tokens": 768, "image": 4}),
        (sd2, {}, 865_910_724, {"tokens": 1024}),
        (sd2, {"image": 5}, 865_925_124, {"tokens": 1024, "image": 5}),
        (sdxl, {}, 2_567_463_684, {"tokens": 2048, "vector": 1280, "sizes": 6}),
        (sdxl_refiner, {}, 2_259_526_660, {"tokens": 1280, "vector": 1280, "sizes": 5}),
        (sd_x4_upscaler, {}, 473_398_020, {"tokens": 1024, "image": 3, "label": None}),
    ],
)
def test_published_sizes(make, more, size, kinds):
    net = make(**more, dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init, KEY)
    assert count(params) == size
    shapes = {"tokens": (2, 77), "vector": (2,), "sizes": (2,), "image": (2, 9, 8)}
    cond = {
        name: jax.ShapeDtypeStruct((2,), jnp.int32)
        if n is None
        else jax.ShapeDtypeStruct((*shapes[name], n), "float32")
        for name, n in kinds.items()
    }
    x, t = jax.ShapeDtypeStruct((2, 9, 8, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    assert jax.eval_shape(net.apply, params, x, t, cond).shape == (2, 9, 8, 4)


def test_downsampling_pads_before_and_after():
    """Which outputs of a 3x3 window of ones, moved by 2, see one lit pixel: window i covers rows 2 i - 1 to 2 i + 1."""
    resample = Downsample(nnx.Rngs(0), 1, layers.Options(1, 1, 0.0, jnp.float32))
    resample.conv.kernel[...] = jnp.ones((3, 3, 1, 1))
    for size, pixel, seen in (
        (4, 0, [[1, 0], [0, 0]]),
        (4, 1, [[1, 1], [1, 1]]),
        (4, 3, [[0, 0], [0, 1]]),
        (3, 2, [[0, 0], [0, 1]]),
    ):
        lit = np.zeros((1, size, size, 1), np.float32)
        lit[0, pixel, pixel, 0] = 1
        np.testing.assert_array_equal(resample(jnp.asarray(lit))[0, :, :, 0], seen)


@pytest.mark.slow
def test_upsampling_is_the_nearest_pixel_for_odd_sizes_too():
    resample = Upsample(nnx.Rngs(0), 1, layers.Options(1, 1, 0.0, jnp.float32))
    resample.conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    x = normal(0, 1, 3, 4, 1)
    for size in ((5, 8), (6, 7), (5, 7)):
        rows, columns = (np.arange(m) * n // m for m, n in zip(size, (3, 4), strict=True))
        np.testing.assert_allclose(resample(x, size)[0, :, :, 0], x[0, :, :, 0][np.ix_(rows, columns)])


# Conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "vector", "sizes", "tokens", "image", "residuals"])
def test_every_kind_counts_and_can_be_absent(everything, kind):
    """Absent by its value and left out are the same; and it matters what is there, to every example."""
    apply, params, x = everything
    cond = conditions()
    null = conditioning.absent(cond, CLASSES)
    mine = [name for name in cond if name.removesuffix("_mask") == kind]
    gone = cond | {name: jax.tree.map(jnp.full_like, cond[name], null[name]) for name in mine}
    without = {name: value for name, value in cond.items() if name not in mine}
    full, zero = apply(params, x, T, cond), apply(params, x, T, gone)
    np.testing.assert_allclose(zero, apply(params, x, T, without), atol=1e-5)
    assert np.min(np.max(np.abs(full - zero), axis=(1, 2, 3))) > 1e-3


@pytest.mark.slow
def test_guidance_takes_the_absent_condition(everything):
    apply, params, x = everything
    cond = conditions()

    def denoiser(x, t, cond):
        y = apply(params, x, t, cond)
        return Prediction(y, y)

    free = classifier_free(denoiser, conditioning.absent(cond, CLASSES), 0.0)(x, T, cond).x0
    np.testing.assert_allclose(free, apply(params, x, T), atol=1e-4)


@pytest.mark.slow
def test_tokens_have_no_order_and_masked_ones_do_not_count(everything):
    apply, params, x = everything
    cond, order = conditions(), jnp.array([2, 0, 3, 1])
    turned = cond | {"tokens": cond["tokens"][:, order], "tokens_mask": cond["tokens_mask"][:, order]}
    other = cond | {"tokens": jnp.where(cond["tokens_mask"][:, :, None], cond["tokens"], 77.0)}
    for same in (turned, other):
        np.testing.assert_allclose(apply(params, x, T, cond), apply(params, x, T, same), atol=1e-4)


@pytest.mark.slow
def test_examples_are_independent_and_the_time_matters(everything):
    apply, params, x = everything
    cond = conditions()
    swapped = jax.tree.map(lambda leaf: leaf[::-1], (x, T, cond))
    y = apply(params, x, T, cond)
    np.testing.assert_allclose(apply(params, *swapped)[::-1], y, atol=1e-5)
    assert np.max(np.abs(apply(params, x, T + 50.0, cond) - y)) > 1e-3


def test_levels_that_only_look_at_tokens():
    """Where both attentions are to the tokens, none of them present makes pixels meet in convolutions alone."""
    arguments = {**ALL, "widths": (8,), "attends": (True,), "heads": 2, "groups": 1, "n_out": 2}
    net, plain = text_unet(**arguments, only_cross=True), text_unet(**arguments)
    params = jax.eval_shape(net.init, KEY)
    attention = params["down_blocks"]["0"]["attentions"]["0"]["transformer_blocks"]["0"]
    assert attention["attn1"]["to_k"]["kernel"].shape == attention["attn2"]["to_k"]["kernel"].shape == (6, 8)
    middle = params["mid_block"]["attentions"]["0"]["transformer_blocks"]["0"]
    assert middle["attn1"]["to_k"]["kernel"].shape == (8, 8)
    assert count(jax.eval_shape(plain.init, KEY)) - count(params) == 3 * 2 * 8 * (8 - 6)


@pytest.mark.slow
def test_projections_may_be_matrices_or_convolutions(everything):
    apply, params, x = everything
    state = to_diffusers(params)
    flat = {
        name: value[:, :, 0, 0] if name.endswith(("proj_in.weight", "proj_out.weight")) else value
        for name, value in state.items()
    }
    linear = text_unet(**ALL, linear_projection=True)
    same = from_diffusers(flat, jax.eval_shape(linear.init, KEY))
    cond = conditions()
    np.testing.assert_allclose(jax.jit(linear.apply)(same, x, T, cond), apply(params, x, T, cond), atol=1e-5)


# Computation ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_starts_at_zero_and_gradients_reach_every_parameter(everything):
    _, params, x = everything
    net, cond = text_unet(**ALL), conditions()
    remade = text_unet(**ALL, remat="full")
    np.testing.assert_array_equal(net.apply(net.init(KEY), x, T), jnp.zeros((B, H, W, 3)))
    gradients = [
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, x, T, cond) ** 2)))(params) for f in (net.apply, remade.apply)
    ]
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert np.max(np.abs(gradient)) > 0, jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.max(np.abs(b)) + 1e-6), *gradients)


@pytest.mark.slow
def test_bfloat16_is_close_and_gives_float32(everything):
    apply, params, x = everything
    half = jax.jit(text_unet(**ALL, dtype=jnp.bfloat16).apply)(params, x, T, conditions())
    full = apply(params, x, T, conditions())
    assert half.dtype == jnp.float32
    assert 0 < np.max(np.abs(half - full)) < 0.1 * np.max(np.abs(full))


# Weights -------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_diffusers_and_come_back(everything):
    params = everything[1]
    state = to_diffusers(params)
    for name, shape in {
        "conv_in.weight": (8, 3, 3, 3),
        "time_embedding.linear_1.weight": (32, 8),
        "class_embedding.weight": (CLASSES, 32),
        "add_embedding.linear_1.weight": (32, 5 + 2 * 256),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (8, 32),
        "down_blocks.0.attentions.0.norm.weight": (8,),
        "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 6),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.bias": (8,),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (64, 8),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.weight": (8, 32),
        "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
        "down_blocks.1.resnets.0.conv_shortcut.weight": (16, 8, 1, 1),
        "mid_block.attentions.0.proj_out.bias": (16,),
        "up_blocks.0.resnets.0.norm1.weight": (32,),
        "up_blocks.0.upsamplers.0.conv.bias": (16,),
        "up_blocks.1.attentions.1.transformer_blocks.0.norm3.bias": (8,),
        "conv_norm_out.weight": (8,),
        "conv_out.weight": (3, 8, 3, 3),
    }.items():
        assert state[name].shape == shape, name
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.bias" not in state
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(state, params), params)


def test_total_or_an_error(everything):
    params = everything[1]
    state = to_diffusers(params)
    less = {name: value for name, value in state.items() if name != "conv_out.bias"}
    with pytest.raises(ValueError, match=r"missing: conv_out\.bias"):
        from_diffusers(less, params)
    with pytest.raises(ValueError, match=r"left over: conv_more\.weight"):
        from_diffusers(state | {"conv_more.weight": np.zeros(2)}, params)
    with pytest.raises(ValueError, match=r"shape of conv_out\.bias"):
        from_diffusers(state | {"conv_out.bias": np.zeros(2)}, params)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"widths": ()}, "at least one level"),
        ({"blocks": 0}, "at least one level"),
        ({"n_out": 0}, "at least one channel"),
        ({"widths": (8, 18)}, "groups=4 divide"),
        ({"heads": (3, 4)}, "not divisible by heads=3"),
        ({"heads": (2, 5)}, "not divisible by heads=5"),
        ({"heads": (2, 2, 2)}, "not one for each of the 2 levels"),
        ({"depths": (1, 0)}, "at least one layer"),
        ({"vector": 0}, "vector=0"),
        ({"tokens": None, "only_cross": True}, "takes no tokens"),
    ],
)
def test_arguments_that_do_not_fit(more, message):
    with pytest.raises(InputError, match=message):
        text_unet(**{**ALL, **more})


def test_inputs_that_do_not_fit(everything):
    apply, params, x = everything
    cond = conditions()
    with pytest.raises(ValueError, match=r"x must be \[b h w 2\]"):
        apply(params, x[..., :1], T)
    with pytest.raises(ValueError, match=r"t must be \[2\]"):
        apply(params, x, T[:1])
    with pytest.raises(ValueError, match=r"tokens must be float\[2, 4, 6\]"):
        apply(params, x, T, {"tokens": cond["tokens"][..., :5]})
    with pytest.raises(ValueError, match=r"sizes must be float\[2, 2\]"):
        apply(params, x, T, {"sizes": cond["sizes"][:, :1]})
    with pytest.raises(ValueError, match="residuals must be 5 arrays of 4 axes"):
        apply(params, x, T, {"residuals": cond["residuals"][:4]})
    with pytest.raises(ValueError, match=r"a residual must be \[2, 5, 6, 8\]"):
        apply(params, x, T, {"residuals": cond["residuals"][::-1]})
    with pytest.raises(ValueError, match="no condition 'depth'"):
        apply(params, x, T, {"depth": x})
