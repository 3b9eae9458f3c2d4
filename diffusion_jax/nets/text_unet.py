"""The U-Net of latent diffusion, with a text for its condition (Rombach et al. 2022, arXiv:2112.10752, section 3.3).

With GN group normalization, N layer normalization, and all that a condition may lack (see `conditioning`) zero,

    f_n(t) = [cos(t r_0), cos(t r_1), ..., sin(t r_0), ...],   r_i = 10000^(-2i/n),   i < n/2                    (1)
    e = silu(W2 silu(W1 f(t)) + (row of the label) + V2 silu(V1 [vector, f_256(size_1), ..., f_256(size_k)]))    (2)
    block(h) = S h + C2 silu(GN(C1 silu(GN(h)) + W e))                  S: 1x1 where the width changes           (3)
    transformer(h) = h + W_out layers(W_in GN(h))                       the pixels z as a sequence               (4)
    layer:   z <- z + attention(N z; N z),   z <- z + attention(N z; tokens),   z <- z + F2 (a gelu(g)),
             (a, g) = F1 N z,   attention(z; y) = W_o softmax(q k^T / sqrt(d)) v,   q = W_q z,   (k, v) = W y    (5)

where the "only cross" levels of an upscaler look at the tokens in the first attention too. Down: at level i, `blocks`
times (3) [and (4)], then a convolution of stride 2, padded by a row on every side. Middle: (3), (4), (3). Up: `blocks +
1` times (3) on the concatenation with what the way down left [and (4)], then repetition to the size that follows on the
way up, whatever it is, and a convolution. Output: C silu(GN(h)). Before the way up the residuals of a ControlNet are
added to what the way down left, and the last of them to what the middle gives. C2, W_out and the output start at zero.

The label, the vector and the sizes (pooled text, original size, crop, target size) are those of SDXL (Podell et al.
2023, arXiv:2307.01952, section 2.2) and of the upscaler. Attribute names are those of diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import conditioning, layers
from diffusion_jax.nets.adm import LabelEmbedding, time_features
from diffusion_jax.nets.clip import LayerNorm, gelu
from diffusion_jax.nets.conditioning import Given, Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options, Projection
from diffusion_jax.nets.unet import ResnetBlock
from diffusion_jax.ops import bcast
from diffusion_jax.typing import Array, Cond, InputError, Key, Net

EPS = 1e-5
"""In the root of the normalizations of (3) and of the output; (4) has 1e-6."""
SIZE_FEATURES = 256
"""The features of every size in (2)."""


class Plan(NamedTuple):
    """The shape of one network; one entry a level of widths, attends, depths, heads and only_cross."""

    n_in: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    depths: tuple[int, ...]
    middle: int
    heads: tuple[int, ...]
    only_cross: tuple[bool, ...]
    linear: bool
    kinds: Kinds
    remat: layers.Remat


def text_unet(
    *,
    n_in: int = 4,
    n_out: int = 4,
    widths: Sequence[int] = (320, 640, 1280, 1280),
    blocks: int = 2,
    attends: Sequence[bool] = (True, True, True, False),
    depths: int | Sequence[int] = 1,
    middle: int | None = None,
    heads: int | Sequence[int] = 8,
    groups: int | None = None,
    tokens: int | None = 768,
    only_cross: bool | Sequence[bool] = False,
    linear_projection: bool = False,
    classes: int | None = None,
    vector: int | None = None,
    sizes: int | None = None,
    image: int | None = None,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The network of Stable Diffusion: `(x: [b h w n_in], t: [b], cond) -> f32[b h w n_out]`, of any height and width.

    t: the network's own time, the number of the step in 0 .. 999.
    attends: the levels that have transformers (4); the middle always has one. depths: layers (5) of each, in all levels
    or in each; middle: of the middle's, by default the last level's. heads: of attention, as for depths.
    groups: of every normalization, by default min(32, widths[0] / 4).
    only_cross: the levels whose transformers look at nothing but the tokens. linear_projection: W_in and W_out are
    matrices instead of convolutions of width 1, which is only a matter of how weights are stored.
    cond: a dict of "tokens": f32[b, m, tokens] (with tokens=None there is no second attention); "label": int[b] in
    [0, classes]; "vector": f32[b, vector], "sizes": f32[b, sizes]; "image": f32[b, h, w, image], concatenated to x;
    "residuals": those of a `controlnet` of the same arguments. What is left out is absent, see `conditioning`; an
    absent label adds nothing.
    remat: what the backward pass keeps of each block with its transformer, see `layers.remat`.
    dtype: of the computation; parameters, statistics of normalization and the output are float32.
    The defaults are those of Stable Diffusion 1. Raises InputError if the arguments do not fit together, ValueError for
    inputs that do not fit.
    Source: Rombach et al. 2022, section 3.3 and appendix; Podell et al. 2023, section 2; equations (1)-(5).
    """
    p, options = plan(
        n_in=n_in, widths=widths, blocks=blocks, attends=attends, depths=depths, middle=middle, heads=heads,
        groups=groups, only_cross=only_cross, linear_projection=linear_projection, remat=remat, dtype=dtype,
        kinds=Kinds(classes, vector, tokens, image, sizes, len(widths) * (blocks + 1) + 1),
    )  # fmt: skip
    if n_out < 1:
        raise InputError(f"n_out={n_out}: there is at least one channel")
    return functional(lambda rngs: TextUNet(rngs, n_out, p, options))


