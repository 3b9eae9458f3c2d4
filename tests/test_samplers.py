"""Every sampler, on problems whose answer is known: laws, orders of convergence, identities, keys and compilation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture

D = 16
# name -> constructor from a schedule and its largest time.
DETERMINISTIC = {
    "ddim_0": lambda s, top: dj.ddim(s, 0.0),
    "euler": lambda s, top: dj.euler(s),
    "heun": lambda s, top: dj.heun(s),
    "dpmpp_2m": lambda s, top: dj.dpmpp_2m(s),
}
RANDOM = {
    "ddpm_small": lambda s, top: dj.ddpm(s, "small"),
    "ddpm_large": lambda s, top: dj.ddpm(s, "large"),
    "ddim_half": lambda s, top: dj.ddim(s, 0.5),
    "ddim_1": lambda s, top: dj.ddim(s, 1.0),
    "churn_heun": lambda s, top: dj.churn(dj.heun(s), s, 0.05, 0.0, top, top, noise=1.0),
    "churn_euler": lambda s, top: dj.churn(dj.euler(s), s, 0.05, 0.0, top, top, noise=1.0),
}
CORRECTED = {
    "langevin": lambda s, top: dj.langevin(s, 0.15, 10),
    "langevin_ddpm": lambda s, top: dj.chain(dj.langevin(s, 0.05), dj.ddpm(s)),
    "langevin_ddim": lambda s, top: dj.chain(dj.langevin(s, 0.05), dj.ddim(s)),
}
SAMPLERS = DETERMINISTIC | RANDOM | CORRECTED

# schedule, grid from a noisy to a nearly clean time, largest time
PROBLEMS = {
    "vp_linear": (dj.vp_linear(), lambda n: dj.logsnr_uniform(n + 1, dj.vp_linear(), 1.0, 0.01)[:-1], 1.0),
    "rectified": (dj.rectified(), lambda n: dj.uniform(n, 1.0, 0.02), 1.0),
    "cosine": (dj.cosine(), lambda n: dj.uniform(n, 1.0, 0.02), 1.0),
    "edm": (dj.edm(), lambda n: dj.karras(n + 1, 0.05, 20.0)[:-1], 20.0),
    "ve": (dj.ve(0.05, 10.0), lambda n: dj.uniform(n, 1.0, 0.0), 1.0),
    "ve_noisy": (dj.ve(0.05, 10.0), lambda n: dj.uniform(n, 1.0, 0.5), 1.0),
}


def laws(d):
    """A Gaussian (as two equal components, so that both share one compilation) and a mixture, in d dimensions.

    The components of the mixture have different scales in D dimensions, equal ones elsewhere.
    """
    rng = np.random.default_rng(0)
    mean, variance = rng.uniform(-1, 1, d), rng.uniform(0.2, 0.6, d)
    apart = rng.standard_normal(d)
    apart *= 1.5 / np.linalg.norm(apart)
    single = Mixture(np.array([0.5, 0.5]), np.stack([mean, mean]), np.stack([variance, variance]))
    double = Mixture(
        np.array([0.3, 0.7]), np.stack([apart, -apart]), np.stack([variance, variance[::-1] / (2 if d == D else 1)])
    )
    return single, double, apart


def check_law(x, mixture, directions):
    """Every entry of mean and covariance (of 32) within its standard errors, p > 0.001; KS on projections, p > 0.01.

    Both are corrected for the number of comparisons (Bonferroni). Returns the smallest corrected p-value of KS.
    """
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    n, (mean, covariance) = len(x), mixtures.moments(mixture)
    error = np.abs(x.mean(0) - mean) / np.sqrt(np.diag(covariance) / n)
    assert error.max() < stats.norm.isf(0.0005 / error.size), f"mean off by {error.max():.1f} standard errors"
    centred = x - mean
    few = centred[:, :32]
    products = few[:, :, None] * few[:, None, :]
    error = np.abs(products.mean(0) - covariance[:32, :32]) / (products.std(0) / np.sqrt(n))
    assert error.max() < stats.norm.isf(0.0005 / error.size), f"covariance off by {error.max():.1f} standard errors"
    p = [stats.kstest(x @ u, mixtures.projected_cdf(mixture, u)).pvalue for u in directions]
    assert min(p) * len(p) > 0.01, f"KS p-values {p}"
    return min(p) * len(p)


def run_law(make, problem, steps, n, d=D, index=-1):
    """Start from the exact law at times[0]; compare with the exact law at times[index]."""
    schedule, grid, top = PROBLEMS[problem]
    times, sampler = grid(steps), make(schedule, top)

    @jax.jit
    def go(key, mixture, x):
        return dj.sample(key, sampler, mixtures.denoiser(mixture, schedule), x, times)

    single, double, apart = laws(d)
    rng = np.random.default_rng(1)
    random = rng.standard_normal(d)
    directions = [np.eye(d)[0], random / np.linalg.norm(random), apart / np.linalg.norm(apart)]
    smallest = 1.0
    for i, mixture in enumerate((single, double)):
        start, end = ([float(c) for c in schedule(times[j])] for j in (0, index))
        x = jnp.asarray(mixtures.draw(rng, mixtures.marginal(mixture, *start), n), jnp.float32)
        y = go(jax.random.key(i), jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), mixture), x)
        smallest = min(smallest, check_law(y, mixtures.marginal(mixture, *end), directions))
    print(f"{problem}: smallest corrected p = {smallest:.3f}")


ON_VP = ("ddpm_small", "ddpm_large", "dpmpp_2m")
ON_EDM = ("ddim_0", "heun", "churn_heun")  # where ddim_0 is euler and ddim_1 is ddpm_small


@pytest.mark.parametrize(
    ("name", "problem"),
    [(name, "rectified") for name in DETERMINISTIC | RANDOM]
    + [(name, "vp_linear") for name in ON_VP]
    + [(name, "edm") for name in ON_EDM]
    + [("ddpm_small", "cosine"), ("ddim_half", "ve")],
)
def test_law(name, problem):
    """A Gaussian and a mixture in 16 dimensions, n = 2000; rectified and cosine start without any signal."""
    run_law(SAMPLERS[name], problem, steps=200, n=2000)


@pytest.mark.parametrize(
    ("name", "problem"), [("langevin", "ve_noisy"), ("langevin_ddpm", "vp_linear"), ("langevin_ddim", "ve")]
)
def test_law_of_langevin(name, problem):
    """The same. Alone, annealed Langevin can follow the levels only while sigma, and so its step, is like the data.

    It ends at the last level but one.
    """
    alone = name == "langevin"
    make = (lambda s, top: dj.langevin(s, 0.15, 100)) if alone else SAMPLERS[name]
    run_law(make, problem, steps=60 if alone else 100, n=2000, index=-2 if alone else -1)


def test_langevin_has_the_right_law_in_two_dimensions(x64):
    """From the law of time t it stays there; for a Gaussian the finite step alone raises V to V / (1 - e / 2 V)."""
    schedule, t = dj.ve(0.05, 10.0), 0.3
    sigma, variance = float(schedule(jnp.asarray(t)).sigma), np.array([0.3, 2.0])
    law = mixtures.gaussian(np.zeros(2), variance)
    total, e = variance + sigma**2, 2 * (0.16 * sigma) ** 2
    expected = total / (1 - e / (2 * total))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((20_000, 2)) * np.sqrt(expected))
    sampler = dj.langevin(schedule, 0.16, 100)
    denoise = mixtures.denoiser(law, schedule)

    @jax.jit
    def go(key):
        return sampler.step(
            key, x, (), jnp.asarray(t), jnp.asarray(t), lambda x, t: denoise(x, jnp.full(x.shape[0], t))
        )

    y = go(jax.random.key(0))[0]
    np.testing.assert_allclose(np.var(y, axis=0), expected, rtol=4 * np.sqrt(2 / 20_000))


@pytest.mark.parametrize(("d", "least", "most"), [(2, 5.0, np.inf), (16, 1.1, 1.6), (256, 0.97, 1.1)])
def test_a_step_that_looks_at_the_score_has_another_law(d, least, most):
    """Why `langevin` does not use 2 (snr |z| / |score|)^2: the variance reached from N(0, I), where it should stay."""

    def step(x, key):
        z, score = jax.random.normal(key, x.shape), -x
        e = 2 * (0.16 * jnp.linalg.norm(z, axis=1) / jnp.linalg.norm(score, axis=1))[:, None] ** 2
        return x + e * score + jnp.sqrt(2 * e) * z, None

    x = jax.random.normal(jax.random.key(0), (2000, d))
    x, _ = jax.jit(lambda x, keys: jax.lax.scan(step, x, keys))(x, jax.random.split(jax.random.key(1), 400))
    print(f"variance at d = {d}: {float(jnp.var(x)):.2f}")
    assert least < float(jnp.var(x)) < most


@pytest.mark.parametrize("problem", ["vp_linear", "cosine"])
def test_ancestral_with_the_true_variance_is_exact_in_few_steps(problem):
    """For Gaussian data q(x_s | x_t) is Gaussian: 8 steps with its variance have no error, with a fixed one they do."""
    schedule = PROBLEMS[problem][0]
    times = jnp.linspace(0.9, 0.1, 9)
    single, _, apart = laws(D)
    law = mixtures.gaussian(single.means[0], single.variances[0])
    start, end = ([float(c) for c in schedule(t)] for t in (times[0], times[-1]))
    x = jnp.asarray(mixtures.draw(np.random.default_rng(2), mixtures.marginal(law, *start), 4000), jnp.float32)
    denoiser = mixtures.denoiser(law, schedule, next_time=lambda t: t - 0.1)

    @jax.jit
    def go(key):
        return [dj.sample(key, s, denoiser, x, times) for s in (dj.ancestral(schedule), dj.ddpm(schedule))]

    learned, fixed = go(jax.random.key(0))
    directions = [np.eye(D)[0], apart / np.linalg.norm(apart)]
    check_law(learned, mixtures.marginal(law, *end), directions)
    with pytest.raises(AssertionError, match="covariance off"):
        check_law(fixed, mixtures.marginal(law, *end), directions)


# --- order of convergence, in float64, against the exact probability flow ---------------------------------------------

ORDERS = {"ddim_0": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
RANGES = {
    "vp_linear": (dj.vp_linear(), 0.8, 0.1),
    "rectified": (dj.rectified(), 0.95, 0.1),
    "edm": (dj.edm(), 3.0, 0.2),
}


def at_scalar_time(law, schedule):
    """The denoiser as a step sees it."""
    return lambda x, t: mixtures.denoiser(law, schedule)(x, jnp.broadcast_to(t, x.shape[:1]))


@pytest.mark.parametrize("problem", RANGES)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name, problem):
    schedule, high, low = RANGES[problem]
    sampler = SAMPLERS[name](schedule, high)
    law = mixtures.gaussian(np.array([0.5, -1.0, 0.2]), np.array([0.25, 1.0, 0.04]))
    with jax.enable_x64(True):
        x = jnp.asarray(np.array([[1.0, -0.4, 0.3], [-0.7, 1.2, -1.5]]))
        denoise = at_scalar_time(law, schedule)
        step = jax.jit(lambda x, state, t, s: sampler.step(jax.random.key(0), x, state, t, s, denoise))
        exact = mixtures.flow(law, schedule, x, jnp.asarray(high), jnp.asarray(low))
        errors = []
        for n in (128, 256):
            times, y, state = np.linspace(high, low, n + 1), x, sampler.init(x)
            for t, s in itertools.pairwise(times):
                y, state = step(y, state, t, s)
            assert y.dtype == jnp.float64
            errors.append(float(jnp.sqrt(jnp.mean((y - exact) ** 2))))
    order = np.log2(errors[0] / errors[1])
    print(f"{name} on {problem}: order {order:.3f}, errors {errors}")
    assert order == pytest.approx(ORDERS[name], abs=0.1)


# --- contracts of all samplers ----------------------------------------------------------------------------------------


def everything(schedule, top=1.0):
    return {name: make(schedule, top) for name, make in SAMPLERS.items()} | {"ancestral": dj.ancestral(schedule)}


@pytest.mark.parametrize("name", everything(dj.cosine()))
def test_keys_traces_batches_and_ends(name):
    """From a time without signal to one without noise, by v-prediction, with one key per example.

    An example fills whole vector registers: of a loop's remainder XLA's CPU compiler rounds the last bit differently.
    """
    schedule, d, n = dj.cosine(), 16, 5
    law = mixtures.gaussian(np.full(d, 0.5), np.linspace(0.2, 0.9, d))
    sampler, truth = everything(schedule)[name], mixtures.denoiser(law, schedule)
    traces = []

    def net(x, t, cond):
        traces.append(x.shape)
        v = dj.to_v(schedule, truth(x, t), t)
        return jnp.concatenate([v, jnp.zeros_like(v)], axis=-1) if name == "ancestral" else v

    denoiser = dj.parameterize(net, schedule, "v", learned_variance=name == "ancestral")
    go = jax.jit(functools.partial(dj.sample, trajectory=True), static_argnums=(1, 2))
    plain = jax.jit(dj.sample, static_argnums=(1, 2))

    keys, times = jax.random.split(jax.random.key(0), 4), jnp.asarray(np.linspace(1, 0, n + 1), jnp.float32)
    x = jax.random.normal(jax.random.key(9), (4, d))
    path = np.asarray(go(keys, sampler, denoiser, x, times))
    assert path.shape == (n + 1, 4, d) and np.all(np.isfinite(path))
    np.testing.assert_array_equal(path[0], x)

    traced = len(traces)
    other = np.asarray(go(jax.random.split(jax.random.key(1), 4), sampler, denoiser, x, times))
    moved = np.asarray(go(keys, sampler, denoiser, x, times**2))
    assert len(traces) == traced, "traced again for other keys or times"
    assert not np.array_equal(moved[-1], path[-1])
    assert np.array_equal(other, path) == (name in DETERMINISTIC)

    for pick in (np.array([3, 1]), np.array([0, 2])):  # in a batch of two, in another place, without the trajectory
        np.testing.assert_array_equal(plain(keys[pick], sampler, denoiser, x[pick], times), path[-1][pick])


def test_one_key_for_the_whole_batch_draws_different_examples():
    law, schedule = mixtures.gaussian(np.zeros(3), np.ones(3)), dj.cosine()
    x = jnp.zeros((4, 3))
    y = dj.sample(jax.random.key(0), dj.ddpm(schedule), mixtures.denoiser(law, schedule), x, dj.uniform(3))
    assert len(np.unique(np.asarray(y)[:, 0])) == 4


def test_float32_stays_float32_where_float64_is_enabled(x64):
    schedule = dj.cosine()
    x, times = jax.ShapeDtypeStruct((3, 2), "float32"), jax.ShapeDtypeStruct((4,), "float32")

    def denoiser(x, t, cond):
        return dj.from_v(schedule, x, t, 0.1 * x)._replace(variance_fraction=jnp.full_like(x, 0.5))

    for name, sampler in everything(schedule).items():
        out = jax.eval_shape(lambda x, t, s=sampler: dj.sample(jax.random.key(0), s, denoiser, x, t), x, times)
        assert out.dtype == "float32", name
    assert dj.logsnr_uniform(3, dj.vp_linear()).dtype == "float32"


@pytest.mark.parametrize("shape", [(3, 2), (3, 5, 2), (3, 4, 4, 2), (3, 2, 4, 4, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(shape, dtype):
    schedule = dj.vp_linear()

    def denoiser(x, t, cond):
        return dj.from_eps(schedule, x, t, 0.1 * x)._replace(variance_fraction=jnp.full_like(x, 0.5))

    x, times = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((4,), "float32")
    key, keys = jax.eval_shape(lambda: (jax.random.key(0), jax.random.split(jax.random.key(0), 3)))
    for name, sampler in everything(schedule).items():
        for k in (key, keys):
            out = jax.eval_shape(lambda k, x, t, s=sampler: dj.sample(k, s, denoiser, x, t), k, x, times)
            assert out.shape == shape and out.dtype == dtype, name


def test_shape_does_not_change_the_numbers():
    schedule, rng = dj.vp_linear(), np.random.default_rng(0)
    mean, variance, noise = rng.normal(size=(2, 2, 3)), rng.uniform(0.1, 1, (2, 2, 3)), rng.normal(size=(4, 2, 2, 3))
    x = jnp.asarray(noise, jnp.float32)
    image, flat = mixtures.gaussian(mean, variance), mixtures.gaussian(mean.ravel(), variance.ravel())

    def run(law, x):
        denoiser = mixtures.denoiser(law, schedule)
        return jax.jit(lambda x: dj.sample(jax.random.key(0), dj.dpmpp_2m(schedule), denoiser, x, dj.uniform(5)))(x)

    np.testing.assert_allclose(run(image, x).reshape(4, -1), run(flat, x.reshape(4, -1)), rtol=1e-5, atol=1e-6)


def test_evaluations_are_counted():
    """One per step; two for Heun except where the noise ends, 2n - 1 on Karras's grid; one more per correction."""
    schedule, n, counter = dj.edm(), 6, []
    law = mixtures.gaussian(np.zeros(2), np.ones(2))

    def denoiser(x, t, cond):
        jax.debug.callback(lambda: counter.append(1))
        return mixtures.denoiser(law, schedule)(x, t)

    expected = {
        "heun": 2 * n - 1,
        "ddim_0": n,
        "dpmpp_2m": n,
        "langevin": 10 * n,
        "langevin_ddim": 2 * n,
    }
    x, times = jnp.ones((3, 2)), dj.karras(n)
    for name, count in expected.items():
        counter.clear()
        sampler = SAMPLERS[name](schedule, 80.0)
        jax.block_until_ready(jax.jit(lambda s=sampler: dj.sample(jax.random.key(0), s, denoiser, x, times))())
        jax.effects_barrier()
        assert len(counter) == count, name


