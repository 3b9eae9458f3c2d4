"""InceptionV3 as the Frechet Inception distance uses it: the classifier of 2015, with its peculiarities.

The network is that of Szegedy et al. 2016, arXiv:1512.00567, table 1, in the layout of torchvision, every convolution
followed by y = relu(gamma (x - mu) (v + 10^-3)^(-1/2) + beta) with fixed mu, v. Distances are published with the
weights of December 2015, in whose graph (Heusel et al. 2017, arXiv:1706.08500)

    the mean over 3x3 neighbours counts only those inside the picture                                              (1)
    the last block, Mixed_7c, takes their maximum instead of their mean                                            (2)
    the classes are 1008, and the Inception score takes softmax(W h), without the bias                             (3)

    pooled         h, the mean over the last 8x8 pixels                                                  f32[b, 2048]
    spatial        the first 7 channels of the 1x1 branch of Mixed_6d ("mixed_6/conv"), 17x17 pixels    f32[b, 2023]
    probabilities  equation (3)                                                                          f32[b, 1008]

`spatial` is that of sFID (Nash et al. 2021, arXiv:2103.03841, as Dhariwal & Nichol 2021, arXiv:2105.05233, compute it).
Pictures come in by one of

    "tensorflow"   resize "bilinear_tf1", (x - 128) / 128      the graph itself: ADM, EDM, torch-fidelity
    "pytorch_fid"  2 x / 255 - 1, resize "bilinear"            pytorch-fid

which give different distances for the same pictures. Neither filters when it shrinks a picture.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_jax.evaluation.features import net
from diffusion_jax.evaluation.features.resize import resize
from diffusion_jax.nets import layers
from diffusion_jax.nets.functional import functional
from diffusion_jax.typing import Array, Cond, InputError, Key, Params
from diffusion_jax.weights.inception import from_torch

Numerics = Literal["tensorflow", "pytorch_fid"]
SIZE, POOLED, CLASSES, SPATIAL = 299, 2048, 1008, 7
PUBLISHED = "6726825d"
"""How the sha256 of both published files of weights begins; it is part of their names."""


def inception_v3(numerics: Numerics = "tensorflow", *, precision: str = "highest") -> net.FeatureNet:
    """The network above. precision: of matrix products and convolutions, as `jax.default_matmul_precision`.

    load reads `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) and `weights-inception-2015-12-05-6726825d.pth`
    (torch-fidelity), or the same in safetensors. InputError for other numerics.
    """
    if numerics not in get_args(Numerics):
        raise InputError(f"inception_v3: {numerics!r} is none of {', '.join(get_args(Numerics))}")
    graph = functional(InceptionV3)

    def apply(params: Params, images: Array) -> net.Features:
        net.check_traced(images)
        with jax.default_matmul_precision(precision):
            x: Any = graph.apply(params, preprocess(images, numerics), jnp.zeros(()))
        return x

    how = {"tensorflow": "299 bilinear_tf1", "pytorch_fid": "299 bilinear"}[numerics]
    load = net.loader("FID's InceptionV3", graph.init, from_torch)
    name = net.named(f"inception_v3 {numerics}", precision)
    return net.FeatureNet(name, how, graph.init, net.pictures, apply, load, PUBLISHED)


def preprocess(images: Array, numerics: Numerics) -> Array:
    """`u8[b, h, w, 3]` -> `f32[b, 299, 299, 3]` in about [-1, 1]."""
    x = images.astype(jnp.float32)
    if numerics == "tensorflow":
        return (resize(x, (SIZE, SIZE), "bilinear_tf1") - 128) / 128
    return 2 * resize(x / 255, (SIZE, SIZE), "bilinear") - 1


class Kernel(nnx.Module):
    """A convolution without bias; padding "SAME" or "VALID"."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n_out: int, width: layers.PerAxis, stride: int, padding: str):
        self.kernel = nnx.Param(layers.xavier(rngs, (*layers.per_axis(width, 2), n_in, n_out)))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Array) -> Array:
        strides, order = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, self.kernel[...], strides, self.padding, dimension_numbers=order)


class FrozenNorm(nnx.Module):
    """gamma (x - mu) (v + 10^-3)^(-1/2) + beta with a fixed mean and variance."""

    def __init__(self, n: int):
        self.scale, self.bias = nnx.Param(jnp.ones((n,))), nnx.Param(jnp.zeros((n,)))
        self.running_mean, self.running_var = nnx.Param(jnp.zeros((n,))), nnx.Param(jnp.ones((n,)))

    def __call__(self, x: Array) -> Array:
        a = self.scale[...] * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        b = self.bias[...] - self.running_mean[...] * a
        return x * a[None, None, None, :] + b[None, None, None, :]


class BasicConv2d(nnx.Module):
    """Convolution, normalization, relu."""

    def __init__(
        self, rngs: nnx.Rngs, n_in: int, n_out: int, width: layers.PerAxis = 1, stride: int = 1, padding: str = "SAME"
    ):
        self.conv = Kernel(rngs, n_in, n_out, width, stride, padding)
        self.bn = FrozenNorm(n_out)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.bn(self.conv(x)))


class InceptionA(nnx.Module):
    """35x35 pixels, `n_in -> 224 + pool`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, pool: int):
        self.branch1x1 = BasicConv2d(rngs, n_in, 64)
        self.branch5x5_1 = BasicConv2d(rngs, n_in, 48)
        self.branch5x5_2 = BasicConv2d(rngs, 48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(rngs, n_in, 64)
        self.branch3x3dbl_2 = BasicConv2d(rngs, 64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(rngs, 96, 96, 3)
        self.branch_pool = BasicConv2d(rngs, n_in, pool)

    def __call__(self, x: Array) -> Array:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch1x1(x), wide, double, self.branch_pool(mean_of_neighbours(x)))


class InceptionB(nnx.Module):
    """35x35 -> 17x17 pixels, `n_in -> 480 + n_in`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int):
        self.branch3x3 = BasicConv2d(rngs, n_in, 384, 3, 2, "VALID")
        self.branch3x3dbl_1 = BasicConv2d(rngs, n_in, 64)
        self.branch3x3dbl_2 = BasicConv2d(rngs, 64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(rngs, 96, 96, 3, 2, "VALID")

    def __call__(self, x: Array) -> Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return _joined(self.branch3x3(x), double, max_pool(x))


class InceptionC(nnx.Module):
    """17x17 pixels, `n_in -> 768`, through n channels; `first` is the branch of sFID."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, n: int):
        self.branch1x1 = BasicConv2d(rngs, n_in, 192)
        self.branch7x7_1 = BasicConv2d(rngs, n_in, n)
        self.branch7x7_2 = BasicConv2d(rngs, n, n, (1, 7))
        self.branch7x7_3 = BasicConv2d(rngs, n, 192, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(rngs, n_in, n)
        self.branch7x7dbl_2 = BasicConv2d(rngs, n, n, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(rngs, n, n, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(rngs, n, n, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(rngs, n, 192, (1, 7))
        self.branch_pool = BasicConv2d(rngs, n_in, 192)

    def __call__(self, x: Array) -> Array:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return _joined(self.branch1x1(x), single, double, self.branch_pool(mean_of_neighbours(x)))


class InceptionD(nnx.Module):
    """17x17 -> 8x8 pixels, `n_in -> 512 + n_in`."""

    def __init__(self, rngs: nnx.Rngs, n_in: int):
        self.branch3x3_1 = BasicConv2d(rngs, n_in, 192)
        self.branch3x3_2 = BasicConv2d(rngs, 192, 320, 3, 2, "VALID")
        self.branch7x7x3_1 = BasicConv2d(rngs, n_in, 192)
        self.branch7x7x3_2 = BasicConv2d(rngs, 192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(rngs, 192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(rngs, 192, 192, 3, 2, "VALID")

    def __call__(self, x: Array) -> Array:
        wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return _joined(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), max_pool(x))


class InceptionE(nnx.Module):
    """8x8 pixels, `n_in -> 2048`; the last one takes the maximum of neighbours, equation (2)."""

    def __init__(self, rngs: nnx.Rngs, n_in: int, *, maximum: bool):
        self.branch1x1 = BasicConv2d(rngs, n_in, 320)
        self.branch3x3_1 = BasicConv2d(rngs, n_in, 384)
        self.branch3x3_2a = BasicConv2d(rngs, 384, 384, (1, 3))
        self.branch3x3_2b = BasicConv2d(rngs, 384, 384, (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(rngs, n_in, 448)
        self.branch3x3dbl_2 = BasicConv2d(rngs, 448, 384, 3)
        self.branch3x3dbl_3a = BasicConv2d(rngs, 384, 384, (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(rngs, 384, 384, (3, 1))
        self.branch_pool = BasicConv2d(rngs, n_in, 192)
        self.maximum = maximum

    def __call__(self, x: Array) -> Array:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool(x, stride=1, padding="SAME") if self.maximum else mean_of_neighbours(x)
        return _joined(
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled),
        )  # fmt: skip


class InceptionV3(nnx.Module):
    """`f32[b, 299, 299, 3]` -> the three features of the module's head."""

    def __init__(self, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(rngs, 3, 32, 3, 2, "VALID")
        self.Conv2d_2a_3x3 = BasicConv2d(rngs, 32, 32, 3, 1, "VALID")
        self.Conv2d_2b_3x3 = BasicConv2d(rngs, 32, 64, 3)
        self.Conv2d_3b_1x1 = BasicConv2d(rngs, 64, 80)
        self.Conv2d_4a_3x3 = BasicConv2d(rngs, 80, 192, 3, 1, "VALID")
        self.Mixed_5b = InceptionA(rngs, 192, 32)
        self.Mixed_5c = InceptionA(rngs, 256, 64)
        self.Mixed_5d = InceptionA(rngs, 288, 64)
        self.Mixed_6a = InceptionB(rngs, 288)
        self.Mixed_6b = InceptionC(rngs, 768, 128)
        self.Mixed_6c = InceptionC(rngs, 768, 160)
        self.Mixed_6d = InceptionC(rngs, 768, 160)
        self.Mixed_6e = InceptionC(rngs, 768, 192)
        self.Mixed_7a = InceptionD(rngs, 768)
        self.Mixed_7b = InceptionE(rngs, 1280, maximum=False)
        self.Mixed_7c = InceptionE(rngs, 2048, maximum=True)
        self.fc = layers.Linear(rngs, POOLED, CLASSES, jnp.float32)

    def __call__(self, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> net.Features:
        x = max_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        spatial = x[..., :SPATIAL]  # the first of the joined branches is branch1x1
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled = jnp.mean(x, axis=(1, 2))
        logits = jnp.matmul(pooled, self.fc.kernel[...])
        return {
            "pooled": pooled,
            "spatial": jnp.reshape(spatial, (x.shape[0], -1)),
            "probabilities": jax.nn.softmax(logits, axis=-1),
        }


def max_pool(x: Array, *, stride: int = 2, padding: str = "VALID") -> Array:
    """The maximum over 3x3 neighbours of `[b, h, w, c]`."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def mean_of_neighbours(x: Array) -> Array:
    """Equation (1): `[b, h, w, c]` -> the same shape."""
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    along = [np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3]]
    inside = jnp.asarray(np.outer(*along), jnp.float32)
    return total / inside[None, :, :, None]


def _joined(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)
