"""DiT-XL/2 on ImageNet at 256x256 (Peebles & Xie 2023, arXiv:2212.09748), class-conditional, 675.1M parameters.

    make latents EXP=imagenet256_dit_xl2 ARGS="autoencoder=vae.safetensors path=FOLDER"
    make train EXP=imagenet256_dit_xl2 ARGS="autoencoder=vae.safetensors"
    make sample EXP=imagenet256_dit_xl2 ARGS="n=50000 format=npz guidance=1.5"
    make plan EXP=imagenet256_dit_xl2 TOPOLOGY=v5e:16x16

The paper's setting (sections 3 and 4): latents of 32x32x4 by Stable Diffusion's autoencoder, times 0.18215; pictures
preprocessed as by ADM and mirrored at random; T = 1000, linear betas from 1e-4 to 0.02, eps-prediction with learned
variance and the hybrid loss of Improved DDPM; AdamW at a constant 1e-4 without decay or warm-up, batch 256, labels left
out with probability 0.1, average of decay 0.9999; 250 ancestral steps at evenly spaced times that hold the first and
the last one, x0 not clipped. It differs in bfloat16, and in that guidance acts on all four channels: the published
figures with guidance are for three. `model` and what follows it make it smaller.

Cost: `make plan` says what a step takes in memory and time. The latents are 42 GB, mirrored copies included.
Expected: the paper reports FID 19.5 after 400,000 steps without guidance, and after 7,000,000 steps 9.62, with
guidance 1.5 2.27 (tables 2 and 4). Not measured here.
Data: ImageNet (ILSVRC 2012), for which image-net.org asks registration: FOLDER/train/n01440764/*.JPEG, or prepared by
tensorflow-datasets. autoencoder: Stable Diffusion's in diffusers' layout, for instance stabilityai/sd-vae-ft-mse's
diffusion_pytorch_model.safetensors. Without it, training goes on from latents, and samples are shown in false colours.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import ancestral, discrete_time, draw_discrete, from_betas, hybrid_loss, linear_betas, parameterize
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import dit, kl_autoencoder
from diffusion_jax.nets.autoencoder import SD_SCALE, Autoencoder
from diffusion_jax.nets.dit import SIZES, TENSOR_PARALLEL
from diffusion_jax.training import ema, optimizers
from diffusion_jax.training.data import Data, to_uint8
from diffusion_jax.training.latents import Encoding, draw_from_moments, false_colours, weights_digest
from diffusion_jax.training.latents import latents as read_latents
from diffusion_jax.training.sources import imagenet
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Array, InputError, Params
from diffusion_jax.weights.autoencoder import load

TABLE = 1000
STORE = "latents/imagenet256"
Precision = Literal["float32", "bfloat16"]


def experiment(
    *,
    model: Literal["S", "B", "L", "XL"] = "XL",
    depth: Count | None = None,
    width: Count | None = None,
    heads: Count | None = None,
    size: Count = 256,
    classes: Count = 1000,
    widths: tuple[int, ...] = (128, 256, 512, 512),
    autoencoder: str | None = None,
    latents: str = STORE,
    steps: Count = 400_000,
    batch: Count = 256,
    accumulate: Count = 1,
    learning_rate: Amount = 1e-4,
    flip: bool = True,
    precision: Precision = "bfloat16",
    remat: Literal["none", "dots", "full"] = "none",
    sample_steps: Count = 250,
    guidance: float = 1.5,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 100,
    sample_every: Natural = 25_000,
    checkpoint_every: Natural = 5000,
) -> Experiment:
    """Class-conditional ImageNet at 256 pixels, DiT-XL/2 on latents.

    Args:
        model: the paper's size.
        depth: another number of blocks than the model's.
        width: another width than the model's.
        heads: another number of heads than the model's.
        size: pixels a side of the pictures that were encoded.
        classes: that the data has.
        widths: of the autoencoder's levels; Stable Diffusion's by default.
        autoencoder: its weights in safetensors, to decode samples with; without, samples are shown in false colours.
        latents: the folder that make latents has written.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: AdamW's, constant.
        flip: take mirrored copies at random.
        precision: of the network's arithmetic; parameters stay float32.
        remat: what the backward pass keeps of each block: everything, matrix products, or nothing but its input.
        sample_steps: of the 1,000 times, how many sampling visits.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    schedule, side = from_betas(linear_betas(TABLE)), _latent_side(size, widths)
    shape = (side, side, 4)
    vae, weights = _autoencoder(widths, autoencoder)
    parts = tuple(given or of for given, of in zip((depth, width, heads), SIZES[model], strict=True))

    def data() -> Data:
        digest = None if weights is None else weights_digest(weights)
        return read_latents(latents, weights=digest, scale=SD_SCALE, mirrored=flip)

    return Experiment(
        data=data,
        shape=shape,
        net=dit(parts, 2, shape, classes=classes, dtype=jnp.dtype(precision), remat=remat),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "eps", discrete_time(TABLE), learned_variance=True),
        objective=make_objective(schedule, draw_discrete(TABLE), partial(hybrid_loss, table=TABLE)),
        optimizer=optimizers.adamw(learning_rate),
        ema=ema.constant(0.9999),
        sampler=ancestral(schedule),
        times=_evenly_spaced,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=classes,
        drop=0.1,
        guidance=guidance,
        learned_variance=True,
        flip=flip,
        prepare=draw_from_moments(SD_SCALE),
        decode=false_colours if weights is None else _decoder(vae, weights),
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        partition=TENSOR_PARALLEL,
    )


