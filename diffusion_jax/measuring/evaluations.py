"""How often a sampler calls its network for one sample, counted as it happens.

The network is replaced by one that returns zeros and reports the size of every batch it is given; then one sample is
drawn. So what the sampler skips is not counted (Heun's second evaluation where sigma = 0), and what guidance adds is:
a batch that holds a picture with its condition and without counts twice. Of a sampler whose steps depend on what the
network says, which none here is, this would be the count for a network of zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.experiment import Experiment
from diffusion_jax.training.generate import classes_of, example_keys, make_draw
from diffusion_jax.typing import Array, Cond, Key, Net, Params


def evaluations(experiment: Experiment, *, conditional: bool = True, **options: Any) -> int:
    """Network evaluations for one sample, with the options of `make_draw`."""
    like = jax.eval_shape(experiment.net.init, jax.eval_shape(lambda: jax.random.key(0)))
    count = 0

    def report(examples: int) -> None:
        nonlocal count
        count += examples

    def apply(params: Params, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        jax.debug.callback(lambda: report(len(x)))
        out = jax.eval_shape(lambda p, x, t, c: experiment.net.apply(p, x, t, c, key=key), like, x, t, cond)
        return jnp.zeros(out.shape, out.dtype)

    counted = replace(experiment, net=Net(experiment.net.init, apply))
    labels = jnp.zeros((1,), jnp.int32) if conditional and classes_of(experiment) is not None else None
    draw = make_draw(counted, **options)
    jax.block_until_ready(jax.jit(lambda keys, labels: draw({}, keys, labels))(example_keys(0, 0, 1), labels))
    jax.effects_barrier()
    return count
