"""NCSN++: published sizes, the laws of its filters and features, every option, rematerialization, precision, errors.

What it shares with DDPM++ is tested with the other networks; numbers against PyTorch are in tests/parity.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.nets import (
    count,
    ddpmpp,
    edm_cifar10,
    edm_cifar10_ncsnpp,
    ncsnpp,
    resample,
    song_256,
    song_1024,
    song_cifar10,
    song_cifar10_ncsnpp,
)
from diffusion_jax.nets.functional import OneDraw
from diffusion_jax.nets.ncsnpp import FourierFeatures

CLASSES, BATCH = 3, 3
N = functools.partial(
    ncsnpp, (8, 8, 2), channels=8, multipliers=(1, 2), blocks=1, attention=(4,), classes=CLASSES, fourier_scale=1.0
)
T = jnp.array([-1.0, 0.2, 1.5])
LABELS = jnp.array([0, 2, CLASSES])
X = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 2))
TAPS = np.array([1, 3, 3, 1]) / 8
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def noised(params, scale=0.1):
    """Parameters away from their start, where every block ends in zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + np.float32(scale) * rng.normal(size=a.shape).astype(np.float32), params
    )


@pytest.fixture(scope="module")
def network():
    """Parameters as they start, the jitted apply, with dropout and an image, parameters away from the start."""
    net = N(dropout=0.3, image=1, vector=2, progressive_input="skip", progressive_output="skip")
    start = net.init(jax.random.key(0))
    return start, quick(net.apply), noised(start)


def given(**entries):
    """A condition of one structure, so that all calls share one compilation; absent but for the entries."""
    absent = {
        "label": jnp.full(BATCH, CLASSES),
        "vector": jnp.ones((BATCH, 2)),
        "vector_mask": jnp.zeros(BATCH, bool),
        "image": jnp.zeros((BATCH, 8, 8, 1)),
    }
    return {**absent, **entries}


@pytest.mark.parametrize(
    ("make", "millions"),
    [  # networks of Song et al. 2021 as their checkpoints have them, and 56M in Karras et al. 2022
        (song_cifar10, 61.8),
        (song_cifar10_ncsnpp, 62.8),
        (functools.partial(song_cifar10, deep=True), 106.6),
        (functools.partial(song_cifar10_ncsnpp, deep=True), 107.6),
        (song_256, 65.6),
        (song_1024, 105.8),
        (edm_cifar10, 55.7),
        (edm_cifar10_ncsnpp, 56.4),
    ],
)
def test_published_sizes(make, millions):
    params = jax.eval_shape(make().init, jax.random.key(0))
    assert round(count(params) / 1e6, 1) == millions
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("into", "combine"),
    [("none", "sum"), ("skip", "sum"), ("skip", "concatenation"), ("residual", "sum")],
)
@pytest.mark.parametrize("outof", ["none", "skip", "residual"])
def test_options(into, combine, outof):
    """Every combination is a network, of the parameters that its equations name."""
    net = N(
        combine=combine, progressive_input=into, progressive_output=outof, out_channels=3, multipliers=(1, 2, 2),
        attention=(), fir=outof == "skip", dtype=jnp.bfloat16,
    )  # fmt: skip
    params = jax.eval_shape(net.init, jax.random.key(0))
    out = jax.eval_shape(net.apply, params, X, T, LABELS)
    assert (out.shape, out.dtype) == ((BATCH, 8, 8, 3), jnp.float32)
    assert len(params.get("pyramid_in", {})) == (0 if into == "none" else 2)
    assert len(params.get("pyramid_out", {})) == (0 if outof == "none" else 3)
    assert ("conv_out" in params) == (outof != "skip")


def definition(x, up, down, before, after):
    """Equation (1) along the only axis of a vector."""
    u = np.zeros(len(x) * up)
    u[::up] = x
    u = np.concatenate([np.zeros(before), u, np.zeros(after)])
    return up * np.correlate(u, TAPS, "valid")[::down]


