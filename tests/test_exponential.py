"""Exponential integrators: weights, a second implementation, published forms, identities, orders, laws, ends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, at_scalar_time, exact_denoiser, law_at, law_propagator, measured_order
from scipy import integrate, stats

import diffusion_jax as dj
from conformance.samplers import LINE, quantile, quantile_map
from diffusion_jax.evaluation import mixtures
from diffusion_jax.samplers import exponential as ex
from diffusion_jax.samplers import singlestep as ss

VP = dj.vp_linear()
KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def vp_grid(n, start=1.0, end=0.01):
    """n steps, equal in the log SNR of `vp_linear`: f64[n + 1]."""
    top, bottom = (np.log(np.expm1(2 * (4.975 * t**2 + 0.05 * t))) / -2 for t in (start, end))
    half = np.logaddexp(0, -2 * np.linspace(top, bottom, n + 1)) / 2  # -log alpha
    return (-0.05 + np.sqrt(0.0025 + 19.9 * half)) / 9.95


def levels(schedule, times):
    """alpha, sigma and lambda, f64 in NumPy."""
    alpha, sigma = (np.asarray(a) for a in schedule(jnp.asarray(times)))
    return alpha, sigma, np.log(alpha / sigma)


def loop(sampler, schedule, law=LINE, largest=256):
    """(x, times f[n + 1]) -> x at times[-1], compiled once for all n <= largest."""
    denoise = at_scalar_time(exact_denoiser(law, schedule))

    @jax.jit
    def go(x, times, n):
        def body(i, carry):
            return sampler.step(jax.random.fold_in(KEY, i), *carry, times[i], times[i + 1], denoise)

        return jax.lax.fori_loop(0, n, body, (x, sampler.init(x)))[0]

    def run(x, times):
        padded = np.pad(times, (0, largest + 1 - len(times)), mode="edge")
        return np.asarray(go(jnp.asarray(x), jnp.asarray(padded), len(times) - 1))

    return run


# --- weights ----------------------------------------------------------------------------------------------------------


def test_moments_are_the_integrals_and_keep_their_digits(x64):
    """psi_k by quadrature; and in float32, at small z and on both sides of where the method changes."""
    compute = jax.jit(jax.vmap(lambda z: ex.moments(z, 6)))
    z = np.array([-20.0, -2.01, -1.99, -0.3, -1e-3, -1e-6, 1e-6, 1e-3, 0.3, 1.99, 2.01, 20.0])

    def integral(z, k):
        return z * integrate.quad(lambda u: np.exp(-z * (1 - u)) * u**k, 0, 1, epsabs=1e-15, epsrel=1e-13)[0]

    expected = [[integral(v, k) for k in range(6)] for v in z]
    np.testing.assert_allclose(compute(jnp.asarray(z)), expected, rtol=1e-12)
    few = jax.jit(jax.vmap(lambda z: ex.moments(z, 5)))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(few, np.asarray(expected)[:, :5], rtol=5e-6)
    assert few.dtype == "float32"


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order, x64):
    """Through 1 to 4 nodes, the first ahead; with only the first m of them valid, as if there were no others."""
    nodes = np.array([1.0, -0.6, -1.9, -2.5])[:order]
    compute = jax.jit(
        lambda z, valid: (
            psi := ex.moments(z, order + 1),
            jnp.stack(ex.interpolation_weights(psi, list(jnp.asarray(nodes)), list(valid))),
        )
    )
    for m, z in itertools.product(range(1, order + 1), (-0.7, 1e-3, 1.5)):
        psi, weights = map(np.asarray, compute(jnp.asarray(z), np.arange(order) < m))
        np.testing.assert_allclose(weights @ nodes[:, None] ** np.arange(1, m + 1), psi[1 : m + 1], rtol=1e-11)
        assert np.all(weights[m:] == 0)


# --- a second implementation, in NumPy, of the solution's integrals as papers write them ------------------------------


def numpy_predictions(x, alpha, sigma):
    """x0 and eps of LINE."""
    m, v = LINE.means[:, 0], LINE.variances[:, 0]
    total = alpha**2 * v + sigma**2
    diff = x[:, None] - alpha * m
    logp = np.log(LINE.weights) - 0.5 * (diff**2 / total + np.log(total))
    r = np.exp(logp - logp.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return np.sum(r * (m + alpha * v / total * diff), axis=1), np.sum(r * sigma / total * diff, axis=1)


def integrals(lam, nodes, kernel):
    """int_(lam[0])^(lam[1]) kernel(l) l_j(l) dl, by Gauss and Legendre's rule."""
    u, w = np.polynomial.legendre.leggauss(40)
    h = (lam[1] - lam[0]) / 2
    points = lam[0] + h * (u + 1)
    basis = [np.prod([(points - b) / (a - b) for b in nodes if b != a], axis=0) for a in nodes]
    return [h * np.sum(w * kernel(points) * l_j) for l_j in basis]