def sd15(*, image: int | None = None, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The U-Net of Stable Diffusion 1.1 to 1.5: 859,520,964 parameters without an image.

    image: channels beside the latent, 5 of a network for inpainting (mask, masked latent), 4 of InstructPix2Pix.
    """
    return text_unet(image=image, remat=remat, dtype=dtype)


def sd2(*, image: int | None = None, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The U-Net of Stable Diffusion 2 and 2.1: 865,910,724 parameters without an image, which is as in `sd15`."""
    return text_unet(heads=(5, 10, 20, 20), tokens=1024, linear_projection=True, image=image, remat=remat, dtype=dtype)


def sdxl(*, image: int | None = None, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The base U-Net of SDXL: 2,567,463,684 parameters without an image, which is as in `sd15`.

    cond: "tokens" of 2,048 channels, both text encoders' side by side; "vector", the second one's pooled text; "sizes":
    the original height and width, the top and left of the crop, the target height and width.
    """
    return text_unet(
        widths=(320, 640, 1280), attends=(False, True, True), depths=(1, 2, 10), heads=(5, 10, 20), tokens=2048,
        linear_projection=True, vector=1280, sizes=6, image=image, remat=remat, dtype=dtype,
    )  # fmt: skip


def sdxl_refiner(*, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The refining U-Net of SDXL: 2,259,526,660 parameters.

    cond: "tokens" and "vector" of its one text encoder, the second of the base model; "sizes": the original height and
    width, the top and left of the crop, an aesthetic score.
    """
    return text_unet(
        widths=(384, 768, 1536, 1536), attends=(False, True, True, False), depths=4, heads=(6, 12, 24, 24), tokens=1280,
        linear_projection=True, vector=1280, sizes=5, remat=remat, dtype=dtype,
    )  # fmt: skip


def sd_x4_upscaler(*, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The U-Net of Stable Diffusion's upscaler, on latents as large as its small picture: 473,398,020 parameters.

    cond: "tokens" as `sd2`; "image": that picture with noise added, 3 channels; "label": the number of the noise level.
    """
    return text_unet(
        widths=(256, 512, 512, 1024), attends=(False, True, True, True), heads=8, tokens=1024,
        only_cross=(True, True, True, False), linear_projection=True, classes=1000, image=3, remat=remat, dtype=dtype,
    )  # fmt: skip


def plan(
    *, n_in: int, widths: Sequence[int], blocks: int, attends: Sequence[bool], depths: int | Sequence[int],
    middle: int | None, heads: int | Sequence[int], groups: int | None, only_cross: bool | Sequence[bool],
    linear_projection: bool, kinds: Kinds, remat: layers.Remat, dtype: layers.DType,
) -> tuple[Plan, Options]:  # fmt: skip
    """The arguments of `text_unet` for each level. Raises InputError if they do not fit together."""
    conditioning.check_kinds(kinds)
    if not widths or min(*widths, blocks, n_in) < 1:
        raise InputError(f"needs at least one level, block and channel, got {tuple(widths)}, {blocks}, {n_in}")
    options = Options(groups or layers.default_groups(widths[0]), 1, 0.0, dtype)
    each = {
        name: tuple(value) if isinstance(value, Sequence) else (value,) * len(widths)
        for name, value in {"attends": attends, "depths": depths, "heads": heads, "only_cross": only_cross}.items()
    }
    for name, values in each.items():
        if len(values) != len(widths) or min(values) < 0:
            raise InputError(f"{name}={values} is not one for each of the {len(widths)} levels")
    p = Plan(
        n_in, tuple(widths), blocks, linear=linear_projection, kinds=kinds, remat=remat,
        middle=each["depths"][-1] if middle is None else middle, **each,
    )  # fmt: skip
    _check_widths(p, options.groups)
    return p, options


def _check_widths(p: Plan, groups: int) -> None:
    if p.widths[0] % 2 or any(width % groups for width in p.widths):
        raise InputError(f"widths={p.widths}: the first is even, and groups={groups} divide all of them")
    for width, heads, attend in zip(p.widths, p.heads, (*p.attends[:-1], True), strict=True):
        if attend and (heads < 1 or width % heads):
            raise InputError(f"attention of width {width} is not divisible by heads={heads}")
    if min(*p.depths, p.middle) < 1:
        raise InputError(f"depths={p.depths}, middle={p.middle}: a transformer has at least one layer")
    if p.kinds.tokens is None and any(p.only_cross):
        raise InputError("only_cross: a network that takes no tokens cannot look at nothing but them")


class CrossAttention(nnx.Module):
    """The attention of (5): `z: [b, n, width]` to itself or to `y: [b, m, n_tokens]`, which may be partly absent."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, n_tokens: int, dtype: layers.DType):
        self.to_q = Projection(rngs, width, width, dtype)
        self.to_k = Projection(rngs, n_tokens, width, dtype)
        self.to_v = Projection(rngs, n_tokens, width, dtype)
        self.to_out = nnx.List([Linear(rngs, width, width, dtype)])
        self.heads = heads

    def __call__(self, z: Array) -> Array:
        q, k, v = layers.joint(z, self.to_q, self.to_k, self.to_v)
        return self.to_out[0](layers.attend(q, k, v, self.heads))

    def to(self, z: Array, y: Array, mask: Array | None) -> Array:
        q, (k, v) = self.to_q(z), layers.joint(y, self.to_k, self.to_v)
        if mask is None:
            return self.to_out[0](layers.attend(q, k, v, self.heads))
        h = self.to_out[0](conditioning.masked_attend(q, k, v, mask, self.heads))
        return jnp.where(bcast(jnp.any(mask, axis=1), h), h, jnp.zeros((), h.dtype))


class Gated(nnx.Module):
    """a gelu(g), (a, g) = F1 z: `[b, n, width] -> [b, n, hidden]` (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, rngs: nnx.Rngs, width: int, hidden: int, dtype: layers.DType):
        self.proj = Linear(rngs, width, 2 * hidden, dtype)

    def __call__(self, z: Array) -> Array:
        a, g = jnp.split(self.proj(z), 2, axis=-1)
        return a * gelu(g)


class FeedForward(nnx.Module):
    """F2 (a gelu(g)) of (5), four times as wide inside; "1" of the reference's list is a dropout."""

    def __init__(self, rngs: nnx.Rngs, width: int, dtype: layers.DType):
        hidden = 4 * width
        self.net = nnx.Dict({"0": Gated(rngs, width, hidden, dtype), "2": Linear(rngs, hidden, width, dtype)})

    def __call__(self, z: Array) -> Array:
        return self.net["2"](self.net["0"](z))


class Layer(nnx.Module):
    """Equation (5); with `only_cross` both attentions are to the tokens."""

    def __init__(
        self, rngs: nnx.Rngs, width: int, heads: int, n_tokens: int | None, only_cross: bool, dtype: layers.DType
    ):
        self.norm1, self.norm3 = LayerNorm(width), LayerNorm(width)
        self.norm2 = None if n_tokens is None else LayerNorm(width)
        seen = n_tokens if only_cross and n_tokens is not None else width
        self.attn1 = CrossAttention(rngs, width, heads, seen, dtype)
        self.attn2 = None if n_tokens is None else CrossAttention(rngs, width, heads, n_tokens, dtype)
        self.ff = FeedForward(rngs, width, dtype)
        self.only_cross = only_cross

    def __call__(self, z: Array, given: Given) -> Array:
        if not self.only_cross:
            z = z + self.attn1(self.norm1(z))
        elif given.tokens is not None:
            z = z + self.attn1.to(self.norm1(z), given.tokens, given.tokens_mask)
        if self.attn2 is not None and self.norm2 is not None and given.tokens is not None:
            z = z + self.attn2.to(self.norm2(z), given.tokens, given.tokens_mask)
        return z + self.ff(self.norm3(z))


class Transformer(nnx.Module):
    """Equation (4): `[b, h, w, width] -> [b, h, w, width]`, `depth` layers of `heads` heads."""

    def __init__(self, rngs: nnx.Rngs, width: int, depth: int, heads: int, only_cross: bool, p: Plan, o: Options):
        self.norm = GroupNorm(width, o.groups)
        self.transformer_blocks = nnx.List(
            [Layer(rngs, width, heads, p.kinds.tokens, only_cross, o.dtype) for _ in range(depth)]
        )
        if p.linear:
            self.proj_in = Linear(rngs, width, width, o.dtype)
            self.proj_out = Linear(rngs, width, width, o.dtype, layers.zeros)
        else:
            self.proj_in = Conv(rngs, width, width, o, width=1)
            self.proj_out = Conv(rngs, width, width, o, width=1, init=layers.zeros)

    def __call__(self, x: Array, given: Given) -> Array:
        z = self.proj_in(self.norm(x, act=False))
        z = jnp.reshape(z, (x.shape[0], -1, x.shape[-1]))
        for layer in self.transformer_blocks:
            z = layer(z, given)
        return x + self.proj_out(jnp.reshape(z, x.shape))


class Downsample(nnx.Module):
    """Half the size, rounded up: `[b, h, w, n] -> [b, h/2, w/2, n]`."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options):
        self.conv = Conv(rngs, n, n, o, stride=2, padding=1)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Repetition to `size`, twice that of x or one less, and a convolution: `[b, h, w, n] -> [b, *size, n]`."""

    def __init__(self, rngs: nnx.Rngs, n: int, o: Options):
        self.conv = Conv(rngs, n, n, o)

    def __call__(self, x: Array, size: tuple[int, ...]) -> Array:
        return self.conv(layers.upsample(x)[:, : size[0], : size[1]])


class Level(nnx.Module):
    """The blocks (3) of one level, of `widths` in and out, the first `attentions` of them followed by (4).

    depth, heads, only_cross: of its transformers.
    """

    def __init__(
        self, rngs: nnx.Rngs, widths: Sequence[tuple[int, int]], p: Plan, o: Options, *, attentions: int, depth: int,
        heads: int, only_cross: bool, down: bool = False, up: bool = False,
    ):  # fmt: skip
        n, n_emb = widths[-1][1], 4 * p.widths[0]
        self.resnets = nnx.List([ResnetBlock(rngs, a, b, n_emb, o, EPS) for a, b in widths])
        self.attentions = nnx.List([Transformer(rngs, n, depth, heads, only_cross, p, o) for _ in range(attentions)])
        self.downsamplers = nnx.List([Downsample(rngs, n, o)] if down else [])
        self.upsamplers = nnx.List([Upsample(rngs, n, o)] if up else [])
        self.remat: layers.Remat = p.remat

    def block(self, i: int, x: Array, emb: Array, given: Given) -> Array:
        return layers.remat(self.remat, partial(self._block, i))(x, emb, given)

    def _block(self, i: int, x: Array, emb: Array, given: Given) -> Array:
        x = self.resnets[i](x, emb, None)
        return self.attentions[i](x, given) if i < len(self.attentions) else x


class Contracting(nnx.Module):
    """What the U-Net and a ControlNet have in common: the embedding (2), the way down and the middle."""

    def __init__(self, rngs: nnx.Rngs, p: Plan, o: Options):
        n, n_emb, last = p.widths[0], 4 * p.widths[0], len(p.widths) - 1
        self.conv_in = Conv(rngs, p.n_in + (p.kinds.image or 0), n, o)
        self.time_embedding = layers.TimeEmbedding(rngs, n, n_emb, o.dtype)
        classes, added = p.kinds.classes, (p.kinds.vector or 0) + SIZE_FEATURES * (p.kinds.sizes or 0)
        self.class_embedding = None if classes is None else LabelEmbedding(rngs, classes, n_emb, o.dtype)
        self.add_embedding = layers.TimeEmbedding(rngs, added, n_emb, o.dtype) if added else None
        self.down_blocks = nnx.List()
        for i, width in enumerate(p.widths):
            pairs = [(width if j else n, width) for j in range(p.blocks)]
            self.down_blocks.append(make_level(rngs, i, pairs, p, o, down=i < last))
            n = width
        self.mid_block = Level(
            rngs, [(n, n), (n, n)], p, o, attentions=1, depth=p.middle, heads=p.heads[-1], only_cross=False
        )
        self.plan = p

    def check(self, x: Array, t: Array) -> None:
        """Raise ValueError unless x is `[b h w n_in]` and t is `[b]`."""
        if x.ndim != 4 or x.shape[-1] != self.plan.n_in:
            raise ValueError(f"x must be [b h w {self.plan.n_in}], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be [{x.shape[0]}], one time for each example, got {list(t.shape)}")

    def embed(self, t: Array, given: Given) -> Array:
        """e of equation (2), `[b, 4 widths[0]]`."""
        emb = self.time_embedding(time_features(t, self.plan.widths[0]))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(given.label, t.shape[0])
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(self.added(t.shape[0], given))
        return jax.nn.silu(emb)

    def added(self, batch: int, given: Given) -> Array:
        """[vector, f(size_1), ..., f(size_k)] of equation (2), zero where it is absent."""
        kinds, parts = self.plan.kinds, []
        if kinds.vector is not None:
            parts.append(_there(given.vector, given.vector_mask, (batch, kinds.vector)))
        if kinds.sizes is not None:
            features = None if given.sizes is None else time_features(jnp.ravel(given.sizes), SIZE_FEATURES)
            shape = (batch, SIZE_FEATURES * kinds.sizes)
            parts.append(_there(None if features is None else jnp.reshape(features, shape), given.sizes_mask, shape))
        return jnp.concatenate(parts, axis=-1)

    def beside(self, x: Array, given: Given) -> Array:
        """x, and in further channels the image of the condition, zero where it is absent."""
        if self.plan.kinds.image is None:
            return x
        absent = jnp.zeros((*x.shape[:-1], self.plan.kinds.image), x.dtype)
        return jnp.concatenate([x, absent if given.image is None else given.image.astype(x.dtype)], axis=-1)

    def contract(self, x: Array, emb: Array, given: Given) -> tuple[Array, list[Array]]:
        """From the features of `conv_in` to those of the middle, and what every step on the way down leaves."""
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x, emb, given)
                skips.append(x)
            for resample in level.downsamplers:
                x = resample(x)
                skips.append(x)
        for i in range(2):
            x = self.mid_block.block(i, x, emb, given)
        return x, skips


class TextUNet(Contracting):
    """The whole network; see `text_unet`."""

    def __init__(self, rngs: nnx.Rngs, n_out: int, p: Plan, o: Options):
        super().__init__(rngs, p, o)
        n, skips = p.widths[-1], skip_widths(p)
        self.up_blocks = nnx.List()
        for i, width in reversed(list(enumerate(p.widths))):
            pairs = [(skips.pop() + (width if j else n), width) for j in range(p.blocks + 1)]
            self.up_blocks.append(make_level(rngs, i, pairs, p, o, up=i > 0))
            n = width
        self.conv_norm_out = GroupNorm(n, o.groups, EPS)
        self.conv_out = Conv(rngs, n, n_out, o, init=layers.zeros)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        self.check(x, t)
        given = conditioning.read(cond, self.plan.kinds, x)
        residuals, given = given.residuals, given._replace(residuals=None)
        emb = self.embed(t, given)
        x, skips = self.contract(self.conv_in(self.beside(x, given)), emb, given)
        if residuals is not None:
            *skips, x = (h + _like(r, h) for h, r in zip((*skips, x), residuals, strict=True))
        for level in self.up_blocks:
            x = self.expand(level, x, emb, given, skips)
        return self.conv_out(self.conv_norm_out(x)).astype(jnp.float32)

    def expand(self, level: Level, x: Array, emb: Array, given: Given, skips: list[Array]) -> Array:
        """One level on the way up, which takes its part from the end of skips."""
        for i in range(len(level.resnets)):
            x = level.block(i, jnp.concatenate([x, skips.pop()], axis=-1), emb, given)
        for resample in level.upsamplers:
            x = resample(x, skips[-1].shape[1:3])
        return x


def make_level(
    rngs: nnx.Rngs, i: int, pairs: Sequence[tuple[int, int]], p: Plan, o: Options, *, down: bool = False,
    up: bool = False,
) -> Level:  # fmt: skip
    """Level i of a plan, on the way down or up, with blocks of these widths."""
    return Level(
        rngs, pairs, p, o, attentions=len(pairs) * p.attends[i], depth=p.depths[i], heads=p.heads[i],
        only_cross=p.only_cross[i], down=down, up=up,
    )  # fmt: skip


def skip_widths(p: Plan) -> list[int]:
    """The channels of what every step on the way down leaves."""
    last = len(p.widths) - 1
    return [p.widths[0], *(width for i, width in enumerate(p.widths) for _ in range(p.blocks + (i < last)))]


def _there(value: Array | None, mask: Array | None, shape: tuple[int, int]) -> Array:
    """The value, zero where it is absent."""
    if value is None:
        return jnp.zeros(shape, jnp.float32)
    return value if mask is None else value * bcast(mask.astype(value.dtype), value)


def _like(residual: Array, h: Array) -> Array:
    if residual.shape != h.shape:
        raise ValueError(f"a residual must be {list(h.shape)}, got {list(residual.shape)}")
    return residual.astype(h.dtype)
