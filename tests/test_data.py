"""Streams of batches, decoding, and the three kinds of image data."""

import gzip
import hashlib
import http.server
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_jax.training import tfds_without_tf
from diffusion_jax.training.data import batch_indices, epoch_order, feed, gather, prepare, size, to_uint8
from diffusion_jax.training.sources import digits, folders, image_folder, read_image, tfds, tfds_images
from diffusion_jax.typing import InputError

laws = settings(deadline=None, max_examples=60, derandomize=True)


# Batches -------------------------------------------------------------------------------------------------------------


@laws
@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(n))
    assert (order == epoch_order.__wrapped__(seed, epoch, n)).all()


@laws
@given(st.integers(0, 1000), st.integers(0, 40), st.integers(1, 60), st.integers(1, 90))
def test_batches_are_the_endless_order_cut_up(seed, step, n, batch):
    epochs = (step + 1) * batch // n + 1
    order = np.concatenate([epoch_order(seed, e, n) for e in range(epochs)])
    index = batch_indices(seed, step, n, batch)
    assert index.dtype == np.int32
    np.testing.assert_array_equal(index, order[step * batch : (step + 1) * batch])


def test_epochs_and_seeds_differ_and_the_order_is_the_documented_one():
    assert (epoch_order(0, 0, 100) != epoch_order(0, 1, 100)).any()
    assert (epoch_order(0, 0, 100) != epoch_order(1, 0, 100)).any()
    words = np.random.Philox(np.random.SeedSequence([3, 2])).random_raw(50)
    np.testing.assert_array_equal(epoch_order(3, 2, 50), np.argsort(words))


