"""Texts as what a model reads: a row of ids and weights for each of its text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from diffusion_jax.systems.stable_diffusion import Prompt
from diffusion_jax.text import prompts
from diffusion_jax.text.tokenizer import Tokenizer


def read_prompts(
    tokenizers: Mapping[str, Tokenizer], texts: Sequence[str], negatives: Sequence[str], max_chunks: int
) -> tuple[Prompt, Prompt]:
    """b texts and b negative ones, all of the same number of chunks for all encoders.

    InputError for a text of more than `max_chunks` chunks.
    """
    every = {name: [prompts.encode(t, text, max_chunks=max_chunks) for text in (*texts, *negatives)]
             for name, t in tokenizers.items()}  # fmt: skip
    chunks = max(len(prompt.ids) for rows in every.values() for prompt in rows)
    joined = {name: _of_length(tokenizers[name], rows, chunks) for name, rows in every.items()}
    b = len(texts)
    halves = [
        Prompt(
            {name: jnp.asarray(both.ids[rows]) for name, both in joined.items()},
            {name: jnp.asarray(both.weights[rows]) for name, both in joined.items()},
        )
        for rows in (slice(None, b), slice(b, None))
    ]
    return halves[0], halves[1]


def with_sizes(prompt: Prompt, sizes: Sequence[float]) -> Prompt:
    """The same prompt, telling the model these numbers about each picture."""
    b = next(iter(prompt.ids.values())).shape[0]
    return prompt._replace(sizes=jnp.asarray(np.tile(np.asarray(sizes, np.float32), (b, 1))))


def _of_length(tokenizer: Tokenizer, rows: list[prompts.Prompt], chunks: int) -> prompts.Prompt:
    """[b, chunks, n], also where none of the rows is that long."""
    empty = prompts.encode(tokenizer, "")
    longest = prompts.Prompt(np.repeat(empty.ids, chunks, 0), np.repeat(empty.weights, chunks, 0))
    ids, weights = prompts.together(tokenizer, [*rows, longest])
    return prompts.Prompt(ids[:-1], weights[:-1])
