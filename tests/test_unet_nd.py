"""The U-Net in one, two and three axes, and what it is conditioned on: laws, independence, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.guidance import classifier_free
from diffusion_jax.nets import conditioning, count, layers, mlp, unet
from diffusion_jax.nets.unet import attend_along, rotate
from diffusion_jax.typing import InputError, Prediction

B, CLASSES = 3, 4
KEY = jax.random.key(0)
T = jnp.linspace(1.0, 900.0, B)
small = functools.partial(unet, channels=8, multipliers=(1, 2), blocks=1, attention=(4,))
tiny = functools.partial(small, multipliers=(1,), attention=())
VIDEO = {"attention_over": "space_then_time", "convolution": "space_then_time", "resample_time": False}
SHAPES = {1: (8, 2), 2: (8, 8, 2), 3: (4, 8, 8, 2)}
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def noised(params, scale=0.2):
    """Parameters away from their start, where the output layer is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + np.float32(scale) * rng.normal(size=a.shape).astype(np.float32), params
    )


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def made(name):
    """A network, its jitted function and parameters away from their start."""
    every = {"classes": CLASSES, "vector": 3, "tokens": 5, "image": 1}
    net = {
        "video": lambda: small(SHAPES[3], heads=2, **VIDEO),
        "everything": lambda: small((8, 8, 2), heads=2, **every),
        "sound": lambda: small((8, 2), **every),
    }[name]()
    return net, quick(net.apply), noised(net.init(KEY))


def conditions(shape, seed=5):
    return {
        "label": jnp.array([0, 3, CLASSES]),
        "vector": normal(seed, B, 3),
        "tokens": normal(seed + 1, B, 6, 5),
        "tokens_mask": jnp.arange(6)[None, :] < jnp.array([[6], [2], [0]]),
        "image": normal(seed + 2, B, *shape, 1),
    }


# Axes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_the_rank_of_the_shape_chooses_the_axes(ndim, learned_variance):
    shape = SHAPES[ndim]
    net = small(shape, learned_variance=learned_variance)
    params = jax.eval_shape(net.init, KEY)
    assert params["conv_in"]["kernel"].shape == (3,) * ndim + (2, 8)
    assert params["down_blocks"]["0"]["downsamplers"]["0"]["conv"]["kernel"].shape == (3,) * ndim + (8, 8)
    out = jax.eval_shape(net.apply, params, jnp.zeros((B, *shape)), T)
    assert (out.shape, out.dtype) == ((B, *shape[:-1], 4 if learned_variance else 2), jnp.float32)


