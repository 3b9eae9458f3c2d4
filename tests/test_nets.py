"""Networks: parameter counts against the papers, shape laws, conditioning, dropout, precision, errors."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion_jax.nets import count, ddpm_cifar10, ddpmpp, edm_cifar10, functional, layers, mlp, song_cifar10, unet

CLASSES, BATCH = 3, 4
U = functools.partial(unet, (8, 8, 2), channels=16, multipliers=(1, 2), blocks=1, attention=(4,), classes=CLASSES)
D = functools.partial(ddpmpp, (8, 8, 2), channels=16, multipliers=(1, 2), blocks=1, attention=(4,), classes=CLASSES)
M = functools.partial(mlp, 2, width=16, blocks=2, classes=CLASSES)
MAKERS = {"unet": U, "ddpmpp": D, "mlp": M}
T = jnp.linspace(0.0, 900.0, BATCH)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling is nearly all the time of these tests."""


def noised(params, scale=0.1):
    """Parameters away from their start, where the output layer is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + np.float32(scale) * rng.normal(size=a.shape).astype(np.float32), params
    )


@pytest.fixture(scope="module", params=MAKERS)
def case(request):
    """name, the net with dropout, its jitted apply, parameters as they start and away from there, x."""
    net = MAKERS[request.param](dropout=0.3)
    shape = (BATCH, 2) if request.param == "mlp" else (BATCH, 8, 8, 2)
    x = jax.random.normal(jax.random.key(1), shape)
    start = net.init(jax.random.key(0))
    return request.param, net, quick(net.apply), start, noised(start), x


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ddpm_cifar10, 35_746_307),
        (functools.partial(ddpm_cifar10, classes=10), 35_746_307 + 11 * 512),
        (edm_cifar10, 55_732_739),
        (functools.partial(edm_cifar10, classes=10), 55_732_739 + 11 * 128),
        (song_cifar10, 61_804_419),
    ],
)
def test_counts(make, expected):
    net = make(dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert count(params) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = jax.eval_shape(net.apply, params, jnp.zeros((2, 32, 32, 3)), jnp.zeros(2))
    assert (out.shape, out.dtype) == ((2, 32, 32, 3), jnp.float32)


@pytest.mark.parametrize("make", [unet, ddpmpp])
@pytest.mark.parametrize(
    ("shape", "arguments", "channels"),
    [
        ((8, 8, 1), {"channels": 32, "multipliers": (1, 2), "attention": (4,)}, 1),
        ((16, 24, 3), {"channels": 12, "multipliers": (1, 2, 3), "attention": (16, 4), "learned_variance": True}, 6),
        ((8, 8, 4), {"channels": 8, "multipliers": (1,), "attention": (), "heads": 2, "out_channels": 5}, 5),
    ],
)
def test_shapes(make, shape, arguments, channels):
    net = make(shape, blocks=1, **arguments)
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, jnp.zeros((3, *shape)), jnp.zeros(3))
    assert (out.shape, out.dtype) == ((3, *shape[:2], channels), jnp.float32)


def test_params_are_plain_nested_dicts_with_string_keys(case):
    def walk(tree):
        assert type(tree) is dict
        for name, sub in tree.items():
            assert type(name) is str
            if isinstance(sub, dict):
                walk(sub)
            else:
                assert isinstance(sub, jax.Array)

    walk(case[3])


def test_many_layers_keep_their_order():
    """Eleven blocks: "10" sorts before "2" as a string."""
    net = mlp(2, width=4, blocks=11)
    params = net.init(jax.random.key(0))
    assert set(params["blocks"]) == {str(i) for i in range(11)}
    x, t, apply = jnp.ones((2, 2)), jnp.ones(2), quick(net.apply)
    params = noised(params)
    swapped = {**params, "blocks": {**params["blocks"], "2": params["blocks"]["10"], "10": params["blocks"]["2"]}}
    assert not np.allclose(apply(params, x, t), apply(swapped, x, t))
    reordered = {**params, "blocks": dict(sorted(params["blocks"].items(), key=lambda item: int(item[0])))}
    np.testing.assert_array_equal(apply(params, x, t), apply(reordered, x, t))


def test_init_depends_on_the_key_alone(case):
    _, net, _, a, _, _ = case
    b, c = (net.init(jax.random.key(seed)) for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    different = [not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True)]
    random = [np.ptp(x) > 0 for x in jax.tree.leaves(a)]
    assert different == random and sum(random) > 5


@pytest.mark.parametrize("case", ["unet"], indirect=True)
def test_initial_scale(case):
    """Xavier's variance, 2 / (fan in + fan out), unit variance of the label rows, zeros where a branch ends."""
    params = case[3]
    kernel = np.asarray(params["mid_block"]["resnets"]["0"]["conv1"]["kernel"])
    assert np.var(kernel) == pytest.approx(2 / (9 * 64), rel=0.05)
    rows = np.asarray(params["class_embedding"]["embedding"])
    assert rows.shape == (CLASSES + 1, 64) and np.var(rows) == pytest.approx(1, rel=0.15)
    assert not np.any(params["conv_out"]["kernel"]) and not np.any(
        params["up_blocks"]["0"]["resnets"]["0"]["conv2"]["kernel"]
    )


