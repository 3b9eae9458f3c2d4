"""Losses: equal gradients under matched weights, the closed forms behind the weights, and the variational bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize, stats

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.losses import (
    discretized_log_likelihood,
    elbo_weight,
    p2_weight,
    sigmoid_weight,
    uncertainty_loss,
)
from diffusion_jax.nets import forced_weight_norm, functional
from diffusion_jax.nets.edm2 import MPConv, MPFourier
from diffusion_jax.training import optimizers

B, D = 6, 4


def batch(dtype=np.float64):
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(0, 0.5, (B, D)), rng.standard_normal((B, D))
    return tuple(jnp.asarray(a, dtype) for a in (x0, eps, np.linspace(0.15, 0.9, B)))


def linear_model(schedule, predicts):
    """A network with parameters, read as any of the five quantities: all are the same denoiser."""

    def denoiser(params, x, t, cond=None):
        x0 = jnp.tanh(x @ params["w"] + dj.bcast(t, x) * params["b"][None])
        net = dj.from_x0(schedule, x, t, x0)
        value = {"x0": dj.to_x0, "eps": dj.to_eps, "v": dj.to_v, "velocity": dj.to_velocity}[predicts]
        return dj.parameterize(lambda *_: value(schedule, net, t), schedule, predicts)(x, t, cond)

    return denoiser


def parameters():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(0, 0.4, (D, D))), "b": jnp.asarray(rng.normal(0, 0.1, D))}


@functools.cache
def gradients(name):
    """Per-example losses and gradients of their mean, for pairs of a target and the weight that makes it L_simple."""
    schedule = {"cosine": dj.cosine(), "rectified": dj.rectified(), "edm": dj.edm()}[name]

    def inverse_norm(at):
        """v - v_hat = -(alpha^2 + sigma^2) / sigma (x0 - x0_hat), and x0 - x0_hat = -sigma / alpha (eps - eps_hat)."""
        return (at.alpha / (at.alpha**2 + at.sigma**2)) ** 2

    choices = {
        "eps": ("eps", dj.unit_weight),
        "x0": ("x0", dj.snr_weight),
        "v": ("v", inverse_norm),
        "score": ("score", lambda at: at.sigma**2),
    }

    def mean(params, choice, predicts, data):
        target, weight = choices[choice]
        x0, eps, t = data
        model = functools.partial(linear_model(schedule, predicts), params)
        losses = dj.denoising_loss(model, schedule, x0, t, eps, target=target, weight=weight)
        return jnp.mean(losses), losses

    with jax.enable_x64(True):
        data = batch()

        @jax.jit
        def compute(params):
            pairs = [(c, "x0") for c in choices] + [("eps", "v"), ("eps", "velocity")]
            return {pair: jax.value_and_grad(mean, has_aux=True)(params, *pair, data) for pair in pairs}

        return jax.tree.map(np.asarray, compute(parameters()))


@pytest.mark.parametrize("name", ["cosine", "rectified", "edm"])
def test_equal_gradients_under_matched_weights(name):
    """L_simple is the same function of the parameters, in whatever target and parameterization it is computed."""
    found = gradients(name)
    (_, reference), gradient = found["eps", "x0"]
    assert reference.shape == (B,) and np.all(reference > 0)
    for (_, losses), other in found.values():
        np.testing.assert_allclose(losses, reference, rtol=1e-9)
        for key in gradient:
            np.testing.assert_allclose(other[key], gradient[key], rtol=1e-8, atol=1e-12)


WEIGHTS = {  # weight and the target it is stated for
    "unit": (dj.unit_weight, "eps"),
    "snr": (dj.snr_weight, "x0"),
    "min_snr": (dj.min_snr_weight(5.0), "x0"),
    "edm": (dj.edm_weight(0.5), "x0"),
    "p2": (p2_weight(0.5), "eps"),
    "sigmoid": (sigmoid_weight(-1.0), "eps"),
    "elbo": (elbo_weight(dj.cosine()), "eps"),
    "elbo_sigmoid": (elbo_weight(dj.cosine(), sigmoid_weight(-1.0)), "eps"),
}
OVER_EPS = {  # (error of a target / error of eps)^2
    "eps": dj.unit_weight,
    "x0": lambda at: (at.sigma / at.alpha) ** 2,
    "v": lambda at: ((at.alpha**2 + at.sigma**2) / at.alpha) ** 2,
    "score": lambda at: at.sigma**-2,
}


@functools.cache
def weighted_gradients():
    def mean(params, weight, stated, target):
        def matched(at):
            return weight(at) * OVER_EPS[stated](at) / OVER_EPS[target](at)

        x0, eps, t = batch()
        model = functools.partial(linear_model(dj.cosine(), "v"), params)
        return jnp.mean(dj.denoising_loss(model, dj.cosine(), x0, t, eps, target=target, weight=matched))

    with jax.enable_x64(True):
        compute = jax.jit(
            lambda p: {k: {y: jax.value_and_grad(mean)(p, *w, y) for y in OVER_EPS} for k, w in WEIGHTS.items()}
        )
        return jax.tree.map(np.asarray, compute(parameters()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_means_the_same_for_every_target(name):
    found = weighted_gradients()[name]
    value, gradient = found[WEIGHTS[name][1]]
    assert value > 0 and not any(
        np.isclose(value, weighted_gradients()[other]["eps"][0]) for other in {*WEIGHTS} - {name, "unit", "snr"}
    )
    for other, other_gradient in found.values():
        assert other == pytest.approx(value, rel=1e-9)
        for key in gradient:
            np.testing.assert_allclose(other_gradient[key], gradient[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("weight", [dj.unit_weight, sigmoid_weight(1.0)], ids=["unit", "sigmoid"])
def test_weighted_bound_does_not_depend_on_the_schedule(weight):
    """Eq. (3) over the same range of log SNR l, by the trapezoidal rule: only its ends matter (VDM, section 5.1).

    For N(0, v) and its exact denoiser E (eps_hat - eps)^2 = v e^l / (1 + v e^l), so that with w = 1 the integral is
    log((1 + v e^high) / (1 + v e^low)) / 2.
    """
    v, low, high, found = 0.3, -6.0, 7.0, {}
    with jax.enable_x64(True):
        for name, schedule, end in (
            ("rectified", dj.rectified(), 1.0),
            ("cosine", dj.cosine(), 1.0),
            ("vp_linear", dj.vp_linear(), 1.0),
            ("edm", dj.edm(), 80.0),
        ):

            @jax.jit
            def integral(schedule=schedule, end=end):
                t0, t1 = dj.inverse_logsnr(schedule, jnp.asarray([high, low]), 0.0, end)
                t = t0 * (t1 / t0) ** jnp.linspace(0.0, 1.0, 20_001)
                alpha, sigma = at = schedule(t)
                error = alpha**2 * v / (alpha**2 * v + sigma**2)
                return jnp.trapezoid(elbo_weight(schedule, weight, 0.0, end)(at) * error, t)

            found[name] = float(integral())
    print(found)
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-6)
    if weight is dj.unit_weight:
        exact = 0.5 * np.log((1 + v * np.exp(high)) / (1 + v * np.exp(low)))
        assert found["cosine"] == pytest.approx(exact, rel=1e-6)


def test_elbo_weight_in_closed_form():
    """-lambda' / 2 is 1 / (t (1 - t)) for the straight line and beta / (2 sigma^2) for `vp_linear`, in float32 too."""
    t = np.linspace(0.05, 0.95, 7, dtype=np.float32)
    for schedule, expected in (
        (dj.rectified(), 1 / (t * (1 - t))),
        (dj.vp_linear(), (0.1 + 19.9 * t) / (2 * (1 - np.exp(-0.1 * t - 19.9 * t**2 / 2)))),
    ):
        got = jax.jit(lambda t, schedule=schedule: elbo_weight(schedule)(schedule(t)))(t)
        np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_learned_uncertainty_is_least_at_the_mean_loss_and_levels_gradients():
    losses = np.random.default_rng(0).gamma(2.0, 3.0, 1000)
    with jax.enable_x64(True):
        total = jax.jit(jax.value_and_grad(lambda u: jnp.mean(uncertainty_loss(jnp.asarray(losses), u))))
        found = optimize.minimize_scalar(
            lambda u: float(total(u)[0]), bounds=(-3, 6), method="bounded", options={"xatol": 1e-8}
        )
        assert np.exp(found.x) == pytest.approx(losses.mean(), rel=1e-5)
        assert float(total(np.log(losses.mean()))[1]) == pytest.approx(0, abs=1e-12)
        assert float(total(1.0)[0]) == pytest.approx(losses.mean() / np.e + 1, rel=1e-12)
        for scale in (1e-3, 1.0, 1e3):  # where u has found it, every level has the gradient of log(loss)
            u = jnp.log(scale * jnp.asarray(0.7) ** 2)
            gradient = jax.grad(lambda a, s=scale, u=u: uncertainty_loss(s * a**2, u))(jnp.asarray(0.7))
            assert float(gradient) == pytest.approx(2 / 0.7, rel=1e-9)


