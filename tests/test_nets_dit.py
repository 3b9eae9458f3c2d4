"""Transformers: published sizes, laws of their parts, conditions, speed options that change nothing, errors, tensor
parallelism, and that a small one learns."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import denoising_loss, parameterize, rectified
from diffusion_jax.nets import conditioning, count, dit, dit_b2, dit_l2, dit_s2, dit_xl2, jit_b16, just_image, sit_xl2
from diffusion_jax.nets import dit as make
from diffusion_jax.nets.conditioning import absent
from diffusion_jax.training.sources import digits

module = sys.modules["diffusion_jax.nets.dit"]
CLASSES, BATCH, SIZE, SHAPE, WIDTH = 3, 4, (2, 24, 2), (8, 8, 2), 24
KIT = {"norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True, "in_context": (3, 0), "bottleneck": 5}
VARIANTS = {"plain": {}, "kit": KIT, "cross": {"tokens": 5}, "joint": {"tokens": 5, "context": "joint"}}
ALL = {"vector": 4, "image": 1}
T = jnp.linspace(0.0, 900.0, BATCH)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def noised(net, scale=0.2):
    """Parameters away from their start, where every block is the identity and the output zero."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda a: (scale * rng.normal(size=a.shape)).astype(np.float32), like)


def small(name, **options):
    return dit(SIZE, 2, SHAPE, classes=CLASSES, **{**ALL, **VARIANTS[name], **options})


def condition(name):
    rng = np.random.default_rng(2)
    cond = {
        "label": jnp.array([0, 1, 2, CLASSES]),
        "vector": jnp.asarray(rng.normal(size=(BATCH, 4)), jnp.float32),
        "vector_mask": jnp.array([True, True, False, True]),
        "image": jnp.asarray(rng.normal(size=(BATCH, 8, 8, 1)), jnp.float32),
    }
    if "tokens" in VARIANTS[name]:
        cond["tokens"] = jnp.asarray(rng.normal(size=(BATCH, 6, 5)), jnp.float32)
        cond["tokens_mask"] = jnp.asarray(rng.uniform(size=(BATCH, 6)) < 0.6)
    return cond


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    """name, net, jitted apply, parameters, x, condition."""
    net = small(request.param)
    return (
        request.param,
        net,
        quick(net.apply),
        noised(net),
        jax.random.normal(jax.random.key(1), (BATCH, *SHAPE)),
        (condition(request.param)),
    )


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "size", "millions"),
    [
        (dit_s2(), 32, 33), (dit("S", 4), 32, 33), (dit("S", 8), 32, 33),
        (dit_b2(), 32, 130), (dit("B", 4), 32, 130), (dit("B", 8), 32, 131),
        (dit_l2(), 32, 458), (dit("L", 4), 32, 458), (dit("L", 8), 32, 459),
        (dit_xl2(), 32, 675), (dit("XL", 4), 32, 675), (dit("XL", 8), 32, 676), (sit_xl2(), 32, 675),
        (jit_b16(), 256, 131), (just_image("L"), 256, 459), (just_image("H"), 256, 953), (just_image("G"), 256, 2007),
    ],
)  # fmt: skip
def test_published_sizes(net, size, millions):
    """Peebles & Xie 2023, table 4 and appendix; Ma et al. 2024; Li & He 2025 (who round G to 2B)."""
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert round(count(params) / 1e6) == millions
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("net", "shape", "channels"),
    [
        (dit_s2(dtype=jnp.bfloat16), (32, 32, 4), 8),
        (sit_xl2(dtype=jnp.bfloat16, remat="full"), (64, 32, 4), 4),
        (jit_b16(dtype=jnp.bfloat16), (256, 128, 3), 3),
        (dit(SIZE, 4, (8, 12, 1), classes=None, out_channels=5, scan=True), (8, 12, 1), 10),
    ],
)
def test_shapes(net, shape, channels):
    """Other sizes than the one it was made for too."""
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, jnp.zeros((2, *shape)), jnp.zeros(2))
    assert (out.shape, out.dtype) == ((2, *shape[:2], channels), jnp.float32)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_positions():
    """P of a patch is sin and cos of its column, then of its row; the table of a part is part of the table."""
    table = np.asarray(module.position_table(3, 5, 16)).reshape(3, 5, 16)
    rates = 10000.0 ** -np.array([0, 0.25, 0.5, 0.75])
    expected = np.concatenate([f(place * rates) for place in (4, 2) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(table[2, 4], expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(module.position_table(2, 3, 16)).reshape(2, 3, 16), table[:2, :3], atol=1e-6)


def test_rotary_scores_know_relative_places_alone():
    """The score of two tokens depends on how far apart they are; tokens without a place are not turned."""
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 16)) for i in range(2))
    h, w = 5, 6
    rotary = module.rotary_table(h, w, 16, before=2)
    turned_q, turned_k = (
        module.rotate(jnp.broadcast_to(z, (1, 2 + h * w, 1, 16)), rotary)[0, :, 0] for z in (q, k)
    )  # one vector in every place
    np.testing.assert_array_equal(turned_q[:2], np.broadcast_to(q[0, 0], (2, 16)))
    scores = np.asarray(turned_q[2:] @ turned_k[2:].T).reshape(h, w, h, w)
    np.testing.assert_allclose(scores[1, 2, 3, 5], scores[0, 0, 2, 3], atol=1e-4)
    np.testing.assert_allclose(scores[3, 1, 0, 4], scores[4, 2, 1, 5], atol=1e-4)
    assert np.ptp(scores) > 1
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=-1), jnp.linalg.norm(q), rtol=1e-5)


