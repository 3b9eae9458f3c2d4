r"""The training step: a pure function (state, batch) -> (state, metrics).

Nothing here knows of devices, files or progress: a notebook can jit `make_train_step` and call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.denoisers import BoundNet
from diffusion_jax.ops import fold, normal_like
from diffusion_jax.times import Draw
from diffusion_jax.training.data import Prepare, gather
from diffusion_jax.training.data import prepare as to_x0
from diffusion_jax.training.ema import Decays, several, update
from diffusion_jax.training.state import TrainState
from diffusion_jax.typing import Array, Cond, Denoiser, Key, Net, Params, Schedule

Batch = Mapping[str, Array]
LossFn = Callable[..., Array]
"""(params, batch, key) -> f32[], the mean loss of a batch; a staged one also takes `step`."""
Objective = Callable[..., Array]
"""(key, denoiser, x0: f32[b *d], cond) -> f32[b], the loss of each example; a staged one also takes `step`."""
Loss = Callable[[Denoiser, Schedule, Array, Array, Array, Cond], Array]
"""(denoiser, schedule, x0, t, eps, cond) -> f32[b]."""
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    decays: Decays,
    accumulate: int = 1,
    *,
    staged: bool = False,
) -> TrainStep:
    """One update: gradients, optimizer, moving averages. Metrics: loss and grad_norm, f32[].

    The step draws from fold_in(state.key, state.step). With `accumulate` > 1 the batch is cut into that many parts
    whose gradients are averaged, for a batch that does not fit in memory; ValueError if it does not divide. Under
    `jit` with `mesh.state_shardings` gradients and their sums lie as the parameters do. A `staged` loss changes as the
    run goes on: it is called with the keyword step, i32[], the number of updates made before this one.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        of_step = partial(loss_fn, step=state.step) if staged else loss_fn
        if accumulate == 1:
            loss, grads = jax.value_and_grad(of_step)(state.params, batch, key)
        else:
            loss, grads = _accumulated(of_step, state.params, batch, key, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        pairs = zip(state.averages, several(decays), strict=True)
        averages = tuple(update(average, params, decay(state.step)) for average, decay in pairs)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, params, averages, opt_state, state.key), metrics

    return step


def make_objective(schedule: Schedule, draw: Draw, loss: Loss) -> Objective:
    """The objective of a run: times from `draw`, standard normal noise, and a loss of `diffusion_jax.losses`.

    loss: (denoiser, schedule, x0, t, eps, cond) -> f32[b], for example `partial(denoising_loss, target="v")`.
    """

    def objective(key: Key, denoiser: Denoiser, x0: Array, cond: Cond) -> Array:
        t = draw(fold(key, 0), x0.shape[0])
        return loss(denoiser, schedule, x0, t, normal_like(fold(key, 1), x0), cond)

    return objective


def make_loss_fn(
    net: Net,
    read: Callable[[BoundNet], Denoiser],
    objective: Objective,
    *,
    null: Cond = None,
    drop: float = 0.0,
    flip: bool = False,
    prepare: Prepare = to_x0,
    train: bool = True,
) -> LossFn:
    """The loss of a batch {"image": u8[b,h,w,c], "label": i32[b]} of pictures, or of whatever `prepare` makes x0 of.

    `read` turns the bound network into a denoiser. By default pictures are scaled to [-1, 1] and, with `flip`,
    mirrored at random. The condition is the batch's "cond", any tree of arrays that lead with [b], if it has one;
    otherwise its "label" if `null` is given. With `null`, whose leaves broadcast to those of the condition, the whole
    condition of an example is replaced by it with probability `drop`, which trains the unconditional model for
    guidance. `train=False` turns off dropout, flips and dropping. A step is handed on to a staged objective.
    ValueError for a `null` of another structure.
    """

    def loss_fn(params: Params, batch: Batch, key: Key, **step: Array) -> Array:
        k_flip, k_drop, k_net, k_loss = (fold(key, i) for i in range(4))
        x0 = prepare(batch["image"], k_flip, flip and train)
        cond = batch.get("cond") if null is None else batch["cond" if "cond" in batch else "label"]
        if null is not None and drop and train:
            cond = _dropped(k_drop, cond, null, drop)
        denoiser = read(partial(net.apply, params, key=k_net if train else None))
        return jnp.mean(objective(k_loss, denoiser, x0, cond, **step))

    return loss_fn


def make_dispatch(step: TrainStep) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Several steps in one program: (state, resident, batches, n) -> (state, metrics).

    batches: leaves [k, b, ...]; the first n: i32[] <= k of them are used, n being traced, so that one compilation
    serves any number. With resident arrays batches is {"index": i32[k, b]} into them. Metrics are f32[k], NaN past n.
    """

    def dispatch(
        state: TrainState, resident: Batch | None, batches: Batch, n: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        def one(i: Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, rows = carry
            batch = jax.tree.map(lambda leaf: leaf[i], dict(batches))
            state, metrics = step(state, batch if resident is None else gather(resident, batch["index"]))
            return state, jax.tree.map(lambda row, value: row.at[i].set(value), rows, metrics)

        k = jax.tree.leaves(dict(batches))[0].shape[0]
        rows = {"loss": jnp.full((k,), jnp.nan), "grad_norm": jnp.full((k,), jnp.nan)}
        if k == 1:
            return one(jnp.zeros((), jnp.int32), (state, rows))
        return jax.lax.fori_loop(0, n, one, (state, rows))

    return dispatch


def _dropped(key: Key, cond: Cond, null: Cond, drop: float) -> Cond:
    """The condition, that of each example replaced by `null` as a whole with probability `drop`."""
    if jax.tree.structure(null) != jax.tree.structure(cond):
        raise ValueError(f"the condition is {jax.tree.structure(cond)}, null is {jax.tree.structure(null)}")
    gone = jax.random.bernoulli(key, drop, jax.tree.leaves(cond)[0].shape[:1])

    def one(c: Array, value: Any) -> Array:
        chosen = jnp.reshape(gone, (-1,) + (1,) * (c.ndim - 1))
        return jnp.where(chosen, jnp.broadcast_to(jnp.asarray(value, c.dtype), c.shape), c)

    return jax.tree.map(one, cond, null)


def _accumulated(loss_fn: LossFn, params: Params, batch: Batch, key: Key, parts: int) -> tuple[Array, Params]:
    def cut(leaf: Array) -> Array:
        if leaf.shape[0] % parts:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide into {parts} parts")
        # Part i takes every parts-th example: each device keeps its own rows of a sharded batch.
        return jnp.swapaxes(jnp.reshape(leaf, (leaf.shape[0] // parts, parts, *leaf.shape[1:])), 0, 1)

    def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        i, rows = part
        new = jax.value_and_grad(loss_fn)(params, rows, fold(key, i))
        return jax.tree.map(jnp.add, total, new), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), jax.tree.map(cut, dict(batch))))
    return jax.tree.map(lambda leaf: leaf / parts, total)
