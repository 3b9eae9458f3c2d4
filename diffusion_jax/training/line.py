"""The line between the processes of a run: a TCP connection of each with process 0, whatever the devices do.

    process -> hub   {"hello", "process"}   {"gather", "value"}   {"failed", "code"}   {"done"}    {"ping"}
    hub -> process   {"welcome"}            {"gathered"}          {"failed", "code"}   {"bye"}     {"ping"}

JSON, one message a line. Each side sends a sign of life every `PERIOD` seconds. A connection that breaks before "done",
or is silent for `SILENCE` seconds, is the end of its process, and so of all: whoever learns of it says so and ends.
Nothing here uses JAX.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.typing import InputError

PERIOD, SILENCE = 2.0, 30.0
"""Seconds between two signs of life, and after how many without one a process counts as dead."""
GRACE = 5.0
"""Seconds that the hub gives the others to end before process 0 does."""
_last_word = threading.Lock()
_said: list[str] = []


class Line:
    """The end of the line that a process holds; `names` are those of all machines, `over` is set when all have left."""

    def __init__(self, index: int, connection: socket.socket) -> None:
        self.index, self.connection = index, connection
        self.names: list[str] = []
        self.over = threading.Event()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self._sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, from any thread."""
        with self._sending:
            send(self.connection, message)

    def gather(self, value: Any, label: str) -> list[Any]:
        """The values of all processes, in their order."""
        self.send({"gather": label, "value": value})
        return self.answers.get()

    def start(self) -> None:
        """Begin to listen."""
        threading.Thread(target=listen, args=(self,), name="line", daemon=True).start()


def call(word: Mapping[str, Any], index: int) -> socket.socket:
    """A connection to process 0; InputError if it cannot be had."""
    for address in ["127.0.0.1"] if index == 0 else [*word["addresses"], "127.0.0.1"]:
        with contextlib.suppress(OSError, ValueError):
            connection = socket.create_connection((address, word["port"]), timeout=5)
            send(connection, {"hello": word["token"], "process": index})
            if first_line(connection) == {"welcome": word["token"]}:
                connection.settimeout(None)
                return connection
            connection.close()
    raise InputError(
        f"process {index} cannot reach process 0 at {', '.join(word['addresses'])}, port {word['port']}: "
        "the hosts of a run must be able to connect to each other on any port"
    )


