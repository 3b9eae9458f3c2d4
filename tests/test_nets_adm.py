"""ADM and its classifier: published sizes, conditions, rematerialization, half precision, guidance, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import guidance, predictions, schedules
from diffusion_jax.nets import adm, adm_classifier, adm_classifier_imagenet, adm_imagenet, adm_upsampler, count
from diffusion_jax.nets.adm import log_prob

CLASSES, BATCH = 3, 3
SMALL = {"channels": 16, "multipliers": (1, 1.5), "blocks": 1, "attention": (4,), "head_channels": 8, "groups": 4}
A = functools.partial(adm, (8, 8, 2), **SMALL, classes=CLASSES)
C = functools.partial(adm_classifier, (8, 8, 2), **SMALL, classes=CLASSES)
ONE_LEVEL = {"multipliers": (1,), "attention": ()}
T = jnp.array([3.0, 300.0, 900.0])
LABELS = jnp.array([0, 2, CLASSES])
X = jax.random.normal(jax.random.key(1), (BATCH, 8, 8, 2))
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def noised(params, scale=0.1):
    """Parameters away from their start, where every block ends in zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: np.asarray(a) + np.float32(scale) * rng.normal(size=a.shape).astype(np.float32), params
    )


@pytest.fixture(scope="module")
def network():
    """Parameters as they start, the jitted apply, with dropout, parameters away from the start."""
    net = A(dropout=0.3)
    start = net.init(jax.random.key(0))
    return start, quick(net.apply), noised(start)


@pytest.fixture(scope="module")
def judge():
    net = C(**ONE_LEVEL)
    return net, quick(net.apply), noised(net.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("make", "size", "millions"),
    [  # Dhariwal & Nichol 2021, tables 11 and 12; 553M is the unconditional checkpoint's
        (adm_imagenet, 64, 296),
        (adm_imagenet, 128, 422),
        (adm_imagenet, 256, 554),
        (adm_imagenet, 512, 559),
        (functools.partial(adm_imagenet, classes=None), 256, 553),
        (adm_upsampler, 256, 312),
        (adm_upsampler, 512, 309),
        (adm_classifier_imagenet, 64, 65),
        (adm_classifier_imagenet, 128, 43),
        (adm_classifier_imagenet, 256, 54),
        (adm_classifier_imagenet, 512, 54),
    ],
)
def test_published_sizes(make, size, millions):
    params = jax.eval_shape(make(size).init, jax.random.key(0))
    assert round(count(params) / 1e6) == millions
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("arguments", "channels"), [({}, 4), ({"learned_variance": False}, 2), ({"out_channels": 5}, 10)]
)
def test_output_channels(arguments, channels):
    net = A(**arguments)
    out = jax.eval_shape(net.apply, jax.eval_shape(net.init, jax.random.key(0)), X, T)
    assert out.shape == (BATCH, 8, 8, channels)


@pytest.mark.slow
def test_starts_at_zero(network):
    start, apply, _ = network
    assert not np.any(apply(start, X, T))


@pytest.mark.slow
def test_labels(network):
    """No label is None, and is the network that was never given one."""
    _, apply, params = network
    out, labelled = apply(params, X, T), apply(params, X, T, LABELS)
    changed = np.max(np.abs(labelled - out), axis=(1, 2, 3))
    assert np.all(changed[:2] > 1e-3) and changed[2] == 0
    bare = {name: value for name, value in params.items() if name != "label_emb"}
    np.testing.assert_allclose(quick(A(classes=None).apply)(bare, X, T), out, atol=1e-5)


def test_examples_are_independent(network):
    _, apply, params = network
    out = apply(params, X, T, LABELS)
    other = apply(params, X.at[1].multiply(2.0), T.at[1].add(5.0), LABELS.at[1].set(1))
    changed = np.max(np.abs(other - out), axis=(1, 2, 3))
    assert changed[1] > 1e-2 and max(changed[0], changed[2]) < 1e-5


