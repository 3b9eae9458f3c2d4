"""Extrapolation after training: identities, and that it mends a sampler's error in Gaussians that are known exactly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_jax as dj
from diffusion_jax.evaluation.distances import frechet_distance
from diffusion_jax.experiment import find_experiment
from diffusion_jax.training.extrapolate import best_weight, extra_compute, extrapolate, extrapolate_run
from diffusion_jax.typing import InputError

EDM, DATA = dj.edm(), 1.0


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"a": {"kernel": np.float32(rng.normal(size=(3, 2)))}, "b": np.float32(rng.normal(size=4))}


def test_no_way_is_the_identity_and_one_back_is_what_was_trained():
    base, other = tree(0), tree(1)
    jax.tree.map(np.testing.assert_array_equal, extrapolate(base, other, 0.0), base)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), extrapolate(base, other, -1.0), other)
    twice = jax.tree.map(lambda b, o: 3 * b - 2 * o, base, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), extrapolate(base, other, 2.0), twice)


def test_what_cannot_be_extrapolated_is_refused():
    with pytest.raises(InputError, match=r"another network: a\.kernel"):
        extrapolate(tree(0), {"a": {"kernel": np.zeros((2, 2), np.float32)}, "b": tree(0)["b"]}, 1.0)
    with pytest.raises(InputError, match="w=nan"):
        extrapolate(tree(0), tree(1), float("nan"))
    for weights, distances in (([0, 1], [1, 2]), ([0, 1, 1], [1, 2, 3]), ([0, 1, 2], [1, np.nan, 3])):
        with pytest.raises(InputError, match="three or more"):
            best_weight(weights, distances)
    with pytest.raises(InputError, match="began with another"):
        list(extrapolate_run(replace(find_toy(), start=None), None, [1.0], None, lambda e: 1))


def find_toy():
    import toy

    return toy.experiment()


# A Gaussian model whose one parameter is its variance, and a sampler of few steps ------------------------------------


def drawn_variance(params, sampler, steps=6):
    """The variance of what a sampler draws from the model N(0, v): it is linear in the noise it begins with."""
    v = jnp.float32(params["v"])

    def denoiser(x, t, cond=None):
        return dj.from_x0(EDM, x, t, dj.bcast(v / (v + t**2), x) * x)

    times = dj.karras(steps)
    slope = dj.sample(jax.random.key(0), sampler, denoiser, jnp.ones((1, 1)), times)[0, 0]
    return float((slope * times[0]) ** 2)


def self_trained(v, drawn, rate):
    """The model after some training on samples of the variance `drawn`."""
    return {"v": np.float32(v + rate * (drawn - v))}


def distance(params, sampler):
    return frechet_distance(np.zeros(1), [[drawn_variance(params, sampler)]], np.zeros(1), [[DATA]])


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_going_away_from_ones_own_samples_mends_the_sampler(sampler, rate):
    """The distance is least on the side that equation (2) says, near its w, and there is almost nothing left of it."""
    sampler = getattr(dj, sampler)(EDM)
    base = {"v": np.float32(DATA)}
    k = drawn_variance(base, sampler) / DATA
    assert abs(k - 1) > 1e-3
    other = self_trained(DATA, k * DATA, rate)
    weights = np.linspace(-1, 3, 41) / (k * rate)
    distances = [distance(extrapolate(base, other, w), sampler) for w in weights]
    first, best = distance(base, sampler), best_weight(list(weights), distances)
    print(f"k = {k:.3f}: {first:.2e} -> {min(distances):.2e} at w = {best:.2f}, predicted {1 / (k * rate):.2f}")
    assert min(distances) < 0.05 * first
    assert 0.5 < best * k * rate < 2
    assert distance(other, sampler) > first  # training on them further is what makes it worse


@pytest.mark.slow
def test_it_helps_in_the_mean_over_finite_samples():
    """A model fitted to 500 examples, then to 500 of its own: less distance by more than four standard errors."""
    sampler, rng, gains = dj.euler(EDM), np.random.default_rng(0), []
    k = drawn_variance({"v": np.float32(DATA)}, sampler)
    for _ in range(40):
        base = {"v": np.float32(rng.normal(size=500).var())}
        samples = rng.normal(size=500) * np.sqrt(drawn_variance(base, sampler))
        better = extrapolate(base, self_trained(base["v"], samples.var(), 0.5), 1 / (0.5 * k))
        gains.append(distance(base, sampler) - distance(better, sampler))
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    print(f"{np.mean(gains):.2e} +- {error:.1e}")
    assert np.mean(gains) > 4 * error


def test_the_best_weight_is_the_parabolas():
    w = [0.0, 0.5, 1.5, 3.0]
    assert best_weight(w[::-1], [2 + 3 * (x - 1.2) ** 2 for x in w[::-1]]) == pytest.approx(1.2)
    assert best_weight(w, [x for x in w]) == 0.0
    assert best_weight(w, [-x for x in w]) == 3.0


def test_the_experiments_own_size_is_below_two_percent():
    made, first = find("fashion_mnist_neon"), find("fashion_mnist_10min")
    share = extra_compute(6000, 35, made.batch * made.steps, first.batch * first.steps)
    assert share < 0.02


def find(name):
    return find_experiment(f"experiments/{name}.py")()


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(__file__.rsplit("/", 2)[0])


@pytest.mark.parametrize("arguments", [{}, {"teacher": "here"}, {"teacher": "here", "samples": "nowhere.npz"}])
def test_samples_that_are_not_there_are_one_clear_error(arguments, tmp_path):
    from diffusion_jax.training.records import write_record

    write_record(tmp_path / "experiment.json", {"experiment": "fashion_mnist", "arguments": {"width": 8}})
    given = {name: str(tmp_path) if value == "here" else value for name, value in arguments.items()}
    with pytest.raises(InputError, match=r"samples="):
        find_experiment("fashion_mnist_neon")(**given).data()
