"""The training step, the averages, digests, checkpoints and drawing: laws, on networks that compile in seconds."""

import gc
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from diffusion_jax.training import checkpoint, ema
from diffusion_jax.training.data import batch_indices, gather
from diffusion_jax.training.generate import example_keys, make_draw, make_pictures
from diffusion_jax.training.mesh import make_mesh
from diffusion_jax.training.state import TrainState, digest, init_state, parameter_count
from diffusion_jax.training.step import make_dispatch, make_loss_fn, make_train_step
from diffusion_jax.typing import InputError, Net

# Orbax leaves complaining coroutines behind when a read fails: they are collected here, so that they do not complain
# in another test. What a user sees of them is in test_cli.py.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def small():
    return toy.experiment(width=16, dropout=0.1, batch=8)


@pytest.fixture(scope="module")
def resident(small):
    return jax.device_put(dict(small.data().train))


def loss_of(experiment, **options):
    options = {"null": experiment.null, "drop": experiment.drop, "flip": experiment.flip} | options
    return make_loss_fn(experiment.net, experiment.read, experiment.objective, **options)


def fresh(experiment):
    return started(experiment.net, experiment.optimizer)


@cache
def started(net, optimizer):
    return jax.jit(lambda: init_state(jax.random.key(0), net, optimizer))()


@pytest.fixture(scope="module")
def dispatch(small):
    return jax.jit(make_dispatch(make_train_step(loss_of(small), small.optimizer, small.ema)))


def linear_state(optimizer, width=4):
    params = {"w": jnp.arange(1.0, width + 1)}
    return TrainState(
        jnp.zeros((), jnp.int32), params, (jax.tree.map(jnp.copy, params),), optimizer.init(params), jax.random.key(0)
    )


def square_loss(params, batch, key):
    return jnp.mean((batch["image"] @ params["w"] - batch["label"]) ** 2)


