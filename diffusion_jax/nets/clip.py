"""CLIP's transformer, and its towers for pictures and for texts.

A layer is, with layer normalization N over the channels (e = 10^-5),

    x <- x + attention(N x),   x <- x + W2 f(W1 N x + b1) + b2                                                     (1)
    f(x) = x sigmoid(1.702 x)      OpenAI's "quick" GELU                                                           (2)

(Radford et al. 2021, arXiv:2103.00020, section 2.4). The tower cuts a picture into patches, maps each to a token, puts
a learned one c before them and adds places P:

    h = layers(N ([c, E x_1, ..., E x_n] + P)),   embedding = W N h_0                                              (3)

A text is words w_1 .. w_n of a table, the first one marking the start and the first "end of text" at place e. Its tower
is the same transformer under a mask: place i sees the places j <= i.

    h^0 = [w_1, ..., w_n] + P,   h^l = layer_l(h^{l-1}),   states = N h^L,   embedding = W N h^L_e                 (4)

Latent diffusion looks at the states of all places, of the last layer or of one before it. Attribute names are those of
transformers' CLIPTextModel and CLIPVisionModel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.functional import functional
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params

Activation = Callable[[Array], Array]
Act = Literal["quick_gelu", "gelu"]
"""OpenAI's networks have (2), OpenCLIP's the exact GELU."""
EOS = 49407
"""The id of "end of text" in CLIP's vocabulary of 49,408."""


class TextStates(NamedTuple):
    """What a text tower says: `hidden: f32[b, n, width]` of all places, `pooled: f32[b, width or n_out]` of place e."""

    hidden: Array
    pooled: Array


class TextEncoder(NamedTuple):
    """A text tower as pure functions; apply: (params, ids: int32[b, n <= length]) -> TextStates."""

    init: Callable[[Key], Params]
    apply: Callable[[Params, Array], TextStates]
    width: int
    length: int = 77


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


def clip_text(
    *, width: int = 768, depth: int = 12, heads: int = 12, mlp: int = 3072, vocab: int = 49408, length: int = 77,
    act: Act = "quick_gelu", n_out: int | None = None, layer: int = -1, normed: bool = True, eos: int = EOS,
    dtype: layers.DType = jnp.float32, remat: layers.Remat = "none",
) -> TextEncoder:  # fmt: skip
    """The tower for texts of a CLIP, equation (4), by default ViT-L/14's.

    layer: whose output `hidden` is, -1 for the last, -2 for the one before it. normed: with the tower's last
    normalization. n_out: width of the projection W of `pooled`; None for none. `pooled` is the last layer's,
    normalized, at the first id `eos`, or at place 0 of a text without it. vocab: rows of the table; textual inversion
    adds some. What comes after the end of a text has states too, and the published U-Nets look at them.
    dtype: of the computation; parameters and results are float32. InputError if the arguments do not fit together;
    ValueError for other ids than int[b, n] with n <= length.
    Source: Radford et al. 2021, section 2.4.
    """
    if act not in get_args(Act):
        raise InputError(f"act={act!r} is not one of {', '.join(get_args(Act))}")
    if not -depth - 1 <= layer <= -1:
        raise InputError(f"layer={layer}: a tower of {depth} layers has states -1 (the last) to {-depth - 1}")
    if width % heads:
        raise InputError(f"clip_text: {width} channels in {heads} heads")
    net = functional(
        lambda rngs: ClipText(
            rngs, width=width, depth=depth, heads=heads, mlp=mlp, vocab=vocab, length=length, act=act, n_out=n_out,
            layer=layer, normed=normed, eos=eos, dtype=dtype, remat=remat,
        )
    )  # fmt: skip

    def apply(params: Params, ids: Array) -> TextStates:
        states: Any = net.apply(params, ids, jnp.zeros(ids.shape[:1]))
        return states

    return TextEncoder(net.init, apply, width, length)


def clip_vit_l_text(
    *, layer: int = -1, normed: bool = True, n_out: int | None = None, vocab: int = 49408,
    dtype: layers.DType = jnp.float32, remat: layers.Remat = "none",
) -> TextEncoder:  # fmt: skip
    """OpenAI's ViT-L/14, 123,060,480 parameters: the text encoder of Stable Diffusion 1.

    And the first one of SDXL, there with layer=-2, normed=False. `clip skip` k of user interfaces is layer=-k.
    """
    return clip_text(layer=layer, normed=normed, n_out=n_out, vocab=vocab, dtype=dtype, remat=remat)


