"""The training loop: the only file of the package that writes, prints and listens to signals.

runs/NAME/RUN/experiment.json     the resolved arguments, versions, commit
              metrics.jsonl       one line every `log_every` steps; the last line of a finished run is its result
              checkpoints/        see checkpoint.py
              samples/*.png       sample grids as it learns, from the same noise each time
              samples.png         the last of them
              denoising.gif       noise becoming pictures
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.experiment import Experiment
from diffusion_jax.training import checkpoint
from diffusion_jax.training.data import Data, Feed, feed, size, take, to_uint8
from diffusion_jax.training.generate import Pictures, example_keys, make_draw, make_pictures
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.pictures import fitting_scale, grid, save_animation, save_picture
from diffusion_jax.training.state import TrainState, init_state
from diffusion_jax.training.step import LossFn, make_dispatch, make_loss_fn, make_train_step
from diffusion_jax.typing import InputError

HELD_OUT = 512
"""Examples of the held-out split on which checkpoints are compared."""


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
    data: Data
    manager: Any
    feed: Feed
    held_out: Any
    pictures: Pictures


def fit(
    experiment: Experiment, folder: Path, record: dict, *, devices: int | None = None, split: bool = False
) -> dict[str, float]:
    """Train, or go on where the run in `folder` stopped; returns the numbers of its last line.

    record: what experiment.json is to say. devices: how many of the devices (default all); split: parameters and
    optimizer state are split over them instead of replicated. InputError for what cannot be used, before the long
    compilation; RunError for a loss that is not finite; Interrupted after Ctrl-C or SIGTERM; OSError for a full disk.
    """
    mesh = make_mesh(devices, experiment.batch // experiment.accumulate)
    _prepare_folder(folder)
    data = experiment.data()
    _check_data(experiment, data)
    stream = feed(data.train, experiment.batch, experiment.seed)
    manager = checkpoint.open_checkpoints(folder / "checkpoints", experiment.keep)
    held_out = _held_out_loss(experiment, data, mesh)
    pictures = make_pictures(make_draw(experiment), mesh, _grid_labels(experiment)[0])
    run = _Run(experiment, folder, record, mesh, data, manager, stream, held_out, pictures)
    try:
        state, shardings = _start(run, split)
        finished = _finished(folder, experiment.steps)
        if finished is not None and int(state.step) >= experiment.steps:
            _say(f"already finished at step {int(state.step)}: {folder}; give run=NAME for another, or remove it")
            return finished
        _write_json(folder / "experiment.json", record)
        _keep_metrics_until(folder, int(state.step))
        state = _train(run, state, shardings)
        return _finish(run, state)
    finally:
        stream.close()
        with contextlib.suppress(Exception):  # What could not be written has been raised before.
            manager.close()


def _start(run: _Run, split: bool) -> tuple[TrainState, Any]:
    experiment = run.experiment

    def init() -> TrainState:
        return init_state(jax.random.key(experiment.seed), experiment.net, experiment.optimizer)

    shapes = jax.eval_shape(init)
    shardings = state_shardings(run.mesh, shapes, split)
    like = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    restored = checkpoint.restore(run.manager, like, _say)
    if restored is None:
        return jax.jit(init, out_shardings=shardings)(), shardings
    state, meta = restored
    run.feed.set_state(meta["position"])
    _say(f"going on from step {int(state.step)} of {run.folder}")
    return state, shardings


def _train(run: _Run, state: TrainState, shardings: Any) -> TrainState:
    experiment, start = run.experiment, int(state.step)
    dispatch = _compiled_dispatch(run, shardings)
    resident = None
    if run.feed.resident is not None:
        resident = jax.device_put(dict(run.feed.resident), replicated(run.mesh))
    rows = split_axis(run.mesh, 1)
    step, pending, log = start, None, _Log(run, start)
    last_saved = start if start else -1
    with _signals() as asked, _bar(experiment, start) as bar:
        while step < experiment.steps and not asked:
            n = _until_next_stop(experiment, step)
            batches = jax.device_put(_padded(run.feed.next(n), experiment.dispatch), rows)
            state, metrics = dispatch(state, resident, batches, np.int32(n))
            step += n
            # The metrics of one dispatch are fetched while the next one runs, so that the device never waits.
            if pending is not None:
                log.add(*pending, bar)
            pending = (step, n, metrics)
            if _due(experiment.checkpoint_every, step) and step < experiment.steps:
                log.add(*pending, bar)
                pending = None
                _save(run, state, log)
                last_saved = step
            if _due(experiment.sample_every, step) and step < experiment.steps:
                _sample_grid(run, state, f"samples/step_{step:07d}.png")
                log.restart_clock()
        if pending is not None:
            log.add(*pending, bar)
        if step != last_saved:
            _save(run, state, log)
        checkpoint.wait(run.manager)
    if asked and step < experiment.steps:
        name = signal.Signals(asked[0]).name
        raise Interrupted(
            f"stopped by {name} at step {step} of {experiment.steps}, all saved in {run.folder}; "
            "to go on, give the same command again",
            128 + asked[0],
        )
    return state


def _compiled_dispatch(run: _Run, shardings: Any) -> Any:
    experiment = run.experiment
    step = make_train_step(_loss_fn(experiment), experiment.optimizer, experiment.ema, accumulate=experiment.accumulate)
    whole = replicated(run.mesh)
    return jax.jit(
        make_dispatch(step),
        donate_argnums=0,
        in_shardings=(shardings, whole, split_axis(run.mesh, 1), whole),
        out_shardings=(shardings, whole),
    )


def _loss_fn(experiment: Experiment, train: bool = True) -> LossFn:
    return make_loss_fn(
        experiment.net,
        experiment.read,
        experiment.objective,
        null=experiment.null,
        drop=experiment.drop,
        flip=experiment.flip,
        train=train,
    )


def _held_out_loss(experiment: Experiment, data: Data, mesh: Mesh) -> Any:
    """A function of the averaged parameters: the loss on held-out examples with the same noise each time, or None."""
    if data.test is None:
        return None
    count = min(HELD_OUT, size(data.test)) // mesh.shape["data"] * mesh.shape["data"]
    if count == 0:
        return None
    order = np.random.default_rng(0).permutation(size(data.test))[:count]
    batch = jax.device_put(take(data.test, order), split_axis(mesh))
    program = jax.jit(_loss_fn(experiment, train=False))
    return lambda params: float(program(params, batch, jax.random.key(0)))


def _save(run: _Run, state: TrainState, log: _Log) -> None:
    if run.held_out is None:
        metric = log.latest_loss
    else:
        metric = run.held_out(state.ema)
        log.write({"step": int(state.step), "heldout_loss": metric})
    if not np.isfinite(metric):
        raise _not_finite("held-out loss", metric, int(state.step), run.manager.latest_step())
    checkpoint.save(run.manager, state, run.feed.get_state(), run.record, metric)
    log.restart_clock()


def _finish(run: _Run, state: TrainState) -> dict[str, float]:
    """Pictures and numbers of a trained run; its last line."""
    _say("drawing samples …")
    _sample_grid(run, state, "samples.png")
    _animate(run, state)
    result: dict[str, float] = {}
    if run.experiment.evaluate is not None:

        def draw(labels: np.ndarray, seed: int) -> np.ndarray:
            return np.concatenate(list(run.pictures(state.ema, len(labels), seed, labels)))

        result = dict(run.experiment.evaluate(draw))
    line = {"step": int(state.step), "finished": True, **result}
    _append(run.folder / "metrics.jsonl", line)
    return line


def _grid_labels(experiment: Experiment) -> tuple[int, int, np.ndarray | None]:
    """(pictures, columns, labels) of a sample grid: a column for each class, up to ten of them."""
    if experiment.null is None:
        return 64, 8, None
    columns = min(10, experiment.null)
    return columns * 8, columns, np.arange(columns * 8) % columns


def _sample_grid(run: _Run, state: TrainState, name: str) -> None:
    n, columns, labels = _grid_labels(run.experiment)
    images = np.concatenate(list(run.pictures(state.ema, n, 0, labels)))
    path = run.folder / name
    path.parent.mkdir(exist_ok=True)
    save_picture(path, grid(images, columns, fitting_scale(images.shape[2], columns)))


def _animate(run: _Run, state: TrainState) -> None:
    columns = _grid_labels(run.experiment)[1]
    labels = None if run.experiment.null is None else np.arange(columns * 4, dtype=np.int32) % columns
    draw = jax.jit(make_draw(run.experiment, trajectory=True))
    path = draw(state.ema, example_keys(0, 0, columns * 4), labels)
    # Noise of any level is shown at the contrast of the data.
    frames = np.asarray(jax.jit(jax.vmap(lambda x: to_uint8(x / jnp.maximum(1.0, 1.2 * jnp.std(x)))))(path))
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, 40).astype(int))]
    scale = fitting_scale(frames.shape[3], columns, 480)
    save_animation(run.folder / "denoising.gif", [grid(frame, columns, scale) for frame in chosen])


class _Log:
    """Metrics on their way from the device to the progress bar and metrics.jsonl."""

    def __init__(self, run: _Run, step: int) -> None:
        self._run, self._losses, self._norms = run, [], []
        self._clock, self._images = time.perf_counter(), 0
        self._warm = False
        self.latest_loss = float("nan")

    def add(self, step: int, n: int, metrics: Mapping[str, jax.Array], bar: Any) -> None:
        """Wait for the metrics of the n steps that end with `step`, check them, and show them."""
        losses, norms = (np.asarray(metrics[name])[:n] for name in ("loss", "grad_norm"))
        for i in range(n):
            for name, value in (("loss", losses[i]), ("gradient norm", norms[i])):
                if not np.isfinite(value):
                    raise _not_finite(name, value, step - n + 1 + i, self._run.manager.latest_step())
        if not self._warm:
            # The first dispatch holds the compilation, which is not the speed of training.
            self._warm = True
            self.restart_clock()
        else:
            self._images += n * self._run.experiment.batch
        self._losses += losses.tolist()
        self._norms += norms.tolist()
        self.latest_loss = float(np.mean(self._losses[-100:]))
        bar.update(n)
        bar.set_postfix_str(f"loss {self.latest_loss:.4f}, {self._speed():,.0f} images/s", refresh=False)
        if _due(self._run.experiment.log_every, step) or step == self._run.experiment.steps:
            self._flush(step)

    def restart_clock(self) -> None:
        """Leave what came before, such as compiling or sampling, out of the speed."""
        self._clock, self._images = time.perf_counter(), 0

    def write(self, line: dict) -> None:
        """Append one line to metrics.jsonl."""
        _append(self._run.folder / "metrics.jsonl", line)

    def _speed(self) -> float:
        return self._images / max(time.perf_counter() - self._clock, 1e-9)

    def _flush(self, step: int) -> None:
        line = {"step": step, "loss": float(np.mean(self._losses)), "grad_norm": float(np.mean(self._norms))}
        if self._images:
            line["images_per_second"] = round(self._speed(), 1)
        self.write(line)
        self._losses, self._norms = [], []
        self.restart_clock()


def _not_finite(name: str, value: float, step: int, saved: int | None) -> RunError:
    kept = "no checkpoint had been saved" if saved is None else f"the last good checkpoint is step {saved}"
    return RunError(
        f"the {name} is {value} at step {step}; {kept}. Try a lower learning rate, a longer warm-up, "
        "stronger gradient clipping, or float32 instead of bfloat16"
    )


def _until_next_stop(experiment: Experiment, step: int) -> int:
    """Steps of the next dispatch: never past the end, a line of the log, a checkpoint or a sample grid."""
    stops = [experiment.steps]
    for every in (experiment.log_every, experiment.checkpoint_every, experiment.sample_every):
        if every:
            stops.append((step // every + 1) * every)
    return min(experiment.dispatch, min(stops) - step)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _padded(batches: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([leaf, np.repeat(leaf[-1:], k - len(leaf), axis=0)]) if len(leaf) < k else leaf
        for name, leaf in batches.items()
    }


def _check_data(experiment: Experiment, data: Data) -> None:
    if tuple(data.shape) != tuple(experiment.shape):
        raise InputError(f"the data has pictures of shape {data.shape}, the experiment wants {experiment.shape}")
    if experiment.null is not None and len(data.classes) != experiment.null:
        raise InputError(f"the experiment is for {experiment.null} classes, the data has {len(data.classes)}")


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write in the run folder {folder}: {error.strerror}") from None


def _finished(folder: Path, steps: int) -> dict | None:
    lines = _read_metrics(folder)
    return lines[-1] if lines and lines[-1].get("finished") and lines[-1]["step"] >= steps else None


def _keep_metrics_until(folder: Path, step: int) -> None:
    """Drop what a killed run had logged after its last checkpoint: those steps are made again."""
    lines = [line for line in _read_metrics(folder) if line["step"] <= step and not line.get("finished")]
    path = folder / "metrics.jsonl"
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(path)


def _read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # A killed run may leave half a line.
            lines.append(json.loads(text))
    return lines


def _append(path: Path, line: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _write_json(path: Path, content: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def _bar(experiment: Experiment, start: int) -> Any:
    pause = 0.2 if sys.stderr.isatty() else 10
    total = experiment.steps
    return tqdm(total=total, initial=start, desc="training", unit="step", dynamic_ncols=True, mininterval=pause)


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have asked the run to stop; a second one stops it at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        _say(f"{signal.Signals(number).name}: finishing this step and saving; once more to stop at once")

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
