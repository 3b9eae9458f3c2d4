"""BERT's encoder, which reads a text in both directions, and a vector for a whole sentence.

With layer normalization N over the channels (e = 10^-12) after each sum, and not before as in CLIP,

    h = N (word of each id + place + segment 0)                                                                  (1)
    h <- N (h + attention(h)),   h <- N (h + W2 gelu(W1 h + b1) + b2)                                            (2)

(Devlin et al. 2019, arXiv:1810.04805, section 3, on the layer of Vaswani et al. 2017, arXiv:1706.03762). A sentence is
the mean over its tokens, at length 1 (Reimers & Gurevych 2019, arXiv:1908.10084, section 3):

    s = m / |m|,   m = (sum of h_i over the tokens that are there) / (how many there are)                        (3)

Attribute names are those of transformers' BertModel.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.clip import LayerNorm, Table
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Linear
from diffusion_jax.typing import Array, Cond, Key, Net

EPS = 1e-12


def bert(
    *, width: int = 768, depth: int = 12, heads: int = 12, mlp: int = 3072, vocab: int = 30_522, length: int = 512,
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """Equation (2): apply(params, ids: int32[b, n], t, mask: bool[b, n] or None) -> token states f32[b, n, width].

    A token is seen by none where its mask is False; t is not used. The defaults are the paper's base model. ValueError
    for more than `length` tokens, or a width that the heads do not divide.
    """
    if width % heads:
        raise ValueError(f"bert: {width} channels in {heads} heads")
    return functional(lambda rngs: Bert(rngs, width, depth, heads, mlp, vocab, length, dtype))


def minilm(*, dtype: layers.DType = jnp.float32) -> Net:
    """The network of all-MiniLM-L6-v2, a sentence encoder of 22,565,376 parameters without BERT's unused pooler."""
    return bert(width=384, depth=6, mlp=1536, dtype=dtype)


def sentence(states: Array, mask: Array) -> Array:
    """Equation (3): token states f32[b, n, d] and mask bool[b, n] -> f32[b, d] of length 1.

    >>> s = sentence(jnp.asarray([[[3.0, 4.0], [9.0, 9.0]]]), jnp.asarray([[True, False]]))
    >>> [round(float(value), 4) for value in s[0]]
    [0.6, 0.8]
    """
    there = mask.astype(states.dtype)[:, :, None]
    mean = jnp.sum(states * there, axis=1) / jnp.sum(there, axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


class Embeddings(nnx.Module):
    """Equation (1): `[b, n] -> [b, n, width]`."""

    def __init__(self, rngs: nnx.Rngs, width: int, vocab: int, length: int):
        self.word_embeddings = Table(rngs, vocab, width)
        self.position_embeddings = Table(rngs, length, width)
        self.token_type_embeddings = Table(rngs, 2, width)
        self.LayerNorm = LayerNorm(width, EPS)
        self.length = length

    def __call__(self, ids: Array) -> Array:
        if ids.ndim != 2 or ids.shape[1] > self.length or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be int[b, n] with n <= {self.length}, got {ids.dtype}{list(ids.shape)}")
        words = jnp.take(self.word_embeddings.embedding[...], ids, axis=0, mode="clip")
        places = self.position_embeddings.embedding[...][: ids.shape[1]] + self.token_type_embeddings.embedding[...][:1]
        return self.LayerNorm(words + places[None])


class SelfAttention(nnx.Module):
    """Queries, keys and values, and the softmax: `[b, n, width] -> [b, n, width]`."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, dtype: layers.DType):
        self.query, self.key, self.value = (Linear(rngs, width, width, dtype) for _ in range(3))
        self.heads = heads

    def __call__(self, x: Array, mask: Array | None) -> Array:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (jnp.reshape(z, shape) for z in layers.joint(x, self.query, self.key, self.value))
        return jnp.reshape(attention(q, k, v, mask=mask), x.shape)


class Output(nnx.Module):
    """N (x + W y + b)."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, width: int, dtype: layers.DType):
        self.dense = Linear(rngs, n_in, width, dtype)
        self.LayerNorm = LayerNorm(width, EPS)

    def __call__(self, y: Array, x: Array) -> Array:
        return self.LayerNorm(x + self.dense(y))


class Intermediate(nnx.Module):
    """gelu(W1 x + b1), the exact GELU."""

    def __init__(self, rngs: nnx.Rngs, width: int, hidden: int, dtype: layers.DType):
        self.dense = Linear(rngs, width, hidden, dtype)

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(self.dense(x), approximate=False)


class Attention(nnx.Module):
    """The first half of equation (2)."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, dtype: layers.DType):
        self.self = SelfAttention(rngs, width, heads, dtype)
        self.output = Output(rngs, width, width, dtype)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        return self.output(self.self(x, mask), x)


class Layer(nnx.Module):
    """Equation (2)."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, mlp: int, dtype: layers.DType):
        self.attention = Attention(rngs, width, heads, dtype)
        self.intermediate = Intermediate(rngs, width, mlp, dtype)
        self.output = Output(rngs, mlp, width, dtype)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """Layers one after the other."""

    def __init__(self, rngs: nnx.Rngs, depth: int, make: partial[Layer]):
        self.layer = nnx.List([make(rngs) for _ in range(depth)])

    def __call__(self, x: Array, mask: Array | None) -> Array:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nnx.Module):
    """Equations (1) and (2)."""

    def __init__(
        self, rngs: nnx.Rngs, width: int, depth: int, heads: int, mlp: int, vocab: int, length: int, dtype: layers.DType
    ):  # fmt: skip
        self.embeddings = Embeddings(rngs, width, vocab, length)
        self.encoder = Encoder(rngs, depth, partial(Layer, width=width, heads=heads, mlp=mlp, dtype=dtype))
        self.dtype = dtype

    def __call__(self, ids: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        mask = None if cond is None else cond[:, None, None, :]
        return self.encoder(self.embeddings(ids).astype(self.dtype), mask).astype(jnp.float32)
