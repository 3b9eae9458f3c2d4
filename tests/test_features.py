"""Feature networks: shapes and published counts, resizes against Pillow and JAX, files, and what is refused.

Equality with PyTorch's networks is in tests/parity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax.evaluation.features import clip, dinov2, inception, net
from diffusion_jax.evaluation.features import resize as resizes
from diffusion_jax.evaluation.results import sha256
from diffusion_jax.nets import count
from diffusion_jax.nets.clip import clip_vision
from diffusion_jax.typing import InputError
from diffusion_jax.weights import files
from diffusion_jax.weights.clip import from_transformers, to_transformers
from diffusion_jax.weights.dinov2 import from_published
from diffusion_jax.weights.dinov2 import to_transformers as to_dinov2
from diffusion_jax.weights.inception import from_torch, to_torch

laws = settings(deadline=None, max_examples=60, derandomize=True)


def like(init):
    return jax.eval_shape(init, jax.random.key(0))


def pictures(b: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (b, h, w, 3), dtype=np.uint8)


# Resizes -------------------------------------------------------------------------------------------------------------


@laws
@given(n_in=st.integers(1, 40), n_out=st.integers(1, 40), method=st.sampled_from(resizes.get_args(resizes.Method)))
def test_rows_sum_to_one_and_the_same_size_is_the_identity(n_in, n_out, method):
    np.testing.assert_allclose(resizes.matrix(n_in, n_out, method).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(resizes.matrix(n_in, n_in, method), np.eye(n_in), atol=1e-6)


@pytest.mark.parametrize("n_out", [5, 23, 64])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_antialias_is_jax_images(method, n_out):
    x = np.random.default_rng(0).normal(size=(1, 17, 23, 3)).astype(np.float32)
    shape = (1, n_out, n_out, 3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        reference = jax.image.resize(x, shape, method, antialias=True)
    ours = resizes.resize(jnp.asarray(x), shape[1:3], f"{method}_antialias")
    np.testing.assert_allclose(ours, reference, atol=2e-5)


@pytest.mark.parametrize("size", [(8, 30), (32, 20)], ids=str)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_pillow_rounds_what_antialias_does_not(method, size):
    images = (70 + pictures(2, 20, 12) * 0.45).astype(np.uint8)  # nothing overshoots, and is clipped, on the way
    exact = resizes.resize(jnp.asarray(images, jnp.float32), size, f"{method}_antialias")
    rounded = resizes.pillow(images, size, method)
    assert rounded.dtype == np.uint8
    # Half a level for the axis that is rounded last, and at most 1.4 (the sum of |k|) of that for the first.
    assert np.abs(np.clip(exact, 0, 255) - rounded).max() < 1.25


def test_tensorflow_1_samples_without_half_pixels():
    ramp = np.arange(8, dtype=np.float32)
    line = resizes.matrix(8, 16, "bilinear_tf1") @ ramp
    np.testing.assert_allclose(line, np.minimum(np.arange(16) / 2, 7))
    middle = resizes.matrix(8, 16, "bilinear") @ ramp
    np.testing.assert_allclose(middle, np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7))


def test_squares_and_short_sides():
    images = pictures(1, 30, 47)
    image = Image.fromarray(images[0])
    square = image.crop((8, 0, 38, 30)).resize((10, 10), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resizes.pillow_square(images, 10)[0], np.asarray(square))
    scaled = image.resize((15, 10), Image.Resampling.BICUBIC)  # 47 x 10 / 30 = 15.67, and (15 - 10) / 2 to even
    np.testing.assert_array_equal(resizes.pillow_short_side(images, 10)[0], np.asarray(scaled)[:, 2:12])
    same = pictures(2, 16, 16)
    np.testing.assert_array_equal(resizes.pillow_square(same, 8), resizes.pillow_short_side(same, 8))
    assert resizes.pillow(np.zeros((0, 4, 4, 3), np.uint8), (2, 2)).shape == (0, 2, 2, 3)


# Networks ------------------------------------------------------------------------------------------------------------


def test_inceptions_parameters_are_torchvisions():
    shapes = like(inception.inception_v3().init)
    # torchvision documents 27,161,264, with 3,326,696 in its auxiliary head; 1008 classes are 8 more. To these the
    # running statistics are added, as many as gains and biases.
    norms = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(shapes) if "running" in str(path[-1]))
    assert count(shapes) - norms == 27_161_264 - 3_326_696 + 8 * 2049
    assert len(jax.tree.leaves(shapes)) == 94 * 5 + 2  # 94 convolutions, as in Szegedy et al.'s figure


def test_inceptions_features_have_their_shapes_at_any_size():
    made = inception.inception_v3("pytorch_fid")
    for size in ((32, 32), (64, 40)):
        images = jax.ShapeDtypeStruct((3, *size, 3), jnp.uint8)
        features = jax.eval_shape(made.apply, like(made.init), images)
        assert {name: f.shape for name, f in features.items()} == {
            "pooled": (3, 2048), "spatial": (3, 17 * 17 * 7), "probabilities": (3, 1008),
        }  # fmt: skip
        assert all(f.dtype == jnp.float32 for f in features.values())


@pytest.mark.slow
def test_vision_transformers_have_their_published_sizes():
    # open_clip's table of models has 303.97 M for the picture tower of ViT-L-14, Oquab et al. 300 M for DINOv2's
    # ViT-L/14; that both are transformers' to the last parameter is in tests/parity.
    assert round(count(like(clip_vision().init)) / 1e4) == 30_397
    assert round(count(like(dinov2.dinov2_net().init)) / 1e7) == 30
    for made, size in (
        (clip.clip_image(), 336),
        (clip.clip_image("openai", size=224), 224),
        (dinov2.dinov2_vitl14(), 224),
    ):
        ready = made.prepare(pictures(2, 20, 16))
        assert ready.shape == (2, size, size, 3) and ready.dtype == np.uint8
        features = jax.eval_shape(made.apply, like(made.init), jax.ShapeDtypeStruct(ready.shape, jnp.uint8))
        assert features["pooled"].shape == (2, 1024 if "dino" in made.name else 768)
        assert str(size) in made.resize


def test_maximum_and_mean_of_neighbours():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    mean, maximum = np.empty_like(x), np.empty_like(x)
    for i in range(5):
        for j in range(6):
            near = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            mean[:, i, j], maximum[:, i, j] = near.mean(axis=(1, 2)), near.max(axis=(1, 2))
    np.testing.assert_allclose(inception.mean_of_neighbours(jnp.asarray(x)), mean, atol=1e-6)
    np.testing.assert_array_equal(inception.max_pool(jnp.asarray(x), stride=1, padding="SAME"), maximum)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A CLIP tower of little size: (network, parameters)."""
    tower = clip_vision(size=14, patch=7, width=8, depth=1, heads=2, mlp=12, n_out=4)
    return clip.clip_features("tiny", tower, 14, "cmmd"), tower.init(jax.random.key(0))


def test_safetensors_and_npz_give_the_same_with_their_hash(tiny, tmp_path):
    made, params = tiny
    state = to_transformers(params)
    one = files.save(tmp_path / "one.safetensors", state)
    parts = files.save(tmp_path / "parts.safetensors", state, part_bytes=500)
    np.savez(tmp_path / "a.npz", **state)
    for path, digest in ((one, sha256(one)), (parts, sha256(state)), (tmp_path / "a.npz", sha256(tmp_path / "a.npz"))):
        loaded = made.load(path)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
        assert loaded.sha256 == digest


def test_another_networks_file_is_told_by_its_differences(tiny, tmp_path):
    made, params = tiny
    state = to_transformers(params)
    del state["visual_projection.weight"]
    state["vision_model.pre_layrnorm.bias"] = np.zeros(9, np.float32)
    state["more"] = np.zeros(1)
    path = files.save(tmp_path / "other.safetensors", state)
    with pytest.raises(InputError) as error:
        made.load(path)
    for part in ("does not hold the picture tower of tiny", "missing: visual_projection.weight", "left over: more",
                 "shape of vision_model.pre_layrnorm.bias"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"FID's InceptionV3: .*left over: more.*; and \d+ more$"):
        inception.inception_v3().load(path)


def test_weights_that_are_not_finite_are_refused(tiny, tmp_path):
    state = to_transformers(tiny[1])
    state["visual_projection.weight"] = np.full_like(state["visual_projection.weight"], np.nan)
    with pytest.raises(InputError, match=r"numbers of visual_projection\.kernel are not finite"):
        tiny[0].load(files.save(tmp_path / "nan.safetensors", state))


