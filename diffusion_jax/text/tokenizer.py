"""CLIP's byte-pair tokenizer (Radford et al. 2021, arXiv:2103.00020, section 2.4, after Sennrich et al. 2016).

A text is normalized (Unicode's NFC, runs of white space as one space, lower case) and cut into words: 's 't 're 've 'm
'll 'd, runs of letters, single digits, runs of anything else. A word is its UTF-8 bytes, the last marked as the end; of
the neighbours in a word, those that come first in a list of merges are joined until none of the list is left. What is
left are the tokens, and

    ids = bos, tokens, eos, pad, pad, ...                                                       int32[length]    (1)

Stable Diffusion 1 and the first tower of XL pad with eos, 2 and the second tower of XL with "!", whose id is 0. As in
transformers, and unlike in OpenCLIP's code, these tokens are found anywhere in a text: where "!" pads, a "!" in a
prompt is a 0. The vocabulary is read from what users have,

    a folder with vocab.json and merges.txt, or tokenizer.json   tokenizer/ and tokenizer_2/ of diffusers' models    (2)
    bpe_simple_vocab_16e6.txt.gz                                 OpenAI's, with the ids given by its order           (3)

(3) lies in the package open_clip_torch, where it is looked for if no path is given: checkpoints of one file have no
tokenizer of their own. Nothing is downloaded. Like transformers' tokenizer and unlike OpenAI's code, texts with broken
encodings or with HTML entities are taken as they are.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.typing import InputError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
N_MERGES = 49_152 - 256 - 2
"""How many of the merges in (3) the published vocabulary has."""
ARCHIVE = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")
"""Where (3) lies, if one of them is installed."""
NO_FILE = (
    "there is no tokenizer: give tokenizer=FOLDER, the folder tokenizer/ of a model, or install the package that holds "
    "CLIP's vocabulary, pip install --no-deps open_clip_torch"
)


class Tokenizer(NamedTuple):
    """A vocabulary as functions and numbers.

    encode: text -> ids, without bos and eos. decode: ids -> text. `size` is the first id that is not taken. `words` are
    the placeholders of `with_words`.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    bos: int
    eos: int
    pad: int
    length: int
    size: int
    words: Mapping[str, tuple[int, ...]] = {}


def load(path: str | os.PathLike[str] | None = None, *, pad: str | None = None) -> Tokenizer:
    """The tokenizer in a folder (2) or a file (3), or, without a path, that of an installed open_clip.

    pad: the token to pad with, as in "!", where the folder's own is not wanted; (3) has none and pads with eos.
    InputError, one line, for a path without a tokenizer, a damaged one, and none at all.
    """
    path = installed() if path is None else Path(path).expanduser()
    if path.is_dir():
        settings = _settings(path)
        bpe = _read_folder(path)
    elif path.is_file() and path.name.endswith(".gz"):
        settings = {}
        bpe = _model(*vocabulary(path))
    else:
        raise InputError(f"there is no tokenizer at {path}: give a folder with vocab.json and merges.txt, or {ARCHIVE}")
    return _tokenizer(path, bpe, settings, pad)


def installed() -> Path:
    """The file (3) of an installed package, which is not imported; InputError, with what to do, if there is none."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / ARCHIVE).is_file():
                return Path(folder) / ARCHIVE
    raise InputError(NO_FILE)


def vocabulary(path: str | os.PathLike[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by token and the merges in their order, from a file (3): bytes, bytes as ends, merged pairs, bos, eos."""
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")[1 : N_MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line)]
        if not merges:
            raise ValueError("no merges")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path} is damaged or not CLIP's vocabulary") from error
    letters = list(byte_letters().values())
    tokens = [*letters, *(c + END for c in letters), *(a + b for a, b in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenize(tokenizer: Tokenizer, texts: Iterable[str], length: int | None = None) -> np.ndarray:
    """Equation (1): texts -> int32[n, length].

    length: the tokenizer's own, 77, unless given. What does not fit is cut off, with a warning that says what.
    """
    length = length or tokenizer.length
    return np.array([_row(tokenizer, text, length) for text in texts], np.int32).reshape(-1, length)


def with_words(tokenizer: Tokenizer, words: Mapping[str, Sequence[int]]) -> Tokenizer:
    """A tokenizer that also knows some placeholders, each of which becomes the ids it is given.

    A placeholder is found in any case of its letters, but not within a longer word. InputError for one that is empty.
    """
    new = {word.lower(): tuple(ids) for word, ids in words.items()}
    if not all(word.strip() for word in new) or not all(new.values()):
        raise InputError("a placeholder must have letters, and vectors that it stands for")
    find = re.compile("|".join(_whole(word) for word in sorted(new, key=len, reverse=True)) or "(?!)", re.IGNORECASE)

    def encode(text: str) -> list[int]:
        ids, end = [], 0
        for found in find.finditer(text):
            ids += [*tokenizer.encode(text[end : found.start()]), *new[found[0].lower()]]
            end = found.end()
        return [*ids, *tokenizer.encode(text[end:])]

    size = max([tokenizer.size, *(i + 1 for ids in new.values() for i in ids)])
    return tokenizer._replace(encode=encode, words={**tokenizer.words, **new}, size=size)


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a vocabulary: itself if it can be seen, else one from U+0100 on.

    >>> letters = byte_letters()
    >>> letters[ord("a")], letters[ord(" ")]
    ('a', 'Ġ')
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + i) for i, b in enumerate(others)}


