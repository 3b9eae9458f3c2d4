"""EDM2: the published sizes, magnitudes that stay at 1, weights whose length does not matter, learned uncertainty."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import diffusion_jax as dj
from diffusion_jax.nets import count, edm2, edm2_imagenet64, edm2_imagenet512, forced_weight_norm, layers
from diffusion_jax.typing import InputError

CLASSES, BATCH, SHAPE = 3, 4, (8, 8, 2)
module = importlib.import_module("diffusion_jax.nets.edm2")  # in the package the name is the function's
SMALL = {"channels": 16, "multipliers": (1,), "blocks": 1, "attention": (8,), "head_width": 8}
make = functools.partial(edm2, SHAPE, classes=CLASSES, uncertainty=True, **SMALL)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
T = jnp.linspace(-1.0, 0.8, BATCH)
LABELS = jnp.arange(BATCH) % CLASSES
X = jax.random.normal(jax.random.key(1), (BATCH, *SHAPE))
NET = make()


def paths(tree):
    """{dotted path: array}."""
    return {".".join(str(k.key) for k in path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def is_weight(path):
    return path.endswith(".kernel")


@pytest.fixture(scope="module")
def start():
    return NET.init(jax.random.key(0))


def noised(tree):
    """Away from the start: gains of order one, weights of other lengths."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.float32(a + 0.3 * rng.normal(size=a.shape) + (0.7 if a.ndim == 0 else 0)), tree)


@pytest.fixture(scope="module")
def params(start):
    return noised(start)


@pytest.fixture(scope="module")
def apply():
    return quick(NET.apply)


@pytest.fixture(scope="module")
def gradients(params):
    """For each policy of rematerialisation, the gradients of a function of the picture and the uncertainty."""
    direction = jax.random.normal(jax.random.key(2), (BATCH, 8, 8, 3))

    def of(remat):
        net = make(dropout=0.2, remat=remat)
        f = quick(jax.grad(lambda p: jnp.sum(direction * net.apply(p, X, T, LABELS, key=jax.random.key(3)) ** 2)))
        return paths(f(params))

    return {remat: of(remat) for remat in ("none", "full", "dots")}


@pytest.mark.parametrize(
    ("preset", "size", "millions"),
    [
        (edm2_imagenet512, "XS", 124.7),
        (edm2_imagenet512, "S", 280.2),
        (edm2_imagenet512, "M", 497.8),
        (edm2_imagenet512, "L", 777.5),
        (edm2_imagenet512, "XL", 1119.3),
        (edm2_imagenet512, "XXL", 1523.2),
        (edm2_imagenet64, "S", 280.2),
        (edm2_imagenet64, "M", 497.8),
        (edm2_imagenet64, "L", 777.5),
        (edm2_imagenet64, "XL", 1119.3),
    ],
)
def test_published_sizes(preset, size, millions):
    """The model capacities of Karras et al. 2024, table 6, to all the digits there."""
    net = preset(size, uncertainty=True, dtype=jnp.bfloat16)
    tree = jax.eval_shape(net.init, jax.random.key(0))
    assert round(count(tree) / 1e6, 1) == millions
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


