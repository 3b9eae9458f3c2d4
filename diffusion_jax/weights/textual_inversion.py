"""Textual inversion: words of a prompt that stand for learned vectors of a text encoder (Gal et al. 2022).

arXiv:2208.01618 learns, for a word S, rows v of the table of token embeddings; a prompt with S in it has the ids of
these rows, k of them, in its place. Files of them are, with vectors [k, width] or one [width],

    {"string_to_param": {"*": v}, "name": word, ...}        AUTOMATIC1111's and the authors' own, .pt               (1)
    {word: v}                                               diffusers', .bin and .safetensors                       (2)
    {"emb_params": v}                                       AUTOMATIC1111's as safetensors                          (3)
    {"clip_l": v, "clip_g": v}                              XL's, for its first and second tower                    (4)

(1), (3) and (4) are called by the name of their file, as only (1) has one in it, which may be any. The rows of a word
come after those that the table has: `added` gives the new table and `places` the ids of each word, for the tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, torch_files
from diffusion_jax.weights.files import State

TABLE = "text_model.embeddings.token_embedding.weight"
TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
PARAMETERS = ("string_to_param.*", "emb_params")


class Embedding(NamedTuple):
    """A word and the vectors [k, width] that it stands for, by text encoder."""

    word: str
    vectors: dict[str, np.ndarray]


def load(path: str | os.PathLike[str], word: str | None = None) -> Embedding:
    """The embedding in a .safetensors file or one of torch's own (.pt, .bin), which is read without running it.

    word: to be used in prompts, instead of the file's own (2) or its name. InputError, one line, for a file that cannot
    be read or holds something else.
    """
    path = Path(path).expanduser()
    own = path.suffix in torch_files.SUFFIXES
    state = torch_files.load(path) if own else files.load(path)
    try:
        return read(state, word, path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(path: str | os.PathLike[str], embedding: Embedding) -> Path:
    """Write an embedding as one .safetensors file, by (2), or by (4) if it is for two towers; `load` reads it."""
    return files.save(path, write(embedding))


def read(state: Mapping[str, np.ndarray], word: str | None = None, name: str = "") -> Embedding:
    """The embedding in a state dict. name: what it is called where neither `word` nor the file says it.

    InputError for a file of another kind, for several words, and for vectors that are none.
    """
    vectors, own = _found(state)
    shaped = {tower: value[None] if value.ndim == 1 else value for tower, value in vectors.items()}
    for value in shaped.values():
        if value.ndim != 2 or 0 in value.shape or len(value) > 1000:
            raise InputError(f"an embedding is some vectors [k, width], not an array of shape {value.shape}")
    if len({len(value) for value in shaped.values()}) != 1:
        raise InputError("the embedding has different numbers of vectors for the two text encoders")
    called = word or own or name
    if not called.strip():
        raise InputError("the embedding has no name: give the word that it stands for")
    return Embedding(called, shaped)


def write(embedding: Embedding) -> State:
    """The state dict of an embedding, by (2) for one tower and by (4) for two."""
    if embedding.vectors.keys() == {"text_encoder"}:
        return {embedding.word: embedding.vectors["text_encoder"]}
    return {kind: embedding.vectors[tower] for kind, tower in TOWERS.items() if tower in embedding.vectors}


def added(weights: Mapping[str, np.ndarray], embeddings: Sequence[Embedding], tower: str = "text_encoder") -> State:
    """A text encoder's weights with the rows of some embeddings after those of its table; the others stay the same.

    InputError for vectors of another width, as those for another model have, and for embeddings without this tower.
    """
    table = weights[TABLE]
    rows = [_rows(embedding, tower, table.shape[1]).astype(table.dtype) for embedding in embeddings]
    return {**weights, TABLE: np.concatenate([table, *rows])}


def places(first: int, embeddings: Sequence[Embedding]) -> dict[str, tuple[int, ...]]:
    """The ids of each word if the rows of `added` begin at id `first`: for `tokenizer.with_words`.

    InputError for two embeddings of the same word.

    >>> places(49_408, [Embedding("<cat>", {"text_encoder": np.ones((2, 8))})])
    {'<cat>': (49408, 49409)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for word, vectors in embeddings:
        if word.lower() in map(str.lower, found):
            raise InputError(f"two embeddings for the word {word}")
        n = len(next(iter(vectors.values())))
        found[word] = tuple(range(first, first + n))
        first += n
    return found


def _found(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Vectors by tower, and the word if it is in the file."""
    two = {tower: state[kind] for kind, tower in TOWERS.items() if kind in state}
    if two:
        return two, ""
    for name in PARAMETERS:
        if name in state:
            return {"text_encoder": state[name]}, ""
    own = {name: value for name, value in state.items() if not name.startswith("string_to_")}
    if len(own) != 1:
        raise InputError(f"it holds {len(state)} arrays, where an embedding has the vectors of one word")
    ((word, value),) = own.items()
    if value.ndim not in (1, 2) or word.endswith((".weight", ".bias")):
        raise InputError(f"it holds {files.plain(word)} of shape {value.shape}, which is no embedding")
    return {"text_encoder": value}, word


def _rows(embedding: Embedding, tower: str, width: int) -> np.ndarray:
    if tower not in embedding.vectors:
        raise InputError(f"the embedding {embedding.word} has no vectors for {tower}")
    rows = embedding.vectors[tower]
    if rows.shape[1] != width:
        raise InputError(
            f"the embedding {embedding.word} is for another model: {rows.shape[1]} numbers a vector, not {width}"
        )
    return rows
