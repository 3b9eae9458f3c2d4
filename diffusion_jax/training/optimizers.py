r"""Optimizers and learning rates, on Optax: what changes the parameters in a step.

With n the number of updates made before this one, every rate warms up linearly over `warmup` updates,

    rate(n) = peak min((n + 1) / warmup, 1) f(n)                                                            (1)
    f = 1                                            constant
    f = e + (1 - e) (1 + cos(pi u)) / 2              cosine, u from 0 at the end of the warm-up to 1 at `steps`
    f = 1 / sqrt(max(n / t_ref, 1))                  inverse square root

Muon moves a matrix along the orthogonal factor of its momentum. M -> U V^T for M = U S V^T is approached by

    X_0 = M / |M|_F,   X_{k+1} = a X_k + (b A + c A^2) X_k,   A = X_k X_k^T                                 (2)

which maps each singular value s to a s + b s^3 + c s^5. Schedule-free AdamW takes gradients between an iterate z and
an average x of all iterates so far,

    y = (1 - beta_1) z + beta_1 x,   z <- z - rate (g(y) / sqrt(v) + decay y),   x <- (1 - c) x + c z       (3)

c being the share of this step's squared rate in their sum: x needs no falling rate. `params` of a train state are y.

Parameters, gradients and sums are float32 here, and a network casts parameters where it uses them. Parameters in
bfloat16 with a float32 master copy among the optimizer's state would be the same numbers held differently: 2 + 4 bytes
for each parameter instead of 4, as the cast fuses into its use. What does shrink the state is `mu_dtype=jnp.bfloat16`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.training.state import dotted
from diffusion_jax.typing import Array, InputError, Params

Rate = Callable[[Any], Array]
"""n: i32[] -> f32[], the learning rate of the update after n others."""
Decays = Callable[[str, Array], bool]
"""(dotted path, parameter) -> whether weight decay acts on it."""
Optimizer = optax.GradientTransformation

QUINTIC = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of (2) by Jordan et al. 2024: five steps take singular values from 0.002 to 1 to between 0.68 and 1.21."""

STACK = 2**24
"""Numbers in a stack of matrices that Muon orthogonalizes together: large products, and small temporary arrays."""


# Learning rates ------------------------------------------------------------------------------------------------------


def constant(peak: float, warmup: int = 0) -> Rate:
    """Equation (1) with f = 1.

    >>> [round(float(constant(1.0, warmup=4)(jnp.int32(n))), 2) for n in (0, 1, 3, 100)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return lambda n: _warm(n, warmup) * peak


def cosine(peak: float, steps: int, warmup: int = 0, end: float = 0.0) -> Rate:
    """Equation (1) with half a cosine from `peak` at the end of the warm-up to `end` at `steps`, and `end` after that.

    Loshchilov and Hutter 2017, arXiv:1608.03983, equation (5), without restarts. InputError if steps <= warmup.
    """
    if steps <= warmup:
        raise InputError(f"cosine: a warm-up of {warmup} does not fit in {steps} steps")

    def rate(n: Array) -> Array:
        u = jnp.clip((_float(n) - warmup) / (steps - warmup), 0.0, 1.0)
        return _warm(n, warmup) * (end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * u)))

    return rate


def inverse_sqrt(peak: float, t_ref: float, warmup: int = 0) -> Rate:
    """peak / sqrt(max(n / t_ref, 1)), warmed up: Karras et al. 2024, arXiv:2312.02696, equation (67).

    >>> [round(float(inverse_sqrt(1.0, 100.0)(jnp.int32(n))), 2) for n in (0, 100, 400)]
    [1.0, 1.0, 0.5]
    """
    return lambda n: _warm(n, warmup) * peak * jax.lax.rsqrt(jnp.maximum(_float(n) / t_ref, 1.0))


# Optimizers ----------------------------------------------------------------------------------------------------------


def matrices(path: str, leaf: Array) -> bool:
    """Dense and convolution kernels: no biases, no scales, no tables of embeddings, no learned tokens.

    >>> [matrices(p, jnp.ones(s)) for p, s in (("a.kernel", (2, 3)), ("a.bias", (3,)), ("y.embedding", (9, 3)))]
    [True, False, False]
    """
    return leaf.ndim >= 2 and not re.search("bias|scale|norm|embed|token", path.rpartition(".")[2])


def adamw(
    rate: Rate | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Decays = matrices,
    mu_dtype: Any = None,
) -> Optimizer:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.

    Only parameters for which `decays` is true shrink. `mu_dtype` is that of the first moment, float32 by default.
    """
    mask = partial(_mask, decays)
    return _promoting(optax.adamw(rate, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=mask))