class Lines:
    """Cuts what a connection delivers into JSON values, one a line."""

    def __init__(self) -> None:
        self.rest = b""

    def take(self, received: bytes) -> list[dict]:
        *lines, self.rest = (self.rest + received).split(b"\n")
        messages = [json.loads(text) for text in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message of this line")
        return messages


def first_line(connection: socket.socket) -> dict:
    """The first message; byte by byte, so that nothing of the next is taken."""
    lines = Lines()
    while received := connection.recv(1):
        if messages := lines.take(received):
            return messages[0]
    raise OSError("closed")


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send one message."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def listen(line: Line) -> None:
    """The thread of every process: answers from process 0, a sign of life now and then, and the end if all ends."""
    lines, heard, sent = Lines(), time.monotonic(), 0.0
    selector = selectors.DefaultSelector()
    selector.register(line.connection, selectors.EVENT_READ)
    while not line.over.is_set():
        try:
            if time.monotonic() - sent > PERIOD:
                line.send({"ping": True})
                sent = time.monotonic()
            received = line.connection.recv(65536) if selector.select(PERIOD / 2) else None
        except OSError:
            received = b""
        if received == b"" and not line.over.is_set():
            end(died(0, line.names, None), 1)
        if received:
            heard = time.monotonic()
            for message in lines.take(received):
                _obey(line, message)
        if time.monotonic() - heard > SILENCE:
            end(died(0, line.names, SILENCE), 1)


def _obey(line: Line, message: Mapping[str, Any]) -> None:
    if "failed" in message:
        own = message["process"] == line.index
        end("" if own else message["failed"], message["code"])
    elif "bye" in message:
        line.over.set()
    elif "gathered" in message:
        line.answers.put(message["gathered"])


class Hub(threading.Thread):
    """The thread of process 0 that holds the line of every process, its own included."""

    def __init__(self, listener: socket.socket, token: str, count: int) -> None:
        super().__init__(name="hub", daemon=True)
        self.listener, self.token, self.count = listener, token, count
        self.selector = selectors.DefaultSelector()
        self.connections: dict[int, socket.socket] = {}
        self.lines: dict[socket.socket, Lines] = {}
        self.heard: dict[int, float] = {}
        self.values: dict[int, Any] = {}
        self.labels: dict[int, str] = {}
        self.names = ["?"] * count
        self.done: set[int] = set()

    def run(self) -> None:
        """Until all are done."""
        try:
            self._serve()
        except Exception as error:
            self._fail(-1, f"the line between the processes broke: {error!r}", 1)

    def _serve(self) -> None:
        self.selector.register(self.listener, selectors.EVENT_READ)
        sent, began = 0.0, time.monotonic()
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
                    self._fail(process, died(process, self.names, SILENCE), 1)
            missing = [p for p in range(self.count) if p not in self.connections]
            if missing and now - began > 2 * SILENCE:
                self._fail(missing[0], f"process {missing[0]} did not connect to process 0", 1)
        self._tell({"bye": True})

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(GRACE)
        self.lines[connection] = Lines()
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
                self._fail(process, died(process, self.names, None), 1)
        for message in messages:
            if process is not None:
                self._answer(process, message)
            elif message.get("hello") == self.token:
                process = message["process"]
                self.connections[process] = connection
                self.heard[process] = time.monotonic()
                with contextlib.suppress(OSError):
                    send(connection, {"welcome": self.token})

    def _answer(self, process: int, message: Mapping[str, Any]) -> None:
        self.heard[process] = time.monotonic()
        if "gather" in message:
            self.values[process], self.labels[process] = message["value"], message["gather"]
            if len(self.values) == self.count:
                self._gathered()
        elif "failed" in message:
            self._fail(process, f"process {called(process, self.names)} stopped: {message['failed']}", message["code"])
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
                send(connection, message)

    def _fail(self, process: int, text: str, code: int) -> None:
        """Tell all others, wait until they are gone (JAX aborts them when process 0 goes first), then leave too."""
        message = {"failed": text, "code": code, "process": process}
        mine = self.connections.pop(0, None)
        self._tell(message)
        deadline = time.monotonic() + GRACE
        others = {p: c for p, c in self.connections.items() if p != process}
        for connection in others.values():
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                while connection.recv(65536):
                    pass
        if mine is not None:
            with contextlib.suppress(OSError):
                send(mine, message)
        time.sleep(GRACE)
        end("" if process == 0 else text, code)

    def _drop(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        self.lines.pop(connection, None)
        connection.close()


def died(process: int, names: Sequence[str], silent: float | None) -> str:
    """What is said when a process broke its connection, or was `silent` for so many seconds."""
    how = "died" if silent is None else f"has not been heard of for {silent:.0f} s"
    return (
        f"process {called(process, names)} {how}: this run cannot go on without it and stops; what was complete "
        "stays, the same command goes on from there"
    )


def called(process: int, names: Sequence[str]) -> str:
    """A process by its number and the name of its machine."""
    known = 0 <= process < len(names) and names[process] != "?"
    return f"{process} ({names[process]})" if known else str(process)


def say(message: str, code: int) -> None:
    """Write why this process ends, unless it has been said: the first cause is the one that counts."""
    with _last_word:
        if message and not _said:
            _said.append(message)
            prefix = "error: " if code < 128 else ""
            # Not through Python's buffered stream, which another thread may be in the middle of.
            os.write(2, f"\n{prefix}{message}\n".encode())


def end(message: str, code: int) -> None:
    """End this process from any thread, whatever its main thread waits for."""
    say(message, code)
    os._exit(code)
