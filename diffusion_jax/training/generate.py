"""Pictures from a trained network: one pure function, and a loop over batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment
from diffusion_jax.forward import prior
from diffusion_jax.guidance import classifier_free, static_threshold
from diffusion_jax.ops import fold
from diffusion_jax.samplers import sample
from diffusion_jax.training.data import to_uint8
from diffusion_jax.training.mesh import replicated, split_axis
from diffusion_jax.typing import Array, InputError, Params, Sampler

Draw = Callable[[Params, Array, Array | None], Array]
"""(params, keys: [b], labels: i32[b] or None) -> f32[b,h,w,c]."""
Pictures = Callable[..., Iterator[np.ndarray]]
"""(params, n, seed, labels: [n] or None) -> n pictures, u8[k, h, w, c] at a time."""


def make_draw(
    experiment: Experiment,
    *,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    trajectory: bool = False,
) -> Draw:
    """(params, keys: [b], labels: i32[b] or None) -> f32[b,h,w,c] in about [-1, 1], to be jitted by the caller.

    Picture i is a function of key i and label i alone; without labels, of the unconditional model. What is not given
    is the experiment's. With `trajectory`, f32[steps + 1, b, h, w, c]. InputError for steps that its grid cannot have.
    """
    n = experiment.sample_steps if steps is None else steps
    try:
        times = experiment.times(n)
    except ValueError as error:
        raise InputError(f"{n} sampling steps are not possible here: {error}") from None
    scale = experiment.guidance if guidance is None else guidance
    chosen = experiment.sampler if sampler is None else sampler

    def draw(params: Params, keys: Array, labels: Array | None) -> Array:
        denoiser = experiment.read(partial(experiment.net.apply, params))
        if experiment.null is None:
            cond = None
        elif labels is None:
            cond = jnp.full(keys.shape, experiment.null, jnp.int32)
        else:
            cond = labels
            denoiser = classifier_free(denoiser, experiment.null, scale)
        if experiment.clip:
            denoiser = static_threshold(denoiser, experiment.schedule)
        x = prior(fold(keys, 0), experiment.schedule, (keys.shape[0], *experiment.shape), times[0])
        return sample(fold(keys, 1), chosen, denoiser, x, times, cond, trajectory=trajectory)

    return draw


def example_keys(seed: int, start: int, count: int) -> Array:
    """The keys of samples start ... start + count of a seed: `[count]`."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(start, start + count))


def at_a_time(experiment: Experiment) -> int:
    """Pictures a device draws at a time: enough to keep it busy, not more than fit in training."""
    many = 8 if jax.devices()[0].platform == "cpu" else 128
    return min(many, experiment.batch // experiment.accumulate)


def make_pictures(draw: Draw, mesh: Mesh, batch: int, decode: Callable[[Array], Array] = to_uint8) -> Pictures:
    """Pictures of any number, `batch` at a time on each device of a mesh, by one compiled program.

    Picture i is made in place i mod `batch` of a batch that is always full, so that neither n nor the number of
    devices changes one bit of it. Another `batch` may: compilers add in another order for another shape.
    """
    rows = split_axis(mesh)
    batch *= mesh.shape["data"]
    program = jax.jit(lambda params, keys, labels: decode(draw(params, keys, labels)), out_shardings=rows)

    def pictures(params: Params, n: int, seed: int, labels: np.ndarray | None = None) -> Iterator[np.ndarray]:
        params = jax.device_put(params, replicated(mesh))
        for start in range(0, n, batch):
            keys = jax.device_put(example_keys(seed, start, batch), rows)
            wanted = None
            if labels is not None:
                place = np.minimum(np.arange(start, start + batch), n - 1)
                wanted = jax.device_put(labels[place].astype(np.int32), rows)
            yield np.asarray(program(params, keys, wanted))[: n - start]

    return pictures