@pytest.mark.slow
def test_a_learned_uncertainty_becomes_the_log_of_the_expected_loss_of_each_level():
    """EDM2's head for u(t), beside the exact denoiser of Gaussian data of variance s^2, trained by `denoising_loss`.

    The expected loss of the exact denoiser under `edm_weight` is s^2 (sigma^2 + sd^2) / (sd^2 (sigma^2 + s^2)): 1 where
    there is little noise and s^2 / sd^2 where there is much. The pictures of a batch have noise levels of their own.
    """
    s, sd, schedule = 2.0, 0.5, dj.edm()

    class Exact(nnx.Module):
        """F of the exact denoiser, from x = c_in x_t, with u(t) as its last channel."""

        def __init__(self, rngs):
            self.logvar_fourier = MPFourier(rngs, 128)
            self.logvar_linear = MPConv(rngs, 128, 1, jnp.float32)

        def __call__(self, x, c_noise, cond, *, key):
            sigma = dj.bcast(jnp.exp(4 * c_noise), x)
            norm = jnp.sqrt(sigma**2 + sd**2)
            exact = x * norm * s**2 / (s**2 + sigma**2)
            out = (exact - x * norm * (sd / norm) ** 2) / (sigma * sd / norm)
            u = self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]
            return jnp.concatenate([out, jnp.broadcast_to(dj.bcast(u, x), (*x.shape[:-1], 1))], axis=-1)

    net = functional(Exact)

    def loss(params, key):
        draws = jax.random.split(key, 3)
        x0 = s * jax.random.normal(draws[0], (256, 4, 4, 1))
        t = dj.draw_lognormal(0.0, 1.6)(draws[1], 256)
        model = dj.edm_precondition(functools.partial(net.apply, params), schedule, sd, uncertainty=True)
        eps = jax.random.normal(draws[2], x0.shape)
        return jnp.mean(dj.denoising_loss(model, schedule, x0, t, eps, target="x0", weight=dj.edm_weight(sd)))

    optimizer = optimizers.projected(optimizers.adamw(optimizers.cosine(0.03, 1000)), forced_weight_norm)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(2), 1000))[0][0]

    sigma = np.geomspace(0.05, 20, 13)
    wanted = np.log(s**2 * (sigma**2 + sd**2) / (sd**2 * (sigma**2 + s**2)))
    assert np.ptp(wanted) > 2.5

    def found(params):
        x = jnp.zeros((13, 1, 1, 1))
        return dj.edm_precondition(functools.partial(net.apply, params), schedule, sd, uncertainty=True)(
            x, jnp.asarray(sigma, jnp.float32)
        ).uncertainty

    start = net.init(jax.random.key(0))
    assert np.max(np.abs(jax.jit(found)(start) - wanted)) > 0.5
    np.testing.assert_allclose(jax.jit(found)(train(start)), wanted, atol=0.1)


