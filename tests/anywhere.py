"""Parameters anywhere but at their start: nothing is zero or one, and drawing them compiles nothing."""

import math

import jax
import numpy as np


def params_like(init, seed=0):
    """Random parameters of the structure that init(key) gives, of a scale that keeps activations about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return z / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        return z if name == "embedding" else np.float32(name == "scale") + np.float32(0.2) * z

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))
