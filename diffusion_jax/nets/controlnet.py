"""ControlNet: a copy of a U-Net's way down that sees a picture and adds to the features (Zhang et al. 2023).

With the embedding e, the way down and the middle of `text_unet`, g convolutions with SiLU between that make the picture
c (edges, depths, a pose, as large as what the latent stands for) as small as the latent, and 1x1 convolutions Z_i that
start at zero,

    h_0 = C x + g(c),   h_1, ..., h_n = what the steps of the way down and the middle give,   e as there         (1)
    r_i = scale Z_i h_i                                                                                          (2)

and the U-Net adds r_0 .. r_{n-1} to what its own way down leaves and r_n to what its middle gives: at first nothing
(arXiv:2302.05543, section 3.1 and eq. 2). Attribute names are those of diffusers' ControlNetModel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from diffusion_jax.nets import conditioning, layers
from diffusion_jax.nets.conditioning import Kinds
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, Options
from diffusion_jax.nets.text_unet import Contracting, Plan, plan, skip_widths
from diffusion_jax.ops import bcast
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params


def controlnet(
    *,
    n_in: int = 4,
    picture: int = 3,
    hints: Sequence[int] = (16, 32, 96, 256),
    widths: Sequence[int] = (320, 640, 1280, 1280),
    blocks: int = 2,
    attends: Sequence[bool] = (True, True, True, False),
    depths: int | Sequence[int] = 1,
    middle: int | None = None,
    heads: int | Sequence[int] = 8,
    groups: int | None = None,
    tokens: int | None = 768,
    linear_projection: bool = False,
    vector: int | None = None,
    sizes: int | None = None,
    remat: layers.Remat = "none",
    dtype: layers.DType = jnp.float32,
) -> Net:
    """The ControlNet of a `text_unet` with the same arguments: apply(params, x, t, cond) -> (r_0, ..., r_n) at scale 1.

    cond: that of the U-Net, with the picture c as its "image": f32[b, f h, f w, picture], usually in [0, 1], where
    f = 2^(len(hints) - 1); it is always there. Give the residuals (2), f32[b, h', w', width] each, to the U-Net as
    cond's "residuals", perhaps `scaled`. hints: widths of g, half the size from each to the next. InputError for
    arguments, ValueError for inputs that do not fit. Source: Zhang et al. 2023, section 3.
    """
    p, options = plan(
        n_in=n_in, widths=widths, blocks=blocks, attends=attends, depths=depths, middle=middle, heads=heads,
        groups=groups, only_cross=False, linear_projection=linear_projection, remat=remat, dtype=dtype,
        kinds=Kinds(vector=vector, tokens=tokens, sizes=sizes),
    )  # fmt: skip
    if not hints or min(*hints, picture) < 1:
        raise InputError(f"hints={tuple(hints)}, picture={picture}: at least one channel each")
    return functional(lambda rngs: Control(rngs, picture, tuple(hints), p, options))


def scaled(residuals: Sequence[Array], scale: ArrayLike) -> tuple[Array, ...]:
    """Equation (2): the residuals of scale 1 at another, f32[] or f32[b]; 0 is no control.

    >>> [r.tolist() for r in scaled([jnp.ones((2, 1))], jnp.asarray([0.5, 2.0]))]
    [[[0.5], [2.0]]]
    """
    w = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), residuals[0].shape[:1])
    return tuple(r * bcast(w, r) for r in residuals)


def sd15_controlnet(*, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The ControlNet of `sd15`: 361,279,120 parameters."""
    return controlnet(remat=remat, dtype=dtype)


def sd2_controlnet(*, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The ControlNet of `sd2`: 364,228,240 parameters."""
    return controlnet(heads=(5, 10, 20, 20), tokens=1024, linear_projection=True, remat=remat, dtype=dtype)


def sdxl_controlnet(*, remat: layers.Remat = "none", dtype: layers.DType = jnp.float32) -> Net:
    """The ControlNet of `sdxl`: 1,251,014,160 parameters."""
    return controlnet(
        widths=(320, 640, 1280), attends=(False, True, True), depths=(1, 2, 10), heads=(5, 10, 20), tokens=2048,
        linear_projection=True, vector=1280, sizes=6, remat=remat, dtype=dtype,
    )  # fmt: skip


def copied(params: Params, unet: Params) -> Params:
    """The parameters with those of a `text_unet` wherever the two networks are the same, which is how training starts.

    Source: Zhang et al. 2023, section 3.1.
    """
    return {name: unet.get(name, own) for name, own in params.items()}


class PictureEmbedding(nnx.Module):
    """g of equation (1): `[b, f h, f w, n_in] -> [b, h, w, n_out]`; its last convolution starts at zero."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, widths: tuple[int, ...], n_out: int, o: Options):
        self.conv_in = Conv(rngs, n_in, widths[0], o)
        convs = [
            conv
            for a, b in pairwise(widths)
            for conv in (Conv(rngs, a, a, o), Conv(rngs, a, b, o, stride=2, padding=1))
        ]
        self.blocks = nnx.List(convs)
        self.conv_out = Conv(rngs, widths[-1], n_out, o, init=layers.zeros)

    def __call__(self, picture: Array) -> Array:
        h = self.conv_in(picture)
        for conv in self.blocks:
            h = conv(jax.nn.silu(h))
        return self.conv_out(jax.nn.silu(h))


class Control(Contracting):
    """The whole network without the scale; see `controlnet`."""

    def __init__(self, rngs: nnx.Rngs, picture: int, hints: tuple[int, ...], p: Plan, o: Options):
        super().__init__(rngs, p, o)
        n, last = p.widths[0], p.widths[-1]
        self.controlnet_cond_embedding = PictureEmbedding(rngs, picture, hints, n, o)
        self.controlnet_down_blocks = nnx.List(
            [Conv(rngs, width, width, o, width=1, init=layers.zeros) for width in skip_widths(p)]
        )
        self.controlnet_mid_block = Conv(rngs, last, last, o, width=1, init=layers.zeros)
        self.factor, self.channels = 2 ** (len(hints) - 1), picture

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> tuple[Array, ...]:
        self.check(x, t)
        picture, others = self.picture(x, cond)
        given = conditioning.read(others, self.plan.kinds, x)
        h = self.conv_in(x) + self.controlnet_cond_embedding(picture)
        middle, skips = self.contract(h, self.embed(t, given), given)
        ends = (*zip(self.controlnet_down_blocks, skips, strict=True), (self.controlnet_mid_block, middle))
        return tuple(conv(h).astype(jnp.float32) for conv, h in ends)

    def picture(self, x: Array, cond: Cond) -> tuple[Array, Cond]:
        """The picture, and the rest of the condition. ValueError without a picture, or for one of another shape."""
        b, h, w = x.shape[:3]
        wanted = (b, self.factor * h, self.factor * w, self.channels)
        value = cond.get("image") if isinstance(cond, Mapping) else None
        if value is None or value.shape != wanted or not jnp.issubdtype(value.dtype, np.floating):
            got = "none" if value is None else f"{value.dtype}{list(value.shape)}"
            raise ValueError(f"a ControlNet needs an image: float{list(wanted)}, got {got}")
        return value, {name: part for name, part in cond.items() if name != "image"}