def test_what_is_no_file_of_weights(tiny, tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "pickled.npz", a=np.array([object()]))
    for name, match in (
        ("damaged.npz", "cannot be read"), ("pickled.npz", "cannot be read"), ("gone.npz", "no weights at"),
        ("gone.pth", "no weights at"), ("gone.safetensors", "no weights at"), ("x.pkl", "no weights at"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            tiny[0].load(tmp_path / name)


TABLES = {
    "inception": (inception.inception_v3().init, to_torch, from_torch),
    "clip": (clip_vision(size=14, patch=7, width=8, depth=2, heads=2, mlp=12, n_out=4).init, to_transformers,
             from_transformers),
    "dinov2": (dinov2.dinov2_net(learned=3, width=8, depth=2, heads=2, mlp=12).init, to_dinov2, from_published),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_total_in_both_directions(name):
    init, there, here = TABLES[name]
    shapes = like(init)
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(leaf.size), leaf.shape), shapes)
    state = there(params)
    assert len(state) == len(jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, here(state, shapes), params)


def test_names_are_those_of_the_published_files():
    init, there, _ = TABLES["inception"]
    state = there(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like(init)))
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch1x1.bn.running_var": (64,),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7), "Mixed_7c.branch_pool.bn.weight": (192,),
        "fc.weight": (1008, 2048), "fc.bias": (1008,),
    }.items():  # fmt: skip
        assert state[name].shape == shape


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "1 channel: repeat grey three times"),
        (np.zeros((2, 8, 8, 4), np.uint8), "4 channels: drop the opacity"),
        (np.zeros((8, 8, 3), np.uint8), r"these are \[8, 8, 3\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), r"these are \[2, 0, 8, 3\]"),
        (np.full((2, 8, 8, 3), 0.5, np.float32), "float32: values from 0.5 to 0.5; `to_pictures`"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "384 of 384 values are not finite"),
        (np.full((2, 8, 8, 3), 300, np.int64), "int64: values from 300 to 300"),
    ],
)
def test_pictures_are_bytes_of_three_channels(images, match):
    for made in (inception.inception_v3(), clip.clip_image(), dinov2.dinov2_vitl14()):
        with pytest.raises(InputError, match=match):
            made.prepare(images)
        if images.dtype != np.int64:
            with pytest.raises(ValueError, match="pictures are u8"):
                jax.eval_shape(made.apply, {}, jax.ShapeDtypeStruct(images.shape, images.dtype))


def test_pixels_become_bytes_as_edm_stores_them():
    x = np.array([-1.2, -1.0, -0.996, 0.0, 0.999, 1.0, 1.4])
    np.testing.assert_array_equal(net.to_pictures(x), [0, 0, 1, 128, 255, 255, 255])
    levels = np.arange(256)
    np.testing.assert_array_equal(net.to_pictures(levels / 127.5 - 1), levels)
    for bad in (np.nan, np.inf, 255.0):
        with pytest.raises(InputError, match=r"pixels should be in \[-1, 1\]"):
            net.to_pictures(np.array([0.0, bad]))


def test_choices_that_do_not_exist():
    for make in (
        lambda: inception.inception_v3("caffe"), lambda: clip.clip_image("sdxl"), lambda: clip.clip_image(size=225),
        lambda: dinov2.dinov2_vitl14("cv2"), lambda: resizes.resize(jnp.zeros((1, 4, 4, 3)), (2, 2), "nearest"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="is none of"):
            make()
    with pytest.raises(ValueError, match="in patches of"):
        clip_vision(size=100)
    with pytest.raises(ValueError, match="whole patches"):
        graph = dinov2.dinov2_net(learned=3, width=8, depth=1, heads=2, mlp=12)
        jax.eval_shape(graph.apply, like(graph.init), jnp.zeros((1, 15, 14, 3)), jnp.zeros(()))
