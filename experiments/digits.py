"""Handwritten digits, 8x8, on a bare laptop: a class-conditional U-Net in under three minutes of training.

    make train                     the same as make train EXP=digits

Data: scikit-learn's bundled digits (1,797 pictures, nothing to download), one fifth held out. The last line of
metrics.jsonl has the share of samples that a classifier trained on real digits recognises as their class.
"""

import optax

from diffusion_jax import cosine, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.experiment import Experiment
from diffusion_jax.losses import denoising_loss
from diffusion_jax.nets import unet
from diffusion_jax.ops import fold, normal_like
from diffusion_jax.training import ema
from diffusion_jax.training.sources import digits
from diffusion_jax.evaluation.digits import evaluate_digits


def experiment(
    *,
    width: int = 48,
    steps: int = 2000,
    batch: int = 128,
    learning_rate: float = 2e-3,
    sample_steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    log_every: int = 50,
    sample_every: int = 500,
    checkpoint_every: int = 500,
) -> Experiment:
    schedule = cosine()
    shape, classes = (8, 8, 1), 10

    def objective(key, denoiser, x0, cond):
        t = draw_stratified()(fold(key, 0), x0.shape[0])
        return denoising_loss(denoiser, schedule, x0, t, normal_like(fold(key, 1), x0), cond, target="v")

    return Experiment(
        data=digits,
        shape=shape,
        net=unet(shape, channels=width, multipliers=(1, 2), blocks=1, attention=(4,), classes=classes),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
        objective=objective,
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 10 + 1), steps + 1)),
        ),
        ema=ema.warmup(0.99),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=classes,
        drop=0.1,
        guidance=guidance,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        evaluate=evaluate_digits,
    )
