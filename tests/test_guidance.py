"""Guidance against exact scores and laws; what it costs, counted while it runs; identities; bad input."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
from diffusion_jax.evaluation import mixtures
from diffusion_jax.evaluation.mixtures import Mixture
from diffusion_jax.guidance import (
    apg,
    apg_momentum,
    autoguidance,
    cfg_pp,
    cfg_rescale,
    classifier,
    classifier_free,
    dynamic_threshold,
    interval,
    perpendicular,
    static_threshold,
    two_conditions,
)

LAW = Mixture(
    np.array([0.2, 0.5, 0.3]),
    np.array([[1.0, -0.5, 0.2], [-0.6, 0.4, 0.0], [0.3, 0.9, -0.7]]),
    np.array([[0.1, 0.3, 0.2], [0.4, 0.2, 0.3], [0.2, 0.1, 0.5]]),
)
NULL = 3
SCHEDULES = {
    "vp_linear": (dj.vp_linear(), (0.05, 0.4, 0.9)),
    "rectified": (dj.rectified(), (0.05, 0.5, 0.97)),
    "edm": (dj.edm(), (0.1, 1.0, 20.0)),
}
COND = jnp.asarray([0, 1, 2], jnp.int32)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def points(dtype=None):
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), dtype)


def component(law, k):
    return Mixture(np.ones(1), law.means[k : k + 1], law.variances[k : k + 1])


def label_log_prob(schedule):
    """log p_t(cond | x) for LAW: the exact classifier of noisy data."""
    whole = Mixture(LAW.weights, LAW.means, LAW.variances)

    def log_prob(x, t, cond):
        each = [np.log(LAW.weights[k]) + mixtures.log_density(component(LAW, k), schedule, x, t) for k in range(3)]
        return jnp.stack(each)[cond, jnp.arange(x.shape[0])] - mixtures.log_density(whole, schedule, x, t)

    return log_prob


def assert_close(got, want, tol=1e-10):
    for a, b in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def assert_consistent(schedule, x, t, p, tol=1e-10):
    alpha, sigma = (np.asarray(c)[:, None] for c in schedule(t))
    np.testing.assert_allclose(alpha * p.x0 + sigma * p.eps, x, atol=tol)


# --- against exact scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_classifier_turns_the_unconditional_denoiser_into_the_conditional_one(name, x64):
    schedule, times = SCHEDULES[name]
    x, t, free = points(), jnp.asarray(times), mixtures.denoiser(LAW, schedule)

    @jax.jit
    def compute(scale):
        guided = classifier(free, schedule, label_log_prob(schedule), scale)(x, t, COND)
        return guided, mixtures.conditional(LAW, schedule)(x, t, COND), free(x, t)

    one, yes, no = compute(1.0)
    assert_close(one, yes, 1e-9)
    assert_close(compute(0.0)[0], no, 0)
    three = compute(3.0)[0]
    np.testing.assert_allclose(three.eps, no.eps + 3 * (yes.eps - no.eps), rtol=1e-8, atol=1e-10)
    assert_consistent(schedule, x, t, three)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("w", [-0.5, 0.0, 1.0, 2.5])
def test_classifier_free_is_the_score_of_the_tilted_density(name, w, x64):
    """grad (w log p_t(x | c) + (1 - w) log p_t(x)), by automatic differentiation of the densities."""
    schedule, times = SCHEDULES[name]
    x, t, model = points(), jnp.asarray(times), mixtures.conditional(LAW, schedule)
    log_prob = label_log_prob(schedule)

    @jax.jit
    def compute(w):
        def tilted(x):  # log p(x | c) = log p(c | x) + log p(x) - log p(c)
            return jnp.sum(mixtures.log_density(LAW, schedule, x, t) + w * log_prob(x, t, COND))

        p = classifier_free(model, NULL, w)(x, t, COND)
        return p, dj.to_score(schedule, p, t), jax.grad(tilted)(x)

    p, score, expected = compute(jnp.asarray(w))
    np.testing.assert_allclose(score, expected, rtol=1e-9, atol=1e-11)
    assert_consistent(schedule, x, t, p)


def gaussians(schedule, means, variances):
    """A denoiser of two Gaussians on a line, cond 0 or 1, and the other as the unconditional model: null 1."""
    law = Mixture(np.full(2, 0.5), np.asarray(means)[:, None], np.asarray(variances)[:, None])
    return mixtures.conditional(law, schedule)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_law_that_guidance_of_gaussians_ends_in(w, x64):
    """dx/ds = s (w (x - m_c) / (v_c + s^2) + (1 - w) (x - m_0) / (v_0 + s^2)), solved by hand, in EDM's time s.

    It is neither p(x | c) nor the product of powers, unless w is 0 or 1.
    """
    schedule, top, x = dj.edm(), 20.0, jnp.asarray([[-20.0], [3.0], [25.0]])
    times = jnp.asarray(np.linspace(top ** (1 / 7), 0, 401) ** 7)

    def end(means, variances):
        guided = classifier_free(gaussians(schedule, means, variances), 1, jnp.asarray(w))
        cond = jnp.zeros(3, jnp.int32)
        return jax.jit(lambda x: dj.sample(jax.random.key(0), dj.heun(schedule), guided, x, times, cond))(x)

    v_c, v_0, m = 0.3, 1.2, 0.7
    shrink = (v_c / (v_c + top**2)) ** (w / 2) * (v_0 / (v_0 + top**2)) ** ((1 - w) / 2)
    got = end([m, m], [v_c, v_0])
    np.testing.assert_allclose(got, m + shrink * (x - m), atol=3e-4 * np.sqrt(v_0))
    slope = float(got[2, 0] - got[0, 0]) / 45 * top  # of noise of variance top^2
    assert slope**2 == pytest.approx(v_c**w * v_0 ** (1 - w), rel=0.02)
    if w == 3.0:
        assert slope**2 < 0.2 / (w / v_c + (1 - w) / v_0)
    m_c, m_0, v = 0.7, -0.4, 0.5
    centre = w * m_c + (1 - w) * m_0
    np.testing.assert_allclose(end([m_c, m_0], [v, v]), centre + np.sqrt(v / (v + top**2)) * (x - centre), atol=3e-4)


# --- what it costs ----------------------------------------------------------------------------------------------------


class Counter:
    """A denoiser that notes the batch size of each evaluation when it runs, and each trace."""

    def __init__(self, denoiser):
        self.denoiser, self.ran, self.traces = denoiser, [], 0

    def __call__(self, x, t, cond=None):
        self.traces += 1
        b = x.shape[0]
        jax.debug.callback(lambda: self.ran.append(b))
        return self.denoiser(x, t, cond)

    def sizes(self):
        jax.effects_barrier()
        ran, self.ran = self.ran, []
        return sorted(ran)


COSINE = dj.cosine()
MODEL = mixtures.conditional(LAW, COSINE)
# name -> guided denoiser from a denoiser and a scale, neutral scale, evaluations at another scale
PAIRS = {
    "classifier_free": (lambda d, w: classifier_free(d, NULL, w), 1.0, [6]),
    "cfg_rescale": (lambda d, w: cfg_rescale(d, COSINE, NULL, w, 0.7), 1.0, [6]),
    "cfg_pp": (lambda d, w: cfg_pp(d, NULL, w), 0.0, [6]),
    "apg": (lambda d, w: apg(d, COSINE, NULL, w, 0.0, 2.5), 1.0, [6]),
    "autoguidance": (lambda d, w: autoguidance(d, lambda x, t, c: d(x, 1.1 * t, c), w), 1.0, [3, 3]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_neutral_scale_runs_one_model(name):
    """Counted while it runs, with one compilation for all scales; and it is then exactly that model."""
    make, neutral, cost = PAIRS[name]
    x, t, counter = points(jnp.float32), jnp.asarray([0.3, 0.5, 0.8]), Counter(MODEL)
    only = MODEL(x, t, COND if neutral else jnp.full(3, NULL, jnp.int32))
    guided = jax.jit(lambda scale: make(counter, scale)(x, t, COND))
    runs = [(w, guided(jnp.float32(w)), counter.sizes()) for w in (neutral, 2.5, neutral, -1.0)]
    assert guided._cache_size() == 1
    for w, p, sizes in runs:
        assert sizes == ([3] if w == neutral else cost)
        if w == neutral:
            assert_close(p, only, 1e-6)
        else:
            assert not np.allclose(p.x0, only.x0, atol=1e-3)
    # A number known in advance leaves no branch behind; one example away from neutral is enough to need both.
    known = jax.make_jaxpr(lambda: make(MODEL, neutral)(x, t, COND))()
    assert "cond[" not in str(known)
    few = jax.jit(lambda scale: make(counter, scale)(x, t, COND))(jnp.asarray([neutral, 2.5, neutral], jnp.float32))
    assert counter.sizes() == cost
    np.testing.assert_allclose(few.x0[::2], only.x0[::2], rtol=2e-4, atol=1e-5)


def test_classifier_is_not_evaluated_at_scale_0():
    x, t, ran = points(jnp.float32), jnp.asarray([0.3, 0.5, 0.8]), []

    def log_prob(x, t, cond):
        jax.debug.callback(lambda: ran.append(1))
        return -jnp.sum(x**2, axis=1)

    guided = jax.jit(lambda w: classifier(mixtures.denoiser(LAW, COSINE), COSINE, log_prob, w)(x, t, COND).eps)
    for w, count in ((0.0, 0), (1.0, 1)):
        ran.clear()
        jax.block_until_ready(guided(jnp.float32(w)))
        jax.effects_barrier()
        assert len(ran) == count


@pytest.mark.slow
def test_interval_guides_inside_only(x64):
    """As many evaluations of 2b as times inside (low, high]; the same path as switching by hand; traced ends."""
    schedule, counter, x = dj.edm(), Counter(mixtures.conditional(LAW, dj.edm())), 10 * points()
    times = jnp.asarray([10.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0])

    @jax.jit
    def run(scale, low, high):
        guided = classifier_free(counter, NULL, interval(schedule, scale, low, high))
        return dj.sample(jax.random.key(0), dj.ddim(schedule), guided, x, times, COND)

    got = run(4.0, 0.5, 5.0)
    assert counter.sizes() == [3, 3, 3, 6, 6, 6]
    traces = counter.traces
    y, model = x, counter.denoiser
    for t, s in itertools.pairwise(np.asarray(times)):
        p = classifier_free(model, NULL, 4.0 if t in (5.0, 2.0, 1.0) else 1.0)(y, jnp.full(3, t), COND)
        y = p.x0 + s * p.eps
    np.testing.assert_allclose(got, y, rtol=1e-9)
    run(1.0, 0.0, np.inf)
    assert counter.sizes() == [3] * 6
    run(2.0, 0.0, np.inf)
    assert counter.sizes() == [6] * 6 and counter.traces == traces
    by_time = interval(dj.rectified(), lambda t: 1 + t, 0.0, 1.0)(jnp.asarray([0.25, 0.5, 0.75, 1.0]))
    np.testing.assert_allclose(by_time, [1.25, 1.5, 1, 1])
    np.testing.assert_allclose(interval(dj.rectified(), 2.0, 1.0, np.inf)(jnp.asarray([0.5, 1.0])), [1, 2])


# --- identities of each rule ------------------------------------------------------------------------------------------


@pytest.fixture
def setting(x64):
    """schedule, model, x, t, and the conditional and unconditional predictions."""
    x, t = points(), jnp.asarray([0.3, 0.5, 0.8])
    model = jax.jit(MODEL)
    return model, x, t, model(x, t, COND), model(x, t, jnp.full(3, NULL, jnp.int32))


def test_classifier_free_is_linear_in_the_scale(setting):
    model, x, t, yes, no = setting
    guided = jax.jit(lambda w: classifier_free(model, NULL, w)(x, t, COND))
    assert_close(guided(0.0), no)
    np.testing.assert_allclose(guided(3.0).eps, no.eps + 3 * (yes.eps - no.eps), rtol=1e-10)
    per_example, by_time = (
        guided(jnp.asarray([0.0, 2.0, 2.0])),
        classifier_free(model, NULL, lambda t: jnp.where(t > 0.4, 2.0, 0.0)),
    )
    assert_close(by_time(x, t, COND), per_example)
    np.testing.assert_allclose(per_example.x0, np.concatenate([no.x0[:1], (2 * yes.x0 - no.x0)[1:]]), rtol=1e-10)
    assert_close(classifier_free(model, jnp.asarray([NULL], jnp.int32), 2.0)(x, t, COND), guided(2.0))


def test_any_tree_of_conditions_and_the_learned_variance():
    def model(x, t, cond):
        shift = cond["text"][:, 0, :2] + dj.bcast(cond["label"], x[:, :2])
        return dj.from_eps(COSINE, x, t, shift)._replace(variance_fraction=dj.bcast(cond["label"], x) + 0 * x)

    cond = {"text": jnp.ones((2, 3, 4)), "label": jnp.asarray([1.0, 2.0])}
    null = {"text": jnp.zeros((3, 4)), "label": 0.0}
    rules = {
        "classifier_free": lambda w: classifier_free(model, null, w),
        "cfg_rescale": lambda w: cfg_rescale(model, COSINE, null, w, 0.0, "eps"),
        "apg": lambda w: apg(model, COSINE, null, w, 1.0),
        "perpendicular": lambda w: perpendicular(model, null, [null], w, [0.5]),
        "two_conditions": lambda w: two_conditions(model, null, null, w, 1.5),
        "autoguidance": lambda w: autoguidance(model, lambda x, t, c: dj.from_eps(COSINE, x, t, 0 * x), w),
    }
    for name, rule in rules.items():
        out = jax.jit(lambda w, r=rule: r(w)(jnp.zeros((2, 2)), jnp.full(2, 0.5), cond))(2.0)
        np.testing.assert_allclose(out.eps, [[4.0, 4.0], [6.0, 6.0]], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(out.variance_fraction, [[1.0, 1.0], [2.0, 2.0]], err_msg=name)
    out = jax.jit(lambda w: cfg_pp(model, null, w)(jnp.zeros((2, 2)), jnp.full(2, 0.5), cond))(0.5)
    for part in (out.eps, out.variance_fraction):  # those of the null condition
        np.testing.assert_allclose(part, 0)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "velocity"])
def test_rescale_keeps_the_contrast(target, setting):
    """phi = 0 is classifier-free guidance, phi = 1 has the standard deviation of the conditional y, linear between."""
    model, x, t, yes, _ = setting
    w = 4.0
    guided = jax.jit(lambda phi: cfg_rescale(model, COSINE, NULL, w, phi, target)(x, t, COND))
    plain = classifier_free(model, NULL, w)(x, t, COND)
    y = {"x0": dj.to_x0, "eps": dj.to_eps, "v": dj.to_v, "velocity": dj.to_velocity}[target]
    zero, half, one = (np.asarray(y(COSINE, guided(phi), t)) for phi in (0.0, 0.5, 1.0))
    assert_close(guided(0.0), plain, 1e-8)
    np.testing.assert_allclose(one.std(1), np.asarray(y(COSINE, yes, t)).std(1), rtol=1e-10)
    assert not np.allclose(zero.std(1), one.std(1), rtol=0.05)
    np.testing.assert_allclose(half, (zero + one) / 2, rtol=1e-10)
    np.testing.assert_allclose(one / zero, np.broadcast_to((one / zero)[:, :1], one.shape), rtol=1e-9)
    assert_consistent(COSINE, x, t, guided(0.7))


def test_cfg_pp_with_ddim_is_the_papers_step(setting):
    """x0 = (x - sqrt(1 - a) eps_w) / sqrt(a);  x <- sqrt(a') x0 + sqrt(1 - a') eps_0,  a = alpha^2, in NumPy."""
    model, x, t, yes, no = setting
    (a, _), (a_next, _) = (map(np.asarray, COSINE(jnp.asarray(u))) for u in (0.6, 0.4))
    a, a_next, t = a**2, a_next**2, jnp.full(3, 0.6)
    yes, no = model(x, t, COND), model(x, t, jnp.full(3, NULL, jnp.int32))
    eps_w = np.asarray(no.eps + 0.7 * (yes.eps - no.eps))
    x0 = (np.asarray(x) - np.sqrt(1 - a) * eps_w) / np.sqrt(a)
    expected = np.sqrt(a_next) * x0 + np.sqrt(1 - a_next) * np.asarray(no.eps)
    guided = cfg_pp(model, NULL, jnp.asarray(0.7))
    step = jax.jit(lambda: dj.sample(jax.random.key(0), dj.ddim(COSINE), guided, x, jnp.asarray([0.6, 0.4]), COND))
    np.testing.assert_allclose(step(), expected, rtol=1e-9)
    with pytest.raises(AssertionError):
        assert_consistent(COSINE, x, t, guided(x, t, COND), 1e-2)


def test_apg_is_classifier_free_at_eta_1_and_projects_at_eta_0(setting):
    model, x, t, yes, no = setting
    guided = jax.jit(lambda w, eta, radius: apg(model, COSINE, NULL, w, eta, radius)(x, t, COND))
    assert_close(guided(3.0, 1.0, np.inf), classifier_free(model, NULL, 3.0)(x, t, COND), 1e-8)
    across, part = guided(3.0, 0.0, np.inf), guided(3.0, 0.25, np.inf)
    d, u = np.asarray(yes.x0 - no.x0), np.asarray(yes.x0)
    move = np.asarray(across.x0) - u
    np.testing.assert_allclose(np.sum(move * u, 1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(move, axis=1) / 2, np.sin(np.arccos(cosines(d, u))) * norms(d), rtol=1e-9)
    np.testing.assert_allclose(np.sum((part.x0 - u) * u, 1), 0.25 * 2 * np.sum(d * u, 1), rtol=1e-9)
    assert_consistent(COSINE, x, t, part)
    radius = float(np.median(norms(d)))
    short = np.asarray(guided(3.0, 1.0, radius).x0) - u
    np.testing.assert_allclose(norms(short), 2 * np.minimum(norms(d), radius), rtol=1e-9)
    np.testing.assert_allclose(cosines(short, d), 1, rtol=1e-12)
    assert_close(apg(model, COSINE, NULL, jnp.ones(3), 0.0, radius)(x, t, COND), yes, 1e-8)


def norms(a):
    return np.linalg.norm(a, axis=1)


def cosines(a, b):
    return np.sum(a * b, 1) / norms(a) / norms(b)


def unconditional(model):
    return lambda x, t, cond: model(x, t, jnp.full(x.shape[0], NULL, jnp.int32))


def test_apg_momentum_is_the_papers_loop(setting):
    """The update in NumPy: the running average, its shortening, its projection, then a DDIM step; momentum 0 is apg."""
    model, x, *_ = setting
    times, (w, eta, radius) = np.array([0.9, 0.7, 0.5, 0.2]), (3.0, 0.3, 0.8)
    free = unconditional(model)

    @jax.jit
    def run(momentum, scale):
        sampler = apg_momentum(dj.ddim(COSINE), COSINE, free, scale, eta, radius, momentum)
        return dj.sample(jax.random.key(0), sampler, model, x, jnp.asarray(times), COND)

    def by_hand(momentum):
        y, average = np.asarray(x), 0.0
        for t, s in itertools.pairwise(times):
            times_t = jnp.full(3, t)
            u = np.asarray(model(jnp.asarray(y), times_t, COND).x0)
            average = u - np.asarray(free(jnp.asarray(y), times_t, None).x0) + momentum * average
            d = average * np.minimum(1, radius / norms(average))[:, None]
            along = u * (np.sum(d * u, 1) / np.sum(u * u, 1))[:, None]
            x0 = u + (w - 1) * (d - along + eta * along)
            (a_t, s_t), (a_s, s_s) = (map(float, COSINE(jnp.asarray(v))) for v in (t, s))
            y = a_s * x0 + s_s * (y - a_t * x0) / s_t
        return y

    for momentum in (-0.5, 0.3):
        np.testing.assert_allclose(run(momentum, w), by_hand(momentum), rtol=1e-8, atol=1e-10)
    without = apg(model, COSINE, NULL, w, eta, radius)
    plain = jax.jit(
        lambda d: dj.sample(jax.random.key(0), dj.ddim(COSINE), d, x, jnp.asarray(times), COND), static_argnums=0
    )
    np.testing.assert_allclose(run(0.0, w), plain(without), rtol=1e-8)
    np.testing.assert_allclose(run(-0.5, 1.0), plain(model), rtol=1e-8)
    assert not np.allclose(run(-0.5, w), run(0.0, w), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "each"), [("ddim", 1), ("heun", 2), ("churn", 3)])
def test_apg_momentum_costs_no_evaluation_of_its_own(inner, each):
    """Except around `churn`, which looks elsewhere first; inside it there is none again."""
    schedule, yes, no = COSINE, Counter(MODEL), Counter(unconditional(MODEL))
    heun, x, times = dj.heun(schedule), points(jnp.float32), jnp.asarray([0.9, 0.6, 0.3])

    def around(sampler):
        return apg_momentum(sampler, schedule, no, 2.0, 0.0, np.inf, -0.5)

    def churned(sampler):
        return dj.churn(sampler, schedule, 0.1, 0.0, 1.0, 1.0)

    forms = {"ddim": [around(dj.ddim(schedule))], "heun": [around(heun)], "churn": [around(churned(heun))]}[inner]
    counts = [each]
    if inner == "churn":
        forms.append(churned(around(heun)))
        counts.append(2)
    for sampler, count in zip(forms, counts, strict=True):
        y = jax.jit(lambda s=sampler: dj.sample(jax.random.key(0), s, yes, x, times, COND))()
        assert np.isfinite(y).all()
        assert yes.sizes() == no.sizes() == [3] * 2 * count


def test_autoguidance_extrapolates_from_the_worse_model(setting):
    model, x, t, yes, _ = setting
    blurred = mixtures.conditional(LAW._replace(variances=LAW.variances * 2), COSINE)
    guided = jax.jit(lambda w: autoguidance(model, blurred, w)(x, t, COND))
    worse = blurred(x, t, COND)
    for w in (0.0, 1.0, 2.5):
        np.testing.assert_allclose(guided(w).x0, w * yes.x0 + (1 - w) * worse.x0, rtol=1e-9, atol=1e-12)
    assert_consistent(COSINE, x, t, guided(2.5))
    assert_close(
        autoguidance(model, unconditional(model), 2.5)(x, t, COND), classifier_free(model, NULL, 2.5)(x, t, COND)
    )


def test_two_conditions_have_a_scale_each(setting):
    """Moves along two directions; guidance to both, to the first or to none of them where scales are 1 or 0."""
    model, x, t, _, no = setting
    cond, first = jnp.asarray([0, 1, 2], jnp.int32), jnp.asarray([1, 2, 0], jnp.int32)
    guided = jax.jit(lambda w, v: two_conditions(model, first, NULL, w, v)(x, t, cond))
    assert_close(guided(1.0, 1.0), model(x, t, cond))
    assert_close(guided(0.0, 1.0), model(x, t, first))
    assert_close(guided(0.0, 0.0), no)
    assert_close(guided(0.0, 2.5), classifier_free(model, NULL, 2.5)(x, t, first))
    parts = [model(x, t, c).eps for c in (cond, first)]
    np.testing.assert_allclose(guided(3.0, 2.0).eps, no.eps + 2 * (parts[1] - no.eps) + 3 * (parts[0] - parts[1]))
    assert_consistent(COSINE, x, t, guided(3.0, 2.0))


def test_negative_conditions_act_across_the_positive_one(setting):
    model, x, t, _, no = setting
    cond, others = jnp.asarray([0, 1, 2], jnp.int32), jnp.asarray([1, 2, 0], jnp.int32)
    guided = jax.jit(lambda w, v: perpendicular(model, NULL, [others, 2], w, v)(x, t, cond))
    plain = classifier_free(model, NULL, 3.0)(x, t, cond)
    assert_close(guided(3.0, [0.0, 0.0]), plain)
    assert_close(perpendicular(model, NULL, [], 3.0, [])(x, t, cond), plain)
    assert_close(guided(0.0, [1.0, 0.5]), no)
    assert_close(perpendicular(model, NULL, [cond], 3.0, [5.0])(x, t, cond), plain)  # nothing of it is across
    bad = guided(3.0, [1.0, 0.0])
    pos, neg = (np.asarray(model(x, t, c).eps - no.eps) for c in (cond, others))
    move = np.asarray(bad.eps - plain.eps)
    np.testing.assert_allclose(np.sum(move * pos, 1), 0, atol=1e-12)
    np.testing.assert_allclose(norms(move), 3 * norms(neg) * np.sqrt(1 - cosines(neg, pos) ** 2), rtol=1e-8)
    assert np.all(np.sum(move * neg, 1) < 0)
    assert_consistent(COSINE, x, t, bad)
    second = guided(3.0, [0.0, 0.5])
    np.testing.assert_allclose(guided(3.0, [1.0, 0.5]).x0, bad.x0 + second.x0 - plain.x0, rtol=1e-9)


# --- thresholds -------------------------------------------------------------------------------------------------------


def given(x0):
    """The denoiser that predicts x0 whatever it sees."""
    return lambda x, t, cond=None: dj.from_x0(COSINE, x, t, x0)


def test_static_threshold_stays_consistent(setting):
    _, x, t, _, _ = setting
    p = jax.jit(lambda: static_threshold(given(3 * x), COSINE, 0.4)(x, t))()
    np.testing.assert_allclose(p.x0, np.clip(3 * np.asarray(x), -0.4, 0.4))
    assert_consistent(COSINE, x, t, p)
    assert_close(static_threshold(given(x), COSINE, 100.0)(x, t), given(x)(x, t))


def test_dynamic_threshold_is_a_percentile_of_each_example(x64):
    """m = max(limit, percentile of |x0|), against NumPy's; above m all is at the limit, below the order is kept."""
    rng = np.random.default_rng(1)
    x0 = rng.standard_normal((4, 10, 10, 1)) * np.array([0.1, 1.0, 3.0, 30.0])[:, None, None, None]
    x, t = jnp.asarray(rng.standard_normal(x0.shape)), jnp.full(4, 0.5)
    run = jax.jit(lambda q, x0: dynamic_threshold(given(x0), COSINE, q, 1.5)(x, t))
    p = run(0.9, jnp.asarray(x0))
    m = np.maximum(np.quantile(np.abs(x0).reshape(4, -1), 0.9, axis=1), 1.5)
    assert m[0] == 1.5 < m[1]
    np.testing.assert_allclose(
        p.x0, np.clip(x0, *(s * m[:, None, None, None] for s in (-1, 1))) * 1.5 / m[:, None, None, None]
    )
    np.testing.assert_array_equal(p.x0[0], x0[0])
    at_limit = np.mean(np.isclose(np.abs(p.x0), 1.5).reshape(4, -1), axis=1)
    np.testing.assert_allclose(at_limit, [0, 0.1, 0.1, 0.1], atol=0.011)
    np.testing.assert_allclose(run(0.9, jnp.asarray(7 * x0)).x0[2:], p.x0[2:], rtol=1e-12)  # the size is forgotten
    np.testing.assert_allclose(run(1.0, jnp.asarray(x0)).x0[3], 1.5 * x0[3] / np.abs(x0[3]).max())
    alpha, sigma = COSINE(t)
    np.testing.assert_allclose(dj.bcast(alpha, x) * p.x0 + dj.bcast(sigma, x) * p.eps, x, atol=1e-12)