def transition(x, i, nodes, values, grid, predicts, tau, slope, z):
    """From time i to i + 1 with the values at the nodes, of which the first is at time i where there are two."""
    alpha, sigma, lam = grid
    (a_t, a_s), (s_t, s_s), (l_t, l_s), q = alpha[i : i + 2], sigma[i : i + 2], lam[i : i + 2], tau**2
    h = l_s - l_t
    if predicts == "x0":
        kernel, scale, exponent = lambda u: s_s * np.exp(-q * (l_s - u)) * (1 + q) * np.exp(u), a_s, (1 + q) * h
        y = s_s / s_t * np.exp(-q * h) * x + s_s * np.sqrt(1 - np.exp(-2 * q * h)) * z
    else:
        kernel, scale, exponent = lambda u: -(1 + q) * a_s * np.exp(-u), (1 + q) * s_s, -h
        y = a_s / a_t * x + tau * s_s * np.sqrt(np.exp(2 * h) - 1) * z
    if len(nodes) != 2 or slope == "exact":
        return y + sum(c * v for c, v in zip(integrals((l_t, l_s), nodes, kernel), values, strict=True))
    size = exponent if slope == "bh1" else 1 - np.exp(-exponent)  # B(h), and a_1 = 1/2
    constant = scale * (1 - np.exp(-exponent))
    return y + constant * values[0] + scale * size / 2 * (values[1] - values[0]) / ((nodes[1] - l_t) / h)


def second_implementation(x, grid, z, order, corrector, predicts, tau, slope):
    """Predict; evaluate; correct the step again from where it started, with the same noise; and so on."""
    alpha, sigma, lam = grid
    kept, start = [], x
    for i in range(len(lam) - 1):
        value = numpy_predictions(x, alpha[i], sigma[i])[predicts == "eps"]
        kept = [value, *kept]
        if corrector and i:
            use = [1, 0, *range(2, min(corrector, len(kept)))][: min(corrector, len(kept))]
            nodes, values = [lam[i - j] for j in use], [kept[j] for j in use]
            x = transition(start, i - 1, nodes, values, grid, predicts, tau, slope, z[i - 1])
        start, use = x, range(min(order, len(kept)))
        nodes, values = [lam[i - j] for j in use], [kept[j] for j in use]
        x = transition(x, i, nodes, values, grid, predicts, tau, slope, z[i])
    return x


