"""Inverse problems: published algorithms against dense linear algebra, exact posteriors of Gaussians, and limits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
from conformance import posterior as conformance
from diffusion_jax import inverse, operators
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture

KEY = jax.random.key(3)
SCHEDULES = {
    "vp_linear": (dj.vp_linear(), 0.6, 0.5),
    "rectified": (dj.rectified(), 0.6, 0.5),
    "edm": (dj.edm(), 1.5, 1.1),
}
LINE = 12
KNOWN = np.arange(LINE) % 3 != 1
KERNEL = np.array([0.1, 0.3, 0.4, 0.25, 0.05])
LINEAR = {  # of vectors of 12 numbers
    "mask": operators.masking(KNOWN),
    "box": operators.box(3),
    "blur": operators.blur(KERNEL),
    "bicubic": operators.bicubic(2, axes=1),
    "compressed_sensing": operators.compressed_sensing(KEY, (LINE,), 5),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def dense(operator, d=LINE):
    return np.asarray(jax.jit(operator.apply)(jnp.eye(d))).T


def vectors(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def correlated(components=1, d=LINE, seed=0):
    """Components with a covariance in a random basis."""
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(components)])
    weights = np.arange(1.0, components + 1) / np.sum(np.arange(1.0, components + 1))
    return Mixture(weights, rng.standard_normal((components, d)), np.exp(rng.uniform(-2, 1, (components, d))), basis)


def scalar(denoiser):
    """A denoiser as a step sees it."""
    return lambda x, t: denoiser(x, jnp.broadcast_to(t, x.shape[:1]), None)


def one_step(sampler, denoiser, x, t, s, key=KEY):
    go = jax.jit(lambda x, t, s: sampler.step(key, x, sampler.init(x), t, s, scalar(denoiser))[0])
    return np.asarray(go(x, jnp.asarray(t, x.dtype), jnp.asarray(s, x.dtype)))


# --- exact where theory says so ---------------------------------------------------------------------------------------

SPHERE = mixtures.gaussian(np.linspace(-1, 1, LINE), np.full(LINE, 0.4))
AXES = mixtures.gaussian(np.linspace(-1, 1, LINE), np.geomspace(0.1, 2, LINE))
EXACT = {  # method, law for which p(y | x_t) is exact, operators
    "pigdm": (lambda d, s, op, y: inverse.pigdm(d, s, op, y, 0.3, variance=0.4), SPHERE, LINEAR),
    "mmps": (lambda d, s, op, y: inverse.mmps(d, s, op, y, 0.3, iterations=2 * LINE), correlated(), LINEAR),
    "tmpd": (lambda d, s, op, y: inverse.tmpd(d, s, op, y, 0.3), AXES, ["mask"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", EXACT)
def test_exact_for_gaussian_data(method, x64):
    """The guided denoiser is that of the exact posterior, as a Gaussian of its own: x0, and with it score and eps.

    Every operator, and the schedules in turn.
    """
    make, law, names = EXACT[method]
    x, x0, n = vectors((4, LINE), (1, LINE), (1, LINE))

    @jax.jit
    def measured(x0, n):
        return {name: LINEAR[name].apply(x0) + 0.3 * LINEAR[name].apply(n) for name in names}

    ys = measured(x0, n)
    problems = dict(zip(names, itertools.cycle(SCHEDULES.values())))
    posteriors = {name: conformance.exact_posterior(law, dense(LINEAR[name]), ys[name][0], 0.3)[0] for name in names}

    @jax.jit
    def compute(x, ys):
        pairs = {}
        for name, (schedule, t, _) in problems.items():
            guided = make(mixtures.denoiser(law, schedule), schedule, LINEAR[name], ys[name])
            exact = mixtures.denoiser(posteriors[name], schedule)
            pairs[name] = guided(x, jnp.full(4, t), None)[:2], exact(x, jnp.full(4, t))[:2]
        return pairs

    for name, (guided, exact) in compute(x, ys).items():
        atol = 1e-6 if name == "blur" else 1e-9  # an ill-conditioned system
        np.testing.assert_allclose(guided, exact, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_what_is_exact_for_a_gaussian_is_not_for_others(x64):
    """Pi-GDM and TMPD for correlated data, MMPS for two components: the errors that the conformance table shows."""
    schedule, t, _ = SCHEDULES["vp_linear"]
    x, y = vectors((4, LINE), (1, LINE))
    y = jnp.where(KNOWN, y, 0)
    for method, law in (("pigdm", correlated()), ("tmpd", correlated()), ("mmps", correlated(2))):
        truth = mixtures.denoiser(conformance.exact_posterior(law, np.diag(KNOWN), y[0], 0.3)[0], schedule)
        guided = EXACT[method][0](mixtures.denoiser(law, schedule), schedule, LINEAR["mask"], y)
        a, b = jax.jit(lambda x, t, g=guided, h=truth: (g(x, t, None).x0, h(x, t).x0))(x, jnp.full(4, t))
        assert float(jnp.abs(a - b).max()) > 0.05, method


def test_few_conjugate_gradients_are_few(x64):
    """The error falls with the iterations, and each example has steps of its own."""
    schedule, t, _ = SCHEDULES["vp_linear"]
    operator, law = LINEAR["bicubic"], correlated()
    x, y = vectors((4, LINE), (4, LINE // 2))
    x = x.at[3].mul(100)
    prior = mixtures.denoiser(law, schedule)

    def run(x, y, iterations):
        return inverse.mmps(prior, schedule, operator, y, 0.3, iterations)(x, jnp.full(x.shape[0], t), None).x0

    one, three, all_, half = jax.jit(lambda x, y: (run(x, y, 1), run(x, y, 3), run(x, y, 12), run(x[:2], y[:2], 3)))(
        x, y
    )
    errors = [float(jnp.abs(a[:3] - all_[:3]).max()) for a in (one, three)]
    assert errors[0] > 3 * errors[1] > 0
    np.testing.assert_allclose(half, three[:2], rtol=1e-12)


def test_exact_posterior_is_bayes_rule():
    """The closed form against p(x) p(y | x) / p(y), pointwise, from log densities of another code path."""
    with jax.enable_x64(True):
        law, (a, x, y) = correlated(3, 4), (np.asarray(v) for v in vectors((2, 4), (5, 4), (2,)))
        posterior, evidence = conformance.exact_posterior(law, a, y, 0.5)
        clean = [
            jax.jit(lambda x, m=m: mixtures.log_density(m, dj.edm(), x, jnp.zeros(5)))(x) for m in (law, posterior)
        ]
        likelihood = -2 * ((y - x @ a.T) ** 2).sum(1) - np.log(2 * np.pi * 0.25)
        np.testing.assert_allclose(clean[0] + likelihood - evidence, clean[1], rtol=1e-9)


# --- published algorithms, in dense linear algebra --------------------------------------------------------------------


def setting(name, t, s):
    """A Gaussian prior in vp_linear, x, y, noise z, and what the algorithms call them."""
    schedule = dj.vp_linear()
    operator, law = LINEAR[name], AXES
    a = dense(operator)
    x, y, z = (np.asarray(v) for v in vectors((3, LINE), (1, len(a)), (3, LINE)))
    y = y @ a @ np.linalg.pinv(a) if name == "mask" else y  # hidden pixels are measured as 0
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in schedule(jnp.asarray(u))] for u in (t, s))
    mean, v = law.means[0], law.variances[0]
    gain = alpha_t * v / (alpha_t**2 * v + sigma_t**2)
    x0 = mean + gain * (x - alpha_t * mean)
    ratio = alpha_t / alpha_s
    beta = sigma_t**2 - ratio**2 * sigma_s**2
    posterior = ratio * sigma_s**2 / sigma_t**2, alpha_s * beta / sigma_t**2, np.sqrt(beta) * sigma_s / sigma_t
    p = dict(
        schedule=schedule,
        operator=operator,
        denoiser=mixtures.denoiser(law, schedule),
        a=a,
        x=x,
        y=y,
        z=z,
        x0=x0,
        gain=gain,
        eps=(x - alpha_t * x0) / sigma_t,
        posterior=posterior,  # weight of x, weight of x0, standard deviation of q(x_s | x_t, x0)
        noise=lambda key, x, t, s: jnp.asarray(z, x.dtype),
        levels=(alpha_t, sigma_t, alpha_s, sigma_s),
    )
    return type("Setting", (), p)


def test_dps_is_algorithm_1(x64):
    """x' - zeta / |y - A x0| grad |y - A x0|^2, and one evaluation of the denoiser in a step."""
    p, t, s, counter = setting("bicubic", 0.6, 0.5), 0.6, 0.5, []
    keep, move, std = p.posterior
    r = p.y - p.x0 @ p.a.T
    gradient = -2 * (r @ p.a) * p.gain
    want = keep * p.x + move * p.x0 + std * p.z - 0.7 / np.linalg.norm(r, axis=1, keepdims=True) * gradient

    def counting(x, t, cond):
        jax.debug.callback(lambda: counter.append(1))
        return p.denoiser(x, t, cond)

    inner = dj.ddpm(p.schedule, noise=p.noise)
    got = one_step(inverse.dps(inner, p.operator, jnp.asarray(p.y), 0.7), counting, jnp.asarray(p.x), t, s)
    jax.effects_barrier()
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert len(counter) == 1
    tiny = inverse.dps(inner, p.operator, jax.jit(p.operator.apply)(jnp.asarray(p.x0)), 0.7)  # no misfit, no step
    np.testing.assert_allclose(
        one_step(tiny, p.denoiser, jnp.asarray(p.x), t, s), keep * p.x + move * p.x0 + std * p.z, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["mask", "blur", "bicubic"])
