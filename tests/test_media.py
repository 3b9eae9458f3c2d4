"""Pictures, video, sound and series as files: what is in them when they are read again, and runs of each kind."""

import wave
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy.io import wavfile
from toy import lenient

from diffusion_jax import Net, cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.experiment import Experiment
from diffusion_jax.nets import mlp, unet
from diffusion_jax.training import ema, media
from diffusion_jax.training.data import Data, to_uint8
from diffusion_jax.training.draw import draw_to_folder
from diffusion_jax.training.generate import example_keys, make_draw
from diffusion_jax.training.loop import fit
from diffusion_jax.training.media import Look
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import InputError

SOUND, VIDEO, SERIES = Look("sound", 4000.0), Look("video", 8.0), Look("series", 1.0)
RNG = np.random.default_rng(0)


def made(shape, decode=to_uint8, sample_rate=None):
    return SimpleNamespace(shape=shape, decode=decode, sample_rate=sample_rate, frame_rate=12.0)


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        (made((8, 8, 1)), Look("picture", 1.0)),
        (made((8, 8, 4)), Look("picture", 1.0)),
        (made((4, 8, 8, 3)), Look("video", 12.0)),
        (made((100, 2), lambda x: x, 8000), Look("sound", 8000)),
        (made((100, 2), lambda x: x), Look("series", 1.0)),
        (made((8, 8, 2)), Look("array", 1.0)),
        (made((2,), lambda x: x), Look("array", 1.0)),
        (made((8, 8, 1), lambda x: x), Look("array", 1.0)),
        (made((4, 4, 4), lambda z: to_uint8(jnp.zeros((len(z), 32, 32, 3)))), Look("picture", 1.0)),
    ],
)
def test_the_kind_is_that_of_the_decoded_example(experiment, expected):
    assert media.look(experiment) == expected


@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_is_heard_again(tmp_path, channels):
    sound = RNG.uniform(-1.2, 1.2, (500, channels)).astype(np.float32)
    media.save_example(tmp_path / "a.wav", sound, SOUND)
    rate, samples = wavfile.read(tmp_path / "a.wav")
    assert rate == 4000 and samples.dtype == np.int16
    np.testing.assert_allclose(samples.reshape(500, channels) / 32767, np.clip(sound, -1, 1), atol=0.51 / 32767)
    assert [p.name for p in tmp_path.iterdir()] == ["a.wav"]


def test_a_sheet_of_sounds_has_all_of_them_one_after_another(tmp_path):
    sounds = RNG.uniform(-1, 1, (3, 200, 1)).astype(np.float32)
    assert media.save_sheet(tmp_path / "s.png", sounds, 2, SOUND) == ["s.png", "s.wav"]
    with wave.open(str(tmp_path / "s.wav")) as file:
        assert file.getnframes() == 3 * (200 + round(4000 * media.PAUSE))
        samples = np.frombuffer(file.readframes(10**6), "<i2").reshape(3, -1)
    np.testing.assert_array_equal(samples[:, :200], np.round(sounds[..., 0] * 32767))
    assert not np.any(samples[:, 200:])


def frames_of(path):
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            yield np.asarray(image.convert("L")), image.info["duration"]


def test_a_video_is_seen_again(tmp_path):
    video = RNG.integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    media.save_example(tmp_path / "v.gif", video, VIDEO)
    frames = list(frames_of(tmp_path / "v.gif"))
    assert len(frames) == 5 and {d for _, d in frames} == {120}  # GIF counts in hundredths of a second
    for frame, (seen, _) in zip(video, frames, strict=True):
        scale = (len(seen) - 2 * 16) // 8
        np.testing.assert_array_equal(seen[scale:-scale:scale, scale:-scale:scale][:8, :8], frame[..., 0])


