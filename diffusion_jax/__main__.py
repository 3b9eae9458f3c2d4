"""The command line: python -m diffusion_jax COMMAND EXPERIMENT name=value ...; `make` calls it."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusion_jax._version import __version__
from diffusion_jax.arguments import Amount, Count, Natural, closest, describe, resolve, split_arguments
from diffusion_jax.generating.options import generate_options
from diffusion_jax.measuring.command import (
    SamplerName,
    average_options,
    average_page,
    eval_options,
    eval_page,
    reference_options,
    reference_page,
)
from diffusion_jax.measuring.sweep import sweep_options, sweep_page
from diffusion_jax.planning.command import plan_options, plan_page, profile_options, profile_page
from diffusion_jax.typing import InputError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def run_options(
    *,
    run: str = "",
    runs: str = "runs",
    devices: Count | None = None,
    split: bool = False,
    tensor: Count = 1,
    coordinator: str = "",
    processes: Count | None = None,
    process: Natural | None = None,
) -> dict:
    """Where and on what a training run takes place; none of it changes the result.

    Args:
        run: name of the run; by default it is made from the experiment's arguments.
        runs: the folder of all runs.
        devices: how many devices to use; by default all.
        split: split parameters and optimizer state over the devices instead of copying them.
        tensor: so many devices share the work within each layer, for networks that can be split so.
        coordinator: HOST:PORT of process 0, for several processes that no cluster software describes.
        processes: how many of them; 1 for a run of this process alone whatever describes others.
        process: which of them this is, from 0 on.
    """
    return dict(locals())


def sample_options(
    *,
    n: Count = 64,
    seed: Natural = 0,
    sampler: SamplerName = "default",
    steps: Count | None = None,
    guidance: float | None = None,
    label: Natural | None = None,
    prompt: str = "",
    format: Literal["png", "npz", "grid"] = "png",
    checkpoint: str = "newest",
    ema: Amount | None = None,
    params: str = "",
    out: str = "",
    run: str = "",
    runs: str = "runs",
    devices: Count | None = None,
    coordinator: str = "",
    processes: Count | None = None,
    process: Natural | None = None,
) -> dict:
    """Draw pictures from a trained run. Picture i depends on the seed and i alone.

    Args:
        n: number of pictures.
        seed: all randomness.
        sampler: another sampler than the experiment's.
        steps: another number of sampling steps than the experiment's.
        guidance: another scale of classifier-free guidance than the experiment's.
        label: draw this class only; by default all classes in turn.
        prompt: what to draw, for experiments that are conditioned on texts.
        format: png writes each picture and a grid (video as .gif, sound as .wav), npz one file of arrays and a grid,
            grid the grid alone.
        checkpoint: newest, best, or a step.
        ema: an average of this relative width, 0.08 say, put together from the snapshots of the run.
        params: parameters in a file, as make average writes them.
        out: folder to write to; by default inside the run.
        run: name of the run; by default the newest one of the experiment.
        runs: the folder of all runs.
        devices: how many devices to use; by default all.
        coordinator: HOST:PORT of process 0, for several processes that no cluster software describes.
        processes: how many of them; 1 for a run of this process alone whatever describes others.
        process: which of them this is, from 0 on.
    """
    return dict(locals())


def train(name: str, words: list[str]) -> None:
    """Train an experiment, or go on with it, and print its last numbers."""
    from diffusion_jax.experiment import find_experiment

    function = find_experiment(name)
    own, options = _divided(name, function, words, run_options, "train")
    arguments = resolve(function, own, name)
    _set_up_jax()
    experiment = function(**arguments)

    from diffusion_jax.training import hosts
    from diffusion_jax.training.loop import fit

    label = Path(name).stem
    folder = Path(options["runs"]) / label / (options["run"] or run_name(own))
    record = _record(name, arguments, experiment)
    where = {key: options[key] for key in ("devices", "split", "tensor")}
    result = fit(experiment, folder, record, **where)
    if not hosts.first():
        return
    names = [name for name in ("samples.png", "denoising.gif", "metrics.jsonl") if (folder / name).exists()]
    print(f"pictures and numbers: {folder}/{', '.join(names)}")
    for key, value in result.items():
        if key not in ("step", "finished"):
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


def sample(name: str, words: list[str]) -> None:
    """Draw pictures from the checkpoint of a run."""
    from diffusion_jax.experiment import find_experiment

    options = resolve(sample_options, split_arguments(words), "sample")
    function = find_experiment(name)
    folder = find_run(Path(options["runs"]) / Path(name).stem, options["run"])
    _set_up_jax()
    experiment = function(**_recorded_arguments(function, name, folder))

    from diffusion_jax.training import hosts
    from diffusion_jax.training.draw import draw_to_folder

    said = draw_to_folder(experiment, folder, options)
    if hosts.first():
        print(said)


def plan(name: str, words: list[str]) -> None:
    """What training and sampling would take, on devices that need not be there; fails if it does not fit."""
    from diffusion_jax.experiment import find_experiment

    function = find_experiment(name)
    own, options = _divided(name, function, words, plan_options, "plan")
    arguments = resolve(function, own, name)
    page, refusal = plan_page(function, name, arguments, options)
    print(page)
    if refusal:
        raise InputError(refusal)


def latents_options(
    *,
    devices: Count | None = None,
    coordinator: str = "",
    processes: Count | None = None,
    process: Natural | None = None,
) -> dict:
    """Encode an experiment's data set once, into latents that it then trains on; what is there already is kept.

    Args:
        devices: how many devices to use; by default all.
        coordinator: HOST:PORT of process 0, for several processes that no cluster software describes.
        processes: how many of them; 1 for a run of this process alone whatever describes others.
        process: which of them this is, from 0 on.
    """
    return dict(locals())


def latents(name: str, words: list[str]) -> None:
    """Encode the data set of an experiment into latents, or go on with it."""
    function = _encoding_of(name)
    own, options = _divided(name, function, words, latents_options, "latents")
    arguments = resolve(function, own, f"make latents EXP={name}")
    _set_up_jax()

    from diffusion_jax.training.latents import encode_to_store

    encoding = function(**arguments)
    header = encode_to_store(encoding, options["devices"])
    std = ", ".join(f"{value:.4g}" for value in header["std"])
    print(f"{sum(header['examples'].values())} latents in {encoding.out}; deviation of each channel: {std}")


def _encoding_of(name: str) -> Callable[..., Any]:
    """The function `encoding` beside an experiment's `experiment`: what `make latents` is to do."""
    from diffusion_jax.experiment import find_experiment

    function = find_experiment(name).__globals__.get("encoding")
    if function is None:
        raise InputError(f"{name} does not train on latents: its file has no function named encoding")
    return function