def test_diffpir_is_the_proximal_point(name, x64):
    """argmin |y - A z|^2 + rho |z - x0|^2 by the normal equations; without noise, and at rho = 0, the projection."""
    p = setting(name, 0.6, 0.5)
    alpha, sigma, *_ = p.levels
    x, y, t = jnp.asarray(p.x), jnp.asarray(p.y), jnp.full(3, 0.6)
    rho = 2.0 * 0.3**2 * alpha**2 / sigma**2
    want = np.linalg.solve(p.a.T @ p.a + rho * np.eye(LINE), (p.y @ p.a + rho * p.x0).T).T
    slow = operators.compose(operators.identity(), p.operator)  # without a spectrum: conjugate gradients

    @jax.jit
    def compute(x, y):
        made = [inverse.diffpir(p.denoiser, p.schedule, op, y, 0.3, lam=2.0) for op in (p.operator, slow)]
        exact = inverse.diffpir(p.denoiser, p.schedule, p.operator, y, 0.0, lam=2.0)
        return [d(x, t, None) for d in (*made, exact)]

    fast, by_steps, exact = compute(x, y)
    np.testing.assert_allclose(fast.x0, want, atol=1e-8)
    np.testing.assert_allclose(by_steps.x0, want, atol=1e-8)
    np.testing.assert_allclose(alpha * fast.x0 + sigma * fast.eps, p.x, atol=1e-12)
    np.testing.assert_allclose(exact.x0, p.x0 + (p.y - p.x0 @ p.a.T) @ np.linalg.pinv(p.a).T, atol=1e-8)


