"""The report of `fashion_mnist_10min.py`: Markdown and pictures from what the pieces left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

METRICS = {"fd": "Fréchet", "kd": "kernel", "c2st": "C2ST", "copy": "copy ratio", "authenticity": "authentic",
           "accuracy": "accuracy"}  # fmt: skip
INK, LINES = "#22303c", ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#64473a", "#9b9a97")
Found = dict[str, list[float]]
"""The values of each metric, one of each seed."""


def write_report(out: Path, size: str) -> None:
    """Write OUT/README.md and its pictures."""
    measured = {path.stem.removeprefix("measure-"): json.loads(path.read_text()) for path in _results(out)}
    floor = _values(json.loads((out / "results" / "floor.json").read_text()))
    found = {name: _values(entry) for name, entry in measured.items()}
    n = next(iter(measured.values()))["results"][0]["protocol"]["n"]
    _curves(out)
    _quality(out, found, floor, n)
    pictures = _pictures(out)
    parts = [
        f"# Fashion-MNIST in ten minutes: what ran, size `{size}`\n\n{_said(out, size, n)}",
        "## Quality\n\n" + _table(measured, found, floor) + "\n\n![distance and two-sample test](quality.png)",
        "## Targets\n\n" + _targets(found, floor),
        "## Training\n\n![curves](curves.png)\n\n" + _times(out),
        "## Samples\n\n" + pictures,
    ]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")


def _results(out: Path) -> list[Path]:
    order = ["conditional", "unconditional", "ect", "meanflow", "neon"]

    def key(path: Path) -> tuple:
        _, model, number = path.stem.split("-")
        return order.index(model.split("=")[0]), model, int(number)

    return sorted((out / "results").glob("measure-*.json"), key=key)


def _values(entry: Mapping[str, Any]) -> Found:
    found: Found = {}
    for result in entry["results"]:
        found.setdefault(result["metric"], []).append(result["value"])
    return found


def _told(values: Sequence[float] | None) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def _mean(found: Found, metric: str) -> float:
    return statistics.fmean(found[metric])


def _table(measured: Mapping[str, Any], found: Mapping[str, Found], floor: Found) -> str:
    head = ["model", "evaluations", "seeds", *METRICS.values(), "over floor", "ms a sample"]
    rows = [head, ["---"] * len(head)]
    for name, values in found.items():
        model, number = name.rsplit("-", 1)
        cells = [_told(values.get(metric)) for metric in METRICS]
        ratio, took = _mean(values, "fd") / _mean(floor, "fd"), 1e3 * measured[name]["seconds_a_sample"]
        rows.append([_named(model), number, str(len(values["fd"])), *cells, f"{ratio:.3g}", f"{took:.3g}"])
    rows.append(["**real pictures**", "", str(len(floor["fd"])), *(_told(floor.get(m)) for m in METRICS), "1", ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _named(model: str) -> str:
    if model.startswith("neon="):
        return f"extrapolated, w = {model.removeprefix('neon=')}"
    return {"ect": "student, ECT", "meanflow": "student, MeanFlow"}.get(model, model)


def _targets(found: Mapping[str, Found], floor: Found) -> str:
    """What was to be reached, what was, and whether."""
    own, rows = found["conditional-35"], [["target", "seen", "reached"], ["---"] * 3]

    def row(target: str, value: float, most: float) -> None:
        rows.append([target, f"{value:.4g} (at most {most:.4g})", "yes" if value <= most else "no"])

    real, mine = _mean(floor, "fd"), _mean(own, "fd")
    row("Fréchet distance at most that of held-out pictures", mine, real)
    row("C2ST at most 0.55", _mean(own, "c2st"), 0.55)
    row("no more copies: real over own authenticity", _mean(floor, "authenticity") / _mean(own, "authenticity"), 1.05)
    row("unconditional within 1.3 of held-out pictures", _mean(found["unconditional-35"], "fd"), 1.3 * real)
    for steps, share in ((1, 1.3), (2, 1.1)):
        best = min(_mean(found[f"{method}-{steps}"], "fd") for method in ("ect", "meanflow"))
        row(f"student, {steps} evaluation{'s' * (steps > 1)}, within {share} of the teacher", best, share * mine)
    moved = [_mean(values, "fd") for name, values in found.items() if name.startswith("neon=")]
    row("extrapolation: at least a fifth lower", min(moved), 0.8 * mine)
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def _said(out: Path, size: str, n: int) -> str:
    record = json.loads((_runs(out)["conditional"] / "experiment.json").read_text())
    arguments = ", ".join(f"{key}={value}" for key, value in record["arguments"].items() if key != "data_dir")
    reduced = "" if size == "full" else " **A reduced size: it says nothing of what the recipe reaches on a GPU.**"
    return (
        f"`python benchmarks/fashion_mnist_10min.py --size {size}` on {record['devices']}.{reduced} "
        f"{record['parameters']:,} parameters; {n} samples a measurement, and as many real pictures in the last line "
        f"of the table. The protocol is in docs/evaluation-fashion-mnist.md.\n\nArguments of the model: {arguments}."
    )


def _times(out: Path) -> str:
    rows = [["piece", "seconds", "bouts"], ["---"] * 3]
    for path in sorted((out / "pieces").glob("*.json"), key=lambda path: path.stat().st_mtime):
        record = json.loads(path.read_text())
        rows.append([path.stem, f"{record['seconds']:.0f}", str(record["bouts"])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _runs(out: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted((out / "runs").glob("*/*/experiment.json"))}


def _axes(count: int, width: float = 8.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2), layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plain(axis: Any) -> None:
    """Numbers as they are beside a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _curves(out: Path) -> None:
    """Loss of training and of held-out pictures against pictures seen."""
    figure, axes = _axes(2)
    for (name, folder), colour in zip(_runs(out).items(), LINES, strict=False):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        batch = json.loads((folder / "experiment.json").read_text())["arguments"]["batch"]
        for axis, key in zip(axes, ("loss", "heldout_loss"), strict=True):
            points = [(line["step"] * batch, line[key]) for line in lines if key in line]
            if points and name in ("conditional", "unconditional"):
                axis.plot(*zip(*points, strict=True), color=colour, label=name, marker="." if len(points) < 20 else "")
    for axis, title in zip(axes, ("loss, training", "loss, held-out pictures"), strict=True):
        axis.set(title=title, xlabel="pictures seen", yscale="log")
        _plain(axis)
        axis.title.set_color(INK)
    axes[0].legend(frameon=False)
    figure.savefig(out / "curves.png", dpi=90)


