"""Weights on disk: safetensors files, whole or in parts, as dicts of NumPy arrays; nothing in them can run code.

A model is one of

    NAME.safetensors                                                   all weights                              (1)
    NAME.safetensors.index.json + the files it names                   {"weight_map": {weight: file}}           (2)
        of a variant, as diffusers calls it                            NAME.safetensors.index.VARIANT.json
    a folder with one of these in it, as diffusers writes them                                                  (3)

float16, bfloat16, float32 and the integers keep their type and every bit, in and out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.typing import InputError

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
AN_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")
State = dict[str, np.ndarray]


def load(path: str | os.PathLike[str]) -> State:
    """All weights of a model (1), (2) or (3) by name.

    InputError, one line, for a path that is missing or not such a model, a truncated or damaged file, a type that
    NumPy does not have, and parts that lack a weight, hold one twice or one that their index does not know.
    """
    path = find(path)
    if not AN_INDEX.search(path.name):
        return _load_one(path)
    found: State = {}
    for file, expected in sorted(_parts(path).items()):
        part = _load_one(path.parent / file)
        _check_part(path.parent / file, set(part), expected)
        found |= part
    return found


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in the header of one safetensors file; InputError as `load`."""
    path = find(path)
    if AN_INDEX.search(path.name):
        path = path.parent / min(_parts(path))
    with _opened(path) as file:
        return dict(file.metadata() or {})


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    texts: Mapping[str, str] | None = None,
    *,
    part_bytes: int | None = None,
) -> Path:
    """Write weights as `path`, which ends in .safetensors; inverse of `load`. Returns what `load` is to be given.

    With `part_bytes`, more than that are cut into parts NAME-00001-of-00003.safetensors with an index (2). Every file
    appears whole or not at all. InputError for another ending, or a weight that is not an array.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"weights are written to a file that ends in {SUFFIX}, not to {path}")
    arrays = {name: _array(name, value) for name, value in state.items()}
    parts = _cut(arrays, part_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(parts) == 1:
        _save_one(path, arrays, texts)
        return path
    files = [f"{path.stem}-{i + 1:05d}-of-{len(parts):05d}{SUFFIX}" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        _save_one(path.parent / file, {name: arrays[name] for name in part}, texts)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": where}
    target = path.with_name(path.stem + INDEX)
    unfinished = target.with_suffix(".part")
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    unfinished.replace(target)
    return target


def find(path: str | os.PathLike[str]) -> Path:
    """The file (1) or index (2) that a path means; InputError where there is none, or a folder has several."""
    path = Path(path).expanduser()
    if path.is_dir():
        there = sorted(path.glob(f"*{INDEX}")) or sorted(path.glob(f"*{SUFFIX}"))
        if len(there) != 1:
            names = ", ".join(p.name for p in there) or "none"
            raise InputError(f"{path} should hold one model, and holds {names}: give the path of a {SUFFIX} file")
        return there[0]
    if not path.is_file():
        raise InputError(f"there are no weights at {path}: give a {SUFFIX} file, its index, or their folder")
    if not path.name.endswith(SUFFIX) and not AN_INDEX.search(path.name):
        raise InputError(f"{path} is not a {SUFFIX} file; other formats, such as pickles, are not read")
    return path


def _opened(path: Path) -> Any:
    import ml_dtypes  # noqa: F401  NumPy learns of bfloat16
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {plain(error)}") from error


def _load_one(path: Path) -> State:
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping
            try:
                found[name] = file.get_tensor(name)
            except AttributeError:  # safetensors looks a type up in NumPy
                kind = file.get_slice(name).get_dtype()
                raise InputError(f"{path}: {plain(name)} is of the type {kind}, which NumPy does not have") from None
    return found


def _parts(index: Path) -> dict[str, set[str]]:
    """File name -> the weights in it."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        pairs = [(str(name), str(file)) for name, file in where.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: it should hold a weight_map of names to files") from error
    parts: dict[str, set[str]] = {}
    for name, file in pairs:
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise InputError(f"{index} names {plain(file)}, which is not a {SUFFIX} file beside it")
        if not _is_file(index.parent / file):
            raise InputError(f"{index.parent / plain(file)} is missing: {index.name} names it")
        parts.setdefault(file, set()).add(name)
    if not parts:
        raise InputError(f"{index} is damaged: its weight_map is empty")
    return parts


def _check_part(path: Path, found: set[str], expected: set[str]) -> None:
    for names, what in ((expected - found, "lacks"), (found - expected, "holds, against its index,")):
        if names:
            raise InputError(f"{path} {what} {plain(', '.join(sorted(names)[:4]))}{' …' if len(names) > 4 else ''}")


def _cut(arrays: State, part_bytes: int | None) -> list[list[str]]:
    """Names in their order, a new part begun before one would pass `part_bytes`."""
    parts: list[list[str]] = [[]]
    room = 0
    for name, array in arrays.items():
        if part_bytes is not None and parts[-1] and room + array.nbytes > part_bytes:
            parts.append([])
            room = 0
        parts[-1].append(name)
        room += array.nbytes
    return parts


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype == object:
        raise InputError(f"the weight {name} is not an array but {type(value).__name__}")
    return np.array(array, order="C", copy=None)  # keeps shape (), which ascontiguousarray does not


def _save_one(path: Path, arrays: State, texts: Mapping[str, str] | None) -> None:
    from safetensors.numpy import save_file

    unfinished = path.with_name(f".{path.name}.part")
    try:
        save_file(arrays, unfinished, metadata={"format": "pt", **(texts or {})})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def plain(words: object, most: int = 300) -> str:
    """What an error says of a file, whose words may be any, as one printable line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(words)[: 4 * most]).split())[:most]
