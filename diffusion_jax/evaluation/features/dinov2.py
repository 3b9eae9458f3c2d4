"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193), ViT-L/14, in whose features FD-DINOv2 is measured.

A vision transformer over patches of 14 pixels, with layer normalization N (e = 10^-6) and learned scales l, l':

    x <- x + l attention(N x),   x <- x + l' W2 gelu(W1 N x + b1)                                                  (1)
    pooled = N x_0, the token before the patches                                                     f32[b, 1024]  (2)

The places were learned on 37 x 37 patches; for 16 x 16 they are interpolated, bicubic by (1) of `resize`, with

    s = 37 / (16 + 0.1)      the published code, whose features FD-DINOv2 takes                                    (3)
    s = 37 / 16              transformers                                                                          (4)

which is not the same. The protocol of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675) is 224 x 224 pixels, whatever the
shape was, and ImageNet's mean and deviation, after one of

    "pillow"  Pillow's bicubic, rounded to bytes                 their code, dgm-eval
    "torch"   bicubic with antialias, not rounded, not clipped   EDM2 (Karras et al. 2024, arXiv:2312.02696)
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.evaluation.features import net
from diffusion_jax.evaluation.features.resize import matrix, pillow, resize
from diffusion_jax.nets import clip, layers
from diffusion_jax.nets.attention import attention
from diffusion_jax.nets.functional import functional
from diffusion_jax.typing import Array, Cond, InputError, Key, Net, Params
from diffusion_jax.weights.dinov2 import from_published

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE, PUBLISHED, TRANSFORMERS = 224, 0.1, 0.0
"""Pixels, and what (3) and (4) add to the number of patches."""
Resize = Literal["pillow", "torch"]


def dinov2_vitl14(how: Resize = "pillow", *, precision: str = "highest") -> net.FeatureNet:
    """DINOv2 ViT-L/14 by the protocol above, with places (3). precision: as `jax.default_matmul_precision`.

    load reads `dinov2_vitl14_pretrain.pth`, or transformers' `facebook/dinov2-large`. InputError for another resize.
    """
    return dinov2_features("dinov2_vitl14", dinov2_net(), SIZE, how, precision)


def dinov2_features(name: str, graph: Net, size: int, how: Resize, precision: str = "highest") -> net.FeatureNet:
    """The feature network of any `dinov2_net`, on pictures of this size."""
    if how not in get_args(Resize):
        raise InputError(f"dinov2_vitl14: {how!r} is none of {', '.join(get_args(Resize))}")
    told = {"pillow": f"{size} pillow bicubic", "torch": f"{size} bicubic_antialias"}[how]

    def prepare(images: np.ndarray) -> np.ndarray:
        images = net.pictures(images)
        return pillow(images, (size, size), "bicubic") if how == "pillow" else images

    def apply(params: Params, images: Array) -> net.Features:
        net.check_traced(images)
        x = resize(images.astype(jnp.float32), (size, size), "bicubic_antialias")
        with jax.default_matmul_precision(precision):
            return {"pooled": graph.apply(params, net.normalised(x, MEAN, DEVIATION), jnp.zeros(()))}

    load = net.loader(name, graph.init, from_published)
    return net.FeatureNet(net.named(name, precision), told, graph.init, prepare, apply, load)


def dinov2_net(
    *, learned: int = 37, patch: int = 14, width: int = 1024, depth: int = 24, heads: int = 16, mlp: int = 4096,
    extra: float = PUBLISHED,
) -> Net:  # fmt: skip
    """The network: apply(params, x: f32[b, h, w, 3], t) -> f32[b, width], h and w multiples of the patch; t is unused.

    learned: patches a side that there are places for. extra: 0.1 for (3), 0 for (4).
    """
    return functional(lambda rngs: Dinov2(rngs, learned, patch, width, depth, heads, mlp, extra))


class Projection(nnx.Module):
    """The linear map of patches, with its bias."""

    def __init__(self, rngs: nnx.Rngs, patch: int, width: int):
        self.kernel = nnx.Param(layers.xavier(rngs, (patch, patch, 3, width)))
        self.bias = nnx.Param(jnp.zeros((width,)))


