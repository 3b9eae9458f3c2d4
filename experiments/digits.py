"""Handwritten digits, 8x8, on a bare laptop: a class-conditional U-Net, trained in under three minutes.

    make train                                  the same as make train EXP=digits
    make sample ARGS="n=100 guidance=2"         more pictures from it

Data: scikit-learn's bundled digits (1,797 pictures, nothing to download), one fifth of them held out.
Method: v-prediction (Salimans & Ho 2022, arXiv:2202.00512) on the cosine schedule, classifier-free guidance,
DPM-Solver++(2M) in 20 steps.
Expected, as printed last: the share of samples that a classifier trained on the real digits recognises as their
class, beside the same for held-out digits, and how far samples are from copies (1: as far as held-out digits).
"""

from functools import partial

import optax

from diffusion_jax import cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.evaluation.classes import evaluate_classes
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema
from diffusion_jax.training.sources import digits
from diffusion_jax.training.step import make_objective

SHAPE, CLASSES = (8, 8, 1), 10


def experiment(
    *,
    width: Count = 32,
    steps: Count = 600,
    batch: Count = 128,
    learning_rate: Amount = 3e-3,
    sample_steps: Count = 20,
    guidance: float = 1.5,
    seed: Natural = 0,
    log_every: Count = 50,
    sample_every: Natural = 200,
    checkpoint_every: Natural = 200,
) -> Experiment:
    """Class-conditional handwritten digits, 8x8.

    Args:
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: pictures an update.
        learning_rate: the largest; it warms up over a tenth of the steps and falls to zero by a cosine.
        sample_steps: network evaluations for a picture.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    data, schedule = digits(), cosine()
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps + 1)
    return Experiment(
        data=lambda: data,
        shape=SHAPE,
        net=unet(SHAPE, channels=width, multipliers=(1, 2), blocks=1, attention=(4,), classes=CLASSES),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
        objective=make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        ema=ema.warmup(0.99),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=CLASSES,
        drop=0.1,
        guidance=guidance,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        evaluate=lambda draw: evaluate_classes(draw, data.train, data.test),
    )
