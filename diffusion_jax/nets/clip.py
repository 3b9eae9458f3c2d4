"""CLIP's transformer, and its tower for pictures.

A layer is, with layer normalization N over the channels (e = 10^-5),

    x <- x + attention(N x),   x <- x + W2 f(W1 N x + b1) + b2                                                     (1)
    f(x) = x sigmoid(1.702 x)      OpenAI's "quick" GELU                                                           (2)

(Radford et al. 2021, arXiv:2103.00020, section 2.4). The tower cuts a picture into patches, maps each to a token, puts
a learned one c before them and adds places P:

    h = layers(N ([c, E x_1, ..., E x_n] + P)),   embedding = W N h_0                                              (3)

The text tower of a CLIP is the same transformer under a causal mask.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.functional import functional
from diffusion_jax.typing import Array, Cond, Key, Net

Activation = Callable[[Array], Array]


def clip_vision(
    *, size: int = 224, patch: int = 14, width: int = 1024, depth: int = 24, heads: int = 16, mlp: int = 4096,
    n_out: int = 768, dtype: layers.DType = jnp.float32, remat: layers.Remat = "none",
) -> Net:  # fmt: skip
    """The tower for pictures of a CLIP, by default ViT-L/14: apply(params, x: f32[b, size, size, 3], t) -> [b, n_out].

    t is not used; the embedding (3) is not of length 1. ValueError for a size that the patch, or a width that the heads
    do not divide.
    """
    if size % patch or width % heads:
        raise ValueError(f"clip_vision: {size} pixels in patches of {patch}, {width} channels in {heads} heads")
    return functional(
        lambda rngs: ClipVision(
            rngs, size=size, patch=patch, width=width, depth=depth, heads=heads, mlp=mlp, n_out=n_out, dtype=dtype,
            remat=remat,
        )
    )  # fmt: skip


def quick_gelu(x: Array) -> Array:
    """Equation (2)."""
    return x * jax.nn.sigmoid(1.702 * x)


class LayerNorm(nnx.Module):
    """gamma (x - mean x) (var x + e)^(-1/2) + beta over the last axis, in float32."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.scale, self.bias = nnx.Param(jnp.ones((width,))), nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (y * _last(self.scale[...], y) + _last(self.bias[...], y)).astype(x.dtype)


class Projection(nnx.Module):
    """y = x W, without a bias."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, dtype: layers.DType):
        self.kernel = nnx.Param(layers.xavier(rngs, (n_in, n_out)))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        return jnp.matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


class Patches(nnx.Module):
    """A convolution as wide as its stride, without bias: `[b, h, w, n_in] -> [b, h w / patch^2, n_out]`."""

    def __init__(self, rngs: nnx.Rngs, patch: int, n_in: int, n_out: int, dtype: layers.DType):
        self.kernel = nnx.Param(layers.xavier(rngs, (patch, patch, n_in, n_out)))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        return patchify(x.astype(self.dtype), self.kernel[...].astype(self.dtype))


class Table(nnx.Module):
    """Learned vectors, one a row: of places, of words."""

    def __init__(self, rngs: nnx.Rngs, rows: int, width: int):
        self.embedding = nnx.Param(rngs.uniform((rows, width), jnp.float32, minval=-0.03, maxval=0.03))


class Attention(nnx.Module):
    """Multi-head self-attention: `[b, n, width] -> [b, n, width]`."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, dtype: layers.DType):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            layers.Linear(rngs, width, width, dtype) for _ in range(4)
        )
        self.heads = heads

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        q, k, v = layers.joint(x, self.q_proj, self.k_proj, self.v_proj)
        shape = (*x.shape[:2], self.heads, -1)
        y = attention(jnp.reshape(q, shape), jnp.reshape(k, shape), jnp.reshape(v, shape), mask=mask)
        return self.out_proj(jnp.reshape(y, x.shape))