def same(a, b):
    """Equal to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loss_falls_and_only_what_should_change_changes(small, resident):
    adam = toy.lenient(optax.adam(1e-2))
    step = jax.jit(make_train_step(loss_of(small), adam, small.ema))
    state = started(small.net, adam)
    losses = []
    for i in range(150):
        state, metrics = step(state, gather(resident, jnp.asarray(batch_indices(0, i, 1000, 32))))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:5])
    assert int(state.step) == 150
    same(state.key, jax.random.fold_in(jax.random.key(0), 1))
    assert jax.tree.structure(state.params) == jax.tree.structure(state.ema)


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_parts_equal_the_whole_batch(parts):
    rng = np.random.default_rng(0)
    batch = {"image": jnp.asarray(rng.normal(size=(12, 4)), jnp.float32), "label": jnp.ones((12,))}
    states = []
    for n in (1, parts):
        step = jax.jit(make_train_step(square_loss, optax.sgd(0.1), ema.constant(0.5), accumulate=n))
        states.append(step(linear_state(optax.sgd(0.1)), batch))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), states[0][0].params, states[1][0].params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), states[0][1], states[1][1])


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    step = make_train_step(square_loss, optax.sgd(0.1), ema.constant(), accumulate=5)
    with pytest.raises(ValueError, match="12 does not divide into 5"):
        step(linear_state(optax.sgd(0.1)), {"image": jnp.ones((12, 4)), "label": jnp.ones((12,))})


def test_clipping_limits_the_update_and_the_reported_norm_is_before_it():
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    state = linear_state(optimizer)
    batch = {"image": 100 * jnp.ones((2, 4)), "label": jnp.zeros((2,))}
    new, metrics = make_train_step(square_loss, optimizer, ema.constant())(state, batch)
    assert float(optax.global_norm(optax.tree.sub(new.params, state.params))) == pytest.approx(0.5, rel=1e-5)
    expected = np.linalg.norm(2 * 1000 * np.full(4, 100.0))
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_step_is_a_function_of_state_and_batch(small, resident, dispatch):
    batch = {"index": jnp.arange(8)[None]}
    first, again = (dispatch(fresh(small), resident, batch, np.int32(1)) for _ in range(2))
    same(first, again)
    other = dispatch(fresh(small)._replace(step=jnp.int32(1)), resident, batch, np.int32(1))
    assert float(other[1]["loss"][0]) != float(first[1]["loss"][0])  # another step draws other noise


def test_bfloat16_network_keeps_float32_state_and_loss(resident):
    net = toy.picture_net(width=16, dtype=jnp.bfloat16)
    experiment = toy.experiment(width=16)
    loss_fn = make_loss_fn(net, experiment.read, experiment.objective, null=10, drop=0.1)
    state = jax.eval_shape(lambda: init_state(jax.random.key(0), net, experiment.optimizer))
    batch = jax.eval_shape(lambda: gather(resident, jnp.arange(8)))
    new, metrics = jax.eval_shape(make_train_step(loss_fn, experiment.optimizer, experiment.ema), state, batch)
    for tree in (state, new):
        for leaf in jax.tree.leaves((tree.params, tree.ema, tree.opt_state)):
            assert leaf.dtype in (jnp.float32, jnp.int32)
    assert {m.dtype for m in metrics.values()} == {jnp.dtype(jnp.float32)}
    text = str(jax.make_jaxpr(loss_fn)(state.params, batch, jax.random.key(0)))
    assert "bf16" in text  # the network itself does compute in bfloat16


# Several steps a dispatch --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 5])
def test_k_steps_a_dispatch_equal_single_ones_bit_for_bit(small, resident, dispatch, k):
    index = jnp.asarray(batch_indices(0, 0, 1000, 8 * 7).reshape(7, 8))
    one, losses = fresh(small), []
    for i in range(7):
        one, metrics = dispatch(one, resident, {"index": index[i : i + 1]}, np.int32(1))
        losses.append(metrics["loss"][0])
    many, seen, start = fresh(small), [], 0
    while start < 7:
        n = min(k, 7 - start)
        rows = index[jnp.minimum(start + jnp.arange(k), 6)]
        many, metrics = dispatch(many, resident, {"index": rows}, np.int32(n))
        assert metrics["loss"].shape == (k,)
        assert bool(jnp.all(jnp.isnan(metrics["loss"][n:])))
        seen += list(metrics["loss"][:n])
        start += n
    same(jnp.stack(losses), jnp.stack(seen))
    same(one, many)


@pytest.mark.slow
def test_batches_from_the_host_equal_batches_on_the_device(small, resident, dispatch):
    index = jnp.arange(8)[None]
    given = jax.vmap(partial(gather, resident))(index)
    there = dispatch(fresh(small), resident, {"index": index}, np.int32(1))
    here = dispatch(fresh(small), None, given, np.int32(1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), there[0].params, here[0].params)
    np.testing.assert_allclose(there[1]["loss"], here[1]["loss"], rtol=1e-5)


# The loss ------------------------------------------------------------------------------------------------------------


def test_labels_are_dropped_and_pictures_mirrored_as_often_as_asked():
    seen = {}

    def objective(key, denoiser, x0, cond):
        denoiser(x0, jnp.ones(x0.shape[:1]), cond)
        return jnp.zeros(x0.shape[:1])

    def apply(params, x, t, cond=None, *, key=None):
        seen.update(x=x, cond=cond, key=key)
        return x

    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30, (4000, 8, 1))[..., None]
    batch = {"image": jnp.asarray(ramp), "label": jnp.arange(4000, dtype=jnp.int32) % 10}

    def run(**options):
        make_loss_fn(Net(lambda key: {}, apply), lambda net: net, objective, **options)({}, batch, jax.random.key(3))
        return dict(seen)

    noisy = run(null=10, drop=0.25, flip=True)
    dropped, mirrored = np.mean(noisy["cond"] == 10), np.mean(noisy["x"][:, 0, 0, 0] > 0)
    assert abs(dropped - 0.25) < 0.03
    assert abs(mirrored - 0.5) < 0.04
    kept = noisy["cond"] != 10
    np.testing.assert_array_equal(noisy["cond"][kept], batch["label"][kept])
    gone, turned = np.asarray(noisy["cond"] == 10, float), np.asarray(noisy["x"][:, 0, 0, 0] > 0, float)
    assert abs(np.corrcoef(gone, turned)[0, 1]) < 0.06  # two draws, not one
    assert noisy["key"] is not None
    plain = run(null=10, drop=0.25, flip=True, train=False)
    np.testing.assert_array_equal(plain["cond"], batch["label"])
    assert np.all(plain["x"][:, 0, 0, 0] < 0)
    assert plain["key"] is None
    assert run(null=None)["cond"] is None


def seen_conditions(batch, **options):
    """The condition that the network gets from a batch of `options` of make_loss_fn."""
    seen = []
    net = Net(lambda key: {}, lambda params, x, t, cond=None, *, key=None: seen.append(cond) or x)

    def objective(key, denoiser, x0, cond):
        denoiser(x0, jnp.ones(x0.shape[:1]), cond)
        return jnp.zeros(x0.shape[:1])

    batch = {"image": jnp.zeros((1000, 2, 2, 1), jnp.uint8), **batch}
    make_loss_fn(net, lambda net: net, objective, **options)({}, batch, jax.random.key(3))
    return seen[0]


@pytest.mark.slow
def test_conditions_are_trees_that_are_dropped_as_a_whole():
    tokens, vector = jax.random.normal(jax.random.key(0), (1000, 5, 3)), jnp.ones((1000, 4))
    cond = {"tokens": tokens, "vector": (vector, jnp.arange(1000, dtype=jnp.int32))}
    null = {"tokens": jnp.zeros((5, 3)), "vector": (jnp.full((4,), 7.0), -1)}
    batch = {"cond": cond, "label": jnp.zeros((1000,), jnp.int32)}
    got = seen_conditions(batch, null=null, drop=0.25)
    gone = np.asarray(got["vector"][1] == -1)
    assert abs(gone.mean() - 0.25) < 0.05
    for c, was, none in zip(*map(jax.tree.leaves, (got, cond, null)), strict=True):
        np.testing.assert_array_equal(c[gone], np.broadcast_to(none, c[gone].shape))
        np.testing.assert_array_equal(c[~gone], was[~gone])
        assert c.dtype == was.dtype
    for options in ({"null": None}, {"null": null, "drop": 0.25, "train": False}, {"null": null}):
        jax.tree.map(np.testing.assert_array_equal, seen_conditions(batch, **options), cond)
    assert seen_conditions({"label": batch["label"]}, null=None) is None
    with pytest.raises(ValueError, match="the condition is .*, null is"):
        seen_conditions(batch, null=10, drop=0.25)


# Digests -------------------------------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "int16", "bool")


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(DTYPES), place=st.integers(0, 36), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_the_digest(dtype, place, bit):
    dtype = jnp.dtype(dtype)
    raw = np.random.default_rng(1).integers(0, 2 if dtype.kind == "b" else 256, 37 * dtype.itemsize, np.uint8)
    changed = raw.copy()
    bit = 0 if dtype.kind == "b" else bit % (8 * dtype.itemsize)
    changed[place * dtype.itemsize + bit // 8] ^= 1 << bit % 8
    before, after = (digest({"a": jnp.asarray(x.view(dtype)), "b": jnp.ones(3)}) for x in (raw, changed))
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_the_digest_sees_order_and_keys():
    a = jnp.arange(64, dtype=jnp.float32)
    assert digest([a])[0] != digest([a[::-1]])[0]
    assert digest([jax.random.key(0)])[0] != digest([jax.random.key(1)])[0]
    assert digest([jnp.zeros((0,))]).shape == (1,)


# Checkpoints ---------------------------------------------------------------------------------------------------------

TINY = Net(lambda key: {"a": {"w": jax.random.normal(key, (32, 32))}, "b": jnp.zeros((32,))}, lambda *a, **k: a[1])
ADAM = optax.adam(1e-3)


def tiny_state(step, net=TINY):
    state = init_state(jax.random.key(step), net, ADAM)
    return state._replace(step=jnp.int32(step))


def like_of(state, sharding=None):
    where = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), jax.eval_shape(lambda: state))


def save_all(folder, steps, keep=2, metric=lambda step: -step):
    manager = checkpoint.open_checkpoints(folder, pytest.fail, keep)
    for step in steps:
        checkpoint.save(manager, tiny_state(step), {"step": step}, {"arguments": {}}, float(metric(step)))
    checkpoint.wait(manager)
    kept = sorted(manager.all_steps())
    manager.close()
    return kept


def restore_from(folder, like, **options):
    said = []
    manager = checkpoint.open_checkpoints(folder, said.append)
    try:
        return checkpoint.restore(manager, like, said.append, **options), said
    finally:
        manager.close()
        if said:
            gc.collect()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    assert save_all(folder, [1, 2]) == [1, 2]
    return folder


def test_a_checkpoint_is_restored_to_the_bit(two_checkpoints):
    (state, meta), said = restore_from(two_checkpoints, like_of(tiny_state(0)))
    same(state, tiny_state(2))
    assert meta["position"] == {"step": 2}
    assert said == []
    (first, _), _ = restore_from(two_checkpoints, like_of(tiny_state(0)), step=1)
    same(first, tiny_state(1))


def test_an_empty_folder_holds_nothing(tmp_path):
    assert restore_from(tmp_path, like_of(tiny_state(0))) == (None, [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    kept = save_all(tmp_path / "c", [1, 2, 3, 4, 5, 6], keep=2, metric=lambda step: abs(step - 3))
    assert set(kept) == {3, 5, 6}
    assert checkpoint.metrics(tmp_path / "c") == {3: 0.0, 5: 2.0, 6: 3.0}


def test_another_architecture_is_named_by_its_first_parameter(two_checkpoints):
    wider = Net(lambda key: {"a": {"w": jnp.zeros((32, 48))}, "b": jnp.zeros((32,))}, TINY.apply)
    with pytest.raises(InputError, match=r"first difference is params\.a\.w, \[32, 32\] there and \[32, 48\] here"):
        restore_from(two_checkpoints, like_of(tiny_state(0, wider)))
    more = Net(lambda key: {**TINY.init(key), "c": jnp.zeros(3)}, TINY.apply)
    with pytest.raises(InputError, match=r"params\.c, absent there and \[3\] here"):
        restore_from(two_checkpoints, like_of(tiny_state(0, more)))
    assert sorted(p.name for p in two_checkpoints.iterdir()) == ["1", "2"]


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "truncated":
        path.write_bytes(content[:middle])
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_every_damaged_file_is_harmless_or_noticed(two_checkpoints, tmp_path, how):
    """Each file of the newest checkpoint in turn: the same state to the bit, or the one before and a message."""
    files = sorted(p.relative_to(two_checkpoints) for p in (two_checkpoints / "2").rglob("*") if p.is_file())
    noticed = []
    for file in files:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(two_checkpoints, folder)
        damage(folder / file, how)
        (state, _), said = restore_from(folder, like_of(tiny_state(0)))
        step = int(state.step)
        same(state, tiny_state(step))
        assert (step == 1) == bool(said), file
        if said:
            noticed.append(str(file))
            assert len(said) == 1
            assert "checkpoint 2" in said[0]
            assert "\n" not in said[0]
            assert sorted(p.name for p in folder.iterdir()) == ["1", "unreadable-2"]
    assert any("/d/" in file for file in noticed), "no data file was noticed"
    assert any("meta/metadata" in file for file in noticed)


@pytest.mark.slow
def test_when_nothing_can_be_read_nothing_is_touched(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    for meta in (tmp_path / "c").glob("*/meta/metadata"):
        damage(meta, "truncated")
    for _ in range(2):  # it does not start again from nothing the second time
        with pytest.raises(InputError, match="no checkpoint in .* can be read"):
            restore_from(tmp_path / "c", like_of(tiny_state(0)))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["1", "2"]


def test_saving_over_a_checkpoint_that_was_set_aside(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    damage(tmp_path / "c" / "2" / "meta" / "metadata", "flipped")
    said = []
    manager = checkpoint.open_checkpoints(tmp_path / "c", said.append)
    checkpoint.restore(manager, like_of(tiny_state(0)), said.append)
    checkpoint.save(manager, tiny_state(2), {"step": 2}, {}, 0.0)
    checkpoint.wait(manager)
    manager.close()
    (state, _), _ = restore_from(tmp_path / "c", like_of(tiny_state(0)))
    same(state, tiny_state(2))


def test_reading_only_changes_nothing(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "c")
    damage(tmp_path / "c" / "2" / "state" / "manifest.ocdbt", "truncated")
    before = sorted(str(p) for p in (tmp_path / "c").rglob("*"))
    manager = checkpoint.open_read_only(tmp_path / "c")
    state, _ = checkpoint.restore(manager, like_of(tiny_state(0)), lambda _: None, read_only=True)
    manager.close()
    gc.collect()
    assert int(state.step) == 1
    assert sorted(str(p) for p in (tmp_path / "c").rglob("*")) == before


def test_a_writing_error_is_an_os_error(tmp_path, monkeypatch):
    manager = checkpoint.open_checkpoints(tmp_path / "c", pytest.fail)
    monkeypatch.setattr(manager, "save", lambda *a, **k: (_ for _ in ()).throw(ValueError("disk\nfull")))
    with pytest.raises(OSError, match="a checkpoint could not be written in .*: disk$"):
        checkpoint.save(manager, tiny_state(1), {}, {}, 0.0)
    manager.close()


# Devices, drawing ----------------------------------------------------------------------------------------------------


def test_parameters_are_counted_without_computing(small):
    params = small.net.init(jax.random.key(0))
    assert parameter_count(small.net) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def drawn(small):
    draw = make_draw(small)
    params = jax.tree.map(lambda p: p + 0.05, fresh(small).ema)
    return draw, params


@pytest.mark.slow
def test_a_picture_does_not_depend_on_how_many_are_drawn(drawn):
    draw, params = drawn
    pictures = make_pictures(draw, make_mesh(1), 4)
    labels = np.arange(11) % 10
    all_of_them = np.concatenate(list(pictures(params, 11, 5, labels)))
    assert all_of_them.shape == (11, 8, 8, 1)
    assert all_of_them.dtype == np.uint8
    for n in (1, 4, 7):
        np.testing.assert_array_equal(np.concatenate(list(pictures(params, n, 5, labels[:n]))), all_of_them[:n])
    assert not np.array_equal(np.concatenate(list(pictures(params, 4, 6, labels[:4]))), all_of_them[:4])


@pytest.mark.slow
def test_a_picture_hardly_depends_on_the_shape_it_is_compiled_for(drawn):
    draw, params = drawn
    labels = jnp.arange(12, dtype=jnp.int32) % 10
    whole = jax.jit(draw)(params, example_keys(5, 0, 12), labels)
    for start, n in ((0, 1), (3, 5)):
        part = jax.jit(draw)(params, example_keys(5, start, n), labels[start : start + n])
        np.testing.assert_allclose(part, whole[start : start + n], atol=2e-5)


def test_drawing_compiles_once(drawn):
    draw, params = drawn
    traced = []

    def counted(*arguments):
        traced.append(1)
        return draw(*arguments)

    pictures = make_pictures(counted, make_mesh(1), 4)
    for n in (9, 3, 1):
        list(pictures(params, n, 0, np.zeros(n, np.int32)))
    assert len(traced) == 1


def test_impossible_sampling_steps_are_bad_input(small):
    with pytest.raises(InputError, match="0 sampling steps are not possible"):
        make_draw(small, steps=0)
