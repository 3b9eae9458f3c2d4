r"""Exponential integrators in the log signal-to-noise ratio: their mathematics, and the multistep ones.

With lambda = log(alpha / sigma), rising along a trajectory, and a noise level tau >= 0, the equations with the
marginals of x = alpha x0 + sigma eps are, for the data prediction x0 and for the noise prediction eps,

    d(x / sigma) = ((1 + tau^2) e^lambda x0 - tau^2 x / sigma) dlambda + sqrt(2) tau dw                         (1)
    d(x / alpha) = -(1 + tau^2) e^-lambda eps dlambda + sqrt(2) tau e^-lambda dw                                (2)

tau = 0 is the probability flow and tau = 1 the reverse of the forward process (Xue et al. 2023, arXiv:2309.05019;
Lu et al. 2022, arXiv:2211.01095). Both are linear but for the prediction. With tau constant from t to s,
h = lambda_s - lambda_t, theta = (lambda - lambda_t) / h in [0, 1] and n standard normal, their solutions are

    x_s = alpha_s x0_t + sigma_s e^(-tau^2 h) eps_t
          + alpha_s z int_0^1 e^(-z (1 - theta)) (x0 - x0_t) dtheta + sigma_s sqrt(1 - e^(-2 tau^2 h)) n,
          z = (1 + tau^2) h                                                                                     (3)
    x_s = alpha_s x0_t + sigma_s (1 - tau^2 (e^h - 1)) eps_t
          + (1 + tau^2) sigma_s z int_0^1 e^(-z (1 - theta)) (eps - eps_t) dtheta + tau sigma_s sqrt(e^(2h) - 1) n,
          z = -h                                                                                                (4)

where x0_t and eps_t are the predictions at t. Nothing in (3) overflows. Without the integral it is DDIM, with eta = 0
for tau = 0 and eta = 1 for tau = 1. A method puts a polynomial in theta for the difference v - v_t, v being x0 or eps:

    v - v_t = sum_j l_j(theta) (v_j - v_t),   integral = sum_j w_j (v_j - v_t)                                  (5)
    psi_k = z int_0^1 e^(-z (1 - theta)) theta^k dtheta = 1 - (k / z) psi_(k-1),   psi_0 = 1 - e^-z             (6)

where l_j are Lagrange's polynomials, with a node at t and others at r_j, and w_j combinations of the psi_k. With one
difference only, w = psi_1 / r, and for psi_1 published methods have one of three values, the same to O(z^2):

    psi_1 ("exact"),   z / 2 ("bh1"),   psi_0 / 2 ("bh2")                                                       (7)

A multistep method takes for v_j the predictions of earlier steps, r_j < 0. A corrector adds the node 1, with the
prediction at s, that the next step computes in any case; with w^c the weights on 1, 0, r_1, ... that step begins with

    x_s <- x_s + scale (sum_j w^c_j (v_j - v_t) - sum_j w_j (v_j - v_t))                                        (8)

where `scale` is the factor before z in (3) or (4), and keeps the prediction that it has. Adams-Bashforth methods in
rho = sigma / alpha integrate without a kernel, since scale psi_0 = alpha_s (rho_s - rho_t) in (4):

    w_j = psi_0 int_0^1 l_j(theta) dtheta,   theta = (rho - rho_t) / (rho_s - rho_t)                            (9)

Order: the number of nodes, if there is no noise. With noise, the weak order is at most 2 and the strong order 1, since
what happens inside a step is not resolved; a second node suffices, for the noise that v_j - v_t carries from the step
before then has, to that order, the covariance that the noise of this step lacks. A node is left out, and the order
falls by one, until there are enough steps (the first one is of first order, as published), where the log SNR of the
node is infinite, and where it did not rise, so that a step back to more noise starts anew. A step to sigma_s = 0 is of
first order. The error of the first steps, O(h^2) without and O(h^3) with a corrector, limits the order to 2 and to 3. A
start from almost pure noise hides that: there v changes as alpha_t, or less, and the error has a factor alpha_t^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from diffusion_jax.ops import bcast, is_concrete
from diffusion_jax.samplers.noise import white
from diffusion_jax.schedules import logsnr
from diffusion_jax.typing import Array, Denoise, Key, Noise, Prediction, Sampler, Schedule

Quantity = Literal["x0", "eps"]
Slope = Literal["exact", "bh1", "bh2"]
Tau = float | Array | Callable[[Array], Array]


class Transfer(NamedTuple):
    """The scalars of (3) or (4) from t to s: x_s = x0 x0_t + eps eps_t + scale (integral) + std n.

    `carry` is what a deviation of x_t becomes in x_s. `finite` is False where the log SNR is not, and h is then 1.
    """

    finite: Array
    h: Array
    z: Array
    x0: Array
    eps: Array
    carry: Array
    scale: Array
    std: Array


def transfer(schedule: Schedule, predicts: Quantity, tau: Array, t: Array, s: Array) -> Transfer:
    """The coefficients of eq. (3) if predicts is "x0", of (4) if it is "eps", for scalars t and s < t."""
    (alpha_t, sigma_t), (alpha, sigma) = schedule(t), schedule(s)
    h = (logsnr(schedule, s) - logsnr(schedule, t)) / 2
    finite, square = jnp.isfinite(h), tau**2
    h = jnp.where(finite, h, 1)
    noisy = (square > 0).astype(h.dtype)
    keep = jnp.where(finite, jnp.exp(-square * h), 1 - noisy)
    if predicts == "x0":
        spread = jnp.where(finite, -jnp.expm1(-2 * square * h), noisy)
        carry = sigma * keep / sigma_t
        return Transfer(finite, h, (1 + square) * h, alpha, sigma * keep, carry, alpha, sigma * _root(spread))
    keep = jnp.where(finite, 1 - square * jnp.expm1(h), keep)
    spread = jnp.where(finite, square * jnp.expm1(2 * h), noisy)
    carry = jnp.where(finite, alpha / jnp.where(finite, alpha_t, 1), 0)
    return Transfer(finite, h, -h, alpha, sigma * keep, carry, (1 + square) * sigma, sigma * _root(spread))


def first_order(c: Transfer, p: Prediction) -> Array:
    """The first two terms of eq. (3) or (4): DDIM without its noise, f[b *d]."""
    return bcast(c.x0, p.x0) * p.x0 + bcast(c.eps, p.eps) * p.eps


def draw(noise: Noise, key: Key, x: Array, std: Array, t: Array, s: Array) -> Array:
    """`std` times the noise from t to s, f[b *d]; 0 where std is 0, whatever the noise is there."""
    return jnp.where(bcast(std, x) > 0, bcast(std, x) * noise(key, x, t, s), 0)


def moments(z: Array, n: int) -> Array:
    """psi_0(z) ... psi_(n-1)(z) of eq. (6) for a scalar z: f[n], with no loss of digits at small z.

    >>> [round(float(v), 5) for v in moments(jnp.float32(1e-3), 3) / 1e-3]
    [0.9995, 0.49983, 0.33325]
    """
    table = np.array([[math.factorial(k) / math.factorial(k + m + 1) for m in range(24)] for k in range(n)])
    powers = jnp.power(-z, jnp.arange(24, dtype=z.dtype))
    small = jnp.abs(z) < 2
    large = jnp.where(small, 2, z)
    forward = [-jnp.expm1(-large)]
    for k in range(1, n):
        forward.append(1 - k / large * forward[-1])
    return jnp.where(small, z * jnp.sum(jnp.asarray(table, z.dtype) * powers[None], axis=1), jnp.stack(forward))


def slope_integral(psi: Array, z: Array, slope: Slope) -> Array:
    """One of the values of psi_1 in eq. (7)."""
    return {"exact": psi[1], "bh1": z / 2, "bh2": psi[0] / 2}[slope]


def noise_level(tau: Tau) -> tuple[Callable[[Array], Array], bool]:
    """tau as a function of t, and whether there is noise. ValueError for a negative number."""
    if not callable(tau) and is_concrete(tau) and not tau >= 0:
        raise ValueError(f"tau must not be negative, got {tau}")
    random = callable(tau) or not is_concrete(tau) or bool(tau > 0)
    return lambda t: jnp.asarray(tau(t) if callable(tau) else tau, t.dtype), random


def choice(name: str, value: str, allowed: Any) -> None:
    """ValueError unless `value` is one of the names of the Literal `allowed`."""
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")


def _root(v: Array) -> Array:
    return jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1)), 0)  # with a finite derivative at 0


Rule = Callable[[Array, Array, list[Array], list[Array]], list[Array]]
"""(h, z, distances in lambda from the base node, which of them are valid) -> weights w_j of the differences."""


class History(NamedTuple):
    """v and lambda (-inf where there is none yet) of earlier steps, the latest first, and the time of the latest."""

    values: tuple[Array, ...]
    lam: Array
    t: Array


def multistep(
    schedule: Schedule,
    order: int,
    corrector: int = 0,
    predicts: Quantity = "x0",
    tau: Tau = 0.0,
    rule: Rule | None = None,
    noise: Noise = white,
) -> Sampler:
    """Any multistep method: eq. (5) on `order` nodes, and eq. (8) on `corrector` nodes if that is not 0.

    predicts: v, which is "x0" in eq. (3) or "eps" in (4). tau: a number, or a function of the time t at which a step
    starts. rule: how weights follow from nodes, None is the exact integral. One evaluation a step. ValueError unless
    order is in 1..4, corrector 0 or in 2..5, and tau >= 0.
    """
    if not 1 <= order <= 4 or corrector not in (0, 2, 3, 4, 5):
        raise ValueError(f"order must be in 1..4 and corrector 0 or in 2..5, got {order}, {corrector}")
    choice("predicts", predicts, Quantity)
    level, random = noise_level(tau)
    rule = exponential_rule("exact") if rule is None else rule
    length = max(order - 1, order if corrector else 0, corrector - 1)

    def init(x: Array) -> History:
        return History((jnp.zeros_like(x),) * length, jnp.zeros((length,)) - jnp.inf, jnp.zeros(()))

    def correction(value: Array, t: Array, lam: Array, past: Array, state: History) -> Array:
        """What eq. (8) adds to x_t."""
        before = state.t.astype(t.dtype)
        c = transfer(schedule, predicts, level(before), before, t)
        ok = c.finite & jnp.isfinite(past[0]) & (lam > past[0])
        distances, valid = _usable(past[0], past[1:], ok)
        old = rule(c.h, c.z, distances[: order - 1], valid[: order - 1])
        new = rule(c.h, c.z, [c.h, *distances[: corrector - 2]], [ok, *valid[: corrector - 2]])
        base, *values = state.values
        return _combine(c.scale, new, [value, *values], base) - _combine(c.scale, old, values, base)

    def step(key: Key, x: Array, state: History, t: Array, s: Array, denoise: Denoise) -> tuple[Array, History]:
        p, lam = denoise(x, t), logsnr(schedule, t) / 2
        past, value = state.lam.astype(lam.dtype), getattr(p, predicts)
        c = transfer(schedule, predicts, level(t), t, s)
        w = rule(c.h, c.z, *_usable(lam, past[: order - 1], c.finite))
        y = first_order(c, p) + _combine(c.scale, w, state.values, value)
        if corrector:
            y = y + bcast(c.carry, x) * correction(value, t, lam, past, state)
        if random:
            y = y + draw(noise, key, x, c.std, t, s)
        lam = jnp.concatenate([lam[None], past])[:length].astype(state.lam.dtype)
        return y, History((value, *state.values)[:length], lam, t.astype(state.t.dtype))

    return Sampler(init, step)


def exponential_ab(
    schedule: Schedule,
    order: int = 2,
    predicts: Quantity = "x0",
    tau: Tau = 0.0,
    slope: Slope = "exact",
    noise: Noise = white,
) -> Sampler:
    """Exponential Adams-Bashforth of orders 1 to 4: eq. (5) with the exact integrals.

    In data prediction it is the predictor of SA-Solver (Xue et al. 2023, arXiv:2309.05019), in noise prediction `deis`;
    with slope "bh2" and order 2 it is DPM-Solver++(2M) and DPM-Solver-2M, and at tau = 1 their SDE forms.
    """
    return multistep(schedule, order, 0, predicts, tau, exponential_rule(slope), noise)


def dpmpp_2m(schedule: Schedule, slope: Slope = "bh2") -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): one evaluation, second order.

    x_s = alpha_s x0 + sigma_s eps + alpha_s (1 - e^-h) (h / 2 h_prev) (x0 - x0_prev), with slope "exact" the integral
    of the straight line.
    """
    return exponential_ab(schedule, 2, slope=slope)


def dpmpp_3m(schedule: Schedule, slope: Slope = "bh2", curvature: float = 1.0) -> Sampler:
    """DPM-Solver++(3M), of the code that came with Lu et al. 2022, arXiv:2211.01095: one evaluation, third order.

    `slope` is for the second step. That code and others after it take half of psi_2, `curvature=0.5` here, and have
    second order only: the second divided difference is half of the second derivative.
    """
    return multistep(schedule, 3, rule=exponential_rule(slope, curvature))


def dpmpp_2m_sde(schedule: Schedule, tau: Tau = 1.0, slope: Slope = "bh2", noise: Noise = white) -> Sampler:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): `dpmpp_2m` with noise, weak order 2, strong order 1.

    k-diffusion's eta is tau^2.
    """
    return exponential_ab(schedule, 2, "x0", tau, slope, noise)


def dpmpp_3m_sde(
    schedule: Schedule, tau: Tau = 1.0, slope: Slope = "bh2", curvature: float = 1.0, noise: Noise = white
) -> Sampler:
    """`dpmpp_3m` with noise ("DPM++ 3M SDE"): weak order 2, strong order 1."""
    return multistep(schedule, 3, tau=tau, rule=exponential_rule(slope, curvature), noise=noise)


def unipc(schedule: Schedule, order: int = 2, slope: Slope = "bh2", predicts: Quantity = "x0") -> Sampler:
    """UniPC-p, multistep (Zhao et al. 2023, arXiv:2302.04867, algorithms 1-2): p = 1, 2, 3, of order p + 1.

    Predictor on p nodes and corrector on p + 1, one evaluation a step. B(h) cancels but with one difference, where
    a_1 = 1/2: slope "bh1" is the paper's B_1(h) = h and "bh2" its B_2(h) = e^h - 1. Order 4 needs a start from noise.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"unipc: order must be in 1..3, got {order}")
    return multistep(schedule, order, order + 1, predicts, rule=exponential_rule(slope))