def test_dropout(network):
    _, apply, params = network
    one, same, two = (apply(params, X, T, LABELS, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.max(np.abs(one - two)) > 1e-3 and np.max(np.abs(one - apply(params, X, T, LABELS))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make"), [("network", A), ("judge", functools.partial(C, **ONE_LEVEL))])
def test_bfloat16_is_close(name, make, request):
    """Half precision changes the output by some of its 8 bits, not by its size."""
    _, apply, params = request.getfixturevalue(name)
    params = jax.tree.map(lambda a: 0.7 * a, params)
    full, half = apply(params, X, T), quick(make(dtype=jnp.bfloat16).apply)(params, X, T)
    assert half.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((half - full) ** 2)) < 0.03 * np.std(full)


@pytest.mark.slow
def test_gradients_are_the_same_rematerialized_and_reach_every_parameter():
    def gradient(remat):
        net = A(dropout=0.3, remat=remat, **ONE_LEVEL)
        params = noised(net.init(jax.random.key(0)))
        return quick(jax.grad(lambda p: jnp.mean(net.apply(p, X, T, LABELS, key=jax.random.key(1)) ** 2)))(params)

    kept, other = gradient("none"), gradient("dots")
    assert all(np.any(g) for g in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, other)


def test_full_rematerialization_keeps_less():
    """Of what the forward pass leaves for the backward pass, besides the parameters."""

    def kept(remat):
        net = A(remat=remat, **ONE_LEVEL)
        params = jax.eval_shape(net.init, jax.random.key(0))
        leaves = jax.eval_shape(lambda p: jax.vjp(lambda q: net.apply(q, X, T, LABELS), p)[1], params)
        return count(leaves) - count(params)

    assert kept("full") < 0.6 * kept("dots")
    assert kept("dots") < 0.3 * kept("none")


@pytest.mark.slow
def test_image_and_vector_conditions():
    """A smaller image is enlarged by bilinear interpolation; no image is a black one, no vector adds nothing."""
    net = A(image=1, vector=2, classes=None, **ONE_LEVEL)
    params, apply = noised(net.init(jax.random.key(0))), quick(net.apply)
    small = np.random.default_rng(0).normal(size=(BATCH, 4, 4, 1)).astype(np.float32)
    where = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    weights = np.maximum(0, 1 - np.abs(where[:, None] - np.arange(4)[None, :])).astype(np.float32)
    large = np.einsum("im,jn,bmnc->bijc", weights, weights, small)
    out = apply(params, X, T, {"image": small})
    np.testing.assert_allclose(out, apply(params, X, T, {"image": large}), atol=1e-4)
    absent = apply(params, X, T)
    np.testing.assert_allclose(absent, apply(params, X, T, {"image": np.zeros_like(large)}), atol=1e-5)
    assert np.max(np.abs(out - absent)) > 1e-2
    vector = apply(params, X, T, {"vector": np.ones((BATCH, 2), np.float32), "vector_mask": np.arange(BATCH) == 1})
    changed = np.max(np.abs(vector - absent), axis=(1, 2, 3))
    assert changed[1] > 1e-3 and max(changed[0], changed[2]) < 1e-5


@pytest.mark.slow
def test_log_prob_is_that_of_the_labels(judge):
    net, apply, params = judge
    judged = quick(log_prob(net, params))
    logits = np.asarray(apply(params, X, T), np.float64)
    expected = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    assert np.std(logits) > 0.05
    for label in range(CLASSES):
        labels = jnp.full(BATCH, label)
        np.testing.assert_allclose(judged(X, T, labels), expected[:, label], atol=1e-4)
    mixed = judged(X, T, LABELS)
    np.testing.assert_allclose(mixed[:2], expected[[0, 1], [0, 2]], atol=1e-4)
    assert mixed[2] == 0


@pytest.mark.slow
def test_guides(judge):
    """Inside `guidance.classifier`: eps moves by -sigma times the slope of log p, measured along a direction."""
    net, _, params = judge
    schedule = schedules.cosine()
    t = jnp.array([0.2, 0.5, 0.8])
    judged = log_prob(net, params, time=lambda t: 999 * t)
    plain = lambda x, t, cond=None: predictions.from_eps(schedule, x, t, 0.3 * x)  # noqa: E731
    guided = quick(guidance.classifier(plain, schedule, judged, 2.0))(X, t, LABELS)
    v = jax.random.normal(jax.random.key(3), X.shape)
    values = quick(lambda h: judged(X + h * v, t, LABELS))
    slope = (np.asarray(values(1e-2)) - np.asarray(values(-1e-2))) / 2e-2
    sigma = np.asarray(schedule(t).sigma)
    moved = np.sum(np.asarray((guided.eps - plain(X, t).eps) * v), axis=(1, 2, 3))
    assert np.all(np.abs(slope[:2]) > 1e-2)
    np.testing.assert_allclose(moved, -2 * sigma * slope, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adm((30, 32, 3)), "divisible by 32"),
        (lambda: adm((32, 32, 3), multipliers=(1, 2), attention=(7,)), "attention at 7 never happens"),
        (lambda: adm((32, 32, 3), channels=100, multipliers=(1, 2), attention=()), "head_channels=64"),
        (lambda: adm((8, 8, 3), channels=32, multipliers=(1, 1.3), attention=(), groups=8), "divisible by groups=8"),
        (lambda: A(heads=5, groups=4), "divisible by heads=5"),
        (lambda: A(dropout=1.0), "dropout"),
        (lambda: A(blocks=0), "at least one"),
        (lambda: A(image=0), "image=0"),
        (lambda: A(head_channels=0), "head_channels=0 must be positive"),
        (lambda: C(remat="some"), "remat='some' is not one of none, dots, full"),
        (lambda: C(classes=0), "classes=0"),
        (lambda: adm_imagenet(96), "96 pixels, only for 64, 128, 256, 512"),
        (lambda: adm_upsampler(64), "only for 256, 512"),
        (lambda: adm_classifier_imagenet(32), "32 pixels"),
    ],
)
def test_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[..., :1], T), "x must be"),
        ((X[:, :7], T), "divisible by 2"),
        ((X, T[0]), "t must be"),
        ((X, T, jnp.zeros(BATCH)), "labels must be int"),
        ((X, T, {"image": X}), "image"),
    ],
)
def test_inputs_that_do_not_fit(arguments, message):
    net = A()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.apply, jax.eval_shape(net.init, jax.random.key(0)), *arguments)


def test_conditions_that_do_not_fit():
    upsampler, judge, plain = A(image=1), C(), A(classes=None)
    a, c, p = (jax.eval_shape(net.init, jax.random.key(0)) for net in (upsampler, judge, plain))
    with pytest.raises(ValueError, match="sizes must divide"):
        jax.eval_shape(upsampler.apply, a, X, T, {"image": jnp.zeros((BATCH, 3, 4, 1))})
    with pytest.raises(ValueError, match="image must be"):
        jax.eval_shape(upsampler.apply, a, X, T, {"image": jnp.zeros((BATCH, 4, 4, 2))})
    with pytest.raises(ValueError, match="without classes"):
        jax.eval_shape(plain.apply, p, X, T, LABELS)
    with pytest.raises(ValueError, match="no condition"):
        jax.eval_shape(judge.apply, c, X, T, LABELS)
    with pytest.raises(ValueError, match=r"x must be \[b, 8, 8, 2\]"):
        jax.eval_shape(judge.apply, c, jnp.zeros((BATCH, 16, 16, 2)), T)
    with pytest.raises(ValueError, match="labels must be int"):
        log_prob(judge, c)(X, T, None)