def profile(name: str, words: list[str]) -> None:
    """Where the time of a training step goes."""
    from diffusion_jax.experiment import find_experiment

    function = find_experiment(name)
    own, options = _divided(name, function, words, profile_options, "profile")
    arguments = resolve(function, own, name)
    _set_up_jax()
    print(profile_page(function, name, arguments, options))


def evaluate(name: str, words: list[str]) -> None:
    """Measure samples of a run, or pictures, against real examples."""
    experiment, folder, options = _to_measure(name, words, eval_options, "eval")
    for line in eval_page(experiment, name, folder, options):
        print(line, flush=True)


def reference(name: str, words: list[str]) -> None:
    """Statistics of an experiment's data, or of pictures, in a file."""
    given = split_arguments(words)
    if given.get("images"):
        experiment, options = None, resolve(reference_options, given, "reference")
        _set_up_jax()
    else:
        experiment, _, options = _to_measure(name, words, reference_options, "reference", run_needed=False)
    for line in reference_page(experiment, name, options):
        print(line, flush=True)


def average(name: str, words: list[str]) -> None:
    """An average of any length from the snapshots of a run, in a file."""
    options = resolve(average_options, split_arguments(words), "average")
    _set_up_jax()
    print(average_page(find_run(Path(options["runs"]) / Path(name).stem, options["run"]), options))


