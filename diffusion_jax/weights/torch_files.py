"""Weights in torch's own files (.pth, .pt, .bin, .ckpt), read without torch and without running what is in them.

Such a file is a pickle, a program for a small stack machine that may call any function of Python. The machine here
knows no functions: a name in the pickle stays a name, and a call is looked up in a table of what weights are made of,

    torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ...)     elements offset + sum_k i_k strides_k  (1)
    torch._utils._rebuild_parameter(tensor, ...)                              the tensor
    collections.OrderedDict(), torch.nn.ParameterDict                         a dict

and anything else is an error that names it. Storages are named by persistent ids, ("storage", type, key, device, n),
and lie

    in an archive   NAME/data.pkl, and NAME/data/KEY for each storage         torch 1.6 and later                   (2)
    in one stream   four pickles: a magic number, the version, the system, the weights; the list of keys;           (3)
                    then for each key its n as int64 and its bytes            before, or if asked for

float16, bfloat16, float32, float64, the integers and bool keep every bit. Files of TorchScript hold programs and are
refused.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights.files import State, plain

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
MOST_NAMES, MOST_SHARED = 10**6, 16
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
TYPES: dict[str, np.dtype[Any]] = {
    "HalfStorage": np.dtype("<f2"), "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"), "ByteStorage": np.dtype("u1"), "CharStorage": np.dtype("i1"),
    "ShortStorage": np.dtype("<i2"), "IntStorage": np.dtype("<i4"), "LongStorage": np.dtype("<i8"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip
DAMAGE = (
    ValueError, TypeError, LookupError, EOFError, OSError, ArithmeticError, AttributeError, NotImplementedError,
    RuntimeError, RecursionError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
"""What the standard library's readers raise on damaged bytes."""


class Name(NamedTuple):
    """A global that a pickle names: never the thing itself."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """A persistent id of n elements."""

    dtype: np.dtype[Any]
    key: str
    n: int


class Tensor(NamedTuple):
    """A view (1) of a storage that may not have been read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def load(path: str | os.PathLike[str]) -> State:
    """All tensors in a file by name; those of nested dicts by dotted names, as in "state_dict.conv.weight".

    What is no tensor (epochs, settings) is left out. InputError, one line, for a missing, damaged or truncated file,
    one that calls or names anything beside the table above, and one without tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there are no weights at {path}")
    try:
        if zipfile.is_zipfile(path):
            content, arrays = _read_archive(path)
        else:
            content, arrays = _read_stream(path)
        state = _views(content, arrays)
    except InputError as error:
        raise InputError(f"{path}: {plain(error)}") from None
    except DAMAGE as error:
        raise InputError(f"{path} is damaged or no file of torch's: {plain(error)}") from None
    if not state:
        raise InputError(f"{path} holds no tensors")
    return state


def _read_archive(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Layout (2)."""
    with zipfile.ZipFile(path) as archive:
        programs = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise InputError("no archive of torch's: it should hold one data.pkl")
        root = programs[0].removesuffix("data.pkl")
        names = set(archive.namelist())
        if f"{root}constants.pkl" in names:
            raise InputError("a file of TorchScript, which holds programs: save its state_dict() instead")
        if f"{root}byteorder" in names and _stored(archive, f"{root}byteorder").strip() != b"little":
            raise InputError("the numbers are in big-endian order, which is not read")
        machine = Machine()
        content = machine.run(io.BytesIO(_stored(archive, programs[0])))
        if sum(s.n * s.dtype.itemsize for s in machine.storages.values()) > path.stat().st_size:
            raise InputError("the archive is truncated, or parts of it lie over each other")
        return content, {key: _member(archive, f"{root}data/{key}", s) for key, s in machine.storages.items()}


def _member(archive: zipfile.ZipFile, name: str, storage: Storage) -> np.ndarray:
    data = _stored(archive, name)
    if len(data) != storage.n * storage.dtype.itemsize:
        raise InputError(f"{name} has {len(data)} bytes for {storage.n} numbers of the type {storage.dtype}")
    return np.frombuffer(data, storage.dtype)


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's bytes; torch compresses none, so that one that is may only be damage or a bomb."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{name} is compressed, which torch does not do")
    return archive.read(name)


