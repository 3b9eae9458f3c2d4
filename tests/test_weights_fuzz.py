"""Damaged and hostile files: whatever the bytes, a reader gives arrays or one line that says what is wrong.

Never another exception, never a wait, never more memory than the file could hold.
"""

from __future__ import annotations

import json
import pickle
import resource
import struct
import time
import zipfile
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
import sd_shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import write_folder
from test_torch_files import ORDERED, REBUILD, Call, New, Stored, Symbol, archive, file_of, pickled, stream, tensor

from diffusion_jax.text import tokenizer
from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, ldm_configs, lora, model_folder, single_file, textual_inversion, torch_files

laws = settings(deadline=None, max_examples=60, derandomize=True)
STATE = {"a.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.arange(4, dtype=np.float32)}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FILES = st.from_regex(model_folder.WEIGHTS, fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8,
)  # fmt: skip


@contextmanager
def bounded(seconds: float = 5.0, megabytes: int = 200):
    """A reader may take neither long nor much memory that it touches."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000 * megabytes


def tried(read, *arguments, **named):
    """What a reader gives, or None where it says in one printable line what is wrong."""
    with bounded():
        try:
            return read(*arguments, **named)
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 1500
            return None


def arrays_within(found, n_bytes):
    assert found is None or sum(a.nbytes for a in found.values()) <= 16 * n_bytes


# safetensors ----------------------------------------------------------------------------------------------------------


def safetensors(header, body: bytes = bytes(28), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype="F16", shape=(2, 3), offsets=(0, 12)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry(), "b": entry("F32", (4,), (12, 28))}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "m.safetensors"


def read_bytes(path, raw: bytes):
    path.write_bytes(raw)
    found = tried(files.load, path)
    arrays_within(found, len(raw))
    assert tried(files.metadata, path) is not None or found is None
    return found


def test_the_file_that_is_damaged_below_is_a_good_one(path):
    assert {n: v.shape for n, v in read_bytes(path, safetensors(GOOD)).items()} == {"a": (2, 3), "b": (4,)}


REFUSED = {
    "nothing": b"",
    "a length alone": struct.pack("<Q", 10),
    "a length too short": safetensors(GOOD, length=5),
    "a length too long": safetensors(GOOD, length=10**6),
    "a length of no memory": safetensors(GOOD, length=2**62),
    "a negative length": safetensors(GOOD, length=2**64 - 1),
    "an empty header": safetensors(b""),
    "no JSON": safetensors(b"{]"),
    "no mapping": safetensors([1]),
    "no text": safetensors(b'{"\xff": 1}'),
    "a deep header": safetensors(b"[" * 10**5),
    "a body too short": safetensors(GOOD, bytes(27)),
    "a body too long": safetensors(GOOD, bytes(29)),
    "overlapping parts": safetensors({"a": entry(), "b": entry("F32", (4,), (8, 24))}, bytes(24)),
    "the same part twice": safetensors({"a": entry(), "b": entry()}, bytes(12)),
    "a hole": safetensors({"a": entry(), "b": entry("F32", (4,), (16, 32))}, bytes(32)),
    "offsets turned round": safetensors({"a": entry(offsets=(12, 0))}, bytes(12)),
    "offsets outside": safetensors({"a": entry(offsets=(0, 2**60))}),
    "a shape of another size": safetensors({"a": entry(shape=(2, 4))}, bytes(12)),
    "a shape of no memory": safetensors({"a": entry(shape=(2**40, 2**40))}, bytes(12)),
    "a shape that overflows": safetensors({"a": entry(shape=(2**32, 2**32, 0))}, bytes(12)),
    "a negative shape": safetensors({"a": entry(shape=(-2, -3))}, bytes(12)),
    "a type of no name": safetensors({"a": entry("F99")}, bytes(12)),
    "a type in small letters": safetensors({"a": entry("f16")}, bytes(12)),
    "no type": safetensors({"a": {"shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12)),
    "metadata that is no text": safetensors({"__metadata__": {"a": 1}, **GOOD}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_structure_is_refused(path, name):
    assert read_bytes(path, REFUSED[name]) is None


def test_a_name_given_twice_is_refused_or_one_of_them(path):
    twice = b'{"a": %s, "a": %s}' % tuple(json.dumps(entry(offsets=o)).encode() for o in ((0, 12), (12, 24)))
    found = read_bytes(path, safetensors(twice, bytes(24)))
    assert found is None or list(found) == ["a"]


def test_every_boundary(path):
    raw = safetensors({"__metadata__": {"format": "pt"}, **GOOD})
    for end in range(len(raw)):
        assert read_bytes(path, raw[:end]) is None
    for place in range(len(raw) - 28):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            read_bytes(path, raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])


@laws
@given(name=NAMES, key=st.sampled_from(["dtype", "shape", "data_offsets", "more"]), value=VALUES)
def test_any_value_in_a_header(path, name, key, value):
    read_bytes(path, safetensors({**GOOD, "a": {**entry(), key: value}}))
    read_bytes(path, safetensors({**GOOD, name: value}))
    read_bytes(path, safetensors({**GOOD, "__metadata__": {name: value}}))


@laws
@given(st.binary(max_size=60))
def test_any_bytes(path, raw):
    read_bytes(path, raw)
    read_bytes(path, safetensors(raw))


# Indices and folders --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    hub = sd_shapes.model("sd1")
    model = model_folder.Folder({}, ldm_configs.configs("sd1", hub), hub, {})
    return model_folder.save(tmp_path_factory.mktemp("folder") / "m", model)


@laws
@given(
    value=VALUES, name=NAMES, file=NAMES | st.sampled_from(["../a", "/etc/passwd", "a.safetensors", "\0.safetensors"])
)
def test_any_index(tmp_path_factory, value, name, file):
    where = tmp_path_factory.getbasetemp() / "index"
    where.mkdir(exist_ok=True)
    files.save(where / "a.safetensors", STATE)
    index = where / "m.safetensors.index.json"
    for content in (value, {"weight_map": value}, {"weight_map": {name: file}}, {"weight_map": {name: value}}):
        index.write_text(json.dumps(content))
        tried(files.load, index)
        tried(files.metadata, index)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, "a.safetensors")}))
    sd_shapes.same_bits(files.load(index), STATE)
    index.write_bytes(b"[" * 10**5)
    assert tried(files.load, index) is None


@pytest.mark.slow
@laws
@given(
    value=VALUES, name=st.sampled_from(["_class_name", "unet", "vae", "text_encoder", "scheduler", "tokenizer", "x"])
)
def test_any_settings_of_a_folder(folder, value, name):
    for file in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        good = (folder / file).read_text()
        try:
            for content in (value, {**json.loads(good), name: value}):
                (folder / file).write_text(json.dumps(content))
                tried(model_folder.load, folder)
        finally:
            (folder / file).write_text(good)


@laws
@given(
    names=st.lists(st.from_regex(model_folder.WEIGHTS, fullmatch=True) | NAMES, max_size=6), variant=st.none() | NAMES
)
def test_any_file_names(names, variant):
    chosen = model_folder.choose(names, variant)
    assert set(chosen) <= set(names)
    tried(model_folder.wanted, [f"unet/{name}" for name in names], variant)


@laws
@given(value=VALUES,
       name=st.sampled_from(["vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]),
       key=st.sampled_from(["pad_token", "model_max_length", "eos_token", "x"]))  # fmt: skip
def test_any_settings_of_a_tokenizer(tmp_path_factory, value, name, key):
    where = write_folder(tmp_path_factory.getbasetemp() / "tokenizer")
    for content in (value, {key: value}):
        (where / name).write_text(json.dumps(content))
        found = tried(tokenizer.load, where)
        assert found is None or tokenizer.tokenize(found, ["cat"]).shape == (1, found.length)
    (where / name).unlink()


# Torch's own files ----------------------------------------------------------------------------------------------------


def torch_bytes(path, raw: bytes):
    path.write_bytes(raw)
    found = tried(torch_files.load, path)
    arrays_within(found, len(raw))
    return found


def zipped(program: bytes) -> bytes:
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as members:
        members.writestr("w/data.pkl", program)
    return data.getvalue()


def doubled(depth: int, end: bytes) -> bytes:
    """((.., ..), (.., ..)): as many tuples as there are bits, and 2 ** depth in print."""
    return b"\x80\x02)" + b"".join(b"q%c" % 0 + b"h\x00\x86" for _ in range(depth)) + end + b"."


ENDS = {
    "a name": b"X\x01\x00\x00\x00a\x93", "a call": b")R", "an object": b")\x81", "a key": b"}q\x01h\x00K\x01s",
    "an id": b"Q", "a set": b"c__builtin__\nset\nq\x01]h\x00a\x85R", "items": b"}q\x01(h\x00K\x01u",
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_tuples_that_double_do_not_take_for_ever(tmp_path, end):
    assert torch_bytes(tmp_path / "w.pt", zipped(doubled(60, ENDS[end]))) is None


def test_tensors_of_tuples_that_double_do_not_take_for_ever(tmp_path):
    pairs: tuple = (1,)
    for _ in range(60):
        pairs = (pairs, pairs)
    array = np.zeros(2, np.float32)
    for changes in (
        {"shape": pairs, "strides": pairs},
        {"strides": pairs, "shape": (1, 1)},
        {"offset": pairs},
        {"storage": pairs},
    ):
        raw = archive({"a": tensor(array, "0", False, **changes)}, {"0": array})
        assert torch_bytes(tmp_path / "w.pt", raw) is None


def test_dicts_that_double_do_not_take_for_ever(tmp_path):
    shared: dict = {"x": 1}
    for _ in range(8):
        shared = {f"{i}": shared for i in range(60)}
    assert torch_bytes(tmp_path / "w.pt", archive(shared, {})) is None
    deep: dict = {}
    for _ in range(100):
        deep = {"a": deep}
    assert torch_bytes(tmp_path / "w.pt", archive(deep, {})) is None


def test_tensors_that_share_do_not_fill_memory(tmp_path):
    array = np.zeros(2**18, np.float32)
    content = {f"{i}": tensor(array, "0", False) for i in range(500)}
    assert torch_bytes(tmp_path / "w.pt", archive(content, {"0": array})) is None
    assert len(torch_bytes(tmp_path / "w.pt", archive(dict(list(content.items())[:4]), {"0": array}))) == 4


def test_members_that_lie_over_each_other_do_not_fill_memory(tmp_path):
    array = np.zeros(2**12, np.uint8)
    raw = archive({f"{i}": tensor(array, f"{i}", False) for i in range(40)}, {f"{i}": array for i in range(40)})
    place = raw.index(b"PK\x01\x02")
    names = [raw.find(b"w/data/0", place)]
    assert names[0] > place
    short = raw[: place // 2] + raw[place:]
    assert torch_bytes(tmp_path / "w.pt", short) is None


def test_keys_of_a_stream_that_are_no_names(tmp_path):
    raw = stream({"a": tensor(np.zeros(1, np.float32), "0", True)}, {"0": np.zeros(1, np.float32)})
    keys = pickled(["0"])
    at = raw.rindex(keys)
    for other in (pickled([("0",)]), doubled(60, b"\x85"), pickled("0"), pickled([["0"]])):
        assert torch_bytes(tmp_path / "w.pt", raw[:at] + other + raw[at + len(keys) :]) is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["archive", "stream"])
def test_every_byte_of_torchs_files(tmp_path, layout):
    raw = file_of(layout, STATE)
    rng = np.random.default_rng(0)
    for place in range(len(raw)):
        flip = int(rng.integers(1, 256))
        torch_bytes(tmp_path / "w.pt", raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])


OPERATIONS = st.sampled_from(
    [b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"\x94", b"N",
     b"s", b"u", b"a", b"e", b"R", b"b", b"Q", b"\x81", b"\x93", b"K\x05", b"X\x01\x00\x00\x00a", b"\x88",
     b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
     b"c__builtin__\nset\n", b"ctorch.nn.modules.container\nParameterDict\n", b"X\x07\x00\x00\x00storage",
     b"J\xff\xff\xff\xff", b"G" + b"\x7f" * 8]
)  # fmt: skip


@settings(deadline=None, max_examples=600, derandomize=True)
@given(st.lists(OPERATIONS, max_size=30))
def test_any_program_of_known_operations(tmp_path_factory, operations):
    torch_bytes(tmp_path_factory.getbasetemp() / "program.pt", zipped(b"\x80\x02" + b"".join(operations) + b"."))


def test_huge_lengths_in_a_program(tmp_path):
    for op in (b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f",
               b"\x95" + b"\xff" * 8, b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff"):  # fmt: skip
        assert torch_bytes(tmp_path / "w.pt", zipped(b"\x80\x02" + op + b".")) is None
        assert torch_bytes(tmp_path / "w.pt", b"\x80\x02" + op + b".") is None


def test_modules_of_parameters_hold_only_those(tmp_path):
    module = Symbol("torch.nn.modules.container", "ParameterDict")
    for wrong in (New(module, 1), New(ORDERED), New(Symbol("torch", "FloatStorage")), New(REBUILD)):
        assert torch_bytes(tmp_path / "w.pt", archive({"a": wrong}, {})) is None
    array = np.zeros(2, np.float32)
    good = New(module, state={"_parameters": {"a": tensor(array, "0", False)}, "hooks": Call(ORDERED)})
    assert list(torch_bytes(tmp_path / "w.pt", archive({"m": good}, {"0": array}))) == ["m.a"]
    assert torch_bytes(tmp_path / "w.pt", archive({"m": Stored(array, "0", False)}, {"0": array})) is None
    assert torch_bytes(tmp_path / "w.pt", pickle.dumps({"a": 1})) is None


# Layouts --------------------------------------------------------------------------------------------------------------

SINGLE = {family: single_file.write(single_file.of(family, sd_shapes.model(family))) for family in sd_shapes.TINY}
SHAPES = st.lists(st.integers(0, 3), max_size=5).map(tuple)


@st.composite
def damaged(draw, state):
    """Weights with some missing, some of other shapes, some of other names."""
    names, found = sorted(state), dict(state)
    for name in draw(st.lists(st.sampled_from(names), max_size=3)):
        kind = draw(st.sampled_from(["gone", "shape", "name", "number", "all"]))
        value = found.pop(name, np.zeros(()))
        if kind == "shape":
            found[name] = np.zeros(draw(SHAPES), np.float32)
        elif kind == "name":
            found[draw(NAMES) + name[draw(st.integers(0, len(name))) :]] = value
        elif kind == "number":
            found[name.replace(draw(st.sampled_from("0123")), str(draw(st.integers(0, 10**9))))] = value
        elif kind == "all":
            prefix = name.split(".")[0]
            found = {n: v for n, v in found.items() if not n.startswith(prefix)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", SINGLE)
def test_damaged_single_files(family):
    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(damaged(SINGLE[family]))
    def law(state):
        found = tried(single_file.read, state)
        if found is not None:
            sd_shapes.same_bits(tried(single_file.write, found) or state, state)
            tried(ldm_configs.configs, found.family, found.hub, found.extras)

    law()


@laws
@given(names=st.lists(NAMES, max_size=6), shape=SHAPES)
def test_any_names_are_no_checkpoint(names, shape):
    state = {name: np.zeros(shape, np.float32) for name in names}
    assert tried(single_file.read, state) is None
    assert tried(lora.read, state, sd_shapes.model("sd1")) is None
    tried(textual_inversion.read, state, name="x")


@laws
@given(value=st.sampled_from([np.nan, np.inf, -1.0, 2.0**70]),
       dtype=st.sampled_from([np.float32, bool, np.int64]), shape=SHAPES,
       name=st.sampled_from(["global_step", "alphas_cumprod", "v_pred", "ztsnr"]))  # fmt: skip
def test_any_extras(value, dtype, shape, name):
    hub = sd_shapes.model("sd2")
    with np.errstate(all="ignore"):
        extras = {name: np.full(shape, value).astype(dtype)}
        tried(ldm_configs.configs, "sd2", {"unet": hub["unet"]}, extras)


HUB = sd_shapes.model("sdxl")


def update(weight: np.ndarray) -> lora.Update:
    up = np.ones((len(weight), 2, *(1 for _ in weight.shape[2:])), np.float32)
    return lora.Update(np.ones((2, *weight.shape[1:]), np.float32), up, None, 1.0)


UPDATES = {
    component: {n: update(w) for n, w in list(HUB[component].items())[:40] if w.ndim in (2, 4) and "embedding" not in n}
    for component in ("unet", "text_encoder")
}


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_damaged_loras(naming):
    whole, header = lora.write(UPDATES, naming)  # type: ignore[arg-type]

    @laws
    @given(damaged(whole), VALUES)
    def law(state, value):
        found = tried(lora.read, state, HUB, header)
        if found is not None:
            assert tried(lora.merge, HUB, [(found, 0.5)]) is not None
        tried(lora.read, whole, HUB, json.dumps({"unet.lora_alpha": value, "unet.alpha_pattern": value}))
        tried(lora.read, whole, HUB, json.dumps(value))

    law()
