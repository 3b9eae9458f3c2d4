"""Torch's files without torch: what they hold comes back bit for bit, and nothing in them can run.

The files are written here, byte by byte as the formats say; that torch's own are read is in tests/parity.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.typing import InputError
from diffusion_jax.weights import torch_files

laws = settings(deadline=None, max_examples=400, derandomize=True)
NAMES = {np.dtype(t): name for name, t in torch_files.TYPES.items()}
STATE = {
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "brain": np.arange(-3, 3).astype(ml_dtypes.bfloat16),
    "full": np.array([[np.nan, -0.0, np.inf, 1e-42]], np.float32),
    "whole": np.full((), 7, np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


class Symbol:
    """Pickled as a global of any name, without the module being there."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickled as a call, with a BUILD after it if there is a state."""

    def __init__(self, function: Symbol, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state


class New(Call):
    """Pickled as an object of a class."""


class Stored:
    """Pickled as a persistent id."""

    def __init__(self, array: np.ndarray, key: str, old: bool):
        kind = Symbol("torch", NAMES[array.dtype])
        self.pid = ("storage", kind, key, "cpu", array.size, *((None,) if old else ()))


class Writer(pickle._Pickler):
    """Python's pickler in Python, which lets names be written that cannot be imported."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Stored) else None

    def save_symbol(self, obj):
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.NEWOBJ if isinstance(obj, New) else pickle.REDUCE)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    dispatch = pickle._Pickler.dispatch | {Symbol: save_symbol, Call: save_call, New: save_call}


def pickled(content, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    Writer(file, protocol).dump(content)
    return file.getvalue()


REBUILD, ORDERED = Symbol("torch._utils", "_rebuild_tensor_v2"), Symbol("collections", "OrderedDict")


def tensor(array: np.ndarray, key: str, old: bool, **changes):
    strides = tuple(s // array.itemsize for s in array.strides)
    parts = {"storage": Stored(array, key, old), "offset": 0, "shape": array.shape, "strides": strides} | changes
    return Call(REBUILD, *parts.values(), False, Call(ORDERED))


def archive(content, arrays: dict[str, np.ndarray], protocol: int = 2) -> bytes:
    """Layout (2)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("w/data.pkl", pickled(content, protocol))
        members.writestr("w/byteorder", "little")
        for key, array in arrays.items():
            members.writestr(f"w/data/{key}", array.tobytes())
        members.writestr("w/version", "3\n")
    return file.getvalue()


def stream(content, arrays: dict[str, np.ndarray]) -> bytes:
    """Layout (3)."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [torch_files.MAGIC, torch_files.VERSION, system, content, list(arrays)]
    blocks = (struct.pack("<q", array.size) + array.tobytes() for array in arrays.values())
    return b"".join([*map(pickled, head), *blocks])


LAYOUTS = {"archive": archive, "stream": stream}


def file_of(layout: str, state=STATE) -> bytes:
    arrays = {str(i): value for i, value in enumerate(state.values())}
    old = layout == "stream"
    content = {name: tensor(value, str(i), old) for i, (name, value) in enumerate(state.items())}
    return LAYOUTS[layout](content, arrays)


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape, a[name].tobytes()) == (b[name].dtype, b[name].shape, b[name].tobytes())


def refused(path, data: bytes, match: str):
    path.write_bytes(data)
    with pytest.raises(InputError, match=match) as error:
        torch_files.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_type_comes_back_bit_for_bit(tmp_path, layout):
    (tmp_path / "w.pth").write_bytes(file_of(layout))
    same_bits(torch_files.load(tmp_path / "w.pth"), STATE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickles_since_the_second(tmp_path, protocol):
    a = np.arange(4, dtype=np.float32)
    (tmp_path / "w.pt").write_bytes(archive({"a": tensor(a, "0", False), "again": [1, 2.5, "x"]}, {"0": a}, protocol))
    same_bits(torch_files.load(tmp_path / "w.pt"), {"a": a})


def test_views_share_a_storage_and_dicts_nest(tmp_path):
    a = np.arange(12, dtype=np.float32)
    views = {"turned": a.reshape(3, 4).T, "part": a.reshape(3, 4)[1:, ::2]}
    starts = {"turned": 0, "part": 4}
    stored = {
        name: tensor(a, "0", False, offset=starts[name], shape=v.shape, strides=tuple(s // 4 for s in v.strides))
        for name, v in views.items()
    }
    parameter = Call(Symbol("torch._utils", "_rebuild_parameter"), stored["turned"], True, Call(ORDERED))
    content = {"epoch": 3, "model": Call(ORDERED, list(stored.items()), state={"_metadata": {}}), "p": parameter}
    (tmp_path / "w.bin").write_bytes(archive(content, {"0": a}))
    expected = {f"model.{name}": np.ascontiguousarray(v) for name, v in views.items()}
    same_bits(torch_files.load(tmp_path / "w.bin"), expected | {"p": expected["model.turned"]})


EVIL = {
    "os.system": Call(Symbol("os", "system"), "touch /tmp/never"),
    "builtins.eval": Call(Symbol("builtins", "eval"), "1"),
    "torch.load": Call(Symbol("torch", "load"), "x"),
    "torch._utils._rebuild_sparse_tensor": Call(Symbol("torch._utils", "_rebuild_sparse_tensor")),
    "collections.OrderedDict.fromkeys": Call(Symbol("collections", "OrderedDict.fromkeys"), "x"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVIL)
def test_any_other_name_is_refused_and_told(tmp_path, layout, name):
    refused(tmp_path / "w.pth", LAYOUTS[layout]({"a": EVIL[name]}, {}), f"it names {name}")


class Rogue:
    """What a real attack pickles."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_pickle_that_would_run_code_does_not(tmp_path, protocol):
    mark, data = tmp_path / "was here", io.BytesIO()
    with zipfile.ZipFile(data, "w") as members:
        members.writestr("w/data.pkl", pickle.dumps({"a": Rogue(mark)}, protocol))
    refused(tmp_path / "w.pth", data.getvalue(), r"posix\.mkdir|mkdir|the pickle does")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Rogue(mark), protocol))
    assert mark.exists()  # the attack is a real one