def muon(
    rate: Rate | float,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    fused: Mapping[str, int] | None = None,
    rms: float | None = None,
    iterations: int = 5,
    dtype: Any = jnp.bfloat16,
    adam: Optimizer | None = None,
    orthogonal: Decays = matrices,
) -> Optimizer:
    """Muon for matrices, Adam for the rest: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), by equation (2).

    Kernels, for which `orthogonal` is true, are matrices [all other axes, out]. fused: regular expression -> how many
    matrices lie side by side in a kernel [in, parts x out] or [in, parts, *out], as {r"qkv\\.kernel$": 3}; InputError
    if it does not divide.
    A matrix moves by rate sqrt(max(1, out / in)) U V^T with Nesterov momentum or, given `rms`, by rate rms
    sqrt(max(in, out)) U V^T, whose entries are as large as Adam's: 0.2 lets both share a rate (Liu et al. 2025,
    arXiv:2502.16982, equation (4)). dtype: of the products in (2). adam: for the rest, by default
    `adamw(rate, b1=0.9, b2=0.95, eps=1e-10)`, whose rate should be far below Muon's unless `rms` is given.
    """
    shrink = optax.add_decayed_weights(weight_decay, partial(_mask, orthogonal))
    spectral = optax.chain(
        _scale_by_muon(momentum, dict(fused or {}), rms, iterations, dtype), shrink, optax.scale_by_learning_rate(rate)
    )
    rest = adamw(rate, b1=0.9, b2=0.95, eps=1e-10) if adam is None else adam

    def labels(params: Params) -> Any:
        return jax.tree.map(lambda matrix: "muon" if matrix else "adam", _mask(orthogonal, params))

    return _promoting(optax.partition({"muon": spectral, "adam": rest}, labels))


def schedule_free_adamw(
    rate: Rate | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Decays = matrices,
) -> Optimizer:
    """AdamW without a schedule, by equation (3): Defazio et al. 2024, arXiv:2405.15682, algorithm 1.

    `rate` should be constant after its warm-up. What is to be evaluated and drawn from is x: an experiment with
    `ema=()` does so, and keeps no other average.
    """

    def at(n: Any) -> Array:
        return rate(n) if callable(rate) else jnp.full((), rate, jnp.float32)

    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, partial(_mask, decays)),
        optax.scale_by_learning_rate(at),
    )
    # Optax counts the averages from 1 and the steps from 0: both take the same rate here, as in the paper.
    return _promoting(optax.contrib.schedule_free(base, learning_rate=lambda n: at(n - 1), b1=b1))


