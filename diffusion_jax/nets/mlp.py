"""A residual network for vectors (two-dimensional toy data, embeddings).

With e = silu(W2 silu(W1 features(t)) + label row + V2 silu(V1 vector)), see `conditioning` for the last two:

    h_0 = W x,   h_{k+1} = h_k + B_k silu(A_k silu(h_k) + E_k e),   output = W' silu(h_n)                       (1)

B_k and W' start at zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import conditioning, layers
from diffusion_jax.nets.conditioning import Kinds, VectorEmbedding
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Linear
from diffusion_jax.typing import Array, Cond, InputError, Key, Net


def mlp(
    dim: int,
    *,
    width: int = 128,
    blocks: int = 3,
    dropout: float = 0.0,
    classes: int | None = None,
    vector: int | None = None,
    out_dim: int | None = None,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """A residual network, equation (1): `(x: [b, dim], t: [b], cond) -> f32[b, out_dim]`.

    The time features turn at rates from 1 down to 1e-4 radians: give times of the order of 1 to 1000.
    classes: labels are in [0, classes], where `classes` means no label. vector: the length of a vector, which is given
    as in {"label": int[b], "vector": f32[b, n]}; labels alone can be given plainly, and None is nothing for all.
    remat: what the backward pass keeps of each block, see `layers.remat`.
    Raises InputError if an argument is out of range.
    """
    if dim < 1 or width < 2 or width % 2 or blocks < 0 or not 0 <= dropout < 1:
        raise InputError(
            f"mlp: needs dim >= 1, an even width, blocks >= 0 and dropout in [0, 1), "
            f"got dim={dim}, width={width}, blocks={blocks}, dropout={dropout}"
        )
    kinds = Kinds(classes, vector)
    conditioning.check_kinds(kinds)
    return functional(lambda rngs: MLP(rngs, dim, out_dim or dim, width, blocks, dropout, kinds, remat, dtype))


class Block(nnx.Module):
    """One step of equation (1)."""

    def __init__(self, rngs: nnx.Rngs, width: int, dropout: float, dtype: layers.DType):
        self.linear_1 = Linear(rngs, width, width, dtype)
        self.time_emb_proj = Linear(rngs, width, width, dtype)
        self.linear_2 = Linear(rngs, width, width, dtype, layers.zeros)
        self.dropout = dropout

    def __call__(self, h: Array, emb: Array, noise: Array | None) -> Array:
        a = jax.nn.silu(self.linear_1(jax.nn.silu(h)) + self.time_emb_proj(emb))
        return h + self.linear_2(layers.dropout(a, self.dropout, noise))


class MLP(nnx.Module):
    """The whole network; see `mlp`."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, width: int, blocks: int, dropout: float, kinds: Kinds,
        remat: layers.Remat, dtype: layers.DType,
    ):  # fmt: skip
        classes, vector = kinds.classes, kinds.vector
        self.linear_in = Linear(rngs, n_in, width, dtype)
        self.time_embedding = layers.TimeEmbedding(rngs, width, width, dtype)
        self.class_embedding = None if classes is None else layers.LabelEmbedding(rngs, classes, width, dtype)
        self.vector_embedding = None if vector is None else VectorEmbedding(rngs, vector, width, dtype)
        self.blocks = nnx.List([Block(rngs, width, dropout, dtype) for _ in range(blocks)])
        self.linear_out = Linear(rngs, width, n_out, dtype, layers.zeros)
        self.n_in, self.width, self.dropout, self.kinds = n_in, width, dropout, kinds
        self.remat: layers.Remat = remat

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        if x.ndim != 2 or x.shape[1] != self.n_in or t.shape != x.shape[:1]:
            raise ValueError(f"x must be [b {self.n_in}] and t [b], got {list(x.shape)} and {list(t.shape)}")
        given = conditioning.read(cond, self.kinds, x)
        emb = self.time_embedding(layers.time_features(t, self.width))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(given.label, x.shape[0])
        if self.vector_embedding is not None and given.vector is not None:
            emb = emb + self.vector_embedding(given.vector, given.vector_mask)
        h, emb = self.linear_in(x), jax.nn.silu(emb)
        noises = layers.dropout_noise(key, self.dropout, x.shape[0], [(self.width,)] * len(self.blocks))
        for block, noise in zip(self.blocks, noises, strict=True):
            h = layers.remat(self.remat, block)(h, emb, noise)
        return self.linear_out(jax.nn.silu(h)).astype(jnp.float32)