def sa_solver(
    schedule: Schedule,
    predictor: int = 2,
    corrector: int = 2,
    tau: Tau = 1.0,
    slope: Slope = "exact",
    predicts: Quantity = "x0",
    noise: Noise = white,
) -> Sampler:
    """SA-Solver (Xue et al. 2023, arXiv:2309.05019): predictor and corrector on so many nodes, with the same noise.

    s is one of the corrector's nodes; 0 is no corrector. Slope "bh1" is that of the authors' code. Weak order 2, whose
    coefficient is small with slope "exact", so that it looks like 3 up to hundreds of steps.
    """
    return multistep(schedule, predictor, corrector, predicts, tau, exponential_rule(slope), noise)


def deis(schedule: Schedule, order: int = 3, nodes: Literal["lambda", "rho"] = "lambda") -> Sampler:
    """DEIS (Zhang & Chen 2023, arXiv:2204.13902): Adams-Bashforth in noise prediction, of orders 1 to 4.

    nodes: eps is a polynomial in "lambda", eq. (5), or in "rho" = sigma / alpha, eq. (9), the paper's rhoAB.
    """
    if nodes not in ("lambda", "rho"):
        raise ValueError(f"deis: nodes must be 'lambda' or 'rho', got {nodes!r}")
    return multistep(schedule, order, predicts="eps", rule=None if nodes == "lambda" else adams_rule("rho"))


