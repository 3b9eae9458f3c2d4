"""Exact flow maps of Gaussian data, and expectations over pairs (x0, eps) without sampling.

For x0 ~ N(m, v) the flow is mixtures.flow: it gives the consistency function (at sigma_s = 0) and the average velocity.
Models that are linear in x make a loss a polynomial of (x0, eps), which a few nodes integrate exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures

MEAN, STD = 0.4, 0.6
LAW = mixtures.gaussian(np.array([MEAN]), np.array([STD**2]))


def flow_map(law, schedule):
    """The probability flow of a Gaussian as a FlowMap."""

    def one(x, t, s):
        return mixtures.flow(law, schedule, x[None], t, s)[0]

    return lambda x, t, s, cond=None: jax.vmap(one)(x, t, s)


def consistency_model(law, schedule, change=None):
    """The consistency function of a Gaussian as a denoiser, plus `change(x, t)`."""

    def denoiser(x, t, cond=None):
        x0 = flow_map(law, schedule)(x, t, jnp.zeros_like(t))
        return dj.from_x0(schedule, x, t, x0 if change is None else x0 + change(x, t))

    return denoiser


def average_velocity(law, schedule, change=None):
    """The average velocity of a Gaussian, plus `change(x, t, s)`."""

    def velocity(x, t, s, cond=None):
        same = s == t
        moved = (flow_map(law, schedule)(x, t, s) - x) / dj.bcast(jnp.where(same, 1, s - t), x)
        u = jnp.where(dj.bcast(s, x) == dj.bcast(t, x), exact_velocity(law, schedule, x, t), moved)
        return u if change is None else u + change(x, t, s)

    return velocity


def exact_velocity(law, schedule, x, t):
    return dj.to_velocity(schedule, mixtures.denoiser(law, schedule)(x, t), t)


def pairs(schedule, t, n=6, mean=MEAN, std=STD):
    """Nodes x0, eps f64[n^2, 1] and weights f64[n^2] of an expectation over pairs at the time t.

    x_t and what x0 has beyond its mean given x_t are independent Gaussians: Gauss-Hermite nodes in both are exact for
    polynomials of degree 2n - 1, and for whatever is odd in the second.
    """
    z, w = np.polynomial.hermite_e.hermegauss(n)
    visible, hidden = (jnp.asarray(a.reshape(-1, 1)) for a in np.meshgrid(z, z, indexing="ij"))
    alpha, sigma = schedule(t)
    total = alpha**2 * std**2 + sigma**2
    x0 = mean + alpha * std**2 / jnp.sqrt(total) * visible + std * sigma / jnp.sqrt(total) * hidden
    x = alpha * mean + jnp.sqrt(total) * visible
    weights = np.outer(w, w).reshape(-1)
    return x0, (x - alpha * x0) / sigma, jnp.asarray(weights / weights.sum())


def over_times(schedule, times, n=4):
    """The same at each of k times (rows: t, or t and s): x0, eps f64[k n^2, 1], times f64[k n^2] each, weights."""
    times = jnp.asarray(times)
    x0, eps, w = jax.vmap(lambda row: pairs(schedule, row[0], n))(times)
    columns = [jnp.repeat(column, w.shape[1]) for column in times.T]
    return x0.reshape(-1, 1), eps.reshape(-1, 1), columns, w.reshape(-1) / len(times)


def wavy(schedule, scale=1.0):
    """A student that is neither linear nor exact, the same function of signal-to-noise ratio and x0 + ratio eps."""

    def denoiser(x, t, cond=None):
        alpha, sigma = schedule(t)
        ratio = dj.bcast(sigma / alpha, x)
        return dj.from_x0(schedule, x, t, scale * jnp.tanh(x / dj.bcast(alpha, x) + 0.3) / (1 + ratio) + 0.1 * ratio)

    return denoiser


def drawn(b=5, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 0.5, (b, d))), jnp.asarray(rng.standard_normal((b, d)))