def test_velocity_prediction_at_both_ends_of_the_straight_line():
    schedule, law = dj.rectified(), mixtures.gaussian(np.array([0.5, -0.2]), np.array([0.3, 0.6]))
    truth = mixtures.denoiser(law, schedule)
    denoiser = dj.parameterize(lambda x, t, c: dj.to_velocity(schedule, truth(x, t), t), schedule, "velocity")
    x = jnp.asarray([[1.0, -1.0], [0.3, 2.0]])
    exact = mixtures.flow(law, schedule, x, jnp.float32(1.0), jnp.float32(0.0))
    for sampler in (dj.euler(schedule), dj.heun(schedule), dj.ddim(schedule), dj.dpmpp_2m(schedule)):
        y = jax.jit(lambda s=sampler: dj.sample(jax.random.key(0), s, denoiser, x, dj.uniform(64)))()
        np.testing.assert_allclose(y, exact, atol=0.05)


def test_bad_input():
    schedule, x, key = dj.edm(), jnp.ones((2, 3)), jax.random.key(0)
    law = mixtures.gaussian(np.zeros(3), np.ones(3))
    denoiser = mixtures.denoiser(law, schedule)
    for times in (jnp.ones(()), jnp.ones((1,)), jnp.ones((3, 2))):
        with pytest.raises(ValueError, match="times must be"):
            dj.sample(key, dj.ddim(schedule), denoiser, x, times)
    with pytest.raises(ValueError, match="eta"):
        dj.ddim(schedule, 1.5)
    with pytest.raises(ValueError, match="'small' or 'large'"):
        dj.ddpm(schedule, "medium")
    with pytest.raises(ValueError, match="no variance"):
        dj.sample(key, dj.ancestral(schedule), denoiser, x, jnp.asarray([2.0, 1.0]))
    with pytest.raises(ValueError, match="snr"):
        dj.langevin(schedule, 0.0)
    with pytest.raises(ValueError, match="steps"):
        dj.langevin(schedule, 0.1, 0)
    with pytest.raises(ValueError, match="at least one"):
        dj.chain()
    with pytest.raises(ValueError, match="rate"):
        dj.churn(dj.heun(schedule), schedule, -0.1, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="3 keys"):
        dj.sample(jax.random.split(key, 3), dj.ddpm(schedule), denoiser, x, jnp.asarray([2.0, 1.0]))