def ipndm(schedule: Schedule, order: int = 4) -> Sampler:
    """iPNDM (Zhang & Chen 2023, arXiv:2204.13902, after Liu et al. 2022, arXiv:2202.09778), orders 1 to 4.

    x_s = (alpha_s / alpha_t) x_t + alpha_s (rho_s - rho_t) e, with e = (3 eps - eps_1) / 2,
    (23 eps - 16 eps_1 + 5 eps_2) / 12 or (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24: eq. (9) as if the grid were
    uniform in rho = sigma / alpha. If it is not, the order is 2 where neighbouring steps differ by O(h^2), else 1.
    """
    return multistep(schedule, order, predicts="eps", rule=adams_rule("constant"))


def interpolation_weights(psi: Array, nodes: list[Array], valid: list[Array]) -> list[Array]:
    """w_j such that psi of the polynomial through 0 at 0 and d_j at nodes[j] is sum_j w_j d_j, psi[k] that of theta^k.

    Newton's form: node m adds the divided difference over the first m nodes times theta prod_(i<m) (theta - r_i), so
    that leaving out the last ones, where `valid` is False, is leaving out terms.
    """
    zero, one = jnp.zeros_like(psi[0]), jnp.ones_like(psi[0])
    weights, basis = [zero] * len(nodes), [zero, one]  # the basis polynomial, by rising powers of theta
    for m in range(len(nodes)):
        integral = sum((c * psi[k] for k, c in enumerate(basis)), zero)
        for j in range(m + 1):
            others = [nodes[j] - nodes[i] for i in range(m + 1) if i != j]
            weights[j] = weights[j] + jnp.where(valid[m], integral / math.prod(others, start=nodes[j]), 0)
        basis = [a - nodes[m] * b for a, b in zip([zero, *basis], [*basis, zero], strict=True)]
    return weights