@pytest.mark.parametrize("name", ["mask", "blur", "bicubic"])
def test_ddrm_and_ddnm_plus_in_the_singular_basis(name, x64):
    """Coefficient by coefficient with NumPy's singular value decomposition, levels below and above sigma_y / s."""
    eta, eta_b, seen = 0.85, 0.9, set()
    p = setting(name, 0.6, 0.5)

    @jax.jit
    def steps(y, t, s, sigma_y):
        ddrm = inverse.ddrm(p.schedule, p.operator, y, sigma_y, eta, eta_b, noise=p.noise)
        ddnm = inverse.ddnm_plus(p.schedule, p.operator, y, sigma_y, noise=p.noise)
        return [f.step(KEY, jnp.asarray(p.x), (), t, s, scalar(p.denoiser))[0] for f in (ddrm, ddnm)]

    _, values, vt = np.linalg.svd(p.a)
    values = np.append(values, np.zeros(LINE - len(values)))
    values[values < 1e-8] = 0
    for t, s, sigma_y in ((0.6, 0.5, 0.3), (0.1, 0.05, 0.5), (0.3, 0.2, 0.0)):
        p = setting(name, t, s)
        alpha_s, sigma_s = p.levels[2:]
        level, (keep, move, std) = sigma_s / alpha_s, p.posterior
        x, x0, eps, z, y = (v @ vt.T for v in (p.x, p.x0, p.eps, p.z, p.y @ np.linalg.pinv(p.a).T))
        ddrm, ddnm = np.zeros_like(x0), np.zeros_like(x0)
        for i, v in enumerate(values):
            r = y[:, i] - x0[:, i]
            if v == 0:
                ddrm[:, i] = x0[:, i] + np.sqrt(1 - eta**2) * level * eps[:, i] + eta * level * z[:, i]
                shift, variance = 0.0, std**2
            else:
                if level < sigma_y / v:
                    ddrm[:, i] = x0[:, i] + np.sqrt(1 - eta**2) * level * r / (sigma_y / v) + eta * level * z[:, i]
                else:
                    ddrm[:, i] = x0[:, i] + eta_b * r + np.sqrt(level**2 - (sigma_y / v * eta_b) ** 2) * z[:, i]
                trust = 1.0 if std >= move * sigma_y / v else std * v / (move * sigma_y)
                shift, variance = trust * r, std**2 - (move * sigma_y * trust / v) ** 2
                seen |= {("ddrm", level < sigma_y / v), ("ddnm_plus", trust < 1)}
            ddnm[:, i] = keep * x[:, i] + move * (x0[:, i] + shift) + np.sqrt(max(variance, 0)) * z[:, i]
        for got, want in zip(steps(jnp.asarray(p.y), t, s, sigma_y), (alpha_s * ddrm @ vt, ddnm @ vt), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-7)
    assert len(seen) == 4, "every branch of both"


