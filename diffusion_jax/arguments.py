"""Command lines of the form name=value, from the signature of a typed function; types and help come from tyro."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from diffusion_jax.typing import InputError


@dataclass(frozen=True)
class AtLeast:
    """The smallest value an argument can have, as an annotation of its type."""

    low: float


Count = Annotated[int, AtLeast(1)]
"""A whole number from 1 on."""
Natural = Annotated[int, AtLeast(0)]
"""A whole number from 0 on."""
Amount = Annotated[float, AtLeast(0)]
"""A number from 0 on."""


def split_arguments(words: list[str]) -> dict[str, str]:
    """`name=value` and `--name=value` words as a dict; InputError for anything else or a name given twice.

    >>> split_arguments(["width=64", "--learning-rate=1e-3"])
    {'width': '64', 'learning_rate': '1e-3'}
    """
    pairs: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"(?:--)?([A-Za-z][\w-]*)=(.*)", word, re.DOTALL)
        if match is None:
            raise InputError(f"cannot read the argument {word!r}: write name=value")
        name = match[1].replace("-", "_")
        if name in pairs:
            raise InputError(f"the argument {name} is given twice")
        pairs[name] = match[2]
    return pairs


def resolve(function: Callable[..., Any], values: Mapping[str, str], what: str) -> dict[str, Any]:
    """All keyword arguments of a typed function, defaults filled in, from the texts of some.

    InputError, one line, for an unknown name (with the closest there is), a wrong type or a missing argument.
    """
    parameters = inspect.signature(function).parameters
    for name in values:
        if name not in parameters:
            raise InputError(f"{what} has no argument {name!r}{closest(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            raise InputError(f"{what} needs the argument {name}=…")
    resolved = {name: p.default for name, p in parameters.items()}
    hints = get_type_hints(function, include_extras=True)
    return resolved | {name: _parse(name, text, hints.get(name, str)) for name, text in values.items()}


def describe(function: Callable[..., Any], prog: str) -> str:
    """The help text of a typed function: its documentation, and each argument with its type and default."""
    import tyro

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(function, args=["--help"], prog=prog, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    # The words are name=value here, and tyro's own usage line and --help are not among them.
    text = re.sub(r"^(usage:.*\n(\s+\S.*\n)*\n|.*-h, --help.*\n)", "", out.getvalue(), flags=re.M)
    return f"{prog}\n\n" + re.sub(r"--(\w+) ", r"\1=", text)


def closest(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest of the known names, or nothing.

    >>> closest("widht", ["width", "steps"])
    "; did you mean 'width'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parse(name: str, text: str, kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind):
        some = next(part for part in get_args(kind) if part is not type(None))
        return None if text == "None" else _parse(name, text, some)
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
        value = _parse(name, text, kind)
        for note in notes:
            if isinstance(note, AtLeast) and not value >= note.low:
                raise InputError(f"{name}={text} is not possible: it must be at least {note.low}")
        return value
    import tyro

    words = text.split(",") if get_origin(kind) is tuple else [text]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=words, config=(tyro.conf.FlagConversionOff,), default=tyro.MISSING)
    except SystemExit:
        raise InputError(f"{name}={text}: not {_kind_name(kind)}") from None


def _kind_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return names.get(kind, f"of the type {str(kind).removeprefix('typing.')}")