def exponential_rule(slope: Slope, curvature: float = 1.0) -> Rule:
    """The weights of eq. (5), with one difference only those of (7); psi_2 is multiplied by `curvature`."""
    choice("slope", slope, Slope)

    def rule(h: Array, z: Array, distances: list[Array], valid: list[Array]) -> list[Array]:
        if not distances:
            return []
        psi, nodes = moments(z, len(distances) + 1), [d / h for d in distances]
        if len(psi) > 2:
            psi = psi.at[2].multiply(curvature)
        weights = interpolation_weights(psi, nodes, valid)
        alone = valid[0] & ~valid[1] if len(valid) > 1 else valid[0]
        weights[0] = jnp.where(alone, slope_integral(psi, z, slope) / nodes[0], weights[0])
        return weights

    return rule


def adams_rule(nodes: Literal["rho", "constant"]) -> Rule:
    """The weights of eq. (9), on the nodes themselves or as if they were equidistant."""

    def rule(h: Array, z: Array, distances: list[Array], valid: list[Array]) -> list[Array]:
        psi = -jnp.expm1(-z) / jnp.arange(1, len(distances) + 2, dtype=z.dtype)
        rho = [jnp.expm1(-d) / jnp.expm1(-h) for d in distances]
        back = [jnp.full_like(h, -j - 1) for j in range(len(distances))]
        return interpolation_weights(psi, rho if nodes == "rho" else back, valid)

    return rule


def _usable(lam: Array, past: Array, ok: Array) -> tuple[list[Array], list[Array]]:
    """past - lam, and which of them are finite and fall, as all before them do; the others are placeholders."""
    distances, valid, last = [], [], jnp.zeros_like(lam)
    for d in past - lam:
        ok = ok & jnp.isfinite(d) & (d < last)
        last = jnp.where(ok, d, last - 1)
        distances.append(last)
        valid.append(ok)
    return distances, valid


def _combine(scale: Array, weights: list[Array], values: Sequence[Array], base: Array) -> Array:
    """scale sum_j w_j (v_j - base)."""
    terms = (bcast(scale * w, base) * (v - base) for w, v in zip(weights, values, strict=False))
    return sum(terms, jnp.zeros_like(base))
