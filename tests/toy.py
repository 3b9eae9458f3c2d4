"""A tiny experiment for the tests of training: a perceptron on the real digits, compiled in a second or two."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import Net, cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import mlp
from diffusion_jax.training import ema
from diffusion_jax.training.sources import digits
from diffusion_jax.training.step import make_objective

SHAPE, CLASSES = (8, 8, 1), 10


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same under JAX's standard rules of promotion: optax relies on them, the tests turn them off."""

    def update(*arguments):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments)

    return optax.GradientTransformation(optimizer.init, update)


class Reader:
    """Arrays as examples read one at a time, which are fed through Grain."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays["label"])

    def __getitem__(self, i):
        return {name: array[i] for name, array in self.arrays.items()}


def picture_net(**options) -> Net:
    """`mlp` on flattened 8x8 pictures."""
    inner = mlp(64, blocks=1, classes=CLASSES, **options)

    def apply(params, x, t, cond=None, *, key=None):
        return inner.apply(params, x.reshape(-1, 64), t, cond, key=key).reshape(x.shape)

    return Net(inner.init, apply)


def data(rows: int, grain: bool):
    full = digits()
    train = {name: array[: rows or None] for name, array in full.train.items()}
    return full._replace(train=Reader(train) if grain else train)


def experiment(
    *,
    width: Count = 16,
    steps: Count = 20,
    batch: Count = 16,
    accumulate: Count = 1,
    learning_rate: Amount = 1e-3,
    dropout: Amount = 0.1,
    rows: Natural = 0,
    grain: bool = False,
    breaks_at: Natural = 0,
    sample_steps: Count = 2,
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 5,
    sample_every: Natural = 0,
    checkpoint_every: Natural = 5,
) -> Experiment:
    """Digits by a perceptron.

    Args:
        rows: use only so many pictures, 0 for all.
        grain: read them through Grain instead of keeping them on the device.
        breaks_at: the update of this step turns the parameters into NaN.
    """
    schedule = cosine()
    break_once = optax.scale_by_schedule(lambda count: jnp.where(count + 1 == breaks_at, jnp.nan, 1.0))
    return Experiment(
        data=partial(data, rows, grain),
        shape=SHAPE,
        net=picture_net(width=width, dropout=dropout),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
        objective=make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
        optimizer=lenient(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate), break_once)),
        ema=ema.warmup(0.99),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=sample_steps,
        steps=steps,
        batch=batch,
        seed=seed,
        null=CLASSES,
        drop=0.1,
        guidance=1.5,
        flip=True,
        accumulate=accumulate,
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )
