"""Where the time of a training step goes: some real steps, watched by JAX's profiler.

The program is a run's own (`loop.dispatch_program`), on the experiment's data or on numbers of its form. Steps are
timed without the profiler first: it costs time itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment, initial_state, loss_fn
from diffusion_jax.planning.estimate import KINDS, kind_of, origin_of
from diffusion_jax.planning.hlo import Op, Program
from diffusion_jax.planning.report import duration, table
from diffusion_jax.planning.trace import Times, newest_trace, op_times, read_trace
from diffusion_jax.training.data import feed
from diffusion_jax.training.loop import dispatch_program
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.roofline import Chip, batch_shapes, peak_flops, train_flops

ENCLOSING = ("while", "conditional", "call")
WARM_UP = 2


def profile(
    experiment: Experiment,
    folder: Path,
    *,
    made_up: bool = False,
    steps: int = 5,
    devices: int | None = None,
    split: bool = False,
    tensor: int = 1,
    chip: Chip | None = None,
    peak: str = "",
) -> str:
    """A page of text; the trace lies in `folder`, for Perfetto or TensorBoard. InputError as in `loop.fit`.

    made_up: random numbers instead of the data set. steps: dispatches to watch. chip, peak: what the roofline is
    reckoned with, where the device is not in the table.
    """
    mesh = make_mesh(devices, tensor, batch=experiment.batch // experiment.accumulate)
    shapes = jax.eval_shape(lambda: initial_state(experiment))
    shardings = state_shardings(mesh, shapes, split, experiment.partition)
    resident, draw = _batches(experiment, mesh, made_up)
    state = jax.jit(lambda: initial_state(experiment), out_shardings=shardings)()
    count = np.int32(experiment.dispatch)
    compiled = dispatch_program(experiment, mesh, shardings).lower(state, resident, draw(), count).compile()
    text = compiled.as_text()
    for _ in range(WARM_UP):
        state, metrics = compiled(state, resident, draw(), count)
    jax.block_until_ready(metrics)
    state, plain, host = _run(compiled, state, resident, draw, count, steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        state, watched, _ = _run(compiled, state, resident, draw, count, steps)
    path = newest_trace(folder)
    program = Program(text)
    every = {op.name: (name, op) for name, ops in program.computations.items() for op in ops.values()}
    outer = [name for name, (_, op) in every.items() if op.opcode in ENCLOSING]
    module = re.match(r"HloModule ([\w.\-]+)", text)
    times = op_times(read_trace(path), module[1] if module else "", outer)
    model = train_flops(experiment, loss_fn(experiment), batch_shapes(experiment)) / mesh.size
    known = peak_flops(_kind(mesh), peak) or (chip.flops if chip else None)
    n = steps * experiment.dispatch
    head = _head(experiment, mesh, model, plain / n, watched / n, host / n, times, steps, known)
    return "\n\n".join(
        [head, _by_kind(program, every, times, n, chip), _top(program, every, times, n, chip), str(path)]
    )


def _batches(experiment: Experiment, mesh: Mesh, made_up: bool) -> tuple[Any, Callable[[], Any]]:
    """(resident arrays or None, a function that puts the next dispatch's batches on the devices)."""
    place = split_axis(mesh, 1)
    if made_up:
        batches = {name: _made_up(leaf, experiment.dispatch) for name, leaf in batch_shapes(experiment).items()}
        return None, lambda: jax.device_put(batches, place)
    stream = feed(experiment.data().train, experiment.batch, experiment.seed)
    resident = None if stream.resident is None else jax.device_put(dict(stream.resident), replicated(mesh))
    return resident, lambda: jax.device_put(stream.next(experiment.dispatch), place)


def _made_up(shapes: Any, k: int) -> Any:
    rng = np.random.default_rng(0)

    def one(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (k, *leaf.shape)
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, shape, np.uint8)
        if np.issubdtype(leaf.dtype, np.integer):
            return np.zeros(shape, leaf.dtype)
        return rng.standard_normal(shape, np.float32).astype(leaf.dtype)

    return jax.tree.map(one, shapes)


def _run(program: Any, state: Any, resident: Any, draw: Callable[[], Any], count: Any, steps: int) -> tuple:
    """(the state, seconds of all steps, seconds of them in which the host made batches)."""
    host, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batches = draw()
        host += time.perf_counter() - before
        state, metrics = program(state, resident, batches, count)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - start, host


def _head(
    experiment: Experiment, mesh: Mesh, model: float, step: float, watched: float, host: float, times: Times,
    runs: int, peak: float | None,
) -> str:  # fmt: skip
    idle = max(0.0, times.span - times.busy) / max(times.span, 1e-12)
    lines = [
        f"{mesh.size} x {_kind(mesh)}, batch {experiment.batch}, {runs * experiment.dispatch} steps: "
        f"{duration(step)} a step ({duration(watched)} while watched), {experiment.batch / step:,.0f} examples/s",
        f"the host makes and sends a batch in {duration(host)}; the device waits {100 * idle:.1f} % of the time",
        f"model FLOPs of a step {model / 1e9:,.4g} G per device, {model / step / 1e9:,.4g} GFLOP/s",
    ]
    if peak is not None:
        lines[-1] += f", utilisation (MFU) {100 * model / step / peak:.1f} % of {peak / 1e12:.4g} TFLOP/s"
    return "\n".join(lines)


def _kind(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind


def _by_kind(program: Program, every: Mapping[str, tuple[str, Op]], times: Times, steps: int, chip: Chip | None) -> str:
    sums = {kind: [0.0, 0, 0, 0.0] for kind in KINDS}
    for name, (seconds, number) in times.ops.items():
        kind, flops, moved = _asked(program, every, name)
        row = sums[kind]
        for i, value in enumerate((seconds, flops * number, moved * number, number * _floor(flops, moved, chip))):
            row[i] += value
    total = sum(row[0] for row in sums.values())
    rows: list[tuple[str, ...]] = [
        ("kind of operation", "ms a step", "share", "GFLOP/s", "GB/s", *(["floor, ms"] if chip else []))
    ]
    for kind, (seconds, flops, moved, floor) in sorted(sums.items(), key=lambda item: -item[1][0]):
        if seconds:
            cells = [f"{1e3 * seconds / steps:.3f}", f"{100 * seconds / total:.1f} %", f"{flops / seconds / 1e9:,.1f}",
                     f"{moved / seconds / 1e9:,.1f}"]  # fmt: skip
            rows.append((kind, *cells, *([f"{1e3 * floor / steps:.3f}"] if chip else [])))
    return table(rows, "")


def _top(program: Program, every: Mapping[str, tuple[str, Op]], times: Times, steps: int, chip: Chip | None) -> str:
    total = sum(seconds for seconds, _ in times.ops.values())
    rows = [("operation", "ms a step", "share", "times", "kind", "from")]
    for name, (seconds, number) in sorted(times.ops.items(), key=lambda item: -item[1][0])[:20]:
        kind, _, _ = _asked(program, every, name)
        op = every[name][1] if name in every else None
        where = _where(program, op) if op else ""
        rows.append(
            (
                name[:44],
                f"{1e3 * seconds / steps:.3f}",
                f"{100 * seconds / total:.1f} %",
                f"{number / steps:g}",
                kind,
                where,
            )
        )
    return table(rows, "")


def _asked(program: Program, every: Mapping[str, tuple[str, Op]], name: str) -> tuple[str, int, int]:
    """(kind, operations, bytes) of an operation by its name in the trace."""
    if name not in every:
        return "other", 0, 0
    computation, op = every[name]
    flops = program.flops(op, computation)
    return kind_of(program, op, flops), flops, program.bytes(op, computation)


def _floor(flops: float, moved: float, chip: Chip | None) -> float:
    return max(flops / chip.flops, moved / chip.bandwidth) if chip else 0.0


def _where(program: Program, op: Op) -> str:
    """The innermost functions of the network that it came from, and JAX's operation."""
    op = origin_of(program, op)
    names = [name.replace(".<locals>", "") for name in program.functions.get(op.frame, ())[:2]]
    return " < ".join([op.source.rsplit("/", 1)[-1], *names])[:60]
