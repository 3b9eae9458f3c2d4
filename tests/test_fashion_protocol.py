"""The protocol of Fashion-MNIST: its classifier, its two-sample test, its numbers and their floors."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.ndimage import correlate

from diffusion_jax.evaluation import fashion_mnist as protocol
from diffusion_jax.evaluation.distances import frechet_distance
from diffusion_jax.evaluation.features import fashion_mnist as classifier
from diffusion_jax.evaluation.neighbours import authenticity, copy_ratio
from diffusion_jax.evaluation.picture_test import convolutional
from diffusion_jax.evaluation.results import difference
from diffusion_jax.evaluation.two_sample import c2st
from diffusion_jax.typing import InputError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*give a singular covariance:UserWarning")


# The classifier ------------------------------------------------------------------------------------------------------


def slow_features(params, x):
    """Equation (2) of one picture f64[h, w, 1], by SciPy and loops."""
    for i, widths in enumerate(classifier.STAGES):
        if i:
            x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).mean(axis=(1, 3))
        for j in range(len(widths)):
            p = {name: np.asarray(value, float) for name, value in params[f"conv_{i}_{j}"].items()}
            y = np.zeros((*x.shape[:2], widths[j]))
            for out in range(widths[j]):
                for n in range(x.shape[2]):
                    y[..., out] += correlate(x[..., n], p["kernel"][:, :, n, out], mode="constant")
            groups = y.reshape(*y.shape[:2], classifier.GROUPS, -1)
            mean, var = groups.mean(axis=(0, 1, 3), keepdims=True), groups.var(axis=(0, 1, 3), keepdims=True)
            y = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(y.shape) * p["scale"] + p["bias"]
            x = y / (1 + np.exp(-y))
    y = x.reshape(-1) @ np.asarray(params["dense"]["kernel"], float) + np.asarray(params["dense"]["bias"], float)
    return y / (1 + np.exp(-y))


@pytest.fixture(scope="module")
def params():
    made = jax.jit(classifier.init)(jax.random.key(3))
    made["dense"]["kernel"] += 0.01 * jax.random.normal(jax.random.key(5), made["dense"]["kernel"].shape)
    made["linear"]["kernel"] = jax.random.normal(jax.random.key(4), (128, 10))
    return made


@pytest.fixture(scope="module")
def blobs():
    """Pictures of ten kinds, u8[360, 28, 28, 1], and their kinds: a bright square whose place and shade vary."""
    rng, labels = np.random.default_rng(0), np.arange(360) % 10
    images = rng.integers(0, 30, (360, 28, 28, 1))
    for image, label in zip(images, labels, strict=True):
        top, left = 4 * (label // 4) + rng.integers(0, 8, 2)[0], 5 * (label % 4) + rng.integers(0, 5)
        image[top : top + 8, left : left + 8] += rng.integers(80, 220)
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def real(params, blobs):
    images, labels = blobs
    train, test = slice(0, 240), slice(240, 300)
    return protocol.real(
        {"image": images[train], "label": labels[train]}, {"image": images[test], "label": labels[test]}, params
    )


@pytest.mark.slow
def test_features_are_those_of_an_implementation_by_loops(params, blobs):
    image = blobs[0][7]
    seen = protocol.look(image[None], None, params)
    expected = slow_features(params, image / 127.5 - 1)
    np.testing.assert_allclose(seen.features[0], expected, rtol=1e-3, atol=1e-4)
    assert seen.looks[0] == np.argmax(expected @ np.asarray(params["linear"]["kernel"], float))


@pytest.mark.slow
def test_weights_are_taken_from_the_file_that_ships_only(tmp_path, params):
    from diffusion_jax.weights import trees

    other = tmp_path / "other.npz"
    arrays: dict[str, Any] = {".".join(path): np.asarray(value) for path, value in trees.leaves(params)}
    np.savez(other, **arrays)
    with pytest.raises(InputError, match=r"is not the frozen classifier.*sha256"):
        classifier.fashion_mnist().load(other)
    arrays = {"conv_0_0.kernel": np.zeros(3)}
    np.savez(other, **arrays)
    with pytest.raises(InputError, match="does not hold the frozen classifier"):
        classifier.load(other)
    other.write_bytes(classifier.WEIGHTS.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        classifier.load(other)
    assert classifier.load().sha256 == classifier.SHA256


def test_a_wheel_holds_the_weights(monkeypatch):
    from setuptools import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    assert any(Path(pattern).name == "*.npz" for pattern in distribution.package_data["diffusion_jax"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}
    files = command.find_data_files("diffusion_jax", "diffusion_jax")
    assert classifier.WEIGHTS.resolve() in [Path(file).resolve() for file in files]


@pytest.mark.slow
def test_the_classifier_knows_real_test_pictures():
    from diffusion_jax.training import sources

    try:
        data = sources.tfds_images("fashion_mnist")
    except (InputError, OSError) as error:
        pytest.skip(f"Fashion-MNIST is not here: {error}")
    test: Any = data.test
    seen = protocol.look(test["image"], test["label"])
    assert np.mean(seen.looks == seen.labels) >= 0.93


# The two-sample test -------------------------------------------------------------------------------------------------


def stripes(rng, n):
    """Pictures of stripes, up or down and light or dark, f64[n, 64] around 128; their pixels are 98 and 158."""
    up = np.where(np.arange(8) % 2 == 0, 1.0, -1.0)
    either = np.stack([np.tile(up[:, None], (1, 8)), np.tile(up[None], (8, 1))])
    sign = rng.choice([-1.0, 1.0], n)
    return 128 + 30 * (sign[:, None, None] * either[rng.integers(0, 2, n)]).reshape(n, 64)


@pytest.mark.slow
def test_the_judge_tells_what_has_the_same_two_moments():
    # A Gaussian with the moments of stripes: every distance of two moments is 0 for it.
    rng = np.random.default_rng(0)
    x, judge = stripes(rng, 400), convolutional((8, 8, 1), least=60)
    gaussian = rng.multivariate_normal(np.full(64, 128.0), np.cov(stripes(rng, 4000).T), 400, method="eigh")
    assert c2st(x, gaussian, fit=judge, folds=2).value > 0.95


@pytest.mark.slow
def test_the_judge_is_at_chance_between_equal_laws():
    rng = np.random.default_rng(1)
    noise = [np.clip(rng.normal(128, 40, (300, 64)), 0, 255) for _ in range(2)]
    found = c2st(*noise, fit=convolutional((8, 8, 1), least=60), folds=2)
    assert abs(found.value - 0.5) < 4 * found.standard_error


@pytest.mark.slow
def test_the_judge_is_the_same_each_time_and_another_with_another_seed():
    rng = np.random.default_rng(2)
    x, which = np.clip(rng.normal(128, 40, (60, 64)), 0, 255), np.repeat([0, 1], 30)
    fit = convolutional((8, 8, 1), least=8, passes=1)
    first, again, other = (fit(x, which, seed)(x) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# The numbers ---------------------------------------------------------------------------------------------------------


def values(found):
    return {result.metric: result.value for result in found}


@pytest.mark.slow
def test_numbers_are_those_of_the_plain_functions(params, blobs, real):
    images, labels = blobs[0][300:], blobs[1][300:]
    found = values(protocol.measure(images, labels, real, params=params))
    assert tuple(found) == protocol.METRICS
    x, y = protocol.look(images, None, params).features.astype(float), real.train.features.astype(float)
    distance = frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert found["fd"] == pytest.approx(distance, rel=1e-6)
    assert found["copy"] == pytest.approx(copy_ratio(y, real.test.features, x))
    assert found["authenticity"] == pytest.approx(authenticity(y, x))


@pytest.mark.slow
def test_copies_are_found_and_held_out_pictures_are_none(params, real):
    copies = protocol.measure(real.train.images[:60], None, real, params=params)
    assert values(copies)["copy"] < 1e-3
    assert values(copies)["authenticity"] == 0
    assert "accuracy" not in values(copies)
    held_out = values(protocol.measure(real.test.images, real.test.labels, real, params=params))
    assert held_out["copy"] == pytest.approx(1)
    floor = values(protocol.floors(60, real))
    for metric in ("fd", "copy", "authenticity", "accuracy"):
        assert floor[metric] == pytest.approx(held_out[metric]), metric
    assert held_out["accuracy"] == np.mean(real.test.looks == real.test.labels)


@pytest.mark.slow
def test_results_say_their_protocol_and_numbers_of_another_n_are_not_compared(params, real):
    told = {"sampler": "heun in 18 steps", "evaluations": 35, "seeds": (4,)}
    whole, part = (protocol.measure(real.test.images[:n], None, real, params=params, **told) for n in (60, 40))
    for result in whole:
        p = asdict(result.protocol)
        assert {key: p[key] for key in told} == told
        assert p["n"] == 60
        judged = result.metric == "c2st"
        assert p["features_hash"] == ("" if judged else classifier.SHA256)
        assert p["reference_n"] == (60 if judged else 240)
    assert difference(whole[0], whole[0])[0] == 0
    with pytest.raises(InputError, match="n: 60 and 40"):
        difference(whole[0], part[0])
    shown = protocol.table(whole, protocol.floors(60, real, labels=False))
    assert shown.count("floor") == 5
    assert "evaluations=35" in shown


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (np.zeros((20, 28, 28, 1), np.float32), None, "u8"),
        (np.zeros((20, 28, 28, 3), np.uint8), None, "u8"),
        (np.zeros((0, 28, 28, 1), np.uint8), None, "no pictures"),
        (np.zeros((9, 28, 28, 1), np.uint8), None, "at least 10"),
        (np.zeros((20, 28, 28, 1), np.uint8), np.zeros(19, int), r"labels are i\[20\]"),
        (np.zeros((20, 28, 28, 1), np.uint8), np.full(20, 10), "0 to 9"),
        (np.zeros((20, 28, 28, 1), np.uint8), np.zeros(20), "labels are i"),
    ],
)
def test_bad_input_is_one_clear_error(images, labels, said, real, params):
    with pytest.raises(InputError, match=said):
        protocol.measure(images, labels, real, params=params)


def test_real_pictures_are_kept_in_a_file(tmp_path, real, monkeypatch):
    path = tmp_path / "real.npz"
    protocol.write_real(path, real)
    again = protocol.read_real(path)
    jax.tree.map(np.testing.assert_array_equal, real, again)
    monkeypatch.setattr(classifier, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="another classifier"):
        protocol.read_real(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not hold real pictures"):
        protocol.read_real(path)


def test_the_nearest_training_picture_of_a_copy_is_its_original(real):
    noisy = np.clip(real.train.images[5:9].astype(int) + 1, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(protocol.nearest_training(noisy, real), real.train.images[5:9])
