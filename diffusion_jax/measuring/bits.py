"""Bits per dimension of held-out pictures, as an upper bound.

    -log P(x) <= KL(q(x_T | x) || p(x_T)) + 1/2 int |dl/du| |eps_hat - eps|^2 du - log P(x | x_0)                   (1)

is the variational bound of infinitely many steps ((4), (6) of `likelihood`) from log SNR l = -log 10^4 to log 10^4, the
ends of the first diffusion models, as far as the times of the experiment reach; the last term is the probability of
8-bit values under a deviation of 0.01. With time u on which l falls evenly, the integral is the mean over one draw in
each of `cells` equal parts of [0, 1], for each picture its own, which is unbiased. (For a Gaussian model 100 steps in
its place are 0.9 bits looser, and from l = 12 on 0.15 bits: it does not know of the 256 levels.) A class-conditional
model is asked with the true labels. The standard error is over pictures; that of the draws is a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jax.sharding import Mesh

from diffusion_jax.evaluation.distances import Estimate
from diffusion_jax.experiment import Experiment
from diffusion_jax.likelihood import antithetic, vdm_loss, vlb
from diffusion_jax.losses import discretized_log_likelihood
from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.training.data import Source, take
from diffusion_jax.training.generate import classes_of, example_keys
from diffusion_jax.training.mesh import on_mesh, replicated, split_axis
from diffusion_jax.typing import Array, Denoiser, Params, Schedule

ENDS = math.log(1e4)
"""The log SNR at which pictures are decoded, sigma / alpha = 0.01, and minus the first one."""


def even(experiment: Experiment) -> Callable[[Array], Array]:
    """u: f32[*b] in [0, 1] -> the time of the experiment at which the log SNR has fallen so far."""
    times = experiment.times(experiment.sample_steps)
    # A schedule may end where sigma or alpha is 0, and the log SNR infinite.
    noisy, clean = jnp.clip(logsnr(experiment.schedule, times[jnp.asarray([0, -1])]), -ENDS, ENDS)
    return lambda u: inverse_logsnr(experiment.schedule, clean + (noisy - clean) * u, times[-1], times[0])


def bound(
    keys: Array, denoiser: Denoiser, schedule: Schedule, x0: Array, labels: Array | None, cells: int
) -> Array:  # fmt: skip
    """Equation (1) in nats, f32[b], of a denoiser and schedule of the time u."""
    ends = vlb(
        fold(keys, 0), denoiser, schedule, x0, jnp.asarray([1.0, 0.0]), labels, noise=antithetic(1),
        decoder=discretized_log_likelihood,
    )  # fmt: skip

    def draw(i: Array) -> Array:
        k = fold(keys, i + 1)
        u = norm.cdf(normal_like(fold(k, 0), jnp.zeros(len(x0))))
        u = (bcast(i.astype(u.dtype), u) + u) / cells
        return vdm_loss(denoiser, schedule, x0, u, normal_like(fold(k, 1), x0), labels)

    return ends.prior + jnp.mean(jax.lax.map(draw, jnp.arange(cells)), axis=0) + ends.reconstruction


def bits(
    experiment: Experiment, params: Params, held_out: Source, index: np.ndarray, mesh: Mesh, *,
    cells: int = 100, batch: int = 8, seed: int = 0,
) -> Estimate:  # fmt: skip
    """Equation (1) in bits a dimension of the held-out pictures at `index`, and its standard error over them."""
    at, d = even(experiment), math.prod(experiment.shape)
    conditional = classes_of(experiment) is not None
    size, rows = batch * mesh.shape["data"], split_axis(mesh)

    def nats(params: Params, images: Array, labels: Array | None, keys: Array) -> Array:
        denoiser = experiment.read(partial(experiment.net.apply, params))
        x0 = experiment.prepare(images, None, False)
        return bound(
            keys, lambda x, u, cond=None: denoiser(x, at(u), cond), lambda u: experiment.schedule(at(u)), x0, labels,
            cells,
        )  # fmt: skip

    program = jax.jit(on_mesh(nats, mesh), out_shardings=rows)
    params, found = jax.device_put(params, replicated(mesh)), []
    for start in range(0, len(index), size):
        chosen = index[np.minimum(np.arange(start, start + size), len(index) - 1)]
        part = take(held_out, chosen)
        labels = jax.device_put(part["label"].astype(np.int32), rows) if conditional else None
        keys = jax.device_put(example_keys(seed, start, size), rows)
        part_of_all = program(params, jax.device_put(part["image"], rows), labels, keys)
        found.append(np.asarray(part_of_all, np.float64)[: len(index) - start])
    each = np.concatenate(found) / (d * math.log(2))
    error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Estimate(float(each.mean()), float(error))
