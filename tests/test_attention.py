"""Attention: every implementation equals the definition, gradients too; the choice by device and shape; errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from diffusion_jax.nets import attention as module
from diffusion_jax.nets.attention import Device, attention, choose

B, N, M, H, D = 2, 128, 256, 2, 16
HOPPER, AMPERE, TURING = Device("gpu", 9.0), Device("gpu", 8.0), Device("gpu", 7.5)
TPU, PODS, CPU, AMD = Device("tpu"), Device("tpu", local=False), Device("cpu"), Device("gpu", 0.0)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, n, H, D)), jnp.float32) for n in (N, M, M)]


def definition(q, k, v, mask=None):
    """Equation (1) in NumPy, double precision."""
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    s = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(D)
    p = np.exp(s - s.max(-1, keepdims=True)) * (1 if mask is None else mask)
    return np.einsum("bhnm,bmhd->bnhd", p / p.sum(-1, keepdims=True), v)


def masks():
    """None, one of keys, and one of queries and keys."""
    keys = np.random.default_rng(1).uniform(size=(B, 1, 1, M)) < 0.7
    return {"none": None, "keys": keys, "causal": np.tril(np.ones((1, 1, N, M), bool))}


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
def test_equal_to_the_definition(qkv, mask, monkeypatch):
    """chunked with blocks of 40 queries, which do not divide 128."""
    monkeypatch.setattr(module, "SCORES", 40 * M)
    given = None if mask is None else jnp.asarray(mask)
    for name in ("xla", "chunked"):
        out = quick(functools.partial(attention, implementation=name))(*qkv, mask=given)
        np.testing.assert_allclose(out, definition(*qkv, mask), atol=2e-6)


def test_gradients_of_any_order_and_direction(qkv, monkeypatch):
    monkeypatch.setattr(module, "SCORES", 48 * M)
    tangents = tuple(jnp.cos(3 * z) for z in qkv)

    def all_of(name):
        def loss(*z):
            return jnp.sum(jnp.sin(attention(*z, implementation=name)))

        def derivatives(*z):
            grad = jax.grad(loss, (0, 1, 2))
            return grad(*z), jax.jvp(loss, z, tangents)[1], jax.jvp(grad, z, tangents)[1]

        return quick(derivatives)(*qkv)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=1e-4), all_of("xla"), all_of("chunked"))


def test_memory_of_chunked_is_linear():
    """At 4,096 tokens a head's scores alone are 64 MiB; forward and backward together stay below."""
    q = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.float32)
    step = quick(jax.grad(lambda z: jnp.sum(attention(z, z, z) ** 2)))
    whole = quick(jax.grad(lambda z: jnp.sum(attention(z, z, z, implementation="xla") ** 2)))
    used, without = (f.lower(q).compile().memory_analysis().temp_size_in_bytes / 2**20 for f in (step, whole))
    assert used < 32 < 128 < without


def test_splash_equals_the_definition(qkv):
    """The kernel's own program, interpreted: forward and backward."""

    def loss(f, *z):
        out = f(*z)
        return jnp.sum(jnp.sin(out)), out

    both = [
        quick(jax.grad(functools.partial(loss, f), (0, 1, 2), has_aux=True))(*(z[:1, :, :1] for z in qkv))
        for f in (functools.partial(module.splash, interpret=True), functools.partial(attention, implementation="xla"))
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *both)


@pytest.mark.parametrize(
    ("expected", "device", "dtype", "n", "m", "d", "masked"),
    [
        ("cudnn", HOPPER, "bfloat16", 256, 256, 72, False),
        ("cudnn", HOPPER, "float16", 4096, 77, 160, False),
        ("cudnn", HOPPER, "bfloat16", 1024, 78, 64, True),
        ("xla", HOPPER, "bfloat16", 1024, 77, 64, True),  # cuDNN wants even lengths beside a mask
        ("xla", HOPPER, "bfloat16", 64, 64, 64, False),  # short
        ("xla", HOPPER, "bfloat16", 256, 256, 36, False),  # 8 does not divide d
        ("chunked", HOPPER, "float32", 4096, 4096, 64, False),
        ("cudnn", AMPERE, "bfloat16", 1024, 1024, 128, False),
        ("xla", AMPERE, "bfloat16", 1024, 1024, 136, False),  # d too wide before Hopper
        ("chunked", TURING, "float16", 4096, 4096, 64, False),
        ("chunked", AMD, "bfloat16", 4096, 4096, 64, False),
        ("splash", TPU, "bfloat16", 1024, 1024, 72, False),
        ("splash", TPU, "bfloat16", 4096, 4096, 64, False),
        ("xla", TPU, "bfloat16", 256, 256, 72, False),
        ("xla", TPU, "bfloat16", 4096, 77, 64, False),
        ("xla", TPU, "bfloat16", 1100, 1100, 64, False),  # 128 does not divide the lengths
        ("chunked", TPU, "bfloat16", 4096, 4096, 64, True),
        ("chunked", TPU, "float32", 4096, 4096, 64, False),
        ("chunked", PODS, "bfloat16", 4096, 4096, 64, False),  # several devices and no mesh to split by
        ("xla", CPU, "bfloat16", 1024, 1024, 64, False),
        ("chunked", CPU, "float32", 4096, 4096, 64, False),
    ],
)
def test_choice(expected, device, dtype, n, m, d, masked):
    assert choose(device, jnp.dtype(dtype), n, m, d, masked=masked) == expected


def test_the_choice_is_what_runs(monkeypatch):
    seen = []

    def record(q, k, v, *, mask, implementation):
        seen.append(implementation)
        return q

    monkeypatch.setattr(module, "current_device", lambda: HOPPER)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    for dtype in (jnp.bfloat16, jnp.float32):
        z = jax.ShapeDtypeStruct((2, 256, 4, 64), dtype)
        jax.eval_shape(attention, z, z, z)
    assert seen == ["cudnn", "xla"]


@pytest.mark.parametrize("sizes", [(4, 2), (1, 1)])
def test_a_mesh_of_tpus_gets_the_kernel_on_any_machine(sizes):
    """Traced under the mesh, on this machine: each device has its examples and heads, whatever the count."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    z = jax.ShapeDtypeStruct((8, 1024, 4, 72), jnp.bfloat16)
    assert "pallas_call" not in str(jax.make_jaxpr(attention)(z, z, z))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(attention)(z, z, z))
    assert "pallas_call" in text and "shard_map" in text
    assert f"bf16[{8 // sizes[0]},{4 // sizes[1]},1024,72]" in text.replace(" ", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (B, M, H, D + 1)}, "q .b n heads d."),
        ({"v": (B, M + 1, H, D)}, "q .b n heads d."),
        ({"q": (B, N, H * D)}, "q .b n heads d."),
        ({"mask": (B, M)}, "mask must be bool"),
        ({"mask": (B, 1, N, M + 1)}, "mask must be bool"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    shapes = {"q": (B, N, H, D), "k": (B, M, H, D), "v": (B, M, H, D), **change}
    z = {name: jnp.zeros(shape, bool if name == "mask" else jnp.float32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q, k, v, mask=None: attention(q, k, v, mask=mask), **z)


def test_other_errors(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match="one type"):
        attention(q.astype(jnp.bfloat16), k, v)
    with pytest.raises(ValueError, match="mask must be bool"):
        attention(q, k, v, mask=jnp.zeros((B, 1, 1, M)))
    with pytest.raises(ValueError, match="none of auto, xla"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="splash wants lengths"):
        attention(q[:, :100], k, v, implementation="splash")