@pytest.mark.parametrize(
    ("f", "numbers"),
    [(resample.fir_down, (1, 2, 1, 1)), (resample.fir_up, (2, 1, 2, 1)), (None, (2, 3, 5, 4))],
)
def test_filters_against_the_definition(f, numbers):
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    f = f or (lambda z: resample.upfirdn(z, up=2, down=3, pad=(5, 4)))
    y = quick(f)(jnp.asarray(x, jnp.float32)[None, :, None])[0, :, 0]
    np.testing.assert_allclose(y, definition(x, *numbers), atol=1e-6)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_filters_keep_ramps_and_are_adjoint(ndim):
    """In any number of axes: linear signals stay linear inside, and halving is doubling transposed, over 2^ndim."""

    def ramp(values):
        shape = (1, *(len(values),) * ndim, 1)
        return np.broadcast_to(np.reshape(np.float32(values), (1, -1, *(1,) * ndim)), shape)

    def inside(y, edge):
        return y[(slice(None), *(slice(edge, -edge),) * ndim)]

    rng = np.random.default_rng(0)
    down, up = quick(resample.fir_down), quick(resample.fir_up)
    np.testing.assert_allclose(inside(up(ramp(np.arange(4))), 2), ramp(np.arange(2, 6) / 2 - 0.25), atol=1e-5)
    np.testing.assert_allclose(inside(down(ramp(np.arange(8))), 1), ramp([2.5, 4.5]), atol=1e-5)
    a, b = (rng.normal(size=(1, *(n,) * ndim, 1)).astype(np.float32) for n in (8, 4))
    np.testing.assert_allclose(np.sum(down(a) * b), np.sum(a * up(b)) / 2**ndim, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("with_conv", "alone", "ends"),
    [
        (resample.fir_down_conv, resample.fir_down, slice(2, 8)),
        (resample.fir_up_conv, resample.fir_up, slice(8, 32)),
    ],
)
def test_resampling_convolutions(with_conv, alone, ends):
    """With a kernel of one tap they are the filter alone, moved by a pixel for the outer taps, with nothing cut off."""
    x = np.random.default_rng(0).normal(size=(2, 12, 1)).astype(np.float32)
    with_conv, alone = quick(with_conv), quick(alone)
    longer, taps = np.pad(x, ((0, 0), (4, 4), (0, 0))), np.eye(3, dtype=np.float32)[:, :, None, None]
    np.testing.assert_allclose(with_conv(x, taps[1]), alone(longer)[:, ends], atol=1e-6)
    for j in (0, 2):
        if ends.stop == 32:
            expected = alone(longer)[:, ends.start + j - 1 : ends.stop + j - 1]
        else:
            expected = alone(np.roll(longer, 1 - j, axis=1))[:, ends]
        np.testing.assert_allclose(with_conv(x, taps[j]), expected, atol=1e-6)


def test_fourier_features():
    """Equation (3), with rates of the law that it states; another key draws others."""
    first, second = (FourierFeatures(OneDraw(jax.random.key(seed), 2048), 2048, 16.0) for seed in (0, 1))
    w, other = (np.asarray(f.weight[...], np.float64) for f in (first, second))
    assert np.max(np.abs(w - other)) > 1
    assert abs(np.mean(w)) < 1.5 and np.std(w) == pytest.approx(16, rel=0.06)
    assert np.mean(np.abs(w) < 16) == pytest.approx(math.erf(math.sqrt(0.5)), abs=0.04)
    angles = 2 * np.pi * w[None] * np.float32([[0.0], [0.03]])
    y = first(jnp.array([0.0, 0.03]))
    np.testing.assert_allclose(y, np.concatenate([np.sin(angles), np.cos(angles)], axis=1), atol=1e-4)


@pytest.mark.slow
def test_starts_at_zero(network):
    start, apply, _ = network
    assert not np.any(apply(start, X, T, given()))


@pytest.mark.slow
def test_conditions_are_heard_by_their_example_alone(network):
    _, apply, params = network
    out = apply(params, X, T, given())
    for other in (
        apply(params, X, T, given(label=jnp.array([CLASSES, 1, CLASSES]))),
        apply(params, X, T, given(image=jnp.zeros((BATCH, 8, 8, 1)).at[1].set(1.0))),
        apply(params, X, T, given(vector_mask=jnp.arange(BATCH) == 1)),
        apply(params, X, T.at[1].add(0.5), given()),
        apply(params, X.at[1].multiply(2.0), T, given()),
    ):
        changed = np.max(np.abs(other - out), axis=(1, 2, 3))
        assert changed[1] > 1e-3 and max(changed[0], changed[2]) < 1e-5


def test_absent_conditions_and_small_images():
    """None is no label, no vector and a black image; a small image counts as its enlargement."""
    net = N(image=1, vector=2, multipliers=(1,), attention=())
    params = jax.eval_shape(net.init, jax.random.key(0))
    text = lambda *cond: str(jax.make_jaxpr(net.apply)(params, X, T, *cond))  # noqa: E731
    assert text() == text(None) == text({"label": None, "image": None}) == text({})
    small = jnp.ones((BATCH, 4, 4, 1))
    enlarged = resample.with_enlarged_image({"image": small, "label": LABELS}, X)
    assert enlarged["label"] is LABELS and enlarged["image"].shape == (BATCH, 8, 8, 1)
    np.testing.assert_allclose(enlarged["image"], 1, atol=1e-6)
    np.testing.assert_array_equal(resample.beside(X, None, 1), np.pad(X, ((0, 0),) * 3 + ((0, 1),)))


