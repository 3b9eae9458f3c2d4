"""ADM, the ablated diffusion model, and its classifier of noised images (Dhariwal & Nichol 2021, arXiv:2105.05233,
section 3, with the learned variance of Nichol & Dhariwal 2021, arXiv:2102.09672).

With e = silu(W2 silu(W1 features(t)) + label row + vector), GN group normalization, R a resampling by 2 (mean of
neighbours or repetition; nothing where the size stays), every 3x3 convolution written C, and (scale, shift) = W e:

    block(h) = S R h + C2 dropout(silu((1 + scale) GN(C1 R silu(GN(h))) + shift))   S: 1x1 where the width changes  (1)
    attention(h) = h + W_o softmax(q k^T / sqrt(d)) v,   (q, k, v) = W GN(h)   over all pixels                      (2)
    features(t) = [cos(t f_0), cos(t f_1), ..., sin(t f_0), ...],   f_i = 10000^(-2 i / channels)                   (3)

`input_blocks`: a convolution, then at each level `blocks` times (1) [and (2)], and a block (1) that halves the size.
`middle_block`: (1), (2), (1). `output_blocks`: at each level `blocks + 1` times (1) on the concatenation with what the
way down left [and (2)], the last followed by a block (1) that doubles the size. Output: C silu(GN(h)), of twice the
channels: the noise, and the place of the log variance between its bounds. C2, W_o and the output start at zero.

The classifier is the way down and the middle, then silu(GN(h)) and a pooling by attention, with the pixels z_1 .. z_n
and their mean z_0, and learned places p_i (section 4; the pooling is that of Radford et al. 2021, arXiv:2103.00020):

    logits = W_c softmax(q_0 k^T / sqrt(d)) v,   (q, k, v)_i = W (z_i + p_i),   i = 0 .. n                          (4)

Attribute names are those of the published checkpoints wherever these have names and not numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import conditioning, layers, resample
from diffusion_jax.nets.conditioning import Given, Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Linear, Options
from diffusion_jax.nets.ncsnpp import check_choice
from diffusion_jax.nets.unet import attention_levels, check_input, check_widths
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params

EPS = 1e-5
"""In the root of every normalization."""


class Plan(NamedTuple):
    """The shape of one network."""

    channels: int
    widths: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    head_channels: int | None
    remat: layers.Remat


def adm(
    shape: Sequence[int],
    *,
    channels: int = 256,
    multipliers: Sequence[float] = (1, 1, 2, 2, 4, 4),
    blocks: int = 2,
    attention: Sequence[int] = (32, 16, 8),
    heads: int | None = None,
    head_channels: int = 64,
    groups: int | None = None,
    dropout: float = 0.0,
    classes: int | None = None,
    vector: int | None = None,
    image: int | None = None,
    out_channels: int | None = None,
    learned_variance: bool = True,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """ADM for images `shape = (h, w, c)`: `(x: [b h w c], t: [b], cond) -> f32[b h w out_channels]`.

    t: the network's own time, the number of the step in 0 .. 999 for the paper's models.
    multipliers: of `channels`, a level each; fractions are rounded down. attention: as in `unet`; the middle always
    attends. heads: how many, or None for as many as there are head_channels in the width.
    cond: labels int32[b] in [0, classes], where `classes` means none and adds nothing to e, or a dict of what the
    network takes: "label", "vector" of `vector` numbers, "image": f32[b h' w' image], which is concatenated to x after
    linear enlargement if it is smaller, as in the paper's upsamplers (section 4.4). What is left out, or the whole if
    it is None, is absent; see `conditioning`.
    learned_variance doubles out_channels (c by default), and the caller splits the last axis in two.
    groups: of every normalization; by default min(32, channels / 4), the paper's 32 from 128 channels on.
    remat: what the backward pass keeps of each block with its attention; see `layers.remat`.
    The defaults, on (256, 256, 3) with 1,000 classes, are the paper's. Raises InputError if the arguments do not fit
    together. Source: Dhariwal & Nichol 2021, section 3 and table 11, equations (1)-(3).
    """
    plan, options = _plan(
        shape, channels, multipliers, blocks, attention, heads, head_channels, groups, dropout, remat, dtype
    )
    kinds = Kinds(classes=classes, vector=vector, image=image)
    conditioning.check_kinds(kinds)
    outputs = (out_channels or shape[-1]) * (2 if learned_variance else 1)
    return functional(lambda rngs: ADM(rngs, shape[-1], outputs, kinds, plan, options))


def adm_classifier(
    shape: Sequence[int],
    *,
    classes: int,
    channels: int = 128,
    multipliers: Sequence[float] = (1, 1, 2, 2, 4, 4),
    blocks: int = 2,
    attention: Sequence[int] = (32, 16, 8),
    heads: int | None = None,
    head_channels: int = 64,
    groups: int | None = None,
    dropout: float = 0.0,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The classifier of noised images: `(x: [b h w c], t: [b]) -> f32[b classes]`, unnormalized log probabilities.

    The arguments and t are those of `adm`; images have exactly the height and width of `shape`. It takes no condition.
    `log_prob` makes of it what `guidance.classifier` needs. Raises InputError if the arguments do not fit together.
    Source: Dhariwal & Nichol 2021, section 4 and table 12, equations (1)-(4).
    """
    plan, options = _plan(
        shape, channels, multipliers, blocks, attention, heads, head_channels, groups, dropout, remat, dtype
    )
    if classes < 1:
        raise InputError(f"classes={classes}: a classifier needs at least one")
    return functional(lambda rngs: Classifier(rngs, tuple(shape), classes, plan, options))


