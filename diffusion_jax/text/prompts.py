"""Prompts: words with weights, and texts of any length, as chunks of ids that a text encoder of 77 places can read.

What is written, and the weight of the words inside, which multiply where brackets nest:

    (words)       1.1                  (words:1.3)   1.3                  [words]   1 / 1.1                      (1)
    \\( \\) \\[ \\] \\\\   the character itself                 BREAK          the next words begin a new chunk

A ")" closes the last open "(", a "]" the last open "["; brackets that nothing closes reach to the end of the text, and
those that close nothing are characters. It is the notation of AUTOMATIC1111's stable-diffusion-webui.

The tokens of a text fill chunks of 75; with bos, eos and pads each is a row of ids for the encoder, whose states over
all chunks are put one after another. The vectors of one placeholder stay in one chunk. Weights scale the states h_i of
the tokens, so that their mean m over all tokens and channels of a prompt stays what it was:

    h_i <- w_i h_i m(h) / m(w h),   w = 1 for bos, eos and pads                                                  (2)

as in the webui's "original" emphasis (there over the batch, here over each prompt, so that a prompt does not depend on
its neighbours) and in diffusers' community pipeline `lpw_stable_diffusion`. The mean of the states of XL, which come
from before the last norm, may be near zero, where (2) is unstable: `keep_mean=False` scales only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.text.tokenizer import Tokenizer
from diffusion_jax.typing import Array, InputError

STRENGTH = 1.1
SYNTAX = re.compile(
    r"(?P<escaped>\\[()\[\]\\])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|[\\:])"
)
BREAK = re.compile(r"\bBREAK\b")


class Prompt(NamedTuple):
    """ids: int32[chunks, length], rows for the text encoder; weights: f32[chunks, length], 1 beside the text.

    Prompts that `together` has joined have another axis [b] in front.
    """

    ids: np.ndarray
    weights: np.ndarray


class Piece(NamedTuple):
    """A part of a text and its weight."""

    text: str
    weight: float


def parse(text: str) -> list[list[Piece]]:
    """The pieces of a text by (1), one list for each part between BREAKs; never an error.

    >>> parse("a (red:1.5) car BREAK [sky]")
    [[Piece(text='a ', weight=1.0), Piece(text='red', weight=1.5), Piece(text=' car ', weight=1.0)], \
[Piece(text='sky', weight=0.9090909090909091)]]
    """
    parts: list[list[Piece]] = [[]]
    for piece in _pieces(text):
        for i, part in enumerate(BREAK.split(piece.text)):
            if i:
                parts.append([])
            if part.strip():
                parts[-1].append(Piece(part, piece.weight))
    return [part for part in parts if part] or [[]]


def encode(
    tokenizer: Tokenizer, text: str, *, max_chunks: int | None = None, weighted: bool = True, length: int | None = None
) -> Prompt:
    """A text as chunks of ids with weights; the empty text is one chunk without words.

    max_chunks: how many chunks the text may take, any number if None. weighted: read (1), or take it as it stands.
    length: of a row, the tokenizer's own unless given. InputError for a text that is too long.
    """
    length = length or tokenizer.length
    parts = parse(text) if weighted else [[Piece(text, 1.0)]]
    chunks = [chunk for part in parts for chunk in _chunks(_units(tokenizer, part), length - 2)]
    if max_chunks is not None and len(chunks) > max_chunks:
        lost = tokenizer.decode([i for chunk in chunks[max_chunks:] for i, _ in chunk])
        room = max_chunks * (length - 2)
        raise InputError(f"the prompt is longer than {room} tokens: shorten it or allow more; beyond is: {lost}")
    rows = [_row(tokenizer, chunk, length) for chunk in chunks]
    return Prompt(np.array([ids for ids, _ in rows], np.int32), np.array([w for _, w in rows], np.float32))


def together(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> Prompt:
    """Prompts [chunks_k, n] -> one of [b, chunks, n]: shorter ones, as negative ones are, get chunks without words."""
    chunks = max(len(prompt.ids) for prompt in prompts)
    empty = encode(tokenizer, "", length=prompts[0].ids.shape[1])
    rows = [[*prompt, chunks - len(prompt.ids)] for prompt in prompts]
    ids = [np.concatenate([ids, np.repeat(empty.ids, more, 0)]) for ids, _, more in rows]
    weights = [np.concatenate([w, np.repeat(empty.weights, more, 0)]) for _, w, more in rows]
    return Prompt(np.stack(ids), np.stack(weights))


def weighted(hidden: Array, weights: Array, *, keep_mean: bool = True) -> Array:
    """Equation (2): states f32[*b, n, d] and weights f32[*b, n] -> f32[*b, n, d]; of weights 1 the states themselves.

    n counts the tokens of all chunks of a prompt.
    """
    scaled = hidden * weights.astype(hidden.dtype)[..., None]
    if not keep_mean:
        return scaled
    before, after = (jnp.mean(h, (-2, -1), jnp.float32, keepdims=True) for h in (hidden, scaled))
    ratio = jnp.where(after == 0, 1.0, before / jnp.where(after == 0, 1.0, after))
    return scaled * ratio.astype(hidden.dtype)


def _pieces(text: str) -> list[Piece]:
    """Text between brackets, with the product of their weights."""
    texts, weights = [""], [1.0]
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        weights[start:] = [w * factor for w in weights[start:]]
        texts.append("")
        weights.append(1.0)

    for found in SYNTAX.finditer(text):
        if found["open"]:
            texts.append("")
            weights.append(1.0)
            opened[found["open"]].append(len(texts) - 1)
        elif found["weight"] and opened["("]:
            multiply("(", float(found["weight"]))
        elif found["close"] == ")" and opened["("]:
            multiply("(", STRENGTH)
        elif found["close"] == "]" and opened["["]:
            multiply("[", 1 / STRENGTH)
        else:
            texts[-1] += found[0][1:] if found["escaped"] else found[0]
    for kind, factor in (("(", STRENGTH), ("[", 1 / STRENGTH)):
        while opened[kind]:
            multiply(kind, factor)
    return [Piece(t, w) for t, w in zip(texts, weights, strict=True) if t]


Unit = list[tuple[int, float]]
"""Tokens with their weights: one, or those of a placeholder."""


def _units(tokenizer: Tokenizer, pieces: list[Piece]) -> list[Unit]:
    groups = {ids[0]: len(ids) for ids in tokenizer.words.values()}
    units: list[Unit] = []
    for text, weight in pieces:
        ids = tokenizer.encode(text)
        while ids:
            n = groups.get(ids[0], 1)
            units.append([(i, weight) for i in ids[:n]])
            ids = ids[n:]
    return units


def _chunks(units: list[Unit], room: int) -> list[Unit]:
    """Units in their order, a new chunk begun before one would pass `room`."""
    chunks: list[Unit] = [[]]
    for unit in units:
        if len(unit) > room:
            raise InputError(f"a placeholder of {len(unit)} vectors does not fit into a chunk of {room} tokens")
        if len(chunks[-1]) + len(unit) > room:
            chunks.append([])
        chunks[-1] += unit
    return chunks


def _row(tokenizer: Tokenizer, chunk: Unit, length: int) -> tuple[list[int], list[float]]:
    pads = length - 1 - len(chunk) - 1
    ids = [tokenizer.bos, *(i for i, _ in chunk), tokenizer.eos, *[tokenizer.pad] * pads]
    return ids, [1.0, *(w for _, w in chunk), *[1.0] * (1 + pads)]
