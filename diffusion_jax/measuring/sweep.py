"""make sweep: samplers x steps x guidance x average of one checkpoint, as a table and as plots.

Each row is measured like `make eval` and timed: the median time of a batch after a first one that is not counted, over
its pictures. Rows go to sweep.jsonl as they are done, with all that they depend on; a sweep that is given again skips
those that are there, and one with more values adds to them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from diffusion_jax.arguments import Count, Natural
from diffusion_jax.measuring.command import Precision, SamplerName
from diffusion_jax.typing import InputError

if TYPE_CHECKING:  # they are slow to import, and help needs them not
    from diffusion_jax.evaluation.results import Result
    from diffusion_jax.experiment import Experiment
    from diffusion_jax.measuring.models import Model
    from diffusion_jax.measuring.session import Session

AXES = ("sampler", "steps", "guidance", "ema")
INK, COLOURS, MARKERS, DASHES = "#22303c", "tab10", "osD^vPX*", ("-", "--", ":", "-.")


def sweep_options(
    *,
    sampler: tuple[SamplerName, ...] = ("default",),
    steps: tuple[int, ...] = (),
    guidance: tuple[float, ...] = (),
    ema: tuple[float, ...] = (0.0,),
    metrics: tuple[str, ...] = (),
    n: Count | None = None,
    seed: Natural = 0,
    seeds: Count = 1,
    features: str = "",
    weights: str = "",
    precision: Precision = "highest",
    judge: Literal["default", "features", "pixels"] = "default",
    reference: str = "",
    unconditional: bool = False,
    checkpoint: str = "newest",
    batch: Count | None = None,
    out: str = "",
    run: str = "",
    runs: str = "runs",
    devices: Count | None = None,
) -> dict:
    """Samplers x steps x guidance x averages of one checkpoint: a table, and plots against evaluations and seconds.

    What is measured already is kept: the same command goes on where it was stopped.

    Args:
        sampler: samplers, with commas between.
        steps: numbers of sampling steps; by default the experiment's.
        guidance: scales of classifier-free guidance; by default the experiment's.
        ema: relative widths of averages put together from the run's snapshots; 0 is the run's own average.
        metrics: as in make eval, but bits.
        n: number of samples of each row; by default 50000, or 10000 for Fashion-MNIST.
        seed: of the first set of samples.
        seeds: sets of samples of each row, from seed on.
        features: as in make eval.
        weights: the file of the network's weights, where it needs one; the error says which.
        precision: of the feature network's arithmetic.
        judge: of c2st, as in make eval.
        reference: the real examples, as in make eval.
        unconditional: draw without classes from a class-conditional model.
        checkpoint: newest, best, or a step.
        batch: pictures drawn and looked at at a time on each device.
        out: folder of the table and the plots; by default sweep in the run.
        run: name of the run; by default the newest one of the experiment.
        runs: the folder of all runs.
        devices: how many devices to use; by default all.
    """
    return dict(locals())


class Row(NamedTuple):
    """A point of the sweep: its settings, the results of its metrics, seconds a sample and the device they are of."""

    settings: dict[str, Any]
    results: tuple[Result, ...]
    seconds: float
    device: str


def sweep_page(experiment: Experiment, name: str, folder: Path, options: Mapping[str, Any]) -> Iterator[str]:
    """Lines as they are found, and last the table; rows go to a file. InputError for bad input, before any work."""
    from diffusion_jax.measuring import models, session
    from diffusion_jax.training.mesh import make_mesh

    if "bits" in options["metrics"]:
        raise InputError("metrics: bits do not depend on the sampler: make eval tells them")
    options = {**options, "images": "", "texts": "", "params": ""}
    mesh = make_mesh(options["devices"])
    # Every point of the sweep is refused before the first one is measured.
    points = {point: models.make_model(experiment, mesh, {**options, **_named(point)}) for point in _points(options)}
    opened = session.open_session(experiment, Path(name).stem, mesh, options)
    assert opened.lens is not None
    yield opened.lens.opened.said
    out = Path(options["out"]) if options["out"] else folder / "sweep"
    out.mkdir(parents=True, exist_ok=True)
    kept, rows = read_rows(out / "sweep.jsonl"), []
    for width in options["ema"]:
        chosen = models.load(experiment, folder, mesh, {**options, "ema": width or None})
        for point, model in points.items():
            settings = {**_named(point), "ema": width, **_rest(opened, chosen.named)}
            found = kept.get(_key(settings))
            if found is None:
                found = _measured(opened, model, chosen, settings)
                _append(out / "sweep.jsonl", found)
                yield "  ".join([_point_text(settings), *(f"{r.metric} {r.value:.4g}" for r in found.results)])
            rows.append(found)
    yield from _written(out, rows, opened.floors)


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a sweep by their settings; half a line, which a killed sweep may leave, is left out."""
    from diffusion_jax.evaluation.results import read_result
    from diffusion_jax.training.records import read_lines

    rows = {}
    for line in read_lines(path):
        try:
            results = tuple(read_result(json.dumps(result)) for result in line["results"])
            rows[_key(line["settings"])] = Row(line["settings"], results, line["seconds"], line["device"])
        except (KeyError, TypeError):
            raise InputError(f"{path} is not of a sweep: move it away") from None
    return rows