def log_prob(
    classifier: Net, params: Params, time: Callable[[Array], Array] = lambda t: t
) -> Callable[[Array, Array, Cond], Array]:
    """`(x: f32[b *d], t: f32[b], cond) -> f32[b]`, log p_t(label | x), for `guidance.classifier`.

    time: from the schedule's time to the classifier's. cond: the labels int[b], or a dict with "label"; an example
    without a label, which is the number of classes, has log probability 0 and is not guided.
    """

    def of_label(x: Array, t: Array, cond: Cond = None) -> Array:
        labels = cond["label"] if isinstance(cond, dict) else cond
        if labels is None or labels.shape != t.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"log_prob: labels must be int[{t.shape[0]}], got {labels}")
        log_p = jax.nn.log_softmax(classifier.apply(params, x, time(t)), axis=-1)
        padded = jnp.concatenate([log_p, jnp.zeros_like(log_p[:, :1])], axis=-1)
        return jnp.take_along_axis(padded, labels[:, None], axis=-1, mode="clip")[:, 0]

    return of_label


LEVELS: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


def adm_imagenet(
    size: int, *, classes: int | None = 1000, dropout: float | None = None, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """The paper's networks for ImageNet at 64, 128, 256 and 512 pixels: 296M, 422M, 554M and 559M parameters.

    classes=None at 256 is also its network for LSUN, then with dropout 0.1. dropout: by default the paper's, 0.1 at 64
    and otherwise none. InputError for another size. Source: Dhariwal & Nichol 2021, table 11.
    """
    multipliers = _known(size, LEVELS)
    rate = dropout if dropout is not None else 0.1 if size == 64 else 0.0
    return adm(
        (size, size, 3), channels=192 if size == 64 else 256, multipliers=multipliers, blocks=3 if size == 64 else 2,
        heads=4 if size == 128 else None, dropout=rate, classes=classes, remat=remat, dtype=dtype,
    )  # fmt: skip


def adm_upsampler(
    size: int, *, classes: int | None = 1000, dropout: float = 0.0, remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:  # fmt: skip
    """The paper's upsamplers for ImageNet, 64 -> 256 and 128 -> 512 pixels: 312M and 309M parameters.

    cond: {"image": f32[b s s 3], "label": int[b]} with the small image. InputError unless size is 256 or 512.
    Source: Dhariwal & Nichol 2021, table 11 and section 4.4.
    """
    attention, heads = _known(size, {256: ((32, 16, 8), 4), 512: ((32, 16), None)})
    return adm(
        (size, size, 3), channels=192, attention=attention, heads=heads, dropout=dropout, classes=classes, image=3,
        remat=remat, dtype=dtype,
    )  # fmt: skip


def adm_classifier_imagenet(
    size: int, *, classes: int = 1000, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32
) -> Net:
    """The paper's classifiers of noised ImageNet at 64, 128, 256 and 512 pixels: 65M, 43M, 54M and 54M parameters.

    InputError for another size. Source: Dhariwal & Nichol 2021, table 12.
    """
    multipliers = _known(size, LEVELS)
    return adm_classifier(
        (size, size, 3), classes=classes, multipliers=multipliers, blocks=4 if size == 64 else 2, remat=remat,
        dtype=dtype,
    )  # fmt: skip


def _known(size: int, presets: dict[int, Any]) -> Any:
    if size not in presets:
        raise InputError(f"there is no such network for {size} pixels, only for {', '.join(map(str, presets))}")
    return presets[size]


def _plan(
    shape: Sequence[int], channels: int, multipliers: Sequence[float], blocks: int, attention: Sequence[int],
    heads: int | None, head_channels: int, groups: int | None, dropout: float, remat: layers.Remat,
    dtype: layers.DType,
) -> tuple[Plan, Options]:  # fmt: skip
    """The plan and options of a network. Raises InputError if the arguments do not fit together."""
    check_choice("remat", remat, layers.Remat)
    if head_channels < 1 or (heads is not None and heads < 1):
        raise InputError(f"heads={heads} and head_channels={head_channels} must be positive")
    widths = tuple(int(channels * m) for m in multipliers)
    options = Options(groups or layers.default_groups(min(widths, default=channels)), 1, dropout, dtype)
    attends = attention_levels(shape, widths, attention)
    check_widths(channels, widths, blocks, options)
    for width in widths:
        if width % options.groups:
            raise InputError(f"a level of width {width} is not divisible by groups={options.groups}")
    attending = [*(width for width, attend in zip(widths, attends, strict=True) if attend), widths[-1]]
    for width in attending:
        if width % (heads or head_channels):
            unit = f"heads={heads}" if heads else f"head_channels={head_channels}"
            raise InputError(f"attention of width {width} is not divisible by {unit}")
    return Plan(channels, widths, blocks, attends, None if heads else head_channels, remat), options._replace(
        heads=heads or 1
    )


def time_features(t: Array, n: int) -> Array:
    """Equation (3): `t: [b] -> f32[b, n]`, n even."""
    rates = jnp.exp(jnp.arange(n // 2, dtype=jnp.float32) * (-2 * math.log(10000.0) / n))
    angles = t.astype(jnp.float32)[:, None] * rates[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedding(nnx.Module):
    """A row for each class; no label, index `classes` or None, adds zero. `int[b] -> [b, n_out]`."""

    def __init__(self, rngs: nnx.Rngs, classes: int, n_out: int, dtype: layers.DType):
        limit = math.sqrt(3)
        self.embedding = nnx.Param(rngs.uniform((classes, n_out), jnp.float32, minval=-limit, maxval=limit))
        self.dtype = dtype

    def __call__(self, labels: Array | None, batch: int) -> Array:
        table = self.embedding[...].astype(self.dtype)
        if labels is None:
            return jnp.zeros((batch, table.shape[1]), self.dtype)
        rows = jnp.take(table, labels, axis=0, mode="clip")
        return jnp.where((labels < table.shape[0])[:, None], rows, jnp.zeros((), self.dtype))


class ResBlock(nnx.Module):
    """Equation (1); `way` is "up", "down" or ""."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, n_emb: int, o: Options, *, way: str = ""):
        self.in_norm = GroupNorm(n_in, o.groups, EPS)
        self.in_conv = Conv(rngs, n_in, n_out, o)
        self.emb_linear = Linear(rngs, n_emb, 2 * n_out, o.dtype)
        self.out_norm = GroupNorm(n_out, o.groups, EPS)
        self.out_conv = Conv(rngs, n_out, n_out, o, init=layers.zeros)
        self.skip_connection = None if n_in == n_out else Conv(rngs, n_in, n_out, o, width=1)
        self.way, self.dropout = way, o.dropout

    def __call__(self, x: Array, emb: Array, noise: Array | None) -> Array:
        resized = {"up": layers.upsample, "down": layers.average_pool, "": lambda z: z}[self.way]
        h = self.in_conv(resized(self.in_norm(x)), bias=False)
        scale, shift = jnp.split(self.emb_linear(emb), 2, axis=-1)
        h = self.out_norm(h, offset=self.in_conv.bias[...], modulation=(scale, shift))
        h = self.out_conv(layers.dropout(h, self.dropout, noise))
        x = resized(x)
        return h + (x if self.skip_connection is None else self.skip_connection(x))


class AttentionBlock(nnx.Module):
    """Equation (2); the channels of qkv are all of q, then all of k, then all of v, each head by head."""

    def __init__(self, rngs: nnx.Rngs, n: int, heads: int, o: Options):
        self.norm = GroupNorm(n, o.groups, EPS)
        self.qkv = Linear(rngs, n, 3 * n, o.dtype)
        self.proj_out = Linear(rngs, n, n, o.dtype, layers.zeros)
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        q, k, v = jnp.split(self.qkv(self.norm(x, act=False)), 3, axis=-1)
        return x + self.proj_out(layers.attend(q, k, v, self.heads))


class AttentionPool(nnx.Module):
    """Equation (4): `[b, *pixels, n] -> [b, classes]`."""

    def __init__(self, rngs: nnx.Rngs, pixels: int, n: int, classes: int, heads: int, o: Options):
        limit = math.sqrt(3 / n)
        self.positional_embedding = nnx.Param(rngs.uniform((pixels + 1, n), jnp.float32, minval=-limit, maxval=limit))
        self.qkv_proj = Linear(rngs, n, 3 * n, o.dtype)
        self.c_proj = Linear(rngs, n, classes, o.dtype)
        self.heads, self.dtype = heads, o.dtype

    def __call__(self, x: Array) -> Array:
        z = jnp.reshape(x, (x.shape[0], -1, x.shape[-1]))
        mean = jnp.mean(z.astype(jnp.float32), axis=1, keepdims=True).astype(z.dtype)
        z = jnp.concatenate([mean, z], axis=1) + self.positional_embedding[...].astype(z.dtype)[None]
        q, k, v = jnp.split(self.qkv_proj(z), 3, axis=-1)
        return self.c_proj(layers.attend(q[:, :1], k, v, self.heads)[:, 0])


class Trunk(nnx.Module):
    """The way down and the middle, which the network and its classifier share; `input_blocks` lists its stages."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, plan: Plan, o: Options):
        n_emb, n = 4 * plan.channels, plan.widths[0]
        self.time_embed = layers.TimeEmbedding(rngs, plan.channels, n_emb, o.dtype)
        self.input_blocks: nnx.List[Any] = nnx.List([nnx.List([Conv(rngs, n_in, n, o)])])
        skips = [n]
        for i, width in enumerate(plan.widths):
            for _ in range(plan.blocks):
                self.input_blocks.append(self.stage(rngs, n, width, plan, o, attends=plan.attends[i]))
                n = width
                skips.append(n)
            if i < len(plan.widths) - 1:
                self.input_blocks.append(nnx.List([ResBlock(rngs, n, n, n_emb, o, way="down")]))
                skips.append(n)
        self.middle_block = self.stage(rngs, n, n, plan, o, attends=True)
        self.middle_block.append(ResBlock(rngs, n, n, n_emb, o))
        self.n_in, self.plan, self.dropout, self.skips = n_in, plan, o.dropout, tuple(skips)

    @staticmethod
    def stage(
        rngs: nnx.Rngs, n_in: int, n_out: int, plan: Plan, o: Options, *, attends: bool, up: bool = False
    ) -> nnx.List:
        """A block (1), [attention], [a block that doubles the size]."""
        n_emb, heads = 4 * plan.channels, n_out // plan.head_channels if plan.head_channels else o.heads
        parts: list[nnx.Module] = [ResBlock(rngs, n_in, n_out, n_emb, o)]
        if attends:
            parts.append(AttentionBlock(rngs, n_out, heads, o))
        if up:
            parts.append(ResBlock(rngs, n_out, n_out, n_emb, o, way="up"))
        return nnx.List(parts)

    def run(self, stage: nnx.List, x: Array, emb: Array, noise: Iterator[Array | None]) -> Array:
        """The parts of a stage in turn, as one block for rematerialization."""
        drawn = [next(noise) for part in stage if isinstance(part, ResBlock)]

        def whole(x: Array, emb: Array, drawn: list[Array | None]) -> Array:
            rest = iter(drawn)
            for part in stage:
                x = part(x, emb, next(rest)) if isinstance(part, ResBlock) else part(x)
            return x

        return layers.remat(self.plan.remat, whole)(x, emb, drawn)

    def stages(self) -> list[nnx.List]:
        """All stages in the order of computation."""
        return [*self.input_blocks, self.middle_block]

    def noise(self, key: Key | None, x: Array) -> Iterator[Array | None]:
        """The bytes for the dropout of every block (1), in the order of computation."""
        shapes, pixels = [], x.shape[1:-1]
        for block in (part for stage in self.stages() for part in stage if isinstance(part, ResBlock)):
            pixels = tuple({"up": 2 * n, "down": n // 2, "": n}[block.way] for n in pixels)
            shapes.append((*pixels, block.out_conv.bias.shape[0]))
        return iter(layers.dropout_noise(key, self.dropout, x.shape[0], shapes))

    def down(self, x: Array, emb: Array, noise: Iterator[Array | None]) -> tuple[Array, list[Array]]:
        """The way down and the middle: the end, and what each stage of the way down left."""
        skips = []
        for stage in self.input_blocks:
            x = self.run(stage, x, emb, noise)
            skips.append(x)
        return self.run(self.middle_block, x, emb, noise), skips


class ADM(Trunk):
    """The whole network; see `adm`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, kinds: Kinds, plan: Plan, o: Options):
        super().__init__(rngs, n_in + (kinds.image or 0), plan, o)
        self.label_emb = (
            None if kinds.classes is None else LabelEmbedding(rngs, kinds.classes, 4 * plan.channels, o.dtype)
        )
        self.vector_embedding = (
            None if kinds.vector is None
            else conditioning.VectorEmbedding(rngs, kinds.vector, 4 * plan.channels, o.dtype)
        )  # fmt: skip
        self.output_blocks, skips, n = nnx.List(), list(self.skips), plan.widths[-1]
        for i, width in reversed(list(enumerate(plan.widths))):
            for j in range(plan.blocks + 1):
                up = i > 0 and j == plan.blocks
                self.output_blocks.append(
                    self.stage(rngs, n + skips.pop(), width, plan, o, attends=plan.attends[i], up=up)
                )
                n = width
        self.out_norm = GroupNorm(n, o.groups, EPS)
        self.out_conv = Conv(rngs, n, n_out, o, init=layers.zeros)
        self.kinds = kinds

    def stages(self) -> list[nnx.List]:
        return [*super().stages(), *self.output_blocks]

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in - (self.kinds.image or 0), len(self.plan.widths))
        given = conditioning.read(resample.with_enlarged_image(cond, x), self.kinds, x)
        emb, noise = self.embed(t, given), self.noise(key, x)
        x = resample.beside(x, given.image, self.kinds.image) if self.kinds.image else x
        x, skips = self.down(x, emb, noise)
        for stage in self.output_blocks:
            x = self.run(stage, jnp.concatenate([x, skips.pop()], axis=-1), emb, noise)
        return self.out_conv(self.out_norm(x)).astype(jnp.float32)

    def embed(self, t: Array, given: Given) -> Array:
        """e of equation (1), `[b, 4 channels]`."""
        e = self.time_embed(time_features(t, self.plan.channels))
        if self.label_emb is not None:
            e = e + self.label_emb(given.label, t.shape[0])
        if self.vector_embedding is not None and given.vector is not None:
            e = e + self.vector_embedding(given.vector, given.vector_mask)
        return jax.nn.silu(e)


class Classifier(Trunk):
    """The whole classifier; see `adm_classifier`."""

    def __init__(self, rngs: nnx.Rngs, shape: tuple[int, ...], classes: int, plan: Plan, o: Options):
        super().__init__(rngs, shape[-1], plan, o)
        n, factor = plan.widths[-1], 2 ** (len(plan.widths) - 1)
        heads = n // plan.head_channels if plan.head_channels else o.heads
        self.out_norm = GroupNorm(n, o.groups, EPS)
        self.out_pool = AttentionPool(rngs, math.prod(shape[:-1]) // factor**2, n, classes, heads, o)
        self.shape = shape

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        check_input(x, t, self.n_in, len(self.plan.widths))
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must be [b, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        if cond is not None:
            raise ValueError("a classifier takes no condition")
        emb = jax.nn.silu(self.time_embed(time_features(t, self.plan.channels)))
        x, _ = self.down(x, emb, self.noise(key, x))
        return self.out_pool(self.out_norm(x)).astype(jnp.float32)