def test_the_names_do_not_depend_on_the_axes():
    names = {
        ndim: {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for ndim, tree in ((n, jax.eval_shape(small(s, attention=()).init, KEY)) for n, s in SHAPES.items())
    }
    assert names[1] == names[2] == names[3]


def centre_of_axis(kernel, ndim, axis):
    """An `ndim` kernel that does along all axes but `axis` what `kernel` does, and nothing along it."""
    shape = list(kernel.shape)
    shape.insert(axis, shape[0])
    out = np.zeros(shape, np.float32)
    index = [slice(None)] * len(shape)
    index[axis] = shape[axis] // 2
    out[tuple(index)] = kernel
    return out


@pytest.mark.slow
@pytest.mark.parametrize("ndim", [2, 3])
def test_constant_along_an_axis_is_one_axis_less(ndim):
    """Kernels widened by zeros along the first axis do to repeated examples what the smaller network does to one."""
    small_net, big = small(SHAPES[ndim - 1], attention=()), small(SHAPES[ndim], attention=())
    params = noised(small_net.init(KEY))
    wide = jax.tree.map(
        lambda p, like: p if p.shape == like.shape else centre_of_axis(p, ndim, 0),
        params,
        jax.eval_shape(big.init, KEY),
    )
    x = normal(1, B, *SHAPES[ndim - 1])
    repeated = jnp.broadcast_to(x[:, None], (B, SHAPES[ndim][0], *SHAPES[ndim - 1]))
    expected, y = quick(small_net.apply)(params, x, T), quick(big.apply)(wide, repeated, T)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(y, np.broadcast_to(expected[:, None], y.shape), atol=2e-4)


def test_video_keeps_its_frames():
    """Without halving time any number of frames is possible, and only h and w must divide."""
    net = small(SHAPES[3], **VIDEO)
    params = jax.eval_shape(net.init, KEY)
    assert params["conv_in"]["kernel"].shape == (1, 3, 3, 2, 8)
    assert params["conv_in"]["time_kernel"].shape == (3, 1, 1, 8, 8)
    assert "temp_attentions" in params["mid_block"]
    assert jax.eval_shape(net.apply, params, jnp.zeros((B, 5, 12, 8, 2)), T).shape == (B, 5, 12, 8, 2)
    with pytest.raises(ValueError, match="t divisible by 1 and h divisible by 2 and w divisible by 2"):
        jax.eval_shape(net.apply, params, jnp.zeros((B, 5, 11, 8, 2)), T)
    both = small(SHAPES[3], **VIDEO | {"resample_time": True})
    with pytest.raises(ValueError, match="t divisible by 2"):
        jax.eval_shape(both.apply, jax.eval_shape(both.init, KEY), jnp.zeros((B, 5, 8, 8, 2)), T)


# Space and time apart ------------------------------------------------------------------------------------------------


def meets(axes, shape, places=False):
    """bool[*pixels, *pixels]: whether an output of `attend_along` changes with an input, from its Jacobian."""
    q, k, v = normal(1, 3, 1, *shape, 4)
    f = lambda q, k, v: attend_along(q, k, v, 2, axes, places=places)[0]  # noqa: E731
    jacobians = quick(jax.jacrev(f, argnums=(0, 1, 2)))(q, k, v)
    axis = len(shape)
    return [np.any(np.asarray(j) != 0, axis=(axis, axis + 1, -1)) for j in jacobians]


@pytest.mark.parametrize(("axes", "places"), [((2, 3), False), ((1,), False), ((1,), True), ((2,), False)])
def test_attention_along_some_axes_meets_nothing_else(axes, places):
    shape = (3, 2, 2)
    same = np.ones((*shape, *shape), bool)
    for axis, n in enumerate(shape):
        if axis + 1 not in axes:
            i, j = (np.arange(n).reshape([-1 if a == k else 1 for a in range(6)]) for k in (axis, axis + 3))
            same &= i == j
    of_q, of_k, of_v = meets(axes, shape, places)
    np.testing.assert_array_equal(of_v, same)
    np.testing.assert_array_equal(of_k, same)
    here = np.eye(12, dtype=bool).reshape(*shape, *shape)
    np.testing.assert_array_equal(of_q, here)


def test_attention_along_all_axes_is_attention():
    q, k, v = normal(1, 3, 2, 3, 2, 2, 4)
    np.testing.assert_allclose(attend_along(q, k, v, 2, (1, 2, 3)), layers.attend(q, k, v, 2), atol=1e-6)


def test_places_count_by_their_distance():
    """Equation (3): norms stay, scores depend on the difference of places alone, and they do depend on it."""
    x = normal(1, 1, 1, 8)
    row = rotate(jnp.broadcast_to(x, (1, 12, 8)), 2)
    np.testing.assert_allclose(jnp.linalg.norm(row, axis=-1), np.full((1, 12), np.linalg.norm(x)), rtol=1e-5)
    heads = np.asarray(row).reshape(12, 2, 4)
    scores = np.einsum("nhd,mhd->hnm", heads, heads)
    for shift in range(-11, 12):
        along = np.stack([np.diagonal(s, shift) for s in scores])
        np.testing.assert_allclose(along, np.broadcast_to(along[:, :1], along.shape), rtol=1e-4)
    assert np.std(scores[:, 0]) > 0.1
    np.testing.assert_array_equal(row[:, 0], x[:, 0])


@pytest.mark.slow
def test_video_tells_the_order_of_frames():
    """Attention over time alone would not; that is what the turning by (3) is for."""
    net = tiny(SHAPES[3], **VIDEO | {"convolution": "space"})
    apply, params = quick(net.apply), noised(net.init(KEY))
    x = normal(1, B, *SHAPES[3])
    mixed = x[:, jnp.array([1, 3, 0, 2])]
    y, shuffled = apply(params, x, T), apply(params, mixed, T)
    assert np.max(np.abs(y[:, jnp.array([1, 3, 0, 2])] - shuffled)) > 1e-2


def test_space_convolutions_are_those_of_each_frame():
    """Without attention over time and with the norms of frames that are alike, a video is its frames."""
    frame, video = tiny((8, 8, 2)), tiny(SHAPES[3], convolution="space", resample_time=False)
    params = noised(frame.init(KEY))
    wide = jax.tree.map(lambda p: p[None] if p.ndim == 4 else p, params)
    x = normal(1, B, 8, 8, 2)
    y = quick(video.apply)(wide, jnp.broadcast_to(x[:, None], (B, 4, 8, 8, 2)), T)
    np.testing.assert_allclose(y[:, 2], quick(frame.apply)(params, x, T), atol=2e-4)


@pytest.mark.parametrize(("widths", "stride"), [((1, 3, 3), (1, 2, 2)), ((3, 1, 1), (2, 1, 1)), ((1, 3, 1), 1)])
def test_convolutions_along_some_axes(widths, stride):
    """Whatever axes are joined: against the definition, with zeros in a kernel of 3 x 3 x 3."""
    kernel, x = normal(1, *widths, 2, 5), normal(2, 2, 4, 6, 4, 2)
    padded = jnp.pad(kernel, [(1, 1) if n == 1 else (0, 0) for n in widths] + [(0, 0)] * 2)
    # With stride 2 and "SAME" the pixels before an even axis are none, along an axis of width 1 one.
    steps = layers.per_axis(stride, 3)
    pads = [(1, 1) if step == 1 else (0, 1) for step in steps]
    expected = jax.lax.conv_general_dilated(x, padded, steps, pads, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    np.testing.assert_allclose(layers.conv(x, kernel, stride), expected, atol=1e-4)


def test_split_convolution_is_the_product_of_its_kernels():
    space, time = normal(1, 1, 3, 3, 2, 5), normal(2, 3, 1, 1, 5, 4)
    x = normal(3, 2, 4, 6, 6, 2)
    whole = jnp.einsum("xhwio,tyzoc->thwic", space, time)
    split = layers.conv(layers.conv(x, space, (1, 2, 2)), time, (2, 1, 1))
    np.testing.assert_allclose(split, layers.conv(x, whole, (2, 2, 2)), atol=1e-3)


# Every network -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "everything", "sound"])
def test_examples_are_independent(name):
    _, apply, params = made(name)
    shape = {"video": SHAPES[3], "everything": (8, 8, 2), "sound": (8, 2)}[name]
    x, cond = normal(1, B, *shape), None if name == "video" else conditions(shape[:-1])
    whole = apply(params, x, T, cond)
    order = jnp.array([2, 0, 1])
    moved = apply(params, x[order], T[order], jax.tree.map(lambda leaf: leaf[order], cond))
    np.testing.assert_allclose(moved, whole[order], atol=1e-4)
    assert np.std(whole) > 0.1
    other = apply(params, x.at[1:].add(1.0), T, cond)
    np.testing.assert_allclose(other[0], whole[0], atol=1e-4)
    assert np.max(np.abs(other[1:] - whole[1:])) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video", "everything"])
def test_gradients_reach_every_parameter(name):
    net, _, params = made(name)
    shape = SHAPES[3] if name == "video" else (8, 8, 2)
    x, cond = normal(1, B, *shape), None if name == "video" else conditions(shape[:-1])
    grads = quick(jax.grad(lambda p: jnp.mean(net.apply(p, x, T, cond) ** 2)))(params)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == []


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    """With dropout, whose noise is not drawn again, and tokens."""
    x, cond = normal(1, B, 8, 2), {name: conditions((8,))[name] for name in ("tokens", "tokens_mask")}

    def gradient(remat):
        net = tiny((8, 2), tokens=5, dropout=0.3, remat=remat)
        params = noised(net.init(KEY))
        loss = lambda p: jnp.mean(net.apply(p, x, T, cond, key=jax.random.key(3)) ** 2)  # noqa: E731
        return quick(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient("none"), gradient(remat))


@pytest.mark.slow
def test_remat_keeps_less():
    """The residuals of the backward pass, counted in the jaxpr of the forward one."""

    def kept(remat):
        net = small((8, 8, 2), remat=remat)
        params = jax.eval_shape(net.init, KEY)
        f = lambda p, x: jnp.sum(net.apply(p, x, T) ** 2)  # noqa: E731
        _, pull = jax.eval_shape(lambda p, x: jax.vjp(f, p, x), params, jnp.zeros((B, 8, 8, 2)))
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    none, dots, full = (kept(remat) for remat in ("none", "dots", "full"))
    assert none > dots > full


# Conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_alone_are_the_label_of_a_dict():
    net = tiny((8, 2), classes=CLASSES)
    apply, params, x = quick(net.apply), noised(net.init(KEY)), normal(1, B, 8, 2)
    labels = jnp.array([0, 3, CLASSES])
    plain = apply(params, x, T, labels)
    np.testing.assert_array_equal(plain, apply(params, x, T, {"label": labels}))
    assert np.max(np.abs(plain - apply(params, x, T))) > 1e-2
    np.testing.assert_allclose(plain[2], apply(params, x, T)[2], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "vector", "tokens", "image"])
def test_every_kind_counts_and_can_be_absent(kind):
    """Absent by its value and left out are the same; and it matters what is there."""
    _, apply, params = made("everything")
    x, cond = normal(1, B, 8, 8, 2), conditioning.with_masks(conditions((8, 8)))
    cond["label"], cond["tokens_mask"] = cond["label"] % CLASSES, cond["tokens_mask"].at[2, 1].set(True)
    null = conditioning.absent(cond, CLASSES)
    mine = [name for name in cond if name.removesuffix("_mask") == kind]
    gone = cond | {name: jnp.full_like(cond[name], null[name]) for name in mine}
    without = {name: value for name, value in cond.items() if name not in mine}
    full, zero = apply(params, x, T, cond), apply(params, x, T, gone)
    np.testing.assert_allclose(zero, apply(params, x, T, without), atol=1e-5)
    assert np.min(np.max(np.abs(full - zero), axis=(1, 2, 3))) > 1e-3


@pytest.mark.slow
def test_nothing_given_is_everything_absent():
    _, apply, params = made("everything")
    x, cond = normal(1, B, 8, 8, 2), conditioning.with_masks(conditions((8, 8)))
    gone = jax.tree.map(jnp.full_like, cond, conditioning.absent(cond, CLASSES))
    np.testing.assert_allclose(apply(params, x, T, gone), apply(params, x, T), atol=1e-5)
    np.testing.assert_array_equal(apply(params, x, T), apply(params, x, T, {}))


@pytest.mark.slow
def test_masked_tokens_do_not_count():
    _, apply, params = made("everything")
    x, cond = normal(1, B, 8, 8, 2), conditions((8, 8))
    other = cond | {"tokens": jnp.where(cond["tokens_mask"][:, :, None], cond["tokens"], 77.0)}
    np.testing.assert_allclose(apply(params, x, T, cond), apply(params, x, T, other), atol=1e-5)
    short = cond | {"tokens": cond["tokens"][:, :2], "tokens_mask": cond["tokens_mask"][:, :2]}
    np.testing.assert_allclose(apply(params, x, T, cond)[1:], apply(params, x, T, short)[1:], atol=1e-5)


@pytest.mark.slow
def test_tokens_have_no_order():
    _, apply, params = made("sound")
    x, cond = normal(1, B, 8, 2), conditions((8,))
    order = jnp.array([3, 1, 5, 0, 2, 4])
    turned = cond | {"tokens": cond["tokens"][:, order], "tokens_mask": cond["tokens_mask"][:, order]}
    np.testing.assert_allclose(apply(params, x, T, cond), apply(params, x, T, turned), atol=1e-4)


@pytest.mark.slow
def test_guidance_takes_the_absent_condition():
    """Scale 0 is the model without a condition, for several kinds at once."""
    _, apply, params = made("everything")
    x, cond = normal(1, B, 8, 8, 2), conditioning.with_masks(conditions((8, 8)))

    def denoiser(x, t, cond):
        y = apply(params, x, t, cond)
        return Prediction(y, y)

    null = conditioning.absent(cond, CLASSES)
    free = classifier_free(denoiser, null, 0.0)(x, T, cond).x0
    np.testing.assert_allclose(free, apply(params, x, T), atol=1e-4)


def test_a_condition_costs_only_its_own_parameters():
    sizes = {
        name: count(jax.eval_shape(small((8, 8, 2), **more).init, KEY))
        for name, more in {"none": {}, "vector": {"vector": 3}, "image": {"image": 1}, "tokens": {"tokens": 5}}.items()
    }
    assert sizes["vector"] - sizes["none"] == 4 * 32 + 33 * 32
    assert sizes["image"] - sizes["none"] == 9 * 1 * 8
    # Attention at size 4 (16 channels): one block down, two up, one in the middle.
    assert sizes["tokens"] - sizes["none"] == 4 * (2 * 16 + 2 * 17 * 16 + 2 * 6 * 16)


def test_mlp_takes_a_vector_as_well():
    net = mlp(2, width=16, blocks=1, classes=CLASSES, vector=3)
    apply, params, x = quick(net.apply), noised(net.init(KEY)), normal(1, B, 2)
    cond = {"label": jnp.array([0, 1, 2]), "vector": normal(2, B, 3), "vector_mask": jnp.array([True, False, True])}
    y = apply(params, x, T, cond)
    np.testing.assert_allclose(y[1], apply(params, x, T, {"label": cond["label"]})[1], atol=1e-6)
    assert np.max(np.abs(y - apply(params, x, T, cond | {"vector": cond["vector"] + 1}))) > 1e-2
    with pytest.raises(ValueError, match="no condition 'tokens': this network takes label, vector"):
        apply(params, x, T, {"tokens": jnp.zeros((B, 2, 3))})


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"labels": jnp.zeros(B, int)}, "no condition 'labels': this network takes label, vector, tokens, image"),
        ({"vector": jnp.zeros((B, 4))}, r"vector must be float\[3, 3\], got float32\[3, 4\]"),
        ({"vector": jnp.zeros((B, 3), jnp.int32)}, r"vector must be float\[3, 3\], got int32"),
        ({"tokens": jnp.zeros((B, 5))}, r"tokens must be float\[3, m, 5\]"),
        ({"tokens": jnp.zeros((B, 2, 5)), "tokens_mask": jnp.ones((B, 3), bool)}, r"tokens_mask must be bool\[3, 2\]"),
        ({"tokens_mask": jnp.ones((B, 3), bool)}, "tokens_mask was given without tokens"),
        ({"image": jnp.zeros((B, 8, 4, 1))}, r"image must be float\[3, 8, 8, 1\]"),
        ({"label": jnp.zeros(B)}, r"labels must be int\[3\]"),
        ({"label_mask": jnp.ones(B, bool)}, "no condition 'label_mask'"),
    ],
)
def test_a_condition_that_does_not_fit(cond, message):
    net, _, params = made("everything")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.apply, params, jnp.zeros((B, 8, 8, 2)), T, cond)