@pytest.mark.parametrize("op", [b"(ios\nsystem\n", b"}\x81", b"\x92", b"\x82\x01", b"(cos\nsystem\no"])
def test_other_ways_to_make_objects_are_refused(tmp_path, op):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as members:
        members.writestr("w/data.pkl", b"\x80\x02}" + op + b".")
    refused(tmp_path / "w.pth", data.getvalue(), "could run code|is not read")


A = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": (7,), "strides": (1,)}, "lies outside"),
        ({"shape": (2,), "strides": (6,)}, "lies outside"),
        ({"offset": 1}, "lies outside"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "lies outside"),  # a terabyte out of nothing
        ({"offset": -1}, "a tensor of offset -1"),
        ({"shape": (6.0,)}, "a tensor of offset"),
        ({"shape": (2, 3)}, "not made of"),
        ({"storage": "0"}, "not made of"),
    ],
)
def test_tensors_stay_in_their_storage(tmp_path, changes, match):
    refused(tmp_path / "w.pth", archive({"a": tensor(A, "0", False, **changes)}, {"0": A}), match)


def test_what_is_no_file_of_weights(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(InputError, match="there are no weights at"):
        torch_files.load(path)
    refused(path, b"", "damaged|no file")
    refused(path, b"hello, world", "damaged|no file")
    refused(path, pickle.dumps(3), "magic number is missing")
    refused(path, archive([1], {}), "no dict of weights")
    refused(path, archive({"epoch": 3}, {}), "holds no tensors")
    refused(path, archive({"a": tensor(A, "0", False)}, {}), "damaged")
    refused(path, archive({"a": tensor(A, "0", False)}, {"0": A[:5]}), "has 20 bytes for 6 numbers")
    refused(path, archive({"a": tensor(A, "../0", False)}, {"0": A}), "proper key")
    refused(path, stream({"a": tensor(A, "0", True)}, {}), "list of storages")
    refused(path, stream({"a": tensor(A, "0", True)}, {"0": A}) + b"x", "more in the file")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("w/data.pkl", pickled({}))
    refused(path, data.getvalue(), "is compressed")
    with zipfile.ZipFile(data, "w") as members:
        members.writestr("x/y.txt", "")
    refused(path, data.getvalue(), "one data.pkl")
    with zipfile.ZipFile(data, "a") as members:
        members.writestr("w/data.pkl", "")
        members.writestr("w/constants.pkl", "")
    refused(path, data.getvalue(), "TorchScript")
    refused(path, archive({"a": {"b": Call(ORDERED, [("c", 1)])}}, {}), "holds no tensors")


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(archive({"a": Symbol("os\x1b[2J", "x\ty")}, {}))
    with pytest.raises(InputError) as error:
        torch_files.load(path)
    assert str(error.value).isprintable()


def test_a_dict_that_holds_itself_ends(tmp_path):
    program = b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as members:
        members.writestr("w/data.pkl", program)
    refused(tmp_path / "w.pth", data.getvalue(), "no dict of weights")


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(request, tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "w.pth", file_of(request.param)


@pytest.mark.slow
def test_every_truncation_is_refused(whole):
    path, raw = whole
    for end in range(len(raw)):
        refused(path, raw[:end], "w.pth")


@pytest.mark.slow
@laws
@given(place=st.integers(0, 2**20), noise=st.binary(min_size=1, max_size=8))
def test_damage_never_does_more_than_fail(whole, place, noise):
    path, raw = whole
    place %= len(raw)
    path.write_bytes(raw[:place] + noise + raw[place + len(noise) :])
    try:
        found = torch_files.load(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(isinstance(a, np.ndarray) and a.nbytes <= len(raw) for a in found.values())


@laws
@given(program=st.binary(max_size=40))
def test_random_programs_never_do_more_than_fail(tmp_path_factory, program):
    try:
        torch_files.Machine().run(io.BytesIO(program + b"."))
    except (InputError, *torch_files.DAMAGE):
        pass
