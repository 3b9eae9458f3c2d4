r"""Optimised programs as XLA prints them: their operations, and what each computes, reads, writes and sends.

A program is a set of computations; an operation is run as often as its computation is called, which is the product
of the trip counts of the loops around it (a loop whose count is not known counts once). With out, k, c as in

    dot:          flops = 2 prod(out) prod(contracted dimensions of lhs)                                           (1)
    convolution:  flops = 2 batch/batch_groups c_in/groups c_out prod_axis #{(o, k): tap k of output o is real}    (2)

where a tap is real if it is neither padding nor a hole of a dilated input. A fusion computes what is inside it.
Bytes are what an operation moves to and from main memory: its operands and results that live there, padded to the
layout's tiles; of an operand that a fusion only slices, the slices.

A collective over g devices, of n bytes that each of them holds before it (n' = g n after an all-gather):

    kind                sends, per device                                                                          (3)
    all-reduce          2 n (g - 1) / g
    reduce-scatter      n (g - 1) / g
    all-gather          n' (g - 1) / g
    all-to-all          n (g - 1) / g
    collective-permute  n

Source of (2): XLA's own count. Source of (3): Thakur, Rabenseifner and Gropp 2005, doi:10.1177/1094342005051521.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "domain", "iota",
}  # fmt: skip
"""Operations that move nothing."""
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^{}]*)\})?")
_CONTINUED = re.compile(r"\n(?=\"|\}\})")
"""Before lines that go on with an operation: the metadata of kernels."""
_NAME = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """An array as it lies in memory. order: axes, the minor first; tile: of the minor axes; space: 0 is main memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        if self.dtype in _BITS:
            return _BITS[self.dtype] / 8
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(digits[1]) / 8 if digits else 0

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return math.ceil(math.prod(self.dims) * self.itemsize)

    @property
    def padded_bytes(self) -> int:
        """Bytes that it takes up, the minor axes rounded up to the tile."""
        dims = [self.dims[axis] for axis in self.order] if len(self.order) == len(self.dims) else list(self.dims[::-1])
        for i, size in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // size) * size
        return math.ceil(math.prod(dims) * self.itemsize)


class Op(NamedTuple):
    """One line of a program. rest: everything after the operands."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False

    def attribute(self, name: str) -> str | None:
        """The text of an attribute, without the braces around it."""
        match = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^\s,{{]+))", self.rest)
        return None if match is None else match[1] if match[1] is not None else match[2]

    def called(self) -> list[str]:
        """The computations that it runs."""
        names = []
        for key in ("calls", "to_apply", "body", "true_computation", "false_computation", "branch_computations"):
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
            names += _NAME.findall(match[1]) if match else []
        return names

    @property
    def source(self) -> str:
        """The path of JAX's operation that it came from, "" if it has none."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def frame(self) -> int:
        match = re.search(r"stack_frame_id=(\d+)", self.rest)
        return int(match[1]) if match else 0

    @property
    def cycles(self) -> int:
        """The compiler's own estimate of its duration, in cycles; 0 where it gives none (TPU compilers do)."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(match[1]) if match else 0


class Collective(NamedTuple):
    """`times` operations of one kind: bytes n of (3), the first group, its size g, and whether they may overlap."""

    kind: str
    bytes: int
    group: tuple[int, ...]
    size: int
    times: int
    overlaps: bool

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one of them, equation (3)."""
        share = (self.size - 1) / self.size
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.bytes * factors.get(self.kind, share)


