r"""Softmax attention by the kernel that wins for the device and the shape; the same result from each, to rounding.

    o_i = sum_j p_ij v_j,   p_ij = exp(s_ij) / sum_j exp(s_ij),   s_ij = q_i . k_j / sqrt(d)                     (1)

    xla       (1) as two matrix products and a softmax in float32. Any device; the n m scores of a head go to memory.
    chunked   (1) for c queries after the other, c m scores at a time, computed again in the backward pass
              (Rabe & Staats 2021, arXiv:2112.05682): memory linear in n, exact gradients of any order. Any device.
    cudnn     NVIDIA's fused kernel, half precision only; never stores scores.
    splash    JAX's Pallas kernel for TPUs, half precision only; never stores scores.

`choose` is the table. It is asked when a program is traced, for the platform of the mesh that `jax.set_mesh` names or
else of the default device; so a program traced under a TPU's mesh on a machine without one, to compile it ahead of
time, gets the TPU's kernel. A Pallas kernel cannot be split by the compiler: with several devices it is used only
under such a mesh, where `jax.shard_map` gives each device its examples, and its heads along the axis "model".

`cudnn` and `splash` know reverse differentiation alone; programs that need `jax.jvp` ask for `chunked` or `xla`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from diffusion_jax.typing import Array, InputError

Implementation = Literal["auto", "xla", "chunked", "cudnn", "splash"]
"""How to compute (1); "auto" is `choose`."""

SCORES = 2**20
"""How many scores of one head `chunked` holds at a time: 4 MiB, a block of 256 queries at 4,096 keys."""
LONG = 4 * SCORES
"""From how many scores of one head on `chunked` replaces `xla`: 2,048 queries and keys."""
LANES = 128
"""Rows of a TPU's vector registers: blocks of queries and keys are multiples of it."""


class Device(NamedTuple):
    """Where a program will run: "cpu", "tpu", "gpu"; a CUDA device's compute capability, 0 for all others.

    local: one kernel sees whole arrays, or a mesh says how to split them.
    """

    platform: str
    capability: float = 0.0
    local: bool = True


def attention(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, implementation: Implementation = "auto"
) -> Array:
    """Equation (1): `q: [b, n, heads, d]`, `k, v: [b, m, heads, d]` of one type -> `[b, n, heads, d]`.

    mask: bool, broadcasts to `[b, heads, n, m]`; False takes a key out of a query's sums. At least one key of every
    query must be left. Raises ValueError for shapes that do not fit, InputError for an unknown implementation.
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. (1).
    """
    _check(q, k, v, mask)
    if implementation not in get_args(Implementation):
        raise InputError(f"attention: {implementation!r} is none of {', '.join(get_args(Implementation))}")
    if implementation == "auto":
        masked = mask is not None
        implementation = choose(current_device(), q.dtype, q.shape[1], k.shape[1], q.shape[3], masked=masked)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # inside, the code is JAX's own
        if implementation == "chunked":
            return chunked(q, k, v, mask)
        if implementation == "splash":
            return splash(q, k, v, mask)
        fused = "cudnn" if implementation == "cudnn" else "xla"
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=fused)


def choose(device: Device, dtype: Any, n: int, m: int, d: int, *, masked: bool = False) -> Implementation:
    """The implementation for n queries and m keys of d channels a head.

    cuDNN from 256 queries on: on an H100 in bfloat16 it beats XLA's 4 to 7 times at 1,024 to 4,096 tokens and at
    77 keys, and in a transformer's sampling at 256 tokens; shorter sequences are a wash.
    Splash from 1,024 tokens on, where the scores no longer stay in a TPU's fast memory.

    >>> choose(Device("gpu", 9.0), jnp.bfloat16, 1024, 1024, 72)
    'cudnn'
    >>> choose(Device("cpu"), jnp.float32, 4096, 4096, 64)
    'chunked'
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if half and n >= 256 and _cudnn_takes(device.capability, n, m, d, masked):
        return "cudnn"
    if half and min(n, m) >= 1024 and device.platform == "tpu" and device.local and _splash_takes(n, m, masked):
        return "splash"
    return "chunked" if n * m >= LONG else "xla"


def _cudnn_takes(capability: float, n: int, m: int, d: int, masked: bool) -> bool:
    widest = 256 if capability >= 9 else 128
    return capability >= 8 and d % 8 == 0 and d <= widest and not (masked and (n % 2 or m % 2))


def _splash_takes(n: int, m: int, masked: bool) -> bool:
    return n % LANES == 0 and m % LANES == 0 and not masked


def current_device() -> Device:
    """The device of the mesh in force (`jax.set_mesh`), else the default one."""
    mesh = jax.sharding.get_abstract_mesh()
    described = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if described is None else described.platform
    local = not mesh.empty or jax.device_count() == 1
    return Device(platform, _capability() if platform == "gpu" else 0.0, local)


def _capability() -> float:
    """The compute capability of the first GPU; AMD's, named like gfx90a, count as 0."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", "0"))
    except ValueError:
        return 0.0


