"""The training loop, which holds the side effects of training: files, the progress bar, signals.

runs/NAME/RUN/experiment.json     the resolved arguments, versions, commit
              metrics.jsonl       one line every `log_every` steps; the last line of a finished run is its result
              checkpoints/        see checkpoint.py
              averages/*.npz      see snapshots.py
              samples/*.png       samples as it learns, from the same noise each time; beside them .gif of video,
                                  .wav of sound (see media.py)
              samples.png         the last of them
              denoising.gif       noise becoming examples

Of several processes (`hosts`) every one goes through all of this with its part of each batch; process 0 writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.experiment import Experiment, initial_state, loss_fn
from diffusion_jax.training import checkpoint, hosts, media, records
from diffusion_jax.training.data import Data, Feed, feed, size, take
from diffusion_jax.training.generate import Pictures, at_a_time, classes_of, example_keys, make_draw, make_pictures
from diffusion_jax.training.mesh import make_mesh, on_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.records import Meter
from diffusion_jax.training.roofline import image_share
from diffusion_jax.training.snapshots import keep_until, save_snapshots
from diffusion_jax.training.state import TrainState
from diffusion_jax.training.step import make_dispatch, make_train_step
from diffusion_jax.typing import Cond, InputError, Params

JUDGED = 512
"""About so many examples on which checkpoints are compared."""
Pending = tuple[int, int, Mapping[str, jax.Array]]
"""The metrics of a dispatch, still on the device: (the step it ended at, its number of steps, f32[k] each)."""


class RunError(RuntimeError):
    """A run had to stop: the message says at which step, what is kept and what to try."""


class Interrupted(RunError):
    """A signal asked the run to stop, and it has saved; `code` is the exit status that says so."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class _Run(NamedTuple):
    """What the phases of a run share."""

    experiment: Experiment
    folder: Path
    record: dict
    mesh: Mesh
    manager: Any
    feed: Feed
    judge: Callable[[Params], float]
    judged: str
    pictures: Pictures

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def averages(self) -> Path:
        return self.folder / "averages"