def test_starts_at_zero(case):
    _, _, apply, start, _, x = case
    assert not np.any(apply(start, x, T))


def test_null_label_is_none_and_labels_matter(case):
    _, _, apply, _, params, x = case
    out = apply(params, x, T)
    labelled = apply(params, x, T, jnp.array([0, 1, 2, CLASSES]))
    changed = np.max(np.abs(labelled - out), axis=tuple(range(1, x.ndim)))
    assert np.all(changed[:3] > 1e-3) and changed[3] < 1e-5


def test_time_matters_and_examples_are_independent(case):
    _, _, apply, _, params, x = case
    out = apply(params, x, T)
    later = apply(params, x, T.at[1].add(3.0))
    changed = np.max(np.abs(later - out), axis=tuple(range(1, x.ndim)))
    assert changed[1] > 1e-3
    assert np.max(np.delete(changed, 1)) < 1e-5


def test_dropout(case):
    _, _, apply, _, params, x = case
    out, again = apply(params, x, T), apply(params, x, T)
    one, same, two = (apply(params, x, T, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(one, same)
    assert np.max(np.abs(one - out)) > 1e-3 and np.max(np.abs(one - two)) > 1e-3


def test_dropout_with_a_key_for_each_example():
    net = M(dropout=0.3, blocks=1)
    x, params, apply = (
        jax.random.normal(jax.random.key(1), (BATCH, 2)),
        noised(net.init(jax.random.key(0))),
        quick(net.apply),
    )
    keys = jax.random.split(jax.random.key(2), BATCH)
    out = apply(params, x, T, key=keys)
    np.testing.assert_allclose(apply(params, x[1:3], T[1:3], key=keys[1:3]), out[1:3], atol=1e-5)
    assert np.max(np.abs(apply(params, x, T, key=keys[::-1]) - out)) > 1e-3


def test_dropout_noise():
    """Bytes are uniform and independent, also neighbours', which share a random word; one draw serves all shapes."""
    shapes = [(8, 8, 30), (5,), (3, 3)]
    draw = quick(functools.partial(layers.dropout_noise, rate=0.1, shapes=shapes), static_argnames="batch")
    parts = draw(jax.random.key(0), batch=64)
    assert [p.shape for p in parts if p is not None] == [(64, *shape) for shape in shapes]
    drawn = np.asarray(parts[0]).reshape(-1, 30)
    assert drawn.dtype == np.uint8 and np.ptp(np.bincount(drawn.ravel(), minlength=256)) < 300
    assert np.all(np.abs(np.corrcoef(drawn.T) - np.eye(30)) < 0.08)
    assert np.all(np.abs(np.corrcoef(drawn[: 64 * 5, 0], np.asarray(parts[1]).ravel())[0, 1]) < 0.2)
    assert list(layers.dropout_noise(None, 0.1, 64, shapes)) == [None] * 3
    keys = jax.random.split(jax.random.key(0), 4)
    whole, half = (draw(k, batch=len(k)) for k in (keys, keys[2:]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), whole, half)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_law(dtype):
    noise = layers.dropout_noise(jax.random.key(0), 0.25, 64, [(8, 8, 30)])[0]
    x = jnp.ones((64, 8, 8, 30), dtype)
    y = np.asarray(layers.dropout(x, 0.25, noise).astype(jnp.float32))
    assert np.mean(y != 0) == pytest.approx(0.75, abs=0.005)
    np.testing.assert_allclose(y[y != 0], 4 / 3, rtol=4e-3)
    assert layers.dropout(x, 0.25, None) is x


def test_bfloat16_is_close(case):
    """Half precision changes the output by some of its 8 bits, not by its size."""
    name, _, apply, start, _, x = case
    params = noised(start, 0.05)
    full, half = apply(params, x, T), quick(MAKERS[name](dtype=jnp.bfloat16).apply)(params, x, T)
    assert half.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((half - full) ** 2)) < 0.03 * np.std(full)


@pytest.mark.slow
@pytest.mark.parametrize("net", [U(multipliers=(1,), attention=()), M(blocks=1)], ids=["unet", "mlp"])
def test_gradients_reach_every_parameter(net):
    params = noised(net.init(jax.random.key(0)))
    x = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 2) if "conv_in" in params else (BATCH, 2))
    labels = jnp.array([0, 1, 2, CLASSES])
    grads = quick(jax.grad(lambda p: jnp.mean(net.apply(p, x, T, labels) ** 2)))(params)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == []


@pytest.mark.parametrize("act", [False, True])
def test_group_norm_against_the_definition(act):
    rng = np.random.default_rng(0)
    x, gamma, beta = rng.normal(2, 3, (2, 4, 4, 12)), rng.normal(size=12), rng.normal(size=12)
    d, scale, shift = rng.normal(size=(3, 2, 12))
    h = (x + d[:, None, None]).reshape(2, 16, 3, 4)
    h = (h - h.mean((1, 3), keepdims=True)) / np.sqrt(h.var((1, 3), keepdims=True) + 1e-6)
    h = (h.reshape(x.shape) * gamma + beta) * (1 + scale[:, None, None]) + shift[:, None, None]
    expected = h / (1 + np.exp(-h)) if act else h
    f = [jnp.asarray(a, jnp.float32) for a in (x, gamma, beta, d, scale, shift)]
    y = layers.group_norm(f[0], f[1], f[2], 3, 1e-6, offset=f[3], modulation=(f[4], f[5]), act=act)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_layers_in_other_dimensions(ndim):
    o = layers.Options(2, 1, 0.0, jnp.float32, ndim)
    x = jnp.ones((2, *(4,) * ndim, 8))
    make = lambda rngs: layers.Conv(rngs, 8, 6, o, stride=2)  # noqa: E731
    assert nnx.eval_shape(lambda: make(nnx.Rngs(0))(x)).shape == (2, *(2,) * ndim, 6)
    assert jax.eval_shape(layers.upsample, x).shape == (2, *(8,) * ndim, 8)
    assert jax.eval_shape(functools.partial(layers.attend, heads=2), x, x, x).shape == x.shape
    one = jnp.ones(8)
    assert jax.eval_shape(lambda z: layers.group_norm(z, one, one, 2, 1e-6), x).shape == x.shape
    ramp = jnp.broadcast_to(jnp.arange(4.0).reshape(1, 4, *(1,) * ndim), x.shape)
    assert np.unique(quick(layers.average_pool)(ramp)).tolist() == [0.5, 2.5]


def test_time_features():
    f = np.asarray(layers.time_features(jnp.array([0.0, 2.0]), 6))
    rates = 10000.0 ** -np.array([0, 0.5, 1])
    np.testing.assert_allclose(f, [[0, 0, 0, 1, 1, 1], [*np.sin(2 * rates), *np.cos(2 * rates)]], atol=1e-6)