def test_loss_with_an_uncertainty_is_that_of_equation_15():
    """One number an example, whose gradient reaches the denoiser through both terms; without one nothing changes."""
    with jax.enable_x64(True):
        x0, eps, t = batch()
        u = np.linspace(-1.0, 2.0, B)

        def model(x, t, cond):
            return dj.from_x0(dj.cosine(), x, t, jnp.tanh(x))

        plain = dj.denoising_loss(model, dj.cosine(), x0, t, eps)
        learned = dj.denoising_loss(
            lambda x, t, cond: model(x, t, cond)._replace(uncertainty=jnp.asarray(u)), dj.cosine(), x0, t, eps
        )
    np.testing.assert_allclose(learned, np.asarray(plain) / np.exp(u) + u, rtol=1e-12)


def test_loss_is_the_mean_squared_error_written_out():
    """With a constant prediction, by hand; and flow matching on the straight line regresses eps - x0."""
    with jax.enable_x64(True):
        x0, eps, t = batch()

        def constant(x, t, cond):
            return dj.from_velocity(dj.rectified(), x, t, jnp.full_like(x, 0.3))

        def zero(x, t, cond):
            return dj.from_eps(dj.cosine(), x, t, jnp.full_like(x, 0.2))

        flow = jax.jit(lambda: dj.denoising_loss(constant, dj.rectified(), x0, t, eps, target="velocity"))()
        simple = jax.jit(lambda: dj.denoising_loss(zero, dj.cosine(), x0, t, eps))()
    np.testing.assert_allclose(flow, np.mean((0.3 - (np.asarray(eps) - np.asarray(x0))) ** 2, axis=1), rtol=1e-10)
    np.testing.assert_allclose(simple, np.mean((0.2 - np.asarray(eps)) ** 2, axis=1), rtol=1e-10)


