"""The measures as one table: Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conformance import likelihood, posterior
from conformance.samplers import COUNTS, DOUBLINGS, EXAMPLES, INTERVALS, LEVEL, STEPS

Row = dict[str, Any]

HEAD = """# Conformance

Every sampler, likelihood and inverse-problem method of this toolkit, held against exact answers. Nothing is trained and
nothing downloaded: the data are mixtures of Gaussians, whose perfect denoiser has a closed form. All numbers are in
[conformance.json](conformance.json), and pictures of the same run in the [gallery](gallery.md).

```bash
make conformance ARGS="out=docs/conformance"
```

{machine}

**{verdict}**

![The table as a picture](conformance.png)

## Samplers

"""

_PLACES = ", ".join(f"`{name}` from t = {high:g} to {low:g}" for name, (high, low) in INTERVALS.items())
_SETS = " and ".join(f"{n} in {dimension}" for dimension, n in EXAMPLES.items())
COLUMNS = f"""
- **order**: theory's, then as measured in float64. On *Gaussians* in three dimensions the error is the Wasserstein-2
  distance between the sampler's law and the exact one, without any drawing: there a sampler is affine in its start and
  in its noise, so that both laws are Gaussian and known. For a random sampler this is its weak order. On a *mixture* in
  one dimension the error of a deterministic sampler is the distance from the exact probability flow, which is the
  quantile map F_s^-1(F_t(x)): root mean square over 33 quantiles. The order is the slope of log error over the last
  three of {DOUBLINGS[0]}, {DOUBLINGS[1]}, ... {DOUBLINGS[-1]} steps whose error is above 1e-11, extrapolated to
  infinitely many steps: 2 p(n) - p(n / 2). It has to be within 0.1 of theory; from the third order on, at least theory
  less 0.2.
- It is measured on
  {_PLACES},
  on the grid t_i = high - (high - low) (i / n)^2: neighbouring steps differ in length, and the first one has length
  O(n^-2), so that the low order in which a multistep method starts is not what is seen. On equal steps, from a time at
  which the flow is already curved, such a method falls back to the order of its start.
- **evaluations**: of the denoiser in a step in the middle of the grid, counted as they ran. **for 1e-2, 1e-3**: the
  fewest in all, over {COUNTS[0]} to {COUNTS[-1]} steps of the problem's own grid, that bring the error below that part
  of the data's standard deviation; the error on the mixture for a deterministic sampler, on Gaussians for a random one,
  which compare only roughly.
- **1-D, 64-D**: float32 examples against a mixture of two Gaussians, in 64 dimensions with rotated covariances:
  {_SETS}, after the stated number of steps (about {STEPS} evaluations, a quarter where the order is two or more).
  Errors of mean and covariance, relative to the law's own; p-values of Kolmogorov and Smirnov's test (in 64-D on eight
  directions) and of the maximum mean discrepancy over 128 random Fourier features, whose null distribution is known.
  Mean and covariance are tested too. Each p of these four has to exceed {LEVEL} = 0.01 / 4; if one does not, all
  is drawn anew with another key, once, and that counts. "exact" is what exact draws give.