def sweep(name: str, words: list[str]) -> None:
    """Samplers x steps x guidance x averages of a run, as a table and plots."""
    experiment, folder, options = _to_measure(name, words, sweep_options, "sweep")
    for line in sweep_page(experiment, name, folder, options):
        print(line, flush=True)


def extrapolate_options(
    *, w: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0), out: str = "", run: str = "", runs: str = "runs"
) -> dict:
    """Parameters beyond those a run began from, away from those it came to; make eval params=FILE measures them.

    Args:
        w: how far, in lengths of the way that the run went; with commas between.
        out: folder to write extrapolated-w=….npz to; by default the run's.
        run: name of the run; by default the newest one of the experiment.
        runs: the folder of all runs.
    """
    return dict(locals())


def extrapolate(name: str, words: list[str]) -> None:
    """Write the parameters that a run leads away from, and what they took."""
    experiment, folder, options = _to_measure(name, words, extrapolate_options, "extrapolate")
    from diffusion_jax.measuring.evaluations import evaluations
    from diffusion_jax.training.extrapolate import extrapolate_run

    for line in extrapolate_run(experiment, folder, options["w"], Path(options["out"] or folder), evaluations):
        print(line, flush=True)


def generate(name: str, words: list[str]) -> None:
    """Draw pictures with a model in files."""
    options = resolve(generate_options, split_arguments(words), "generate")
    _set_up_jax()

    from diffusion_jax.generating.command import generate as draw

    print(draw(options))


def _to_measure(
    name: str, words: list[str], known: Callable[..., dict], what: str, *, run_needed: bool = True
) -> tuple[Any, Path, dict[str, Any]]:
    """The experiment as its run was made, or as the words say where no run is looked at; its folder, the options."""
    from diffusion_jax.experiment import find_experiment

    function = find_experiment(name)
    own, options = _divided(name, function, words, known, what)
    folder = Path(options["runs"]) / Path(name).stem
    if options["run"] or (run_needed and not options.get("images")):
        folder = find_run(folder, options["run"])
        if own:
            raise InputError(f"{next(iter(own))}: the run {folder.name} has its own; {what} takes no others")
        arguments = _recorded_arguments(function, name, folder)
    else:
        arguments = resolve(function, own, name)
    _set_up_jax()
    return function(**arguments), folder, options