@pytest.mark.slow
def test_replacement_and_mcg(x64):
    """Measured coordinates are alpha_s y + sigma_s z, the rest is the inner step's, for the rows of a matrix."""
    p, t, s = setting("compressed_sensing", 0.6, 0.5), 0.6, 0.5
    _, _, alpha, sigma = p.levels
    z = np.asarray(dj.normal_like(jax.random.fold_in(KEY, 0), jnp.asarray(p.x)))
    inner, y, x = dj.ddim(p.schedule), jnp.asarray(p.y), jnp.asarray(p.x)
    plain = one_step(inner, p.denoiser, x, t, s)
    moved = one_step(inverse.dps(inner, p.operator, y, 0.3), p.denoiser, x, t, s)
    for sampler, before in (
        (inverse.replacement(inner, p.schedule, p.operator, y), plain),
        (inverse.mcg(inner, p.schedule, p.operator, y, 0.3), moved),
    ):
        want = before + (alpha * p.y + sigma * z @ p.a.T - before @ p.a.T) @ p.a
        np.testing.assert_allclose(one_step(sampler, p.denoiser, x, t, s), want, atol=1e-9)


def test_remix():
    """zeta = 0 is DDIM; the variance about alpha_s x0 stays sigma_s^2 for every zeta, if eps is standard normal."""
    schedule, x = dj.vp_linear(), jax.random.normal(jax.random.key(1), (20_000, 1))
    law = mixtures.gaussian(np.zeros(1), np.zeros(1))  # x0 = 0, eps = x / sigma
    sigma_t, sigma_s = (float(schedule(jnp.float32(t)).sigma) for t in (0.6, 0.5))
    none, half, full = (
        one_step(inverse.remix(schedule, zeta), mixtures.denoiser(law, schedule), sigma_t * x, 0.6, 0.5)
        for zeta in (0.0, 0.5, 1.0)
    )
    ddim = one_step(dj.ddim(schedule), mixtures.denoiser(law, schedule), sigma_t * x, 0.6, 0.5)
    np.testing.assert_allclose(none, ddim, rtol=1e-5)
    for y, correlation in ((half, np.sqrt(0.5)), (full, 0.0)):
        assert np.std(y) == pytest.approx(sigma_s, rel=4 / np.sqrt(40_000))
        assert np.corrcoef(y[:, 0], x[:, 0])[0, 1] == pytest.approx(correlation, abs=4 / np.sqrt(20_000))


# --- limits -----------------------------------------------------------------------------------------------------------

