"""Single steps against the papers' formulas in NumPy, identities between samplers, and laws that need no drawing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, at_scalar_time, exact_denoiser, law_at, law_propagator

import diffusion_jax as dj
from conformance.table import PROBLEMS
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.samplers.ancestral import analytic_dpm, estimate_mmse, euler_ancestral
from diffusion_jax.samplers.flow import adaptive, dpm_2, midpoint
from diffusion_jax.samplers.noise import white
from diffusion_jax.samplers.singlestep import dpm_solver_2
from diffusion_jax.samplers.stochastic import euler_maruyama, restart, reverse_diffusion

LAW = Mixture(np.array([0.3, 0.7]), np.array([[1.0, -0.5], [-0.6, 0.4]]), np.array([[0.1, 0.3], [0.4, 0.2]]))
X = np.array([[0.3, -1.0], [1.1, 0.4]])
KEY = jax.random.key(7)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def run_steps(samplers, schedule, t, s, x=X):
    """One step of each from t to s with the exact denoiser of LAW and key KEY, compiled together, as NumPy."""
    denoise, x = at_scalar_time(exact_denoiser(LAW, schedule)), jnp.asarray(x)

    @jax.jit
    def go(t, s):
        return [f.step(KEY, x, f.init(x), t, s, denoise)[0] for f in samplers]

    return [np.asarray(y) for y in go(jnp.asarray(t), jnp.asarray(s))]


def parts(schedule, t):
    """(alpha, sigma) at t and the prediction there for X, as NumPy."""
    alpha, sigma = (float(c) for c in schedule(jnp.asarray(t)))
    p = jax.jit(lambda x, t: at_scalar_time(exact_denoiser(LAW, schedule))(x, t))(jnp.asarray(X), jnp.asarray(t))
    return alpha, sigma, np.asarray(p.x0), np.asarray(p.eps)


# --- DDIM, ancestral --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["vp_linear", "rectified"])
def test_ddim_is_euler_in_the_noise_level_and_dpm_solver_1(problem, x64):
    schedule, t, s = PROBLEMS[problem].schedule, 0.7, 0.45
    a_t, s_t, _, eps = parts(schedule, t)
    a_s, s_s = parts(schedule, s)[:2]
    ddim, small, one = run_steps((dj.ddim(schedule), dj.ddpm(schedule), dj.ddim(schedule, 1.0)), schedule, t, s)
    np.testing.assert_allclose(ddim, a_s * (X / a_t + (s_s / a_s - s_t / a_t) * eps), rtol=1e-10)
    h = np.log(a_s / s_s) - np.log(a_t / s_t)
    np.testing.assert_allclose(ddim, a_s / a_t * X - s_s * np.expm1(h) * eps, rtol=1e-10)
    np.testing.assert_allclose(small, one, rtol=1e-10)
    assert not np.allclose(small, ddim)


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_euler_ancestral_is_k_diffusions(eta, x64):
    """sigma_down, sigma_up and the Euler step between them for x / alpha, on a schedule with alpha < 1."""
    schedule, t, s = dj.vp_linear(), 0.7, 0.45
    a_t, s_t, x0, _ = parts(schedule, t)
    a_s, s_s = parts(schedule, s)[:2]
    high, low, y = s_t / a_t, s_s / a_s, X / a_t
    up = min(low, eta * np.sqrt(low**2 * (high**2 - low**2) / high**2))
    down = np.sqrt(low**2 - up**2)
    expected = y + (y - x0) / high * (down - high) + up * np.asarray(white(KEY, jnp.asarray(X), t, s))
    np.testing.assert_allclose(
        run_steps([euler_ancestral(schedule, eta)], schedule, t, s)[0], a_s * expected, rtol=1e-9
    )


@pytest.mark.parametrize("problem", ["vp_linear", "cosine"])
def test_ancestral_with_the_true_variance_is_exact_in_few_steps(problem):
    """For Gaussian data q(x_s | x_t) is Gaussian: 8 steps with its variance have no error, with a fixed one they do."""
    schedule, times = PROBLEMS[problem].schedule, np.linspace(0.9, 0.1, 9)
    denoiser = mixtures.denoiser(BELL, schedule, next_time=lambda t: t - 0.1)
    wanted = law_at(BELL, schedule, 0.1)
    for make, exact in (
        (lambda noise: dj.ancestral(schedule, noise), True),
        (lambda noise: dj.ddpm(schedule, noise=noise), False),
    ):
        mean, covariance = law_propagator(make, schedule, BELL, denoiser)(times)
        np.testing.assert_allclose(mean, wanted.means[0], atol=1e-12)
        assert (np.abs(np.diag(covariance) / wanted.variances[0] - 1).max() < 1e-12) == exact


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("problem", ["cosine", "edm"])
def test_analytic_dpm_is_exact_for_isotropic_gaussians(problem, eta, steps):
    """In any number of steps, to the very end, and from no signal where the schedule has that; not for others."""
    schedule, top, v = PROBLEMS[problem].schedule, PROBLEMS[problem].top, 0.3
    law, times = mixtures.gaussian(np.array([0.5, -1.0]), np.full(2, v)), np.linspace(top, 0, steps + 1)

    def mmse(t):
        alpha, sigma = schedule(t)
        return v * sigma**2 / (alpha**2 * v + sigma**2)

    make = functools.partial(analytic_dpm, schedule, mmse, eta)
    mean, covariance = law_propagator(lambda noise: make(noise=noise), schedule, law)(times)
    np.testing.assert_allclose(mean, law.means[0], atol=1e-12)
    np.testing.assert_allclose(covariance, v * np.eye(2), atol=1e-12)


def test_the_error_measured_on_data_is_the_papers_second_moment():
    """e(t) = (sigma / alpha)^2 (1 - E|eps|^2 / d), and v sigma^2 / (alpha^2 v + sigma^2) on a Gaussian; n = 40,000."""
    schedule, v, n = dj.vp_linear(), 0.3, 40_000
    law = mixtures.gaussian(np.array([0.5, -1.0]), np.full(2, v))
    x0 = jnp.asarray(mixtures.draw(np.random.default_rng(0), law, n), jnp.float32)
    denoiser, times = mixtures.denoiser(law, schedule), jnp.asarray([0.3, 0.9, 0.1])

    @jax.jit
    def measure(key):
        mmse = estimate_mmse(key, schedule, denoiser, x0, times)
        x = dj.q_sample(schedule, x0, jnp.full(n, 0.3), dj.normal_like(key, x0))
        eps, (alpha, sigma) = denoiser(x, jnp.full(n, 0.3), None).eps, schedule(jnp.float32(0.3))
        asked = jax.vmap(mmse)(jnp.asarray([0.0, 0.1, 0.2, 0.3, 0.9, 1.0]))
        return asked, (sigma / alpha) ** 2 * (1 - jnp.mean(eps**2)), schedule(times)

    (before, low, between, middle, high, after), second_moment, (alpha, sigma) = measure(jax.random.key(0))
    exact = v * sigma**2 / (alpha**2 * v + sigma**2)
    np.testing.assert_allclose([middle, high, low], exact, rtol=4 * np.sqrt(1 / n))
    np.testing.assert_allclose(
        second_moment, exact[0], rtol=4 * 0.02
    )  # (1 - e) / e times that of E|eps|^2, 1 / sqrt(n)
    assert before == low and after == high
    np.testing.assert_allclose(between, (low + middle) / 2, rtol=1e-5)


# --- the probability flow ---------------------------------------------------------------------------------------------


def posterior_mean(x, sigma):
    """E[x0 | x0 + sigma n = x] for LAW, in NumPy, for algorithms 1 and 2."""
    w, m, v = LAW[:3]
    total = v + sigma**2
    logp = np.log(w) - 0.5 * np.sum((x[:, None] - m) ** 2 / total + np.log(total), axis=-1)
    r = np.exp(logp - logp.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return np.sum(r[:, :, None] * (m + v / total * (x[:, None] - m)), axis=1)


def karras_step(x, t, s):
    """Karras et al. 2022, algorithm 1 with sigma(t) = t: lines 4-8."""
    d = (x - posterior_mean(x, t)) / t
    y = x + (s - t) * d
    if s != 0:
        y = x + (s - t) * (d / 2 + (y - posterior_mean(y, s)) / s / 2)
    return y


def test_heun_is_algorithm_1_of_edm(x64):
    n = 18
    levels = (80 ** (1 / 7) + np.arange(n) / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    times = np.append(levels, 0.0)
    x = 80.0 * np.random.default_rng(0).standard_normal((4, 2))
    expected = x
    for t, s in itertools.pairwise(times):
        expected = karras_step(expected, t, s)
    schedule = dj.edm()
    go = jax.jit(
        lambda x, times: dj.sample(jax.random.key(0), dj.heun(schedule), mixtures.denoiser(LAW, schedule), x, times)
    )
    np.testing.assert_allclose(go(jnp.asarray(x), jnp.asarray(times)), expected, rtol=1e-9, atol=1e-12)
    assert np.max(np.abs(np.asarray(dj.karras(n), np.float64) - times)) < 1e-4


def test_midpoint_is_the_formula(x64):
    """On EDM's time, where the velocity is (x - x0) / t."""
    schedule, t, s = dj.edm(), 2.0, 1.2
    y = X + (s - t) / 2 * (X - posterior_mean(X, t)) / t
    expected = X + (s - t) * (y - posterior_mean(y, 1.6)) / 1.6
    np.testing.assert_allclose(run_steps([midpoint(schedule)], schedule, t, s)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpm_2_is_k_diffusions(eta, x64):
    """The midpoint method for x / alpha at the geometric mean of sigma and sigma_down, then sigma_up z."""
    schedule, t, s = dj.vp_linear(), 0.7, 0.45
    a_t, s_t, x0, _ = parts(schedule, t)
    a_s, s_s = parts(schedule, s)[:2]
    high, low, y = s_t / a_t, s_s / a_s, X / a_t
    up = eta * np.sqrt(low**2 * (high**2 - low**2) / high**2)
    down = np.sqrt(low**2 - up**2)
    middle = np.sqrt(high * down)
    y2 = y + (y - x0) / high * (middle - high)
    y = y + (y2 - posterior_mean(y2, middle)) / middle * (down - high)
    y = y + up * np.asarray(white(KEY, jnp.asarray(X), t, s))
    np.testing.assert_allclose(run_steps([dpm_2(schedule, eta)], schedule, t, s)[0], a_s * y, rtol=1e-9)


def test_dpm_2_is_dpm_solver_2(x64):
    for problem in ("vp_linear", "rectified"):
        schedule = PROBLEMS[problem].schedule
        mine, other = run_steps((dpm_2(schedule), dpm_solver_2(schedule)), schedule, 0.7, 0.45)
        np.testing.assert_allclose(mine, other, rtol=1e-10)


@pytest.mark.parametrize(("tolerance", "most"), [(1e-3, 60), (1e-6, 150), (1e-9, 400)])
@pytest.mark.parametrize("problem", ["cosine", "edm", "ve"])
def test_adaptive_meets_its_tolerance_from_end_to_end(problem, tolerance, most, x64):
    """In one step of the grid, within a few tolerances, and with a number of evaluations that grows slowly."""
    schedule, top, log = PROBLEMS[problem].schedule, PROBLEMS[problem].top, []
    exact = mixtures.denoiser(BELL, schedule)

    def denoiser(x, t, cond):
        jax.debug.callback(lambda: log.append(1))
        return exact(x, t)

    @jax.jit
    def go(x):
        y = dj.sample(KEY, adaptive(schedule, tolerance, tolerance), denoiser, x, jnp.asarray([top, 0.0]))
        return y, mixtures.flow(BELL, schedule, x, jnp.asarray(top), jnp.asarray(0.0))

    y, wanted = go(
        float(schedule(jnp.asarray(top)).sigma) * jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    )
    jax.effects_barrier()
    print(f"{problem}: error {np.abs(y - wanted).max():.1e} in {len(log)} evaluations")
    assert np.abs(y - wanted).max() < 5 * tolerance and len(log) < most


@pytest.mark.slow
def test_adaptive_can_be_differentiated(x64):
    """dy/dx of a Gaussian's flow is the ratio of the standard deviations."""
    schedule, sampler = dj.cosine(), adaptive(dj.cosine(), 1e-8, 1e-8)
    denoiser = mixtures.denoiser(mixtures.gaussian(np.zeros(2), np.full(2, 0.3)), schedule)
    go = jax.jit(jax.grad(lambda x: dj.sample(KEY, sampler, denoiser, x, jnp.asarray([1.0, 0.0]))[0, 0]))
    np.testing.assert_allclose(go(jnp.asarray(X)), [[np.sqrt(0.3), 0], [0, 0]], atol=1e-7)


# --- the reverse process ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_euler_maruyama_and_reverse_diffusion_are_the_formulas(x64):
    """x - f dt x + g^2 dt score + g sqrt(dt) z; and Song et al.'s predictors, whose beta is that of the step."""
    z, t, s = np.asarray(white(KEY, jnp.asarray(X), None, None)), 0.7, 0.65
    schedule = dj.vp_linear(0.1, 20.0)
    _, s_t, _, eps = parts(schedule, t)
    beta = 0.1 + t * 19.9
    expected = X + (beta / 2 * X - beta * eps / s_t) * (t - s) + np.sqrt(beta * (t - s)) * z
    em, rd = run_steps((euler_maruyama(schedule), reverse_diffusion(schedule)), schedule, t, s)
    np.testing.assert_allclose(em, expected, rtol=1e-9)
    keep = parts(schedule, t)[0] / parts(schedule, s)[0]  # sqrt(1 - beta_i) of the step
    np.testing.assert_allclose(rd, (2 - keep) * X - (1 - keep**2) * eps / s_t + np.sqrt(1 - keep**2) * z, rtol=1e-9)

    schedule = dj.ve(0.05, 10.0)
    (_, s_t, _, eps), s_s = parts(schedule, t), parts(schedule, s)[1]
    expected = X - (s_t**2 - s_s**2) * eps / s_t + np.sqrt(s_t**2 - s_s**2) * z
    np.testing.assert_allclose(run_steps([reverse_diffusion(schedule)], schedule, t, s)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("make", [euler_maruyama, reverse_diffusion])
def test_the_last_step_to_no_noise_is_the_mean(make, x64):
    schedule = dj.edm()
    y = run_steps([make(schedule)], schedule, 0.3, 0.0)[0]
    x0 = parts(schedule, 0.3)[2]
    if make is reverse_diffusion:
        np.testing.assert_allclose(y, x0, rtol=1e-10)
    else:
        np.testing.assert_allclose(y, X + 2 * (x0 - X), rtol=1e-10)


# --- churn, restart ---------------------------------------------------------------------------------------------------


def test_chain_of_one_and_churn_of_nothing():
    schedule = dj.edm()
    heun = dj.heun(schedule)
    assert dj.chain(heun) is heun
    assert dj.churn(heun, schedule, 0.0, 0.0, 1.0, 1.0) is heun
    outside = dj.churn(heun, schedule, 0.3, 5.0, 6.0, 80.0)  # t = 3 is not in [5, 6]
    np.testing.assert_allclose(*run_steps((outside, heun), schedule, 3.0, 1.0, X.astype(np.float32)), rtol=1e-6)


def test_churn_is_algorithm_2_of_edm(x64):
    """x_hat = x + sqrt(t_hat^2 - t^2) S_noise z, t_hat = t (1 + gamma), then algorithm 1 from it; gamma is capped."""
    schedule, t, s = dj.edm(), 2.0, 1.2
    z = np.asarray(white(jax.random.fold_in(KEY, 0), jnp.asarray(X), t, s))
    rates = ((0.2, 0.2), (5.0, np.sqrt(2) - 1))
    got = run_steps(
        [dj.churn(dj.heun(schedule), schedule, rate, 0.05, 50.0, 80.0) for rate, _ in rates], schedule, t, s
    )
    for y, (_, gamma) in zip(got, rates, strict=True):
        t_hat = t * (1 + gamma)
        np.testing.assert_allclose(y, karras_step(X + np.sqrt(t_hat**2 - t**2) * 1.003 * z, t_hat, s), rtol=1e-8)


@pytest.mark.parametrize("problem", ["vp_linear", "rectified", "cosine"])
def test_churn_leaves_the_law_of_each_time(problem):
    """On a schedule whose time ends at 1, up to t_hat <= 1 and, with no move, the law of t_hat."""
    schedule, seen = PROBLEMS[problem].schedule, []
    spy = dj.Sampler(lambda x: (), lambda key, x, state, t, s, denoise: ((x, t), state))
    churned = dj.churn(spy, schedule, 0.2, 0.0, 1.0, 1.0, 1.0)
    noise = jax.random.normal(jax.random.key(0), (20_000, 1))

    @jax.jit
    def compute(t):
        (y, t_hat), _ = churned.step(jax.random.key(1), schedule(t).sigma * noise, (), t, t / 2, None)
        return jnp.std(y), t_hat, schedule(t_hat).sigma

    for t in (0.5, 0.99, 1.0):
        std, t_hat, sigma = map(float, compute(jnp.float32(t)))
        assert std == pytest.approx(sigma, rel=4.5 / np.sqrt(40_000))
        seen.append(t_hat)
    assert 0.5 < seen[0] < 1 and 0.99 <= seen[1] <= 1 and seen[2] == 1


def test_restart_is_algorithm_1(x64):
    """EDM's Heun steps and, once t_min is reached, K = 2 times back up to t_max and down in two steps, in NumPy."""
    schedule, times = dj.edm(), np.array([3.0, 1.5, 1.0, 0.4])
    interval = np.array([2.5, 1.8, 1.0])
    expected = X
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        expected = karras_step(expected, t, s)
        if s == 1.0:
            for k in (1, 2):
                z = white(dj.fold(dj.fold(KEY, i), k), jnp.asarray(X), t, s)
                expected = expected + np.sqrt(2.5**2 - 1) * np.asarray(z)
                for a, b in itertools.pairwise(interval):
                    expected = karras_step(expected, a, b)
    sampler, denoiser = restart(dj.heun(schedule), schedule, jnp.asarray(interval), 2), exact_denoiser(LAW, schedule)
    y = jax.jit(lambda x: dj.sample(KEY, sampler, denoiser, x, jnp.asarray(times)))(jnp.asarray(X))
    np.testing.assert_allclose(y, expected, rtol=1e-8)


def test_bad_arguments():
    schedule = dj.edm()
    for call, match in (
        (lambda: dj.ddim(schedule, 1.5), "eta"),
        (lambda: dpm_2(schedule, -0.1), "eta"),
        (lambda: analytic_dpm(schedule, lambda t: t, 2.0), "eta"),
        (lambda: dj.ddpm(schedule, "medium"), "'small' or 'large'"),
        (lambda: adaptive(schedule, 0.0, 0.0), "rtol and atol"),
        (lambda: dj.churn(dj.heun(schedule), schedule, -0.1, 0.0, 1.0, 1.0), "rate"),
        (lambda: restart(dj.heun(schedule), schedule, jnp.asarray([1.0, 2.0]), 1), "must fall"),
        (lambda: restart(dj.heun(schedule), schedule, jnp.asarray([2.0, 1.0]), 0), "repeats"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    plain = mixtures.denoiser(BELL, schedule)
    with pytest.raises(ValueError, match="no variance"):
        dj.sample(KEY, dj.ancestral(schedule), plain, jnp.ones((2, 3)), jnp.asarray([2.0, 1.0]))
