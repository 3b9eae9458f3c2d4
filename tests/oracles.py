r"""Exact errors of samplers on Gaussian data, in float64, and a test of the law they draw.

There the denoiser is affine in x, so a step with injected noise z is an affine map of (x, history, z), and its
Jacobians carry the mean m and the covariance C of the law that a random sampler reaches, without drawing anything:

    m <- step(m, z = 0),    C <- J_x C J_x^T + J_z J_z^T                                      (1)
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import diffusion_jax as dj
from conformance.table import PROBLEMS
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture

# Between these times nothing is singular.
RANGES = {"vp_linear": (0.8, 0.1), "rectified": (0.95, 0.1), "cosine": (0.9, 0.1), "edm": (3.0, 0.2), "ve": (0.8, 0.2)}
D = 16
BELL = mixtures.gaussian(np.array([0.5, -1.0, 0.2]), np.array([0.25, 1.0, 0.04]))


def exact_denoiser(law, schedule):
    """With a variance fraction in the middle, for the samplers that read one."""
    exact = mixtures.denoiser(law, schedule)
    return lambda x, t, cond=None: exact(x, t)._replace(variance_fraction=jnp.full_like(x, 0.5))


def at_scalar_time(denoiser):
    """The denoiser as a step sees it."""
    return lambda x, t: denoiser(x, jnp.broadcast_to(t, x.shape[:1]), None)


def order_grid(problem, n):
    """n steps over the range, the first one O(n^-2) long, so that the low order of a multistep start is not seen."""
    high, low = RANGES[problem]
    return high - (high - low) * (np.arange(n + 1) / n) ** 2


def measured_order(errors):
    """log2 of the errors' ratio, at n and 2n steps."""
    return np.log2(errors[0] / errors[1])


def flow_errors(entry, steps, law=BELL):
    """Root mean square distance of a deterministic sampler from the exact probability flow."""
    schedule, (high, low) = PROBLEMS[entry.problem].schedule, RANGES[entry.problem]
    sampler = entry.make(PROBLEMS[entry.problem], dj.white)
    denoise = at_scalar_time(exact_denoiser(law, schedule))
    with jax.enable_x64(True):
        x = np.array([[1.0, -0.4, 0.3], [-0.7, 1.2, -1.5]])
        step = jax.jit(lambda x, state, t, s: sampler.step(jax.random.key(0), x, state, t, s, denoise))
        (m_t, v_t), (m_s, v_s) = (
            (law_at(law, schedule, t).means, law_at(law, schedule, t).variances) for t in (high, low)
        )
        exact, errors = m_s + np.sqrt(v_s / v_t) * (x - m_t), []
        for n in steps:
            y = jnp.asarray(x)
            state = sampler.init(y)
            for t, s in itertools.pairwise(order_grid(entry.problem, n)):
                y, state = step(y, state, t, s)
            assert y.dtype == jnp.float64
            errors.append(float(np.sqrt(np.mean((np.asarray(y) - exact) ** 2))))
    return errors


def law_errors(entry, steps, law=BELL):
    """Root mean square error of a random sampler's mean and variances, by (1), from the exact law of the first time."""
    problem, errors = PROBLEMS[entry.problem], []
    propagate = law_propagator(lambda noise: entry.make(problem, noise), problem.schedule, law)
    for n in steps:
        times = order_grid(entry.problem, n)
        mean, covariance = propagate(times)
        wanted = law_at(law, problem.schedule, times[-1])
        error = [mean - wanted.means[0], np.diag(covariance) - wanted.variances[0]]
        errors.append(float(np.sqrt(np.mean(np.square(error)))))
    return errors


def law_at(law, schedule, t):
    """The law of x_t."""
    with jax.enable_x64(True):
        return mixtures.marginal(law, *(float(c) for c in schedule(jnp.asarray(float(t)))))


