"""Where arrays lie: meshes of any factorisation and the shardings on them, as tables; what they compute is in long/."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from diffusion_jax.nets.dit import TENSOR_PARALLEL, dit
from diffusion_jax.training import optimizers
from diffusion_jax.training.mesh import make_mesh, on_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.state import dotted, init_state
from diffusion_jax.typing import InputError

P = PartitionSpec
NET = dit((1, 64, 4), 2, (8, 8, 3), classes=10, learned_variance=False)


def mesh(data, model=1):
    return AbstractMesh((data, model), ("data", "model"))


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def specs(tree):
    """Of every leaf, by its path within the parameters."""
    return {dotted(path): s.spec for path, s in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def shapes():
    """The state of a small transformer under an optimizer of many parts."""
    optimizer = optimizers.clip(optimizers.muon(0.1, fused={r"qkv\.kernel$": 3}), 1.0)
    return jax.eval_shape(lambda: init_state(jax.random.key(0), NET, optimizer, averages=2))


# Meshes --------------------------------------------------------------------------------------------------------------


class Fake(SimpleNamespace):
    """A device of which there is only the description."""

    __hash__ = object.__hash__


def fakes(n, slices=1, platform="gpu"):
    return [
        Fake(
            id=i, process_index=i // 4, slice_index=i * slices // n, platform=platform, device_kind="some", coords=None
        )
        for i in range(n)
    ]


def test_a_mesh_of_one_device():
    assert dict(make_mesh(1).shape) == {"data": 1, "model": 1}
    assert make_mesh(jax.devices()[:1]) == make_mesh(1, batch=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 99}, r"devices=99: this machine has \d+ \(cpu\)"),
        ({"devices": 0}, "devices=0"),
        ({"devices": fakes(8), "tensor": 3}, "tensor=3 does not divide the 8 devices"),
        ({"devices": fakes(8), "tensor": 0}, "tensor=0 does not divide"),
        ({"devices": fakes(8), "tensor": 16}, "tensor=16 does not divide"),
        ({"devices": fakes(8), "batch": 12}, "a batch of 12 cannot be split evenly over 8 devices"),
        ({"devices": fakes(8), "tensor": 2, "batch": 6}, "a batch of 6 cannot be split evenly over 4 devices"),
        ({"devices": fakes(8, 4), "tensor": 8}, "tensor=8: each of the 4 slices needs whole groups of 8"),
    ],
)
def test_meshes_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**arguments)


def test_a_batch_needs_to_divide_over_data_alone():
    assert dict(make_mesh(fakes(8), tensor=4, batch=6).shape) == {"data": 2, "model": 4}


def test_slices_are_joined_along_data():
    """The devices that share the work of a layer are of one slice, whose network is the fast one."""
    grid = make_mesh(fakes(16, slices=2), tensor=4).devices
    assert sorted(d.id for d in grid.flat) == list(range(16))
    assert all(len({d.slice_index for d in row}) == 1 for row in grid)
    assert [row[0].slice_index for row in grid] == [0, 0, 1, 1]


# Shardings -----------------------------------------------------------------------------------------------------------


def test_full_sharding_takes_the_largest_axis_that_divides():
    tree = {
        "kernel": struct(3, 3, 64, 128),
        "odd": struct(64, 129),
        "even": struct(64, 64),
        "small": struct(64),
        "never": struct(33, 35),
    }
    got = specs(state_shardings(mesh(8), tree, split=True))
    assert got == {
        "kernel": P(None, None, None, "data"),
        "odd": P("data"),
        "even": P("data"),
        "small": P(),
        "never": P(),
    }
    assert set(specs(state_shardings(mesh(8), tree)).values()) == {P()}


def test_rules_split_over_model_and_full_sharding_takes_another_axis(shapes):
    plain = specs(state_shardings(mesh(2, 4), shapes, False, TENSOR_PARALLEL).params)
    both = specs(state_shardings(mesh(2, 4), shapes, True, TENSOR_PARALLEL).params)
    block = "blocks.0."
    assert plain[block + "attn.qkv.kernel"] == P(None, None, "model")
    assert both[block + "attn.qkv.kernel"] == P("data", None, "model")
    assert plain[block + "attn.qkv.bias"] == both[block + "attn.qkv.bias"] == P(None, "model")
    assert plain[block + "mlp.fc1.kernel"] == P(None, "model")
    assert both[block + "mlp.fc2.kernel"] == P("model", "data")
    assert plain[block + "adaLN_modulation.1.kernel"] == P()
    assert both[block + "adaLN_modulation.1.kernel"] == P(None, "data")
    assert plain["x_embedder.proj.kernel"] == both["x_embedder.proj.bias"] == P()


def test_averages_and_moments_lie_as_their_parameters(shapes):
    shardings = state_shardings(mesh(2, 4), shapes, True, TENSOR_PARALLEL)
    params = specs(shardings.params)
    for average in shardings.averages:
        assert specs(average) == params
    moments = [
        (dotted(path), s.spec)
        for path, s in jax.tree_util.tree_flatten_with_path(shardings.opt_state)[0]
        if dotted(path) in params
    ]
    # Muon holds one moment of each matrix, Adam two of all others.
    kernels = sum(optimizers.matrices(name, leaf) for name, leaf in _named(shapes.params))
    assert len(moments) == kernels + 2 * (len(params) - kernels)
    assert all(spec == params[name] for name, spec in moments)
    assert shardings.step.spec == shardings.key.spec == P()


def _named(tree):
    return [(dotted(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "adafactor", "projected"])
def test_no_optimizer_keeps_a_large_array_whole(optimizer):
    made = {
        "adamw": optimizers.adamw(0.1, weight_decay=0.1),
        "schedule_free": optimizers.schedule_free_adamw(0.1),
        "adafactor": optax.adafactor(0.1),
        "projected": optimizers.projected(optimizers.adamw(0.1), lambda params: params),
    }[optimizer]
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), NET, made))
    shardings = state_shardings(mesh(8), shapes, split=True)
    for (path, s), leaf in zip(_named(shardings), jax.tree.leaves(shapes), strict=True):
        assert (s.spec != P()) == (leaf.size >= 1024), path


def test_state_of_another_shape_than_its_parameter_is_not_split_by_its_rule():
    """Adafactor's rows and columns have the paths of parameters, but not their axes."""
    shapes = jax.eval_shape(lambda: init_state(jax.random.key(0), NET, optax.adafactor(0.1, min_dim_size_to_factor=8)))
    shardings = state_shardings(mesh(2, 4), shapes, False, TENSOR_PARALLEL)
    known = dict(_named(shapes.params))
    pairs = zip(_named(shardings.opt_state), jax.tree.leaves(shapes.opt_state), strict=True)
    others = [s.spec for (path, s), leaf in pairs if path in known and known[path].shape != leaf.shape]
    assert len(others) > 10
    assert set(others) == {P()}