def test_mismatched_params_name_the_parameter():
    params = jax.eval_shape(M().init, jax.random.key(0))
    x, t = jnp.zeros((1, 2)), jnp.zeros(1)
    narrow = {**params, "linear_in": {**params["linear_in"], "bias": jax.ShapeDtypeStruct((5,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"linear_in\.bias.*\(16,\).*\(5,\)"):
        jax.eval_shape(M().apply, narrow, x, t)
    with pytest.raises(ValueError, match=r"class_embedding\.embedding.*\(4, 16\).*absent"):
        jax.eval_shape(M().apply, {k: v for k, v in params.items() if k != "class_embedding"}, x, t)
    with pytest.raises(ValueError, match=r"extra\.kernel.*absent.*\(5,\)"):
        jax.eval_shape(M().apply, {**params, "extra": {"kernel": jnp.zeros(5)}}, x, t)


def test_state_other_than_params_is_refused():
    class Counter(nnx.Module):
        def __init__(self, rngs):
            self.seen = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x, t, cond, *, key):
            return x

    with pytest.raises(ValueError, match="not nnx.Param: seen"):
        functional(Counter).init(jax.random.key(0))


def test_flax_own_layers_work_behind_the_border():
    class Plain(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, t, cond, *, key):
            return self.linear(x)

    net = functional(Plain)
    a, b = net.init(jax.random.key(0)), net.init(jax.random.key(1))
    assert count(a) == 6 and not np.array_equal(a["linear"]["kernel"], b["linear"]["kernel"])
    np.testing.assert_allclose(net.apply(a, jnp.eye(2), jnp.zeros(2)), a["linear"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("make", [unet, ddpmpp])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (30, 32, 3)}, "divisible by 4"),
        ({"shape": (32,)}, "height, width, channels"),
        ({"attention": (7,)}, "attention at 7 never happens"),
        ({"channels": 130}, "divisible by groups"),
        ({"channels": 16, "heads": 3}, "divisible by heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"blocks": 0}, "at least one"),
    ],
)
def test_arguments_that_do_not_fit(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**{"shape": (32, 32, 3), "multipliers": (1, 2, 2), **arguments})


@pytest.mark.parametrize("make", [U, D])
def test_inputs_that_do_not_fit(make):
    net, plain = make(), make(classes=None)
    params, bare = (jax.eval_shape(n.init, jax.random.key(0)) for n in (net, plain))
    x, t = jnp.zeros((2, 8, 8, 2)), jnp.zeros(2)
    for arguments, message in [
        ((x[..., :1], t), "x must be"),
        ((x[:, :7], t), "divisible by 2"),
        ((x, t[0]), "t must be"),
        ((x, t, jnp.zeros(2)), "labels must be int"),
        ((x, t, jnp.zeros((2, 1), jnp.int32)), "labels must be int"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, params, *arguments)
    with pytest.raises(ValueError, match="without classes"):
        jax.eval_shape(plain.apply, bare, x, t, jnp.zeros(2, jnp.int32))


def test_importing_the_package_does_not_import_flax():
    code = "import sys, diffusion_jax; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dots_keeps_products_with_weights_but_not_the_scores_of_attention():
    n, d = 12, 8

    def block(x, w):
        q = jnp.reshape(jnp.matmul(x, w), (2, n, 1, d))
        return jnp.reshape(layers.attention(q, q, q, implementation="xla"), (2, n, d))

    def kept(policy):
        x, w = jnp.zeros((2, n, d)), jnp.zeros((d, d))
        pull = jax.eval_shape(lambda x, w: jax.vjp(layers.remat(policy, block), x, w)[1], x, w)
        return [leaf.shape for leaf in jax.tree.leaves(pull)]

    assert any(shape[-2:] == (n, n) for shape in kept("none"))
    assert not any(shape[-2:] == (n, n) for shape in kept("dots"))
    assert (2, n, d) in kept("dots")
    assert len(kept("dots")) > len(kept("full"))