def test_weights():
    alpha, sigma = np.array([1.0, 0.8, 0.1]), np.array([0.1, 0.6, 0.995])
    at = dj.AlphaSigma(jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32))
    snr = (alpha / sigma) ** 2
    np.testing.assert_allclose(dj.unit_weight(at), np.ones(3))
    np.testing.assert_allclose(dj.snr_weight(at), snr, rtol=1e-5)
    np.testing.assert_allclose(dj.min_snr_weight(5.0)(at), [5.0, snr[1], snr[2]], rtol=1e-5)
    np.testing.assert_allclose(p2_weight(0.5, 2.0)(at), (2 + snr) ** -0.5, rtol=1e-5)
    np.testing.assert_allclose(sigmoid_weight(1.5)(at), 1 / (1 + np.exp(-1.5) * snr), rtol=1e-4)
    ends = dj.AlphaSigma(jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(sigmoid_weight(1.5)(ends), np.asarray([0, 1], np.float32))
    np.testing.assert_array_equal(p2_weight()(ends), np.asarray([0, 1], np.float32))
    # Karras et al. 2022, table 1: lambda c_out^2 = 1, so the network's own loss has weight 1 at every level.
    for data in (0.5, 1.3):
        level = sigma / alpha
        c_out = level * data / np.sqrt(level**2 + data**2)
        np.testing.assert_allclose(dj.edm_weight(data)(at) * c_out**2, np.ones(3), rtol=1e-5)


@functools.cache
def preconditioned():
    """What F sees and should return, solved out of the preconditioned denoiser, for data N(0, sd^2), n = 50,000."""
    sd, n = 0.5, 50_000
    seen = []

    @jax.jit
    def compute(x0, eps, t):
        x = x0 + dj.bcast(t, x0) * eps
        inputs = []

        def net(value):
            def apply(x, t, cond):
                inputs.append((x, t))
                return jnp.full_like(x, value)

            return apply

        skip, one = (dj.edm_precondition(net(v), dj.edm(), sd)(x, t, None).x0 for v in (0.0, 1.0))
        return skip, one - skip, *inputs[0], x

    rng = np.random.default_rng(0)
    for level in (1e-3, 0.3, 5.0):
        x0, eps = sd * rng.standard_normal((1, n)), rng.standard_normal((1, n))
        given = (jnp.asarray(a, jnp.float32) for a in (x0, eps, np.array([level])))
        seen.append((level, x0, *(np.asarray(a) for a in compute(*given))))
    return sd, n, seen


def test_edm_preconditioning_identities():
    """Unit variance in and out; nothing to do at sigma -> 0; the denoiser with F = 0 is the linear skip."""
    sd, n, seen = preconditioned()
    for level, x0, skip, c_out, inputs, noise, x in seen:
        error = 4.5 / np.sqrt(2 * n)
        assert np.std(inputs) == pytest.approx(1, abs=error)
        assert np.std((x0 - skip) / c_out) == pytest.approx(1, abs=max(error, 0.01))
        assert float(noise[0]) == pytest.approx(np.log(level) / 4, rel=1e-5)
        np.testing.assert_allclose(skip, sd**2 / (level**2 + sd**2) * x, rtol=1e-5)
        # F's target is uncorrelated with what F sees: c_skip is the one that minimises c_out.
        assert abs(np.mean((x0 - skip) / c_out * inputs)) < 4.5 / np.sqrt(n) + 1e-2
    assert np.abs(seen[0][3]).max() == pytest.approx(1e-3, rel=1e-3)


def test_edm_precondition_on_another_schedule_is_the_same_denoiser():
    """D(x_t / alpha, sigma_t / alpha): rectified time t has EDM's noise level t / (1 - t)."""

    def net(x, t, cond):
        return jnp.sin(x) + dj.bcast(t, x)

    x, t = jnp.asarray([[0.4, -1.0], [0.1, 0.7]]), jnp.asarray([0.3, 0.8])

    @jax.jit
    def both():
        straight = dj.edm_precondition(net, dj.rectified())(x, t, None)
        return straight, dj.edm_precondition(net, dj.edm())(x / dj.bcast(1 - t, x), t / (1 - t), None)

    straight, edm = both()
    np.testing.assert_allclose(straight.x0, edm.x0, rtol=1e-5)
    np.testing.assert_allclose(straight.eps, edm.eps, rtol=1e-4)


# --- the variational bound --------------------------------------------------------------------------------------------

TABLE = 20
SCHEDULE = dj.from_betas(dj.linear_betas(TABLE, 0.005, 0.4))
BETAS = dj.linear_betas(TABLE, 0.005, 0.4)


def test_variational_term_is_the_kl_of_two_gaussians():
    """Against DDPM's own formulas (Ho et al., eq. 6-7) from the table of betas, in NumPy."""
    index = np.array([2, 3, 7, 11, 19, 20])
    bar = np.concatenate([[1.0], np.cumprod(1 - BETAS)])
    beta, now, before = BETAS[index - 1][:, None], bar[index][:, None], bar[index - 1][:, None]
    rng = np.random.default_rng(3)
    x0, guess, noise = rng.uniform(-1, 1, (3, B, D))
    v = rng.uniform(0, 1, (B, D))
    x_t = np.sqrt(now) * x0 + np.sqrt(1 - now) * noise

    def mean(x):
        return np.sqrt(before) * beta / (1 - now) * x + np.sqrt(1 - beta) * (1 - before) / (1 - now) * x_t

    posterior = (1 - before) / (1 - now) * beta
    variance = np.exp(v * np.log(beta) + (1 - v) * np.log(posterior))
    kl = 0.5 * (np.log(variance / posterior) + (posterior + (mean(x0) - mean(guess)) ** 2) / variance - 1)
    with jax.enable_x64(True):
        prediction = dj.Prediction(jnp.asarray(guess), jnp.asarray(noise), jnp.asarray(v))
        got, exact = jax.jit(
            lambda t: [
                dj.variational_term(p, SCHEDULE, jnp.asarray(x0), jnp.asarray(x_t), t, table=TABLE)
                for p in (prediction, dj.Prediction(jnp.asarray(x0), jnp.asarray(noise), jnp.zeros((B, D))))
            ]
        )(jnp.asarray(index / TABLE))
    np.testing.assert_allclose(got, kl.mean(1) / np.log(2), rtol=1e-8)
    assert np.all(np.asarray(got) >= 0)
    np.testing.assert_allclose(exact, 0, atol=1e-12)


def test_first_term_is_the_likelihood_of_the_bins():
    """At t = 1/T: -log2 of a Gaussian integrated over the bin, its lower variance that of the second time."""
    bar = np.cumprod(1 - BETAS)
    x0 = np.array([[-1.0, 1.0, 21 / 255, -101 / 255]])
    guess, v = x0 + np.array([[0.01, -0.02, 0.03, 0.0]]), np.array([[0.0, 0.3, 0.7, 1.0]])
    log_variance = v * np.log(BETAS[0]) + (1 - v) * np.log((1 - bar[0]) / (1 - bar[1]) * BETAS[1])
    std = np.exp(log_variance / 2)
    upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
    lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
    p = stats.norm.cdf(upper, guess, std) - stats.norm.cdf(lower, guess, std)
    with jax.enable_x64(True):
        prediction = dj.Prediction(*(jnp.asarray(a) for a in (guess, 0 * guess, v)))
        got = jax.jit(lambda t: dj.variational_term(prediction, SCHEDULE, *map(jnp.asarray, (x0, x0)), t, table=TABLE))(
            jnp.asarray([1 / TABLE])
        )
    np.testing.assert_allclose(got, -np.log2(p).mean(1), rtol=1e-8)


def test_discretized_likelihood_sums_to_one():
    """Over all 256 values, for wide and narrow laws, in the middle and beyond the ends."""
    values = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)[:, None]
    mean = jnp.asarray([[0.0, 0.3, -0.99, 1.5, 0.5]], jnp.float32)
    log_std = jnp.log(jnp.asarray([[0.2, 0.003, 0.05, 0.1, 2.0]], jnp.float32))
    shape = (256, 5)
    got = jax.jit(discretized_log_likelihood)(*(jnp.broadcast_to(a, shape) for a in (values, mean, log_std)))
    np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)).sum(0), 1, atol=1e-5)
    # Far in either tail the difference of two numbers near 1 keeps its digits.
    x, std = np.array([[0.8, -0.8]]), 0.2
    tail = jax.jit(discretized_log_likelihood)(*(jnp.asarray(a, jnp.float32) for a in (x, 0 * x, np.log(std) + 0 * x)))
    exact = np.log(stats.norm.sf(0.8 - 1 / 255, 0, std) - stats.norm.sf(0.8 + 1 / 255, 0, std))
    np.testing.assert_allclose(tail, [[exact, exact]], rtol=1e-3)