def table(rows: Sequence[Row], floors: Sequence[Result]) -> str:
    """Markdown: a line for each row, the best value of each metric in bold, the floors, and what they are of."""
    metrics = [result.metric for result in rows[0].results]
    best = {m: _best([_value(row, m) for row in rows], m) for m in metrics}
    head = [*AXES, "evaluations", "ms a sample", *metrics]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        p = row.results[0].protocol
        cells = [_axis_text(row.settings, axis) for axis in AXES] + [str(p.evaluations), f"{1e3 * row.seconds:.3g}"]
        lines.append(" | ".join([*cells, *(_cell(result, best[result.metric]) for result in row.results)]))
    under = {result.metric: f"{result.value:.4g}" for result in floors}
    if under:
        lines.append(" | ".join(["real data", *[""] * 5, *(under.get(m, "") for m in metrics)]))
    p, device = rows[0].results[0].protocol, ", ".join(dict.fromkeys(row.device for row in rows))
    told = f"n={p.n}, features {p.features} ({p.features_hash[:12]}), resize {p.resize}, reference {p.reference}"
    seeds = f"seeds {', '.join(map(str, p.seeds))}; checkpoint {rows[0].settings['checkpoint']}; {device}"
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n{told} ({p.reference_n}); {seeds}\n"


