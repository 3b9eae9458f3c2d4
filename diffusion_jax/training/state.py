"""What a training run carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.training.ema import evaluation_params
from diffusion_jax.typing import Array, InputError, Key, Net, Params


class TrainState(NamedTuple):
    """step: i32[], the number of updates made; params and averages: fp32 trees; key: the run's one key, never changed.

    averages: one tree for each decay of the experiment, see `ema`. What a step draws is a function of
    fold_in(key, step), so that a state is all a resumed run needs.
    """

    step: Array
    params: Params
    averages: tuple[Params, ...]
    opt_state: Any
    key: Key

    @property
    def ema(self) -> Params:
        """What is judged and drawn from: the first average, or without one `ema.evaluation_params`."""
        return self.averages[0] if self.averages else evaluation_params(self.opt_state, self.params)


def init_state(
    key: Key, net: Net, optimizer: optax.GradientTransformation, averages: int = 1, params: Params | None = None
) -> TrainState:
    """The state before the first update. Parameters come from fold_in(key, 0), the run's draws from fold_in(key, 1).

    `params` are copied instead, if given; InputError unless names, shapes and types are the network's.
    """
    first: Params = net.init(jax.random.fold_in(key, 0)) if params is None else _copied(net, params)
    # Each average is a copy of its own: a donated buffer may not appear twice.
    copies = tuple(jax.tree.map(jnp.copy, first) for _ in range(averages))
    return TrainState(jnp.zeros((), jnp.int32), first, copies, optimizer.init(first), jax.random.fold_in(key, 1))


def dotted(path: tuple[Any, ...]) -> str:
    """The dotted name of the parameter at a key path, also within a larger tree: what follows the last attribute.

    >>> leaves, _ = jax.tree_util.tree_flatten_with_path((optax.EmptyState(), {"conv": {"kernel": 1}}))
    >>> [dotted(path) for path, _ in leaves]
    ['conv.kernel']
    """
    names: list[str] = []
    for entry in reversed(path):
        if not isinstance(entry, jax.tree_util.DictKey):
            break
        names.append(str(entry.key))
    return ".".join(reversed(names))


def parameter_count(net: Net) -> int:
    """Number of scalars in a network's parameters; nothing is computed."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))


def digest(tree: Any) -> Array:
    """A checksum of all bits of a tree of arrays, u32[leaves], that any changed element changes.

    Each 32-bit word is multiplied by an odd number that depends on its place, and the products are added modulo 2^32:
    integer sums do not depend on their order, so that the sharding of the arrays does not matter.
    """
    return jnp.stack([_leaf_digest(leaf) for leaf in jax.tree.leaves(tree)])


def _copied(net: Net, params: Params) -> Params:
    """InputError that names a parameter which the network does not have as it is given."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    mine, given = ({dotted(p): (v.shape, v.dtype) for p, v in jax.tree.leaves_with_path(t)} for t in (shapes, params))
    for name in sorted(mine.keys() | given.keys()):
        if mine.get(name) != given.get(name):
            kinds = [f"{kind[1]}{list(kind[0])}" if kind else "none" for kind in (mine.get(name), given.get(name))]
            raise InputError(f"the parameter {name} is {kinds[0]} in the network, and {kinds[1]} is given")
    return jax.tree.map(jnp.copy, params)


def _leaf_digest(leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    size = leaf.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
    words = jnp.ravel(jax.lax.bitcast_convert_type(leaf, unsigned)).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, words.size)
    mixed = (place + jnp.uint32(1)) * jnp.uint32(2654435761)
    return jnp.sum(words * (((mixed ^ (mixed >> 15)) << 1) | jnp.uint32(1)), dtype=jnp.uint32)


def nested(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `dotted` for all parameters at once: nested dicts from values by dotted names.

    >>> nested({"conv.kernel": 1, "conv.bias": 2})
    {'conv': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *branches, last = name.split(".")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = leaf
    return tree