def openclip_h_text(
    *, layer: int = -1, normed: bool = True, vocab: int = 49408, dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> TextEncoder:  # fmt: skip
    """OpenCLIP's ViT-H/14 up to its last layer but one, 340,387,840 parameters: the encoder of Stable Diffusion 2.

    That model takes the states after 23 of 24 layers and normalizes them, so the last one is not there.
    """
    return clip_text(
        width=1024, depth=23, heads=16, mlp=4096, act="gelu", layer=layer, normed=normed, vocab=vocab, dtype=dtype,
        remat=remat,
    )  # fmt: skip


def openclip_g_text(
    *, layer: int = -2, normed: bool = False, vocab: int = 49408, dtype: layers.DType = jnp.float32,
    remat: layers.Remat = "none",
) -> TextEncoder:  # fmt: skip
    """OpenCLIP's ViT-bigG/14, 694,659,840 parameters: the second encoder of SDXL, whose `pooled` it takes too."""
    return clip_text(
        width=1280, depth=32, heads=20, mlp=5120, act="gelu", n_out=1280, layer=layer, normed=normed, vocab=vocab,
        dtype=dtype, remat=remat,
    )  # fmt: skip


def quick_gelu(x: Array) -> Array:
    """Equation (2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """x Phi(x), exactly."""
    return jax.nn.gelu(x, approximate=False)


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
        self.visual_projection = layers.Projection(rngs, width, n_out, dtype)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        return self.visual_projection(self.vision_model(x)).astype(jnp.float32)


class TextEmbeddings(nnx.Module):
    """[w_1, ..., w_n] + P of equation (4): `int[b, n] -> f32[b, n, width]`."""

    def __init__(self, rngs: nnx.Rngs, vocab: int, length: int, width: int):
        self.token_embedding = Table(rngs, vocab, width)
        self.position_embedding = Table(rngs, length, width)
        self.length = length

    def __call__(self, ids: Array) -> Array:
        if ids.ndim != 2 or ids.shape[1] > self.length or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids must be int[b, n] with n <= {self.length}, got {ids.dtype}{list(ids.shape)}")
        words = jnp.take(self.token_embedding.embedding[...], ids, axis=0, mode="clip")
        return words + self.position_embedding.embedding[...][None, : ids.shape[1]]


class TextTransformer(nnx.Module):
    """Equation (4): `int[b, n] -> h^0 .. h^L`, each `[b, n, width]`; `final_layer_norm` is its last N."""

    def __init__(
        self, rngs: nnx.Rngs, *, width: int, depth: int, heads: int, mlp: int, vocab: int, length: int, act: Act,
        dtype: layers.DType, remat: layers.Remat,
    ):  # fmt: skip
        self.embeddings = TextEmbeddings(rngs, vocab, length, width)
        function = quick_gelu if act == "quick_gelu" else gelu
        self.encoder = Encoder(rngs, width, depth, heads, mlp, function, dtype, remat)
        self.final_layer_norm = LayerNorm(width)
        self.dtype = dtype

    def __call__(self, ids: Array) -> list[Array]:
        h = self.embeddings(ids).astype(self.dtype)
        seen = jnp.tril(jnp.ones((ids.shape[1],) * 2, jnp.bool_))
        return self.encoder.hidden(h, seen[None, None])


class ClipText(nnx.Module):
    """Equation (4), in the form `functional` takes; time and condition are ignored."""

    def __init__(
        self, rngs: nnx.Rngs, *, width: int, depth: int, heads: int, mlp: int, vocab: int, length: int, act: Act,
        n_out: int | None, layer: int, normed: bool, eos: int, dtype: layers.DType, remat: layers.Remat,
    ):  # fmt: skip
        self.text_model = TextTransformer(
            rngs, width=width, depth=depth, heads=heads, mlp=mlp, vocab=vocab, length=length, act=act, dtype=dtype,
            remat=remat,
        )  # fmt: skip
        self.text_projection = None if n_out is None else layers.Projection(rngs, width, n_out, dtype)
        self.layer, self.normed, self.eos = layer, normed, eos

    def __call__(self, ids: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> TextStates:
        states, norm = self.text_model(ids), self.text_model.final_layer_norm
        hidden = norm(states[self.layer]) if self.normed else states[self.layer]
        end = jnp.argmax(ids == self.eos, axis=1)
        pooled = norm(jnp.take_along_axis(states[-1], end[:, None, None], axis=1)[:, 0])
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return TextStates(hidden.astype(jnp.float32), pooled.astype(jnp.float32))


def patchify(x: Array, kernel: Array) -> Array:
    """Convolve `[b, h, w, n_in]` with `[p, p, n_in, n_out]` in steps of p, as one product: `[b, h w / p^2, n_out]`."""
    (b, h, w, n), (p, _, _, n_out) = x.shape, kernel.shape
    cut = jnp.reshape(x, (b, h // p, p, w // p, p, n))
    rows = jnp.reshape(jnp.transpose(cut, (0, 1, 3, 2, 4, 5)), (b, (h // p) * (w // p), p * p * n))
    return jnp.matmul(rows, jnp.reshape(kernel, (p * p * n, n_out)))


def _last(c: Array, x: Array) -> Array:
    return jnp.reshape(c, (1,) * (x.ndim - 1) + c.shape)
