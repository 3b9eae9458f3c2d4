"""Pictures from a trained network: one pure function, and a loop over batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment
from diffusion_jax.forward import prior
from diffusion_jax.guidance import classifier_free, static_threshold
from diffusion_jax.ops import fold
from diffusion_jax.samplers import jump, sample
from diffusion_jax.training import hosts
from diffusion_jax.training.data import to_uint8
from diffusion_jax.training.mesh import on_mesh, replicated, split_axis
from diffusion_jax.typing import Array, Cond, InputError, Params, Sampler

Draw = Callable[[Params, Array, Cond], Array]
"""(params, keys: [b], labels: i32[b], another condition, or None) -> f32[b *d]."""
Pictures = Callable[..., Iterator[np.ndarray]]
"""(params, n, seed, labels: i32[n], another condition, or None) -> n pictures, u8[k, h, w, c] or what `decode` gives, k
at a time."""


def classes_of(experiment: Experiment) -> int | None:
    """The number of classes that samples can be asked for, or None where there are no labels."""
    return int(experiment.null) if isinstance(experiment.null, int | np.integer) else None


def make_draw(
    experiment: Experiment,
    *,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    trajectory: bool = False,
) -> Draw:
    """(params, keys: [b], labels: i32[b] or None) -> f32[b *d], x0 as the model knows it, to be jitted by the caller.

    Picture i is a function of key i and label i alone; without labels, of the unconditional model. What is conditioned
    on more than labels takes a whole condition in their place, of the structure of `null`, or None for nothing. What is
    not given is the experiment's: of one with a flow map, jumps of that, without guidance. With `trajectory`,
    f32[steps + 1, b *d]. InputError for steps that its grid cannot have, and for guidance of jumps.
    """
    if experiment.drawing is not None:
        return _only(experiment.drawing, sampler, steps, guidance, trajectory)
    n = experiment.sample_steps if steps is None else steps
    try:
        times = experiment.times(n)
    except ValueError as error:
        raise InputError(f"{n} sampling steps are not possible here: {error}") from None
    scale = experiment.guidance if guidance is None else guidance
    flow_map = experiment.flow_map if sampler is None else None
    if flow_map is not None and scale != 1:
        raise InputError(f"guidance={scale}: jumps of a model of two times are not guided; give a sampler=")

    def draw(params: Params, keys: Array, labels: Array | None) -> Array:
        denoiser = conditional = experiment.read(partial(experiment.net.apply, params))
        classes = classes_of(experiment)
        if labels is None or experiment.null is None:
            cond = None if classes is None else jnp.full(keys.shape, classes, jnp.int32)
        else:
            cond = labels
            denoiser = classifier_free(denoiser, experiment.null, scale)
        if experiment.clip:
            denoiser = static_threshold(denoiser, experiment.schedule)
        chosen = (sampler or experiment.sampler) if flow_map is None else jump(flow_map(conditional), cond)
        x = prior(fold(keys, 0), experiment.schedule, (keys.shape[0], *experiment.shape), times[0])
        return sample(fold(keys, 1), chosen, denoiser, x, times, cond, trajectory=trajectory)

    return draw


def _only(drawing: Draw, *asked: Any) -> Draw:
    """What is drawn in place of samples; InputError for options of samples."""
    if any(asked):
        raise InputError("this experiment draws no samples: give no sampler=, steps= or guidance=")
    return drawing


def example_keys(seed: int, start: int, count: int) -> Array:
    """The keys of samples start ... start + count of a seed: `[count]`."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(start + jnp.arange(count))


def at_a_time(experiment: Experiment, platform: str | None = None) -> int:
    """Pictures a device draws at a time: enough to keep it busy, not more than fit in training."""
    many = 8 if (platform or jax.devices()[0].platform) == "cpu" else 128
    return min(many, experiment.batch // experiment.accumulate)


def picture_program(draw: Draw, mesh: Mesh, decode: Callable[[Array], Array] = to_uint8) -> Any:
    """The jitted program (params, keys, labels) -> what is kept of the pictures, on the devices that drew them."""
    return jax.jit(
        on_mesh(lambda params, keys, labels: decode(draw(params, keys, labels)), mesh),
        out_shardings=replicated(mesh) if hosts.several() else split_axis(mesh),
    )


def make_pictures(draw: Draw, mesh: Mesh, batch: int, decode: Callable[[Array], Array] = to_uint8) -> Pictures:
    """Pictures of any number, `batch` at a time on each device of a mesh, by one compiled program.

    Picture i is made in place i mod `batch` of a batch that is always full, so that neither n nor the number of
    devices changes one bit of it. Another `batch` may: compilers add in another order for another shape. The devices
    draw the next batch while the caller does what it does with one. Of several processes each gets all pictures.
    """
    rows = split_axis(mesh)
    batch *= mesh.shape["data"]
    own = hosts.rows_of(mesh, batch)
    keys_of = jax.jit(example_keys, static_argnums=2, out_shardings=rows)
    program = picture_program(draw, mesh, decode)

    def begin(params: Params, n: int, seed: int, labels: Cond, start: int) -> Array:
        wanted = None
        if labels is not None:
            place = np.minimum(np.arange(start, start + batch), n - 1)[own]
            wanted = jax.tree.map(lambda leaf: hosts.place(leaf[place], rows, batch), labels)
        return program(params, keys_of(np.uint32(seed), np.int32(start), batch), wanted)

    def pictures(params: Params, n: int, seed: int, labels: Cond = None) -> Iterator[np.ndarray]:
        params = jax.device_put(params, replicated(mesh))
        ahead = begin(params, n, seed, labels, 0)
        for start in range(0, n, batch):
            drawn = ahead
            if start + batch < n:
                ahead = begin(params, n, seed, labels, start + batch)
            yield np.asarray(drawn)[: n - start]

    return pictures