def _quality(out: Path, found: Mapping[str, Found], floor: Found, n: int) -> None:
    """Distance and two-sample accuracy against evaluations, a line for each model, and the floors."""
    figure, axes = _axes(2)
    models = dict.fromkeys(name.rsplit("-", 1)[0] for name in found)
    for model, colour in zip([m for m in models if not m.startswith("neon=")], LINES, strict=False):
        steps = [int(name.rsplit("-", 1)[1]) for name in found if name.rsplit("-", 1)[0] == model]
        for axis, metric in zip(axes, ("fd", "c2st"), strict=True):
            values = [found[f"{model}-{step}"][metric] for step in steps]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            means = [statistics.fmean(v) for v in values]
            axis.errorbar(steps, means, spread, color=colour, marker="o", markersize=4, capsize=3, label=_named(model))
    for axis, metric, title in zip(axes, ("fd", "c2st"), ("Fréchet distance", "C2ST accuracy"), strict=True):
        axis.axhline(_mean(floor, metric), color=INK, linestyle=(0, (1, 2)), label="real pictures")
        axis.set(title=f"{title}, {n} samples", xlabel="network evaluations a sample", xscale="log")
        axis.set_xticks([1, 2, 5, 10, 18, 35], ["1", "2", "5", "10", "18", "35"])
        axis.minorticks_off()
        axis.title.set_color(INK)
    axes[0].set_yscale("log")
    _plain(axes[0])
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out / "quality.png", dpi=90)


def _pictures(out: Path) -> str:
    """Sheets of samples, and pairs with the nearest training pictures; the Markdown that shows them."""
    said = []
    for name, words in (
        ("conditional-35", "35 evaluations, a column for each class"),
        ("conditional-5", "five evaluations"),
        ("unconditional-35", "unconditional, 35 evaluations"),
        ("ect-1", "student by ECT, one evaluation"),
        ("meanflow-1", "student by MeanFlow, one evaluation"),
    ):
        with np.load(out / "results" / f"measure-{name}.npz") as file:
            images, near = file["images"], file["nearest"]
        _sheet(out / f"samples-{name}.png", images[:50], 10)
        said.append(f"{words[0].upper()}{words[1:]}:\n\n![{words}](samples-{name}.png)")
        if name == "conditional-35":
            pairs = [np.concatenate([images[i : i + 10], near[i : i + 10]]) for i in range(0, min(20, len(images)), 10)]
            _sheet(out / "pairs.png", np.concatenate(pairs), 10)
            said.append("Samples, and under each the training picture whose pixels are nearest:\n\n![pairs](pairs.png)")
    return "\n\n".join(said)


def _sheet(path: Path, images: np.ndarray, columns: int) -> None:
    """Pictures u8[n, h, w, 1] in rows of `columns`, twice as large, with a dark line between."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    whole = np.full((rows, columns, h + 1, w + 1), 60, np.uint8)
    whole.reshape(-1, h + 1, w + 1)[:n, :h, :w] = images[..., 0]
    flat = np.swapaxes(whole, 1, 2).reshape(rows * (h + 1), columns * (w + 1))
    picture = Image.fromarray(flat)
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path, optimize=True)