- **traces**: how often JAX traced one jitted step in a loop over two grids with two keys. More than 1 recompiles.
- **holds**: whether all was measured that theory, and the entry in `conformance/table.py`, claim.
"""


def machine(seconds: float) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy", "scipy", "diffrax"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{seconds:.0f} s on {cores} cores ({platform.machine()}), Python {platform.python_version()}, {versions}."


def number(value: Any, digits: int = 2) -> str:
    """A cell: `-` for None, and no more digits than mean something."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "**no**"}[value]
    if not isinstance(value, float):
        return str(value)
    if value != 0 and (abs(value) < 0.5 * 10**-digits or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def sampler_cells(row: Row) -> dict[str, str]:
    """The row of a sampler as text."""
    orders, needed = row.get("orders", {}), row.get("needed", {})
    cells = {
        "sampler": f"`{row['name']}`" + (f" [{row['note']}]" if row.get("note") else ""),
        "problem": row["problem"],
        "order": "-" if row["theory"] is None else f"{row['theory']:g}",
        "on Gaussians": number(orders.get("Gaussians")),
        "on a mixture": number(orders.get("mixture")),
        "evaluations": number(row.get("evaluations")),
        "for 1e-2, 1e-3": ", ".join(str(k or f"> {COUNTS[-1]} steps") for k in needed.values()) or "-",
        "traces": number(row.get("traces")),
    }
    for name, law in row.get("laws", {}).items():
        cells[f"{name} steps"] = str(law["steps"] or "-")
        cells[f"{name} mean, covariance"] = f"{law['mean_error']:.3f}, {law['covariance_error']:.3f}"
        cells[f"{name} p: KS, MMD"] = ", ".join("< 1e-4" if law[k] < 1e-4 else f"{law[k]:.2g}" for k in ("ks", "mmd"))
    held = "yes" if row.get("claims_law", True) else "yes, without a claim to the law"
    return cells | {"holds": "**no**: " + "; ".join(row["misses"]) if row["misses"] else held}


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table with the columns of all rows, padded so that it can be read as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "-").replace("|", "\\|") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def sampler_table(rows: list[Row], floor: dict[str, Row]) -> str:
    """The table, first what exact draws give, and its footnotes."""
    remarks = list(dict.fromkeys(row["remark"] for row in rows if row["remark"]))
    rows = [row | {"note": remarks.index(row["remark"]) + 1 if row["remark"] else None} for row in rows]
    best = {"name": "exact", "problem": "-", "theory": None, "laws": floor, "misses": []}
    table = markdown([sampler_cells(best) | {"holds": "-"}, *map(sampler_cells, rows)])
    return table + "\n\n" + "\n".join(f"[{i}] {remark}.  " for i, remark in enumerate(remarks, 1))


def plain_table(rows: list[Row]) -> str:
    """A table of rows that all have the same columns."""
    return markdown([{name: number(value, 3) for name, value in row.items()} for row in rows])


def missing(rows: list[Row], others: list[Row]) -> list[str]:
    """The rows that miss something that they claim."""
    names = [row["name"] for row in rows if row["misses"]]
    return names + [
        " ".join(str(row.get(k, "")) for k in ("method", "schedule")) for row in others if row.get("ok") is False
    ]


def write(folder: Path, results: dict[str, Any], seconds: float) -> tuple[str, bool]:
    """README.md and conformance.json in the folder; returns the page, and whether all holds."""
    rows, others = results["samplers"], [*results["likelihood"], *results["posterior"]]
    missed = missing(rows, others)
    verdict = f"All {len(rows)} samplers and all {len(others)} other rows hold what they claim."
    if missed:
        verdict = f"{len(missed)} of {len(rows) + len(others)} rows miss what they claim: {', '.join(missed)}."
    page = (
        HEAD.format(machine=machine(seconds), verdict=verdict) + sampler_table(rows, results["floor"]) + "\n" + COLUMNS
    )
    for title, module in (("Likelihood", likelihood), ("Posterior sampling", posterior)):
        page += f"\n## {title}\n\n{module.__doc__}\n{plain_table(results[module.__name__.split('.')[-1]])}\n"
    (folder / "README.md").write_text(page)
    numbers = {"machine": machine(seconds), "verdict": verdict} | results
    (folder / "conformance.json").write_text(lines(numbers))
    return page, not missed


def lines(results: dict[str, Any]) -> str:
    """JSON, one line for each row, with four digits."""
    parts = []
    for name, value in results.items():
        text = json.dumps(short(value))
        if isinstance(value, list):
            text = "[\n" + ",\n".join("  " + json.dumps(short(row)) for row in value) + "\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def short(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): short(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
