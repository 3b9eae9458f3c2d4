"""The line between processes, how they are found, and what they compare; real processes are in long/test_hosts.py."""

import http.server
import json
import socket
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diffusion_jax.training import hosts, line
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis
from diffusion_jax.typing import InputError

SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of an allocation
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook's pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_surroundings(environment, found):
    assert hosts.surroundings(environment) == found


@pytest.mark.parametrize("workers", [1, 4])
def test_a_cloud_tpu_is_asked_how_many_hosts_it_has(workers, monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.path.endswith("/worker-network-endpoints") and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write(",".join(f"unknown:unknown:10.0.0.{i}" for i in range(workers)).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    assert hosts.surroundings(environment) is None, "no chip, no question"
    monkeypatch.setattr(hosts, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    assert hosts.surroundings(environment) == ("tpu" if workers > 1 else None)
    assert hosts.surroundings(environment | {"TPU_SKIP_MDS_QUERY": "1"}) is None
    server.shutdown()
    assert hosts.surroundings({"GCE_METADATA_IP": "127.0.0.1:9"}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 2}, "need coordinator=HOST:PORT"),
        ({"process": 0}, "need coordinator=HOST:PORT"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "a:b", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2}, "process=I too"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "numbered 0 to 1"),
    ],
)
def test_descriptions_that_make_no_sense(arguments, message):
    with pytest.raises(InputError, match=message):
        hosts.start(**arguments)


def test_a_process_alone_is_not_touched(monkeypatch):
    for name in SLURM:
        monkeypatch.setenv(name, SLURM[name])
    hosts.start(processes=1)
    assert not hosts.several()
    assert hosts.first()
    assert not jax.distributed.is_initialized()
    assert hosts.gather({"a": 1}, "x") == [{"a": 1}]
    assert hosts.on_first(lambda: 3, "x") == hosts.from_first(3, "x") == hosts.first_then_others(lambda: 3, "x") == 3
    mesh = make_mesh(1)
    assert hosts.rows_of(mesh, 8) == slice(None)
    assert hosts.make_agreement(mesh, lambda: 15)() == 15
    placed = hosts.place({"a": np.arange(4)}, split_axis(mesh))["a"]
    assert placed.sharding.spec == PartitionSpec("data")
    hosts.check_same({"a": 1})
    hosts.fail("nothing happens", 1)
    hosts.stop()


def test_all_or_none_passes_errors_on():
    with pytest.raises(KeyError), hosts.all_or_none("x"):
        raise KeyError("y")
    with pytest.raises(InputError), hosts.all_or_none("x"):
        raise InputError("z")


# What processes compare ----------------------------------------------------------------------------------------------


def check(monkeypatch, *everyone):
    monkeypatch.setattr(hosts, "gather", lambda value, label: list(everyone))
    hosts.check_same(everyone[0])


def test_those_started_alike_are_let_through(monkeypatch):
    check(monkeypatch, *[{"width": 64, "levels": [1, 2]}] * 3)


def test_a_difference_is_named_with_all_values(monkeypatch):
    with pytest.raises(InputError, match="width is 64 on process 0 and 32 on process 2") as caught:
        check(monkeypatch, {"width": 64, "steps": 1}, {"width": 64, "steps": 1}, {"width": 32, "steps": 1})
    assert "steps" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_one_lacks_is_a_difference(monkeypatch):
    with pytest.raises(InputError, match="tensor is null on process 0 and 2 on process 1"):
        check(monkeypatch, {}, {"tensor": 2})


def test_many_differences_are_counted(monkeypatch):
    with pytest.raises(InputError, match="and 2 more"):
        check(monkeypatch, dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1))


def test_the_fingerprint_sees_arguments_versions_code_and_flags(monkeypatch):
    record = {"experiment": "e", "arguments": {"width": 64}, "versions": {"jax": "1"}, "commit": "c"}
    one = hosts.fingerprint(record, devices=4)
    assert one["width"] == 64
    assert one["devices"] == 4
    assert one["the version of jax"] == "1"
    assert json.loads(json.dumps(one)) == one
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_dump_to=/x")
    assert hosts.fingerprint(record)["XLA_FLAGS"] == "--xla_a=1"


# The line ------------------------------------------------------------------------------------------------------------


class Ends:
    """A hub and the raw connections of n processes, all in this one."""

    def __init__(self, n):
        listener = socket.create_server(("127.0.0.1", 0))
        self.word = {"token": "t", "port": listener.getsockname()[1], "addresses": ["127.0.0.1"]}
        self.hub = line.Hub(listener, "t", n)
        self.hub.start()
        self.ends = [line.call(self.word, i) for i in range(n)]
        self.lines, self.heard = [line.Lines() for _ in range(n)], [[] for _ in range(n)]
        for end in self.ends:
            end.settimeout(10)

    def tell(self, i, **message):
        line.send(self.ends[i], message)

    def hear(self, i):
        """The next message to process i that is not a mere sign of life."""
        while True:
            self.heard[i] = [message for message in self.heard[i] if "ping" not in message]
            if self.heard[i]:
                return self.heard[i].pop(0)
            received = self.ends[i].recv(65536)
            assert received, "closed"
            self.heard[i] += self.lines[i].take(received)


