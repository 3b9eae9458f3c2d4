"""Where images come from: `digits`, `tfds_images`, `image_folder` and `imagenet`, each giving a `Data`; and `noto`.

Compressed images are decoded once into uint8 arrays on disk and memory-mapped from then on; what would take more
than `cache_bytes` is decoded whenever it is read. A cache is written under a temporary name and renamed when it
is whole, and its name is a digest of what it was made from, so that neither half a cache nor an old one is read.
Labels of unlabelled images are 0.
"""

from __future__ import annotations

import numpy as np

from diffusion_jax.training.data import Data
from diffusion_jax.training.sources.cache import CACHE_BYTES as CACHE_BYTES
from diffusion_jax.training.sources.decoding import read_image as read_image
from diffusion_jax.training.sources.folders import SUFFIXES as SUFFIXES
from diffusion_jax.training.sources.folders import folder_classes as folder_classes
from diffusion_jax.training.sources.folders import image_folder as image_folder
from diffusion_jax.training.sources.ilsvrc import imagenet as imagenet
from diffusion_jax.training.sources.noto import captioned_emoji as captioned_emoji
from diffusion_jax.training.sources.noto import noto as noto
from diffusion_jax.training.sources.tfds import DEBIAN_FASHION_MNIST as DEBIAN_FASHION_MNIST
from diffusion_jax.training.sources.tfds import tfds_images as tfds_images


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8x1, always the same stratified fifth of them held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    split = [{"image": images[i], "label": labels[i]} for i in (np.sort(train), np.sort(test))]
    return Data(split[0], split[1], tuple(str(d) for d in range(10)), (8, 8, 1))