def plot(path: Path, rows: Sequence[Row], metric: str, floor: float | None) -> None:
    """Quality against evaluations and against seconds a sample, a line for each sampler, guidance and average."""
    from matplotlib.figure import Figure

    from diffusion_jax.measuring.metrics import LOWER_IS_BETTER

    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(row.settings[axis] for axis in ("sampler", "guidance", "ema")), []).append(row)
    varied = [len({line[i] for line in lines}) > 1 for i in range(3)]
    for line, style in zip(lines.items(), _styles(list(lines)), strict=True):
        _draw_line(axes, *line, metric, varied, style)
    values = [_value(row, metric) for row in rows] + ([] if floor is None else [floor])
    for axis, label in zip(axes, ("network evaluations a sample", "milliseconds a sample"), strict=True):
        if floor is not None:
            axis.axhline(floor, color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label="real against real")
        _plain_log(axis.xaxis)
        if metric in LOWER_IS_BETTER and min(values) > 0 and max(values) > 3 * min(values):
            _plain_log(axis.yaxis)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    p = rows[0].results[0].protocol
    axes[0].set_ylabel(f"{metric}, {'lower' if metric in LOWER_IS_BETTER else 'higher'} is better")
    figure.suptitle(f"{metric} of {p.n:,} samples in features {p.features}, against {p.reference}", color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = max(1, min(len(labels), 120 // (8 + max(map(len, labels)))))
    figure.set_size_inches(10, 4.6 + 0.22 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=130)


def _points(options: Mapping[str, Any]) -> list[tuple]:
    """(sampler, steps, guidance) of every point, without the average."""
    for name in ("sampler", "ema"):
        if not options[name]:
            raise InputError(f"{name}= is empty")
    return list(dict.fromkeys(itertools.product(*(options[axis] or (None,) for axis in AXES[:3]))))


def _named(point: tuple) -> dict[str, Any]:
    return dict(zip(AXES[:3], point, strict=True))


def _rest(opened: Session, checkpoint: str) -> dict[str, Any]:
    """What a row depends on beside its point: two rows are the same measurement if all of it is equal."""
    from diffusion_jax.measuring.evaluate import protocol_of

    assert opened.lens is not None
    options = opened.options
    protocols = [protocol_of(opened.lens, m, opened.n, opened.reals, {}) for m in opened.want.metrics]
    references = sorted({(p.reference, p.reference_hash) for p in protocols})
    return {
        "checkpoint": checkpoint, "unconditional": options["unconditional"], "metrics": list(opened.want.told),
        "n": opened.n, "seeds": [options["seed"], options["seeds"]], "batch": options["batch"],
        "features": opened.lens.opened.net.name, "features_hash": opened.lens.opened.sha256,
        "resize": opened.lens.opened.net.resize, "judge": options["judge"],
        "references": [list(r) for r in references],
    }  # fmt: skip


def _measured(opened: Session, model: Model, chosen: Any, settings: dict[str, Any]) -> Row:
    import jax

    from diffusion_jax.measuring import evaluate, models, session

    seconds = models.seconds_per_sample(model, chosen.params)
    runs = []
    first, count = settings["seeds"]
    for seed in range(first, first + count):
        told = {**model.told, "average": models.average_of(chosen), "seeds": (seed,)}
        pictures = model.draw(chosen.params, opened.n, seed)
        samples = session.look(opened, pictures, _point_text(settings), model.labels(opened.n))
        runs.append(session.results(opened, told, samples)[0])
    device = f"{opened.mesh.size} x {jax.devices()[0].device_kind}"
    return Row(settings, tuple(evaluate.mean_over_seeds(runs)), seconds, device)


def _append(path: Path, row: Row) -> None:
    line = {"settings": row.settings, "seconds": row.seconds, "device": row.device}
    with path.open("a") as file:
        file.write(json.dumps(line | {"results": [json.loads(result.json()) for result in row.results]}) + "\n")


def _written(out: Path, rows: Sequence[Row], floors: Sequence[Result]) -> Iterator[str]:
    text = table(rows, floors)
    (out / "sweep.md").write_text(text)
    yield text.rstrip()
    under = {result.metric: result.value for result in floors}
    pictures = []
    for metric in [result.metric for result in rows[0].results]:
        plot(out / f"sweep-{metric}.png", rows, metric, under.get(metric))
        pictures.append(f"sweep-{metric}.png")
    yield f"{out}: sweep.md, sweep.jsonl, {', '.join(pictures)}"


def _draw_line(
    axes: Any, line: tuple, rows: Sequence[Row], metric: str, varied: Sequence[bool], style: dict[str, Any]
) -> None:
    words = [f"{axis} {_axis_text(rows[0].settings, axis)}" for axis in ("guidance", "ema")]
    label = ", ".join([line[0], *(word for word, shown in zip(words, varied[1:], strict=True) if shown)])
    rows = sorted(rows, key=lambda row: row.results[0].protocol.evaluations)
    y = [_value(row, metric) for row in rows]
    error = [_error(row, metric) for row in rows]
    across = [row.results[0].protocol.evaluations for row in rows], [1e3 * row.seconds for row in rows]
    for axis, x in zip(axes, across, strict=True):
        axis.errorbar(x, y, yerr=error if any(error) else None, capsize=2, label=label, linewidth=1.5, **style)


def _styles(lines: Sequence[tuple]) -> list[dict[str, Any]]:
    """Colour for the sampler, dashes for the guidance, marker for the average."""
    import matplotlib

    colours = matplotlib.colormaps[COLOURS].colors  # pyright: ignore[reportAttributeAccessIssue]
    order = [list(dict.fromkeys(line[i] for line in lines)) for i in range(3)]
    return [
        {
            "color": colours[order[0].index(sampler) % len(colours)],
            "linestyle": DASHES[order[1].index(guidance) % len(DASHES)],
            "marker": MARKERS[order[2].index(width) % len(MARKERS)],
        }
        for sampler, guidance, width in lines
    ]


def _plain_log(axis: Any) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, written as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _value(row: Row, metric: str) -> float:
    return next(result.value for result in row.results if result.metric == metric)


def _error(row: Row, metric: str) -> float:
    error = next(result.standard_error for result in row.results if result.metric == metric)
    return 0.0 if math.isnan(error) else error


def _best(values: Sequence[float], metric: str) -> float:
    from diffusion_jax.measuring.metrics import LOWER_IS_BETTER

    return min(values) if metric in LOWER_IS_BETTER else max(values)


def _cell(result: Result, best: float) -> str:
    error = "" if math.isnan(result.standard_error) else f" ± {result.standard_error:.2g}"
    return f"**{result.value:.4g}**{error}" if result.value == best else f"{result.value:.4g}{error}"


def _axis_text(settings: Mapping[str, Any], axis: str) -> str:
    value = settings[axis]
    if value is None or (axis == "ema" and not value):
        return "own"
    return value if isinstance(value, str) else f"{value:g}"


def _point_text(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{axis}={_axis_text(settings, axis)}" for axis in AXES)