def fit(
    experiment: Experiment,
    folder: Path,
    record: dict,
    *,
    devices: int | None = None,
    split: bool = False,
    tensor: int = 1,
) -> dict[str, float]:
    """Train, or go on where the run in `folder` stopped; returns the numbers of its last line.

    record: what experiment.json is to say. devices: how many of the devices (default all); split: parameters and
    optimizer state are split over them instead of replicated; tensor: so many devices share the work of each part of
    the batch, by the experiment's `partition`. InputError for what cannot be used, before the long
    compilation; RunError for a loss that is not finite; Interrupted after Ctrl-C or SIGTERM; OSError for a full disk.
    Several processes call it alike, after `hosts.start`.
    """
    hosts.check_alike(record, folder=str(folder), devices=devices, split=split, tensor=tensor)
    mesh = make_mesh(devices, tensor, batch=experiment.batch // experiment.accumulate)
    rows = hosts.rows_of(mesh, experiment.batch)
    draw = make_draw(experiment)
    hosts.on_first(lambda: _prepare_folder(folder), "run folder")
    hosts.check_shared(folder)
    data = hosts.first_then_others(experiment.data, "data")
    _check_data(experiment, data)
    run = _Run(
        experiment,
        folder,
        record,
        mesh,
        checkpoint.open_checkpoints(folder / "checkpoints", _say, experiment.keep),
        feed(data.train, experiment.batch, experiment.seed, rows=rows),
        _make_judge(experiment, data, mesh),
        "ema_loss" if data.test is None else "heldout_loss",
        make_pictures(draw, mesh, at_a_time(experiment), experiment.decode),
    )
    return _run_through(run, split)


def _run_through(run: _Run, split: bool) -> dict[str, float]:
    """From the state there is to the last line."""
    experiment, folder, record = run.experiment, run.folder, run.record
    try:
        state, shardings = _start(run, split)
        finished = hosts.on_first(lambda: records.result(run.metrics, experiment.steps), "result")
        if finished is not None and int(state.step) >= experiment.steps:
            _say(f"already finished at step {int(state.step)}: {folder}; give run=NAME for another, or remove it")
            return finished
        records.write_record(folder / "experiment.json", record)
        records.keep_lines_until(run.metrics, int(state.step))
        keep_until(run.averages, int(state.step))
        return _finish(run, _train(run, state, shardings))
    finally:
        run.feed.close()
        # An error of one of several processes must not make it wait here for the others.
        if not (hosts.several() and sys.exc_info()[0]):
            with contextlib.suppress(Exception):  # What could not be written has been raised before.
                run.manager.close()


def _start(run: _Run, split: bool) -> tuple[TrainState, Any]:
    experiment = run.experiment
    shapes = jax.eval_shape(partial(initial_state, experiment))
    shardings = state_shardings(run.mesh, shapes, split, experiment.partition)
    like = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    restored = checkpoint.restore(run.manager, like, _say)
    if restored is None:
        return _begin(run, shardings), shardings
    state, meta = restored
    run.feed.set_state(meta["position"])
    changed = records.changed_arguments(run.folder / "experiment.json", run.record)
    _say(
        f"going on from step {int(state.step)} of {run.folder}"
        + (f", with other arguments than before ({', '.join(changed)})" if changed else "")
    )
    return state, shardings


def _begin(run: _Run, shardings: Any) -> TrainState:
    """The state of a new run; where its parameters are given, from them."""
    experiment = run.experiment
    if experiment.start is None:
        return jax.jit(partial(initial_state, experiment), out_shardings=shardings)()
    params = hosts.place(experiment.start(), replicated(run.mesh))
    return jax.jit(partial(initial_state, experiment), out_shardings=shardings)(params)


def _train(run: _Run, state: TrainState, shardings: Any) -> TrainState:
    experiment, step = run.experiment, int(state.step)
    dispatch, place = _compiled_dispatch(run, shardings), split_axis(run.mesh, 1)
    resident = run.feed.resident
    if resident is not None:
        resident = hosts.place(dict(resident), replicated(run.mesh))
    pending, meter, saved = None, Meter(share=image_share(experiment, run.mesh)), step or None
    with _signals() as asked, _bar(experiment, step) as bar:
        stopping = hosts.make_agreement(run.mesh, lambda: asked[0] if asked else 0)
        while step < experiment.steps and not stopping():
            n = _until_next_stop(experiment, step)
            batches = hosts.place(_padded(run.feed.next(n), experiment.dispatch), place, experiment.batch, axis=1)
            state, metrics = dispatch(state, resident, batches, np.int32(n))
            step += n
            # The metrics of one dispatch are fetched while the next one runs, so that the device never waits.
            meter, pending = _log(run, bar, meter, pending), (step, n, metrics)
            if step < experiment.steps and _pauses(experiment, step):
                meter, pending = _log(run, bar, meter, pending), None
                saved = _pause(run, state, step) or saved
                meter = records.restarted(meter)
        records.write_meter(run.metrics, step, _log(run, bar, meter, pending))
        if step != saved:
            _save(run, state)
        if experiment.snapshot_every and step >= experiment.steps:
            save_snapshots(run.averages, state, experiment.ema)
        checkpoint.wait(run.manager)
        number = max(hosts.gather(asked[0] if asked else 0, "end of training"))
        if number:
            raise _interrupted(run, number, step)
    return state


def _pause(run: _Run, state: TrainState, step: int) -> int | None:
    """What is due between two steps; the step, if it is saved."""
    experiment, saving = run.experiment, _due(run.experiment.checkpoint_every, step)
    if saving:
        _save(run, state)
    if _due(experiment.snapshot_every, step):
        save_snapshots(run.averages, state, experiment.ema)
    if _due(experiment.sample_every, step):
        _sample_grid(run, state, f"samples/step_{step:07d}.png")
    return step if saving else None


def _compiled_dispatch(run: _Run, shardings: Any) -> Any:
    return dispatch_program(run.experiment, run.mesh, shardings)


def dispatch_program(experiment: Experiment, mesh: Mesh, shardings: Any) -> Any:
    """The jitted program of a run, `make_dispatch` of its step: the state is donated, metrics are on every device."""
    step = make_train_step(
        loss_fn(experiment), experiment.optimizer, experiment.ema, experiment.accumulate, staged=experiment.staged
    )
    whole = replicated(mesh)
    return jax.jit(
        on_mesh(make_dispatch(step), mesh),
        donate_argnums=0,
        in_shardings=(shardings, whole, split_axis(mesh, 1), whole),
        out_shardings=(shardings, whole),
    )


def _make_judge(experiment: Experiment, data: Data, mesh: Mesh) -> Callable[[Params], float]:
    """The loss of given parameters on always the same examples, held-out ones if there are, with the same noise."""
    source = data.train if data.test is None else data.test
    batch, n = experiment.batch // experiment.accumulate, size(source)
    parts = max(1, min(JUDGED, n) // batch)
    chosen = np.resize(np.random.default_rng(0).permutation(n), (parts, batch))
    own, where = hosts.rows_of(mesh, batch), split_axis(mesh)
    batches = [hosts.place(take(source, rows[own]), where, batch) for rows in chosen]
    loss = loss_fn(experiment, train=False)
    judged = on_mesh(lambda params, b, i: loss(params, b, jax.random.key(i)), mesh)
    program = jax.jit(judged, out_shardings=replicated(mesh))

    def judge(params: Params) -> float:
        return float(np.mean([program(params, b, np.int32(i)) for i, b in enumerate(batches)]))

    return judge


def _log(run: _Run, bar: Any, meter: Meter, pending: Pending | None) -> Meter:
    """Wait for the metrics of a dispatch, check them, show them, and write them when a line is due."""
    if pending is None:
        return meter
    step, n, metrics = pending
    losses, norms = (np.asarray(metrics[name])[:n] for name in ("loss", "grad_norm"))
    for i in range(n):
        for name, value in (("loss", losses[i]), ("gradient norm", norms[i])):
            if not np.isfinite(value):
                raise _not_finite(run, name, value, step - n + 1 + i)
    meter = records.measured(meter, losses, norms, n * run.experiment.batch)
    bar.set_description_str("training", refresh=False)
    bar.set_postfix_str(f"loss {np.mean(meter.losses[-100:]):.4f}, {meter.shown}", refresh=False)
    bar.update(n)
    return records.write_meter(run.metrics, step, meter) if _due(run.experiment.log_every, step) else meter


def _save(run: _Run, state: TrainState) -> None:
    """Begin to save, unless the parameters have gone bad since the last loss was computed."""
    step, metric = int(state.step), run.judge(state.ema)
    for name, value in ((run.judged, metric), ("loss of the newest parameters", run.judge(state.params))):
        if not np.isfinite(value):
            raise _not_finite(run, name, value, step)
    records.write_line(run.metrics, {"step": step, run.judged: metric})
    checkpoint.save(run.manager, state, run.feed.get_state(), run.record, metric)


def _finish(run: _Run, state: TrainState) -> dict[str, float]:
    """Pictures and numbers of a trained run; its last line."""
    _say("drawing samples …")
    _sample_grid(run, state, "samples.png")
    _animate(run, state)
    export = run.experiment.export
    if export is not None:
        averaged = jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated(run.mesh))(state.ema))
        hosts.on_first(lambda: export(averaged, run.folder), "export")
    line: dict[str, Any] = {"step": int(state.step), "finished": True}
    if run.experiment.evaluate is not None:

        def draw(labels: np.ndarray, seed: int) -> np.ndarray:
            return np.concatenate(list(run.pictures(state.ema, len(labels), seed, labels)))

        line |= run.experiment.evaluate(draw)
    records.write_line(run.metrics, line)
    return line