def _read_stream(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Layout (3)."""
    with path.open("rb") as file:
        if Machine().run(file) != MAGIC:
            raise InputError("no file of torch's: the magic number is missing")
        if Machine().run(file) != VERSION:
            raise InputError("a version of torch's format that is not known")
        system = Machine().run(file)
        if not (isinstance(system, Mapping) and system.get("little_endian") is True):
            raise InputError("the numbers are in big-endian order, which is not read")
        machine = Machine()
        content, keys = machine.run(file), Machine().run(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise InputError("the list of storages is not one of names")
        if set(keys) != machine.storages.keys() or len(keys) != len(machine.storages):
            raise InputError("the list of storages is not that of the weights")
        arrays = {key: _block(file, machine.storages[key]) for key in keys}
        if file.read(1):
            raise InputError("there is more in the file than its weights")
        return content, arrays


def _block(file: BinaryIO, storage: Storage) -> np.ndarray:
    (n,) = struct.unpack("<q", file.read(8))
    if n != storage.n:
        raise InputError(f"storage {storage.key} has {n} numbers instead of {storage.n}")
    size = n * storage.dtype.itemsize
    if size > os.fstat(file.fileno()).st_size - file.tell():
        raise InputError("the file is truncated")
    return np.frombuffer(file.read(size), storage.dtype)


def _tensors(content: Any, prefix: str, depth: int, left: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by dotted names. left: as many names as may follow, as dicts in dicts, when shared, multiply quickly."""
    if not isinstance(content, dict) or depth > 8:
        raise InputError("it holds no dict of weights by name")
    for name, value in content.items():
        if next(left, None) is None:
            raise InputError(f"it holds more than {MOST_NAMES} names")
        if isinstance(value, Tensor):
            if not isinstance(name, str):
                raise InputError(f"the weight {_said(name)} is not named by a text")
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{_said(name)}.", depth + 1, left)


def _views(content: Any, arrays: Mapping[str, np.ndarray]) -> State:
    """All tensors, copied; an error if views of the same storages take far more memory than the file has bytes."""
    state: State = {}
    left = MOST_SHARED * sum(array.nbytes for array in arrays.values())
    for name, tensor in _tensors(content, "", 0, iter(range(MOST_NAMES))):
        state[name] = _view(tensor, arrays)
        left -= state[name].nbytes
        if left < 0:
            raise InputError(f"its tensors take more than {MOST_SHARED} times the memory of what is in the file")
    return state


def _said(value: Any) -> str:
    """A value of a file in an error; not a tuple of tuples, which, when shared, can be longer than any memory."""
    plain = value is None or isinstance(value, str | int | float | Name)
    return str(value)[:80] if plain else f"a {type(value).__name__}"


def _view(tensor: Tensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Equation (1), copied out of the storage; a view that leaves it is an error."""
    storage, offset, shape, strides = tensor
    flat, count = arrays[storage.key], math.prod(shape)
    if count == 0:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count > storage.n or last >= storage.n:
        raise InputError(f"a tensor of the shape {list(shape)} lies outside of its {storage.n} numbers")
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy(order="C")


def _storage(pid: Any) -> Storage:
    """A persistent id as a `Storage`; the old format has a sixth entry, for views of views, which must be None."""
    known = isinstance(pid, tuple) and len(pid) in (5, 6) and isinstance(pid[0], str) and pid[0] == "storage"
    if not known or any(view is not None for view in pid[5:]):
        raise InputError("a persistent id that is not a storage's")
    _, kind, key, _, n = pid[:5]
    if not isinstance(kind, Name) or kind.module not in ("torch", "torch.storage") or kind.name not in TYPES:
        raise InputError(f"it names {_said(kind)}, which is not a type of numbers that is read")
    if not isinstance(key, str) or not key or "/" in key or not _natural(n):
        raise InputError("a storage without a proper key or size")
    return Storage(TYPES[kind.name], key, n)


def _natural(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**48


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    whole = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not whole or len(shape) != len(strides) or len(shape) > 16:
        raise InputError("a tensor that is not made of a storage, a shape and strides")
    if not all(map(_natural, (offset, *shape, *strides))):
        shape, strides = (", ".join(map(_said, numbers)) for numbers in (shape, strides))
        raise InputError(f"a tensor of offset {_said(offset)}, shape {shape}, strides {strides}")
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InputError("a parameter that is not a tensor")
    return tensor


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    pairs = [tuple(item) for item in items]
    _check_keys(key for key, _ in pairs)
    return dict(pairs)


def _check_keys(keys: Iterable[Any]) -> None:
    """TypeError for keys whose hash may take for ever, as that of tuples of shared tuples does."""
    if not all(key is None or isinstance(key, str | int | float | bytes) for key in keys):
        raise TypeError("a dict by other things than names and numbers")


def _set(items: Any = None) -> set[Any]:
    """What modules keep the names of some buffers in."""
    if type(items) is not list:
        raise InputError("a set that is not made of a list")
    _check_keys(items)
    return set(items)


CALLS: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("__builtin__", "set"): _set,
    Name("builtins", "set"): _set,
}
PARAMETERS = Name("torch.nn.modules.container", "ParameterDict")
"""A module whose attribute `_parameters` is the dict: old embeddings are kept in one."""
NAMED = {PARAMETERS} | {Name(module, kind) for module in ("torch", "torch.storage") for kind in TYPES}
MARK = object()


class Machine:
    """The part of pickle's stack machine that weights need. `storages`: what the program named, by key."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, file: BinaryIO) -> Any:
        """Run one program from where the file is, and leave the file behind it. InputError for a forbidden one."""
        for op, argument, _ in pickletools.genops(file):
            if op.name == "STOP":
                return self.stack.pop()
            self._do(op.name, argument)
        raise InputError("the pickle has no end")

    def _do(self, op: str, argument: Any) -> None:
        if op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op in LITERALS:
            self.stack.append(argument)
        elif op in EMPTY:
            self.stack.append(EMPTY[op]())
        elif op in ACTIONS:
            ACTIONS[op](self, argument)
        elif op not in ("PROTO", "FRAME"):
            raise InputError(f"the pickle does {op}, which weights do not need and could run code: it is not read")

    def _since_mark(self) -> list[Any]:
        start = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is MARK), None)
        if start is None:
            raise ValueError("the pickle's mark is missing")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise ValueError("the stack is empty")
        items = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        self.stack.append(tuple(items))

    def put(self, where: int | None) -> None:
        self.memo[len(self.memo) if where is None else where] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(items) % 2:
            raise TypeError("items for what is no dict")
        _check_keys(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name that is not a text")
        named = Name(module, name)
        if named not in CALLS and named not in NAMED:
            raise InputError(f"it names {named}, which weights do not need and which could run code: it is not read")
        self.stack.append(named)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function not in CALLS or type(arguments) is not tuple:
            raise InputError(f"it calls {_said(function)}, which is not read")
        self.stack.append(CALLS[function](*arguments))

    def new(self) -> None:
        """An object of a class: of `PARAMETERS` alone, as a dict that gets its items in `build`."""
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind != PARAMETERS or arguments != ():
            raise InputError(f"it makes a {_said(kind)}, which is not read")
        self.stack.append({})

    def build(self) -> None:
        """Attributes of a dict. An OrderedDict has the versions of torch's modules there, which are left out."""
        attributes = self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise InputError("it sets attributes of what is no dict, which is not read")
        items = attributes.get("_parameters") if type(attributes) is dict else None
        if type(items) is dict:
            self.stack[-1].update(items)

    def persistent(self) -> None:
        storage = _storage(self.stack.pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise InputError(f"storage {storage.key} is described in two ways")
        self.stack.append(storage)


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": MARK}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "SHORT_BINSTRING", "BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "BINPUT": Machine.put, "LONG_BINPUT": Machine.put, "MEMOIZE": lambda m, _: m.put(None),
    "BINGET": lambda m, i: m.stack.append(m.memo[i]), "LONG_BINGET": lambda m, i: m.stack.append(m.memo[i]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m._since_mark())), "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2), "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.append([m.stack.pop()]), "APPENDS": lambda m, _: m.append(m._since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m._since_mark()),
    "GLOBAL": lambda m, names: m.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE": lambda m, _: m.call(), "NEWOBJ": lambda m, _: m.new(), "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
}  # fmt: skip
