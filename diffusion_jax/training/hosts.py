"""Several processes as one run: how they meet, agree, and leave together.

Every process executes the same program on the devices of all (`jax.distributed`). What a collective operation cannot do
goes over a line of their own, a TCP connection of each process with process 0: small JSON values are gathered, every
process is heard of every `PERIOD` seconds, and whoever stops tells the others why. So no process waits for ever in a
collective operation that another will not join: when one fails, is refused, dies (its connection breaks) or is silent
for `SILENCE` seconds (its machine is lost), all others say which one and end.

A process alone pays for none of this: every function here then returns at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_jax.typing import InputError

PERIOD, SILENCE = 2.0, 30.0
"""Seconds between two signs of life, and after how many without one a process counts as dead."""
PATIENCE = 300
"""Seconds that processes wait for each other at the start."""
_GRACE = 5.0
_HELLO_BYTES = 1024
T = TypeVar("T")


class _Group(NamedTuple):
    """This process among the others. `answers` is what process 0 has sent back."""

    index: int
    count: int
    connection: socket.socket
    answers: queue.SimpleQueue
    names: list[str]
    over: threading.Event


_group: _Group | None = None
_last_word = threading.Lock()
_said: list[str] = []


# Meeting --------------------------------------------------------------------------------------------------------------


def start(coordinator: str = "", processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of a run, before anything else uses JAX; nothing happens where there are none.

    They are found as `jax.distributed` finds them: SLURM, Open MPI, a Kubernetes job, a TPU pod; or they are given:
    process number `process` of `processes`, of which number 0 listens at coordinator="HOST:PORT". processes=1 stays
    alone even there. Raises InputError for a description that makes no sense, or if the others do not come.
    """
    global _group
    if _group is not None or not _described(coordinator, processes, process):
        return
    if not jax.distributed.is_initialized():
        _initialize(coordinator, processes, process)
    if jax.process_count() > 1:
        _check_devices()
        _group = _meet(coordinator)
        gathered = gather(socket.gethostname(), "names")
        _group.names[:] = gathered


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
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=60,  # for what the line should miss
        )
    except (RuntimeError, ValueError, KeyError) as error:
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the processes of this run did not find each other within {PATIENCE} s ({text[:200]}); give "
            "coordinator=HOST:PORT processes=N process=I, or processes=1 for a run of this process alone"
        ) from None
    if main:
        signal.signal(signal.SIGTERM, before)


def _check_devices() -> None:
    """InputError unless all processes have the same number of devices, of one kind: all see it alike."""
    counts = [sum(d.process_index == p for d in jax.devices()) for p in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise InputError(f"every process needs the same number of devices; there are, process by process, {counts}")


def _meet(coordinator: str) -> _Group:
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
        _Hub(listener, word["token"], count).start()
    connection = _call(word, index)
    over, answers = threading.Event(), queue.SimpleQueue()
    group = _Group(index, count, connection, answers, ["?"] * count, over)
    threading.Thread(target=_listen, args=(group,), name="hosts", daemon=True).start()
    return group


def _addresses(coordinator: str) -> list[str]:
    """Where this machine may be reached, the likeliest first."""
    found = [coordinator.rpartition(":")[0]] if coordinator else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Nothing is sent: it only shows the address that this machine would use.
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys([*found, socket.getfqdn()]))[:8]


def _call(word: Mapping[str, Any], index: int) -> socket.socket:
    """A connection to process 0; InputError if it cannot be had."""
    for address in ["127.0.0.1"] if index == 0 else [*word["addresses"], "127.0.0.1"]:
        with contextlib.suppress(OSError, ValueError):
            connection = socket.create_connection((address, word["port"]), timeout=10)
            _send(connection, {"hello": word["token"], "process": index})
            if _first_line(connection) == {"welcome": word["token"]}:
                connection.settimeout(None)
                return connection
            connection.close()
    raise InputError(
        f"process {index} cannot reach process 0 at {', '.join(word['addresses'])}, port {word['port']}: "
        "the hosts of a run must be able to connect to each other on any port"
    )


# The line -------------------------------------------------------------------------------------------------------------


class _Lines:
    """Cuts what a connection delivers into JSON values, one a line."""

    def __init__(self) -> None:
        self.rest = b""

    def take(self, received: bytes) -> list[dict]:
        *lines, self.rest = (self.rest + received).split(b"\n")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message of this line")
        return messages