# --- shapes, dtypes, input --------------------------------------------------------------------------------------------


def everything(schedule, model, guide):
    """Every rule with traced numbers g: f32[4]."""
    return lambda g: {
        "classifier": classifier(model, schedule, lambda x, t, c: -jnp.sum(x.reshape(x.shape[0], -1) ** 2, 1), g[0]),
        "classifier_free": classifier_free(model, 0.0, g[0]),
        "interval": classifier_free(model, 0.0, interval(schedule, g[0], g[2], g[3])),
        "cfg_rescale": cfg_rescale(model, schedule, 0.0, g[0], g[1]),
        "cfg_pp": cfg_pp(model, 0.0, g[0]),
        "apg": apg(model, schedule, 0.0, g[0], g[1], g[3]),
        "autoguidance": autoguidance(model, guide, g[0]),
        "perpendicular": perpendicular(model, 0.0, [1.0, 2.0], g[0], [g[1], g[2]]),
        "static_threshold": static_threshold(model, schedule, 0.5),
        "dynamic_threshold": dynamic_threshold(model, schedule, g[1]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_modality_and_precision(dtype):
    """Points, sound, pictures, video; one trace for all numbers, and x's dtype kept, also where x64 is enabled."""
    schedule, traces = dj.vp_linear(), []

    def model(x, t, cond=None):
        traces.append(1)
        return dj.from_v(schedule, x, t, 0.1 * x + dj.bcast(cond, x))

    def guide(x, t, cond=None):
        return dj.from_v(schedule, x, t, 0.2 * x)

    def run(g, x, t, cond):
        out = {name: rule(x, t, cond)[:2] for name, rule in everything(schedule, model, guide)(g).items()}
        sampler = apg_momentum(dj.heun(schedule), schedule, guide, g[0], g[1], g[3], g[2])
        out["sample"] = dj.sample(jax.random.key(0), sampler, model, x, jnp.asarray([0.8, 0.4], t.dtype), cond)
        return out

    compiled, args = jax.jit(run), (jnp.full(3, 0.5, jnp.float32), jnp.ones(3, jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 4, 2)), dtype)
    seen = []
    for g in ([2.0, 0.5, 0.1, 3.0], [3.0, 0.2, 0.3, 0.7]):
        for leaf in jax.tree.leaves(compiled(jnp.asarray(g, jnp.float32), x, *args)):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()
        seen.append(len(traces))
    assert seen[0] == seen[1] and compiled._cache_size() == 1
    for shape, x64 in itertools.product([(3, 2), (3, 8, 1), (3, 4, 4, 2), (3, 2, 4, 4, 1)], [False, True]):
        with jax.enable_x64(x64):
            g = jnp.zeros(4, "float64" if x64 else "float32")
            for name, out in jax.eval_shape(run, g, jax.ShapeDtypeStruct(shape, dtype), *args).items():
                assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out)} == {(shape, jnp.dtype(dtype))}, name


