"""A plan as a page of text, and what would make it fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

SWITCHES = (
    # argument, what it does, and when: it divides the state, the work of a layer, or the examples of a device
    ("split=True", "each device keeps its share of parameters and optimizer state only", "state"),
    ("tensor=2", "two devices share the work within each layer", "layer"),
    ("remat=full", "activations are computed again in the backward pass (dots keeps the products)", ""),
    ("accumulate=2", "half the batch at a time, or more parts", "examples"),
    ("precision=bfloat16", "activations take half the memory", ""),
    ("batch=", "a smaller batch", "examples"),
)


def text(result: Mapping[str, Any]) -> str:
    """All of a plan; without the verdict if that is no."""
    parts = [_head(result), _state(result)]
    for name, program in result["programs"].items():
        parts.append(_program(name, program, result))
    return "\n\n".join(parts if not result["fits"] else [*parts, verdict(result)])


def verdict(result: Mapping[str, Any]) -> str:
    """Whether it fits, in one line, and the switches that help if it does not."""
    chip = result["chip"]
    if result["fits"]:
        if chip is None:
            return "whether it fits is for you to say: the memory of these devices is not known (chip=NAME)"
        largest = max(result["needs"].values())
        return f"fits: {size(largest)} of {size(chip['memory'])} per device"
    errors = [f"{name}: {p['error']}" for name, p in result["programs"].items() if "error" in p]
    need = "; ".join(errors) or f"{size(max(result['needs'].values()))} of {size(chip['memory'])} per device"
    lines = [f"does not fit: {need}"]
    if result["advice"]:
        lines.append("what helps:")
        lines += [f"  {name:20} {what}" for name, what in result["advice"]]
    return "\n".join(lines)


def advice(result: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Switches that are there and not on yet. arguments: the experiment's, and `split` and `tensor`."""
    useful = {
        "": True,
        "state": result["devices"] > 1,
        "layer": result["devices"] > 1 and result["mesh"]["model"] == 1 and result["partitioned"],
        "examples": result["batch"] > result["mesh"]["data"],
    }
    found = []
    for switch, what, when in SWITCHES:
        name, _, value = switch.partition("=")
        if name in arguments and str(arguments[name]) != value and useful[when]:
            found.append((switch, what))
    return found


def size(n: float) -> str:
    """Bytes for people.

    >>> size(16 * 2**30), size(1.5 * 2**20), size(12)
    ('16.00 GiB', '1.5 MiB', '12 B')
    """
    for unit, scale, digits in (("GiB", 2**30, 2), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if abs(n) >= scale:
            return f"{n / scale:.{digits}f} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.0123), duration(2.5), duration(4e-6)
    ('12.3 ms', '2.50 s', '4.0 us')
    """
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def table(rows: Collection[tuple[Any, ...]], indent: str = "  ") -> str:
    """Rows of cells, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]

    def line(row: list[str]) -> str:
        aligned = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        return (indent + "  ".join(aligned)).rstrip()

    return "\n".join(map(line, cells))


def _head(r: Mapping[str, Any]) -> str:
    mesh, chip = r["mesh"], r["chip"]
    lines = [
        f"{r['experiment']} on {r['topology']}: {r['devices']} device{'s' * (r['devices'] > 1)}, "
        f"data {mesh['data']} x model {mesh['model']}, parameters {'split' if r['split'] else 'replicated'}",
        f"{r['parameters']:,} parameters, batch {r['batch']:,} ({r['batch'] / r['devices']:g} per device), "
        f"model FLOPs of a step {r['model_flops'] / 1e12:.4g} T per device",
    ]
    if chip:
        lines.append(
            f"{chip['name']}: {chip['flops'] / 1e12:.4g} TFLOP/s bfloat16, {size(chip['memory'])} at "
            f"{chip['bandwidth'] / 1e9:.4g} GB/s, {chip['link'] / 1e9:.4g} GB/s a link ({chip['source']})"
        )
        if r["compiler"] == "cpu":
            lines.append("compiled for this processor: its memory and its fusions are not those of that chip")
    return "\n".join(lines)


def _state(r: Mapping[str, Any]) -> str:
    rows = [(name, size(n)) for name, n in r["state"].items()] + [("batch", size(r["batch_bytes"]))]
    return "what a device holds between steps\n" + table(rows)


def _program(name: str, p: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    title = {"train": "training step", "sample": "sampling"}[name]
    if "error" in p:
        return f"{title}: {p['error']}"
    lines = [f"{title} (compiled in {p['compile_seconds']:.0f} s)"]
    rows = [(kind, size(n)) for kind, n in p["memory"].items()]
    lines += ["  memory, per device", table(rows, "    "), *_flops(p, r, name), *_collectives(p)]
    return "\n".join(lines + (_time(p, r, name) if "step_seconds" in p else []))


def _flops(p: Mapping[str, Any], r: Mapping[str, Any], name: str) -> list[str]:
    line = f"  operations, per device: {p['xla_flops'] / 1e12:.4g} TFLOP by XLA's count (loops once)"
    if "flops" in p:
        line += f", {p['flops'] / 1e12:.4g} in products and convolutions (loops counted)"
    if name == "train":
        line += f"; the model's {r['model_flops'] / 1e12:.4g}"
    return [line]


def _collectives(p: Mapping[str, Any]) -> list[str]:
    if not p["collectives"]:
        return ["  collectives: none"]
    groups: dict[tuple, list[float]] = {}
    for c in p["collectives"]:
        key = (c["kind"], c["size"], "asynchronous" if c["overlaps"] else "synchronous")
        total = groups.setdefault(key, [0, 0.0, 0.0])
        for i, n in enumerate((c["times"], c["times"] * c["bytes"], c["sent"])):
            total[i] += n
    rows = [("kind", "devices", "", "number", "bytes", "sent per device")]
    rows += [(*key, f"{n:,}", size(b), size(s)) for key, (n, b, s) in sorted(groups.items(), key=lambda g: -g[1][2])]
    return ["  collectives", table(rows, "    ")]


def _time(p: Mapping[str, Any], r: Mapping[str, Any], name: str) -> list[str]:
    floor = p["floor"]
    rows = [(kind, duration(t), f"{100 * t / max(sum(p['seconds'].values()), 1e-30):.1f} %")
            for kind, t in sorted(p["seconds"].items(), key=lambda item: -item[1]) if t]  # fmt: skip
    lines = [
        "  roofline: " + ", ".join(f"{kind} {duration(t)}" for kind, t in floor.items()),
        "  each operation by the largest of compute, memory and the compiler's cycles",
        table(rows, "    "),
        f"  predicted: {duration(p['step_seconds'])}, of which collectives that nothing hides "
        f"{duration(p['exposed'])}; {duration(p['worst'])} if none overlapped",
    ]
    if name == "train":
        lines.append(
            f"  {p['images_per_second']:,.0f} examples/s on all devices, model-FLOPs utilisation {100 * p['mfu']:.1f} %"
        )
    return lines
