"""ImageNet at miniature size: class folders, TFDS's two formats, ADM's preprocessing, what is missing."""

import io
import json
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.__main__ import main
from diffusion_jax.experiment import find_experiment
from diffusion_jax.nets import count
from diffusion_jax.training import tfds_without_tf
from diffusion_jax.training.data import batch_indices, feed, read_ahead
from diffusion_jax.training.sources import ilsvrc, imagenet
from diffusion_jax.training.sources.decoding import read_square
from diffusion_jax.typing import InputError

WNIDS = ("n01440764", "n01443537", "n02119789")
SIZES = ((40, 30), (30, 70), (64, 64), (133, 90), (16, 200), (50, 37))


def picture(seed, size):
    """A smooth picture, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFUSION_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("IMAGENET_DIR", raising=False)


def write_folder(root, val=2):
    for c, wnid in enumerate(WNIDS):
        for split, number in (("train", 6), ("val", val)):
            folder = root / split / wnid
            for i in range(number):
                folder.mkdir(parents=True, exist_ok=True)
                picture(100 * c + i, SIZES[i]).save(folder / f"{wnid}_{i}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("imagenet"))


# ADM's preprocessing -------------------------------------------------------------------------------------------------


def halved(pixels):
    """The mean of 2x2 blocks, of columns first, each mean rounded to a byte, halves up."""
    columns = (pixels[:, 0::2].astype(int) + pixels[:, 1::2] + 1) // 2
    return (columns[0::2] + columns[1::2] + 1) // 2


def test_an_exact_power_of_two_is_the_mean_of_blocks():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(read_square(png(pixels), 64), pixels)
    np.testing.assert_array_equal(read_square(png(pixels), 32), halved(pixels))
    np.testing.assert_array_equal(read_square(png(pixels), 16), halved(halved(pixels)))


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def catmull_rom(n_in, n_out):
    """Rows of weights of bicubic (a = -1/2) resampling whose window grows with the reduction: the textbook's."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    centre = (np.arange(n_out)[:, None] + 0.5) * scale - 0.5
    u = np.abs((np.arange(n_in)[None, :] - centre) / support)
    w = np.where(u < 1, 1.5 * u**3 - 2.5 * u**2 + 1, np.where(u < 2, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2, 0))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize("width", [40, 47])
def test_between_halvings_it_is_bicubic_and_central(width):
    pixels = np.asarray(picture(3, (width, 24)))
    wide = round(width * 16 / 24)
    want = np.einsum("ai,bj,ijc->abc", catmull_rom(24, 16), catmull_rom(width, wide), pixels.astype(float))
    left = (wide - 16) // 2
    got = read_square(png(pixels), 16)
    assert np.abs(got - np.clip(want[:, left : left + 16], 0, 255)).max() <= 2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_becomes_the_square(size):
    assert read_square(png(np.asarray(picture(0, size))), 32).shape == (32, 32, 3)


def test_grey_and_cmyk_become_rgb(tmp_path):
    for mode in ("L", "CMYK"):
        picture(0, (20, 20)).convert(mode).save(tmp_path / "x.jpg")
        assert read_square(tmp_path / "x.jpg", 8).shape == (8, 8, 3)


# Class folders -------------------------------------------------------------------------------------------------------


def examples(source):
    if isinstance(source, dict):
        return [{k: v[i] for k, v in source.items()} for i in range(len(source["label"]))]
    return [source[i] for i in range(len(source))]


def test_classes_are_the_sorted_folders_and_val_is_held_out(folder):
    data = imagenet(16, folder, cache_bytes=0)
    assert data.classes == WNIDS
    assert data.shape == (16, 16, 3)
    assert (len(data.train), len(data.test)) == (18, 6)
    assert [int(e["label"]) for e in examples(data.train)] == [0] * 6 + [1] * 6 + [2] * 6
    example = data.train[7]
    want = read_square(folder / "train" / WNIDS[1] / f"{WNIDS[1]}_1.JPEG", 16)
    np.testing.assert_array_equal(example["image"], want)
    assert (example["image"].dtype, example["label"].dtype) == (np.uint8, np.int32)