@pytest.fixture
def ended(monkeypatch):
    """What would have ended this process."""
    ends = []
    monkeypatch.setattr(line, "end", lambda message, code: ends.append((message, code)))
    monkeypatch.setattr(line, "GRACE", 0.2)
    return ends


@pytest.fixture
def line_of(ended):
    """Makes lines; their hubs end with the test."""
    lines = []

    def make(n):
        lines.append(Ends(n))
        return lines[-1]

    yield make
    for ends in lines:
        ends.hub.done.update(range(ends.hub.count))
        ends.hub.join(10)
        assert not ends.hub.is_alive()


def named(ends, names):
    for i, name in enumerate(names):
        ends.tell(i, gather="names", value=name)
    for i in range(len(names)):
        assert ends.hear(i) == {"gathered": names}


def test_values_are_gathered_in_order_again_and_again(line_of):
    ends = line_of(3)
    for turn in range(20):
        for i in (2, 0, 1):
            ends.tell(i, gather=f"turn {turn}", value={"from": i, "long": "x" * 20_000 * (turn == 7)})
        answers = [ends.hear(i)["gathered"] for i in range(3)]
        assert answers[0] == answers[1] == answers[2]
        assert [value["from"] for value in answers[0]] == [0, 1, 2]
    for i in range(3):
        ends.tell(i, done=True)
    assert [ends.hear(i) for i in range(3)] == [{"bye": True}] * 3
    ends.hub.join(5)
    assert not ends.hub.is_alive()


def test_a_broken_connection_is_told_to_all_others_by_name(line_of):
    ends = line_of(3)
    named(ends, ["a", "b", "c"])
    began = time.monotonic()
    ends.ends[1].close()
    told = ends.hear(2)
    assert told["failed"].startswith("process 1 (b) died: this run cannot go on without it")
    assert told["code"] == 1
    ends.ends[2].close()
    assert ends.hear(0) == told
    assert time.monotonic() - began < 5


def test_silence_counts_as_death(line_of, monkeypatch):
    monkeypatch.setattr(line, "SILENCE", 1.0)
    monkeypatch.setattr(line, "PERIOD", 0.2)
    ends = line_of(2)
    deadline = time.monotonic() + 20
    told = None
    while told is None and time.monotonic() < deadline:
        ends.tell(0, ping=True)  # process 1 says nothing
        ends.ends[0].settimeout(0.1)
        try:
            told = ends.hear(0)
        except TimeoutError:
            continue
    assert told is not None
    assert told["failed"].startswith("process 1 has not been heard of for 1 s")


def test_who_stops_tells_the_others_why_and_with_which_code(line_of):
    ends = line_of(2)
    named(ends, ["a", "b"])
    ends.tell(1, failed="no such folder", code=2)
    ends.ends[1].close()
    assert ends.hear(0) == {"failed": "process 1 (b) stopped: no such folder", "code": 2, "process": 1}


def test_processes_at_different_places_are_stopped(line_of):
    ends = line_of(2)
    ends.tell(0, gather="here", value=0)
    ends.tell(1, gather="there", value=0)
    assert "not at the same place of the program: ['here', 'there']" in ends.hear(1)["failed"]


def test_strangers_on_the_port_do_no_harm(line_of, ended):
    ends = line_of(2)
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"7\n", b'{"hello": "wrong", "process": 0}\n', b"\xff\xfe\n", b""):
        with socket.create_connection(("127.0.0.1", ends.word["port"])) as stranger:
            stranger.sendall(text)
    named(ends, ["a", "b"])
    assert not ended


def test_a_process_that_cannot_call_says_so():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        word = {"token": "t", "port": unused.getsockname()[1], "addresses": ["127.0.0.1"]}
        with pytest.raises(InputError, match="process 3 cannot reach process 0 at 127.0.0.1"):
            line.call(word, 3)


# Arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_are_placed_where_the_sharding_wants_them(axis, monkeypatch):
    """The arithmetic of `place`, on one process that takes itself for one of several."""
    monkeypatch.setattr(hosts, "_line", object())
    mesh = make_mesh(1)
    own = hosts.rows_of(mesh, 6)
    np.testing.assert_array_equal(own, np.arange(6))
    whole = np.arange(36).reshape(6, 6)
    placed = hosts.place({"a": whole}, split_axis(mesh, axis), rows=6, axis=axis)["a"]
    np.testing.assert_array_equal(placed, whole)
    np.testing.assert_array_equal(hosts.place(whole, replicated(mesh)), whole)
    assert hosts.place(np.float32(3), replicated(mesh)) == 3