def _first_line(connection: socket.socket) -> dict:
    """The first message; byte by byte, so that nothing of the next is taken."""
    lines = _Lines()
    while received := connection.recv(1):
        if messages := lines.take(received):
            return messages[0]
    raise OSError("closed")


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _listen(group: _Group) -> None:
    """The thread of every process: answers from process 0, a sign of life now and then, and the end if all ends."""
    lines, heard, sent = _Lines(), time.monotonic(), 0.0
    selector = selectors.DefaultSelector()
    selector.register(group.connection, selectors.EVENT_READ)
    while not group.over.is_set():
        try:
            if time.monotonic() - sent > PERIOD:
                _send(group.connection, {"ping": True})
                sent = time.monotonic()
            received = group.connection.recv(65536) if selector.select(PERIOD / 2) else None
        except OSError:
            received = b""
        if received == b"" and not group.over.is_set():
            _end(_died(0, group.names, None), 1)
        if received:
            heard = time.monotonic()
            for message in lines.take(received):
                _obey(group, message)
        if time.monotonic() - heard > SILENCE:
            _end(_died(0, group.names, SILENCE), 1)


def _obey(group: _Group, message: Mapping[str, Any]) -> None:
    if "failed" in message:
        own = message["process"] == group.index
        _end(None if own else message["failed"], message["code"])
    elif "bye" in message:
        group.over.set()
    elif "gathered" in message:
        group.answers.put(message["gathered"])