def encoding(
    *,
    autoencoder: str,
    path: str | None = None,
    out: str = STORE,
    size: Count = 256,
    widths: tuple[int, ...] = (128, 256, 512, 512),
    batch: Count = 64,
    mirror: bool = True,
    precision: Precision = "bfloat16",
    readers: Natural = 0,
) -> Encoding:
    """ImageNet's latents by Stable Diffusion's autoencoder.

    Args:
        autoencoder: its weights in safetensors, diffusers' layout: a file, or a folder with one.
        path: folder of the pictures, by default IMAGENET_DIR or where tensorflow-datasets keeps its data.
        out: the folder to write.
        size: pixels a side.
        widths: of the autoencoder's levels; Stable Diffusion's by default.
        batch: pictures encoded at once, over all devices.
        mirror: encode mirrored copies too, for training with flips.
        precision: of the autoencoder's arithmetic; what is stored is float16.
        readers: processes that decode pictures; 0 for threads.
    """
    _latent_side(size, widths)
    vae, weights = _autoencoder(widths, autoencoder, precision)
    assert weights is not None
    return Encoding(
        data=lambda: imagenet(size, path, cache_bytes=0),
        source=f"ImageNet at {size} pixels",
        encode=vae.encode,
        params=weights,
        scale=SD_SCALE,
        out=Path(out).expanduser(),
        batch=batch,
        mirror=mirror,
        processes=readers,
    )


def _latent_side(size: int, widths: tuple[int, ...]) -> int:
    factor = 2 ** (len(widths) - 1)
    if size % (2 * factor):
        raise InputError(f"size={size} is not possible: it must be a multiple of {2 * factor}")
    return size // factor


def _autoencoder(
    widths: tuple[int, ...], path: str | None, precision: str = "float32"
) -> tuple[Autoencoder, Params | None]:
    vae = kl_autoencoder(widths=widths, dtype=jnp.dtype(precision))
    return vae, None if path is None else load(path, vae)


def _decoder(vae: Autoencoder, weights: Params) -> Callable[[Array], Array]:
    """Latents -> pictures. The weights are leaves of the function, so that a program can take them as an argument."""
    half = {name: weights[name] for name in ("decoder", "post_quant_conv")}
    return jax.tree_util.Partial(lambda params, z: to_uint8(vae.decode(params, z / SD_SCALE)), half)


def _evenly_spaced(n: int) -> Array:
    """n of the discrete times 1/T ... 1, the first and the last among them, then 0 (Nichol & Dhariwal 2021, sec. 4)."""
    if not 1 <= n <= TABLE:
        raise ValueError(f"between 1 and {TABLE} steps, got {n}")
    return jnp.asarray(np.append(np.round(np.linspace(TABLE, 1, n)), 0) / TABLE, jnp.float32)