@pytest.mark.parametrize(
    ("order", "corrector", "predicts", "tau", "slope"),
    [
        (4, 0, "x0", 0.0, "exact"),
        (2, 0, "x0", 1.0, "bh2"),
        (2, 0, "eps", 1.0, "bh2"),
        (2, 3, "x0", 0.0, "bh1"),
        (3, 4, "eps", 0.0, "bh2"),
        (3, 3, "x0", 0.8, "exact"),
        (1, 2, "x0", 1.3, "bh1"),
        (2, 5, "eps", 0.5, "exact"),
    ],
)
def test_a_second_implementation_agrees(order, corrector, predicts, tau, slope, x64):
    """Correctors there start again from the step's start; B cancels from three nodes on; uneven steps."""
    rng = np.random.default_rng(0)
    times = np.sort(vp_grid(12, 0.95, 0.05) + 0.01 * rng.uniform(-1, 1, 13))[::-1].copy()
    x, z = rng.standard_normal(5), rng.standard_normal((12, 5))
    expected = second_implementation(x, levels(VP, times), z, order, corrector, predicts, tau, slope)

    def noise(key, x, t, s):
        return jnp.asarray(z)[jnp.argmin(jnp.abs(jnp.asarray(times) - t))][:, None]

    sampler = ex.multistep(VP, order, corrector, predicts, tau, ex.exponential_rule(slope), noise)
    np.testing.assert_allclose(loop(sampler, VP)(x[:, None], times)[:, 0], expected, rtol=1e-9, atol=1e-10)


# --- published forms and identities -----------------------------------------------------------------------------------


def evaluate(samplers, times, x, schedule=VP):
    """Each sampler over `times`, all in one compilation, in float64."""
    denoiser = exact_denoiser(LINE, schedule)
    go = jax.jit(lambda x, times: [dj.sample(KEY, s, denoiser, x, times) for s in samplers])
    return [np.asarray(y)[:, 0] for y in go(jnp.asarray(x)[:, None], jnp.asarray(times))]


X = np.array([0.3, -1.0, 1.1, 2.2])


@pytest.mark.slow
def test_published_single_step_algorithms(x64):
    """One step of DPM-Solver-2 and -3 (algorithms 1 and 2) and of DPM-Solver++(2S) (algorithm 1), also "exact"."""
    t, s, r, r1, r2 = 0.7, 0.45, 0.4, 1 / 3, 2 / 3
    (a_t, a_s), (s_t, s_s), (l_t, l_s) = levels(VP, [t, s])
    h = l_s - l_t

    def middle(r):
        lam = l_t + r * h
        return 1 / np.sqrt(1 + np.exp(-2 * lam)), 1 / np.sqrt(1 + np.exp(2 * lam))

    def eps(x, alpha, sigma):
        return numpy_predictions(x, alpha, sigma)[1]

    (a, o), e = middle(r), eps(X, a_t, s_t)
    u = a / a_t * X - o * np.expm1(r * h) * e
    second = a_s / a_t * X - s_s * np.expm1(h) * e - s_s / (2 * r) * np.expm1(h) * (eps(u, a, o) - e)

    (a1, o1), (a2, o2) = middle(r1), middle(r2)
    u1 = a1 / a_t * X - o1 * np.expm1(r1 * h) * e
    d1 = eps(u1, a1, o1) - e
    u2 = a2 / a_t * X - o2 * np.expm1(r2 * h) * e - o2 * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = eps(u2, a2, o2) - e
    third = a_s / a_t * X - s_s * np.expm1(h) * e - s_s / r2 * (np.expm1(h) / h - 1) * d2

    x0 = numpy_predictions(X, a_t, s_t)[0]
    u = o / s_t * X - a * np.expm1(-r * h) * x0
    d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * numpy_predictions(u, a, o)[0]
    plus = s_s / s_t * X - a_s * np.expm1(-h) * d

    d = numpy_predictions(u, a, o)[0] - x0
    exact = s_s / s_t * X - a_s * np.expm1(-h) * x0 + a_s / r * (1 + np.expm1(-h) / h) * d

    samplers = ss.dpm_solver_2(VP, r), ss.dpm_solver_3(VP), ss.dpmpp_2s(VP, r), ss.dpmpp_2s(VP, r, "exact")
    for got, want in zip(evaluate(samplers, [t, s], X), (second, third, plus, exact), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_dpmpp_2m_is_algorithm_2_and_its_3m_the_third_divided_difference(x64):
    times = vp_grid(5, 0.8, 0.2)
    alpha, sigma, lam = levels(VP, times)

    def run(order):
        x, kept = X, []
        for i, h in enumerate(np.diff(lam)):
            kept = [numpy_predictions(x, alpha[i], sigma[i])[0], *kept[:2]]
            d0 = d1 = d2 = 0
            if i:
                d0 = (kept[0] - kept[1]) / (r0 := (lam[i] - lam[i - 1]) / h)
            if order == 3 and i > 1:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                d2 = (d0 - (kept[1] - kept[2]) / r1) / (r0 + r1)
                d0, d1 = 0, d0 + r0 * d2
            psi1 = 1 + np.expm1(-h) / h
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * (kept[0] + d0 / 2)
            x = x + alpha[i + 1] * (psi1 * d1 + (1 - 2 / h * psi1) * d2)
        return x

    for got, order in zip(evaluate([ex.dpmpp_2m(VP), ex.dpmpp_3m(VP)], times, X), (2, 3), strict=True):
        np.testing.assert_allclose(got, run(order), rtol=1e-10)


def test_first_order_is_ddim(x64):
    """With eta = 0 for tau = 0; with eta = 1, which is ddpm, for tau = 1: of the same keys."""
    times = vp_grid(6, 0.9, 0.1)
    calm = (
        ex.exponential_ab(VP, 1),
        ex.exponential_ab(VP, 1, "eps"),
        ex.deis(VP, 1),
        ex.deis(VP, 1, "rho"),
        ex.ipndm(VP, 1),
    )
    noisy = ex.exponential_ab(VP, 1, tau=1.0), ex.sa_solver(VP, 1, 0), dj.ddim(VP, 1.0)
    first, *others = evaluate([dj.ddim(VP), *calm], times, X)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-12)
    first, *others = evaluate([dj.ddpm(VP), *noisy], times, X)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-10)