# --- identities -------------------------------------------------------------------------------------------------------

LAW = Mixture(np.array([0.3, 0.7]), np.array([[1.0, -0.5], [-0.6, 0.4]]), np.array([[0.1, 0.3], [0.4, 0.2]]))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def one_step(sampler, schedule, x, t, s, key=None):
    denoise = at_scalar_time(LAW, schedule)
    key = jax.random.key(7) if key is None else key
    return jax.jit(lambda t, s: sampler.step(key, x, sampler.init(x), t, s, denoise)[0])(jnp.asarray(t), jnp.asarray(s))


@pytest.mark.parametrize("problem", ["vp_linear", "rectified"])
def test_identities_of_one_step(problem, x64):
    """DDIM is Euler in the time sigma / alpha, and the first step of 2M, and DPM-Solver-1; ddpm is ddim(eta=1)."""
    schedule = PROBLEMS[problem][0]
    samplers = dj.ddim(schedule), dj.dpmpp_2m(schedule), dj.ddpm(schedule), dj.ddim(schedule, 1.0)
    x, denoise = jnp.asarray([[0.3, -1.0], [1.1, 0.4]]), at_scalar_time(LAW, schedule)

    @jax.jit
    def compute(t, s):
        steps = [f.step(jax.random.key(7), x, f.init(x), t, s, denoise)[0] for f in samplers]
        return denoise(x, t).eps, schedule(t), schedule(s), steps

    t, s = jnp.asarray(0.7), jnp.asarray(0.45)
    eps, (a_t, s_t), (a_s, s_s), (ddim, first, small, one) = jax.tree.map(np.asarray, compute(t, s))
    np.testing.assert_allclose(ddim, a_s * (np.asarray(x) / a_t + (s_s / a_s - s_t / a_t) * eps), rtol=1e-10)
    h = np.log(a_s / s_s) - np.log(a_t / s_t)
    np.testing.assert_allclose(ddim, a_s / a_t * np.asarray(x) - s_s * np.expm1(h) * eps, rtol=1e-10)
    np.testing.assert_allclose(ddim, first, rtol=1e-14)
    np.testing.assert_allclose(small, one, rtol=1e-10)
    assert not np.allclose(small, ddim)