def test_a_film_strip_is_a_row_of_frames():
    videos = RNG.integers(0, 256, (3, 40, 8, 8, 1), dtype=np.uint8)
    strip = media.film_strips(videos)
    columns, scale = media.STRIP, round(640 / (media.STRIP * 8))
    assert strip.shape[1] == columns * (8 * scale + scale) + scale
    chosen = np.round(np.linspace(0, 39, columns)).astype(int)
    for i, j in ((0, 0), (1, 3), (2, columns - 1)):
        y, x = (scale + k * 9 * scale for k in (i, j))
        np.testing.assert_array_equal(strip[y : y + 8 * scale : scale, x : x + 8 * scale : scale], videos[i, chosen[j]])


def test_a_sheet_of_videos_moves(tmp_path):
    videos = RNG.integers(0, 256, (4, 3, 8, 8, 3), dtype=np.uint8)
    assert media.save_sheet(tmp_path / "v.png", videos, 2, VIDEO) == ["v.png", "v.gif"]
    with Image.open(tmp_path / "v.gif") as image:
        assert image.n_frames == 3


def test_spectrogram_of_a_rising_tone():
    """The loudest frequency of each window is that of the tone there."""
    t = np.arange(4000) / 4000
    level = media.spectrogram(np.sin(2 * np.pi * (200 * t + 400 * t**2)))
    n, f = level.shape
    loudest = np.argmax(level, axis=1) * 2000 / (f - 1)
    middle = slice(n // 8, -n // 8)
    np.testing.assert_allclose(loudest[middle], (200 + 800 * np.linspace(0, 1, n))[middle], atol=20)
    assert np.max(level) == pytest.approx(0)


def test_curves_are_drawn_on_equal_axes():
    """Frames of a film with the same data are the same picture; with other data only the curves change."""
    frames = RNG.normal(size=(3, 2, 50, 1)).astype(np.float32)
    frames[1] = frames[0]
    first, same, last = media.film_of_curves(frames, 2, SERIES)
    assert first.dtype == np.uint8 and first.shape == last.shape and first.shape[2] == 3
    np.testing.assert_array_equal(first, same)
    assert np.any(first != last)
    assert np.any(media.plots(frames[0], 2, SERIES) != media.plots(frames[2], 2, SERIES))


def test_noise_is_tamed_and_examples_are_not():
    path = jnp.stack([100.0 * jax.random.normal(jax.random.key(0), (4, 9)), jnp.full((4, 9), 0.1), jnp.eye(4, 9)])
    tamed = np.asarray(media.tamed(path))
    assert tamed[0].std() == pytest.approx(float(jnp.std(path[-1])), rel=1e-4)
    np.testing.assert_allclose(tamed[0] / tamed[0, 0, 0], path[0] / path[0, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(tamed[1:], path[1:], rtol=1e-6)


def test_a_film_has_the_first_and_the_last_step():
    path = jnp.linspace(0, 1, 101)[:, None, None] * jnp.ones((101, 2, 3))
    frames = np.asarray(media.film_program(lambda p, k, y: path, lambda x: x)(None, None, None))
    assert frames.shape == (40, 2, 3)
    np.testing.assert_array_equal(frames[[0, -1]], path[jnp.array([0, -1])])
    assert media.film_program(lambda p, k, y: path[:5], lambda x: x)(None, None, None).shape == (5, 2, 3)


# Runs of each kind ---------------------------------------------------------------------------------------------------

SHAPES = {"sound": (32, 1), "series": (32, 2), "video": (3, 4, 4, 1), "array": (6,)}


def flat_net(shape):
    """`mlp` on flattened examples."""
    inner = mlp(int(np.prod(shape)), width=8, blocks=1, classes=2)

    def apply(params, x, t, cond=None, *, key=None):
        return inner.apply(params, x.reshape(len(x), -1), t, cond, key=key).reshape(x.shape)

    return Net(inner.init, apply)


def experiment(kind, **changes):
    shape, schedule = SHAPES[kind], cosine()
    examples = np.random.default_rng(0).uniform(-1, 1, (20, *shape)).astype(np.float32)
    images = np.asarray(to_uint8(jnp.asarray(examples))) if kind == "video" else examples
    data = Data({"image": images, "label": np.arange(20, dtype=np.int32) % 2}, None, ("a", "b"), shape)
    return Experiment(
        **{
            "data": lambda: data, "shape": shape, "net": flat_net(shape), "schedule": schedule,
            "read": lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
            "objective": make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
            "optimizer": lenient(optax.adam(1e-3)), "ema": ema.warmup(0.99), "sampler": dpmpp_2m(schedule),
            "times": uniform, "sample_steps": 2, "steps": 2, "batch": 4, "null": 2, "drop": 0.1,
            "decode": to_uint8 if kind == "video" else lambda x: x, "sample_rate": 800 if kind == "sound" else None,
            "sample_every": 1, "checkpoint_every": 0,
        } | changes
    )  # fmt: skip


def options(**changes):
    return {
        "n": 5, "seed": 0, "sampler": "default", "steps": None, "guidance": None, "label": None, "format": "png",
        "checkpoint": "newest", "ema": None, "out": "", "devices": None,
    } | changes  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "beside", "one"),
    [("sound", ".wav", "000004.wav"), ("video", ".gif", "000004.gif"), ("array", "", "")],
)
def test_a_run_of_each_kind(tmp_path, kind, beside, one):
    seen = {}

    def evaluate(draw):
        seen["drawn"] = draw(np.arange(5) % 2, 0)
        return {"mean": float(np.mean(seen["drawn"]))}

    trained = experiment(kind, evaluate=evaluate)
    result = fit(trained, tmp_path, {})
    assert seen["drawn"].shape == (5, *SHAPES[kind]) and np.isfinite(result["mean"])
    made = {p.name for p in tmp_path.iterdir() if p.is_file()}
    pictures = set() if kind == "array" else {"samples.png", f"samples{beside}", "denoising.gif"}
    assert made == {"metrics.jsonl", "experiment.json"} | pictures
    said = draw_to_folder(trained, tmp_path, options(format="npz", out=str(tmp_path / "npz")))
    kept = np.load(tmp_path / "npz" / "images.npz")
    assert kept["images"].shape == (5, *SHAPES[kind]) and kept["labels"].tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_allclose(np.float64(kept["images"]), seen["drawn"], atol=1e-5)
    assert said.startswith(f"5 {media.NOUN[kind]} in ") and said.endswith("images.npz")
    if kind == "array":
        with pytest.raises(InputError, match="format=npz"):
            draw_to_folder(trained, tmp_path, options())
        return
    said = draw_to_folder(trained, tmp_path, options(out=str(tmp_path / "each")))
    assert {p.name for p in (tmp_path / "each").iterdir()} >= {"grid.png", f"grid{beside}", one}
    assert "000000" + beside in said


@pytest.mark.slow
def test_a_condition_of_several_kinds(tmp_path):
    """Such a run draws without a condition; whoever asks gives one for each example."""
    net = unet((8, 2), channels=8, multipliers=(1,), blocks=1, attention=(), classes=2, vector=3)
    null = {"label": 2, "vector": 0.0, "vector_mask": False}
    several = experiment("series", shape=(8, 2), net=net, null=null, guidance=2.0)
    params, keys = net.init(jax.random.key(0)), example_keys(0, 0, 2)
    params = jax.tree.map(lambda p: p + 0.1, params)
    cond = {"label": jnp.array([0, 1]), "vector": jnp.ones((2, 3)), "vector_mask": jnp.ones(2, bool)}
    draw = jax.jit(make_draw(several))
    free, none = draw(params, keys, None), draw(params, keys, jax.tree.map(jnp.full_like, cond, null))
    np.testing.assert_allclose(free, none, atol=1e-4)
    assert np.max(np.abs(draw(params, keys, cond) - free)) > 1e-3
    with pytest.raises(InputError, match="has no classes"):
        draw_to_folder(several, tmp_path, options(label=1))


def test_data_of_another_shape_is_told(tmp_path):
    with pytest.raises(InputError, match=r"examples of shape \(32, 1\), the experiment wants \(16, 1\)"):
        fit(experiment("sound", shape=(16, 1)), tmp_path, {})


def test_rates_are_at_least_one():
    with pytest.raises(InputError, match="frame_rate=0"):
        experiment("video", frame_rate=0)
