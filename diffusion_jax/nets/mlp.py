"""A residual network for vectors (two-dimensional toy data, embeddings).

With e = silu(W2 silu(W1 features(t)) + label row):

    h_0 = W x,   h_{k+1} = h_k + B_k silu(A_k silu(h_k) + E_k e),   output = W' silu(h_n)                       (1)

B_k and W' start at zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Linear
from diffusion_jax.typing import Array, InputError, Key, Net


def mlp(
    dim: int,
    *,
    width: int = 128,
    blocks: int = 3,
    dropout: float = 0.0,
    classes: int | None = None,
    out_dim: int | None = None,
    dtype: layers.DType = jnp.float32,
) -> Net:
    """A residual network, equation (1): `(x: [b, dim], t: [b], labels: int32[b] | None) -> f32[b, out_dim]`.

    The time features turn at rates from 1 down to 1e-4 radians: give times of the order of 1 to 1000.
    classes: labels are in [0, classes], where `classes` means no label; cond None means no label for all.
    Raises InputError if an argument is out of range.
    """
    if dim < 1 or width < 2 or width % 2 or blocks < 0 or not 0 <= dropout < 1:
        raise InputError(
            f"mlp: needs dim >= 1, an even width, blocks >= 0 and dropout in [0, 1), "
            f"got dim={dim}, width={width}, blocks={blocks}, dropout={dropout}"
        )
    return functional(lambda rngs: MLP(rngs, dim, out_dim or dim, width, blocks, dropout, classes, dtype))


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
        self, rngs: nnx.Rngs, n_in: int, n_out: int, width: int, blocks: int, dropout: float, classes: int | None,
        dtype: layers.DType,
    ):  # fmt: skip
        self.linear_in = Linear(rngs, n_in, width, dtype)
        self.time_embedding = layers.TimeEmbedding(rngs, width, width, dtype)
        self.class_embedding = None if classes is None else layers.LabelEmbedding(rngs, classes, width, dtype)
        self.blocks = nnx.List([Block(rngs, width, dropout, dtype) for _ in range(blocks)])
        self.linear_out = Linear(rngs, width, n_out, dtype, layers.zeros)
        self.n_in, self.width, self.dropout = n_in, width, dropout

    def __call__(self, x: Array, t: Array, cond: Array | None = None, *, key: Key | None = None) -> Array:
        if x.ndim != 2 or x.shape[1] != self.n_in or t.shape != x.shape[:1]:
            raise ValueError(f"x must be [b {self.n_in}] and t [b], got {list(x.shape)} and {list(t.shape)}")
        emb = self.time_embedding(layers.time_features(t, self.width))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(cond, x.shape[0])
        elif cond is not None:
            raise ValueError("labels were given to a network without classes")
        h, emb = self.linear_in(x), jax.nn.silu(emb)
        noises = layers.dropout_noise(key, self.dropout, x.shape[0], [(self.width,)] * len(self.blocks))
        for block, noise in zip(self.blocks, noises, strict=True):
            h = block(h, emb, noise)
        return self.linear_out(jax.nn.silu(h)).astype(jnp.float32)
