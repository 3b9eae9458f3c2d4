"""Fashion-MNIST in ten minutes: trains, measures, distils and extrapolates, unattended, and writes a report.

    python benchmarks/fashion_mnist_10min.py                          on one H100, about an hour and a half
    python benchmarks/fashion_mnist_10min.py --size cpu               reduced, a quarter of an hour on two idle cores
    python benchmarks/fashion_mnist_10min.py --size toy               minutes, of which the numbers say nothing

The work is cut into pieces of at most ten minutes. A piece that is done has a file OUT/pieces/NAME.json; the same
command goes on behind the last of them, whatever stopped it. Training that takes longer is stopped like any run, by
SIGTERM, and goes on from its checkpoint in the next piece. `--seconds 590` stops the script itself after so long, with
exit status 75 while there is more to do, for machines that are lent in slices.

OUT/README.md is the report, with its pictures beside it; OUT/runs holds the runs, OUT/results what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT, MORE = 590.0, 75
TEACHER, STUDENT, NEON = "fashion_mnist_10min", "fashion_mnist_student", "fashion_mnist_neon"
METHODS = ("ect", "meanflow")


class Size(NamedTuple):
    """How much of everything. own: samples to extrapolate from; weights: by how much.

    n: samples of a measurement; at_once: in a batch.
    seeds: of the conditional model, and of all others. real: training pictures compared with, None for all.
    unconditional: evaluations at which the unconditional model is measured.
    """

    teacher: dict[str, Any]
    students: dict[str, dict[str, Any]]
    neon: dict[str, Any]
    own: int
    weights: tuple[float, ...]
    n: int
    at_once: int
    seeds: tuple[int, int] = (3, 3)
    real: int | None = None
    unconditional: tuple[int, ...] = (5, 10, 18, 35)


CPU = {"sample_every": 0, "checkpoint_every": 100, "dispatch": 1}
SIZES = {
    "full": Size(
        teacher={},
        students={
            "ect": {"steps": 7000, "batch": 512, "dispatch": 50, "checkpoint_every": 2500},
            "meanflow": {"steps": 5500, "batch": 512, "dispatch": 50, "checkpoint_every": 2500},
        },
        neon={"steps": 100, "dispatch": 50},
        own=6000,
        weights=(0.5, 1.0, 1.5, 2.0),
        n=10_000,
        at_once=1000,
    ),
    "cpu": Size(
        teacher={
            "width": 16, "blocks": 1, "steps": 250, "batch": 32, "precision": "float32", "log_every": 20,
            "learning_rate": 3e-3, "dropout": 0, "snapshot_every": 25, **CPU,
        },
        students={method: {"steps": 60, "batch": 32, "log_every": 10, **CPU} for method in METHODS},
        neon={"steps": 20, "batch": 32, "log_every": 5, "dispatch": 1},
        own=200,
        weights=(0.5, 1.0, 2.0),
        n=250,
        at_once=50,
        seeds=(3, 1),
        unconditional=(35,),
    ),
    "toy": Size(
        teacher={
            "width": 4, "blocks": 1, "steps": 20, "batch": 8, "precision": "float32", "log_every": 5,
            "snapshot_every": 10, **CPU, "checkpoint_every": 5,
        },
        students={method: {"steps": 4, "batch": 8, "log_every": 2, **CPU} for method in METHODS},
        neon={"steps": 4, "batch": 8, "log_every": 2, "dispatch": 1},
        own=20,
        weights=(0.5, 1.0, 2.0),
        n=20,
        at_once=20,
        seeds=(2, 1),
        real=300,
    ),
}  # fmt: skip

MODELS = {  # evaluations -> (sampler, steps)
    5: ("dpmpp_2m", 5),
    10: ("dpmpp_2m", 10),
    18: ("dpmpp_2m", 18),
    35: ("heun", 18),
}


class Piece(NamedTuple):
    """A piece of work: a command line after `python`, and how it is shown to people."""

    name: str
    words: list[str]
    shown: str


class Place(NamedTuple):
    """Where and how large."""

    size: str
    out: Path
    data_dir: str

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    def run(self, experiment: str, name: str) -> Path:
        return self.runs / experiment / name


# The pieces ----------------------------------------------------------------------------------------------------------


def pieces(place: Place) -> list[Piece]:
    """Everything, in the order in which each finds what it needs."""
    size = SIZES[place.size]
    teacher = str(place.run(TEACHER, "conditional"))
    data = {"data_dir": place.data_dir} if place.data_dir else {}
    made = [_command(place, "train", TEACHER, "conditional", **size.teacher, **data)]
    made.append(_command(place, "train", TEACHER, "unconditional", classes=False, **size.teacher, **data))
    for method, arguments in size.students.items():
        made.append(_command(place, "train", STUDENT, method, method=method, teacher=teacher, **arguments, **data))
    own = place.out / "own"
    made += [
        _command(place, "sample", TEACHER, "conditional", n=size.own, seed=1000, format="npz", out=own),
        _command(place, "train", NEON, "neon", teacher=teacher, samples=own / "images.npz", **size.neon, **data),
        _command(place, "extrapolate", NEON, "neon", w=",".join(map(str, size.weights)), out=place.out / "neon"),
        _own_piece(place, "real"),
        *(_own_piece(place, f"measure-conditional-{n}") for n in MODELS),
        *(_own_piece(place, f"measure-unconditional-{n}") for n in size.unconditional),
        *(_own_piece(place, f"measure-{method}-{n}") for method in METHODS for n in (1, 2)),
        *(_own_piece(place, f"measure-neon={w}-35") for w in size.weights),
        _own_piece(place, "report"),
    ]
    return made


def _command(place: Place, command: str, experiment: str, run: str, **arguments: Any) -> Piece:
    words = [f"{key}={value}" for key, value in {**arguments, "run": run, "runs": place.runs}.items()]
    shown = f"make {command} EXP={experiment} ARGS={shlex.quote(' '.join(words))}"
    return Piece(f"{command}-{run}", ["-m", "diffusion_jax", command, experiment, *words], shown)


def _own_piece(place: Place, name: str) -> Piece:
    words = [str(Path(__file__)), "--size", place.size, "--out", str(place.out), "--piece", name]
    words += ["--data-dir", place.data_dir] if place.data_dir else []
    return Piece(name, words, f"python {shlex.join(['benchmarks/' + Path(__file__).name, *words[1:]])}")


# The driver ----------------------------------------------------------------------------------------------------------


def drive(made: list[Piece], out: Path, seconds: float | None, limit: float = LIMIT) -> int:
    """Do the pieces that are not done yet, each in bouts of at most `limit` seconds; the exit status."""
    (out / "pieces").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ValueError):  # only the main thread may listen to signals
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    end = time.monotonic() + (seconds or float("inf"))
    for number, piece in enumerate(made, 1):
        done = out / "pieces" / f"{piece.name}.json"
        if done.is_file():
            continue
        print(f"[{number}/{len(made)}] {piece.shown}", flush=True)
        code = _do(piece, done, end, limit)
        if code:
            what = "more to do: the same command goes on" if code == MORE else f"{piece.name} failed ({code})"
            print(what, file=sys.stderr)
            return code
    return 0


def _do(piece: Piece, done: Path, end: float, limit: float) -> int:
    """Bouts of one piece until it is done; 0, or why it is not: `MORE` or the status of what failed."""
    before = done.with_suffix(".partial")
    record = json.loads(before.read_text()) if before.is_file() else {"seconds": 0.0, "bouts": 0}
    while True:
        left = min(limit, end - time.monotonic())
        if left < 1:
            return MORE
        begin = time.monotonic()
        code, stopped = _bout(piece, left)
        record = {"seconds": record["seconds"] + time.monotonic() - begin, "bouts": record["bouts"] + 1}
        record["command"] = piece.shown
        _write(before, json.dumps(record))
        if code == 0:
            before.replace(done)
            return 0
        if not stopped:
            return code
        if record["bouts"] > 50:
            return 1


def _bout(piece: Piece, limit: float) -> tuple[int, bool]:
    """Run a piece for at most so long; its exit status, and whether it was told to stop."""
    process = subprocess.Popen([sys.executable, *piece.words], cwd=ROOT)
    try:
        return process.wait(limit), False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(120), True  # the time a run may need to save
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), True
    except BaseException:  # this script is stopped: so is what it runs, as cleanly
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


# What is measured ----------------------------------------------------------------------------------------------------


def look_at_real(place: Place) -> None:
    """The real pictures as the classifier sees them, and the floors under every measurement, in files."""
    import numpy as np

    from diffusion_jax.evaluation import fashion_mnist as protocol
    from diffusion_jax.training.sources import tfds_images

    size, data = SIZES[place.size], tfds_images("fashion_mnist", place.data_dir or None)
    parts: Any = (data.train, data.test)
    sets = [{key: np.asarray(array)[: size.real] for key, array in part.items()} for part in parts]
    real = protocol.real(*sets)
    protocol.write_real(place.out / "real.npz", real)
    _save(place, "floor", [r for seed in range(size.seeds[0]) for r in protocol.floors(size.n, real, seed=seed)], {})


def measure(place: Place, name: str) -> None:
    """Draw and measure: NAME is measure-MODEL-EVALUATIONS."""
    import numpy as np

    from diffusion_jax.evaluation import fashion_mnist as protocol
    from diffusion_jax.measuring import models
    from diffusion_jax.training.mesh import make_mesh
    from diffusion_jax.training.teacher import find_teacher

    _, model, number = name.split("-")
    size, real = SIZES[place.size], protocol.read_real(place.out / "real.npz")
    folder, options = _options(place, model, int(number))
    experiment, mesh = find_teacher(str(folder)).experiment, make_mesh(1)
    made = models.make_model(experiment, mesh, options)
    chosen = models.load(experiment, folder, mesh, options)
    average, labels = models.average_of(chosen), made.labels(size.n)
    found, seconds, first = [], [], None
    for seed in range(size.seeds[model != "conditional"]):
        images, took = _drawn(made, chosen.params, size.n, seed)
        first = images if first is None else first
        seconds.append(took)
        found += protocol.measure(images, labels, real, seed=seed, average=average, seeds=(seed,), **made.told)
    assert first is not None
    near = protocol.nearest_training(first[:100], real)
    (place.out / "results").mkdir(exist_ok=True)
    np.savez_compressed(place.out / "results" / f"{name}.npz", images=first[:100], nearest=near)
    _save(place, name, found, {"evaluations": made.told["evaluations"], "seconds_a_sample": float(np.median(seconds))})


def _options(place: Place, model: str, evaluations: int) -> tuple[Path, dict[str, Any]]:
    """The run that a model is of, and how it draws."""
    size, file = SIZES[place.size], ""
    if model in METHODS:
        run, sampler, steps = place.run(STUDENT, model), "default", evaluations
    else:
        run = place.run(TEACHER, "unconditional" if model == "unconditional" else "conditional")
        sampler, steps = MODELS[evaluations]
    if model.startswith("neon="):
        file = str(place.out / "neon" / f"extrapolated-w={model.removeprefix('neon=')}.npz")
    drawn = {"sampler": sampler, "steps": steps, "guidance": None, "unconditional": False, "batch": size.at_once}
    return run, {**drawn, "checkpoint": "newest", "ema": None, "params": file}


def _drawn(made: Any, params: Any, n: int, seed: int) -> tuple[Any, float]:
    """Pictures u8[n, 28, 28, 1], and seconds for each, without the first batch where there are several."""
    import numpy as np

    parts, times = [], [time.perf_counter()]
    for part in made.draw(params, n, seed):
        parts.append(part)
        times.append(time.perf_counter())
    begin = 1 if len(parts) > 1 else 0
    return np.concatenate(parts), (times[-1] - times[begin]) / sum(len(p) for p in parts[begin:])


def _save(place: Place, name: str, found: list[Any], more: Mapping[str, Any]) -> None:
    folder = place.out / "results"
    folder.mkdir(exist_ok=True)
    _write(folder / f"{name}.json", json.dumps({**more, "results": [json.loads(result.json()) for result in found]}))


# The command line ----------------------------------------------------------------------------------------------------


def own_pieces(place: Place) -> dict[str, Callable[[], None]]:
    """What `--piece` can be asked for."""
    sys.path.insert(0, str(Path(__file__).parent))
    from fashion_mnist_report import write_report

    names = [piece.name for piece in pieces(place) if piece.name.startswith("measure-")]
    known: dict[str, Callable[[], None]] = {name: (lambda name=name: measure(place, name)) for name in names}
    return {**known, "real": lambda: look_at_real(place), "report": lambda: write_report(place.out, place.size)}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", default="", help="folder of everything; by default runs/report-SIZE")
    parser.add_argument("--seconds", type=float, help="stop by then; exit status 75 says that there is more to do")
    parser.add_argument("--data-dir", default="", help="where tensorflow-datasets keeps its data")
    parser.add_argument("--piece", help="do this piece alone, here and now")
    given = parser.parse_args(words)
    out = Path(given.out or ROOT / "runs" / f"report-{given.size}").resolve()
    place = Place(given.size, out, given.data_dir)
    if given.piece is None:
        return drive(pieces(place), out, given.seconds)
    known = own_pieces(place)
    if given.piece not in known:
        parser.error(f"--piece {given.piece}: there are {', '.join(known)}")
    from diffusion_jax.training.checkpoint import quieten

    quieten()
    known[given.piece]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
