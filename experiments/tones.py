"""Tones of eight pitches, a quarter of a second at 4 kHz: a class-conditional U-Net in one axis, on a bare laptop.

    make train EXP=tones
    make sample EXP=tones ARGS="n=16 label=5"       sixteen A4, as WAV files

Data: 4,096 tones with harmonics and decay, made from a seed (`training.synthetic.tones`); 512 more are held out.
Method: v-prediction (Salimans & Ho 2022, arXiv:2202.00512) on the cosine schedule, classifier-free guidance,
DPM-Solver++(2M) in 30 steps. The network is the same as that for pictures: the rank of SHAPE makes it one of sounds.
Expected, as printed last: the share of samples whose strongest frequency is within half a semitone of the pitch asked
for, 0.995, and the share of their energy at multiples of that pitch, 0.957; both are 1.000 for held-out tones.
Measured on two shared cores of a virtual machine: 247 s of processor time for training, compilation included.
"""

from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.evaluation.media import harmonic_share, in_tune
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import unet
from diffusion_jax.training import ema
from diffusion_jax.training.step import make_objective
from diffusion_jax.training.synthetic import NOTES, PITCHES, tones

RATE, SHAPE, CLASSES, LOUDNESS = 4000, (1024, 1), len(NOTES), 0.3
"""Samples a second; shape; number of pitches; standard deviation of the data, by which it is divided."""


def experiment(
    *,
    width: Count = 16,
    steps: Count = 800,
    batch: Count = 16,
    learning_rate: Amount = 2e-3,
    sample_steps: Count = 30,
    guidance: float = 1.5,
    seed: Natural = 0,
    log_every: Count = 50,
    sample_every: Natural = 400,
    checkpoint_every: Natural = 400,
) -> Experiment:
    """Class-conditional synthetic tones.

    Args:
        width: channels of the U-Net at full resolution.
        steps: updates to make.
        batch: sounds an update.
        learning_rate: the largest; it warms up over a tenth of the steps and falls to zero by a cosine.
        sample_steps: network evaluations for a sound.
        guidance: scale of classifier-free guidance while sampling; 1 is none.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    data, schedule = cache(partial(tones, SHAPE[0], RATE)), cosine()
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps + 1)
    return Experiment(
        data=data,
        shape=SHAPE,
        net=unet(SHAPE, channels=width, multipliers=(1, 2, 2, 4, 4), blocks=1, attention=(64,), classes=CLASSES),
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
        prepare=lambda x, key, flip: x / LOUDNESS,
        decode=lambda x: jnp.clip(LOUDNESS * x, -1.0, 1.0),
        sample_rate=RATE,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        evaluate=lambda draw: evaluate(draw, data().test),
    )


def evaluate(draw, test, each: int = 25, seed: int = 1) -> dict[str, float]:
    """in_tune and harmonic_share of `each` samples a class, and of held-out tones."""
    labels = np.arange(CLASSES * each) % CLASSES
    pitches = np.asarray(PITCHES)
    made, real = (draw(labels, seed)[..., 0], pitches[labels]), (test["image"][..., 0], pitches[test["label"]])
    return {
        f"{whose}_{name}": f(sounds, RATE, wanted)
        for name, f in (("in_tune", in_tune), ("harmonic_share", harmonic_share))
        for whose, (sounds, wanted) in (("heldout", real), ("sample", made))
    }