def test_patches_invert():
    x = jax.random.normal(jax.random.key(0), (2, 6, 9, 2))
    cut = module.patches(x, 3)
    assert cut.shape == (2, 6, 18)
    np.testing.assert_array_equal(cut[1, 4].reshape(3, 3, 2), x[1, 3:6, 3:6])
    np.testing.assert_array_equal(module.unpatch(cut, 2, 3, 3), x)


def test_norms_against_the_definition():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, WIDTH))
    x32, gamma = jnp.asarray(x, jnp.float32), np.linspace(0.5, 2, WIDTH)
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(module.LayerNorm()(x32), layer, atol=1e-5)
    rms = module.RMSNorm(WIDTH)
    rms.scale[...] = jnp.asarray(gamma, jnp.float32)
    np.testing.assert_allclose(rms(x32), x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gamma, atol=1e-5)
    shift, scale = jnp.full((2, WIDTH), 0.5), jnp.full((2, WIDTH), 2.0)
    np.testing.assert_allclose(module.modulate(module.LayerNorm(), x32, shift, scale), 3 * layer + 0.5, atol=3e-5)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_starts_as_the_identity_with_output_zero(case):
    name, net, apply, params, x, cond = case
    start = net.init(jax.random.key(0))
    assert not np.any(apply(start, x, T, cond))
    opened = {**start, "final_layer": params["final_layer"]}
    shuffled = {**opened, "blocks": {**opened["blocks"], "0": opened["blocks"]["1"]}}
    if name in ("plain", "cross"):
        np.testing.assert_array_equal(apply(opened, x, T, cond), apply(shuffled, x, T, cond))


def test_examples_are_independent_and_everything_given_matters(case):
    _, _, apply, params, x, cond = case
    out = apply(params, x, T, cond)
    later = apply(params, x, T.at[1].add(3.0), cond)
    changed = np.max(np.abs(later - out), axis=(1, 2, 3))
    assert changed[1] > 1e-3 and np.max(np.delete(changed, 1)) < 1e-5
    for name in cond:
        value = cond[name]
        if value.dtype == jnp.bool_:
            other = ~value
        else:
            other = (value + 1) % 3 if name == "label" else -value
        moved = np.max(np.abs(apply(params, x, T, {**cond, name: other}) - out), axis=(1, 2, 3))
        assert moved[0] > 1e-3, name


def test_absence_is_a_value(case):
    """Nothing given, everything masked or zero, and each entry alone left out: the same network."""
    name, _, apply, params, x, cond = case
    null = absent(cond, CLASSES)
    full = jax.tree.map(lambda c, n: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape), cond, null)
    nothing = apply(params, x, T, None)
    np.testing.assert_allclose(apply(params, x, T, full), nothing, atol=1e-4)
    assert np.max(np.abs(apply(params, x, T, cond) - nothing)) > 1e-2
    if name in ("cross", "joint"):  # what a masked token holds does not matter
        hidden = jnp.where(cond["tokens_mask"][..., None], cond["tokens"], 7.0)
        out = apply(params, x, T, {**cond, "tokens": hidden})
        np.testing.assert_allclose(out, apply(params, x, T, cond), atol=1e-5)


