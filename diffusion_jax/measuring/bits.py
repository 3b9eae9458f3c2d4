"""Bits per dimension of held-out pictures, as an upper bound.

    -log2 P(x) / d <= vlb / (d log 2)                                                                          (1)

with the variational bound (4) of `likelihood` on a grid of equal steps in log SNR from -12 to 12, as far as the times
of the experiment reach: there the noise is well inside one of 256 levels. Each term has two antithetic draws, and the
last one is the probability of 8-bit values. The bound is that of the ancestral sampler on this grid, so it is rigorous
at any number of steps, and tighter with more. A class-conditional model is asked with the true labels. The standard
error is over pictures; that of the draws is a part of it.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.experiment import Experiment
from diffusion_jax.likelihood import antithetic, vlb
from diffusion_jax.losses import discretized_log_likelihood
from diffusion_jax.ops import fold
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.training.data import Source, take
from diffusion_jax.training.generate import classes_of, example_keys
from diffusion_jax.training.mesh import on_mesh, replicated, split_axis
from diffusion_jax.typing import Array, Params

ENDS = 12.0
"""The log SNR at which pictures are decoded, sigma / alpha = 0.0025 or a third of a level; and minus the first one."""


def grid(experiment: Experiment, steps: int) -> Array:
    """f32[steps + 1], decreasing, with equal steps in log SNR."""
    times = experiment.times(experiment.sample_steps)
    # A schedule may end where sigma or alpha is 0, and the log SNR infinite.
    noisy, clean = jnp.clip(logsnr(experiment.schedule, times[jnp.asarray([0, -1])]), -ENDS, ENDS)
    return inverse_logsnr(experiment.schedule, jnp.linspace(noisy, clean, steps + 1), times[-1], times[0])


def bits(
    experiment: Experiment, params: Params, held_out: Source, index: np.ndarray, mesh: Mesh, *,
    steps: int = 100, batch: int = 8, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Equation (1) of the held-out pictures at `index`, and its standard error over them."""
    times, d = grid(experiment, steps), math.prod(experiment.shape)
    conditional = classes_of(experiment) is not None
    size, rows = batch * mesh.shape["data"], split_axis(mesh)

    def bound(params: Params, images: Array, labels: Array | None, keys: Array) -> Array:
        denoiser = experiment.read(partial(experiment.net.apply, params))
        x0 = experiment.prepare(images, None, False)
        terms = vlb(
            fold(keys, 0), denoiser, experiment.schedule, x0, times, labels, noise=antithetic(1),
            decoder=discretized_log_likelihood,
        )  # fmt: skip
        return terms.total()

    program = jax.jit(on_mesh(bound, mesh), out_shardings=rows)
    params, found = jax.device_put(params, replicated(mesh)), []
    for start in range(0, len(index), size):
        chosen = index[np.minimum(np.arange(start, start + size), len(index) - 1)]
        part = take(held_out, chosen)
        labels = jax.device_put(part["label"].astype(np.int32), rows) if conditional else None
        keys = jax.device_put(example_keys(seed, start, size), rows)
        nats = program(params, jax.device_put(part["image"], rows), labels, keys)
        found.append(np.asarray(nats, np.float64)[: len(index) - start])
    each = np.concatenate(found) / (d * math.log(2))
    error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Estimate(float(each.mean()), float(error))