class Program:
    """A parsed program: computations, each its operations by name in the order of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations, self.entry = _parse(text)

    @cached_property
    def functions(self) -> dict[int, tuple[str, ...]]:
        """The names of the Python functions of each stack frame, innermost first."""
        return _stacks(self.text)

    @cached_property
    def partitions(self) -> int:
        """The number of devices that it was compiled for."""
        header = self.text.partition("\n")[0]  # of any length: TPU compilers write their options into it
        numbers = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)]
        return math.prod(numbers) if numbers else 1

    def walk(self) -> Iterator[tuple[str, Op, int]]:
        """Every operation that is run as a whole: (its computation, itself, how many times)."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[str, Op, int]]:
        for op in self.computations[name].values():
            if op.opcode == "while":
                for inner in op.called():
                    yield from self._walk(inner, times * self._trips(op))
            elif op.opcode == "conditional":
                # One branch runs; the dearest stands for it.
                branches = [list(self._walk(inner, times)) for inner in op.called()]
                yield from max(branches, key=lambda b: sum(self.flops(o, c) * n + len(b) for c, o, n in b), default=[])
            elif op.opcode == "call":
                for inner in op.called():
                    yield from self._walk(inner, times)
            elif op.opcode not in FREE:
                yield name, op, times

    def _trips(self, op: Op) -> int:
        """How often a loop runs: as the compiler says, or counted from 0 by a constant to a constant; else 1."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
            return int(known[1])
        condition, body = (
            self.computations.get((op.attribute(key) or "").lstrip("%"), {}) for key in ("condition", "body")
        )
        test, step = (next((o for o in ops.values() if o.root), None) for ops in (condition, body))
        if test is None or step is None or test.opcode != "compare" or "direction=LT" not in test.rest:
            return 1
        counter, limit = (_uncopied(condition, name) for name in test.operands)
        place = counter.attribute("index") if counter.opcode == "get-tuple-element" else None
        if place is None or limit.opcode != "constant" or step.opcode != "tuple":
            return 1
        stride = _added(body, step.operands[int(place)], place)
        return -(-_leading_number(limit.rest) // stride) if stride else 1

    def flops(self, op: Op, computation: str) -> int:
        """Equations (1) and (2), of everything inside the operation."""
        table = self.computations[computation]
        if op.opcode == "dot":
            return _dot_flops(op, table)
        if op.opcode == "convolution":
            return _convolution_flops(op, table)
        if op.opcode == "fusion" or op.opcode.startswith("async"):
            return sum(self.flops(o, name) for name in op.called() for o in self.computations[name].values())
        return 0

    def bytes(self, op: Op, computation: str) -> int:
        """What the operation reads from main memory and writes to it."""
        if op.opcode in FREE or op.opcode.endswith("-done") or op.opcode in ("while", "conditional", "call"):
            return 0
        table = self.computations[computation]
        inputs = [s for name in op.operands if name in table for s in table[name].shapes]
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _resident(op.shapes)
        if op.opcode == "dynamic-update-slice":
            return 2 * _resident(table[op.operands[1]].shapes) if op.operands[1] in table else 0
        if op.opcode == "fusion":
            return self._fusion_bytes(op, table)
        if op.opcode.endswith("-start"):
            # Copies between memories: (destination, source, context); what is in main memory is read or written once.
            return max(_resident(inputs), _resident(op.shapes[:1]))
        return _resident(inputs) + _resident(op.shapes)

    def _fusion_bytes(self, op: Op, table: dict[str, Op]) -> int:
        inner = self.computations[op.called()[0]]
        users: dict[str, list[Op]] = {}
        for o in inner.values():
            for name in o.operands:
                users.setdefault(name, []).append(o)
        total = 0
        for o in inner.values():
            if o.opcode != "parameter":
                continue
            index = _leading_number(o.rest)
            outside = table.get(op.operands[index]) if index < len(op.operands) else None
            whole = _resident(outside.shapes if outside else o.shapes)
            total += min(whole, _sliced(o, users, whole))
        root = next((o for o in inner.values() if o.root), None)
        if root is not None and root.opcode == "dynamic-update-slice" and root.operands[1] in inner:
            return total + inner[root.operands[1]].shapes[0].padded_bytes * (op.shapes[0].space == 0)
        return total + _resident(op.shapes)

    def collectives(self) -> list[Collective]:
        """All communication of the program, equal ones gathered."""
        found: dict[Collective, int] = {}
        for name, op, times in self.walk():
            for one in self._communication(name, op):
                found[one] = found.get(one, 0) + times
        return [one._replace(times=times) for one, times in found.items()]

    def _communication(self, computation: str, op: Op) -> Iterator[Collective]:
        kind = collective_kind(op.opcode)
        if kind is not None and not op.opcode.endswith("-done"):
            yield self._collective(kind, op, computation, op.opcode.endswith("-start"))
        elif op.opcode in ("fusion", "async-start"):
            for inner in op.called():
                for o in self.computations[inner].values():
                    for one in self._communication(inner, o):
                        yield one._replace(overlaps=True)

    def _collective(self, kind: str, op: Op, computation: str, overlaps: bool) -> Collective:
        table = self.computations[computation]
        n = sum(s.bytes for name in op.operands if name in table for s in table[name].shapes)
        group = _first_group(op, self.partitions)
        if kind == "all-gather":
            n *= len(group)
        return Collective(kind, n, group, len(group), 0, overlaps)


def collective_kind(opcode: str) -> str | None:
    """The kind of a collective operation, synchronous or the start or end of an asynchronous one."""
    return next((kind for kind in COLLECTIVES if re.fullmatch(rf"(ragged-)?{kind}(-start|-done)?", opcode)), None)


def _parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    computations: dict[str, dict[str, Op]] = {}
    entry, current = "", None
    for line in _CONTINUED.sub(" ", text).splitlines():
        if current is None or not line.startswith(" "):
            header = re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line)
            current = computations.setdefault(header[2], {}) if header else None
            entry = header[2] if header and header[1] else entry
            continue
        op = _parse_line(line)
        if op is not None:
            current[op.name] = op
    if not entry:
        raise ValueError("the text is no optimised program: it has no entry computation")
    return computations, entry


def _parse_line(line: str) -> Op | None:
    head = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    shapes = tuple(_shape(*m.groups()) for m in _SHAPE.finditer(line[start:end]))
    call = re.match(r"\s*([\w\-]+)\(", line[end:])
    if call is None:
        return None
    opened = end + call.end() - 1
    closed = _closing(line, opened)
    inside = line[opened + 1 : closed]
    rest = line[closed + 1 :]
    if call[1] in ("parameter", "constant"):
        return Op(head[2], shapes, call[1], (), inside[:20] + rest, bool(head[1]))
    return Op(head[2], shapes, call[1], tuple(_NAME.findall(inside)), rest, bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(line)


def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    sizes = tuple(int(re.sub(r"\D", "", n)) for n in dims.split(",") if re.sub(r"\D", "", n))
    if not layout:
        return Shape(dtype, sizes)
    order = tuple(int(n) for n in re.findall(r"\d+", layout.split(":")[0]))
    tile = re.search(r"T\(([\d,]+)\)", layout)
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(dtype, sizes, order, _ints(tile[1]) if tile else (), int(space[1]) if space else 0)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _resident(shapes: tuple[Shape, ...] | list[Shape]) -> int:
    return sum(s.padded_bytes for s in shapes if s.space == 0)


def _sliced(parameter: Op, users: dict[str, list[Op]], whole: int) -> int:
    """Bytes of a fusion's operand that it reads: the slices if every user slices it, all of it otherwise."""
    total = 0
    for user in users.get(parameter.name, []):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
            total += user.shapes[0].padded_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            total += 0  # Written in place: what is not updated is not read.
        else:
            return whole
    return total