def test_dropout_by_size(monkeypatch):
    """Table 6: none up to S, 10 % above; and what is asked for instead."""
    monkeypatch.setattr(module, "edm2", lambda shape, *, channels, dropout, **_: (shape, channels, dropout))
    assert edm2_imagenet512("XS") == ((64, 64, 4), 128, 0)
    assert [edm2_imagenet512(size)[2] for size in ("S", "M", "L", "XL", "XXL")] == [0, 0.1, 0.1, 0.1, 0.1]
    assert edm2_imagenet64("S") == ((64, 64, 3), 192, 0)
    assert edm2_imagenet64("M", dropout=0.3) == ((64, 64, 3), 256, 0.3)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_operations_keep_the_magnitude(t):
    """Equations (3)-(5) on independent standard normal numbers; at t = 1/2 both parts of (5) weigh the same."""
    a, b = (jax.random.normal(jax.random.key(i), (1000, n)) for i, n in enumerate((96, 32)))

    def rms(z):
        return float(jnp.sqrt(jnp.mean(z**2)))

    assert rms(module.mp_silu(a)) == pytest.approx(1, abs=0.01)
    assert rms(module.mp_sum(a[:, :32], b, t)) == pytest.approx(1, abs=0.01)
    joined = module.mp_cat(a, b, t)
    assert rms(joined) == pytest.approx(1, abs=0.01)
    parts = float(jnp.sum(joined[:, :96] ** 2) / jnp.sum(joined[:, 96:] ** 2))
    assert parts == pytest.approx(((1 - t) / t) ** 2, rel=0.03)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(module.normalize(7 * a) ** 2, axis=1)), 1, atol=2e-4)


def test_fourier_features_have_unit_variance():
    features = module.MPFourier(nnx.Rngs(0), 256)(jnp.linspace(-1.5, 1.1, 512))
    assert float(jnp.mean(features)) == pytest.approx(0, abs=0.05)
    assert float(jnp.sqrt(jnp.mean(features**2))) == pytest.approx(1, abs=0.03)


@pytest.mark.slow
def test_every_block_gives_unit_magnitude_at_the_start(monkeypatch):
    """From white noise, through a whole network with classes at its start: measured at each block's output.

    Averages of v over pixels and the zeros around a picture make it a little less than 1; a network whose branches
    were added without (4) would grow from block to block, and one without (3) would fade.
    """
    seen = []

    def watched(policy, block):
        def call(*args):
            out = block(*args)
            seen.append(jnp.sqrt(jnp.mean(out**2)))
            return out

        return call

    net = edm2((16, 16, 2), channels=32, blocks=1, multipliers=(1, 2), attention=(8,), head_width=32, classes=CLASSES)
    tree = net.init(jax.random.key(0))
    monkeypatch.setattr(layers, "remat", watched)

    @quick
    def magnitudes(p):
        net.apply(p, jax.random.normal(jax.random.key(1), (BATCH, 16, 16, 2)), T, LABELS)
        return jnp.stack(seen)

    found = magnitudes(tree)
    assert len(found) == 1 + 1 + 1 + 2 + 2 + 1 + 2  # blocks of the encoder, and of the decoder from the middle up
    assert np.all((found > 0.75) & (found < 1.1)), found


@pytest.mark.slow
def test_weights_start_at_unit_magnitude_and_gains_at_zero(start):
    for path, a in paths(start).items():
        if is_weight(path):
            np.testing.assert_allclose(np.sqrt(np.mean(a**2, axis=tuple(range(a.ndim - 1)))), 1, atol=2e-3)
        elif path.endswith("gain"):
            assert a == 0
    kernel = paths(start)["enc.8x8_block0.conv_res1.kernel"].ravel()
    assert np.mean(kernel**4) == pytest.approx(3, rel=0.1)  # normal, not uniform


@pytest.mark.slow
def test_starts_at_zero(apply, start):
    assert not np.any(apply(start, X, T, LABELS)[..., :2])