NOTHING = operators.masking(np.zeros(LINE))
DENOISERS = {
    "pigdm": lambda d, s, op, y, sigma_y: inverse.pigdm(d, s, op, y, sigma_y),
    "pigdm_clean": lambda d, s, op, y, sigma_y: inverse.pigdm(d, s, op, y),
    "tmpd": lambda d, s, op, y, sigma_y: inverse.tmpd(d, s, op, y, sigma_y),
    "mmps": lambda d, s, op, y, sigma_y: inverse.mmps(d, s, op, y, sigma_y, 3),
    "ddnm": lambda d, s, op, y, sigma_y: inverse.ddnm(d, s, op, y),
    "diffpir": lambda d, s, op, y, sigma_y: inverse.diffpir(d, s, op, y, sigma_y, 1.0),
}
SAMPLERS = {  # and what they are without a measurement
    "replacement": (lambda s, op, y, sigma_y: inverse.replacement(dj.ddpm(s), s, op, y), dj.ddpm),
    "mcg": (lambda s, op, y, sigma_y: inverse.mcg(dj.ddpm(s), s, op, y, 0.5), dj.ddpm),
    "dps": (lambda s, op, y, sigma_y: inverse.dps(dj.ddpm(s), op, y, 0.5), dj.ddpm),
    "ddnm_plus": (inverse.ddnm_plus, dj.ddpm),
    "ddrm": (inverse.ddrm, lambda s: inverse.remix(s, 0.85**2)),
    "ddrm_clean": (lambda s, op, y, sigma_y: inverse.ddrm(s, op, y, 0.0), lambda s: inverse.remix(s, 0.85**2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rectified", "edm"])
def test_without_a_measurement_nothing_changes(schedule):
    """Every denoiser is the plain one; every sampler the one named, with the key that it hands on."""
    schedule, t, s = SCHEDULES[schedule]
    x, y = (v.astype(jnp.float32) for v in vectors((3, LINE), (3, LINE)))
    law = mixtures.denoiser(correlated(), schedule)

    @jax.jit
    def compute(x, y, t, s):
        each, pairs = jnp.broadcast_to(t, 3), {}
        for name, make in DENOISERS.items():
            pairs[name] = make(law, schedule, NOTHING, y, 0.1)(x, each, None)[:2], law(x, each)[:2]
        for name, (make, plain) in SAMPLERS.items():
            key = jax.random.fold_in(KEY, 1) if name in ("replacement", "mcg") else KEY
            samplers = (KEY, make(schedule, NOTHING, y, 0.1)), (key, plain(schedule))
            pairs[name] = tuple(f.step(k, x, (), t, s, scalar(law))[0] for k, f in samplers)
        return pairs

    for name, pair in compute(x, 0 * y, jnp.float32(t), jnp.float32(s)).items():
        for got, want in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)


def test_neutral_arguments_leave_the_inner_sampler():
    """Bit by bit: zeta = 0; one jump takes the same step with a key of its own; a mask that knows nothing."""
    schedule, t, s = SCHEDULES["vp_linear"]
    x, y = (v.astype(jnp.float32) for v in vectors((3, LINE), (3, LINE)))
    inner, denoise, mask = dj.ddim(schedule), scalar(mixtures.denoiser(correlated(2), schedule)), LINEAR["mask"]
    assert inverse.repaint(inner, schedule, y, np.zeros(LINE, bool), 5) is inner
    samplers = {
        "plain": inner,
        "dps": inverse.dps(inner, mask, y, 0.0),
        "travel": inverse.travel(inner, schedule, 1),
        "replaced": inverse.replacement(inner, schedule, mask, y),
        "mcg": inverse.mcg(inner, schedule, mask, y, 0.0),
    }
    made = jax.jit(lambda t, s: {k: f.step(KEY, x, (), t, s, denoise)[0] for k, f in samplers.items()})(t, s)
    np.testing.assert_array_equal(made["dps"], made["plain"])
    np.testing.assert_array_equal(made["mcg"], made["replaced"])
    np.testing.assert_allclose(made["travel"], made["plain"], rtol=1e-6)


IMAGE = (8, 8, 3)
HOLE = np.random.default_rng(0).uniform(size=(8, 8, 1)) < 0.5
OPERATORS = {
    "mask": operators.masking(HOLE),
    "box": operators.box(2),
    "bicubic": operators.bicubic(2),
    "grey": operators.grey(),
    "blur": operators.blur(operators.gaussian_kernel(0.7, 2), cutoff=0.05),
    "compressed_sensing": operators.compressed_sensing(KEY, IMAGE, 60),
}


@functools.cache
def pictures(schedule):
    rng = np.random.default_rng(1)
    law = mixtures.gaussian(rng.uniform(-0.5, 0.5, IMAGE), rng.uniform(0.1, 0.4, IMAGE))
    x0 = jnp.asarray(mixtures.draw(rng, law, 2), jnp.float32)
    return mixtures.denoiser(law, schedule), x0


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_measurements_without_noise_are_kept(name):
    """A x0 = y on images after a last step to sigma = 0, from wherever it comes."""
    schedule, operator = dj.rectified(), OPERATORS[name]
    denoiser, x0 = pictures(schedule)
    x = jax.random.normal(KEY, x0.shape)

    @jax.jit
    def compute(x, x0, t, s):
        y = operator.apply(x0)
        methods = {
            "ddnm": (dj.ddpm(schedule), inverse.ddnm(denoiser, schedule, operator, y)),
            "ddrm": (inverse.ddrm(schedule, operator, y, 0.0), denoiser),
            "replacement": (inverse.replacement(dj.ddim(schedule), schedule, operator, y), denoiser),
        }
        made = {k: f.step(KEY, x, (), t, s, scalar(d))[0] for k, (f, d) in methods.items()}
        return y, {label: (z, operator.apply(z)) for label, z in made.items()}

    y, made = compute(x, x0, jnp.float32(0.3), jnp.float32(0.0))
    for label, (z, again) in made.items():
        np.testing.assert_allclose(again, y, atol=2e-4, err_msg=label)
        assert float(jnp.abs(z - x0).max()) > 0.05, f"{label}: the rest is its own"


@pytest.mark.slow
def test_known_pixels_are_those_of_y_bit_by_bit():
    """RePaint and replacement; the hidden pixels of y do not matter, and a mask may be traced."""
    schedule, times = dj.vp_linear(), jnp.linspace(1.0, 0.0, 4)
    denoiser, x0 = pictures(schedule)
    x = jax.random.normal(KEY, x0.shape)

    @jax.jit
    def compute(x, y, mask):
        return dj.sample(KEY, inverse.repaint(dj.ddpm(schedule), schedule, y, mask, 2, 2), denoiser, x, times)

    z = compute(x, x0, HOLE)
    other = compute(x, jnp.where(HOLE, x0, 7.0), HOLE)
    np.testing.assert_array_equal(np.where(HOLE, z, 0), np.where(HOLE, x0, 0))
    np.testing.assert_array_equal(z, other)
    assert float(jnp.abs(jnp.where(HOLE, 1, z - x0)).min()) > 0


def test_jpeg_is_decoded_to_what_codes_again():
    """DDNM with the generalised inverse: the result has the coefficients of y; Pi-GDM comes nearer than nothing."""
    schedule, operator, times = dj.vp_linear(), operators.jpeg(30), jnp.linspace(1.0, 0.0, 21)
    denoiser, x0 = pictures(schedule)
    x = jax.random.normal(KEY, x0.shape)

    @jax.jit
    def compute(x, x0):
        y = operator.apply(x0)
        runs = [
            dj.sample(KEY, dj.ddpm(schedule), d, x, times)
            for d in (
                denoiser,
                inverse.ddnm(denoiser, schedule, operator, y),
                inverse.pigdm(denoiser, schedule, operator, y, variance=0.25),
            )
        ]
        return y, [operator.apply(z) for z in runs]

    y, (plain, ddnm, pigdm) = compute(x, x0)
    np.testing.assert_array_equal(ddnm, y)
    assert float(jnp.mean(pigdm != y)) < float(jnp.mean(plain != y)) / 2


# --- time travel, guides, latents -------------------------------------------------------------------------------------


def test_travel_keeps_the_law_and_counts():
    """With exact ancestral steps of Gaussian data the law stays that of each time; n evaluations."""
    schedule, counter = dj.vp_linear(), []
    law = mixtures.gaussian(np.zeros(1), np.full(1, 0.3))
    sampler = inverse.travel(dj.ancestral(schedule), schedule, jumps=3, length=2)

    def denoiser(x, t, cond=None):
        jax.debug.callback(lambda: counter.append(1))
        return mixtures.denoiser(law, schedule, next_time=lambda t: t - 0.1)(x, t)

    x = jax.random.normal(KEY, (40_000, 1)) * np.sqrt(
        float(schedule(jnp.float32(0.9)).sigma ** 2 + 0.3 * schedule(jnp.float32(0.9)).alpha ** 2)
    )
    y = jax.jit(lambda x: dj.sample(KEY, sampler, denoiser, x, jnp.asarray([0.9, 0.7, 0.5])))(x)
    jax.effects_barrier()
    alpha, sigma = (float(c) for c in schedule(jnp.float32(0.5)))
    assert np.var(y) == pytest.approx(alpha**2 * 0.3 + sigma**2, rel=4 * np.sqrt(2 / 40_000))
    assert len(counter) == 2 * 3 * 2


def test_jumps_may_be_traced_and_change_the_result():
    schedule, t, s = SCHEDULES["rectified"]
    x = vectors((3, LINE))[0].astype(jnp.float32)
    law, traces = mixtures.denoiser(correlated(2), schedule), []

    @jax.jit
    def go(jumps):
        traces.append(1)
        sampler = inverse.travel(dj.dpmpp_2m(schedule), schedule, jumps)
        return sampler.step(KEY, x, sampler.init(x), jnp.float32(t), jnp.float32(s), scalar(law))[0]

    one, two = go(1), go(2)
    fixed = one_step(inverse.travel(dj.dpmpp_2m(schedule), schedule, 2), law, x, t, s)
    np.testing.assert_allclose(two, fixed, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1 and not np.allclose(one, two, atol=1e-2)


def test_sdedit_goes_from_the_guide_to_the_prior():
    """Guides drawn from the data keep its law; a late start keeps the guide; from pure noise it does not matter."""
    schedule, law = dj.rectified(), mixtures.gaussian(np.array([1.0]), np.array([0.3]))
    denoiser = mixtures.denoiser(law, schedule)
    guide = jnp.asarray(mixtures.draw(np.random.default_rng(0), law, 20_000), jnp.float32)

    @jax.jit
    def edit(guide, start):
        times = start * jnp.linspace(1.0, 0.0, 33)
        return inverse.sdedit(KEY, dj.heun(schedule), denoiser, schedule, guide, times)

    y = edit(guide, 0.6)
    assert float(jnp.mean(y)) == pytest.approx(1.0, abs=4 * np.sqrt(0.3 / 20_000))
    assert float(jnp.var(y)) == pytest.approx(0.3, rel=0.02 + 4 * np.sqrt(2 / 20_000))
    np.testing.assert_allclose(edit(guide + 5, 1e-3), guide + 5, atol=0.05)
    np.testing.assert_allclose(edit(guide, 1.0), edit(guide + 5, 1.0), atol=1e-5)


def test_latents(x64):
    """With a linear decoder W, MMPS in the latent space is exact for the operator A W, as DPS is a step with A W."""
    schedule, t, s = SCHEDULES["vp_linear"]
    w, x, y = vectors((LINE, 6), (3, 6), (1, LINE // 2))
    law, operator = correlated(d=6), operators.latent(LINEAR["bicubic"], lambda z: z @ w.T)
    a = dense(LINEAR["bicubic"]) @ np.asarray(w)
    truth = mixtures.denoiser(conformance.exact_posterior(law, a, y[0], 0.3)[0], schedule)
    prior = mixtures.denoiser(law, schedule)
    guided = inverse.mmps(prior, schedule, operator, y, 0.3, 12)
    got, want = jax.jit(lambda x, t: (guided(x, t, None).x0, truth(x, t).x0))(x, jnp.full(3, t))
    np.testing.assert_allclose(got, want, atol=1e-8)
    matrix = operators.identity()._replace(apply=lambda z: z @ jnp.asarray(a.T))
    dps = [one_step(inverse.dps(dj.ddim(schedule), op, y, 0.5), prior, x, t, s) for op in (operator, matrix)]
    np.testing.assert_allclose(*dps, rtol=1e-9)


# --- contracts --------------------------------------------------------------------------------------------------------


def every_method(schedule, operator, y, sigma_y):
    """Each method as (sampler, denoiser -> denoiser)."""
    made = {
        name: (dj.ddpm(schedule), lambda d, f=f: f(d, schedule, operator, y, sigma_y)) for name, f in DENOISERS.items()
    }
    made |= {name: (f(schedule, operator, y, sigma_y), lambda d: d) for name, (f, _) in SAMPLERS.items()}
    noisy = inverse.ddnm_plus(schedule, operator, y, sigma_y)
    return made | {"travel": (inverse.travel(noisy, schedule, 2), lambda d: d)}


@pytest.mark.slow
def test_contracts():
    """Examples depend on their own key, x and y alone; bfloat16 stays; new y, sigma_y, times: one trace; all finite."""
    schedule, traces = dj.vp_linear(), []
    law = mixtures.denoiser(mixtures.gaussian(np.zeros(LINE), np.full(LINE, 0.5)), schedule)
    keys = jax.random.split(KEY, 4)
    x, y = (v.astype(jnp.float32) for v in vectors((4, LINE), (4, LINE)))
    y = jnp.where(KNOWN, y, 0)

    @jax.jit
    def go(keys, x, y, sigma_y, t, s):
        traces.append(1)
        made = every_method(schedule, LINEAR["mask"], y, sigma_y)
        return {k: f.step(keys, x, (), t, s, scalar(guide(law)))[0] for k, (f, guide) in made.items()}

    full = go(keys, x, y, 0.1, 0.5, 0.3)
    again = go(keys, x.at[1:].set(0.0), y.at[1:].mul(2.0), 0.1, 0.5, 0.3)
    noisy = go(keys, x, y, 0.5, 0.5, 0.3)
    assert len(traces) == 1
    half = jax.eval_shape(go, keys, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), 0.1, 0.5, 0.3)
    for name, z in full.items():
        assert z.dtype == jnp.float32 and half[name].dtype == jnp.bfloat16
        assert bool(jnp.all(jnp.isfinite(z))), name
        np.testing.assert_allclose(again[name][0], z[0], rtol=1e-5, atol=1e-5, err_msg=name)
        assert float(jnp.abs(again[name][1] - z[1]).max()) > 1e-3, name
        ignorant = name in ("replacement", "mcg", "dps", "ddnm", "ddrm_clean", "pigdm_clean")
        assert ignorant == bool(jnp.all(noisy[name] == z)), name


def test_both_ends_of_time():
    """Where alpha = 0, and where sigma = 0: finite, and still x = alpha x0 + sigma eps."""
    schedule, law = dj.rectified(), mixtures.denoiser(correlated(), dj.rectified())
    x, y = (v.astype(jnp.float32) for v in vectors((2, LINE), (2, LINE)))
    t = jnp.asarray([0.0, 1.0])
    made = jax.jit(lambda x: {k: f(law, schedule, LINEAR["mask"], y, 0.1)(x, t, None) for k, f in DENOISERS.items()})(x)
    for name, p in made.items():
        np.testing.assert_allclose(p.eps[1], x[1], rtol=1e-5, err_msg=name)
        assert bool(jnp.all(jnp.isfinite(p.x0)) & jnp.all(jnp.isfinite(p.eps))), name
    for name in ("pigdm", "tmpd", "mmps", "diffpir"):
        np.testing.assert_allclose(made[name].x0[0], x[0], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_any_rank_and_bfloat16():
    """Points, audio, images and video, with a condition: shapes and dtypes, and finite values of the last."""
    schedule, operator = dj.rectified(), operators.box(2)

    def denoiser(x, t, cond):
        return dj.from_x0(schedule, x, t, dj.bcast(1 - t, x) * x * dj.bcast(cond, x))

    @jax.jit
    def go(x, cond):
        y = operator.apply(x)
        methods = {
            "mmps": (dj.dpmpp_2m(schedule), inverse.mmps(denoiser, schedule, operator, y, 0.1, 2)),
            "ddrm": (inverse.ddrm(schedule, operator, y, 0.1), denoiser),
        }
        times = jnp.linspace(1.0, 0.0, 4)
        return {name: dj.sample(KEY, sampler, d, x, times, cond) for name, (sampler, d) in methods.items()}

    cond = jnp.asarray([0.9, 0.5])
    for shape, dtype in (((12,), jnp.bfloat16), ((12, 2), jnp.float32), ((4, 6, 2), jnp.float32)):
        x = jnp.ones((2, *shape), dtype)
        for out in jax.eval_shape(go, x, cond).values():
            assert out.shape == x.shape and out.dtype == dtype
    for name, out in go(jax.random.normal(KEY, (2, 2, 4, 6, 1), jnp.bfloat16), cond).items():
        assert out.dtype == jnp.bfloat16 and bool(jnp.all(jnp.isfinite(out.astype(jnp.float32)))), name


def test_bad_input():
    schedule, x, t = dj.vp_linear(), jnp.ones((2, LINE)), jnp.full(2, 0.5)
    law = mixtures.denoiser(correlated(), schedule)
    y, phase = jnp.ones((2, LINE)), operators.phase_retrieval()
    for name, make in DENOISERS.items():
        label = name.removesuffix("_clean")
        with pytest.raises(
            ValueError, match=rf"{label}: y has shape \(2, 5\), but the operator 'mask' measures \(2, 12\)"
        ):
            jax.eval_shape(make(law, schedule, LINEAR["mask"], jnp.ones((2, 5)), 0.1), x, t, None)
    samplers = {name: make for name, (make, _) in SAMPLERS.items()}
    for name, make in samplers.items():
        label = {"mcg": "dps", "ddrm_clean": "ddrm"}.get(name, name)
        with pytest.raises(ValueError, match=rf"{label}: y has shape \(3, 12\)"):
            one_step(make(schedule, LINEAR["mask"], jnp.ones((3, LINE)), 0.1), law, x, 0.5, 0.4)
    for name in ("replacement", "mcg", "ddnm_plus", "ddrm"):
        with pytest.raises(ValueError, match="'phase retrieval' has no pseudo_inverse"):
            one_step(samplers[name](schedule, phase, jnp.ones((2, 2 * LINE)), 0.1), law, x, 0.5, 0.4)
    for name in ("ddnm", "pigdm_clean"):
        with pytest.raises(ValueError, match="'phase retrieval' has no pseudo_inverse"):
            jax.eval_shape(DENOISERS[name](law, schedule, phase, jnp.ones((2, 2 * LINE)), 0.1), x, t, None)
    with pytest.raises(ValueError, match="'phase retrieval' has no adjoint"):
        jax.eval_shape(DENOISERS["diffpir"](law, schedule, phase, jnp.ones((2, 2 * LINE)), 0.1), x, t, None)
    composed = operators.compose(operators.identity(), LINEAR["mask"])
    lifted = composed._replace(pseudo_inverse=lambda y: y)
    with pytest.raises(ValueError, match="has no spectral"):
        one_step(inverse.ddrm(schedule, lifted, y, 0.1), law, x, 0.5, 0.4)
    with pytest.raises(ValueError, match=r"mask of shape \(5,\) for x of shape \(2, 12\)"):
        one_step(inverse.repaint(dj.ddpm(schedule), schedule, y, np.ones(5), 2), law, x, 0.5, 0.4)
    for message, make in {
        "travel: jumps must be at least 1, got 0": lambda: inverse.repaint(dj.ddpm(schedule), schedule, y, KNOWN, 0),
        "travel: length must be at least 1, got 0": lambda: inverse.travel(dj.ddpm(schedule), schedule, 1, 0),
        "mmps: iterations must be at least 1": lambda: inverse.mmps(law, schedule, phase, y, 0.1, 0),
        "pigdm: sigma_y must not be negative": lambda: inverse.pigdm(law, schedule, phase, y, -0.1),
        "tmpd: sigma_y must not be negative": lambda: inverse.tmpd(law, schedule, phase, y, -0.1),
        "mmps: sigma_y must not be negative": lambda: inverse.mmps(law, schedule, phase, y, -0.1, 2),
        "diffpir: sigma_y must not be negative": lambda: inverse.diffpir(law, schedule, phase, y, -0.1, 1.0),
        "ddnm_plus: sigma_y must not be negative": lambda: inverse.ddnm_plus(schedule, phase, y, -0.1),
        "ddrm: sigma_y must not be negative": lambda: inverse.ddrm(schedule, phase, y, -0.1),
        "ddrm: eta and eta_b": lambda: inverse.ddrm(schedule, phase, y, 0.1, eta=1.5),
        "remix: zeta": lambda: inverse.remix(schedule, -0.1),
        "diffpir: lam must be positive": lambda: inverse.diffpir(law, schedule, phase, y, 0.1, 0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
