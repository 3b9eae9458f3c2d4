"""ControlNet: its sizes, that it starts as nothing and scales, and its weights' names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from anywhere import params_like

from diffusion_jax.nets import count
from diffusion_jax.nets.controlnet import controlnet, copied, scaled, sd2_controlnet, sd15_controlnet, sdxl_controlnet
from diffusion_jax.nets.text_unet import text_unet
from diffusion_jax.typing import InputError
from diffusion_jax.weights.text_unet import from_diffusers, to_diffusers

KEY = jax.random.key(0)
B, H, W = 2, 3, 4
BOTH: dict[str, Any] = {
    "n_in": 2, "widths": (8, 16), "blocks": 1, "attends": (True, False), "heads": 2, "groups": 4, "tokens": 6,
}  # fmt: skip
OWN: dict[str, Any] = {"picture": 1, "hints": (4, 6, 8)}
X = jax.random.normal(jax.random.key(1), (B, H, W, 2))
T = jnp.array([3.0, 800.0])
TOKENS = jax.random.normal(jax.random.key(2), (B, 5, 6))
PICTURE = jax.random.uniform(jax.random.key(3), (B, 4 * H, 4 * W, 1))
COND = {"tokens": TOKENS, "image": PICTURE}


@pytest.fixture(scope="module")
def net():
    control = controlnet(**BOTH, **OWN)
    return jax.jit(control.apply), params_like(control.init)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size", "more", "n"),
    [
        # The numbers of weights of diffusers' modules with the published configurations (tests/parity).
        (sd15_controlnet, 361_279_120, {"tokens": (77, 768)}, 13),
        (sd2_controlnet, 364_228_240, {"tokens": (77, 1024)}, 13),
        (sdxl_controlnet, 1_251_014_160, {"tokens": (77, 2048), "vector": (1280,), "sizes": (6,)}, 10),
    ],
)
def test_published_sizes(make, size, more, n):
    net = make(dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init, KEY)
    assert count(params) == size
    shapes = {**more, "image": (72, 64, 3)}
    cond = {name: jax.ShapeDtypeStruct((2, *shape), jnp.float32) for name, shape in shapes.items()}
    x, t = jax.ShapeDtypeStruct((2, 9, 8, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
    residuals = jax.eval_shape(net.apply, params, x, t, cond)
    assert len(residuals) == n
    assert residuals[0].shape == (2, 9, 8, 320)


@pytest.mark.slow
def test_starts_as_nothing_and_copies_the_way_down(net):
    unet, start = params_like(text_unet(**BOTH).init), controlnet(**BOTH, **OWN).init(KEY)
    own = copied(start, unet)
    residuals = net[0](own, X, T, COND)
    assert all(not np.any(r) for r in residuals)
    jax.tree.map(np.testing.assert_array_equal, own["down_blocks"], unet["down_blocks"])
    assert own["controlnet_mid_block"] is start["controlnet_mid_block"]


@pytest.mark.slow
def test_residuals_scale_for_each_example_and_depend_on_the_picture(net):
    apply, params = net
    full, other = apply(params, X, T, COND), apply(params, X, T, COND | {"image": 1 - PICTURE})
    half = scaled(full, jnp.array([0.5, 0.0]))
    assert [r.shape for r in full] == [(B, 3, 4, 8), (B, 3, 4, 8), (B, 2, 2, 8), (B, 2, 2, 16), (B, 2, 2, 16)]
    for a, b, c in zip(full, half, other, strict=True):
        np.testing.assert_allclose(b[0], 0.5 * a[0], rtol=1e-6)
        np.testing.assert_array_equal(b[1], jnp.zeros_like(b[1]))
        assert np.max(np.abs(a - c)) > 1e-4


def test_names_are_those_of_diffusers_and_come_back(net):
    params = net[1]
    state = to_diffusers(params)
    for name, shape in {
        "controlnet_cond_embedding.conv_in.weight": (4, 1, 3, 3),
        "controlnet_cond_embedding.blocks.1.weight": (6, 4, 3, 3),
        "controlnet_cond_embedding.blocks.3.bias": (8,),
        "controlnet_cond_embedding.conv_out.weight": (8, 8, 3, 3),
        "controlnet_down_blocks.3.weight": (16, 16, 1, 1),
        "controlnet_mid_block.bias": (16,),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight": (8, 6),
    }.items():
        assert state[name].shape == shape, name
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(state, params), params)


def test_what_it_refuses(net):
    apply, params = net
    for cond in (None, {"tokens": TOKENS}, COND | {"image": PICTURE[:, :-1]}, COND | {"image": PICTURE.astype(int)}):
        with pytest.raises(ValueError, match=r"needs an image: float\[2, 12, 16, 1\]"):
            apply(params, X, T, cond)
    with pytest.raises(ValueError, match="no condition 'residuals'"):
        apply(params, X, T, COND | {"residuals": (X,)})
    with pytest.raises(InputError, match="hints"):
        controlnet(**BOTH, hints=())
