r"""How long a compiled program takes, from what its operations ask for and what the chip can do.

With F_i operations, B_i bytes of main memory and c_i cycles (the compiler's own estimate, where it gives one) of
operation i, and collectives that send S_j bytes over links of bandwidth b_j, h_j hops away,

    t_i = max(F_i / peak, B_i / bandwidth, c_i / clock)                                                            (1)
    T_ops = max(sum_i t_i, sum_i B_i / bandwidth)                                                                  (2)
    t_j = S_j / b_j + h_j 1 us                                                                                     (3)
    T = T_ops + sum of t_j, j synchronous + max(0, sum of t_j, j asynchronous - T_ops)                             (4)
    T_worst = T_ops + sum of all t_j                                                                               (5)

Operations run one after the other; copies between memories run beside them and count in the second sum of (2) only.
An asynchronous collective hides behind the operations as long as there are any (4), or not at all (5). On a TPU slice
a group that spans some axes of the torus uses all links along them, two if the axis closes to a ring and one if not.
The floor without any order is max(sum F / peak, sum B / bandwidth, sum t_j).
Source of (3) and its latency: Austin et al. 2025, "How to scale your model", jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from diffusion_jax.planning.hlo import Collective, Op, Program, collective_kind
from diffusion_jax.training.roofline import Chip

HOP = 1e-6
"""Seconds from a chip to its neighbour."""
Place = Callable[[int], tuple[int, ...]]
"""Number of a device -> where it is on the grid of the network."""
KINDS = (
    "convolution", "matrix product", "attention", "normalization", "elementwise", "copy, transpose",
    "optimizer, averages", "collective", "other",
)  # fmt: skip


class Work(NamedTuple):
    """What the program asks of one device, and how long that takes. flops: of matrix products and convolutions.

    seconds: by kind of operation, equation (1). floor: compute, memory, collectives. step, worst: equations (4), (5).
    """

    flops: int
    bytes: int
    cycles: int
    seconds: dict[str, float]
    floor: tuple[float, float, float]
    ops: float
    exposed: float
    step: float
    worst: float


def estimate(program: Program, chip: Chip, grid: Sequence[int], place: Place) -> Work:
    """Equations (1) to (5) for a program on a slice whose network has the axes `grid`."""
    seconds: dict[str, float] = {kind: 0.0 for kind in KINDS}
    flops = total = cycles = 0
    for computation, op, times in program.walk():
        f, b = program.flops(op, computation), program.bytes(op, computation)
        flops, total, cycles = flops + f * times, total + b * times, cycles + op.cycles * times
        kind = kind_of(program, op, f)
        if kind != "collective" and not _beside(op):
            peak = chip.flops32 if op.shapes and _is_float32(program, op, computation) else chip.flops
            seconds[kind] += times * max(f / peak, b / chip.bandwidth, op.cycles / chip.clock)
    found = [(c, c.times * collective_seconds(c, chip, grid, place)) for c in program.collectives()]
    hidden, shown = (sum(t for c, t in found if c.overlaps is way) for way in (True, False))
    serial = sum(seconds.values())
    seconds["collective"] = hidden + shown
    memory = total / chip.bandwidth
    ops = max(serial, memory)
    exposed = shown + max(0.0, hidden - ops)
    floor = (flops / chip.flops, memory, hidden + shown)
    return Work(flops, total, cycles, seconds, floor, ops, exposed, ops + exposed, ops + hidden + shown)


def collective_seconds(c: Collective, chip: Chip, grid: Sequence[int], place: Place) -> float:
    """Equation (3) for one of them; 0 for a group of one."""
    if c.size < 2 and c.kind != "collective-permute":
        return 0.0
    rounds = 2 if c.kind == "all-reduce" else 1
    if chip.torus == 0:
        bandwidth = chip.link if len(c.group) <= chip.host else min(chip.link, chip.host * chip.dcn)
        return c.sent / bandwidth + rounds * HOP * (1 if len(c.group) <= chip.host else 10)
    extents = [len(set(axis)) for axis in zip(*(place(device) for device in c.group), strict=True)]
    rings = [extent == n and n >= chip.torus for extent, n in zip(extents, grid, strict=False)]
    hops = sum((n // 2 if ring else n - 1) for n, ring in zip(extents, rings, strict=True))
    if c.kind == "collective-permute":
        return c.sent / chip.link + max(hops, 1) * HOP
    bandwidth = chip.link * sum((2 if ring else 1) for n, ring in zip(extents, rings, strict=True) if n > 1)
    if c.kind == "all-to-all":  # each byte takes so many hops on average
        mean = sum(n / 4 if ring else n / 3 for n, ring in zip(extents, rings, strict=True) if n > 1)
        return c.sent * max(mean, 1) / max(bandwidth, chip.link) + hops * HOP
    return c.sent / max(bandwidth, chip.link) + rounds * hops * HOP


def kind_of(program: Program, op: Op, flops: int = 0) -> str:
    """One of `KINDS`, from the operation itself and from the Python functions that it came from."""
    if collective_kind(op.opcode) or any(
        collective_kind(o.opcode) for name in op.called() for o in program.computations.get(name, {}).values()
    ):
        return "collective"
    origin = origin_of(program, op)
    functions = program.functions.get(origin.frame, ())
    stack = " ".join(functions)
    # Functions, not modules: a block named Attention holds projections and a normalization too.
    if any("attend" in name or "attention" in name for name in functions if name == name.lower()):
        return "attention"
    if flops:
        return "convolution" if "conv_general_dilated" in origin.source else "matrix product"
    if "make_train_step" in stack and "jvp" not in origin.source and "loss_fn" not in stack:
        return "optimizer, averages"
    if op.opcode in ("copy", "transpose", "reshape") or op.name.startswith(("copy", "transpose", "slice")):
        return "copy, transpose"
    if "norm" in stack.lower():
        return "normalization"
    return "other" if op.opcode in ("custom-call", "infeed", "outfeed") else "elementwise"


def origin_of(program: Program, op: Op) -> Op:
    """The operation itself, or, if the compiler does not say where it is from, a product or another one inside it."""
    if op.frame or not op.called():
        return op
    inner = [o for name in op.called() for o in program.computations.get(name, {}).values() if o.frame or o.called()]
    products = [o for o in inner if o.opcode in ("dot", "convolution")]
    chosen = [*products, *inner[::-1]]
    return origin_of(program, chosen[0]) if chosen else op


def _beside(op: Op) -> bool:
    """A copy between memories that runs beside the operations."""
    return op.opcode.startswith(("copy-start", "copy-done", "slice-start", "slice-done", "async"))


def _is_float32(program: Program, op: Op, computation: str) -> bool:
    """Whether its products are of float32 arrays."""
    if op.opcode in ("dot", "convolution"):
        table = program.computations[computation]
        return all(table[name].shapes[0].dtype == "f32" for name in op.operands[:2] if name in table)
    return any(
        _is_float32(program, o, name)
        for name in op.called()
        for o in program.computations[name].values()
        if o.opcode in ("dot", "convolution", "fusion")
    )
