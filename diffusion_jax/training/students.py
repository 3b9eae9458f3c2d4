r"""Students of one or two steps that go on with a trained denoiser's network.

A denoiser D in EDM's preconditioning is the identity at sigma = 0, as a consistency function f has to be. Easy
consistency tuning (Geng et al. 2024, arXiv:2406.14548) therefore goes on from D itself, with

    f(x_t, t) against sg f(x_r, r),   r = `easy_mapping`(t, stage),   weight 1 / (t - r)                        (1)

and stage = floor(stages * step / steps): at the first one r is near 0 and (1) the denoising loss, at each further one
t - r is halved.

An average velocity is learned in the angle a = atan(sigma / spread), in which the data and the velocity have the same
size at all noise levels (Lu & Song 2024, arXiv:2410.11081, section 3),

    z_a = cos(a) x0 + spread sin(a) eps,   dz/da = spread cos(a) eps - sin(a) x0,   x_sigma = z_a / cos(a)      (2)
    u(z, a, b) = spread cos(a) eps' - sin(a) x0'                                                                (3)

where x0' is what the network says at z / cos(a) and sigma = spread tan(a) when it is told of a - b as well, as the
vector (cos 2k(a - b), sin 2k(a - b)), k = 1 ... n, and eps' is consistent with x0'. The last layer that the vector
goes through starts at zero, so that (3) begins as the velocity of the teacher's flow, whatever b.
MeanFlow (Geng et al. 2025, arXiv:2505.13447) then teaches it that u + (a - b) du/da = dz/da. That derivative is taken
through the network's features of log(sigma), whose rate in a is 1 / (sin(a) cos(a)) of theirs: where those turn fast,
as they do in a teacher that is told 250 log(sigma) / 4, the target may be mostly the network's own noise (it did not
converge on small Gaussians here; which of its parts is to blame was not isolated). The difference

    u(z_a, a, b) against sg(p v + (1 - p) u(z_m, m, b)),   m = a - p (a - b),   v = (z_a - z_m) / (a - m)         (4)

of the same x0 and eps, weight 1 / p, is exact in the exact flow for every p in (0, 1], becomes MeanFlow as p -> 0, and
is a contraction: alpha-Flow (Zhang et al. 2025, arXiv:2510.20771), whose alpha is p. Here p = 2^-stage, as in (1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import BoundNet
from diffusion_jax.distill import (
    AverageVelocity,
    Metric,
    average_velocity_map,
    consistency_training_loss,
    easy_mapping,
    pseudo_huber,
)
from diffusion_jax.forward import q_sample
from diffusion_jax.ops import bcast, fold, normal_like
from diffusion_jax.predictions import from_x0, to_velocity
from diffusion_jax.times import Draw
from diffusion_jax.training.step import Objective
from diffusion_jax.typing import (
    AlphaSigma,
    Array,
    Cond,
    Denoiser,
    FlowMap,
    InputError,
    Key,
    Net,
    Params,
    Prediction,
    Schedule,
)

HARMONICS = 8
"""n of equation (3); the vector has twice as many entries."""
AngleLoss = Callable[..., Array]
"""(average velocity, schedule, x0, t, s, eps, cond) -> f32[b]: `mean_flow_loss` and its like."""


def easy_consistency(
    schedule: Schedule,
    draw: Draw,
    steps: int,
    stages: int = 8,
    *,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    c: float | None = None,
) -> Objective:
    """Equation (1) as a staged objective; where no step is given, at the last stage. `c`: of `pseudo_huber`.

    A run of `steps` updates ends with t - r = t (1 + k sigmoid(-b t)) / q^stages. The schedule is `edm` in another name
    if its times are noise levels.
    """
    metric = pseudo_huber(c)

    def objective(key: Key, denoiser: Denoiser, x0: Array, cond: Cond, step: Array | None = None) -> Array:
        stage = stages - 1 if step is None else jnp.minimum(step * stages // steps, stages - 1)
        t = draw(fold(key, 0), x0.shape[0])
        r = easy_mapping(t, stage, q, k, b)
        eps = normal_like(fold(key, 1), x0)
        return consistency_training_loss(denoiser, schedule, x0, t, r, eps, cond, metric=metric) / (t - r)

    return objective


def angular(spread: float) -> Schedule:
    """The schedule of equation (2): a in [0, pi / 2] -> (cos(a), spread sin(a))."""
    return lambda t: AlphaSigma(jnp.cos(t), spread * jnp.sin(t))


def to_angle(sigma: Array, spread: float) -> Array:
    """The angle of a noise level, equation (2)."""
    return jnp.arctan(sigma / spread)


def draw_angles(draw: Draw, spread: float, apart: float = 0.75, whole: float = 0.5) -> Callable[[Key, int], Any]:
    """Two angles a >= b of noise levels from `draw`, (key, n) -> two f32[n]; a share 1 - `apart` has b = a.

    Of the others a share `whole` has b = 0: the jump of a sample's last step, or of its only one.
    """

    def draw_both(key: Key, n: int) -> tuple[Array, Array]:
        one, two, three = (fold(key, i) for i in range(3))
        first, second = (to_angle(draw(k, n), spread) for k in (one, two))
        chance, a = jax.random.uniform(three, (n,)), jnp.maximum(first, second)
        b = jnp.where(chance < apart * whole, jnp.zeros_like(a), jnp.minimum(first, second))
        return a, jnp.where(chance < apart, b, a)

    return draw_both


def two_time_denoiser(read: Callable[[BoundNet], Denoiser], spread: float) -> Callable[[BoundNet], Denoiser]:
    """The teacher's `read` in the angles of equation (2), for a network that takes the vector of (3) too.

    cond is (what the teacher takes, b: f32[n]), or without b what the teacher takes alone: then b = a, and the denoiser
    is an ordinary one, that of the flow. `read` is of the schedule `edm`.
    """
    schedule = angular(spread)

    def read_angles(net: BoundNet) -> Denoiser:
        inner = read(net)

        def denoiser(x: Array, t: Array, cond: Cond = None) -> Prediction:
            label, end = cond if isinstance(cond, tuple) else (cond, t)
            given = {"vector": harmonics(t - end)} | ({} if label is None else {"label": label})
            alpha = jnp.cos(t)
            return from_x0(schedule, x, t, inner(x / bcast(alpha, x), spread * jnp.tan(t), given).x0)

        return denoiser

    return read_angles


def harmonics(distance: Array, n: int = HARMONICS) -> Array:
    """The vector of equation (3): f32[b] -> f32[b, 2 n]."""
    angles = 2 * distance[:, None] * jnp.arange(1, n + 1, dtype=distance.dtype)[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def average_velocity(denoiser: Denoiser, schedule: Schedule) -> AverageVelocity:
    """Equation (3): (z, a, b, cond) -> u, from a denoiser that takes (cond, b)."""
    return lambda x, t, s, cond=None: to_velocity(schedule, denoiser(x, t, (cond, s)), t)


def flow_map_of(schedule: Schedule) -> Callable[[Denoiser], FlowMap]:
    """What `Experiment.flow_map` is for these models: z_b = z_a + (b - a) u(z_a, a, b)."""
    return lambda denoiser: average_velocity_map(average_velocity(denoiser, schedule))


def mean_flow(schedule: Schedule, draw: Callable[[Key, int], tuple[Array, Array]], loss: AngleLoss) -> Objective:
    """The objective of an average velocity: two times from `draw`, and a loss such as `mean_flow_loss`."""

    def objective(key: Key, denoiser: Denoiser, x0: Array, cond: Cond) -> Array:
        t, s = draw(fold(key, 0), x0.shape[0])
        velocity = average_velocity(denoiser, schedule)
        return loss(velocity, schedule, x0, t, s, normal_like(fold(key, 1), x0), cond)

    return objective


def alpha_flow(
    schedule: Schedule, draw: Callable[[Key, int], tuple[Array, Array]], steps: int, stages: int, metric: Metric
) -> Objective:
    """Equation (4) as a staged objective with p = 2^-stage; where no step is given, at the last stage.

    Pairs of the two times are from `draw`; where they are the same, u is compared with the pair's velocity.
    """

    def objective(key: Key, denoiser: Denoiser, x0: Array, cond: Cond, step: Array | None = None) -> Array:
        stage = stages - 1 if step is None else jnp.minimum(step * stages // steps, stages - 1)
        t, s = draw(fold(key, 0), x0.shape[0])
        eps = normal_like(fold(key, 1), x0)
        p = jnp.where(t > s, jnp.exp2(-jnp.asarray(stage, jnp.float32)), 1.0)
        x, end = (q_sample(schedule, x0, time, eps) for time in (t, s))
        # Where p = 1 the inner time is s, which may be 0: there the network is asked at t instead, and not heard.
        m = jnp.where(p < 1, t - p * (t - s), t)
        x_m = q_sample(schedule, x0, m, eps)
        secant = (x - jnp.where(bcast(p, x) < 1, x_m, end)) / bcast(jnp.where(t > s, p * (t - s), 1), x)
        v = jnp.where(bcast(t, x) > bcast(s, x), secant, to_velocity(schedule, Prediction(x0, eps), t))
        velocity = average_velocity(denoiser, schedule)
        target = bcast(p, x) * v + bcast(1 - p, x) * velocity(x_m, m, s, cond)
        return metric(velocity(x, t, s, cond) - jax.lax.stop_gradient(target)) / p

    return objective


def silent_vector(net: Net) -> Net:
    """The same network, whose vector changes nothing at first: the last layer it goes through starts at zero.

    InputError for a network that takes no vector.
    """

    def init(key: Key) -> Params:
        params = net.init(key)
        if "vector_embedding" not in params:
            raise InputError("a model of two times needs a network that takes a vector")
        embedding = params["vector_embedding"]
        return params | {
            "vector_embedding": embedding | {"linear_2": jax.tree.map(jnp.zeros_like, embedding["linear_2"])}
        }

    return Net(init, net.apply)


def with_vector(net: Net, params: Params, key: Key) -> Params:
    """A teacher's parameters, and those of the vector that `net` takes besides. InputError if more are missing."""
    fresh = jax.jit(partial(net.init))(key)
    added = set(fresh) - set(params)
    if added != {"vector_embedding"}:
        raise InputError(f"the network differs from the teacher's by {', '.join(sorted(added)) or 'nothing'}")
    return params | {"vector_embedding": fresh["vector_embedding"]}