def _grid_labels(experiment: Experiment, rows: int) -> tuple[int, int, Cond]:
    """(examples, columns, conditions) of a sample grid: a column for each class, up to ten, or for each text."""
    classes = classes_of(experiment)
    if experiment.texts and experiment.read_texts is not None:
        columns = len(experiment.texts)
        return columns * rows, columns, experiment.read_texts(experiment.texts * rows)
    if classes is None:
        return rows * 8, 8, None
    columns = min(10, classes)
    return columns * rows, columns, np.arange(columns * rows, dtype=np.int32) % columns


def _sample_grid(run: _Run, state: TrainState, name: str) -> None:
    how = media.look(run.experiment)
    n, columns, labels = _grid_labels(run.experiment, media.ROWS[how.kind])
    if n == 0:
        return
    examples = np.concatenate(list(run.pictures(state.ema, n, 0, labels)))
    if not hosts.first():
        return
    path = run.folder / name
    path.parent.mkdir(exist_ok=True)
    media.save_sheet(path, examples, columns, how)


def _animate(run: _Run, state: TrainState) -> None:
    if run.experiment.drawing is not None:
        return
    how = media.look(run.experiment)
    n, columns, labels = _grid_labels(run.experiment, min(4, media.ROWS[how.kind]))
    if n == 0:
        return
    film = media.film_program(make_draw(run.experiment, trajectory=True), run.experiment.decode)
    drawn = on_mesh(lambda params, rows: film(params, example_keys(0, 0, n), rows), run.mesh)
    program = jax.jit(drawn, out_shardings=replicated(run.mesh))
    frames = np.asarray(program(state.ema, labels))
    if hosts.first():
        media.save_film(run.folder / "denoising.gif", frames, columns, how)


