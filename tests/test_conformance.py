"""What `make conformance` measures with: exact answers are exact, and a sampler that is wrong is reported as such."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BELL, law_propagator
from PIL import Image

import diffusion_jax as dj
from conformance import __main__ as command
from conformance import gallery, report, run, samplers
from conformance.table import PROBLEMS, SAMPLERS, Entry
from diffusion_jax.evaluation import mixtures
from diffusion_jax.samplers.driver import memoryless


@pytest.fixture
def small(monkeypatch):
    """Fewer steps, examples and tolerances than the table's, for a sampler in about a second."""
    monkeypatch.setattr(samplers, "DOUBLINGS", (16, 32, 64, 128))
    monkeypatch.setattr(samplers, "COUNTS", [4, 16, 128])
    monkeypatch.setattr(samplers, "STEPS", 400)
    monkeypatch.setattr(samplers, "EXAMPLES", {"1-D": 2000})


# --- exact answers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["vp_linear", "edm"])
def test_the_quantile_map_is_the_probability_flow(problem):
    """It composes, keeps the law, agrees with a Gaussian's flow, and moves with the velocity of the exact denoiser."""
    schedule, (high, low) = PROBLEMS[problem].schedule, samplers.INTERVALS[problem]
    middle, x = (high + low) / 2, np.linspace(-2.0, 2.5, 9)
    go = functools.partial(samplers.quantile_map, samplers.LINE, schedule)
    with jax.enable_x64(True):
        y = go(x, high, low)
        np.testing.assert_allclose(go(go(x, high, middle), middle, low), y, atol=1e-12)
        np.testing.assert_allclose(go(y, low, high), x, atol=1e-11)
        cdf_high, cdf_low = (
            mixtures.projected_cdf(samplers.at(samplers.LINE, schedule, t), np.ones(1)) for t in (high, low)
        )
        np.testing.assert_allclose(cdf_low(y), cdf_high(x), atol=1e-14)

        bell = mixtures.gaussian(np.array([0.3]), np.array([0.5]))
        flow = mixtures.flow(bell, schedule, jnp.asarray(x[:, None]), jnp.asarray(high), jnp.asarray(low))
        np.testing.assert_allclose(samplers.quantile_map(bell, schedule, x, high, low), flow[:, 0], atol=1e-11)

        h, t = 1e-5, jnp.asarray(middle)
        moved = (go(x, middle, middle + h) - go(x, middle, middle - h)) / (2 * h)
        times = jnp.full(x.shape, middle)
        velocity = dj.to_velocity(
            schedule, mixtures.denoiser(samplers.LINE, schedule)(jnp.asarray(x[:, None]), times), t
        )
        np.testing.assert_allclose(moved, velocity[:, 0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["ddim_half", "dpmpp_2m_sde"])
def test_the_law_without_drawing_is_that_of_the_jacobians(name):
    """Two independent ways to the mean and the covariance of a random sampler: kicks in a batch, and `jax.jacfwd`."""
    entry, times = SAMPLERS[name], samplers.interval(SAMPLERS[name], 8)
    schedule = PROBLEMS[entry.problem].schedule
    with jax.enable_x64(True):
        measured, _ = samplers.runner(entry, 1)
        error = samplers.law_error(measured, entry, 1, times)
        mean, covariance = law_propagator(lambda noise: entry.make(PROBLEMS[entry.problem], noise), schedule, BELL)(
            times
        )
        end = samplers.at(BELL, schedule, times[-1])
    squared = (mean - end.means[0]) ** 2 + (np.sqrt(np.diag(covariance)) - np.sqrt(end.variances[0])) ** 2
    assert error == pytest.approx(np.sqrt(squared.sum() / BELL.variances.sum()), rel=1e-9)
    assert error > 1e-4


def test_an_order_is_extrapolated_and_needs_errors_above_rounding():
    n = np.array(samplers.DOUBLINGS, float)
    for p in (1, 2, 4):
        errors = dict(zip(n, n**-p * (1 + 4 / n), strict=True))
        if p < 4:
            assert samplers.order(errors) == pytest.approx(p, abs=1e-3)
        else:
            assert samplers.order(errors) == pytest.approx(p, abs=0.02)
    assert samplers.order(dict.fromkeys(n, 1e-13)) is None
    assert samplers.order_misses(2, {"mixture": 2.09}) == []
    assert samplers.order_misses(3, {"mixture": 2.81}) == []
    assert samplers.order_misses(2, {"mixture": 2.2}) and samplers.order_misses(3, {"mixture": 2.7})
    assert samplers.order_misses(2, {}) and samplers.order_misses(2, {"mixture": None})


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes():
    return {"1-D": samplers.make_probe(samplers.LINE), "64-D": samplers.make_probe(samplers.space())}


@pytest.mark.slow
@pytest.mark.parametrize("dimension", ["1-D", "64-D"])
def test_p_values_of_exact_draws_are_uniform(dimension, probes):
    """Of 50 sets of 500, each test has p < 0.1 in at most 12 (chance 0.001)."""
    probe, rng = probes[dimension], np.random.default_rng(0)
    found = [samplers.check_law(mixtures.draw(rng, probe.law, 500), probe) for _ in range(50)]
    few = {name: sum(row[name] < 0.1 for row in found) for name in samplers.TESTS}
    print(few)
    assert max(few.values()) <= 12
    assert few["mmd"] > 0 and few["mean"] > 0


WRONG = {
    "moved": lambda law: law._replace(means=law.means + 0.06),
    "wider": lambda law: law._replace(variances=law.variances * 1.2),
    "other weights": lambda law: law._replace(weights=np.array([0.38, 0.62])),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dimension", ["1-D", "64-D"])
def test_another_law_is_found(dimension, wrong, probes):
    probe = probes[dimension]
    x = mixtures.draw(np.random.default_rng(1), WRONG[wrong](probe.law), samplers.EXAMPLES[dimension])
    found = samplers.check_law(x, probe)
    print({name: f"{found[name]:.1e}" for name in samplers.TESTS})
    assert min(found[name] for name in samplers.TESTS) < samplers.LEVEL


# --- samplers: right ones hold, wrong ones do not ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "ddpm_large"])
def test_a_right_sampler_holds(name, small):
    row = samplers.measure(name)
    assert row["misses"] == []
    assert row["evaluations"] == SAMPLERS[name].evaluations and row["traces"] == 1
    assert row["orders"]["Gaussians"] == pytest.approx(row["theory"], abs=0.1)
    assert row["needed"]["0.01"] > 0 and len(row["orders"]) == 2 - row["random"]


def heun(schedule, weight=0.5, evaluations=2, concrete=False):
    """Heun's method, or not quite."""

    def step(key, x, state, t, s, denoise):
        if concrete:
            float(t)
        d = dj.to_velocity(schedule, denoise(x, t), t)
        y = x + (s - t) * d
        for _ in range(evaluations - 1):
            slope = dj.to_velocity(schedule, denoise(y, s), s)
        return x + (s - t) * ((1 - weight) * d + weight * slope), state

    return memoryless(step)


def ddpm(schedule, noise, factor):
    """Ancestral sampling with a standard deviation that is off by a factor."""

    def step(key, x, state, t, s, denoise):
        mean, variance = dj.q_posterior(schedule, x, denoise(x, t).x0, t, s)
        return mean + factor * jnp.sqrt(variance) * noise(key, x, t, s), state

    return memoryless(step)


def restless(inner):
    """A state that changes its type after the first step."""
    return dj.Sampler(lambda x: (0, inner.init(x)), lambda key, x, state, *rest: grown(inner, key, x, state, *rest))


def grown(inner, key, x, state, *rest):
    x, inside = inner.step(key, x, state[1], *rest)
    return x, (jnp.asarray(state[0] + 1, jnp.int32), inside)


def private(schedule):
    """Noise that does not come from the argument: of the right law, but not to be measured without drawing."""
    return lambda p, noise: dj.ddpm(schedule, "small")


VP = PROBLEMS["vp_linear"].schedule
MISSING = {
    "wrong coefficient": (Entry(lambda p, noise: heun(p.schedule, 0.6), 2, 2), "order on"),
    "an evaluation more": (
        Entry(lambda p, noise: heun(p.schedule, evaluations=3), 2, 2),
        "3 evaluations a step, not 2",
    ),
    "wrong variance": (Entry(lambda p, noise: ddpm(p.schedule, noise, 1.1), 1, random=True), "order on"),
    "its law": (Entry(lambda p, noise: ddpm(p.schedule, noise, 1.1), None, random=True), "1-D covariance"),
    "noise of its own": (Entry(private(VP), 1, random=True), "order not measurable"),
    "looks at values": (Entry(lambda p, noise: heun(p.schedule, concrete=True), 2, 2), "ConcretizationTypeError"),
    "recompiles": (Entry(lambda p, noise: restless(dj.heun(p.schedule)), 2, 2), "2 compilations"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", MISSING)
def test_a_wrong_sampler_is_reported(wrong, small):
    entry, what = MISSING[wrong]
    row = samplers.measure(wrong, entry)
    print(row["misses"])
    assert any(miss.startswith(what) for miss in row["misses"])
    report.sampler_cells(row)  # whatever is missing, it is a row of the table


def test_without_a_claim_nothing_is_missed(small):
    entry = Entry(lambda p, noise: ddpm(p.schedule, noise, 1.1), None, random=True, law=False)
    assert samplers.measure("biased", entry)["misses"] == []


# --- the page ---------------------------------------------------------------------------------------------------------


def results(misses):
    law = dict.fromkeys(samplers.TESTS, 0.5) | {"mean_error": 0.01, "covariance_error": 0.1, "steps": 10, "n": 5}
    row = {"name": "heun", "problem": "edm", "random": False, "remark": "why", "theory": 2, "claims_law": True}
    row |= {"orders": {"Gaussians": 2.01, "mixture": None}, "evaluations": 2, "needed": {"0.01": 20, "0.001": None}}
    row |= {"curve": [(2, 0.5), (4, 0.1)], "traces": 1, "laws": {"1-D": law, "64-D": law}, "misses": misses}
    broken = {name: row[name] for name in ("problem", "random", "theory", "claims_law")}
    broken |= {"name": "ddpm_small", "remark": "", "misses": misses and ["ValueError: no"]}
    other = {"method": "flow", "schedule": "edm", "error": 1e-6, "ok": True}
    return {"samplers": [row, broken], "floor": {"1-D": law}, "likelihood": [other], "posterior": [other]}


@pytest.mark.slow
@pytest.mark.parametrize("misses", [[], ["order on mixture 1.5, not 2"]])
def test_the_command_writes_a_page_and_says_what_is_missing(misses, tmp_path, monkeypatch, capsys):
    captions = dict.fromkeys(gallery.TITLES, "words")
    paths = {"heun": np.zeros((4, 3, 2)), "ddpm_small": np.ones((4, 3, 2))}
    monkeypatch.setattr(run, "measure_all", lambda folder: (results(misses), paths, captions))
    assert command.conformance(str(tmp_path)) == (1 if misses else 0)
    page = (tmp_path / "README.md").read_text()
    assert page in capsys.readouterr().out
    assert ("**no**: order on mixture 1.5, not 2" in page) == bool(misses)
    assert ("2 of 4 rows miss what they claim: heun, ddpm_small" in page) == bool(misses)
    assert "[1] why." in page and "> 1024 steps" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:5]}) == 1
    numbers = json.loads((tmp_path / "conformance.json").read_text())
    assert numbers["samplers"][0]["orders"] == {"Gaussians": 2.01, "mixture": None}
    for name in ("conformance", "trajectories", "convergence"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
    assert all(f"({name}.png)" in (tmp_path / "gallery.md").read_text() for name in gallery.TITLES)


def test_a_row_that_is_not_ok_fails():
    assert report.missing([], [{"method": "bound", "schedule": "edm", "ok": False}, {"method": "x", "ok": None}]) == [
        "bound edm"
    ]