def law_propagator(make, schedule, law, denoiser=None):
    """times -> (mean [d], covariance [d d]) that make(noise) reaches from the exact law at times[0], eq. (1).

    Every call of `noise` in a step, four at most, is a draw of its own, so a step must not call it inside a loop.
    """
    pending, d = [], law.means.shape[1]

    def noise(key, x, t, s):
        return pending.pop(0)

    sampler, denoise = make(noise), at_scalar_time(denoiser or exact_denoiser(law, schedule))

    def is_affine(leaf):
        """A history of x, and not of log SNRs or counters."""
        return leaf.shape[-2:] == (1, d)

    def flat(x, state):
        return jnp.concatenate([jnp.ravel(a) for a in (x, *filter(is_affine, jax.tree.leaves(state)))])

    @jax.jit
    def advance(u, state, t, s):
        def step(u, z):
            rows = list(jnp.reshape(u, (-1, 1, d)))
            x, pending[:] = rows.pop(0), list(z)

            def past(leaf):
                if not is_affine(leaf):
                    return leaf
                return jnp.reshape(jnp.stack([rows.pop(0) for _ in range(leaf.size // d)]), leaf.shape)

            x, new = sampler.step(jax.random.key(0), x, jax.tree.map(past, state), t, s, denoise)
            return flat(x, new), (flat(x, new), new)

        (by_u, by_z), (value, new) = jax.jacfwd(step, argnums=(0, 1), has_aux=True)(u, jnp.zeros((4, 1, d)))
        return value, by_u, jnp.reshape(by_z, (len(u), -1)), new

    def propagate(times):
        with jax.enable_x64(True):
            start = law_at(law, schedule, times[0])
            x = jnp.asarray(start.means)
            state = sampler.init(x)
            u = flat(x, state)
            covariance = np.zeros((len(u), len(u)))
            covariance[:d, :d] = np.diag(start.variances[0])
            for t, s in itertools.pairwise(times):
                u, by_u, by_z, state = advance(u, state, t, s)
                by_u, by_z = np.asarray(by_u), np.asarray(by_z)
                covariance = by_u @ covariance @ by_u.T + by_z @ by_z.T
        return np.asarray(u)[:d], covariance[:d, :d]

    return propagate


def mixture():
    """Two components in D dimensions, of different scales."""
    rng = np.random.default_rng(0)
    variance, apart = rng.uniform(0.2, 0.6, D), rng.standard_normal(D)
    apart *= 1.5 / np.linalg.norm(apart)
    return Mixture(np.array([0.3, 0.7]), np.stack([apart, -apart]), np.stack([variance, variance[::-1] / 2]))


def check_law(x, law):
    """Every entry of mean and covariance within its standard errors, p > 0.001; KS on projections, p > 0.01.

    The directions are an axis, the line between the components, and a random one. Both are corrected for the number of
    comparisons (Bonferroni).
    """
    x = np.asarray(x, np.float64)
    n, (mean, covariance) = len(x), mixtures.moments(law)
    error = np.abs(x.mean(0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert error.max() < stats.norm.isf(0.0005 / error.size), f"mean off by {error.max():.1f} standard errors"
    centred = x - mean
    products = centred[:, :, None] * centred[:, None, :]
    error = np.abs(products.mean(0) - covariance) / (products.std(0) / np.sqrt(n))
    assert error.max() < stats.norm.isf(0.0005 / error.size), f"covariance off by {error.max():.1f} standard errors"
    directions = np.stack([np.eye(D)[0], law.means[0] - law.means[1], np.random.default_rng(1).standard_normal(D)])
    p = [stats.kstest(x @ u, mixtures.projected_cdf(law, u)).pvalue for u in directions]
    assert min(p) * len(p) > 0.01, f"KS p-values {p}"
    print(f"smallest corrected p = {min(p) * len(p):.3f}")


def run_law(sampler, problem, steps, n=2000, index=-1):
    """Start from the exact law at times[0]; compare with the exact law at times[index]."""
    schedule, times, law = PROBLEMS[problem].schedule, PROBLEMS[problem].grid(steps), mixture()
    x = jnp.asarray(mixtures.draw(np.random.default_rng(0), law_at(law, schedule, times[0]), n), jnp.float32)
    denoiser = exact_denoiser(law, schedule)
    y = jax.jit(lambda key: dj.sample(key, sampler, denoiser, x, times))(jax.random.key(0))
    check_law(y, law_at(law, schedule, times[index]))