def test_tau_is_a_number_a_traced_number_or_a_function_of_time(x64):
    """And tau = 0 is the method without noise."""
    times = vp_grid(6, 0.9, 0.1)
    calm, noisy, function = evaluate(
        [ex.dpmpp_2m(VP), ex.dpmpp_2m_sde(VP, 0.7), ex.dpmpp_2m_sde(VP, lambda t: 0.7 + 0 * t)], times, X
    )
    denoiser, x = exact_denoiser(LINE, VP), jnp.asarray(X)[:, None]
    traced = jax.jit(lambda tau, times: dj.sample(KEY, ex.dpmpp_2m_sde(VP, tau), denoiser, x, times)[:, 0])
    for a, b in ((traced(0.0, times), calm), (traced(0.7, times), noisy), (function, noisy)):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    assert np.abs(calm - noisy).min() > 1e-3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_has_the_coefficients_of_adams_and_bashforth(order, x64):
    """On a grid uniform in sigma / alpha it is rhoAB-DEIS; on any grid, DDIM with the paper's combination of eps."""
    schedule, times = dj.edm(), np.linspace(5.0, 1.0, 7)
    a, b = evaluate([ex.ipndm(schedule, order), ex.deis(schedule, order, "rho")], times, X, schedule)
    np.testing.assert_allclose(a, b, rtol=1e-11)
    table = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    times = np.array([5.0, 4.5, 3.0, 2.6, 1.0, 0.7])
    x, kept = X, []
    for t, s in itertools.pairwise(times):
        kept = [numpy_predictions(x, 1.0, t)[1], *kept[: order - 1]]
        x = x + (s - t) * np.dot(table[len(kept)], kept)
    np.testing.assert_allclose(evaluate([ex.ipndm(schedule, order)], times, X, schedule)[0], x, rtol=1e-10)


# --- orders -----------------------------------------------------------------------------------------------------------