def test_shape_does_not_change_the_numbers():
    """Norms, projections, deviations and percentiles are over a whole example, however it is laid out."""
    schedule = dj.vp_linear()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 3, 2)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((3, 12)), jnp.float32)

    def make(factor):
        def model(x, t, cond=None):
            c = jnp.asarray(factor, x.dtype) * jnp.reshape(weight, (3, *x.shape[1:]))
            c = c[cond.astype(jnp.int32)]
            return dj.from_v(schedule, x, t, 0.3 * x + c)

        return model

    @jax.jit
    def run(x):
        g, t, cond = jnp.asarray([2.0, 0.5, 0.1, 3.0]), jnp.full(3, 0.5), jnp.asarray([1.0, 2.0, 1.0])
        rules = everything(schedule, make(1.0), make(0.5))(g)
        return {name: rule(x, t, cond).x0 for name, rule in rules.items()}

    flat, image = run(x.reshape(3, -1)), run(x)
    for name in flat:
        np.testing.assert_allclose(image[name].reshape(3, -1), flat[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_bad_input():
    x, t, s = points(jnp.float32), jnp.full(3, 0.5), dj.cosine()
    text = {"text": jnp.ones((3, 4))}
    two = jnp.asarray([0, 1], jnp.int32)
    cases = [
        (lambda: classifier_free(MODEL, NULL, 2.0)(x, t, None), r"condition of \[3\].*\(3, 3\)"),
        (lambda: classifier_free(MODEL, NULL, 1.0)(x, t), r"condition of \[3\]"),
        (lambda: cfg_pp(MODEL, NULL, 2.0)(x, t, None), r"condition of \[3\]"),
        (lambda: apg(MODEL, s, NULL, 2.0, 0.0)(x, t, two), r"condition of \[3\].*\(2,\)"),
        (lambda: perpendicular(MODEL, NULL, [1], 2.0, [1.0])(x, t, two), r"condition of \[3\].*\(2,\)"),
        (
            lambda: classifier_free(MODEL, jnp.zeros((5,), jnp.int32), 2.0)(x, t, COND),
            r"null or negative of shape \(5,\).*\(3,\)",
        ),
        (
            lambda: classifier_free(MODEL, {"text": jnp.zeros(7)}, 2.0)(x, t, text),
            r"null or negative of shape \(7,\).*\(3, 4\)",
        ),
        (lambda: classifier_free(MODEL, {"words": jnp.zeros(4)}, 2.0)(x, t, text), "words"),
        (lambda: classifier_free(MODEL, NULL, jnp.ones(2))(x, t, COND), r"scale has shape \(2,\).*\(3, 3\)"),
        (lambda: autoguidance(MODEL, MODEL, jnp.ones((3, 1)))(x, t, COND), r"scale has shape \(3, 1\)"),
        (lambda: classifier_free(MODEL, NULL, lambda t: jnp.ones((2, 2)))(x, t, COND), r"scale has shape \(2, 2\)"),
        (lambda: classifier(MODEL, s, lambda x, t, c: jnp.sum(x), 2.0)(x, t, COND), r"log_prob returned shape \(\)"),
        (lambda: perpendicular(MODEL, NULL, [0, 1], 2.0, [1.0]), "2 negatives and 1 weights"),
        (lambda: cfg_rescale(MODEL, s, NULL, 2.0, 1.5), "phi must be in"),
        (lambda: cfg_rescale(MODEL, s, NULL, 2.0, 0.5, "noise"), "unknown prediction type 'noise'"),  # type: ignore
        (lambda: dynamic_threshold(MODEL, s, 99.5), "percentile must be in"),
        (lambda: interval(s, 2.0, 3.0, 1.0), "low < high"),
        (lambda: interval(s, 2.0, -1.0, 1.0), "low < high"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
        if "scale has shape" in message or "condition of" in message:
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(call)