class PatchEmbeddings(nnx.Module):
    """`[b, h, w, 3] -> [b, n, width]`."""

    def __init__(self, rngs: nnx.Rngs, patch: int, width: int):
        self.projection = Projection(rngs, patch, width)

    def __call__(self, x: Array) -> Array:
        return clip.patchify(x, self.projection.kernel[...]) + self.projection.bias[...][None, None, :]


class Embeddings(nnx.Module):
    """Tokens with their places, interpolated by (3) or (4)."""

    def __init__(self, rngs: nnx.Rngs, learned: int, patch: int, width: int, extra: float):
        def vectors(n: int) -> nnx.Param[Array]:
            return nnx.Param(rngs.uniform((1, n, width), jnp.float32, minval=-0.03, maxval=0.03))

        self.cls_token, self.position_embeddings = vectors(1), vectors(learned**2 + 1)
        self.patch_embeddings = PatchEmbeddings(rngs, patch, width)
        self.learned, self.patch, self.extra = learned, patch, extra

    def __call__(self, x: Array) -> Array:
        h, w = x.shape[1] // self.patch, x.shape[2] // self.patch
        tokens = self.patch_embeddings(x)
        first = jnp.broadcast_to(self.cls_token[...], (x.shape[0], 1, tokens.shape[2]))
        return jnp.concatenate([first, tokens], axis=1) + self.places(h, w)

    def places(self, h: int, w: int) -> Array:
        """P for h x w patches: f32[1, 1 + h w, width]."""
        n, p = self.learned, self.position_embeddings[...]
        if h == w == n:
            return p
        grid = jnp.reshape(p[0, 1:], (n, n, -1))
        a, b = (jnp.asarray(matrix(n, m, "bicubic", n / (m + self.extra)), jnp.float32) for m in (h, w))
        between = jnp.einsum("hi,wj,ijn->hwn", a, b, grid, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([p[:, :1], jnp.reshape(between, (1, h * w, -1))], axis=1)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int):
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            layers.Linear(rngs, width, width, jnp.float32) for _ in range(4)
        )
        self.heads = heads

    def __call__(self, x: Array) -> Array:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (jnp.reshape(z, shape) for z in layers.joint(x, self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(jnp.reshape(attention(q, k, v), x.shape))


class LayerScale(nnx.Module):
    """l x."""

    def __init__(self, width: int):
        self.lambda1 = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: Array) -> Array:
        return x * self.lambda1[...][None, None, :]


class Layer(nnx.Module):
    """Equation (1)."""

    def __init__(self, rngs: nnx.Rngs, width: int, heads: int, mlp: int):
        self.norm1, self.norm2 = clip.LayerNorm(width, 1e-6), clip.LayerNorm(width, 1e-6)
        self.attention = Attention(rngs, width, heads)
        self.layer_scale1, self.layer_scale2 = LayerScale(width), LayerScale(width)
        self.mlp = clip.Mlp(rngs, width, mlp, gelu, jnp.float32)

    def __call__(self, x: Array) -> Array:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nnx.Module):
    """Layers one after the other."""

    def __init__(self, rngs: nnx.Rngs, width: int, depth: int, heads: int, mlp: int):
        self.layer = nnx.List([Layer(rngs, width, heads, mlp) for _ in range(depth)])

    def __call__(self, x: Array) -> Array:
        for layer in self.layer:
            x = layer(x)
        return x


class Dinov2(nnx.Module):
    """Equations (1)-(4)."""

    def __init__(
        self, rngs: nnx.Rngs, learned: int, patch: int, width: int, depth: int, heads: int, mlp: int, extra: float
    ):
        self.embeddings = Embeddings(rngs, learned, patch, width, extra)
        self.encoder = Encoder(rngs, width, depth, heads, mlp)
        self.layernorm = clip.LayerNorm(width, 1e-6)
        self.patch = patch

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        if x.ndim != 4 or x.shape[3] != 3 or x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"pictures [b, h, w, 3] of whole patches of {self.patch} pixels, got {list(x.shape)}")
        return self.layernorm(self.encoder(self.embeddings(x))[:, 0])


def gelu(x: Array) -> Array:
    """x Phi(x), exactly."""
    return jax.nn.gelu(x, approximate=False)
