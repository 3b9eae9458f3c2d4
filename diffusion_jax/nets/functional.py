"""The border between Flax NNX modules and pure functions.

A module is a structure (static) and parameters (arrays):

    module = merge(structure, params),     apply(params, x, t, cond, key) = module(x, t, cond, key=key)     (1)

The structure is found once by tracing the constructor abstractly, which computes nothing. Initial values that a
module takes from `rngs.uniform` are slices of one draw for the whole module: a network has hundreds of them, and
hundreds of draws take XLA five times as long to compile. The parameters are a plain nested dict of arrays whose
keys are strings: `params["down_blocks"]["0"]["resnets"]["1"]["conv1"]["kernel"]`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_jax.typing import Array, Cond, Key, Net, Params

Path = tuple[str, ...]


class _Structure(NamedTuple):
    """What (1) needs besides arrays: the module's graph, the tree of its state, each leaf's path and shape.

    `uniforms` is how many values the constructor takes from `rngs.uniform`.
    """

    graph: Any
    tree: Any
    shapes: dict[Path, tuple[int, ...]]
    uniforms: int


class OneDraw(nnx.Rngs):
    """`nnx.Rngs` whose `uniform` cuts its values, in the order of the calls, out of one draw of `size` of them."""

    def __init__(self, key: Key, size: int):
        super().__init__(jax.random.fold_in(key, 0))
        self.pool = _Pool(jax.random.uniform(jax.random.fold_in(key, 1), (size,), jnp.float32))

    def uniform(self, shape: tuple[int, ...], dtype: Any = jnp.float32, minval: float = 0.0, maxval: float = 1.0):
        return (self.pool.take(shape) * (maxval - minval) + minval).astype(dtype)


class _Pool:
    """A cursor over the values of a draw; past their end it gives zeros and goes on counting."""

    def __init__(self, values: Array):
        self.values, self.used = values, 0

    def take(self, shape: tuple[int, ...]) -> Array:
        start, self.used = self.used, self.used + math.prod(shape)
        if self.used > self.values.size:
            return jnp.zeros(shape, jnp.float32)
        return jnp.reshape(jax.lax.slice(self.values, (start,), (self.used,)), shape)


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Net:
    """Turn the constructor of an NNX module into a `Net` of two pure functions, by equation (1).

    make: rngs -> a module that is called as `module(x, t, cond, key=key)` and holds no state but `nnx.Param`.
    The functions work under `jit`, `vmap`, `grad` and `eval_shape`, and cost nothing there but tracing; `init` is
    jitted already, because it would compile hundreds of small programs otherwise.
    Raises ValueError in `init` or `apply` if the module has other state than parameters, and in `apply` if the
    parameters are not those of the module; it names the first that differs and both shapes.
    """

    @functools.cache
    def structure() -> _Structure:
        return _structure(make)

    def init(key: Key) -> Params:
        _, state = _split(make(OneDraw(key, structure().uniforms)))
        return _nested({_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]})

    def apply(params: Params, x: Array, t: Array, cond: Cond = None, *, key: Key | None = None) -> Array:
        graph, tree, shapes, _ = structure()
        leaves = _leaves(params)
        _check(leaves, shapes)
        module = nnx.merge(graph, jax.tree_util.tree_unflatten(tree, [leaves[path] for path in shapes]))
        return module(x, t, cond, key=key)

    return Net(jax.jit(init), apply)


def count(params: Params) -> int:
    """The number of scalars in a tree of arrays, or of the `ShapeDtypeStruct`s that `jax.eval_shape` gives.

    >>> count({"a": jax.ShapeDtypeStruct((2, 3), "float32"), "b": {"c": jax.ShapeDtypeStruct((), "float32")}})
    7
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree_util.tree_leaves(params))


def _structure(make: Callable[[nnx.Rngs], nnx.Module]) -> _Structure:
    seen = []

    def abstract(key: Key) -> Any:
        rngs = OneDraw(key, 0)
        graph, state = _split(make(rngs))
        seen.append((graph, rngs.pool.used))
        return state

    state = jax.eval_shape(abstract, jax.eval_shape(lambda: jax.random.key(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    graph, uniforms = seen[0]
    return _Structure(graph, tree, {_path(path): leaf.shape for path, leaf in leaves}, uniforms)


def _split(module: nnx.Module) -> tuple[Any, Any]:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree_util.tree_leaves(rest):
        names = [".".join(_path(path)) for path, _ in jax.tree_util.tree_flatten_with_path(rest)[0]]
        raise ValueError(f"{type(module).__name__} holds state that is not nnx.Param: {', '.join(names)}")
    return graph, state


def _path(path: tuple[Any, ...]) -> Path:
    """The names on a key path of `nnx.State`; the last entry, the attribute of the Param, is left out."""
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _leaves(params: Params, prefix: Path = ()) -> dict[Path, Any]:
    if not isinstance(params, Mapping):
        return {prefix: params}
    return {path: leaf for name, sub in params.items() for path, leaf in _leaves(sub, (*prefix, name)).items()}


def _nested(leaves: dict[Path, Any]) -> Params:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


def _check(leaves: dict[Path, Any], shapes: dict[Path, tuple[int, ...]]) -> None:
    for path in [*shapes, *leaves]:
        given = tuple(leaves[path].shape) if path in leaves else "absent"
        wanted = shapes.get(path, "absent")
        if given != wanted:
            raise ValueError(f"parameter {'.'.join(path)}: the module has {wanted}, the given params {given}")