def test_chain_of_one_and_churn_of_nothing():
    schedule = dj.edm()
    heun = dj.heun(schedule)
    assert dj.chain(heun) is heun
    assert dj.churn(heun, schedule, 0.0, 0.0, 1.0, 1.0) is heun
    x = jnp.asarray([[0.3, -1.0]])
    outside = dj.churn(heun, schedule, 0.3, 5.0, 6.0, 80.0)  # t = 3 is not in [5, 6]
    np.testing.assert_allclose(
        one_step(outside, schedule, x, 3.0, 1.0), one_step(heun, schedule, x, 3.0, 1.0), rtol=1e-6
    )


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


def test_churn_is_algorithm_2_of_edm(x64):
    """x_hat = x + sqrt(t_hat^2 - t^2) S_noise z, t_hat = t (1 + gamma), then algorithm 1 from t_hat; gamma is capped"""
    schedule, key, x = dj.edm(), jax.random.key(3), jnp.asarray([[0.3, -1.0], [1.1, 0.4]])
    z = np.asarray(dj.normal_like(jax.random.fold_in(key, 0), x))
    for rate, gamma in ((0.2, 0.2), (5.0, np.sqrt(2) - 1)):
        t, s, t_hat = 2.0, 1.2, 2.0 * (1 + gamma)
        expected = karras_step(np.asarray(x) + np.sqrt(t_hat**2 - t**2) * 1.003 * z, t_hat, s)
        sampler = dj.churn(dj.heun(schedule), schedule, rate, 0.05, 50.0, 80.0)
        np.testing.assert_allclose(one_step(sampler, schedule, x, t, s, key), expected, rtol=1e-8)


