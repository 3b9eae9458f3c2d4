"""Feature networks by name, with the files that their weights are published in.

A file is the user's to get: where it is published, and how its sha256 begins where that is on record, is told when it
is missing. Two networks need none: the frozen classifier of Fashion-MNIST, whose weights ship with the package, and

    pooled = x / 255, flattened                                                   f32[b, h w c]      "pixels"      (1)

in which distances are honest numbers, if blunt ones, of small pictures. Pictures of one channel are repeated three
times for networks that take colour; the resize of their protocol then says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.evaluation.features import fashion_mnist, net
from diffusion_jax.evaluation.features.clip import clip_image
from diffusion_jax.evaluation.features.dinov2 import dinov2_vitl14
from diffusion_jax.evaluation.features.inception import inception_v3
from diffusion_jax.evaluation.results import sha256
from diffusion_jax.typing import Array, InputError, Key, Params

INCEPTION = (
    "pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid (release fid_weights), or "
    "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity (release v0.2.0)"
)
DINOV2 = "dinov2_vitl14_pretrain.pth of github.com/facebookresearch/dinov2, or model.safetensors of its dinov2-large"
CLIP_336 = "model.safetensors or pytorch_model.bin of openai/clip-vit-large-patch14-336 on huggingface.co"
CLIP_224 = "model.safetensors or pytorch_model.bin of openai/clip-vit-large-patch14 on huggingface.co"


class Known(NamedTuple):
    """An entry of the table.

    make: (precision of its arithmetic) -> the network. file: which file it reads and where that is published, "" if it
    needs none. colour: it takes three channels. own: the path of weights that ship with the package.
    """

    make: Callable[[str], net.FeatureNet]
    file: str = ""
    colour: bool = True
    own: str | os.PathLike[str] = ""


class Opened(NamedTuple):
    """A network with its parameters, the sha256 of their file, and a sentence about that file."""

    net: net.FeatureNet
    params: Params
    sha256: str
    said: str


def pixels() -> net.FeatureNet:
    """Equation (1), of pictures of any shape; its parameters are an empty dict."""

    def prepare(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
            raise InputError(f"pictures are u8[b, h, w, c], these are {images.dtype}{list(images.shape)}")
        return images

    def apply(params: Params, images: Array) -> net.Features:
        return {"pooled": jnp.reshape(images, (len(images), -1)).astype(jnp.float32) / 255}

    def init(key: Key) -> Params:
        return {}

    def load(path: str | os.PathLike[str]) -> net.Loaded:
        return net.Loaded({}, sha256({}))

    return net.FeatureNet("pixels", "none", init, prepare, apply, load)


def networks() -> dict[str, Known]:
    """All networks by name; that of Fashion-MNIST only where its weights are."""
    table = {
        "inception": Known(lambda precision: inception_v3("tensorflow", precision=precision), INCEPTION),
        "inception_pytorch_fid": Known(lambda precision: inception_v3("pytorch_fid", precision=precision), INCEPTION),
        "dinov2": Known(lambda precision: dinov2_vitl14("pillow", precision=precision), DINOV2),
        "dinov2_torch": Known(lambda precision: dinov2_vitl14("torch", precision=precision), DINOV2),
        "clip": Known(lambda precision: clip_image("cmmd", precision=precision), CLIP_336),
        "clip_openai": Known(lambda precision: clip_image("openai", size=224, precision=precision), CLIP_224),
        "pixels": Known(lambda precision: pixels(), colour=False),
    }
    return table | _fashion_mnist()


def open_features(name: str, weights: str = "", channels: int = 3, precision: str = "highest") -> Opened:
    """The network `name` for pictures of so many channels, with the weights of a file.

    InputError for an unknown name, a missing or another network's file, and channels that the network does not take.
    """
    table = networks()
    if name not in table:
        raise InputError(f"features={name}: there are {', '.join(table)}")
    entry = table[name]
    made = entry.make(precision)
    if entry.file and not weights:
        begins = f"its sha256 begins with {made.published}" if made.published else "its sha256 is not on record here"
        raise InputError(f"features={name} needs weights=FILE: {entry.file}; {begins}. features=pixels needs no file")
    params, digest = made.load(weights or entry.own)
    where = f"weights {weights or 'of the package'}, sha256 {digest}" if entry.file or entry.own else "no weights"
    shown = f"{made.name}: {where}{_published(made, digest, weights)}"
    return Opened(_for_channels(made, channels) if entry.colour else made, params, digest, shown)


def _published(made: net.FeatureNet, digest: str, weights: str) -> str:
    if not weights or not made.published:
        return ""
    if digest.startswith(made.published):
        return ", the published file"
    return f", NOT the published file, whose sha256 begins with {made.published}: only numbers of equal hash compare"


def _for_channels(made: net.FeatureNet, channels: int) -> net.FeatureNet:
    """The network with grey pictures repeated three times before it."""
    if channels == 3:
        return made
    if channels != 1:
        raise InputError(f"{made.name} takes pictures of 1 or 3 channels, these have {channels}")

    def prepare(images: np.ndarray) -> np.ndarray:
        return made.prepare(np.repeat(images, 3, axis=3) if np.shape(images)[3:] == (1,) else images)

    return made._replace(prepare=prepare, resize=f"{made.resize}, grey three times")


def _fashion_mnist() -> dict[str, Known]:
    if not fashion_mnist.WEIGHTS.is_file():
        return {}
    made = fashion_mnist.fashion_mnist()
    return {"fashion_mnist": Known(lambda precision: made, colour=False, own=fashion_mnist.WEIGHTS)}
