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
from diffusion_jax.typing import Array, Params, Sampler

Draw = Callable[[Params, Array, Array | None], Array]


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
    is the experiment's. With `trajectory`, f32[steps + 1, b, h, w, c].
    """
    times = experiment.times(experiment.sample_steps if steps is None else steps)
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


def drawn(
    draw: Draw, params: Params, mesh: Mesh, n: int, seed: int, batch: int, labels: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """n pictures `u8[<= batch, h, w, c]` at a time, over the devices of a mesh; one compiled program.

    The last batch is filled up and cut, and the batch is rounded up to a multiple of the devices, neither of which
    changes any picture.
    """
    devices = mesh.shape["data"]
    batch = -(-min(batch, n) // devices) * devices
    rows = split_axis(mesh)
    program = jax.jit(
        lambda params, keys, labels: to_uint8(draw(params, keys, labels)),
        in_shardings=(None, rows, rows if labels is not None else None),
        out_shardings=rows,
    )
    params = jax.device_put(params, replicated(mesh))
    for start in range(0, n, batch):
        place = np.minimum(np.arange(start, start + batch), n - 1)
        wanted = None if labels is None else jax.device_put(jnp.asarray(labels[place], jnp.int32), rows)
        keys = jax.device_put(example_keys(seed, start, batch), rows)
        yield np.asarray(program(params, keys, wanted))[: n - start]