P = np.linspace(0.02, 0.98, 33)


def flow_order(run, schedule, grid, steps):
    """On a mixture in one dimension, against its exact flow."""
    errors = []
    for n in steps:
        times = grid(n)
        x = quantile(law_at(LINE, schedule, times[0]), P)
        exact = quantile_map(LINE, schedule, x, times[0], times[-1])
        errors.append(np.sqrt(np.mean((run(x[:, None], times)[:, 0] - exact) ** 2)))
    return measured_order(errors)


# name -> constructor, order, and order where the start has signal
ORDERS = {
    "dpm_solver_2": (lambda s: ss.dpm_solver_2(s, 0.3, "exact"), 2, 2),
    "dpm_solver_3": (ss.dpm_solver_3, 3, 3),
    "dpmpp_3s": (ss.dpmpp_3s, 3, 3),
    "dpmpp_3m": (ex.dpmpp_3m, 3, 2),
    "dpmpp_3m_half": (lambda s: ex.dpmpp_3m(s, curvature=0.5), 2, 2),
    "unipc_1": (lambda s: ex.unipc(s, 1), 2, 2),
    "unipc_2": (lambda s: ex.unipc(s, 2, "bh1"), 3, 3),
    "unipc_3": (lambda s: ex.unipc(s, 3), 4, 3),
    "unipc_3_eps": (lambda s: ex.unipc(s, 3, predicts="eps"), 4, 3),
    "deis_4": (lambda s: ex.deis(s, 4), 4, 2),
    "deis_rho_3": (lambda s: ex.deis(s, 3, "rho"), 3, 2),
    "exponential_ab_4": (lambda s: ex.exponential_ab(s, 4), 4, 2),
}


def close(found, order):
    """Within 0.1 up to order 2 and within 0.2 from order 3 on."""
    return found == pytest.approx(order, abs=0.1 if order < 3 else 0.2)


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_a_mixture(name, x64):
    """From almost pure noise, SNR 4e-5, to SNR 500 in equal steps of the log SNR.

    And from SNR 0.6, where the error of the first steps, of lower order, limits that of multistep methods.
    """
    make, order, limit = ORDERS[name]
    run = loop(make(VP), VP)
    found, late = (
        flow_order(run, VP, lambda n, ends=ends: vp_grid(n, *ends), (128, 256)) for ends in ((), (0.35, 0.05))
    )
    print(f"{name}: order {found:.3f}, from a time with signal {late:.3f}")
    assert close(found, order) and close(late, limit)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_order_of_ipndm(order, x64):
    """On a grid uniform in sigma / alpha; on another that is smooth it is of second order."""
    run = loop(ex.ipndm(dj.edm(), order), dj.edm(), largest=2048)
    found = flow_order(run, dj.edm(), lambda n: np.linspace(20.0, 0.5, n + 1), (1024, 2048))
    other = flow_order(run, dj.edm(), lambda n: np.geomspace(20.0, 0.5, n + 1), (512, 1024))
    print(f"ipndm_{order}: order {found:.3f}, on a geometric grid {other:.3f}")
    assert close(found, order) and close(other, 2)


# --- with noise -------------------------------------------------------------------------------------------------------


def weak_order(make, steps):
    """Of the mean and the variances on Gaussian data, exactly, from almost pure noise."""
    propagate, errors = law_propagator(make, VP, BELL), []
    for n in steps:
        (mean, covariance), wanted = propagate(times := vp_grid(n)), law_at(BELL, VP, times[-1])
        error = [mean - wanted.means[0], np.diag(covariance) - wanted.variances[0]]
        errors.append(np.sqrt(np.mean(np.square(error))))
    return measured_order(errors)