class Slow:
    """Random access without arrays."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        time.sleep(0.0005 * (i % 3))
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": np.int32(i)}


ARRAYS = {"image": np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)}
ARRAYS["label"] = np.arange(10, dtype=np.int32)
FEEDS = {
    "resident": lambda **kw: feed(ARRAYS, 4, 7, **kw),
    "grain arrays": lambda **kw: feed(ARRAYS, 4, 7, resident_bytes=0, threads=2, **kw),
    "grain objects": lambda **kw: feed(Slow(), 4, 7, threads=3, **kw),
    "grain without threads": lambda **kw: feed(Slow(), 4, 7, threads=0, **kw),
}


def labels_of(batch):
    return batch["index"] if "index" in batch else batch["label"]


@pytest.mark.parametrize("make", FEEDS.values(), ids=FEEDS)
def test_a_feed_gives_the_batches_of_its_seed(make):
    stream = make()
    want = np.stack([batch_indices(7, s, 10, 4) for s in range(12)])
    got = [stream.next(k) for k in (1, 3, 8)]
    stream.close()
    np.testing.assert_array_equal(np.concatenate([labels_of(b) for b in got]), want)
    assert (stream.resident is None) == ("image" in got[0])
    if "image" in got[0]:
        assert got[1]["image"].shape == (3, 4, 2, 2, 1)
        np.testing.assert_array_equal(got[1]["image"][..., 0, 0, 0], want[1:4])


@pytest.mark.parametrize("make", FEEDS.values(), ids=FEEDS)
def test_a_resumed_feed_gives_the_same_batches_over_epoch_edges(make):
    stream = make()
    stream.next(2)
    state = json.loads(json.dumps(stream.get_state()))
    assert state == {"step": 2}
    first = labels_of(stream.next(9))
    stream.set_state(state)
    again = labels_of(stream.next(9))
    stream.close()
    fresh = make()
    fresh.set_state(state)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, labels_of(fresh.next(9)))
    fresh.close()


@pytest.mark.parametrize("make", FEEDS.values(), ids=FEEDS)
def test_processes_read_their_rows_of_the_global_batch(make):
    whole, low, high = make(), make(rows=slice(0, 1)), make(rows=slice(1, 4))
    parts = [labels_of(f.next(5)) for f in (low, high)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), labels_of(whole.next(5)))
    for f in (whole, low, high):
        f.close()


def test_closing_stops_the_threads_and_next_starts_them_again():
    def reading():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    before = len(reading())
    stream = FEEDS["grain objects"]()
    first = labels_of(stream.next(3))
    assert len(reading()) > before
    stream.close()
    stream.close()
    deadline = time.monotonic() + 5
    while len(reading()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reading()) == before
    stream.set_state({"step": 0})
    np.testing.assert_array_equal(labels_of(stream.next(3)), first)
    stream.close()


def test_reading_ahead_is_bounded():
    reads = []

    class Counting(Slow):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    stream = feed(Counting(), 4, 0, threads=2)
    stream.next(1)
    time.sleep(0.3)
    stream.close()
    assert len(reads) <= 4 * (1 + 4 + 1)


def test_an_index_feed_costs_microseconds_a_step():
    stream = feed({"label": np.zeros(50_000, np.int32)}, 256, 0)
    stream.next(1)
    begin = time.perf_counter()
    for _ in range(150):
        stream.next(1)
    assert (time.perf_counter() - begin) / 150 < 500e-6


def test_what_a_feed_refuses():
    for source, batch in (({"image": np.zeros((0, 2, 2, 1), np.uint8)}, 4), (ARRAYS, 0)):
        with pytest.raises(InputError, match="at least"):
            feed(source, batch, 0)
    with pytest.raises(InputError, match="one common length"):
        size({"image": np.zeros(3), "label": np.zeros(4)})
    for state in ({}, {"step": -1}, {"step": "2"}):
        with pytest.raises(ValueError, match="state of a feed"):
            feed(ARRAYS, 4, 0).set_state(state)


def test_a_broken_example_surfaces_in_next():
    class Broken(Slow):
        def __getitem__(self, i):
            raise InputError("cannot read the image x.png")

    stream = feed(Broken(), 4, 0)
    with pytest.raises(InputError, match=r"x\.png"):
        stream.next(1)
    stream.close()


# On the device -------------------------------------------------------------------------------------------------------

PIXELS = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 4, 6, 3), np.uint8))


def test_every_pixel_value_survives_the_round_trip():
    values = jnp.arange(256, dtype=jnp.int32).astype(jnp.uint8).reshape(1, 16, 16, 1)
    x = prepare(values)
    assert x.dtype == jnp.float32
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(x), values)
    np.testing.assert_array_equal(to_uint8(jnp.array([-7.0, 7.0, 0.0])), [0, 255, 128])


def test_flips_mirror_half_of_the_examples_and_depend_on_the_key_alone():
    plain, key = prepare(PIXELS), jax.random.key(1)
    flipped = jax.jit(prepare, static_argnames="flip")(PIXELS, key, flip=True)
    mirrored = np.all(flipped == plain[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(flipped == plain, axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(flipped, prepare(PIXELS, key, flip=True))
    assert (flipped != prepare(PIXELS, jax.random.key(2), flip=True)).any()


def test_with_a_key_per_example_a_flip_does_not_depend_on_the_batch():
    keys = jax.random.split(jax.random.key(3), 64)
    whole = prepare(PIXELS, keys, flip=True)
    np.testing.assert_array_equal(whole[20:30], prepare(PIXELS[20:30], keys[20:30], flip=True))


def test_floating_point_examples_are_taken_as_they_are():
    sound = jnp.linspace(-3.0, 3.0, 8).reshape(2, 4, 1)
    np.testing.assert_array_equal(prepare(sound), sound)
    half = prepare(sound.astype(jnp.float16))
    assert half.dtype == jnp.float32


def test_what_prepare_refuses():
    with pytest.raises(ValueError, match="uint8"):
        prepare(jnp.zeros((1, 2, 2, 1), jnp.int32))
    with pytest.raises(ValueError, match="need a key"):
        prepare(PIXELS, flip=True)


def test_gathering_on_the_device_is_indexing():
    index = np.array([9, 0, 3], np.int32)
    got = jax.jit(gather)({k: jnp.asarray(v) for k, v in ARRAYS.items()}, index)
    np.testing.assert_array_equal(got["image"], ARRAYS["image"][index])
    np.testing.assert_array_equal(got["label"], index)


# Digits --------------------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_always_alike():
    data = digits()
    assert data.shape == (8, 8, 1)
    assert data.classes == tuple("0123456789")
    assert data.train["image"].shape == (1437, 8, 8, 1)
    assert data.test["image"].shape == (360, 8, 8, 1)
    assert data.train["image"].dtype == np.uint8
    assert data.train["label"].dtype == np.int32
    assert (data.train["image"].min(), data.train["image"].max()) == (0, 255)
    shares = np.bincount(data.test["label"]) / np.bincount(data.train["label"])
    assert np.ptp(shares) < 0.02
    np.testing.assert_array_equal(data.test["label"], digits().test["label"])


def test_importing_the_sources_imports_none_of_their_libraries():
    code = "import sys, diffusion_jax.training.sources as s; print([m for m in ('grain', 'tensorflow_datasets', 'sklearn', 'PIL') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Reading one image ---------------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode, colour):
    return Image.new(mode, (10, 8), colour)


RED = (250, 20, 30)
SIXTEEN = Image.fromarray(np.full((8, 10), 51_400, np.uint16))
PALETTE = flat("RGB", RED).quantize(4)
FRAMES = [flat("RGB", RED), flat("RGB", (0, 0, 255))]
SEEN = {
    "png": (encoded(flat("RGB", RED)), RED, 0),
    "jpeg": (encoded(flat("RGB", RED), "JPEG", quality=95), RED, 4),
    "webp": (encoded(flat("RGB", RED), "WEBP", lossless=True), RED, 0),
    "palette": (encoded(PALETTE), RED, 0),
    "grey": (encoded(flat("L", 77)), (77, 77, 77), 0),
    "grey jpeg": (encoded(flat("L", 77), "JPEG"), (77, 77, 77), 2),
    "grey and alpha": (encoded(flat("LA", (0, 0))), (255, 255, 255), 0),
    "one bit": (encoded(flat("1", 1)), (255, 255, 255), 0),
    "sixteen bits": (encoded(SIXTEEN), (200, 200, 200), 0),
    "transparent": (encoded(flat("RGBA", (*RED, 0))), (255, 255, 255), 0),
    "half transparent": (encoded(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127), 0),
    "transparent palette": (encoded(PALETTE, transparency=0), (255, 255, 255), 0),
    "transparent webp": (encoded(flat("RGBA", (*RED, 0)), "WEBP", lossless=True), (255, 255, 255), 0),
    "cmyk": (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0), 6),
    "animated gif": (encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), RED, 0),
    "animated png": (encoded(FRAMES[0], save_all=True, append_images=FRAMES[1:]), RED, 0),
    "animated webp": (
        encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:], lossless=True),
        RED,
        0,
    ),
}


@pytest.mark.parametrize(("file", "colour", "tolerance"), SEEN.values(), ids=SEEN)
def test_any_image_reads_as_rgb(file, colour, tolerance):
    pixels = read_image(file, 3, 4)
    assert pixels.shape == (4, 4, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)[None, None]).max() <= tolerance


@pytest.mark.parametrize("file", [v[0] for v in SEEN.values()], ids=SEEN)
def test_any_image_reads_as_grey(file):
    pixels = read_image(file, 1)
    assert pixels.shape == (8, 10, 1)
    assert np.ptp(pixels) <= 6


def test_images_are_turned_upright_cropped_at_the_centre_and_averaged():
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:8], wide[:, 8:12] = 100, 200
    centre = read_image(encoded(Image.fromarray(wide)), 3, 4)
    np.testing.assert_array_equal(centre[:, :, 0], np.broadcast_to([centre[0, 0, 0], *centre[0, 1:, 0]], (4, 4)))
    assert abs(int(centre[0, 0, 0]) - 100) < 12
    assert abs(int(centre[0, 3, 0]) - 200) < 12
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned = read_image(encoded(Image.fromarray(wide[:, 4:12]), exif=exif), 3)
    np.testing.assert_array_equal(turned, np.rot90(wide[:, 4:12], -1))
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(read_image(encoded(Image.fromarray(checker)), 1, 8).astype(int) - 127).max() < 6


def test_a_large_jpeg_decoded_at_a_reduced_scale_looks_the_same():
    ramp = np.linspace(0, 255, 512)[:, None, None] * np.ones((1, 512, 3))
    file = encoded(Image.fromarray(ramp.astype(np.uint8)), "JPEG", quality=95)
    full = Image.open(io.BytesIO(file)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.abs(read_image(file, 3, 16).astype(int) - np.asarray(full).astype(int)).max() <= 2


# A folder of images --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_folder(root, count=12, classes=("cat", "dog")):
    for i in range(count):
        folder = root / classes[i % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        kind = (".png", ".JPG", ".webp")[i % 3]
        Image.new("RGB", (10 + i, 20), (i, i, i)).save(folder / f"{i:04d}{kind}", lossless=True)
    return root


def test_classes_are_the_subfolders(tmp_path):
    root = write_folder(tmp_path / "pets")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "._0000.png").write_bytes(b"a Mac's shadow file")
    (root / ".trash").mkdir()
    (root / ".trash" / "x.png").write_bytes(b"hidden")
    data = image_folder(root, size=8)
    assert data.classes == ("cat", "dog")
    assert data.shape == (8, 8, 3)
    assert data.test is None
    np.testing.assert_array_equal(data.train["label"], [0] * 6 + [1] * 6)
    want = np.array([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    assert np.abs(data.train["image"].astype(int) - want[:, None, None, None]).max() <= 1
    assert type(data.train["image"]) is np.ndarray


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    root = write_folder(tmp_path / "x", 4)
    (root / "linked").symlink_to(write_folder(tmp_path / "elsewhere", 3, ()))
    (root / "cat" / "up").symlink_to(root)
    data = image_folder(root, size=4)
    assert data.classes == ("cat", "dog", "linked")
    assert len(data.train["label"]) == 7


def test_without_subfolders_the_images_are_unlabelled(tmp_path):
    data = image_folder(write_folder(tmp_path / "flat", classes=()), size=4, channels=1)
    assert data.classes == ()
    assert data.shape == (4, 4, 1)
    np.testing.assert_array_equal(data.train["label"], np.zeros(12))


def test_decoding_when_read_gives_the_same_images_as_the_cache(tmp_path):
    root = write_folder(tmp_path / "x", 130)
    kept, read = image_folder(root, size=8), image_folder(root, size=8, cache_bytes=0, cache_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for a, b in ((kept.train, read.train), (kept.test, read.test)):
        np.testing.assert_array_equal(a["image"], np.stack([b[i]["image"] for i in range(len(b))]))
        np.testing.assert_array_equal(a["label"], np.stack([b[i]["label"] for i in range(len(b))]))
    streams = feed(kept.train, 8, 0), feed(read.train, 8, 0, threads=2)
    index, batch = streams[0].next(2)["index"], streams[1].next(2)
    np.testing.assert_array_equal(kept.train["image"][index], batch["image"])
    streams[1].close()


def test_about_a_twentieth_is_held_out_by_name():
    names = [f"class/{i}.png" for i in range(1000)]
    train, test = folders._held_out(names)
    assert (len(train), len(test)) == (950, 50)
    assert sorted([*train, *test]) == list(range(1000))
    held = {names[i] for i in test}
    more = [*names, *(f"class/{i}.png" for i in range(1000, 1100))]
    still = {more[i] for i in folders._held_out(more)[1]}
    assert len(held & still) > 40
    assert [len(part) for part in folders._held_out(names[:100])] == [84, 16]
    assert [len(part) for part in folders._held_out(names[:99])] == [99, 0]


def test_a_second_start_decodes_nothing_and_a_changed_file_decodes_anew(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "x"), tmp_path / "cache"
    first = image_folder(root, size=4, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_image", lambda *a: pytest.fail("decoded again"))
        np.testing.assert_array_equal(image_folder(root, size=4, cache_dir=cache).train["image"], first.train["image"])
    Image.new("RGB", (9, 9), "white").save(root / "cat" / "0000.png")
    changed = image_folder(root, size=4, cache_dir=cache)
    assert changed.train["image"][0].min() == 255
    assert len(list(cache.glob("folders/*/*"))) == 1
    assert first.train["image"][0].max() == 0
    image_folder(root, size=5, cache_dir=cache)
    assert len(list(cache.glob("folders/*/*"))) == 2


def test_an_interrupted_cache_is_never_read(tmp_path, monkeypatch):
    root, cache = write_folder(tmp_path / "x"), tmp_path / "cache"

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            image_folder(root, size=4, cache_dir=cache)
    assert list(cache.glob("folders/*/*")) == []
    left_over = next(cache.glob("folders/*")) / ".unfinished-killed"
    left_over.mkdir()
    (left_over / "train_image.npy").write_bytes(b"half")
    assert image_folder(root, size=4, cache_dir=cache).train["label"].shape == (12,)
    assert left_over.exists()
    os.utime(left_over, (1, 1))
    (root / "cat" / "0000.png").touch()
    image_folder(root, size=4, cache_dir=cache)
    assert not left_over.exists()


@pytest.mark.parametrize("damage", ["truncated png", "truncated jpeg", "not an image", "empty"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_broken_image_is_named(tmp_path, damage, cache_bytes):
    root = write_folder(tmp_path / "x", 4)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file = encoded(noise, "JPEG" if "jpeg" in damage else "PNG")
    broken = {"not an image": b"GIF? no", "empty": b""}.get(damage, file[: len(file) // 2])
    (root / "dog" / "bad.png").write_bytes(broken)

    def read_all():
        data = image_folder(root, size=4, cache_bytes=cache_bytes)
        return [data.train[i] for i in range(len(data.train))]

    with pytest.raises(InputError, match=r"cannot read the image .*dog/bad\.png"):
        read_all()


def test_what_a_folder_must_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in {"gone": "is missing", "file": "is not a folder", "empty": "no images under"}.items():
        with pytest.raises(InputError, match=f"{message}.*expected"):
            image_folder(tmp_path / name, size=8)
    mixed = write_folder(tmp_path / "mixed", 4)
    Image.new("L", (4, 4)).save(mixed / "stray.png")
    with pytest.raises(InputError, match=r"stray\.png"):
        image_folder(mixed, size=8)
    for options in ({"size": 0}, {"size": 8, "channels": 2}):
        with pytest.raises(InputError, match="channels 1 or 3"):
            image_folder(mixed, **options)
    with pytest.raises(InputError, match="cannot keep decoded images"):
        image_folder(write_folder(tmp_path / "y", 4), size=8, cache_dir=tmp_path / "file")


# TensorFlow Datasets -------------------------------------------------------------------------------------------------

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def cifar_pixels(part, n):
    return np.random.default_rng(part).integers(0, 256, (n, 3, 32, 32), np.uint8)


def write_cifar_archive(path, n):
    """An archive of CIFAR-10's format: six files of n made-up images, labels 0 1 2 ... 9 0 1 ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {"batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode()}
    for part, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        labels = (np.arange(n) % 10).astype(np.uint8)[:, None]
        members[name] = np.concatenate([labels, cifar_pixels(part, n).reshape(n, 3072)], axis=1).tobytes()
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def register(patch, builder, path, url):
    """In this process, let TFDS expect this very file at `url`, and nothing else for this builder."""
    from tensorflow_datasets.core.download import checksums

    for known in list(builder.url_infos):
        patch.delitem(builder.url_infos, known)
    patch.setitem(builder.url_infos, url, checksums.compute_url_info(path))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A data folder in which the archive of 30 images a file was prepared, as a user would."""
    import tensorflow_datasets

    root = tmp_path_factory.mktemp("tfds")
    archive = root / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_cifar_archive(archive, 30)
    with pytest.MonkeyPatch.context() as patch:
        register(patch, tensorflow_datasets.builder("cifar10", data_dir=root), archive, CIFAR_URL)
        tfds_images("cifar10", root)
    return root


def sorted_images(source):
    return sorted((int(n), i.tobytes()) for n, i in zip(source["label"], source["image"], strict=True))


def cifar_truth(parts, n=30):
    return sorted(
        (j % 10, image.tobytes())
        for part in parts
        for j, image in enumerate(cifar_pixels(part, n).transpose(0, 2, 3, 1))
    )


def test_cifar10_from_an_archive_has_its_very_pixels(cifar, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(cifar))
    monkeypatch.setattr(folders, "read_image", lambda *a: pytest.fail("decoded again"))
    data = tfds_images("cifar10")
    assert data.classes == tuple(NAMES)
    assert data.shape == (32, 32, 3)
    assert sorted_images(data.train) == cifar_truth(range(5))
    assert sorted_images(data.test) == cifar_truth([5])
    assert (data.train["image"].dtype, data.train["label"].dtype) == (np.uint8, np.int32)
    assert [p.name for p in (cifar / "downloads").iterdir()] == ["manual"]


def test_a_prepared_set_is_served_from_disk_when_it_is_too_large(cifar):
    data = tfds_images("cifar10", cifar, size=16, cache_bytes=0)
    assert len(data.train) == 150
    assert data.train[3]["image"].shape == (16, 16, 3)
    builder = tfds._builder("cifar10", cifar)
    whole = partial(read_image, channels=3)  # whole images, decoded when read
    split = tfds.TfdsSplit("x", tfds_without_tf.records(builder, "test"), builder.info.features, True, whole)
    examples = [split[i] for i in range(len(split))]
    assert sorted((int(e["label"]), e["image"].tobytes()) for e in examples) == cifar_truth([5])
    stream = feed(data.train, 8, 0, threads=2)
    assert stream.next(2)["image"].shape == (2, 8, 16, 16, 3)
    stream.close()


def as_tfrecord(root, target):
    """The same prepared set in TFDS's default format: length, crc, bytes, crc."""
    builder = tfds._builder("cifar10", root)
    folder = target / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        with (folder / f"cifar10-{split}.tfrecord-00000-of-00001").open("wb") as file:
            for record in tfds_without_tf.records(builder, split):
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    for name in ("features.json", "label.labels.txt"):
        (folder / name).write_bytes((root / "cifar10" / "3.0.2" / name).read_bytes())
    info = (root / "cifar10" / "3.0.2" / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    return folder


def test_a_set_prepared_in_tfds_default_format_reads_without_tensorflow(cifar, tmp_path):
    as_tfrecord(cifar, tmp_path)
    data, same = tfds_images("cifar10", tmp_path), tfds_images("cifar10", cifar)
    assert tfds_without_tf.is_installed() or "tensorflow" not in sys.modules
    for a, b in ((data.train, same.train), (data.test, same.test)):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_damaged_prepared_files_are_named(cifar, tmp_path):
    folder = as_tfrecord(cifar, tmp_path)
    shard = folder / "cifar10-train.tfrecord-00000-of-00001"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"train\.tfrecord-00000-of-00001 ends inside a record"):
        tfds_images("cifar10", tmp_path)
    shard.write_bytes(whole[:2000] + bytes(500) + whole[2500:])
    with pytest.raises(InputError, match="cannot read example 0 of cifar10's train split"):
        tfds_images("cifar10", tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=r"cannot read .*train\.tfrecord"):
        tfds_images("cifar10", tmp_path)


