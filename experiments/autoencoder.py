"""The autoencoder of a latent diffusion model, from scratch (Rombach et al. 2022, arXiv:2112.10752, section 3.1).

    make train EXP=autoencoder ARGS="data=emoji"               the first stage of EXP=emoji
    make train EXP=autoencoder ARGS="data=fashion_mnist"       the first stage of EXP=ldm_fashion_mnist
    make train EXP=autoencoder ARGS="data=folder path=PICTURES size=128"

Pictures become latents of a quarter of their size a side, a little of which is lost to a Gaussian of small variance; a
discriminator sees to it that what comes back is sharp, and its features say what is alike. samples.png shows held-out
pictures with what comes back of them at their right, and the last line of metrics.jsonl the error over held-out ones.
Data: Noto Emoji, which ship with the project; Fashion-MNIST by tensorflow-datasets; or a folder of pictures.
Cost: see docs/latent-diffusion.md.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import euler, rectified, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets.autoencoder import Autoencoder, kl_autoencoder
from diffusion_jax.nets.discriminator import patch_discriminator
from diffusion_jax.nets.vq import VectorAutoencoder, vq_autoencoder
from diffusion_jax.ops import fold, is_batched
from diffusion_jax.systems.autoencoding import (
    Weights,
    absorbed,
    beside_their_originals,
    objective,
    with_discriminator,
)
from diffusion_jax.training import ema
from diffusion_jax.training.data import Data, prepare, take
from diffusion_jax.training.data import size as examples
from diffusion_jax.training.sources import captioned_emoji, image_folder, tfds_images
from diffusion_jax.typing import Array, Cond, InputError, Key, Params

SIZES = {"emoji": 64, "fashion_mnist": 28, "folder": 128}


def network(*, width: int, latent: int, codes: int, channels: int, precision: str) -> Autoencoder:
    """Three levels, so that latents are a quarter of a picture's size; as latent diffusion takes it."""
    made = trained(width=width, latent=latent, codes=codes, channels=channels, precision=precision)
    return made if isinstance(made, Autoencoder) else absorbed(made)


def trained(*, width: int, latent: int, codes: int, channels: int, precision: str) -> Autoencoder | VectorAutoencoder:
    """The same as it is trained: with a Gaussian, or with a codebook of so many rows."""
    widths, dtype = (width, 2 * width, 4 * width), jnp.dtype(precision)
    if codes:
        return vq_autoencoder(widths=widths, blocks=1, channels=channels, latent=latent, codes=codes, dtype=dtype)
    return kl_autoencoder(widths=widths, blocks=1, channels=channels, latent=latent, dtype=dtype)


def pictures(data: str, size: int, path: str, data_dir: str | None) -> Data:
    """The data set of that name."""
    if data == "emoji":
        return captioned_emoji(size)
    if data == "fashion_mnist":
        return tfds_images("fashion_mnist", data_dir)
    if not path:
        raise InputError("data=folder needs path=, the folder of pictures")
    return image_folder(path, size=size)


def experiment(
    *,
    data: Literal["emoji", "fashion_mnist", "folder"] = "emoji",
    path: str = "",
    size: Count | None = None,
    width: Count = 64,
    latent: Count = 4,
    codes: Natural = 0,
    features: Amount = 1.0,
    rate: Amount | None = None,
    adversarial: Amount = 0.1,
    start: Natural = 2000,
    steps: Count = 20_000,
    batch: Count = 64,
    learning_rate: Amount = 5e-4,
    warmup: Natural = 200,
    precision: Literal["float32", "bfloat16"] = "float32",
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 2000,
    checkpoint_every: Natural = 2000,
    data_dir: str | None = None,
) -> Experiment:
    """The autoencoder of a latent diffusion model.

    Args:
        data: what to train on.
        path: the folder of pictures, for data=folder.
        size: pixels a side, a multiple of 4; fashion_mnist has 28.
        width: channels of the first of three levels.
        latent: channels of a latent.
        codes: rows of a codebook (VQGAN); 0 for a Gaussian of each latent instead (KL).
        features: how much likeness in the discriminator's features counts against likeness of pixels.
        rate: how much the distance of the Gaussian from a standard one counts, a number of a picture, 0.001 unless
            given; or the codebook's loss, 1 unless given.
        adversarial: how much the discriminator counts, against the rest as large as it.
        start: updates before it counts.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: Adam's, after the warm-up, falling to nothing along a cosine.
        warmup: steps over which it grows from zero.
        precision: of the network's arithmetic; parameters stay float32.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between grids of held-out pictures, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
        data_dir: where tensorflow-datasets keeps its data; by default TFDS_DATA_DIR or its own place.
    """
    side = size or SIZES[data]
    if side % 4 or (data == "fashion_mnist" and side != 28):
        raise InputError(f"size={side}: a multiple of 4 is needed, and 28 for fashion_mnist")
    channels = 1 if data == "fashion_mnist" else 3
    made = {"width": width, "latent": latent, "codes": codes, "channels": channels, "precision": precision}
    vae, weight = network(**made), rate if rate is not None else 1.0 if codes else 1e-3
    judge = patch_discriminator(channels, width=width, depth=2, dtype=jnp.dtype(precision))
    load = functools.cache(lambda: pictures(data, side, path, data_dir))
    schedule = rectified()
    learning = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, min(warmup, steps // 2)), steps)
    return Experiment(
        data=load,
        shape=(side, side, channels),
        net=with_discriminator(trained(**made), judge),
        schedule=schedule,
        read=lambda net: net,
        objective=objective(Weights(features, weight, adversarial, start)),
        staged=True,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning, b1=0.5, b2=0.9)),
        ema=ema.constant(0.999),
        sampler=euler(schedule),
        times=uniform,
        sample_steps=1,
        drawing=_reconstructions(vae, lambda: held_out(load())),
        steps=steps,
        batch=batch,
        seed=seed,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )


def held_out(data: Data, n: int = 256) -> np.ndarray:
    """Some held-out pictures, u8[n, h, w, c], or training pictures where none are held out."""
    source = data.train if data.test is None else data.test
    return take(source, np.arange(min(n, examples(source))))["image"]


def _reconstructions(vae: Autoencoder, some: Callable[[], np.ndarray]) -> Callable[[Params, Key, Cond], Array]:
    """Held-out pictures, chosen by their keys, with what comes back of them."""

    def drawing(params: Params, keys: Key, labels: Cond) -> Array:
        all_of_them = prepare(jnp.asarray(some()))
        keys = keys if is_batched(keys) else keys[None]
        chosen = jax.vmap(lambda key: jax.random.randint(fold(key, 0), (), 0, all_of_them.shape[0]))(keys)
        x = all_of_them[chosen]
        inner = params["autoencoder"]
        return beside_their_originals(x, vae.decode(inner, vae.encode(inner, x).mean))

    return drawing