def clip(optimizer: Optimizer, norm: float) -> Optimizer:
    """The optimizer on gradients whose norm, over all parameters together, is at most `norm`."""

    def shrink(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        # One product for each gradient: it fuses into what comes next, where Optax's quotient makes a copy of them all.
        scale = jnp.minimum(1.0, norm / (optax.global_norm(updates) + 1e-30))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.chain(Optimizer(optax.init_empty_state, shrink), optimizer)


def projected(optimizer: Optimizer, project: Callable[[Params], Params]) -> Optimizer:
    """The optimizer followed by a projection of the parameters: params <- project(params + updates), to rounding.

    For example the forced weight normalization of Karras et al. 2024, arXiv:2312.02696, section 2.3.
    """

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        if params is None:
            raise ValueError("projected: update needs the parameters")
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(jnp.subtract, project(optax.apply_updates(params, updates)), params), state

    return Optimizer(optimizer.init, update)


# Muon's parts --------------------------------------------------------------------------------------------------------


class MuonState(NamedTuple):
    """mu: the running mean of the gradients, fp32."""

    mu: Params


def orthogonalized(m: Array, iterations: int = 5, dtype: Any = jnp.float32) -> Array:
    """About U V^T of every matrix in `f32[... in out]`, by `iterations` steps of equation (2) in `dtype`."""
    return _iterated(_started(m, dtype), iterations).astype(m.dtype)


def _started(m: Array, dtype: Any) -> Array:
    """X_0 of (2)."""
    return (m / (jnp.linalg.norm(m, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)


def _iterated(x: Array, iterations: int) -> Array:
    """X_k of (2), by the smaller of the two Gram matrices."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    for _ in range(iterations):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _scale_by_muon(momentum: float, fused: dict[str, int], rms: float | None, iterations: int, dtype: Any) -> Optimizer:
    def init(params: Params) -> MuonState:
        jax.tree_util.tree_map_with_path(lambda path, leaf: _stacked(dotted(path), leaf.shape, fused), params)
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, MuonState]:
        mu = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state.mu, updates)
        ahead = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mu, updates)
        leaves, tree = jax.tree_util.tree_flatten_with_path(ahead)
        shapes = [_stacked(dotted(path), leaf.shape, fused) for path, leaf in leaves]
        stacks = [jnp.swapaxes(jnp.reshape(leaf, s), 0, 1) for s, (_, leaf) in zip(shapes, leaves, strict=True)]
        factors = _together([_started(stack, dtype) for stack in stacks], partial(_iterated, iterations=iterations))
        moves = [jnp.swapaxes(_scaled(o.astype(jnp.float32), rms), 0, 1) for o in factors]
        moves = [jnp.reshape(move, leaf.shape) for move, (_, leaf) in zip(moves, leaves, strict=True)]
        return jax.tree.unflatten(tree, moves), MuonState(mu)

    return Optimizer(init, update)


def _stacked(path: str, shape: tuple[int, ...], fused: dict[str, int]) -> tuple[int, int, int]:
    """The shape [in, parts, out] of a kernel: parts matrices [in, out]."""
    parts = next((n for pattern, n in fused.items() if re.search(pattern, path)), None)
    if parts is None:
        return math.prod(shape[:-1]), 1, shape[-1]
    while len(shape) > 2 and shape[0] == 1:  # a convolution over one pixel
        shape = shape[1:]
    if math.prod(shape[1:]) % parts:
        raise InputError(f"muon: {path} of shape {shape} does not divide into {parts} fused parts")
    return math.prod(shape[:1]), parts, math.prod(shape[1:]) // parts


def _together(stacks: list[Array], function: Callable[[Array], Array]) -> list[Array]:
    """The function of each stack of matrices; some of one shape go through it together, for few and large products."""
    out = list(stacks)
    for members in _groups([stack.shape for stack in stacks]):
        done = function(jnp.concatenate([stacks[i] for i in members]))
        start = 0
        for i in members:
            out[i] = done[start : start + len(stacks[i])]
            start += len(stacks[i])
    return out


def _groups(shapes: list[tuple[int, ...]]) -> list[list[int]]:
    """The places of stacks of matrices of one shape, up to `STACK` numbers (or one stack) at a time."""
    groups: list[list[int]] = []
    fullness: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    for i, shape in enumerate(shapes):
        size, group = fullness.get(shape[1:], (STACK, []))
        if size + math.prod(shape) > STACK:
            size, group = 0, []
            groups.append(group)
        group.append(i)
        fullness[shape[1:]] = (size + math.prod(shape), group)
    return groups


def _scaled(o: Array, rms: float | None) -> Array:
    rows, columns = o.shape[-2:]
    return o * (max(1.0, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5)


def _mask(rule: Decays, params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: rule(dotted(path), leaf), params)


def _warm(n: Array, warmup: int) -> Array:
    return jnp.minimum((_float(n) + 1) / max(warmup, 1), 1.0)


def _float(n: Array) -> Array:
    return jnp.asarray(n).astype(jnp.float32)


def _promoting(optimizer: optax.GradientTransformation) -> Optimizer:
    """The same under JAX's standard promotion of types, which Optax relies on."""

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return Optimizer(optimizer.init, update)