def test_dropout(network):
    _, apply, params = network
    one, same, two = (apply(params, X, T, given(), key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.max(np.abs(one - two)) > 1e-3 and np.max(np.abs(one - apply(params, X, T, given()))) > 1e-3


@pytest.mark.slow
def test_bfloat16_is_close(network):
    """Half precision changes the output by some of its 8 bits, not by its size."""
    _, apply, params = network
    params = jax.tree.map(lambda a: 0.7 * a, params)
    net = N(image=1, vector=2, progressive_input="skip", progressive_output="skip", dtype=jnp.bfloat16)
    full, half = apply(params, X, T, given()), quick(net.apply)(params, X, T, given())
    assert half.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((half - full) ** 2)) < 0.03 * np.std(full)


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    """All but the rates of time, which are not trained."""
    net = N(dropout=0.3, remat="full", multipliers=(1,), attention=())
    params = noised(net.init(jax.random.key(0)))
    grads = quick(jax.grad(lambda p: jnp.mean(net.apply(p, X, T, LABELS, key=jax.random.key(1)) ** 2)))(params)
    silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not np.any(g)]
    assert silent == ["['time_proj']['weight']"]


@pytest.mark.parametrize("make", [N, functools.partial(ddpmpp, (8, 8, 2), channels=8, blocks=1, attention=())])
def test_rematerialization_keeps_less(make):
    """Of what the forward pass leaves for the backward pass, besides the parameters."""

    def kept(remat):
        net = make(remat=remat, multipliers=(1,), attention=())
        params = jax.eval_shape(net.init, jax.random.key(0))
        leaves = jax.eval_shape(lambda p: jax.vjp(lambda q: net.apply(q, X, T), p)[1], params)
        return count(leaves) - count(params)

    assert kept("full") < kept("dots") < kept("none")


def test_ddpmpp_is_a_member():
    """The same parameters as with its options written out."""
    trees = [
        jax.eval_shape(net.init, jax.random.key(0))
        for net in (
            ddpmpp((8, 8, 2), channels=16, multipliers=(1, 2), blocks=1, attention=(4,)),
            ncsnpp(
                (8, 8, 2),
                channels=16,
                multipliers=(1, 2),
                blocks=1,
                attention=(4,),
                time="positional",
                fir=False,
                progressive_input="none",
            ),
        )
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])


def test_groups_divide_any_width():
    """min(32, n / 4) does not always divide n; the next lower number that does is taken."""
    net = N(channels=44, multipliers=(1, 3), attention=())
    jax.eval_shape(net.apply, jax.eval_shape(net.init, jax.random.key(0)), X, T)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"progressive_input": "residul"}, "progressive_input='residul' is not one of none, skip, residual"),
        ({"progressive_output": "output_skip"}, "progressive_output"),
        ({"combine": "cat"}, "combine='cat' is not one of sum, concatenation"),
        ({"time": "sine"}, "time='sine' is not one of"),
        ({"image": 0}, "image=0"),
        ({"remat": "some"}, "remat='some' is not one of none, dots, full"),
        ({"attention": (7,)}, "attention at 7 never happens"),
        ({"multipliers": (1, 1, 1, 1, 1)}, "divisible by 16"),
        ({"channels": 7}, "must be even"),
        ({"heads": 3}, "divisible by heads"),
        ({"groups": 3}, "divisible by groups"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        N(**arguments)


def test_conditions_that_do_not_fit():
    net, plain = N(image=1), N(classes=None)
    a, p = (jax.eval_shape(n.init, jax.random.key(0)) for n in (net, plain))
    for arguments, message in [
        ((X, T, {"image": jnp.zeros((BATCH, 3, 4, 1))}), "sizes must divide"),
        ((X, T, {"image": jnp.zeros((BATCH, 4, 4, 2))}), "image must be"),
        ((X, T, {"picture": X}), "picture"),
        ((X[..., :1], T), "x must be"),
        ((X, T[:2]), "t must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(net.apply, a, *arguments)
    with pytest.raises(ValueError, match="without classes"):
        jax.eval_shape(plain.apply, p, X, T, LABELS)
