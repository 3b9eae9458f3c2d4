"""Several processes as one run: how they meet, agree, and leave together.

Every process executes the same program on the devices of all (`jax.distributed`). What a collective operation cannot do
goes over a line of their own (`line`): small JSON values are gathered, and whoever stops tells the others why. So no
process waits for ever in a collective operation that another will not join: when one fails, is refused, dies or is not
heard of for `line.SILENCE` seconds, all others say which one and end.

A process alone pays for none of this: every function here then returns at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.training.line import GRACE, Hub, Line, call, called, end, say
from diffusion_jax.typing import InputError

PATIENCE = 300
"""Seconds that processes wait for each other at the start."""
_HELLO_BYTES = 1024
T = TypeVar("T")


_line: Line | None = None


# Meeting --------------------------------------------------------------------------------------------------------------


def start(coordinator: str = "", processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of a run, before anything else uses JAX; nothing happens where there are none.

    They are found as `jax.distributed` finds them: SLURM, Open MPI, a Kubernetes job, a TPU pod; or they are given:
    process number `process` of `processes`, of which number 0 listens at coordinator="HOST:PORT". processes=1 stays
    alone even there. Raises InputError for a description that makes no sense, or if the others do not come.
    """
    global _line
    if _line is not None or not _described(coordinator, processes, process):
        return
    if not jax.distributed.is_initialized():
        _initialize(coordinator, processes, process)
    if jax.process_count() > 1:
        _check_devices()
        _line = _meet(coordinator)
        _line.names = gather(socket.gethostname(), "names")


def _described(coordinator: str, processes: int | None, process: int | None) -> bool:
    """Whether there is a group to join."""
    if processes == 1 and not coordinator:
        return False
    if not coordinator:
        if processes is not None or process is not None:
            raise InputError("processes and process need coordinator=HOST:PORT too, the address of process 0")
        return jax.distributed.is_initialized() or surroundings(os.environ) is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"coordinator={coordinator}: write HOST:PORT, the address of process 0 and a free port there")
    if processes is None or process is None:
        raise InputError("coordinator needs processes=N and process=I too: how many there are, and which one this is")
    if not 0 <= process < processes:
        raise InputError(f"process={process}: with processes={processes} they are numbered 0 to {processes - 1}")
    return True


def surroundings(environment: Mapping[str, str]) -> str | None:
    """What has started several processes of which this is one: slurm, ompi, kubernetes, tpu, or None.

    It only decides whether `jax.distributed.initialize` is asked, which finds out the rest.

    >>> surroundings({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}), surroundings({"SLURM_NTASKS": "4"})
    ('slurm', None)
    """
    # The shell of an allocation has SLURM_NTASKS of the job, but is a step of one task.
    if "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1:
        return "slurm"
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "ompi"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "kubernetes"
    if any("," in environment.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")):
        return "tpu"
    chips = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    if chips and "TPU_SKIP_MDS_QUERY" not in environment and _pod_workers(environment) > 1:
        return "tpu"
    return None


def _number(environment: Mapping[str, str], *names: str) -> int:
    """The first of the variables that is a number; 1 if none is."""
    return next((int(text) for name in names if (text := environment.get(name, "")).isdigit()), 1)


def _pod_workers(environment: Mapping[str, str]) -> int:
    """How many hosts a cloud TPU has, asked of its metadata server; 1 where there is no such server."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    import urllib.request

    address = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return answer.read().decode().count(",") + 1
    except (OSError, ValueError):
        return 1


def _initialize(coordinator: str, processes: int | None, process: int | None) -> None:
    """`jax.distributed.initialize`, whose errors are one line and whose handler of SIGTERM gives way to ours."""
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    advice = "give coordinator=HOST:PORT processes=N process=I, or processes=1 for a run of this process alone"
    late = f"the other processes of this run did not come within {PATIENCE} s: start all, or {advice}"
    # When its own time is out, JAX aborts with a trace of C++: this is sooner.
    timer = threading.Timer(PATIENCE, end, (late, 2))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process,
            initialization_timeout=PATIENCE + 60,
            heartbeat_timeout_seconds=60,  # for what the line should miss
        )
    except (RuntimeError, ValueError, KeyError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"the processes of this run cannot be found ({text[:200]}); {advice}") from None
    finally:
        timer.cancel()
    if main:
        signal.signal(signal.SIGTERM, before)


def _check_devices() -> None:
    """InputError unless all processes have the same number of devices, of one kind: all see it alike."""
    counts = [sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise InputError(f"every process needs the same number of devices; there are, process by process, {counts}")


def _meet(coordinator: str) -> Line:
    """Open the line: process 0 tells all where it listens, by the devices' own connection, and each calls there."""
    index, count = jax.process_index(), jax.process_count()
    listener, word = None, {}
    if index == 0:
        listener = socket.create_server(("", 0), backlog=count + 8)
        word = {
            "token": secrets.token_hex(8),
            "port": listener.getsockname()[1],
            "addresses": _addresses(coordinator),
        }
    packed = np.zeros(_HELLO_BYTES, np.uint8)
    text = json.dumps(word).encode()
    packed[: len(text)] = np.frombuffer(text, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(packed), np.uint8).tobytes().rstrip(b"\0")
    word = json.loads(text)
    if listener is not None:
        Hub(listener, word["token"], count).start()
    line = Line(index, call(word, index))
    line.start()
    return line


def _addresses(coordinator: str) -> list[str]:
    """Where this machine may be reached, the likeliest first."""
    found = [coordinator.rpartition(":")[0]] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Nothing is sent: it only shows the address that this machine would use.
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys([*found, socket.getfqdn()]))[:8]