def test_nothing_of_tfds_stays_replaced(cifar):
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.image_classification import cifar as module

    assert image_feature._ImageEncoder._encode_image is not tfds_without_tf._encode
    for patched in (extractor, module):
        assert type(patched.tf).__name__ != "SimpleNamespace"


def test_a_replaced_archive_is_extracted_afresh(tmp_path, monkeypatch):
    import tensorflow_datasets

    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    stale = tmp_path / "downloads" / "extracted" / "TAR_GZ.cifar-10-binary.tar.gz" / "cifar-10-batches-bin"
    stale.mkdir(parents=True)
    (stale / "batches.meta.txt").write_text("an older archive's")
    write_cifar_archive(archive, 10)
    register(monkeypatch, tensorflow_datasets.builder("cifar10", data_dir=tmp_path), archive, CIFAR_URL)
    assert sorted_images(tfds_images("cifar10", tmp_path).test) == cifar_truth([5], 10)


def test_a_wrong_archive_is_named_with_both_checksums(tmp_path):
    archive = tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    write_cifar_archive(archive, 10)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(InputError, match=f"cifar-10-binary.tar.gz is not cifar10's.*{found}.*{CIFAR_URL}"):
        tfds_images("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_without_network_the_missing_files_are_named_at_once(tmp_path, monkeypatch):
    import tensorflow_datasets

    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(b"elsewhere")
    url = "https://host.invalid/cifar-10-binary.tar.gz"
    register(monkeypatch, tensorflow_datasets.builder("cifar10", data_dir=tmp_path), archive, url)
    begin = time.perf_counter()
    with pytest.raises(InputError) as error:
        tfds_images("cifar10", tmp_path)
    assert time.perf_counter() - begin < 8
    message = str(error.value)
    assert "\n" not in message
    for part in ("cifar-10-binary.tar.gz", url, str(tmp_path / "downloads" / "manual"), "TFDS_DATA_DIR"):
        assert part in message


def test_names_tfds_does_not_have(tmp_path):
    with pytest.raises(InputError, match="did you mean cifar10"):
        tfds_images("cifar-10", tmp_path)
    with pytest.raises(InputError, match="'emnist/letterz'"):
        tfds_images("emnist/letterz", tmp_path)


def test_a_set_without_single_images_is_refused(cifar):
    with pytest.raises(InputError, match="is not a set of single images: its features are label"):
        tfds._image_shape("words", {"label": None}, None)

    class Feature:
        shape = (None, None, 3)

    with pytest.raises(InputError, match="differ in size"):
        tfds._image_shape("photos", {"image": Feature}, None)
    assert tfds._image_shape("photos", {"image": Feature}, 32) == (32, 32, 3)


@pytest.fixture
def site(tmp_path):
    """An HTTP server of this machine over `tmp_path/site`: (its folder, its address, what it was asked)."""
    folder, asked = tmp_path / "site", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def write_mnist(folder, train=60, test=20):
    """MNIST's four files with made-up pixels; image i is flat i, label i mod 10."""
    for name, n in (("train", train), ("t10k", test)):
        pixels = np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


@pytest.fixture
def small_mnist(site, tmp_path, monkeypatch):
    """TFDS's own MNIST builder, told to expect 60 and 20 images at this machine's server."""
    import tensorflow_datasets
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.image_classification import mnist

    folder, address, _ = site
    write_mnist(folder)
    builder = tensorflow_datasets.builder("mnist", data_dir=tmp_path)
    for known in list(builder.url_infos):
        monkeypatch.delitem(builder.url_infos, known)
    for path in folder.iterdir():
        monkeypatch.setitem(builder.url_infos, address + path.name, checksums.compute_url_info(path))
    monkeypatch.setattr(mnist.MNIST, "URL", address)
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 60)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 20)
    return site


def test_a_set_is_downloaded_once_through_tfds(small_mnist, tmp_path):
    data = tfds_images("mnist", tmp_path / "data")
    assert data.shape == (28, 28, 1)
    np.testing.assert_array_equal(np.sort(data.train["image"][:, 0, 0, 0]), np.arange(60))
    np.testing.assert_array_equal(data.test["image"][:, 3, 3, 0] % 10, data.test["label"])
    asked = len(small_mnist[2])
    tfds_images("mnist", tmp_path / "data")
    assert len(small_mnist[2]) == asked


def test_a_download_that_is_not_the_expected_file_is_refused(small_mnist, tmp_path):
    folder, address, _ = small_mnist
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"changed"))
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz.* has wrong checksum"):
        tfds_images("mnist", tmp_path / "data")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert tfds._unreachable([address + "t10k-labels-idx1-ubyte.gz"]).endswith("answers 404")
    assert tfds._unreachable([address]) is None