def test_gradient_of_the_bound_reaches_only_the_variance():
    """hybrid = L_simple + weight L_vlb: eps gets the gradient of L_simple alone, the variance that of L_vlb alone."""
    x0, eps, _ = batch(np.float32)
    x0, t = (
        jnp.round((jnp.clip(x0, -1, 1) + 1) * 127.5) / 127.5 - 1,
        jnp.asarray(np.array([1, 2, 5, 9, 15, 20]) / TABLE, jnp.float32),
    )

    def model(params):
        def denoiser(x, t, cond):
            p = dj.from_eps(SCHEDULE, x, t, params["eps"] * x)
            return p._replace(variance_fraction=jax.nn.sigmoid(params["v"]) * jnp.ones_like(x))

        return denoiser

    def hybrid(params, weight):
        losses = dj.hybrid_loss(model(params), SCHEDULE, x0, t, eps, table=TABLE, vlb_weight=weight)
        return jnp.mean(losses)

    def bound(params):
        x_t = dj.q_sample(SCHEDULE, x0, t, eps)
        return TABLE * jnp.mean(dj.variational_term(model(params)(x_t, t, None), SCHEDULE, x0, x_t, t, table=TABLE))

    @jax.jit
    def compute(params):
        simple = jnp.mean(dj.denoising_loss(model(params), SCHEDULE, x0, t, eps))
        return (
            simple,
            jax.grad(bound)(params),
            *(jax.value_and_grad(hybrid)(params, w) for w in (0.0, 0.5)),
            bound(params),
        )

    params = {"eps": jnp.float32(0.4), "v": jnp.float32(0.3)}
    simple, of_bound, (at_zero, without), (at_half, with_bound), value = compute(params)
    assert float(at_zero) == pytest.approx(float(simple), rel=1e-6)
    assert float(at_half) == pytest.approx(float(simple) + 0.5 * float(value), rel=1e-5)
    assert float(without["v"]) == 0
    assert float(with_bound["eps"]) == float(without["eps"]) != 0
    assert float(with_bound["v"]) == pytest.approx(0.5 * float(of_bound["v"]), rel=1e-5)
    assert abs(float(of_bound["eps"])) > 1e-3  # there was something to stop