def test_tokens_have_no_order(case):
    name, _, apply, params, x, cond = case
    if name not in ("cross", "joint"):
        pytest.skip("takes no tokens")
    turned = {**cond, **{key: cond[key][:, ::-1] for key in ("tokens", "tokens_mask")}}
    np.testing.assert_allclose(apply(params, x, T, turned), apply(params, x, T, cond), atol=1e-4)


def test_a_larger_picture_without_positions_is_its_parts():
    """Without P, rotary places or attention across parts nothing knows where a patch is: one block, one patch."""
    net = dit((1, 8, 2), 4, (4, 4, 1), classes=None, position=False)
    params, x = noised(net), jax.random.normal(jax.random.key(0), (2, 4, 8, 1))
    flipped = jnp.concatenate([x[:, :, 4:], x[:, :, :4]], axis=2)
    out, other = (quick(net.apply)(params, z, jnp.ones(2)) for z in (x, flipped))
    np.testing.assert_allclose(other, jnp.concatenate([out[:, :, 4:], out[:, :, :4]], axis=2), atol=1e-5)


def graded(net, name):
    """Value and gradients of the mean square of the output."""
    cond, x = condition(name), jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    return quick(jax.value_and_grad(lambda p: jnp.mean(net.apply(p, x, T, cond) ** 2)))(noised(net))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kit", "cross", "joint"])
def test_gradients_reach_every_parameter_and_speed_options_leave_them(name):
    value, grads = graded(small(name), name)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == []
    if name == "kit":
        other = graded(small(name, scan=True, remat="full", split_qkv=True), name)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4), (value, grads), other)


@pytest.mark.parametrize("options", [{"remat": "dots"}, {"scan": True}])
def test_speed_options_of_two_streams(options):
    """Three blocks, of which the last is of another kind."""
    cond, x = condition("joint"), jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    net, other = (
        dit((3, 16, 2), 2, SHAPE, classes=CLASSES, **{**ALL, **VARIANTS["joint"], **more}) for more in ({}, options)
    )
    params = noised(net)
    out, same = (quick(n.apply)(params, x, T, cond) for n in (net, other))
    np.testing.assert_allclose(out, same, atol=1e-5)


def test_scan_compiles_one_block():
    """Its program does not grow with the number of blocks."""

    def size(depth, scan):
        net = dit((depth, 16, 2), 2, (4, 4, 1), classes=None, scan=scan)
        params = jax.eval_shape(net.init, jax.random.key(0))
        text = jax.jit(net.apply).lower(params, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1)).as_text()
        return text.count("dot_general")

    assert size(3, True) == size(6, True) and size(6, False) > 1.7 * size(3, False)


@pytest.mark.parametrize("case", ["kit", "joint"], indirect=True)
def test_bfloat16_is_close(case):
    name, net, apply, _, x, cond = case
    params = noised(net, 0.1)
    full, rough = (np.asarray(f(params, x, T, cond)) for f in (apply, quick(small(name, dtype=jnp.bfloat16).apply)))
    assert rough.dtype == np.float32
    assert 0 < np.sqrt(np.mean((rough - full) ** 2)) < 0.03 * np.std(full)


def test_forward_mode():
    """For losses with a time derivative."""
    net = dit((1, 16, 2), 4, SHAPE, classes=CLASSES)
    params, x = noised(net), jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
    apply = quick(lambda t: net.apply(params, x, t))
    slope = quick(lambda t: jax.jvp(lambda u: net.apply(params, x, u), (t,), (jnp.ones_like(t),))[1])(T)
    np.testing.assert_allclose((apply(T + 0.05) - apply(T - 0.05)) / 0.1, slope, atol=2e-2)


# --- use --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_digits():
    """JiT's way: x0 from the network, the loss on the velocity."""
    pictures = jnp.asarray(digits().train["image"][:512], jnp.float32) / 127.5 - 1
    net = dit((1, 32, 2), 2, (8, 8, 1), classes=10, learned_variance=False, **{**KIT, "in_context": (1, 0)})
    schedule, optimizer = rectified(), optax.adam(3e-3)

    def loss(params, key):
        keys = jax.random.split(key, 3)
        x0 = pictures[jax.random.randint(keys[0], (32,), 0, len(pictures))]
        t, eps = jax.random.uniform(keys[1], (32,), minval=0.05, maxval=1.0), jax.random.normal(keys[2], x0.shape)
        denoiser = parameterize(functools.partial(net.apply, params), schedule, "x0", time=lambda t: 1000 * t)
        return jnp.mean(denoising_loss(denoiser, schedule, x0, t, eps, target="velocity"))

    @jax.jit
    def train(params):
        def step(carry, i):
            value, grads = jax.value_and_grad(loss)(carry[0], jax.random.fold_in(jax.random.key(1), i))
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(60))[1]

    values = train(net.init(jax.random.key(0)))
    assert jnp.mean(values[-10:]) < 0.5 * jnp.mean(values[:3])


