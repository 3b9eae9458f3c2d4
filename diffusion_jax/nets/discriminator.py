"""The patch discriminator: for each patch of a picture, how real it looks (Isola et al. 2017, arXiv:1611.07004, 3.2.2).

Convolutions K of 4 x 4, the first `depth` of which halve the size, group normalization GN, and f(h) = max(h, h / 5):

    h_1 = f(K_1 x),   h_i = f(GN(K_i h_(i-1))),   i = 2 .. depth + 1,   logits = K h_(depth+1)                    (1)

The paper normalizes over the batch; groups keep each example's judgement its own, whatever the batch and the mesh.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.nets.layers import Conv, GroupNorm, Options
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params


class Judgement(NamedTuple):
    """logits: f32[b, h', w'], of each patch, high for real; features: h_1, h_2, ... of equation (1)."""

    logits: Array
    features: tuple[Array, ...]


def patch_discriminator(
    channels: int = 3, *, width: int = 64, depth: int = 3, dtype: layers.DType = jnp.float32
) -> Net:  # fmt: skip
    """Equation (1): apply(params, x: f32[b, h, w, channels], t) -> `Judgement`; t is not used.

    The widths are `width` times 1, 2, 4, 8, 8, ...; h and w are divisible by 2^depth. InputError for a width that is no
    multiple of 4, or a depth below 1.
    """
    if width % 4 or width < 4 or depth < 1:
        raise InputError(f"patch_discriminator: width={width} must be a multiple of 4, depth={depth} at least 1")
    return functional(lambda rngs: _Discriminator(rngs, channels, width, depth, dtype))


def hinge(real: Array, fake: Array) -> Array:
    """What the discriminator lessens: E max(0, 1 - D(x)) + E max(0, 1 + D(x^)), halved, f32[].

    Source: Lim & Ye 2017, arXiv:1705.02894, eq. 3, as in Esser et al. 2021, arXiv:2012.09841.
    """
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def feature_distance(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    """The mean over layers of E (a_i - b_i)^2 / E b_i^2, f32[]: how far two pictures are apart in learned features.

    Larsen et al. 2016, arXiv:1512.09300, eq. 7, take one layer of a discriminator; here all of them, each measured
    against the size of its features.
    """
    ratios = [jnp.mean((x - y) ** 2) / (jnp.mean(y**2) + 1e-6) for x, y in zip(a, b, strict=True)]
    return sum(ratios[1:], ratios[0]) / len(ratios)


def freeze(params: Params) -> Params:
    """The same numbers, through which no gradient flows."""
    return jax.tree.map(jax.lax.stop_gradient, params)


class _Discriminator(nnx.Module):
    """Equation (1)."""

    def __init__(self, rngs: nnx.Rngs, channels: int, width: int, depth: int, dtype: layers.DType):
        o = Options(max(1, width // 8), 1, 0.0, dtype)
        widths = [width * min(8, 2**i) for i in range(depth + 1)]
        pairs = list(zip([channels, *widths], widths, strict=False))
        self.convs = nnx.List(
            [Conv(rngs, a, b, o, width=4, stride=2 if i < depth else 1) for i, (a, b) in enumerate(pairs)]
        )
        self.norms = nnx.List([GroupNorm(n, o.groups, 1e-5) for n in widths[1:]])
        self.out = Conv(rngs, widths[-1], 1, o, width=4)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Judgement:
        features = []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            x = jax.nn.leaky_relu(self.norms[i - 1](x, act=False) if i else x, 0.2)
            features.append(x.astype(jnp.float32))
        return Judgement(self.out(x).astype(jnp.float32)[..., 0], tuple(features))