@pytest.mark.slow
def test_learned_variance_finds_the_true_one():
    """For Gaussian data and the exact mean, the fraction that minimises the bound is that of Var(x_s | x_t)."""
    variance, n, index = 0.3, 20_000, 8
    law = mixtures.gaussian(np.zeros(1), np.full(1, variance))
    t = jnp.full((n,), index / TABLE, jnp.float32)
    k1, k2 = jax.random.split(jax.random.key(0))
    x0 = jnp.round(variance**0.5 * jax.random.normal(k1, (n, 1)) * 127.5 - 0.5) / 127.5 + 0.5 / 127.5  # 8-bit values

    @jax.jit
    def bound(v):
        x_t = dj.q_sample(SCHEDULE, x0, t, jax.random.normal(k2, (n, 1)))
        prediction = mixtures.denoiser(law, SCHEDULE)(x_t, t)._replace(variance_fraction=jnp.full_like(x0, v))
        return jnp.mean(dj.variational_term(prediction, SCHEDULE, x0, x_t, t, table=TABLE))

    found = optimize.minimize_scalar(lambda v: float(bound(v)), bounds=(0, 1), method="bounded")
    s = t[:1] - 1 / TABLE
    exact = float(mixtures.reverse_fraction(SCHEDULE, x0[:1], t[:1], s, jnp.full((1, 1), variance))[0, 0])
    print(f"fraction {found.x:.4f}, exact {exact:.4f}")
    assert 0.1 < exact < 0.9
    assert found.x == pytest.approx(exact, abs=0.05)