def independent(noise):
    """Undo what ties the two draws of a step of `dpmpp_2s_sde` together: the second one is all of the step's noise."""
    before = []

    def draw(key, x, t, s):
        z = noise(key, x, t, s)
        if not before or before[-1][1] is not t:
            before.append((t, s, z))
            return z
        start, middle, first = before.pop()
        parts = (start, middle), (middle, s), (start, s)
        one, two, whole = (ex.transfer(VP, "x0", jnp.asarray(1.0), *times) for times in parts)
        return (whole.std * z - two.carry * one.std * first) / two.std

    return draw


WEAK = {
    "dpmpp_3m_sde": (lambda noise: ex.dpmpp_3m_sde(VP, noise=noise), 2),
    "dpmpp_2s_sde with independent draws": (lambda noise: ss.dpmpp_2s_sde(VP, noise=independent(noise)), 1),
    "sde-dpm-solver-2m": (lambda noise: ex.exponential_ab(VP, 2, "eps", 1.0, "bh2", noise), 2),
}


@pytest.mark.parametrize("name", WEAK)
def test_weak_order(name):
    """Here those that the contracts of the table leave out, or measure on another grid."""
    make, order = WEAK[name]
    found = weak_order(make, (128, 256))
    print(f"{name}: weak order {found:.3f}")
    assert found == pytest.approx(order, abs=0.1)


RANDOM = {
    "dpmpp_2s_sde": lambda s, noise=dj.white: ss.dpmpp_2s_sde(s, noise=noise),
    "dpmpp_3m_sde": lambda s, noise=dj.white: ex.dpmpp_3m_sde(s, noise=noise),
    "sa_solver": lambda s, noise=dj.white: ex.sa_solver(s, 3, 3, 1.0, noise=noise),
}