class _Hub(threading.Thread):
    """The thread of process 0 that holds the line of every process, its own included."""

    def __init__(self, listener: socket.socket, token: str, count: int) -> None:
        super().__init__(name="hub", daemon=True)
        self.listener, self.token, self.count = listener, token, count
        self.selector = selectors.DefaultSelector()
        self.connections: dict[int, socket.socket] = {}
        self.lines: dict[socket.socket, _Lines] = {}
        self.heard: dict[int, float] = {}
        self.values: dict[int, Any] = {}
        self.labels: dict[int, str] = {}
        self.names = ["?"] * count
        self.done: set[int] = set()

    def run(self) -> None:
        self.selector.register(self.listener, selectors.EVENT_READ)
        sent = 0.0
        while len(self.done) < self.count:
            for key, _ in self.selector.select(PERIOD / 2):
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    self._receive(key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            if now - sent > PERIOD:
                self._tell({"ping": True})
                sent = now
            for process, heard in list(self.heard.items()):
                if now - heard > SILENCE:
                    self._fail(process, _died(process, self.names, SILENCE), 1)
        self._tell({"bye": True})

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(_GRACE)
        self.lines[connection] = _Lines()
        self.selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        process = next((p for p, c in self.connections.items() if c is connection), None)
        try:
            received = connection.recv(65536)
            messages = self.lines[connection].take(received)
        except (OSError, ValueError):
            received, messages = b"", []
        if not received:
            self._drop(connection)
            if process is not None and process not in self.done:
                self._fail(process, _died(process, self.names, None), 1)
        for message in messages:
            if process is not None:
                self._answer(process, message)
            elif message.get("hello") == self.token:
                process = message["process"]
                self.connections[process] = connection
                self.heard[process] = time.monotonic()
                with contextlib.suppress(OSError):
                    _send(connection, {"welcome": self.token})

    def _answer(self, process: int, message: Mapping[str, Any]) -> None:
        self.heard[process] = time.monotonic()
        if "gather" in message:
            self.values[process], self.labels[process] = message["value"], message["gather"]
            if len(self.values) == self.count:
                self._gathered()
        elif "failed" in message:
            self._fail(process, f"process {_called(process, self.names)} stopped: {message['failed']}", message["code"])
        elif "done" in message:
            self.done.add(process)

    def _gathered(self) -> None:
        values, labels = ([table[p] for p in range(self.count)] for table in (self.values, self.labels))
        self.values, self.labels = {}, {}
        if len(set(labels)) > 1:
            self._fail(-1, f"the processes are not at the same place of the program: {labels}", 1)
        if labels[0] == "names":
            self.names = values
        self._tell({"gathered": values})

    def _tell(self, message: Mapping[str, Any]) -> None:
        for connection in list(self.connections.values()):
            with contextlib.suppress(OSError):  # Who cannot be told is missed at the next look.
                _send(connection, message)

    def _fail(self, process: int, text: str, code: int) -> None:
        """Tell all others, wait until they are gone (JAX aborts them when process 0 goes first), then leave too."""
        message = {"failed": text, "code": code, "process": process}
        mine = self.connections.pop(0, None)
        self._tell(message)
        deadline = time.monotonic() + _GRACE
        others = {p: c for p, c in self.connections.items() if p != process}
        for connection in others.values():
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                while connection.recv(65536):
                    pass
        if mine is not None:
            with contextlib.suppress(OSError):
                _send(mine, message)
        time.sleep(_GRACE)
        _end(None if process == 0 else text, code)

    def _drop(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        self.lines.pop(connection, None)
        connection.close()


def _died(process: int, names: Sequence[str], silent: float | None) -> str:
    how = "died" if silent is None else f"has not been heard of for {silent:.0f} s"
    return (
        f"process {_called(process, names)} {how}: this run cannot go on without it and stops; what was complete "
        "stays, the same command goes on from there"
    )


def _called(process: int, names: Sequence[str]) -> str:
    known = 0 <= process < len(names) and names[process] != "?"
    return f"{process} ({names[process]})" if known else str(process)


def _end(message: str | None, code: int) -> None:
    """End this process from any thread, whatever its main thread waits for; the first cause is the one that is told."""
    with _last_word:
        if message is not None and not _said:
            _said.append(message)
            prefix = "error: " if code < 128 else ""
            os.write(2, f"\n{prefix}{message}\n".encode())
        os._exit(code)


# What a run uses ------------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether this process is one of several."""
    return _group is not None


def first() -> bool:
    """Whether this process is the one that prints and writes: process 0, or the only one."""
    return _group is None or _group.index == 0


def gather(value: T, label: str) -> list[T]:
    """The JSON value of every process, in their order. All must call it at the same place, which `label` names."""
    if _group is None:
        return [value]
    _send(_group.connection, {"gather": label, "value": value})
    return _group.answers.get()


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
    if _group is None:
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
    if _group is None:
        return
    probe = folder / f".seen-{from_first(secrets.token_hex(4), 'probe')}"
    on_first(probe.touch, "probe written")
    deadline = time.monotonic() + 10  # Network file systems show a new file late.
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = gather(probe.exists(), "probe seen")
    on_first(lambda: probe.unlink(missing_ok=True), "probe removed")
    if not all(seen):
        blind = _called(seen.index(False), _group.names)
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


def check_same(values: Mapping[str, Any], label: str = "arguments") -> None:
    """InputError, the same on every process, unless all were started alike: what differs, and each value."""
    everyone = gather(json.loads(json.dumps(dict(values), default=str)), label)
    names = [] if _group is None else _group.names
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
        f"{text} on process {_called(texts.index(text), names)}" for text in dict.fromkeys(texts)
    )


def fail(message: str, code: int) -> None:
    """Make all processes end because this one must: it says why, and the others that it did. Alone, nothing happens.

    An error of a collective operation is often only the echo of another process's end, so that is waited for first.
    """
    if _group is None:
        return
    with _last_word:
        if not _said:
            _said.append(message)
            if message:
                print(f"error: {message}" if code < 128 else message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    with contextlib.suppress(OSError):
        _send(_group.connection, {"failed": message, "code": code})
        time.sleep(2 * _GRACE)
    os._exit(code)


def wait_for_cause(seconds: float = 3.0) -> None:
    """Give the line time to say that another process has died, which ends this one, before an error is told as ours."""
    if _group is not None:
        time.sleep(seconds)


def stop() -> None:
    """Leave when all have come here."""
    global _group
    if _group is None:
        return
    _send(_group.connection, {"done": True})
    _group.over.wait()
    _group = None
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

    InputError, alike everywhere, if some process has no device in the mesh.
    """
    if _group is None:
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
    if _group is None:
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
    if _group is None:
        return mine
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending: list[jax.Array] = []

    def agreed() -> int:
        number = np.full(1, mine(), np.int32)
        pending.append(largest(jax.make_array_from_callback((mesh.size,), everywhere, lambda _: number)))
        return int(pending.pop(0)) if len(pending) > 1 else 0

    return agreed
