r"""What a chip can do, and what a step asks of it.

A roofline: work of F operations on B bytes of main memory takes at least

    t = max(F / peak, B / bandwidth)                                                                               (1)

Model FLOPs are those of matrix products and convolutions that the mathematics asks for, counted in the program as it
was traced, before any compiler: 2 m k n for an [m, k] [k, n] product, 2 times outputs times taps times input channels
for a convolution, padding included. The backward pass asks for two products where the forward pass asks for one, so

    model FLOPs of a training step = 3 F(loss of the batch)                                                        (2)
    utilisation (MFU) = model FLOPs a second / (devices times peak)                                                (3)

Recomputation (remat) is not model FLOPs. Source of (2), (3): Chowdhery et al. 2022, arXiv:2204.02311, appendix B;
of (1): Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment, loss_fn
from diffusion_jax.training.step import LossFn
from diffusion_jax.typing import InputError


class Chip(NamedTuple):
    """Peaks of one device; bytes and seconds, nothing measured.

    flops: bfloat16 operations a second with float32 sums. flops32: of float32 arrays at JAX's default precision, which
    is one bfloat16 pass on TPUs and TensorFloat-32 on GPUs. memory, bandwidth: of main memory. link: one way, of each
    link to a neighbour (TPU) or into the host's switch (GPU). torus: from this length on an axis of a TPU slice closes
    to a ring; 0 is a switch. host: chips of a host. dcn: one way and per chip, between hosts or slices.
    clock: Hz, to read the compiler's cycles by.
    """

    name: str
    flops: float
    flops32: float
    memory: float
    bandwidth: float
    link: float
    torus: int
    host: int
    dcn: float
    clock: float
    source: str


_TPU = "cloud.google.com/tpu/docs/"
CHIPS: Mapping[str, Chip] = {
    # link: a fourth (2-D torus) or sixth (3-D) of the one-way bandwidth of a chip, half of the bidirectional one.
    # clock: peak / (operations of all matrix units in a cycle).
    "v4": Chip("TPU v4", 275e12, 275e12, 32 * 2**30, 1228e9, 50e9, 4, 4, 6.25e9, 1.05e9, _TPU + "v4, arXiv:2304.01433"),
    "v5e": Chip("TPU v5e", 197e12, 197e12, 16 * 2**30, 819e9, 50e9, 16, 8, 3.125e9, 1.5e9, _TPU + "v5e"),
    "v5p": Chip("TPU v5p", 459e12, 459e12, 95 * 2**30, 2765e9, 100e9, 4, 4, 6.25e9, 1.75e9, _TPU + "v5p"),
    "v6e": Chip("TPU v6e", 918e12, 918e12, 32 * 2**30, 1638e9, 100e9, 16, 8, 12.5e9, 1.75e9, _TPU + "v6e"),
    "A100": Chip("A100 SXM 80GB", 312e12, 156e12, 80e9, 2039e9, 300e9, 0, 8, 25e9, 1.41e9, "NVIDIA A100 data sheet"),
    "H100": Chip("H100 SXM", 989e12, 494e12, 80e9, 3350e9, 450e9, 0, 8, 50e9, 1.83e9, "NVIDIA H100 data sheet"),
    "H200": Chip("H200 SXM", 989e12, 494e12, 141e9, 4800e9, 450e9, 0, 8, 50e9, 1.83e9, "NVIDIA H200 data sheet"),
}
"""dcn of GPUs: one network card of 400 Gb/s (200 for the A100) a GPU, as in NVIDIA's DGX hosts."""
_KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e",
    "tpu v6e": "v6e", "a100": "A100", "h100": "H100", "h200": "H200",
}  # fmt: skip


def find_chip(kind: str) -> Chip | None:
    """The chip that a device's `device_kind` or a short name means, or None if it is not in the table.

    >>> find_chip("TPU v5 lite").name, find_chip("NVIDIA H100 80GB HBM3").name, find_chip("cpu")
    ('TPU v5e', 'H100 SXM', None)
    """
    kind = kind.lower()
    for name, chip in CHIPS.items():
        if kind == name.lower():
            return chip
    near = [key for key in _KINDS if kind == key or (key[0] in "ah" and re.search(rf"\b{key}\b", kind))]
    return CHIPS[_KINDS[near[0]]] if near else None


def peak_flops(kind: str, given: str = "") -> float | None:
    """bfloat16 operations a second of a device, or those `given` as a number; None if neither is known.

    InputError if what is given is no number above 0.
    """
    if given:
        try:
            peak = float(given)
        except ValueError:
            peak = 0.0
        if not 0 < peak < math.inf:
            raise InputError(f"PEAK={given}: not a number of operations a second, such as 989e12")
        return peak
    chip = find_chip(kind)
    return None if chip is None else chip.flops