def test_decoded_once_or_when_read_gives_the_same(folder):
    read, kept = imagenet(16, folder, cache_bytes=0), imagenet(16, folder)
    assert isinstance(kept.train, dict)
    assert isinstance(kept.train["image"].base, np.memmap)
    for a, b in ((kept.train, read.train), (kept.test, read.test)):
        for one, other in zip(examples(a), examples(b), strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["label"] == other["label"]
    stream, index = feed(read.train, 4, 3, threads=2), batch_indices(3, 0, 18, 4)
    np.testing.assert_array_equal(stream.next(1)["image"][0], kept.train["image"][index])
    stream.close()


def test_the_list_is_kept_until_a_class_folder_changes(folder, tmp_path, monkeypatch):
    root = write_folder(tmp_path / "own")
    first = imagenet(8, root, cache_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(ilsvrc, "_list", lambda *a: pytest.fail("listed again"))
        again = imagenet(8, root, cache_bytes=0)
        np.testing.assert_array_equal(again.train.names, first.train.names)
        np.testing.assert_array_equal(again.train.labels, first.train.labels)
    picture(9, (20, 20)).save(root / "train" / WNIDS[2] / "new.JPEG")
    assert len(imagenet(8, root, cache_bytes=0).train) == 19
    for kept in (tmp_path / "own").parent.rglob("*.npz"):
        kept.write_bytes(b"half")
    assert len(imagenet(8, root, cache_bytes=0).train) == 19


def test_a_damaged_list_is_read_anew(folder, tmp_path):
    imagenet(8, folder, cache_bytes=0, cache_dir=tmp_path)
    lists = list(tmp_path.rglob("*.npz"))
    assert len(lists) == 2
    for kept in lists:
        kept.write_bytes(kept.read_bytes()[:50])
    assert len(imagenet(8, folder, cache_bytes=0, cache_dir=tmp_path).train) == 18


def test_a_list_of_a_million_names_takes_tens_of_bytes_each():
    names = np.array([b"n01440764/n01440764_%d.JPEG" % i for i in range(1000)], np.bytes_)
    assert names.nbytes <= 32 * len(names)


def test_val_without_class_folders_is_left_out(folder, tmp_path):
    root = write_folder(tmp_path / "flat", val=0)
    (root / "val").mkdir()
    picture(0, (20, 20)).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert imagenet(8, root, cache_bytes=0).test is None


def test_hidden_files_other_files_and_empty_folders_are_left_out(tmp_path):
    root = write_folder(tmp_path / "x")
    for stray in (f"train/{WNIDS[0]}/._a.JPEG", f"train/{WNIDS[0]}/list.txt", "train/a_list.txt"):
        (root / stray).write_bytes(b"no picture")
    (root / "train" / "n00000000").mkdir()
    data = imagenet(8, root, cache_bytes=0)
    assert data.classes == WNIDS
    assert [int(data.train[i]["label"]) for i in (0, 6, 17)] == [0, 1, 2]
    assert len(data.train) == 18


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path / "gone"))
    for path in (None, tmp_path):
        with pytest.raises(InputError, match=r"train/n01440764/\*\.JPEG .*IMAGENET_DIR") as error:
            imagenet(64, path)
        assert "\n" not in str(error.value)
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="no pictures in .*expected class folders"):
        imagenet(64, tmp_path)
    with pytest.raises(InputError, match="size >= 1"):
        imagenet(0, tmp_path)


def test_a_strange_class_or_a_broken_picture_is_named(tmp_path):
    root = write_folder(tmp_path / "x")
    broken = root / "train" / WNIDS[0] / "zz.JPEG"
    broken.write_bytes((root / "train" / WNIDS[0] / f"{WNIDS[0]}_3.JPEG").read_bytes()[:300])
    with pytest.raises(InputError, match=r"cannot read the image .*zz\.JPEG"):
        imagenet(16, root, cache_bytes=0).train[6]
    (root / "val" / "n09999999").mkdir()
    picture(0, (20, 20)).save(root / "val" / "n09999999" / "a.JPEG")
    with pytest.raises(InputError, match="has the class n09999999"):
        imagenet(16, root)