def _divided(
    name: str, function: Callable[..., Any], words: list[str], options: Callable[..., dict], what: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The words that are the experiment's, and the command's own options."""
    given = split_arguments(words)
    known = inspect.signature(options).parameters
    own = {key: value for key, value in given.items() if key not in known}
    unknown = next((key for key in own if key not in inspect.signature(function).parameters), None)
    if unknown is not None:
        every = [*inspect.signature(function).parameters, *known]
        raise InputError(f"{name} has no argument {unknown!r}{closest(unknown, every)}")
    return own, options(**resolve(options, {k: v for k, v in given.items() if k in known}, what))


def _recorded_arguments(function: Callable[..., Any], name: str, folder: Path) -> dict[str, Any]:
    from diffusion_jax.training.records import read_record

    arguments = read_record(folder / "experiment.json").get("arguments", {})
    gone = sorted(set(arguments) - set(inspect.signature(function).parameters))
    if gone:
        raise InputError(f"the run {folder} was made with the argument {gone[0]!r}, which {name} no longer has")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}


def run_name(given: Mapping[str, str]) -> str:
    """A folder name from the arguments that were given: the same command finds its own run again.

    >>> run_name({}), run_name({"width": "64", "steps": "200"})
    ('default', 'steps=200,width=64')
    """
    text = ",".join(f"{key}={given[key]}" for key in sorted(given))
    safe = re.sub(r"[^\w.=,+-]+", "-", text)
    if safe == text and len(text) <= 100:
        return text or "default"
    return f"{safe[:80]}-{zlib.crc32(text.encode()):08x}"


def find_run(folder: Path, run: str) -> Path:
    """The folder of a run with that name, or of the newest run; InputError that lists the runs there are."""
    there = sorted(folder.glob("*/experiment.json"), key=lambda path: path.stat().st_mtime)
    names = [path.parent.name for path in there]
    if not names:
        raise InputError(f"no run in {folder}: train first, make train EXP={folder.name}")
    if run and run not in names:
        raise InputError(f"no run {run!r} in {folder}{closest(run, names)}; there are: {', '.join(names)}")
    return folder / (run or names[-1])


COMMANDS: dict[str, tuple[Callable[[str, list[str]], None], Callable[..., dict]]] = {
    "train": (train, run_options),
    "sample": (sample, sample_options),
    "plan": (plan, plan_options),
    "profile": (profile, profile_options),
    "latents": (latents, latents_options),
    "eval": (evaluate, eval_options),
    "reference": (reference, reference_options),
    "sweep": (sweep, sweep_options),
    "average": (average, average_options),
    "extrapolate": (extrapolate, extrapolate_options),
    "generate": (generate, generate_options),
}
WITHOUT_EXPERIMENT = ("generate",)


def main(words: list[str]) -> int:
    """Run a command; bad input is one line on the error stream and a non-zero exit status."""
    with _sigterm_as_interrupt():
        try:
            return _main(words)
        except Exception:
            if _is_one_of_several():
                traceback.print_exc()
                _fail("an error of the program itself", 1)
            raise


def _main(words: list[str]) -> int:
    try:
        if not words or words[0] not in COMMANDS:
            hint = closest(words[0], COMMANDS) if words else ""
            raise InputError(f"usage: python -m diffusion_jax {{{','.join(COMMANDS)}}} EXPERIMENT name=value …{hint}")
        command, options = COMMANDS[words[0]]
        if words[0] in WITHOUT_EXPERIMENT:
            words = [words[0], "", *words[1:]] if words[1:2] not in (["help"], ["-h"], ["--help"]) else words
        rest = words[2:]
        if len(words) < 2 or words[1] in ("-h", "--help", "help"):
            what = "" if words[0] in WITHOUT_EXPERIMENT else " EXPERIMENT"
            print(describe(options, f"python -m diffusion_jax {words[0]}{what}"))
        elif any(word in ("-h", "--help", "help") for word in rest):
            _help(words[0], words[1])
        else:
            _join_others(options, rest)
            command(words[1], rest)
            _leave_together()
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        return _fail("stopped at once; what was complete stays, the same command goes on from there", 128 + number)
    except (InputError, OSError, RuntimeError) as error:
        if os.environ.get("DIFFUSION_JAX_TRACEBACK"):
            raise
        if isinstance(error, InputError) or not _is_one_of_several():
            return _fail(*_explain(error, words))
        return _fail_of_several(error, words)
    return 0


def _join_others(options: Callable[..., dict], words: list[str]) -> None:
    """Meet the other processes of the run, if there are any, before anything is refused, so that all hear of it."""
    names = {"coordinator", "processes", "process"}
    if not names <= set(inspect.signature(options).parameters):
        return
    given: dict[str, str] = {}
    with contextlib.suppress(InputError):
        given = {key: value for key, value in split_arguments(words).items() if key in names}
    from diffusion_jax.training import hosts

    _set_up_jax()
    hosts.start(**{key: value for key, value in resolve(options, given, "the command").items() if key in names})


def _is_one_of_several() -> bool:
    hosts = sys.modules.get("diffusion_jax.training.hosts")
    return hosts is not None and hosts.several()


def _leave_together() -> None:
    if _is_one_of_several():
        from diffusion_jax.training import hosts

        hosts.stop()


def _fail_of_several(error: Exception, words: list[str]) -> int:
    """What all processes have agreed on is told once; any other error may be the echo of another process's end."""
    from diffusion_jax.training import hosts
    from diffusion_jax.training.loop import Interrupted, RunError

    if not isinstance(error, RunError):
        hosts.wait_for_cause()
        return _fail(*_explain(error, words))
    message, code = _explain(error, words)
    if not isinstance(error, Interrupted):
        return _fail(message, code)
    first = hosts.first()
    hosts.stop()
    return _fail(message, code) if first else code


def _explain(error: Exception, words: list[str]) -> tuple[str, int]:
    from diffusion_jax.training.loop import RunError

    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, RunError):
        return str(error), getattr(error, "code", 1)
    text = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError):
        return f"{text}; what was complete stays: free space or mend the folder, then give the same command again", 1
    if "RESOURCE_EXHAUSTED" in text:
        return _out_of_memory(text, words), 1
    raise error