@pytest.mark.slow
def test_total_bound_is_above_the_entropy_and_near_it():
    """Data: a Gaussian rounded to 8 bits, whose entropy is a sum. 1000 steps, exact denoiser and variance.

    Bound = KL(q(x_1 | x0) || N(0, 1)) + sum over t of L_t >= E[-log2 p(x0)] >= entropy.
    """
    table, std = 1000, 0.25
    schedule = dj.from_betas(dj.linear_betas(table))
    values = np.arange(256) / 127.5 - 1
    edges = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    p = np.diff(stats.norm.cdf(edges / std))
    values, p = values[p > 1e-12], p[p > 1e-12]
    entropy = -np.sum(p * np.log2(p))
    law = mixtures.gaussian(np.zeros(1), np.full(1, std**2))
    denoiser = mixtures.denoiser(law, schedule, next_time=lambda t: jnp.maximum(t - 1 / table, 0))
    # The expectation over the noise by Gauss-Hermite quadrature (L_t is quadratic in it for s > 0), over x0 by its sum.
    nodes, weights = np.polynomial.hermite_e.hermegauss(7)
    x0, eps = (a.reshape(1, -1) for a in np.meshgrid(values, nodes, indexing="ij"))
    weight = np.outer(p, weights / weights.sum()).reshape(1, -1)

    @jax.jit
    def compute(x0, eps, weight, t):
        def one(t):
            x_t = dj.q_sample(schedule, x0, t, eps)
            v = jnp.clip(denoiser(x_t, t).variance_fraction, 0, 1)
            prediction = denoiser(x_t, t)._replace(variance_fraction=v)
            return jnp.sum(weight * dj.variational_term(prediction, schedule, x0, x_t, t, table=table))

        return jax.lax.map(lambda u: one(jnp.broadcast_to(u, x0.shape[:1])), t)

    shaped = [jnp.asarray(a.reshape(-1, 1), jnp.float32) for a in (x0, eps)]
    terms = compute(
        *shaped, jnp.asarray(weight[0], jnp.float32), jnp.asarray(np.arange(1, table + 1) / table, jnp.float32)
    )
    alpha, sigma = (float(c) for c in schedule(jnp.float32(1.0)))
    prior = 0.5 * (alpha**2 * np.sum(p * values**2) + sigma**2 - 1 - np.log(sigma**2)) / np.log(2)
    bound = float(np.sum(np.asarray(terms, np.float64))) + prior
    print(f"entropy {entropy:.3f} bits, bound {bound:.3f}")
    assert entropy < bound < entropy + 0.15


def test_bad_input():
    x0, eps, t = batch(np.float32)
    model = mixtures.denoiser(mixtures.gaussian(np.zeros(D), np.ones(D)), dj.cosine())
    with pytest.raises(ValueError, match="unknown prediction type 'noise'"):
        dj.denoising_loss(model, dj.cosine(), x0, t, eps, target="noise")
    with pytest.raises(ValueError, match=r"denoising_loss: t must be a scalar or \[b\] .*\(6, 4\), got shape \(3,\)"):
        dj.denoising_loss(model, dj.cosine(), x0, t[:3], eps)
    with pytest.raises(ValueError, match=r"cosine: t must lie in \[0, 1\], got \[150"):
        dj.denoising_loss(model, dj.cosine(), x0, 1000 * t, eps)
    with pytest.raises(ValueError, match=r"the denoiser's x0 has shape \(6, 2\), and x \(6, 4\)"):
        dj.denoising_loss(lambda x, t, c: dj.Prediction(x[:, :2], x[:, :2]), dj.cosine(), x0, t, eps)
    with pytest.raises(ValueError, match="no variance"):
        jax.eval_shape(lambda: dj.hybrid_loss(model, dj.cosine(), x0, t, eps))
    with pytest.raises(ValueError, match="shape"):
        dj.denoising_loss(model, dj.cosine(), x0, t, eps[:, :1])