@pytest.mark.parametrize("name", ["dpmpp_2s_sde", "dpmpp_3m_sde"])
def test_strong_order_is_one_along_one_brownian_path(name, x64):
    """Against 2048 steps along the same path, on Gaussian data, exactly.

    All is linear: example i moves with the path's i-th increment alone, and the squares of the differences add up.
    """
    fine = vp_grid(4096)  # with the middles of 2048 steps
    snr = np.exp(2 * levels(VP, fine)[2])

    def noise(key, x, t, s):
        start, end = (jnp.exp(dj.logsnr(VP, u)) for u in (t, s))
        inside = (snr[:-1] > start * (1 - 1e-9)) & (snr[1:] < end * (1 + 1e-9))
        return jnp.sqrt(jnp.where(inside, np.diff(snr) / (end - start), 0))[:, None]

    run = loop(RANDOM[name](VP, noise), VP, mixtures.gaussian(np.zeros(1), np.full(1, 0.3)), 2048)
    exact, *coarse = (run(np.zeros((4096, 1)), fine[:: 4096 // n]) for n in (2048, 128, 256))
    found = measured_order([np.linalg.norm(y - exact) for y in coarse])
    print(f"{name}: strong order {found:.3f}")
    assert found == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", RANDOM)
def test_law_on_a_mixture(name):
    """In 40 steps from exact draws of pure noise, n = 4000, in float32: Kolmogorov and Smirnov, corrected."""
    times = np.float32(vp_grid(40))
    x = mixtures.draw(np.random.default_rng(5), law_at(LINE, VP, times[0]), 4000)
    denoiser = mixtures.denoiser(jax.tree.map(np.float32, LINE), VP)
    go = jax.jit(lambda x, times: dj.sample(KEY, RANDOM[name](VP), denoiser, x, times))
    y = np.asarray(go(jnp.asarray(x, jnp.float32), jnp.asarray(times)), np.float64)[:, 0]
    p = stats.kstest(y, mixtures.projected_cdf(law_at(LINE, VP, times[-1]), np.ones(1))).pvalue
    print(f"{name}: p = {p:.3f}")
    assert p > 0.01 / len(RANDOM)


# --- ends, restarts, bad input ----------------------------------------------------------------------------------------

ENDS = {
    "unipc_3": (lambda s: ex.unipc(s, 3), 0.0),
    "deis_rho_4": (lambda s: ex.deis(s, 4, "rho"), 0.0),
    "dpmpp_2s_sde": (lambda s: ss.dpmpp_2s_sde(s, noise=broken_at_zero), 1.0),
    "sde_eps": (lambda s: ex.exponential_ab(s, 3, "eps", 1.0, noise=broken_at_zero), 1.0),
}


def broken_at_zero(key, x, t, s):
    return jnp.where(s == 0, jnp.nan, dj.white(key, x, t, s))


@pytest.mark.parametrize("name", ENDS)
def test_first_order_without_signal_and_without_noise(name, x64):
    """From alpha = 0 the first step is DDIM's; at sigma = 0 the last one is the denoised mean, without noise."""
    make, eta = ENDS[name]
    schedule = dj.rectified()
    x, times, denoiser = jnp.asarray(X)[:, None], jnp.linspace(1.0, 0.0, 7), exact_denoiser(LINE, schedule)

    @jax.jit
    def go(x):
        path = dj.sample(KEY, make(schedule), denoiser, x, times, trajectory=True)
        first = dj.sample(KEY, dj.ddim(schedule, eta), denoiser, x, times[:2])
        return path, first, denoiser(path[-2], jnp.broadcast_to(times[-2], (4,))).x0

    path, first, last = go(x)
    np.testing.assert_allclose(path[1], first, rtol=1e-10)
    np.testing.assert_allclose(path[-1], last, rtol=1e-10)
    assert np.all(np.isfinite(path))


def test_a_step_back_to_more_noise_starts_anew(x64):
    """After it, as in a restart, the history is of no use, and the step is DDIM's, without a correction."""
    denoise = at_scalar_time(exact_denoiser(LINE, VP))

    @jax.jit
    def go(x):
        found = []
        for sampler in (ex.dpmpp_3m(VP), ex.unipc(VP, 3), dj.ddim(VP)):
            y, state = x, sampler.init(x)
            for t, s in ((0.6, 0.5), (0.5, 0.4), (0.4, 0.3)):
                y, state = sampler.step(KEY, y, state, jnp.asarray(t), jnp.asarray(s), denoise)
            found.append((y, sampler.step(KEY, x, state, jnp.asarray(0.5), jnp.asarray(0.4), denoise)[0]))
        return found

    *multistep, (slow, once) = go(jnp.asarray(X)[:, None])
    for before, after in multistep:
        np.testing.assert_allclose(after, once, rtol=1e-12)
        assert np.abs(before - slow).max() > 1e-4


def test_bad_input():
    bad = (
        (lambda: ex.exponential_ab(VP, 5), "order"),
        (lambda: ex.deis(VP, 0), "order"),
        (lambda: ex.ipndm(VP, 5), "order"),
        (lambda: ex.unipc(VP, 4), "unipc: order"),
        (lambda: ex.sa_solver(VP, 2, 1), "corrector"),
        (lambda: ex.sa_solver(VP, 2, 6), "corrector"),
        (lambda: ex.sa_solver(VP, tau=-0.5), "tau"),
        (lambda: ss.dpmpp_2s_sde(VP, tau=-0.5), "tau"),
        (lambda: ex.unipc(VP, 2, "bh3"), "slope must be one of exact, bh1, bh2, got 'bh3'"),
        (lambda: ss.dpmpp_2s(VP, slope="heun"), "slope"),
        (lambda: ex.exponential_ab(VP, 2, "v"), "predicts must be one of x0, eps, got 'v'"),
        (lambda: ex.deis(VP, 2, "t"), "nodes"),
        (lambda: ss.dpm_solver_2(VP, 1.0), "stages"),
        (lambda: ss.dpm_solver_3(VP, 0.7, 0.6), "stages"),
    )
    for make, message in bad:
        with pytest.raises(ValueError, match=message):
            make()