TENSOR_PARALLEL = """
import collections, re
import jax, jax.numpy as jnp
from diffusion_jax.nets import dit
from diffusion_jax.nets.dit import TENSOR_PARALLEL
from diffusion_jax.training.mesh import make_mesh, split_axis, state_shardings
from diffusion_jax.typing import InputError

mesh = make_mesh(8, tensor=4)
x, t, y = (jax.ShapeDtypeStruct(s, d) for s, d in (((8, 8, 8, 4), jnp.float32), ((8,), jnp.float32), ((8,), jnp.int32)))
for kit in ({}, {"norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True}):
    net = dit((1, 96, 4), 2, (8, 8, 4), classes=3, **kit)
    like = jax.eval_shape(net.init, jax.random.key(0))
    ways, rows = state_shardings(mesh, like, partition=TENSOR_PARALLEL), split_axis(mesh)
    step = jax.grad(lambda p, x, t, y: jnp.mean(net.apply(p, x, t, y) ** 2))
    f, out = (net.apply, rows) if kit else (step, ways)
    program = jax.jit(f, in_shardings=(ways, rows, rows, rows), out_shardings=out).lower(like, x, t, y)
    ops = r" (all-\\w+|collective-permute|reduce-scatter)(?:-start)?\\(.*?replica_groups=([^ ]+),"
    found = re.findall(ops, program.compile().as_text())
    print(*(f"{op}:{'model' if groups == '{{0,1,2,3},{4,5,6,7}}' else 'data'}" for op, groups in found))
net = dit((1, 96, 2), 2, (8, 8, 4), classes=3)
try:
    state_shardings(mesh, jax.eval_shape(net.init, jax.random.key(0)), partition=TENSOR_PARALLEL)
except InputError as error:
    print(error)
"""


@pytest.mark.slow
def test_tensor_parallel_collectives():
    """Two all-reduces a block forward, two more backward, one of the gradients over the data; heads stay whole."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"}
    run = subprocess.run(
        [sys.executable, "-c", TENSOR_PARALLEL], capture_output=True, text=True, check=True,
        env={**os.environ, **environment, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    training, forward, refused = run.stdout.splitlines()
    assert sorted(training.split()) == ["all-reduce:data"] + ["all-reduce:model"] * 4
    assert forward.split() == ["all-reduce:model"] * 2
    assert re.search(r"tensor=4 does not divide axis . of blocks\.0\.attn\.qkv\..*3, 2, 48\)", refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "M"}, "'M' is none of S, B, L, XL"),
        ({"size": (2, 30, 4)}, "heads that divide the width"),
        ({"size": (0, 32, 4)}, "needs blocks"),
        ({"patch": 3}, "patch=3 does not divide"),
        ({"shape": (32, 32)}, "height, width, channels"),
        ({"size": (2, 36, 6), "rotary": True}, "4 divides"),
        ({"norm": "batch"}, "norm='batch' is none of layer, rms"),
        ({"tokens": 3, "context": "concat"}, "context='concat'"),
        ({"attention": "flash"}, "attention='flash'"),
        ({"in_context": (4, 99)}, "in_context"),
        ({"in_context": (4, 1), "classes": None}, "in_context"),
        ({"vector": 0}, "vector=0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_inputs_that_do_not_fit():
    net = dit(SIZE, 2, SHAPE, classes=CLASSES)
    params = jax.eval_shape(net.init, jax.random.key(0))
    x, t = jnp.zeros((2, *SHAPE)), jnp.zeros(2)
    for arguments, message in [
        ((x[..., :1], t), "x must be"),
        ((x[:, :7], t), "divisible by 2"),
        ((x, t[0]), "t must be"),
        ((x, t, jnp.zeros(2)), "labels must be int"),
        ((x, t, {"tokens": jnp.zeros((2, 3, 4))}), "no condition 'tokens'"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, params, *arguments)
    with pytest.raises(ValueError, match="none of B, L, H, G"):
        just_image("XL")
    assert conditioning.Kinds(classes=CLASSES) == conditioning.Kinds(CLASSES)