def test_the_environment_says_where_it_is(folder, monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", str(folder))
    assert len(imagenet(8, cache_bytes=0).train) == 18


# Prepared by TFDS ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """A data folder that holds imagenet2012/5.1.0 of the same pictures, in TFDS's two formats: {format: root}."""
    import tensorflow_datasets as tfds

    roots = {}
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(WNIDS)),
            "file_name": tfds.features.Text(),
        }
    )
    for kind in ("array_record", "tfrecord"):
        roots[kind] = tmp_path_factory.mktemp(kind)
        version = roots[kind] / "imagenet2012" / "5.1.0"
        version.mkdir(parents=True)
        splits = []
        for split, name in (("train", "train"), ("val", "validation")):
            records = [
                features.serialize_example({"image": str(path), "label": path.parent.name, "file_name": path.name})
                for path in sorted((folder / split).rglob("*.JPEG"))
            ]
            write_records(version / f"imagenet2012-{name}.{kind}-00000-of-00001", kind, records)
            splits.append({"name": name, "shardLengths": [str(len(records))], "numBytes": str(sum(map(len, records)))})
            splits[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        features.save_config(str(version))
        info = {"name": "imagenet2012", "version": "5.1.0", "fileFormat": kind, "splits": splits}
        (version / "dataset_info.json").write_text(json.dumps(info | {"moduleName": "m", "releaseNotes": {}}))
    return roots


def write_records(path, kind, records):
    if kind == "tfrecord":
        parts = (struct.pack("<QI", len(r), 0) + r + struct.pack("<I", 0) for r in records)
        path.write_bytes(b"".join(parts))
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
@pytest.mark.parametrize("below", ["", "imagenet2012", "imagenet2012/5.1.0"])
def test_tfds_files_give_the_pictures_of_the_folder(folder, prepared, kind, below):
    data, same = imagenet(16, prepared[kind] / below, cache_bytes=0), imagenet(16, folder, cache_bytes=0)
    assert data.classes == same.classes
    assert data.shape == same.shape
    for a, b in ((data.train, same.train), (data.test, same.test)):
        for one, other in zip(examples(a), examples(b), strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            assert one["label"] == other["label"]


def test_the_places_of_records_are_kept_until_a_file_changes(prepared, tmp_path, monkeypatch):
    root = tmp_path / "copy"
    shutil.copytree(prepared["tfrecord"], root)
    first = imagenet(8, root, cache_bytes=0, cache_dir=tmp_path / "kept").train
    index = tfds_without_tf._index
    with monkeypatch.context() as patch:
        patch.setattr(tfds_without_tf, "_index", lambda path: pytest.fail("indexed again"))
        again = imagenet(8, root, cache_bytes=0, cache_dir=tmp_path / "kept").train
    for i in (0, 9, 17):
        np.testing.assert_array_equal(again[i]["image"], first[i]["image"])
    for kept in (tmp_path / "kept").rglob("records-*.npz"):
        kept.write_bytes(kept.read_bytes()[:99])
    counted = []
    monkeypatch.setattr(tfds_without_tf, "_index", lambda path: counted.append(path) or index(path))
    assert len(imagenet(8, root, cache_bytes=0, cache_dir=tmp_path / "kept").train) == 18
    next(root.rglob("*train.tfrecord*")).touch()
    imagenet(8, root, cache_bytes=0, cache_dir=tmp_path / "kept")
    assert len(counted) == 3  # both damaged ones, then the one that was touched
    next(root.rglob("*train.tfrecord*")).unlink()
    with pytest.raises(InputError, match=r"cannot read .*train\.tfrecord"):
        imagenet(8, root, cache_bytes=0, cache_dir=tmp_path / "kept")


def test_tfds_files_are_read_without_tensorflow(prepared):
    code = f"""
import sys
from diffusion_jax.training.sources import imagenet
data = imagenet(8, {str(prepared["array_record"])!r}, cache_bytes=0)
print(data.train[3]["image"].shape, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(8, 8, 3) False"


# Hosts and threads --------------------------------------------------------------------------------------------------


def test_each_host_reads_its_rows(folder):
    data = imagenet(8, folder, cache_bytes=0)
    whole = feed(data.train, 6, 5, threads=2).next(4)
    for rows in (slice(0, 2), slice(2, 6)):
        part = feed(data.train, 6, 5, threads=2, rows=rows)
        mine = part.next(4)
        for name in ("image", "label"):
            np.testing.assert_array_equal(mine[name], whole[name][:, rows])
        part.close()


def test_reading_ahead_ends_and_keeps_its_order():
    it = read_ahead(lambda i: i * i, 3, 9, threads=3)
    assert list(it) == [i * i for i in range(3, 9)]
    it.close()


# The experiment -------------------------------------------------------------------------------------------------------


def test_the_experiment_has_the_papers_numbers():
    experiment = find_experiment("imagenet256_dit_xl2")()
    parameters = jax.eval_shape(experiment.net.init, jax.random.key(0))
    assert round(count(parameters) / 1e6) == 675  # Peebles & Xie 2023, table 4
    assert (experiment.batch, experiment.drop, experiment.sample_steps) == (256, 0.1, 250)
    assert experiment.shape == (32, 32, 4)
    times = np.round(np.asarray(experiment.times(250)) * 1000)
    assert (times[0], times[-2], times[-1], len(times)) == (1000, 1, 0, 251)
    assert set(np.diff(times[:-1])) == {-4, -5}  # evenly: 999 / 249 = 4.01 apart
    shown = experiment.decode(jnp.zeros((1, 32, 32, 4)))
    assert (shown.shape, shown.dtype) == ((1, 32, 32, 3), jnp.uint8)


def test_what_the_experiment_refuses(tmp_path, capfd):
    for words, message in (
        (f"train imagenet256_dit_xl2 latents={tmp_path} runs={tmp_path}", "there are no latents in"),
        ("latents imagenet256_dit_xl2", "needs the argument autoencoder"),
        (f"latents imagenet256_dit_xl2 autoencoder={tmp_path / 'gone.safetensors'}", "no weights at"),
        (f"train imagenet256_dit_xl2 size=100 runs={tmp_path}", "multiple of 16"),
        ("latents digits", "digits does not train on latents"),
    ):
        assert main(words.split()) == 2
        error = capfd.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert main(["latents", "imagenet256_dit_xl2", "help"]) == 0
    assert "mirror=" in capfd.readouterr().out