@pytest.mark.parametrize("problem", ["vp_linear", "rectified", "cosine"])
def test_churn_leaves_the_law_of_each_time(problem):
    """On a schedule whose time ends at 1, up to t_hat <= 1 and, with no move, the law of t_hat."""
    schedule, seen = PROBLEMS[problem][0], []
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


def test_langevin_step_is_the_formula(x64):
    schedule, t = dj.vp_linear(), 0.4
    x = jnp.asarray([[0.3, -1.0], [1.1, 0.4]])
    key = jax.random.key(5)
    z = np.asarray(dj.normal_like(jax.random.fold_in(key, 0), x))
    score = np.asarray(jax.jit(lambda x: mixtures.score(LAW, schedule, x, jnp.full(2, t)))(x))
    e = 2 * (0.16 * float(schedule(jnp.asarray(t)).sigma)) ** 2
    got = one_step(dj.langevin(schedule, 0.16), schedule, x, t, 0.3, key)
    np.testing.assert_allclose(got, np.asarray(x) + e * score + np.sqrt(2 * e) * z, rtol=1e-10)


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_classifier_free(x64):
    """Scale 1 is conditional, 0 unconditional; linear in the scale; a function of t; consistent with x."""
    schedule, cond = dj.cosine(), jnp.asarray([0, 1, 1])
    model = mixtures.conditional(LAW, schedule)
    x, t = jnp.asarray([[0.3, -1.0], [1.1, 0.4], [0.0, 0.2]]), jnp.asarray([0.3, 0.5, 0.9])

    @jax.jit
    def compute(scales):
        guided = [dj.classifier_free(model, 2, scales[i])(x, t, cond) for i in range(4)]
        by_time = dj.classifier_free(model, jnp.asarray([2]), lambda t: jnp.where(t > 0.4, 2.0, 0.0))(x, t, cond)
        return guided, by_time, model(x, t, cond), model(x, t, jnp.full(3, 2)), schedule(t)

    (zero, one, two, three), by_time, yes, no, (alpha, sigma) = jax.tree.map(np.asarray, compute(jnp.arange(4.0)))
    assert dj.classifier_free(model, 2, 1.0) is model
    for guided, expected in ((zero, no), (one, yes)):
        for got, want in zip(guided[:2], expected[:2], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(three.eps, no.eps + 3 * (yes.eps - no.eps), rtol=1e-10)
    np.testing.assert_allclose(alpha[:, None] * three.x0 + sigma[:, None] * three.eps, x, atol=1e-12)
    np.testing.assert_allclose(by_time.x0, np.concatenate([no.x0[:1], two.x0[1:]]), rtol=1e-10)
    with pytest.raises(ValueError, match="condition"):
        dj.classifier_free(model, 2, 2.0)(x, t, None)


def test_classifier_free_takes_any_tree_and_keeps_the_variance():
    schedule = dj.cosine()

    def model(x, t, cond):
        shift = cond["text"][:, 0, :2] + dj.bcast(cond["label"], x[:, :2])
        return dj.from_eps(schedule, x, t, shift)._replace(variance_fraction=dj.bcast(cond["label"], x) + 0 * x)

    cond = {"text": jnp.ones((2, 3, 4)), "label": jnp.asarray([1.0, 2.0])}
    null = {"text": jnp.zeros((3, 4)), "label": 0.0}
    out = jax.jit(dj.classifier_free(model, null, 2.0))(jnp.zeros((2, 2)), jnp.full(2, 0.5), cond)
    np.testing.assert_allclose(out.eps, [[4.0, 4.0], [6.0, 6.0]])
    np.testing.assert_allclose(out.variance_fraction, [[1.0, 1.0], [2.0, 2.0]])


def test_static_threshold_stays_consistent():
    schedule, x, t = dj.vp_linear(), jnp.asarray([[3.0, -0.2]]), jnp.asarray([0.2])
    truth = mixtures.denoiser(LAW, schedule)
    p, wide, plain, (alpha, sigma) = jax.jit(
        lambda x: (
            dj.static_threshold(truth, schedule, 0.4)(x, t, None),
            dj.static_threshold(truth, schedule, 100.0)(x, t, None),
            truth(x, t),
            schedule(t),
        )
    )(x)
    np.testing.assert_allclose(p.x0, np.clip(plain.x0, -0.4, 0.4))
    assert not np.array_equal(p.x0, plain.x0)
    np.testing.assert_allclose(alpha[:, None] * p.x0 + sigma[:, None] * p.eps, x, rtol=1e-6)
    np.testing.assert_allclose(wide.eps, plain.eps, rtol=1e-4)
