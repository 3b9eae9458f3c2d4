"""Safetensors in and out, and the table of the autoencoder's weights."""

import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.nets.autoencoder import kl_autoencoder
from diffusion_jax.typing import InputError
from diffusion_jax.weights import files
from diffusion_jax.weights.autoencoder import from_diffusers, load, to_diffusers

laws = settings(deadline=None, max_examples=150, derandomize=True)
STATE = {
    "half.weight": np.arange(12, dtype=np.float16).reshape(3, 4).T,
    "brain.weight": np.arange(-3, 3).astype(ml_dtypes.bfloat16),
    "full.weight": np.array([[np.nan, -0.0, np.inf, 1e-42]], np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.full((), 7, np.int64),
    "mask": np.array([True, False]),
}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes()


# Files ---------------------------------------------------------------------------------------------------------------


def test_every_type_comes_back_bit_for_bit(tmp_path):
    path = files.save(tmp_path / "new" / "model.safetensors", STATE, {"made by": "a test"})
    same_bits(files.load(path), STATE)
    same_bits(files.load(tmp_path / "new"), STATE)
    assert files.metadata(path)["made by"] == "a test"
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_jax_arrays_are_written_as_they_are(tmp_path):
    path = files.save(tmp_path / "a.safetensors", {"w": jnp.ones((2, 3), jnp.bfloat16)})
    assert files.load(path)["w"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("part_bytes", [1, 30, 60])
def test_parts_with_an_index(tmp_path, part_bytes):
    index = files.save(tmp_path / "model.safetensors", STATE, part_bytes=part_bytes)
    assert index.name == "model.safetensors.index.json"
    parts = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    for path in (index, tmp_path):
        same_bits(files.load(path), STATE)
    whole = json.loads(index.read_text())
    assert whole["weight_map"].keys() == STATE.keys()
    assert whole["metadata"]["total_size"] == sum(a.nbytes for a in STATE.values())
    assert files.metadata(index)["format"] == "pt"


def test_wrong_parts_are_named(tmp_path):
    index = files.save(tmp_path / "m.safetensors", STATE, part_bytes=1)
    good = json.loads(index.read_text())

    def with_map(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError) as error:
            files.load(index)
        assert "\n" not in str(error.value)
        return str(error.value)

    names = good["weight_map"]
    assert "lacks more" in with_map({**names, "more": names["scalar"]})
    two = files.save(tmp_path / "two.safetensors", {"a": np.ones(2), "b": np.ones(2)})
    assert "holds, against its index, b" in with_map({"a": two.name})
    assert "not a .safetensors file beside it" in with_map({"x": "../outside.safetensors"})
    assert "is missing" in with_map({"x": "gone.safetensors"})
    assert "weight_map is empty" in with_map({})
    index.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        files.load(index)


def test_what_is_no_model(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="pickles, are not read"):
        files.load(tmp_path / "model.ckpt")
    with pytest.raises(InputError, match="no weights at"):
        files.load(tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match="holds none"):
        files.load(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        files.save(tmp_path / name, STATE)
    with pytest.raises(InputError, match=r"holds a\.safetensors, b\.safetensors"):
        files.load(tmp_path)
    with pytest.raises(InputError, match="ends in .safetensors"):
        files.save(tmp_path / "a.bin", STATE)
    with pytest.raises(InputError, match="the weight x is not an array"):
        files.save(tmp_path / "c.safetensors", {"x": object()})


def test_a_type_without_a_numpy_name_is_told(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "f8.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(InputError, match="w is of the type F8_E4M3"):
        files.load(tmp_path / "f8.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    return path, files.save(path, STATE).read_bytes()


def test_every_truncation_is_refused(whole):
    path, raw = whole
    for end in range(0, len(raw), 7):
        path.write_bytes(raw[:end])
        with pytest.raises(InputError, match="damaged or not a safetensors file"):
            files.load(path)


@laws
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=12))
def test_damaged_headers_never_do_more_than_fail(whole, place, noise):
    path, raw = whole
    (length,) = struct.unpack("<Q", raw[:8])
    place %= 8 + length
    path.write_bytes(raw[:place] + noise + raw[place + len(noise) :])
    try:
        found = files.load(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert all(isinstance(a, np.ndarray) for a in found.values())


# The table -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    autoencoder = kl_autoencoder(widths=(8, 16), blocks=1, latent=2, groups=4)
    return autoencoder, autoencoder.init(jax.random.key(0))


@pytest.mark.slow
def test_round_trip_through_a_file(tiny, tmp_path):
    autoencoder, params = tiny
    back = load(files.save(tmp_path / "vae.safetensors", to_diffusers(params)), autoencoder)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_are_diffusers(tiny):
    state = to_diffusers(tiny[1])
    # As in the published stabilityai/sd-vae-ft-mse, with fewer levels and blocks.
    for name, shape in {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "encoder.down_blocks.0.downsamplers.0.conv.bias": (8,),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (16, 8, 1, 1),
        "encoder.mid_block.attentions.0.to_q.weight": (16, 16),
        "encoder.mid_block.attentions.0.group_norm.weight": (16,),
        "encoder.mid_block.attentions.0.to_out.0.bias": (16,),
        "encoder.conv_norm_out.weight": (16,),
        "encoder.conv_out.weight": (4, 16, 3, 3),
        "quant_conv.weight": (4, 4, 1, 1),
        "post_quant_conv.bias": (2,),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": (16, 16, 3, 3),
        "decoder.up_blocks.1.resnets.1.norm2.bias": (8,),
    }.items():
        assert state[name].shape == shape
    assert "encoder.down_blocks.1.downsamplers.0.conv.weight" not in state


def test_old_attention_names_read_the_same(tiny):
    params = tiny[1]
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in to_diffusers(params).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = value
    assert "decoder.mid_block.attentions.0.query.weight" in renamed
    jax.tree.map(np.testing.assert_array_equal, from_diffusers(renamed, params), params)


def test_total_or_an_error(tiny, tmp_path):
    autoencoder, params = tiny
    state = to_diffusers(params)
    less = {name: value for name, value in state.items() if name != "quant_conv.bias"}
    for changed, message in (
        (less, "missing: quant_conv.bias"),
        ({**state, "loss.logvar": np.zeros(())}, "left over: loss.logvar"),
        ({**state, "quant_conv.bias": np.zeros(5, np.float32)}, "shape of quant_conv.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            from_diffusers(changed, params)
        path = files.save(tmp_path / "changed.safetensors", changed)
        with pytest.raises(InputError, match=f"does not hold this autoencoder: {message}") as error:
            load(path, autoencoder)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="without a name"):
        to_diffusers({"quant_conv": {"gain": np.zeros(3)}})