# What a run uses ------------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this process is one of several."""
    return _line is not None


def first() -> bool:
    """Whether this process is the one that prints and writes: process 0, or the only one."""
    return _line is None or _line.index == 0


def gather(value: T, label: str) -> list[T]:
    """The JSON value of every process, in their order. All must call it at the same place, which `label` names."""
    if _line is None:
        return [value]
    return _line.gather(value, label)


def from_first(value: T, label: str) -> T:
    """The value of process 0."""
    return gather(value if first() else None, label)[0]  # type: ignore[return-value]


def on_first(function: Callable[[], T], label: str) -> T:
    """What process 0 gets from a function that the others do not call; they return after it has, with its JSON value.

    If it raises there, all other processes end with that error.
    """
    return from_first(function() if first() else None, label)  # type: ignore[arg-type]


def first_then_others(function: Callable[[], T], label: str) -> T:
    """What a function returns, called by process 0 before the others: what it prepares on a shared disk is there."""
    if _line is None:
        return function()
    if first():
        result = function()
        gather(None, label)
        return result
    gather(None, label)
    return function()


@contextlib.contextmanager
def all_or_none(label: str) -> Iterator[None]:
    """OSError on every process if any of them raised something inside; what this one raised, where it did.

    InputError passes at once, which ends the others.
    """
    caught: list[Exception] = []
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        caught.append(error)
    reasons = gather(str(caught[0]) or type(caught[0]).__name__ if caught else None, label)
    if caught:
        raise caught[0]
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise OSError(f"process {process}: {reason}")


def check_shared(folder: Path) -> None:
    """InputError, alike everywhere, unless all processes see the folder of process 0."""
    if _line is None:
        return
    probe = folder / f".seen-{from_first(secrets.token_hex(4), 'probe')}"
    on_first(probe.touch, "probe written")
    deadline = time.monotonic() + 10  # Network file systems show a new file late.
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = gather(probe.exists(), "probe seen")
    on_first(lambda: probe.unlink(missing_ok=True), "probe removed")
    if not all(seen):
        blind = called(seen.index(False), _line.names)
        raise InputError(f"process {blind} does not see {folder} of process 0: runs= must be on a disk they all share")


