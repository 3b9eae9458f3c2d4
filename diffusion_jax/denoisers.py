r"""Networks become denoisers here: parameterization, network time, preconditioning, another schedule.

A bound network is `(x, t, cond) -> f32[b *d']`, for example `partial(net.apply, params)`.

EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1), for data of standard deviation
sigma_data, with sigma = sigma_t / alpha_t and x / alpha_t so that any schedule can be used:

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)                                        (1)
    c_skip = sd^2 / (sigma^2 + sd^2)          c_out   = sigma sd / sqrt(sigma^2 + sd^2)
    c_in   = 1 / sqrt(sigma^2 + sd^2)         c_noise = log(sigma) / 4

x_t / norm(alpha, sigma) depends on the log SNR alone (Karras et al. 2022, section 2; Kingma et al. 2021,
arXiv:2107.00630, section 5.1): a denoiser of one schedule is one of any other, at the time tau of the same log SNR,

    D(x, t) = D_trained(c x, tau),   c = norm(alpha_tau, sigma_tau) / norm(alpha_t, sigma_t)  (2)
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.ops import bcast
from diffusion_jax.predictions import FROM, Predicts, from_x0, lookup
from diffusion_jax.schedules import inverse_logsnr, logsnr
from diffusion_jax.typing import Array, Cond, Denoiser, Prediction, Schedule

BoundNet = Callable[[Array, Array, Cond], Array]


def parameterize(
    net: BoundNet,
    schedule: Schedule,
    predicts: Predicts,
    time: Callable[[Array], Array] | None = None,
    learned_variance: bool = False,
) -> Denoiser:
    """A denoiser from a bound network that predicts x0, eps, the score, v or the velocity.

    `time` maps t to what the network was trained on, see `discrete_time`; None feeds t. With `learned_variance` the
    last axis of the output is twice that of x and its second half, in [-1, 1], becomes the variance fraction
    (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1). ValueError for an unknown name or another output shape.
    """
    convert = lookup(FROM, predicts)

    def denoiser(x: Array, t: Array, cond: Cond = None) -> Prediction:
        out = net(x, t if time is None else time(t), cond)
        fraction = None
        if learned_variance:
            out, logits = jnp.split(out, 2, axis=-1)
            fraction = (logits + 1) / 2
        if out.shape != x.shape:
            raise ValueError(f"parameterize: the network returned {out.shape} for x of shape {x.shape}")
        return convert(schedule, x, t, out)._replace(variance_fraction=fraction)

    return denoiser


def edm_precondition(net: BoundNet, schedule: Schedule, sigma_data: float = 0.5, uncertainty: bool = False) -> Denoiser:
    """A denoiser from a bound network F in EDM's preconditioning, eq. (1).

    With `uncertainty` the last channel of F, constant over the pixels, is u(t) of `uncertainty_loss`.
    """

    def denoiser(x: Array, t: Array, cond: Cond = None) -> Prediction:
        alpha, sigma = schedule(t)
        norm = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)  # alpha times that of (1)
        out, u = net(bcast(1 / norm, x) * x, jnp.log(sigma / alpha) / 4, cond), None
        if uncertainty:
            out, u = out[..., :-1], jnp.reshape(out[..., -1], (x.shape[0], -1))[:, 0]
        skip = alpha * (sigma_data / norm) ** 2
        x0 = bcast(skip, x) * x + bcast(sigma * sigma_data / norm, x) * out
        return from_x0(schedule, x, t, x0)._replace(uncertainty=u)

    return denoiser


def reschedule(
    denoiser: Denoiser, trained: Schedule, schedule: Schedule, low: float = 0.0, high: float = 1.0
) -> Denoiser:
    """A denoiser for `schedule` from one for the schedule `trained`, eq. (2); [low, high] is the trained one's time.

    Exact where the log SNR is reached there. Beyond, the nearer end is asked, its x0 is kept and eps made consistent.
    A learned reverse variance is dropped: its bounds belong to the schedule.
    """

    def moved(x: Array, t: Array, cond: Cond = None) -> Prediction:
        value = logsnr(schedule, t)
        tau = inverse_logsnr(trained, value, low, high)
        c = jnp.hypot(*trained(tau)) / jnp.hypot(*schedule(t))
        p = denoiser(bcast(c, x) * x, tau, cond)
        reached, beyond = jnp.abs(logsnr(trained, tau) - value) < 1e-2, from_x0(schedule, x, t, p.x0).eps
        return Prediction(p.x0, jnp.where(bcast(reached, x).astype(bool), p.eps, beyond))

    return moved


def discrete_time(table: int = 1000) -> Callable[[Array], Array]:
    """Network time of a model trained on indices 0..T-1: t -> T t - 1.

    >>> float(discrete_time(1000)(jnp.float32(1.0)))
    999.0
    """
    return lambda t: table * t - 1
