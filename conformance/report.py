"""The measures as one table: Markdown, JSON and a picture."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from conformance.samplers import COUNTS, EXAMPLES, INTERVALS, LEVEL, STEPS, TESTS

Rows = list[dict[str, Any]]

HEAD = """# Conformance

Every sampler, likelihood and inverse-problem method of this toolkit, held against exact answers. Nothing is trained and
nothing downloaded: the data are mixtures of Gaussians, whose perfect denoiser has a closed form. Pictures of the same
run are in [gallery.md](gallery.md), all numbers in [conformance.json](conformance.json).

    make conformance ARGS="out=docs/conformance"

{machine}

**{verdict}**
"""

COLUMNS = """
**Columns.** *Order*: theory's, and the slope of log error over the last three of 8, 16, ... 512 steps whose error is above
rounding (1e-11), in float64. For a deterministic sampler the error is that of the probability flow: on a mixture in one
dimension against its exact map, the quantile map F_s^-1(F_t(x)), root mean square over 33 quantiles; on Gaussians in
three dimensions against the exact mean and standard deviation. For a random one it is the Wasserstein-2 distance from
the exact law on those Gaussians, computed and not drawn: there a sampler is affine in its start and in its noise. It has to
be within 0.1 of theory, from the third order on at least theory less 0.2. Interval: {intervals}. Grid: t_i = high - (high - low)
(i / n)^2, so that steps differ in length and the low order in which a multistep method starts, its first step
being O(n^-2) long, is not what is seen: on n equal steps from a point where the flow is not yet straight such a method
may fall back to the order of its start.
*Evaluations*: of the denoiser in a step in the middle of the grid, counted as they ran; then the fewest in all, over {counts}
steps of the problem's own grid, for an error of 1e-2 and 1e-3 of the data's standard deviation (of the same two errors as
above, so that deterministic and random samplers are only roughly comparable).
*1-D and 64-D*: n float32 examples after the stated number of steps against a mixture of two Gaussians, in 64 dimensions
with rotated covariances: {examples}. Errors of mean and covariance, relative to the law's; p-values of Kolmogorov and
Smirnov's test (in 64-D on eight directions) and of the maximum mean discrepancy with 128 random Fourier features, whose
null distribution is known. Mean and covariance are tested as well; all p are corrected for these four tests (Bonferroni)
and have to exceed {level}; one that does not is measured once more on fresh draws with another key, and counts if it fails
again. Steps: {steps} evaluations, a quarter of it where the order is two or more, in steps of at least 50.
*Traces*: how often JAX traced the sampler for other keys, examples and times of the grid; more than 1 is a recompilation.
*Holds*: whether all that theory or the entry in `conformance/table.py` claims was measured; if not, what was missed.
"""


def number(value: float | None, digits: int = 2) -> str:
    """A cell: `-` for None, and no more digits than mean something."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    if value != 0 and (abs(value) < 10**-digits or abs(value) >= 1e4):
        return f"{value:.0e}"
    return f"{value:.{digits}f}"


def sampler_cells(row: dict[str, Any], note: str) -> dict[str, str]:
    """The row of a sampler as text."""
    needed, laws = row.get("needed", {}), row.get("laws", {})
    cells = {
        "sampler": f"`{row['name']}`{note}",
        "kind": "random" if row["random"] else "flow",
        "problem": row["problem"],
        "order": number(row["theory"], 0),
        "measured": number(row.get("order")),
        "on Gaussians": number(row.get("order_gaussian")),
        "evaluations": number(row.get("evaluations")),
        "for 1e-2": budget(needed, "0.01"),
        "for 1e-3": budget(needed, "0.001"),
        "traces": number(row.get("traces")),
    }
    for name, law in laws.items():
        cells[f"{name} steps"] = number(law["steps"])
        cells[f"{name} mean, cov."] = f"{law['mean_error']:.3f}, {law['covariance_error']:.3f}"
        cells[f"{name} p: KS, MMD"] = f"{number(law['ks'])}, {number(law['mmd'])}"
    return cells | {"holds": "yes" if not row["misses"] else "**no**: " + "; ".join(row["misses"])}


def budget(needed: dict[str, int | None], tolerance: str) -> str:
    return "-" if tolerance not in needed else str(needed[tolerance] or f"> {COUNTS[-1]} steps")


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table with the columns of all rows, aligned so that it can be read as text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "-") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def sampler_table(rows: Rows) -> str:
    """The table and its footnotes."""
    remarks = list(dict.fromkeys(row["remark"] for row in rows if row["remark"]))
    notes = [f" [{remarks.index(row['remark']) + 1}]" if row["remark"] else "" for row in rows]
    table = markdown([sampler_cells(row, note) for row, note in zip(rows, notes, strict=True)])
    return table + "\n\n" + "\n".join(f"[{i}] {remark}.  " for i, remark in enumerate(remarks, 1))