class Mlp(nnx.Module):
    """W2 f(W1 x + b1) + b2."""

    def __init__(self, rngs: nnx.Rngs, width: int, hidden: int, act: Activation, dtype: layers.DType):
        self.fc1 = layers.Linear(rngs, width, hidden, dtype)
        self.fc2 = layers.Linear(rngs, hidden, width, dtype)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nnx.Module):
    """Equation (1)."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, mlp: int, act: Activation, dtype: layers.DType):
        self.layer_norm1, self.layer_norm2 = LayerNorm(width), LayerNorm(width)
        self.self_attn = Attention(rngs, width, heads, dtype)
        self.mlp = Mlp(rngs, width, mlp, act, dtype)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """Layers one after the other; `hidden(x, mask)` also gives what comes out of each, for models that use another."""

    def __init__(
        self, rngs: nnx.Rngs, width: int, depth: int, heads: int, mlp: int, act: Activation, dtype: layers.DType,
        remat: layers.Remat,
    ):  # fmt: skip
        self.layers = nnx.List([Layer(rngs, width, heads, mlp, act, dtype) for _ in range(depth)])
        self.remat: layers.Remat = remat

    def hidden(self, x: Array, mask: Array | None = None) -> list[Array]:
        states = [x]
        for layer in self.layers:
            states.append(layers.remat(self.remat, layer)(states[-1], mask))
        return states

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        return self.hidden(x, mask)[-1]


class VisionEmbeddings(nnx.Module):
    """[c, E x_1, ..., E x_n] + P of equation (3)."""

    def __init__(self, rngs: nnx.Rngs, size: int, patch: int, width: int, dtype: layers.DType):
        self.class_embedding = nnx.Param(rngs.uniform((width,), jnp.float32, minval=-0.03, maxval=0.03))
        self.patch_embedding = Patches(rngs, patch, 3, width, dtype)
        self.position_embedding = Table(rngs, (size // patch) ** 2 + 1, width)

    def __call__(self, x: Array) -> Array:
        tokens = self.patch_embedding(x)
        first = jnp.broadcast_to(self.class_embedding[...][None, None, :], (x.shape[0], 1, tokens.shape[2]))
        h = jnp.concatenate([first.astype(tokens.dtype), tokens], axis=1)
        return h + self.position_embedding.embedding[...].astype(h.dtype)[None]


class VisionTransformer(nnx.Module):
    """Equation (3) up to N h_0: `[b, size, size, 3] -> [b, width]`."""

    def __init__(
        self, rngs: nnx.Rngs, *, size: int, patch: int, width: int, depth: int, heads: int, mlp: int,
        dtype: layers.DType, remat: layers.Remat,
    ):  # fmt: skip
        self.embeddings = VisionEmbeddings(rngs, size, patch, width, dtype)
        self.pre_layrnorm = LayerNorm(width)  # the reference's spelling
        self.encoder = Encoder(rngs, width, depth, heads, mlp, quick_gelu, dtype, remat)
        self.post_layernorm = LayerNorm(width)
        self.shape = (size, size, 3)

    def __call__(self, x: Array) -> Array:
        if x.shape[1:] != self.shape:
            raise ValueError(f"this tower takes pictures [b, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        h = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.post_layernorm(h[:, 0])


class ClipVision(nnx.Module):
    """Equation (3)."""

    def __init__(
        self, rngs: nnx.Rngs, *, size: int, patch: int, width: int, depth: int, heads: int, mlp: int, n_out: int,
        dtype: layers.DType, remat: layers.Remat,
    ):  # fmt: skip
        self.vision_model = VisionTransformer(
            rngs, size=size, patch=patch, width=width, depth=depth, heads=heads, mlp=mlp, dtype=dtype, remat=remat
        )
        self.visual_projection = Projection(rngs, width, n_out, dtype)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return self.visual_projection(self.vision_model(x)).astype(jnp.float32)


def patchify(x: Array, kernel: Array) -> Array:
    """Convolve `[b, h, w, n_in]` with `[p, p, n_in, n_out]` in steps of p, as one product: `[b, h w / p^2, n_out]`."""
    (b, h, w, n), (p, _, _, n_out) = x.shape, kernel.shape
    cut = jnp.reshape(x, (b, h // p, p, w // p, p, n))
    rows = jnp.reshape(jnp.transpose(cut, (0, 1, 3, 2, 4, 5)), (b, (h // p) * (w // p), p * p * n))
    return jnp.matmul(rows, jnp.reshape(kernel, (p * p * n, n_out)))


def _last(c: Array, x: Array) -> Array:
    return jnp.reshape(c, (1,) * (x.ndim - 1) + c.shape)