def fingerprint(record: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What must be the same on all processes of a run: code, arguments, versions, settings of the compiler."""
    package = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        package.update(path.read_bytes())
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]
    return {
        **{key: value for key, value in record.items() if key not in ("arguments", "versions")},
        **record.get("arguments", {}),
        **options,
        **{f"the version of {name}": text for name, text in record.get("versions", {}).items()},
        "the code of diffusion_jax": package.hexdigest()[:12],
        "XLA_FLAGS": " ".join(flags),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
    }


def check_alike(record: Mapping[str, Any], **options: Any) -> None:
    """`check_same` of the fingerprints of all processes; alone, nothing is even read."""
    if _line is not None:
        check_same(fingerprint(record, **options))


def check_same(values: Mapping[str, Any], label: str = "arguments") -> None:
    """InputError, the same on every process, unless all were started alike: what differs, and each value."""
    everyone = gather(json.loads(json.dumps(dict(values), default=str)), label)
    names = [] if _line is None else _line.names
    keys = list(dict.fromkeys(key for one in everyone for key in one))
    told = [text for key in keys if (text := _difference(key, [one.get(key) for one in everyone], names))]
    if told:
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise InputError(
            f"the processes of this run were not started alike: {'; '.join(told[:3])}{more}. Give all the same "
            "command and code, or processes=1 for runs of their own"
        )


def _difference(key: str, values: list, names: Sequence[str]) -> str:
    """How a value differs between processes, each value with the first process that has it; "" if it does not."""
    texts = [json.dumps(value, sort_keys=True) for value in values]
    if len(set(texts)) == 1:
        return ""
    return f"{key} is " + " and ".join(
        f"{text} on process {called(texts.index(text), names)}" for text in dict.fromkeys(texts)
    )


def fail(message: str, code: int) -> None:
    """Make all processes end because this one must: it says why, and the others that it did. Alone, nothing happens.

    An error of a collective operation is often only the echo of another process's end, so that is waited for first.
    """
    if _line is None:
        return
    say(message, code)
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        _line.send({"failed": message, "code": code})
        time.sleep(3 * GRACE)  # The answer ends this process sooner.
    os._exit(code)


def wait_for_cause(seconds: float = 3.0) -> None:
    """Give the line time to say that another process has died, which ends this one, before an error is told as ours."""
    if _line is not None:
        time.sleep(seconds)


def stop() -> None:
    """Leave when all have come here."""
    global _line
    if _line is None:
        return
    _line.send({"done": True})
    _line.over.wait()
    _line = None
    jax.distributed.shutdown()


@contextlib.contextmanager
def joined(coordinator: str = "", processes: int | None = None, process: int | None = None) -> Iterator[None]:
    """`start`, and `stop` unless there was an error."""
    start(coordinator, processes, process)
    yield
    stop()


# Arrays ---------------------------------------------------------------------------------------------------------------


def rows_of(mesh: Mesh, batch: int) -> slice | np.ndarray:
    """The rows of each global batch that this process reads, in rising order: those of its devices.

    InputError, alike everywhere, if some process has no device in the mesh, or they have not met.
    """
    if _line is None:
        if jax.process_count() > 1:
            raise InputError("there are several processes: each must call hosts.start() first")
        return slice(None)
    if len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
        raise InputError(f"with {jax.process_count()} processes, devices= must leave none of them without a device")
    return _own(NamedSharding(mesh, PartitionSpec("data")), (batch,), 0)


def _own(where: NamedSharding, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The places along an axis of a global array that are on devices of this process."""
    indices = where.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(shape[axis])[index[axis]] for index in indices if index is not None]))


def place(local: Any, where: NamedSharding, rows: int | None = None, axis: int = 0) -> Any:
    """A tree of arrays on the devices of `where`, from what each process holds of them.

    That is its own of `rows` rows along `axis`, as `rows_of` tells; without `rows`, the whole of each array.
    """
    if _line is None:
        return jax.device_put(local, where)

    place_one = _place_whole if rows is None else partial(_place_rows, rows=rows, axis=axis)
    return jax.tree.map(lambda leaf: place_one(np.asarray(leaf), where), local)


def _place_whole(leaf: np.ndarray, where: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index or ...])


def _place_rows(leaf: np.ndarray, where: NamedSharding, *, rows: int, axis: int) -> jax.Array:
    shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])
    own = _own(where, shape, axis)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * leaf.ndim
        here = np.searchsorted(own, np.arange(rows)[index[axis]])
        return leaf[(*index[:axis], slice(here[0], here[-1] + 1), *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, where, part)


def make_agreement(mesh: Mesh, mine: Callable[[], int]) -> Callable[[], int]:
    """A function to be called before every dispatch, by all: the largest number that any process had at the last call.

    The numbers travel between the devices, behind the dispatch before, so that no process ever waits for another: all
    learn of a signal before the same dispatch, one later than it came. Alone: this process's number, at once.
    """
    if _line is None:
        return mine
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending: list[jax.Array] = []

    def agreed() -> int:
        number = np.full(1, mine(), np.int32)
        pending.append(largest(jax.make_array_from_callback((mesh.size,), everywhere, lambda _: number)))
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return agreed
