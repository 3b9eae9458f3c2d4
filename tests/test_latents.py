"""Latents on disk: what is written, what is drawn from it, and that a killed run goes on."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training import latents as module
from diffusion_jax.training.data import Data, batch_indices, feed
from diffusion_jax.training.latents import (
    Encoding,
    draw_from_moments,
    encode_to_store,
    false_colours,
    latents,
    read_header,
    weights_digest,
)
from diffusion_jax.typing import InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (26, 4, 6, 3), np.uint8)
LABELS = (np.arange(26) % 3).astype(np.int32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.ones((2,))}


def encode(params, x):
    """A linear encoder of f = 2: latents of two channels, log variances that differ by pixel."""
    z = jnp.einsum("bhwc,cd->bhwd", x[:, ::2, ::2], params["w"])
    return z, 0.5 * z - params["b"][None, None, None, :]


def pictures():
    train = {"image": IMAGES[:20], "label": LABELS[:20]}
    return Data(train, {"image": IMAGES[20:], "label": LABELS[20:]}, ("a", "b", "c"), (4, 6, 3))


def encoding(out, **options):
    small = {"batch": 4, "shard": 8, "scale": 0.5, "params": PARAMS}
    return Encoding(**{"data": pictures, "source": "random pictures", "encode": encode, "out": out} | small | options)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "store"
    encode_to_store(encoding(out))
    return out


def expected(images):
    mean, logvar = encode(PARAMS, (2.0 * jnp.asarray(images, jnp.float32) - 255.0) / 255.0)
    return np.concatenate([mean, logvar], -1)


def test_moments_of_every_picture_and_its_mirror_image(store):
    data = latents(store)
    assert data.shape == (2, 3, 2)
    assert data.classes == ("a", "b", "c")
    for split, rows in ((data.train, slice(0, 20)), (data.test, slice(20, 26))):
        np.testing.assert_array_equal(split["label"], LABELS[rows])
        assert split["image"].dtype == np.float16
        np.testing.assert_allclose(split["image"][:, 0], expected(IMAGES[rows]), atol=2e-3)
        np.testing.assert_allclose(split["image"][:, 1], expected(IMAGES[rows][:, :, ::-1]), atol=2e-3)


def test_a_large_store_is_read_from_its_files(store, monkeypatch):
    whole = latents(store)
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    data = latents(store)
    assert (len(data.train), len(data.test)) == (20, 6)
    for i in (0, 7, 8, 19):
        np.testing.assert_array_equal(data.train[i]["image"], whole.train["image"][i])
        assert data.train[i]["label"] == LABELS[i]
    stream, index = feed(data.train, 6, 1, threads=2), batch_indices(1, 0, 20, 6)
    np.testing.assert_array_equal(stream.next(1)["image"][0], whole.train["image"][index])
    stream.close()


def test_the_header_says_what_was_measured(store):
    header = read_header(store)
    assert header["complete"]
    assert header["examples"] == {"train": 20, "test": 6}
    assert (header["scale"], header["source"], header["shape"]) == (0.5, "random pictures", [2, 3, 2])
    mean, logvar = np.split(expected(IMAGES[:20]).astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(header["mean"], mean.mean((0, 1, 2)), atol=1e-3)
    variance = (mean**2 + np.exp(logvar)).mean((0, 1, 2)) - mean.mean((0, 1, 2)) ** 2
    np.testing.assert_allclose(header["std"], np.sqrt(variance), rtol=1e-3)


def test_the_measured_scale_makes_draws_of_unit_deviation(store):
    moments = np.repeat(latents(store).train["image"], 50, axis=0)
    std = np.asarray(read_header(store)["std"])
    z = draw_from_moments(1.0)(jnp.asarray(moments), jax.random.key(0), False)
    np.testing.assert_allclose(np.asarray(z).std((0, 1, 2)) / std, 1.0, rtol=0.02)


# Drawing -------------------------------------------------------------------------------------------------------------


def test_draws_have_the_stored_law():
    mean, logvar = np.float32([0.5, -1.0]), np.log(np.float32([4.0, 0.25]))
    moments = np.broadcast_to(np.concatenate([mean, logvar]), (40_000, 1, 1, 1, 4)).astype(np.float16)
    z = np.asarray(draw_from_moments(2.0)(jnp.asarray(moments), jax.random.key(0), False))
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean((0, 1, 2)), 2 * mean, atol=0.08)
    np.testing.assert_allclose(z.std((0, 1, 2)), [4.0, 1.0], rtol=0.03)


def test_flips_choose_the_mirrored_copy_half_of_the_time(store):
    moments = jnp.asarray(np.repeat(latents(store).train["image"], 10, axis=0))
    sure = moments.at[..., 2:].set(-30.0)  # no variance: a draw tells its copy
    x = draw_from_moments(1.0)(sure, jax.random.key(1), True)
    plain, mirrored = (np.asarray(sure[:, k, ..., :2], np.float32) for k in (0, 1))
    is_plain = np.abs(x - plain).max((1, 2, 3)) < 1e-4
    is_mirrored = np.abs(x - mirrored).max((1, 2, 3)) < 1e-4
    assert (is_plain ^ is_mirrored).all()
    assert 60 < is_mirrored.sum() < 140
    never = draw_from_moments(1.0)(sure, jax.random.key(1), False)
    np.testing.assert_allclose(never, plain, atol=1e-4)


@pytest.mark.slow
def test_a_key_per_example_and_none(store):
    moments = jnp.asarray(latents(store).train["image"])
    prepare = jax.jit(draw_from_moments(0.5), static_argnums=2)
    keys = jax.random.split(jax.random.key(2), 20)
    again = jnp.roll(moments, 3, axis=0), jnp.roll(keys, 3)
    np.testing.assert_array_equal(prepare(moments, keys, True), jnp.roll(prepare(*again, True), -3, axis=0))
    np.testing.assert_array_equal(prepare(moments, None, False), 0.5 * moments[:, 0, ..., :2].astype(jnp.float32))
    np.testing.assert_array_equal(prepare(moments[:, 0], keys, False), prepare(moments, keys, False))
    np.testing.assert_array_equal(prepare(moments[:, 0], keys, True), prepare(moments, keys, False))
    with pytest.raises(ValueError, match="floating-point"):
        prepare(moments.astype(jnp.uint8), keys, False)
    with pytest.raises(ValueError, match="need a key"):
        prepare(moments, None, True)


def test_false_colours_are_pictures_of_the_channels():
    z = jnp.asarray(RNG.normal(size=(2, 4, 4, 4)), jnp.float32)
    shown = np.asarray(false_colours(z))
    assert (shown.shape, shown.dtype) == ((2, 4, 4, 3), np.uint8)
    np.testing.assert_allclose(3 * (shown / 127.5 - 1), np.clip(z[..., :3], -3, 3), atol=0.02)
    np.testing.assert_array_equal(false_colours(z[..., :2])[..., 2], shown[..., 0])
    assert false_colours(z[..., :1]).shape == (2, 4, 4, 3)


# Going on ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def files(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(store, tmp_path, monkeypatch):
    out = tmp_path / "store"
    written = []

    def kill_at_the_third(stem, moments, labels):
        written.append(stem.name)
        if len(written) == 3:
            stem.with_name(f"{stem.name}.moments.part").write_bytes(b"half")
            raise Killed
        write(stem, moments, labels)

    write = module._write_shard
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_shard", kill_at_the_third)
        with pytest.raises(Killed):
            encode_to_store(encoding(out))
    with pytest.raises(InputError, match="unfinished"):
        latents(out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("train-0000[01].*")}
    read = []

    def counted(source, rows):
        read.extend(rows)
        return take(source, rows)

    take = module.take
    monkeypatch.setattr(module, "take", counted)
    encode_to_store(encoding(out))
    assert sorted(set(read)) == [0, 1, 2, 3, 4, 5, 16, 17, 18, 19]  # all of test, the third shard of train
    assert before == {p.name: p.stat().st_mtime_ns for p in out.glob("train-0000[01].*")}
    assert files(out) == files(store)
    read.clear()
    assert encode_to_store(encoding(out))["complete"]
    assert read == []


def test_the_batch_size_changes_nothing_but_rounding(store, tmp_path):
    encode_to_store(encoding(tmp_path / "s", batch=5))
    a, b = latents(store), latents(tmp_path / "s")
    np.testing.assert_array_equal(a.train["label"], b.train["label"])
    np.testing.assert_allclose(a.train["image"], b.train["image"], atol=2e-3)


def test_hosts_share_the_shards(tmp_path, monkeypatch):
    out = tmp_path / "s"
    made = []
    for host in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda host=host: host)
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(module, "_measured", lambda *a: {})
            encode_to_store(encoding(out))
            made.append({p.name for p in out.glob("*.label.npy")} - set().union(*made))
            header = json.loads((out / "header.json").read_text())
            (out / "header.json").write_text(json.dumps(header | {"complete": False}))
    assert made == [
        {"train-00000.label.npy", "train-00002.label.npy"},
        {"train-00001.label.npy", "test-00000.label.npy"},
    ]


# What is refused -----------------------------------------------------------------------------------------------------


def test_stores_of_different_autoencoders_are_not_mixed(store):
    other = {**PARAMS, "b": 2 * PARAMS["b"]}
    with pytest.raises(InputError, match=r"another weights \(.* there, .* now\)") as error:
        encode_to_store(encoding(store, params=other))
    assert "\n" not in str(error.value)
    for changed in ({"scale": 1.0}, {"source": "others"}, {"mirror": False}, {"shard": 16}):
        with pytest.raises(InputError, match="give another out="):
            encode_to_store(encoding(store, **changed))
    assert latents(store, weights=weights_digest(PARAMS)).shape == (2, 3, 2)
    with pytest.raises(InputError, match=r"for a scale of 0\.5, not 0\.18"):
        latents(store, scale=0.18)
    with pytest.raises(InputError, match="from another autoencoder"):
        latents(store, weights=weights_digest(other))


def test_the_digest_is_of_the_values():
    jumbled = {"b": np.asarray(PARAMS["b"]), "w": np.asarray(PARAMS["w"])}
    assert weights_digest(jumbled) == weights_digest(PARAMS)
    moved = {"w": PARAMS["b"], "b": PARAMS["w"]}
    nearly = {**PARAMS, "b": PARAMS["b"].at[1].set(np.nextafter(np.float32(1), 2))}
    half = {**PARAMS, "b": PARAMS["b"].astype(jnp.float16)}
    assert len({weights_digest(p) for p in (PARAMS, moved, nearly, half)}) == 4


def test_without_mirrored_copies(tmp_path):
    encode_to_store(encoding(tmp_path / "s", mirror=False))
    assert latents(tmp_path / "s").train["image"].shape == (20, 2, 3, 4)
    with pytest.raises(InputError, match="no mirrored copies"):
        latents(tmp_path / "s", mirrored=True)


def test_damage_is_named(store, tmp_path):
    with pytest.raises(InputError, match="no latents in .*make latents"):
        latents(tmp_path)
    for name, damage, message in (
        ("header.json", b"{", "damaged"),
        ("train-00001.moments.npy", None, "cannot read .*train-00001"),
        ("train-00002.label.npy", b"", "cannot read .*train-00002"),
        ("test-00000.label.npy", (store / "train-00000.label.npy").read_bytes(), "6 latents and 8 labels"),
    ):
        copy = tmp_path / name
        shutil.copytree(store, copy)
        (copy / name).unlink() if damage is None else (copy / name).write_bytes(damage)
        with pytest.raises(InputError, match=message):
            latents(copy)


def test_what_cannot_be_done_is_said_before_encoding(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="batch of 0"):
        encode_to_store(encoding(tmp_path / "s", batch=0))
    with pytest.raises(InputError, match="this machine has"):
        encode_to_store(encoding(tmp_path / "s"), devices=100)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        encode_to_store(encoding(tmp_path / "file" / "s"))
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"the latents take .* GB"):
        encode_to_store(encoding(tmp_path / "s"))
    assert not (tmp_path / "s" / "header.json").exists()


def test_moments_that_are_not_finite_are_not_kept(tmp_path):
    broken = {**PARAMS, "b": jnp.full((2,), jnp.nan)}
    with pytest.raises(InputError, match="not finite"):
        encode_to_store(encoding(tmp_path / "s", params=broken))