def test_a_network_without_a_kind_refuses_it():
    net = small((8, 8, 2))
    params = jax.eval_shape(net.init, KEY)
    for cond, message in [
        (jnp.zeros(B, int), "without classes: this network takes no condition"),
        ({"image": jnp.zeros((B, 8, 8, 1))}, "no condition 'image': this network takes no condition"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, params, jnp.zeros((B, 8, 8, 2)), T, cond)


def test_absence_needs_its_means():
    with pytest.raises(ValueError, match="tokens can only be absent where tokens_mask"):
        conditioning.absent({"tokens": jnp.zeros((B, 2, 5))})
    with pytest.raises(ValueError, match="number of classes"):
        conditioning.absent(jnp.zeros(B, int))
    assert conditioning.absent(jnp.zeros(B, int), 10) == 10


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((8,), {}, "shape is"),
        ((8, 8, 8, 8, 2), {}, "shape is"),
        ((8, 8, 2), {"convolution": "space"}, "are for \\(t, h, w, c\\)"),
        ((8, 8, 2), {"resample_time": False}, "are for \\(t, h, w, c\\)"),
        ((4, 8, 8, 2), {"convolution": "space"}, "cannot halve time"),
        ((4, 8, 8, 2), {"convolution": "time"}, "'time' is not one of full, space, space_then_time"),
        ((4, 8, 8, 2), {"attention_over": "space"}, "'space' is not one of pixels, space_then_time"),
        ((5, 8, 8, 2), {}, "2 levels need sizes divisible by 2"),
        ((4, 9, 8, 2), VIDEO, r"2 levels need sizes divisible by \(1, 2, 2\)"),
        ((4, 8, 8, 2), {"attention": (8,)}, r"attention at 8 never happens: the levels have sizes \[4, 2\]"),
        ((4, 8, 8, 2), VIDEO | {"attention": (2,)}, r"attention at 2 never happens: the levels have sizes \[8, 4\]"),
        ((4, 8, 8, 2), VIDEO | {"heads": 8}, "heads of even width"),
        ((8, 8, 2), {"vector": 0}, "vector=0"),
    ],
)
def test_arguments_that_do_not_fit(shape, arguments, message):
    with pytest.raises(InputError, match=message):
        small(shape, **arguments)