def _not_finite(run: _Run, name: str, value: float, step: int) -> RunError:
    saved, kept = run.manager.latest_step(), "no checkpoint had been saved"
    if saved is not None:
        kept = f"the last good checkpoint is step {saved}, where run={run.folder.name} with other arguments goes on"
    return RunError(
        f"the {name} is {value} at step {step}; {kept}. Try a lower learning rate, a longer warm-up, "
        "stronger gradient clipping, or float32 instead of bfloat16"
    )


def _interrupted(run: _Run, number: int, step: int) -> Interrupted:
    return Interrupted(
        f"stopped by {signal.Signals(number).name} at step {step} of {run.experiment.steps}, all saved in "
        f"{run.folder}; to go on, give the same command again",
        128 + number,
    )


def _until_next_stop(experiment: Experiment, step: int) -> int:
    """Steps of the next dispatch: never past the end, a line of the log, a checkpoint or a sample grid."""
    stops = [experiment.steps]
    for every in (experiment.log_every, *_intervals(experiment)):
        if every:
            stops.append((step // every + 1) * every)
    return min(experiment.dispatch, min(stops) - step)


def _pauses(experiment: Experiment, step: int) -> bool:
    return any(_due(every, step) for every in _intervals(experiment))


def _intervals(experiment: Experiment) -> tuple[int, ...]:
    """How often the device has to wait for the host."""
    return experiment.checkpoint_every, experiment.sample_every, experiment.snapshot_every


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _padded(batches: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([leaf, np.repeat(leaf[-1:], k - len(leaf), axis=0)]) if len(leaf) < k else leaf
        for name, leaf in batches.items()
    }


def _check_data(experiment: Experiment, data: Data) -> None:
    if tuple(data.shape) != tuple(experiment.shape):
        raise InputError(f"the data has examples of shape {data.shape}, the experiment wants {experiment.shape}")
    classes = classes_of(experiment)
    if classes is not None and len(data.classes) != classes:
        raise InputError(f"the experiment is for {classes} classes, the data has {len(data.classes)}")


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write in the run folder {folder}: {error.strerror}") from None


def _bar(experiment: Experiment, start: int) -> Any:
    pause = 0.2 if sys.stderr.isatty() else 10
    total = experiment.steps
    return tqdm(
        total=total,
        initial=start,
        desc="compiling",
        unit="step",
        dynamic_ncols=True,
        mininterval=pause,
        disable=not hosts.first(),
    )


def _say(message: str) -> None:
    if hosts.first():
        tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have asked the run to stop; a second one stops it at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)
        # Not through Python's buffered stream, which may be in the middle of a write.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing this step and saving; once more to stop at once\n".encode())

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Only the main thread may listen to signals; a notebook's worker thread goes without.
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