def count_flops(f: Callable[..., Any], *arguments: Any) -> int:
    """Operations of the matrix products and convolutions of f(*arguments); arrays may be `ShapeDtypeStruct`s.

    >>> count_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _count(jax.make_jaxpr(f)(*arguments).jaxpr)


def convolution_bytes(f: Callable[..., Any], *arguments: Any) -> int:
    """Bytes of input and output of the largest convolution of f(*arguments), kernels not counted.

    Both lie in memory at one moment whatever a compiler does, so that f needs no less beside its parameters.

    >>> x, kernel = jnp.ones((1, 2, 4, 4)), jnp.ones((3, 2, 1, 1))
    >>> convolution_bytes(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME"), x, kernel)
    320
    """
    return _largest(jax.make_jaxpr(f)(*arguments).jaxpr)


def memory_of(device: Any) -> int | None:
    """Bytes of memory that programs on a device share, None where neither it nor the table says."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chip = find_chip(device.device_kind)
    return None if chip is None else int(chip.memory)


def train_flops(experiment: Experiment, loss: LossFn, batch: Mapping[str, Any]) -> int:
    """Equation (2) for one step on a batch of arrays or of their shapes; nothing is computed."""
    params = jax.eval_shape(experiment.net.init, jax.random.key(0))
    return 3 * count_flops(loss, params, dict(batch), jax.random.key(0))


def image_share(experiment: Experiment, mesh: Mesh) -> float | None:
    """Equation (3) for one example a second, None if the peak of the mesh's devices is not known.

    The environment variable PEAK gives it for devices that are not in the table, in operations a second.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind, os.environ.get("PEAK", ""))
    if peak is None:
        return None
    try:
        one = train_flops(experiment, loss_fn(experiment), batch_shapes(experiment, 1))
    except InputError:  # An example of a form that is not known here.
        return None
    return one / (mesh.size * peak)


def batch_shapes(experiment: Experiment, batch: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the experiment's examples as they are stored, found without its data.

    The stored form is one that its `prepare` makes x0 of the experiment's shape from: pixels, or numbers, which may
    hold a mean and a deviation for each (latents). InputError if it is none of these.
    """
    n = experiment.batch if batch is None else batch
    doubled = (*experiment.shape[:-1], 2 * experiment.shape[-1])
    for dtype in (jnp.uint8, jnp.float32, jnp.float16, jnp.bfloat16):
        for shape in (experiment.shape, doubled):
            image = jax.ShapeDtypeStruct((n, *shape), dtype)
            if _prepares(experiment, image):
                return {"image": image, **_condition(experiment, n)}
    raise InputError("the form of the stored examples cannot be told from the experiment's prepare")


def _condition(experiment: Experiment, n: int) -> dict[str, Any]:
    """Labels; or, if what stands for no condition is a tree of arrays, such a tree for each example."""
    if experiment.null is None or isinstance(experiment.null, int):
        return {"label": jax.ShapeDtypeStruct((n,), jnp.int32)}

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        array = jnp.asarray(leaf)
        return jax.ShapeDtypeStruct((n, *array.shape), array.dtype)

    return {"cond": jax.tree.map(one, experiment.null)}


def _prepares(experiment: Experiment, image: jax.ShapeDtypeStruct) -> bool:
    try:
        x0 = jax.eval_shape(lambda x: experiment.prepare(x, jax.random.key(0), experiment.flip), image)
    except (TypeError, ValueError):
        return False
    return tuple(x0.shape[1:]) == tuple(experiment.shape) and jnp.issubdtype(x0.dtype, jnp.floating)


def _largest(jaxpr: Any) -> int:
    """Of the convolutions in it and in the programs inside it."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            arrays = eqn.invars[0].aval, eqn.outvars[0].aval
            found = max(found, sum(math.prod(one.shape) * one.dtype.itemsize for one in arrays))
        found = max([found, *map(_largest, _inner(eqn.primitive.name, eqn.params))])
    return found


def _count(jaxpr: Any) -> int:
    return sum(_count_one(eqn) for eqn in jaxpr.eqns)


def _count_one(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        rhs, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(rhs) // rhs[params["dimension_numbers"].rhs_spec[0]]
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _count(params["jaxpr"])
    if name.startswith("dot_product_attention_fwd"):  # cuDNN's, which holds no jaxpr: q [b, m, h, d], k [b, n, h, d]
        (b, m, h, d), n = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        return 4 * b * h * m * n * d
    return sum(_count(inner) for inner in _inner(name, params))


def _inner(name: str, params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs inside an operation; of a custom derivative only the function itself."""
    keys = ("call_jaxpr", "jaxpr", "fun_jaxpr") if name.startswith("custom_") else tuple(params)
    for key in keys:
        values = params.get(key)
        for value in values if isinstance(values, (tuple, list)) else (values,):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield inner