def chunked(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Equation (1) for `SCORES / m` queries after the other; a block's scores live only while it is computed."""
    n, size = q.shape[1], max(1, SCORES // k.shape[1])
    blocks = -(-n // size)
    size = -(-n // blocks)

    @jax.checkpoint
    def block(rows: tuple[Array, Array | None]) -> Array:
        return jax.nn.dot_product_attention(rows[0], k, v, mask=rows[1], implementation="xla")

    if mask is not None and mask.shape[2] > 1:
        rows = (_blocks(q, 1, blocks, size), _blocks(mask, 2, blocks, size))
        out = jax.lax.map(block, rows)
    else:
        out = jax.lax.map(lambda rows: block((rows, mask)), _blocks(q, 1, blocks, size))
    out = jnp.moveaxis(out, 0, 1)
    return jnp.reshape(out, (q.shape[0], blocks * size, *q.shape[2:]))[:, :n]


def _blocks(z: Array, axis: int, blocks: int, size: int) -> Array:
    """Split an axis into blocks, which come first; the last one is filled up by repeating the end."""
    padding = [(0, blocks * size - z.shape[axis] if i == axis else 0) for i in range(z.ndim)]
    filled = jnp.pad(z, padding, mode="edge")
    return jnp.moveaxis(jnp.reshape(filled, (*z.shape[:axis], blocks, size, *z.shape[axis + 1 :])), axis, 0)


def splash(q: Array, k: Array, v: Array, mask: Array | None = None, *, interpret: bool = False) -> Array:
    """Equation (1) by JAX's kernel for TPUs, on each device of the mesh in force; lengths are multiples of 128.

    interpret: run the kernel's program on any device, slowly. Raises InputError for other lengths and with a mask.
    """
    if not _splash_takes(q.shape[1], k.shape[1], mask is not None):
        raise InputError(f"attention: splash wants lengths that {LANES} divides and no mask, got {q.shape}, {k.shape}")

    def local(q: Array, k: Array, v: Array) -> Array:
        heads_first = (jnp.swapaxes(z, 1, 2) for z in (q * q.shape[-1] ** -0.5, k, v))
        kernel = _splash_kernel(q.shape[1], k.shape[1], q.shape[2], interpret)
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return local(q, k, v)
    spec = _spec(mesh.shape, q.shape)
    return jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _spec(mesh: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Examples over all axes of the mesh but "model", heads over that one, each where it divides."""
    others = tuple(name for name in mesh if name != "model")
    examples = others if shape[0] % math.prod(mesh[name] for name in others) == 0 else None
    heads = "model" if "model" in mesh and shape[2] % mesh["model"] == 0 else None
    return PartitionSpec(examples, None, heads, None)


def _splash_kernel(n: int, m: int, heads: int, interpret: bool) -> Any:
    bq, bk = (next(size for size in (512, 256, LANES) if length % size == 0) for length in (n, m))
    sizes = splash_attention_kernel.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk, block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip
    every = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((n, m))] * heads)
    return splash_attention_kernel.make_splash_mha_single_device(every, block_sizes=sizes, interpret=interpret)


def _check(q: Array, k: Array, v: Array, mask: Array | None) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape != (q.shape[0], k.shape[1], *q.shape[2:]):
        raise ValueError(f"attention: q [b n heads d], k and v [b m heads d]; got {q.shape}, {k.shape}, {v.shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v must have one type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None:
        full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        fits = mask.ndim == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, full, strict=True))
        if mask.dtype != np.bool_ or not fits:
            raise ValueError(f"attention: mask must be bool and broadcast to {full}, got {mask.dtype}{mask.shape}")