def test_rules_do_nothing_on_a_mesh_without_a_model_axis(shapes):
    with_rules = state_shardings(mesh(8), shapes, True, TENSOR_PARALLEL)
    assert with_rules == state_shardings(mesh(8), shapes, True)


@pytest.mark.parametrize(
    ("model", "partition", "message"),
    [
        (8, TENSOR_PARALLEL, r"tensor=8 does not divide axis 1 of blocks.0.attn.qkv.bias, whose shape is \(3, 4, 16\)"),
        (
            3,
            {r"fc1\.kernel": 1},
            r"tensor=3 does not divide axis 1 of blocks.0.mlp.fc1.kernel, whose shape is \(64, 256",
        ),
        (
            2,
            {r"fc1\.kernel": 2},
            r"tensor=2: the rule for blocks.0.mlp.fc1.kernel splits axis 2, which .* \(64, 256\) lacks",
        ),
        (2, {}, "tensor=2: no parameter of this network can be split"),
        (2, {"unet": 0}, "tensor=2: no parameter of this network can be split"),
    ],
)
def test_rules_that_do_not_fit_are_refused_by_name(shapes, model, partition, message):
    with pytest.raises(InputError, match=message):
        state_shardings(mesh(2, model), shapes, False, partition)


def test_an_axis_may_be_counted_from_the_end(shapes):
    a, b = (state_shardings(mesh(2, 4), shapes, False, {r"fc1\.kernel$": axis}) for axis in (-1, 1))
    assert a == b


def test_batches_are_split_along_data_and_scalars_are_everywhere():
    assert split_axis(mesh(2, 4)).spec == P("data")
    assert split_axis(mesh(2, 4), 1).spec == P(None, "data")
    assert replicated(mesh(2, 4)).spec == P()
    one = jax.device_put(np.arange(4.0), split_axis(make_mesh(1)))
    np.testing.assert_array_equal(one, np.arange(4.0))


def test_a_program_is_traced_with_its_mesh_in_force():
    mesh, seen = make_mesh(1), []

    def program(x):
        seen.append(jax.sharding.get_abstract_mesh())
        return x

    jax.jit(on_mesh(program, mesh))(1.0)
    assert seen == [mesh.abstract_mesh]
    assert jax.sharding.get_abstract_mesh().empty
