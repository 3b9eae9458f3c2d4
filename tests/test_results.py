"""Two-sample tests, results with their protocols, and statistics files."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
from scipy.stats import norm

from diffusion_jax.evaluation.moments import moments
from diffusion_jax.evaluation.results import Protocol, Result, difference, over_seeds, read_result, sha256
from diffusion_jax.evaluation.statistics import Reference, load_reference, save_reference
from diffusion_jax.evaluation.two_sample import c2st
from diffusion_jax.typing import InputError

PROTOCOL = Protocol("net", "ab" * 32, "none", "train", "cd" * 32, 100, 50, "heun", 35, 1.0, "0.9999", (0,))
RESULT = Result("fid", 2.0, 0.3, PROTOCOL)


def linear(x, which, seed):
    """The best classifier of two Gaussians of equal covariance I: the side of the plane between their means."""
    means = [x[which == i].mean(axis=0) for i in (0, 1)]
    return lambda z: ((z - (means[0] + means[1]) / 2) @ (means[1] - means[0]) > 0).astype(int)


@pytest.mark.parametrize("shift", [0.0, 0.25, 1.0])
def test_c2st_has_the_power_of_the_best_classifier(shift):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 4000, 2))
    found = c2st(x, y + np.array([shift, 0]), fit=linear)
    assert found.value == pytest.approx(norm.cdf(shift / 2), abs=4 * found.standard_error)
    assert found.standard_error == pytest.approx(math.sqrt(found.value * (1 - found.value) / 8000))


def test_the_default_classifier_sees_a_small_shift_and_not_what_is_not_there():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 1500, 4))
    same, moved = c2st(x, y), c2st(x, y + np.array([0.5, 0, 0, 0]))
    assert abs(same.value - 0.5) < 4 * same.standard_error
    assert moved.value == pytest.approx(norm.cdf(0.25), abs=0.03)
    scaled = c2st(x, 1.5 * y)  # equal means: nothing for a plane to see
    assert scaled.value > 0.6


def test_c2st_judges_each_example_once_and_never_one_it_has_seen():
    rng, seen = np.random.default_rng(0), []

    def spy(x, which, seed):
        def predict(rows):
            seen.extend(rows[:, 0])
            assert not set(rows[:, 0]) & set(x[:, 0])
            return np.zeros(len(rows), int)

        return predict

    x, y = rng.standard_normal((30, 2)), rng.standard_normal((20, 2))
    assert c2st(x, y, fit=spy, folds=4).value == 0.5
    assert len(seen) == len(set(seen)) == 40
    with pytest.raises(ValueError, match="20 examples of each kind in 21 folds"):
        c2st(x, y, folds=21)


def test_a_result_goes_through_json():
    assert read_result(RESULT.json()) == RESULT
    without = dataclasses.replace(RESULT, standard_error=math.nan)
    assert math.isnan(read_result(without.json()).standard_error)
    assert "+-" in RESULT.line()
    assert "+-" not in without.line()
    for text in ("", "[]", "{}", '{"metric": "fid"}', RESULT.json().replace("resize", "size")):
        with pytest.raises(InputError, match="not a result"):
            read_result(text)


@pytest.mark.parametrize("field", ["features", "features_hash", "resize", "reference_hash", "reference_n", "n"])
def test_results_of_different_protocols_are_not_compared(field):
    value = getattr(PROTOCOL, field)
    other = dataclasses.replace(PROTOCOL, **{field: value + 1 if isinstance(value, int) else value + "x"})
    with pytest.raises(InputError, match=f"differ in {field}: "):
        difference(RESULT, dataclasses.replace(RESULT, protocol=other))


def test_the_name_of_a_reference_counts_where_its_hash_is_not_known():
    named = [dataclasses.replace(PROTOCOL, reference=name) for name in ("a", "b")]
    assert difference(*(dataclasses.replace(RESULT, protocol=p) for p in named))[0] == 0
    unknown = [dataclasses.replace(p, reference_hash="") for p in named]
    with pytest.raises(InputError, match="differ in reference: a and b"):
        difference(*(dataclasses.replace(RESULT, protocol=p) for p in unknown))


def test_differences_and_means_carry_their_errors():
    other = Result("fid", 1.0, 0.4, dataclasses.replace(PROTOCOL, sampler="ddim", evaluations=50, seeds=(3,)))
    assert difference(RESULT, other) == (1.0, pytest.approx(0.5))
    with pytest.raises(InputError, match="metric: fid and kid"):
        difference(RESULT, dataclasses.replace(RESULT, metric="kid"))
    again = dataclasses.replace(RESULT, value=4.0, protocol=dataclasses.replace(PROTOCOL, seeds=(1,)))
    mean = over_seeds([RESULT, again])
    assert (mean.value, mean.standard_error, mean.protocol.seeds) == (3.0, pytest.approx(1.0), (0, 1))
    with pytest.raises(InputError, match="differ in sampler, evaluations"):
        over_seeds([RESULT, other])


def test_hashes_know_every_bit(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros(0)}
    changed = [arrays | {"a": arrays["a"].reshape(3, 2)}, arrays | {"a": arrays["a"].astype("f4")}, {"c": arrays["a"]}]
    assert sha256(dict(reversed(arrays.items()))) == sha256(arrays)
    assert len({sha256(a) for a in [arrays, *changed]}) == 4
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_statistics_files(tmp_path):
    rows = np.random.default_rng(0).standard_normal((100, 3))
    whole = moments([rows])
    for spatial in (None, moments([rows[:, :2]])):
        reference = Reference(whole, spatial, {"features": "net", "reference": "train"})
        save_reference(tmp_path / "ours.npz", reference)
        back = load_reference(tmp_path / "ours.npz")
        assert back.protocol == reference.protocol
        assert back.moments.n == 100
        np.testing.assert_array_equal(back.moments.scatter, whole.scatter)
        assert (back.spatial is None) == (spatial is None)
    mu, sigma = rows.mean(axis=0), np.cov(rows.T)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=rows)
    for name in ("fid.npz", "adm.npz"):
        back = load_reference(tmp_path / name)
        np.testing.assert_allclose(back.moments.covariance, sigma, rtol=1e-12)
        assert (back.spatial is not None) == (name == "adm.npz")


def test_bad_statistics_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code was run')",))

    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(Evil()))
    np.savez(tmp_path / "evil.npz", mu=np.array([Evil()], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:40])
    for name, message in [
        ("edm2.pkl", "a pickle can run code"),
        ("evil.npz", "cannot be read"),
        ("other.npz", "holds images: not statistics"),
        ("shapes.npz", "a mean of shape"),
        ("nan.npz", "not finite"),
        ("cut.npz", "cannot be read"),
        ("none.npz", "no statistics file"),
    ]:
        with pytest.raises(InputError, match=message):
            load_reference(tmp_path / name)