def _row(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    ids, room = tokenizer.encode(text), length - 2
    if len(ids) > room:
        lost = tokenizer.decode(ids[room:])
        warnings.warn(f"the text is longer than {room} tokens and was cut before: {lost}", stacklevel=3)
    row = [tokenizer.bos, *ids[:room], tokenizer.eos]
    return row + [tokenizer.pad] * (length - len(row))


def _whole(word: str) -> str:
    """A pattern for a word that is not a part of a longer one."""
    left = r"(?<!\w)" if re.match(r"\w", word) else ""
    right = r"(?!\w)" if re.search(r"\w$", word) else ""
    return left + re.escape(word) + right


def _tokenizer(path: Path, bpe: Any, settings: Mapping[str, Any], pad: str | None) -> Tokenizer:
    names = [settings.get("bos_token", BOS), settings.get("eos_token", EOS)]
    names.append(pad or settings.get("pad_token", names[1]))
    strange = next((name for name in names if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError(f"the tokenizer in {path} is damaged: {str(strange)[:40]!r} is no token")
    numbers = [bpe.token_to_id(name) for name in names]
    if None in numbers:
        raise InputError(f"the tokenizer in {path} has no token {names[numbers.index(None)]!r}")
    bpe.add_special_tokens(names)
    bytes_of = {letter: byte for byte, letter in byte_letters().items()}

    def decode(ids: Sequence[int]) -> str:
        letters = "".join(bpe.id_to_token(int(i)) or "? " for i in ids).replace(END, " ")
        parts = (bytes([bytes_of[c]]) if c in bytes_of else c.encode() for c in letters)
        return b"".join(parts).decode(errors="replace").strip(" ")

    length = settings.get("model_max_length", 77)
    return Tokenizer(
        lambda text: bpe.encode(text, add_special_tokens=False).ids, decode, *numbers,
        length=length if isinstance(length, int) and 2 < length < 10**4 else 77, size=bpe.get_vocab_size(),
    )  # fmt: skip


def _read_folder(folder: Path) -> Any:
    """Layout (2)."""
    from tokenizers import Tokenizer as Library

    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    try:
        if all(p.is_file() for p in parts):
            vocab = json.loads(parts[0].read_text(encoding="utf-8"))
            return _model(vocab, _merges(parts[1]), _json(folder / "added_tokens.json"))
        if not whole.is_file():
            raise InputError(f"{folder} holds no tokenizer: vocab.json and merges.txt, or tokenizer.json, are needed")
        bpe = Library.from_file(str(whole))
    except InputError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise InputError(f"the tokenizer in {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    bpe.no_padding()
    bpe.no_truncation()
    return bpe


def _merges(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(a, b) for a, b in (line.split() for line in lines if line and not line.startswith("#version"))]


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], added: Mapping[str, int] | None = None) -> Any:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE

    bpe = Library(BPE(vocab, merges, unk_token=EOS, continuing_subword_prefix="", end_of_word_suffix=END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_tokens(sorted(set(added or ()) - set(vocab), key=lambda token: (added or {})[token]))
    return bpe


def _settings(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token, pad_token and model_max_length; special_tokens_map.json has the last word on the tokens."""
    found = _json(folder / "tokenizer_config.json") | _json(folder / "special_tokens_map.json")
    plain = {key: value["content"] if isinstance(value, dict) else value for key, value in found.items()
             if not isinstance(value, dict) or "content" in value}  # fmt: skip
    return {key: value for key, value in plain.items() if value is not None}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no names")
    return found