def _out_of_memory(text: str, words: list[str]) -> str:
    """What did not fit, what takes memory, and which of this command's arguments make it smaller."""
    command, name, *rest = words
    if command == "generate":
        return f"out of memory: batch=1, a smaller size=, tile=512 and precision=bfloat16 take less ({text[:160]})"
    if command != "train":
        return f"out of memory: try fewer devices' worth at a time, a smaller batch or network ({text[:160]})"
    from diffusion_jax.experiment import find_experiment
    from diffusion_jax.planning.shortage import shortage

    function = find_experiment(name)
    own, options = _divided(name, function, rest, run_options, "train")
    arguments = resolve(function, own, name)
    where = {key: options[key] for key in ("devices", "split", "tensor")}
    what = shortage(function(**arguments), arguments, **where)
    given = " ".join(word for word in rest if word.partition("=")[0] in {*own, *where})
    plan = f'make plan EXP={name} ARGS="{given}"' if given else f"make plan EXP={name}"
    return f"out of memory: {what}; {plan} reckons it all ({text[:160]})"


def _fail(message: str, code: int) -> int:
    if _is_one_of_several():
        from diffusion_jax.training import hosts

        hosts.fail(message, code)
    print(f"error: {message}" if code < 128 else message, file=sys.stderr)
    return code


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM leaves as cleanly as Ctrl-C does, also while there is nothing to save yet."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Only the main thread may listen to signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _help(command: str, name: str) -> None:
    from diffusion_jax.experiment import find_experiment

    print(describe(COMMANDS[command][1], f"make {command} EXP={name}"))
    if command in ("train", "plan", "profile"):
        print(describe(find_experiment(name), f"make train EXP={name} ARGS=…"))
    if command == "latents":
        print(describe(_encoding_of(name), f"make latents EXP={name} ARGS=…"))


def _set_up_jax() -> None:
    """Compiled programs are kept between runs, and failed reads and writes are told in one line."""
    import jax

    from diffusion_jax.training.checkpoint import quieten

    quieten()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusion_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _record(name: str, arguments: Mapping[str, Any], experiment: Any) -> dict:
    """What experiment.json says of a run."""
    from importlib.metadata import version

    import jax

    from diffusion_jax.experiment import find_source
    from diffusion_jax.training.state import parameter_count

    return {
        "experiment": name,
        "arguments": dict(arguments),
        "parameters": parameter_count(experiment.net),
        "versions": {"python": sys.version.split()[0], "diffusion_jax": __version__}
        | {package: version(package) for package in PACKAGES},
        "commit": _commit(),
        "source": f"{zlib.crc32(find_source(name).read_bytes()):08x}",
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def _commit() -> str | None:
    """The commit of the source tree, with "+" for changes since, or None outside of one."""
    here = Path(__file__).parent
    try:
        head, status = (
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if status else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