def test_length_of_a_weight_does_not_matter(apply, params):
    """Each output's weights times a number of their own, 1 to 20: the same outputs; a gain does matter."""
    rng = np.random.default_rng(1)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, a: a * np.float32(rng.uniform(1, 20, a.shape[-1])) if path[-1].key == "kernel" else a, params
    )
    out = apply(params, X, T, LABELS)
    np.testing.assert_allclose(apply(scaled, X, T, LABELS), out, atol=5e-3 * np.std(out))
    louder = {**params, "out_gain": 2 * params["out_gain"]}
    np.testing.assert_allclose(apply(louder, X, T, LABELS)[..., :2], 2 * out[..., :2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_forced_weight_normalization(apply, params):
    """It changes the weights alone, makes them of unit magnitude, changes nothing twice, and no output."""
    forced = forced_weight_norm(params)
    before, after, twice = (paths(tree) for tree in (params, forced, forced_weight_norm(forced)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if before[path].ndim > 1} == set(filter(is_weight, before))
    for path in changed:
        a = after[path]
        np.testing.assert_allclose(np.sqrt(np.mean(a**2, axis=tuple(range(a.ndim - 1)))), 1, atol=2e-3)
        np.testing.assert_allclose(twice[path], a, rtol=3e-3)
    out = apply(params, X, T, LABELS)
    np.testing.assert_allclose(apply(forced, X, T, LABELS), out, atol=5e-3 * np.std(out))


@pytest.mark.slow
def test_gradients_are_orthogonal_to_the_weights(gradients, params):
    for path, w in filter(lambda item: is_weight(item[0]), paths(params).items()):
        axes, g = tuple(range(w.ndim - 1)), gradients["none"][path]
        along = np.sum(g * w, axis=axes)
        size = np.sqrt(np.sum(g**2, axis=axes) * np.sum(w**2, axis=axes))
        assert np.all(size > 0), path
        assert np.max(np.abs(along) / size) < 2e-3, path


@pytest.mark.slow
def test_gradients_reach_everything_but_the_frequencies(gradients):
    for path, g in gradients["none"].items():
        assert np.any(g) == (not path.endswith(("freqs", "phases"))), path


def test_rematerialisation_changes_no_gradient(gradients):
    for remat in ("full", "dots"):
        for path, g in gradients["none"].items():
            np.testing.assert_allclose(gradients[remat][path], g, rtol=1e-4, atol=1e-4 * (1e-6 + np.max(np.abs(g))))


def test_bfloat16_is_close(apply, params):
    full = apply(params, X, T, LABELS)[..., :2]
    half = quick(make(dtype=jnp.bfloat16).apply)(params, X, T, LABELS)[..., :2]
    assert half.dtype == jnp.float32
    assert 0 < np.sqrt(np.mean((half - full) ** 2)) < 0.03 * np.std(full)


def test_examples_are_independent_and_time_and_labels_matter(apply, params):
    out = apply(params, X, T, LABELS)
    for other in (
        apply(params, X.at[1].add(1.0), T, LABELS),
        apply(params, X, T.at[1].add(0.3), LABELS),
        apply(params, X, T, LABELS.at[1].add(1)),
    ):
        changed = np.max(np.abs(other - out), axis=(1, 2, 3))
        assert changed[1] > 1e-2 and np.max(np.delete(changed, 1)) < 1e-5


@pytest.mark.slow
def test_no_label_is_the_network_without_classes(apply, params):
    """Which the paper trains to guide with: for label `classes`, for None, and beside labelled examples."""
    bare = {name: sub for name, sub in params.items() if name != "emb_label"}
    alone = quick(make(classes=None).apply)(bare, X, T)
    np.testing.assert_allclose(apply(params, X, T, jnp.full(BATCH, CLASSES)), alone, atol=1e-5)
    np.testing.assert_allclose(quick(lambda p, x, t: NET.apply(p, x, t))(params, X, T), alone, atol=1e-5)
    mixed = apply(params, X, T, LABELS.at[2].set(CLASSES))
    np.testing.assert_allclose(mixed[2], alone[2], atol=1e-5)
    assert np.all(np.max(np.abs(mixed - alone), axis=(1, 2, 3))[[0, 1, 3]] > 1e-2)


def test_class_embedding_is_a_layer_on_scaled_one_hot_vectors():
    layer = module.MPConv(nnx.Rngs(0), 5, 7, jnp.float32)
    onehot = np.sqrt(5).astype(np.float32) * jnp.eye(5)
    np.testing.assert_allclose(layer.rows(jnp.arange(5)), layer(onehot), rtol=1e-5)


def test_dropout_depends_on_the_key(apply, params):
    noisy = quick(make(dropout=0.3).apply)
    one, same, two = (noisy(params, X, T, LABELS, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.max(np.abs(one - two)) > 1e-2
    assert np.max(np.abs(one - apply(params, X, T, LABELS))) > 1e-2
    np.testing.assert_array_equal(one[..., 2], two[..., 2])  # the uncertainty knows of no dropout


def test_uncertainty_is_one_number_an_example_and_knows_the_noise_level_only(apply, params):
    out = apply(params, X, T, LABELS)
    assert (out.shape, out.dtype) == ((BATCH, 8, 8, 3), jnp.float32)
    u = out[..., 2]
    assert np.ptp(u, axis=(1, 2)).max() == 0
    np.testing.assert_array_equal(u, apply(params, 2 * X, T, LABELS[::-1])[..., 2])
    later = apply(params, X, T.at[1].add(0.3), LABELS)[..., 2]
    assert list(np.abs(later - u)[:, 0, 0] > 1e-3) == [False, True, False, False]
    np.testing.assert_array_equal(
        quick(make(uncertainty=False).apply)({k: v for k, v in params.items() if "logvar" not in k}, X, T, LABELS),
        apply(params, X, T, LABELS)[..., :2],
    )


def test_sampling_does_not_compute_the_uncertainty(params):
    """The program of one evaluation has as many cosines as features of the noise level need: none for u(t)."""

    def cosines(uncertainty, field):
        net = make(uncertainty=uncertainty)
        tree = params if uncertainty else {k: v for k, v in params.items() if "logvar" not in k}

        def evaluate(p, x, t):
            denoise = dj.edm_precondition(functools.partial(net.apply, p), dj.edm(), 0.5, uncertainty)
            return getattr(denoise(x, t, LABELS), field)

        return quick(evaluate).lower(tree, X, jnp.exp(4 * T)).compile().as_text().count(" cosine(")

    assert cosines(True, "x0") == cosines(False, "x0") == 1
    assert cosines(True, "uncertainty") == 1  # and the other way round


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (31, 32, 3)}, "divisible by"),
        ({"shape": (32, 3)}, "height, width, channels"),
        ({"attention": (7,)}, "attention at 7 never happens"),
        ({"channels": 96, "multipliers": (1, 1)}, "96 channels attend"),
        ({"channels": 0}, "at least one"),
        ({"blocks": 0}, "at least one"),
        ({"multipliers": (), "attention": ()}, "at least one"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        edm2(**{"shape": (32, 32, 3), "channels": 64, "multipliers": (1, 2), "attention": (16,), **arguments})


@pytest.mark.parametrize(("preset", "sizes"), [(edm2_imagenet64, "S, M, L, XL"), (edm2_imagenet512, "XS, S, M, L")])
def test_unknown_size(preset, sizes):
    with pytest.raises(InputError, match=f"unknown size 'XM'.*: one of {sizes}"):
        preset("XM")


def test_inputs_that_do_not_fit():
    two = make(multipliers=(1, 2))
    params = jax.eval_shape(two.init, jax.random.key(0))
    x, t = jnp.zeros((2, *SHAPE)), jnp.zeros(2)
    for arguments, message in [
        ((x[..., :1], t), "x must be"),
        ((x[:, :7], t), "divisible by 2"),
        ((x, t[0]), "t must be"),
        ((x, t, jnp.zeros(2)), "labels must be int"),
        ((x, t, jnp.zeros(3, jnp.int32)), "labels must be int"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(two.apply, params, *arguments)
    bare = make(classes=None)
    with pytest.raises(ValueError, match="without classes"):
        jax.eval_shape(bare.apply, jax.eval_shape(bare.init, jax.random.key(0)), x, t, jnp.zeros(2, jnp.int32))
