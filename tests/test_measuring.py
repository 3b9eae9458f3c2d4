"""Streams of features, sets of pictures, counted evaluations, bits, floors, caches and the table of a sweep."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image

from diffusion_jax.evaluation.features import FeatureNet, known, net, networks, open_features, pixels
from diffusion_jax.evaluation.results import Protocol, Result, difference
from diffusion_jax.evaluation.statistics import Reference, save_reference
from diffusion_jax.measuring import bits, evaluate, metrics, pictures, reals, session, sweep
from diffusion_jax.measuring.evaluations import evaluations
from diffusion_jax.measuring.stream import AHEAD, IMAGES, feature_batches, gather
from diffusion_jax.predictions import from_x0
from diffusion_jax.training.draw import SAMPLERS
from diffusion_jax.training.mesh import make_mesh
from diffusion_jax.typing import InputError


def images(n, shape=(4, 4, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def picture_set(n, seed=0, name="some pictures"):
    arrays = images(n, seed=seed)
    return pictures.of_source({"image": arrays, "label": np.arange(n, dtype=np.int32) % 3}, name)


def lens():
    return reals.Lens(open_features("pixels"), make_mesh(1), batch=16)


# The stream ----------------------------------------------------------------------------------------------------------


def linear(seen):
    """A network that counts how often it is traced, with features that depend on each example alone."""

    def apply(params, x):
        seen.append(x.shape)
        flat = jnp.reshape(x, (len(x), -1)).astype(jnp.float32)
        return {"pooled": flat @ params["w"], "other": flat[:, :2]}

    def prepare(x):
        return np.asarray(x)[:, ::2]  # as a resize: the network sees other pictures than come in

    weights = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)}
    unused = net.Loaded(weights, "")
    return FeatureNet("linear", "none", lambda key: weights, prepare, apply, lambda path: unused), weights


@pytest.mark.parametrize("cuts", [(37,), (16, 16, 5), (1, 35, 1), (7,) * 5 + (2,)])
def test_features_are_those_of_each_picture_however_they_come(cuts):
    x, seen = images(37), []
    made, params = linear(seen)
    parts = np.split(x, np.cumsum(cuts)[:-1])
    names = ("pooled", "other", IMAGES)
    found = list(feature_batches(made, params, iter(parts), make_mesh(1), names=names, batch=16))
    assert [len(batch["pooled"]) for batch in found] == [16, 16, 5]
    assert seen == [(16, 2, 4, 1)]  # one program, the last batch padded
    wanted = jax.jit(made.apply)(params, made.prepare(x))
    for name in ("pooled", "other"):
        np.testing.assert_allclose(np.concatenate([b[name] for b in found]), wanted[name], rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([b[IMAGES] for b in found]), x.reshape(37, -1))


def test_few_pictures_wait_at_a_time():
    made, params = linear([])
    read = 0

    def source():
        nonlocal read
        for _ in range(40):
            read += 1
            yield images(4)

    for i, _ in enumerate(feature_batches(made, params, source(), make_mesh(1), batch=4)):
        assert read - i <= AHEAD + 3  # in line, on the device, and the one at hand


def test_what_the_reader_or_the_network_refuses_comes_out():
    def broken():
        yield images(4)
        raise InputError("a damaged picture")

    made, params = linear([])
    for source, match in (
        (broken(), "a damaged picture"),
        (iter([images(4), images(4, (4, 6, 1))]), r"pictures of \[4, 4, 1\] and of \[4, 6, 1\]"),
        (iter([images(4, (4, 4, 2)).astype(np.float32)]), r"pictures are u8\[b, h, w, c\]"),
    ):
        with pytest.raises(InputError, match=match):
            list(feature_batches(pixels() if "u8" in match else made, params, source, make_mesh(1), batch=8))
    with pytest.raises(InputError, match="linear has no features 'spatial': it gives pooled, other"):
        list(feature_batches(made, params, iter([images(4)]), make_mesh(1), names=("spatial",), batch=4))


def test_moments_are_those_of_all_rows_and_only_what_is_kept_stays():
    x = images(50)
    found = lens().look(iter(np.split(x, [20])), 50, "x", ("pooled", IMAGES), ("pooled",))
    rows = x.reshape(50, -1) / 255
    assert found.n == 50
    assert set(found.moments) == set(found.kept) == {"pooled"}
    np.testing.assert_allclose(found.moments["pooled"].mean, rows.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(found.moments["pooled"].covariance, np.cov(rows.T), atol=1e-7)
    np.testing.assert_allclose(found.kept["pooled"], rows, atol=1e-7)
    with pytest.raises(ValueError, match="no pictures"):
        gather([])


# Feature networks by name --------------------------------------------------------------------------------------------


def test_the_table_says_what_is_missing():
    for name, entry in networks().items():
        if entry.file:
            with pytest.raises(
                InputError, match=f"features={name} needs weights=FILE: .* features=pixels needs no file"
            ):
                open_features(name)
    with pytest.raises(InputError, match=r"sha256 begins with 6726825d"):
        open_features("inception")
    with pytest.raises(InputError, match="features=inceptoin: there are inception"):
        open_features("inceptoin")


def test_grey_pictures_become_colour_and_the_protocol_says_so(monkeypatch):
    made, params = linear([])
    made = made._replace(prepare=net.pictures, load=lambda path: net.Loaded(params, "cd" * 32), published="ab")
    monkeypatch.setattr(known, "networks", lambda: {"mine": known.Known(lambda precision: made, "a file")})
    grey, colour = (open_features("mine", "w.npz", channels) for channels in (1, 3))
    assert (grey.net.resize, colour.net.resize) == ("none, grey three times", "none")
    x = images(2)
    np.testing.assert_array_equal(grey.net.prepare(x), np.repeat(x, 3, axis=3))
    assert "NOT the published file, whose sha256 begins with ab" in grey.said
    with pytest.raises(InputError, match="1 or 3 channels, these have 4"):
        open_features("mine", "w.npz", 4)


# Pictures ------------------------------------------------------------------------------------------------------------


def test_a_folder_and_an_archive_hold_the_same_pictures(tmp_path):
    x = images(5, (6, 4, 3))
    for i, picture in enumerate(x):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "a.npz", images=x, labels=np.arange(5))
    np.savez(tmp_path / "b.npz", arr_0=x)
    sets = [pictures.of_path(path) for path in (tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")]
    for found in sets:
        assert (found.n, found.shape) == (5, (6, 4, 3))
        np.testing.assert_array_equal(np.concatenate(list(pictures.parts(found, np.array([1, 4])))), x[[1, 4]])
    np.testing.assert_array_equal(sets[1].labels, np.arange(5))
    before = sets[0].digest()
    Image.fromarray(255 - x[0]).save(tmp_path / "0.png")
    assert pictures.of_path(tmp_path).digest() != before


def test_pictures_that_are_none_are_refused(tmp_path):
    np.savez(tmp_path / "floats.npz", images=images(2).astype(np.float32))
    np.savez(tmp_path / "other.npz", x=images(2))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    for name, shape in (("0.png", (4, 4)), ("1.png", (4, 5))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "sizes" / name)
    for name, match in (
        ("floats.npz", r"u8\[n, h, w, c\], these are float32"), ("other.npz", "no array `images`"),
        ("damaged.npz", "cannot be read"), ("empty", "no images under"), ("gone", "neither a folder"),
        ("sizes", r"1.png is \[4, 5, 1\] and 0.png \[4, 4, 1\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            list(pictures.parts(pictures.of_path(tmp_path / name)))
    with pytest.raises(InputError, match=r"are not pictures \(float32\[9\]\)"):
        pictures.of_source({"image": np.zeros((3, 9), np.float32)}, "sounds")


def test_some_of_a_set_are_different_and_always_the_same():
    found = picture_set(100)
    index = pictures.some(found, 30)
    assert len(set(index.tolist())) == 30
    np.testing.assert_array_equal(index, pictures.some(found, 30))
    np.testing.assert_array_equal(pictures.some(found, 1000), np.arange(100))


# Evaluations ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "calls"), [("ddim", 6), ("heun", 11), ("dpmpp_2m", 6), ("unipc", 6), ("ddpm", 6)])
def test_evaluations_are_counted_with_guidance(name, calls):
    experiment = toy.experiment()
    sampler = SAMPLERS[name](experiment.schedule)

    def count(**options):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return evaluations(experiment, sampler=sampler, steps=6, **options)

    assert count(guidance=1.0) == calls
    assert count(guidance=2.0) == 2 * calls
    if name == "heun":
        assert count(conditional=False) == calls


# Bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bits_of_a_known_gaussian_are_its_entropy():
    """Pixels N(0, v) in 256 levels under the best denoiser: log2(127.5 sqrt(2 pi e v)), the bound being tight here."""
    v, n = 0.0625, 32
    rng = np.random.default_rng(0)
    x = np.clip(np.round(127.5 * rng.normal(0, math.sqrt(v), (n, 8, 8, 1)) + 127.5), 0, 255).astype(np.uint8)
    experiment = toy.experiment()

    def read(bound):
        def denoiser(x, t, cond=None):
            alpha, sigma = (a[:, None, None, None] for a in experiment.schedule(t))
            return from_x0(experiment.schedule, x, t, alpha * v / (alpha**2 * v + sigma**2) * x)

        return denoiser

    exact = replace(experiment, read=read)
    data = {"image": x, "label": np.zeros(n, np.int32)}
    found = bits.bits(exact, {}, data, np.arange(n), make_mesh(1), cells=128, batch=32)
    entropy = math.log2(127.5 * math.sqrt(2 * math.pi * math.e * v))
    # Of these very pictures: their mean -log2 p, of which the entropy is the expectation.
    z = (x.astype(np.float64) - 127.5) / 127.5
    own = float(np.mean(np.log2(127.5 * math.sqrt(2 * math.pi * v)) + z**2 / (2 * v) * math.log2(math.e)))
    assert abs(own - entropy) < 4 * found.standard_error
    assert found.value == pytest.approx(own, abs=0.03)


# Metrics, floors, caches ---------------------------------------------------------------------------------------------


def test_metrics_say_what_they_are_defined_in():
    for names, network, match in (
        (["fidd"], "inception", "no 'fidd'; did you mean 'fid'"),
        (["cmmd"], "inception", "cmmd is defined in CLIP's features"),
        (["sfid"], "pixels", "sfid is defined in Inception's"),
        (["accuracy"], "pixels", "that of features=fashion_mnist"),
    ):
        with pytest.raises(InputError, match=match):
            metrics.wanted(names, network)
    want = metrics.wanted(["fid", "sfid", "precision", "is"], "inception")
    assert set(want.names) == {"pooled", "spatial", "probabilities"}
    assert set(want.keep) == {"pooled", "probabilities"}
    assert want.real == ("pooled",)
    assert want.told == ("fid", "sfid", "precision", "is")
    assert (metrics.shown("fid", "inception_v3 tensorflow"), metrics.shown("fid", "pixels")) == ("fid", "fd")


def test_real_against_itself_is_the_best_there_is():
    """With the training set in the place of samples: no distance, everything covered, all of it copied."""
    eye, train, test = lens(), picture_set(80), picture_set(60, seed=1)
    want = metrics.wanted(["fd", "precision", "recall", "coverage", "copy", "authenticity", "c2st"], "pixels")
    real, held_out = (reals.measured(eye, s, want.names, want.keep, None) for s in (train, test))
    both = evaluate.Reals(real, held_out, held_out, real, (4, 4, 1))
    found, _ = evaluate.results(want, eye, real.gathered, both, {"sampler": "copies"})
    value = {result.metric: result.value for result in found}
    assert value["fd"] == pytest.approx(0, abs=1e-9)
    assert (value["precision"], value["recall"], value["coverage"]) == (1, 1, 1)
    assert (value["copy"], value["authenticity"]) == (0, 0)
    floor = {result.metric: result for result in evaluate.floors(want, eye, both)[0]}
    assert floor["copy"].value == 1
    assert floor["c2st"].protocol.sampler == "training data"
    assert floor["c2st"].protocol.reference == floor["c2st"].protocol.reference == test.name
    assert floor["c2st"].protocol.n == 60
    assert abs(floor["c2st"].value - 0.5) < 5 * floor["c2st"].standard_error


def test_fewer_samples_than_features_are_warned_of():
    eye, train = lens(), picture_set(80)
    want = metrics.wanted(["fd"], "pixels")
    real = reals.measured(eye, train, want.names, want.keep, None)
    few = eye.look(pictures.parts(train, np.arange(10)), 10, "few", want.names, want.keep)
    found, warned = evaluate.results(want, eye, few, evaluate.Reals(real, None), {})
    assert len(warned) == 1
    assert "10 examples give a singular covariance of 16 features" in warned[0]
    assert "kernel distance" in warned[0]
    assert "warning: 10 examples" in evaluate.page(found, [], warned)


def test_real_examples_are_measured_once(tmp_path):
    eye, train = lens(), picture_set(40)
    first = reals.measured(eye, train, ("pooled",), ("pooled",), tmp_path)

    def never(index):
        raise AssertionError("read again")

    again = reals.measured(eye, train._replace(read=never), ("pooled",), ("pooled",), tmp_path)
    np.testing.assert_array_equal(again.gathered.moments["pooled"].scatter, first.gathered.moments["pooled"].scatter)
    np.testing.assert_array_equal(again.gathered.kept["pooled"], first.gathered.kept["pooled"])
    assert again.digest == first.digest
    with pytest.raises(AssertionError, match="read again"):  # other pictures, other files
        other = picture_set(40, seed=2)._replace(read=never)
        reals.measured(eye, other, ("pooled",), (), tmp_path)


def test_statistics_of_another_network_are_refused(tmp_path):
    eye, train = lens(), picture_set(40)
    real = reals.measured(eye, train, ("pooled",), (), None)
    good = reals.as_reference(eye, train.name, real.digest, real.gathered)
    save_reference(tmp_path / "good.npz", good)
    found = reals.of_reference(eye, str(tmp_path / "good.npz"), ("pooled",), (), None)
    assert (found.name, found.digest, found.n) == (train.name, real.digest, 40)
    save_reference(tmp_path / "bad.npz", Reference(good.moments, None, good.protocol | {"features_hash": "00"}))
    with pytest.raises(InputError, match="was made with features_hash 00, here it is e3b0"):
        reals.of_reference(eye, str(tmp_path / "bad.npz"), ("pooled",), (), None)
    with pytest.raises(InputError, match="compare single examples"):
        reals.of_reference(eye, str(tmp_path / "good.npz"), ("pooled",), ("pooled",), None)
    with pytest.raises(InputError, match="no statistics of the spatial features"):
        reals.of_reference(eye, str(tmp_path / "good.npz"), ("pooled", "spatial"), (), None)


def test_fashion_mnist_has_its_frozen_protocol_by_default():
    usual = {"features": "", "metrics": (), "judge": "default", "n": None, "images": "", "unconditional": False}
    fashion = session.with_defaults(toy.experiment(), "fashion_mnist_10min", usual)
    assert (fashion["features"], fashion["judge"], fashion["n"]) == ("fashion_mnist", "pixels", 10_000)
    assert fashion["metrics"] == ("fid", "kid", "c2st", "copy", "authenticity", "accuracy")
    other = session.with_defaults(toy.experiment(), "digits", usual)
    assert (other["features"], other["metrics"], other["judge"]) == ("inception", ("fid",), "features")
    assert (
        "accuracy"
        not in session.with_defaults(toy.experiment(), "fashion_mnist", usual | {"unconditional": True})["metrics"]
    )


# Results and sweeps --------------------------------------------------------------------------------------------------


def result(metric, value, n=100, evaluations=5, error=math.nan):
    told = {"sampler": "heun in 3 steps", "evaluations": evaluations, "seeds": (0,)}
    return Result(metric, value, error, Protocol("pixels", "ab", "none", "train", "cd", 200, n, **told))


def test_the_same_examples_under_another_name_compare():
    a = result("fd", 2.0)
    b = Result("fd", 1.0, math.nan, replace(a.protocol, reference="another name"))
    assert difference(a, b)[0] == 1
    with pytest.raises(InputError, match="reference: train and another name"):
        difference(a, Result("fd", 1.0, math.nan, replace(b.protocol, reference_hash="ef")))


def test_differences_are_told_or_refused_with_the_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    evaluate.write(path, [result("fd", 9.0), result("fd", 2.0, error=0.3)])
    assert evaluate.compared([result("fd", 1.5, error=0.4)], path).startswith("fd -0.5 +- 0.5 against 2")
    with pytest.raises(InputError, match="n: 50 and 100"):
        evaluate.compared([result("fd", 1.5, n=50)], path)
    with pytest.raises(InputError, match="has no kd: it has fd"):
        evaluate.compared([result("kd", 1.5)], path)
    with pytest.raises(InputError, match="no file of results"):
        evaluate.compared([result("kd", 1.5)], tmp_path / "gone.jsonl")


def rows():
    points = [("heun", 3, 9.0, 0.9), ("heun", 5, 4.0, 0.3), ("ddim", 5, 6.0, 0.5)]
    return [
        sweep.Row(
            {"sampler": s, "steps": k, "guidance": None, "ema": 0.0, "checkpoint": "step=9"},
            (result("fd", d, evaluations=2 * k - 1), result("recall", r)), 1e-3 * k, "1 x cpu",
        )
        for s, k, d, r in points
    ]  # fmt: skip


def test_the_table_shows_the_best_of_each_metric():
    lines = sweep.table(rows(), [result("fd", 0.5)]).splitlines()
    assert lines[0] == "| sampler | steps | guidance | ema | evaluations | ms a sample | fd | recall |"
    assert lines[2] == "| heun | 3 | own | own | 5 | 3 | 9 | **0.9** |"
    assert lines[3] == "| heun | 5 | own | own | 9 | 5 | **4** | 0.3 |"
    assert lines[5] == "| real data |  |  |  |  |  | 0.5 |  |"
    assert "n=100" in lines[-1]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:6])


def test_rows_come_back_and_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "sweep.jsonl"
    for row in rows():
        sweep._append(path, row)
    with path.open("a") as file:
        file.write('{"settings": {"samp')
    for found, row in zip(sweep.read_rows(path).values(), rows(), strict=True):
        assert (found.settings, found.seconds, found.device) == (row.settings, row.seconds, row.device)
        assert [r.json() for r in found.results] == [r.json() for r in row.results]
    path.write_text('{"step": 3}\n')
    with pytest.raises(InputError, match="is not of a sweep"):
        sweep.read_rows(path)