def _added(table: dict[str, Op], name: str, place: str) -> int:
    """The constants that were added to element `place` of a loop's tuple; 0 if `name` is anything else."""
    op, total = _uncopied(table, name), 0
    while op.opcode == "add":
        terms = [_uncopied(table, n) for n in op.operands]
        constants = [term for term in terms if term.opcode == "constant"]
        others = [term for term in terms if term.opcode != "constant"]
        if len(constants) != 1:
            return 0
        total, op = total + _leading_number(constants[0].rest), others[0]
    return total if op.opcode == "get-tuple-element" and op.attribute("index") == place else 0


def _uncopied(table: dict[str, Op], name: str) -> Op:
    """The operation whose value `name` is, whatever memory it was copied to since."""
    op = table[name]
    while op.opcode in ("copy", "bitcast") and op.operands[0] in table:
        op = table[op.operands[0]]
    return op


def _leading_number(text: str) -> int:
    match = re.match(r"\s*(\d+)", text)
    return int(match[1]) if match else 0


def _dot_flops(op: Op, table: dict[str, Op]) -> int:
    lhs = table[op.operands[0]].shapes[0].dims
    contracted = _ints(op.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(op.shapes[0].dims) * math.prod(lhs[axis] for axis in contracted)


def _convolution_flops(op: Op, table: dict[str, Op]) -> int:
    lhs, rhs = (table[name].shapes[0].dims for name in op.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if labels is None:
        return 0
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window and window[1].strip() else {}
    groups, batch_groups = (int(op.attribute(f"{kind}_group_count") or 1) for kind in ("feature", "batch"))
    pairs = 1
    out, names = op.shapes[0].dims, ("stride", "pad", "lhs_dilate", "rhs_dilate")
    for i in range(sum(c.isdigit() for c in labels[1])):
        n, width, n_out = (a[at.index(str(i))] for a, at in zip((lhs, rhs, out), labels.groups(), strict=True))
        pairs *= _real_taps(n, width, n_out, *(_window_field(fields, name, i) for name in names))
    batch, c_in = lhs[labels[1].index("b")], lhs[labels[1].index("f")]
    return 2 * pairs * (batch // batch_groups) * (c_in // groups) * out[labels[3].index("f")]


def _window_field(fields: dict[str, str], name: str, axis: int) -> int:
    if name not in fields:
        return 0 if name == "pad" else 1
    return int(fields[name].split("x")[axis].split("_")[0])


def _real_taps(n: int, width: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many (output, tap) of one axis meet an element of the input."""
    length, total = (n - 1) * lhs_dilate + 1, 0
    for k in range(width):
        first = k * rhs_dilate - pad
        if lhs_dilate == 1:
            low = max(0, -(first // stride))
            total += max(0, min(out - 1, (length - 1 - first) // stride) - low + 1)
        else:
            total += sum(0 <= (p := o * stride + first) < length and p % lhs_dilate == 0 for o in range(out))
    return total


def _first_group(op: Op, devices: int) -> tuple[int, ...]:
    """The first group of devices that talk to each other: partition numbers."""
    if op.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest)
        return _ints(",".join(pairs.groups())) if pairs else (0,)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", op.rest)
    if listed:
        return _ints(listed[1])
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", op.rest)
    if meshed:
        return _along(meshed[1], meshed[2])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.rest)
    if iota is None:
        return tuple(range(devices))
    shape, axes = _ints(iota[1]), _ints(iota[2])
    order = _ints(iota[3]) if iota[3] else tuple(range(len(axes)))
    return tuple(_transposed(axes, order)[: shape[-1]])


def _along(mesh: str, axes: str) -> tuple[int, ...]:
    """The first group along some axes, 'a' of a mesh 'a'=2,'b'=4 whose devices are numbered row by row."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    chosen = re.findall(r"'(\w+)'", axes)
    order = [i for i, name in enumerate(sizes) if name not in chosen] + [i for i, n in enumerate(sizes) if n in chosen]
    shape = tuple(sizes.values())
    return tuple(_transposed(shape, tuple(order))[: math.prod(sizes[name] for name in chosen)])


def _transposed(axes: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """iota over `axes` transposed by `order`, flattened."""
    strides = [math.prod(axes[i + 1 :]) for i in range(len(axes))]
    values = [0]
    for axis in order:
        values = [v + i * strides[axis] for v in values for i in range(axes[axis])]
    return values


def _stacks(text: str) -> dict[int, tuple[str, ...]]:
    """From the tables of names, locations and frames before the first computation."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif match := re.match(r"(\d+) (.*)$", line):
            current[int(match[1])] = match[2]
        elif line.startswith(("%", "ENTRY")):
            break
    functions, places, frames = (tables.get(name, {}) for name in ("FunctionNames", "FileLocations", "StackFrames"))
    # Parents are counted from 1 where frames are: a first frame that is its own parent shows it.
    offset = _number("parent_frame_id", frames.get(1, ""))
    stacks: dict[int, tuple[str, ...]] = {0: ()}

    def stack(number: int) -> tuple[str, ...]:
        if number not in stacks:
            place = places.get(_number("file_location_id", frames.get(number, "")), "")
            name = functions.get(_number("function_name_id", place), "").strip('"')
            parent = _number("parent_frame_id", frames.get(number, "")) - offset
            stacks[number] = (name, *stack(parent if 0 < parent < number else 0))
        return stacks[number]

    for number in sorted(frames):
        stack(number)
    return stacks


def _number(field: str, text: str) -> int:
    match = re.search(rf"\b{field}=(\d+)", text)
    return int(match[1]) if match else 0
