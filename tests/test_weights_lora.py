"""LoRA and textual inversion: every naming reads the same, merging is the formula, and what does not fit is named."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import sd_shapes
from sd_shapes import same_bits

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, lora, textual_inversion
from diffusion_jax.weights.lora import Update, merge, read, write
from diffusion_jax.weights.textual_inversion import Embedding

HUB = sd_shapes.model("sdxl")
UNET, TEXT = "unet", "text_encoder"
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.1.attn2"
LINEAR, OUT, CONV = f"{ATTENTION}.to_k.weight", f"{ATTENTION}.to_out.0.weight", "up_blocks.0.resnets.1.conv1.weight"
POINT, QUERY = "mid_block.resnets.0.conv1.weight", "text_model.encoder.layers.1.self_attn.q_proj.weight"


def update(weight: np.ndarray, rank: int = 2, alpha: float | None = 1.0, seed: int = 0, dtype=np.float32) -> Update:
    """A random difference to a weight."""
    rng = np.random.default_rng(seed)
    down = rng.normal(size=(rank, *weight.shape[1:])).astype(dtype)
    up = rng.normal(size=(weight.shape[0], rank, *(1 for _ in weight.shape[2:]))).astype(dtype)
    return Update(down, up, None, alpha)


def example(alpha: float | None = 1.0, dtype=np.float32) -> lora.Lora:
    names = {UNET: (LINEAR, OUT, CONV, POINT), TEXT: (QUERY,), "text_encoder_2": (QUERY,)}
    return {
        component: {name: update(HUB[component][name], 2 + i, alpha, i, dtype) for i, name in enumerate(inside)}
        for component, inside in names.items()
    }


def same(a: lora.Lora, b: lora.Lora):
    assert {c: set(u) for c, u in a.items()} == {c: set(u) for c, u in b.items()}
    for component, updates in a.items():
        for name, x in updates.items():
            y = b[component][name]
            assert x.alpha == y.alpha
            same_bits({"down": x.down, "up": x.up}, {"down": y.down, "up": y.up})


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_there_and_back_bit_for_bit(tmp_path, naming, dtype):
    written = example(0.5, dtype)
    path = lora.save(tmp_path / "x.safetensors", written, naming)
    same(lora.load(path, HUB), written)
    again = lora.save(tmp_path / "y.safetensors", lora.load(path, HUB), naming)
    assert files.load(path).keys() == files.load(again).keys()
    without = example(None)
    path = lora.save(tmp_path / "z.safetensors", without, naming)
    found = lora.load(path, HUB)
    for component, updates in without.items():
        for name, x in updates.items():
            y, shape = found[component][name], HUB[component][name].shape
            np.testing.assert_array_equal(lora.difference(y, shape), lora.difference(x, shape))


def test_names_are_those_of_the_trainers():
    kohya, header = write(example(), "kohya")
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= kohya.keys()
    assert "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in kohya and not header
    one = write({TEXT: example()[TEXT]}, "kohya")[0]
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha" in one
    assert any(name.startswith("lora_te1_") for name in write({TEXT: example()[TEXT]}, "kohya", xl=True)[0])
    plain, header = write(example(), "diffusers")
    assert f"unet.{LINEAR.removesuffix('.weight')}.lora_A.weight" in plain and "alpha" not in " ".join(plain)
    assert json.loads(header)["unet.r"] == 2 and json.loads(header)["text_encoder.lora_alpha"] == 1.0


def kohya_names(stem_of):
    """The example under names made by `stem_of(component, module)`."""
    state = {}
    for component, updates in example().items():
        for name, x in updates.items():
            stem = stem_of(component, name.removesuffix(".weight"))
            state |= {
                f"{stem}.lora_down.weight": x.down,
                f"{stem}.lora_up.weight": x.up,
                f"{stem}.alpha": np.float32(1),
            }
    return {name: np.asarray(value) for name, value in state.items()}


ORIGINAL = {  # by hand, from the order of blocks in the original U-Net with two blocks a level
    ATTENTION: "input_blocks_4_1_transformer_blocks_1_attn2",
    "up_blocks.0.resnets.1.conv1": "output_blocks_1_0_in_layers_2",
    "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
}  # fmt: skip
TE = {TEXT: "lora_te1_", "text_encoder_2": "lora_te2_"}


def original(component: str, module: str) -> str:
    if component != UNET:
        return TE[component] + module.replace(".", "_")
    for here, there in ORIGINAL.items():
        if module.startswith(here):
            return f"lora_unet_{there}{module.removeprefix(here).replace('.', '_')}"
    raise AssertionError(module)


@pytest.mark.parametrize(
    "stem_of",
    [
        original,
        lambda c, m: TE.get(c, "lora_unet_") + m.replace(".", "_"),
        lambda c, m: f"{c}.{m}",
        lambda c, m: f"{c}.base_model.model.{m}",
    ],
    ids=["original", "kohya", "dotted", "peft"],
)
def test_other_names_read_the_same(stem_of):
    same(read(kohya_names(stem_of), HUB), example())


def test_older_names_of_diffusers_read_the_same():
    wanted = {UNET: {n: u for n, u in example()[UNET].items() if n in (LINEAR, OUT)}, TEXT: example()[TEXT]}
    wanted = {c: {n: u._replace(alpha=None) for n, u in us.items()} for c, us in wanted.items()}
    k, out, q = (wanted[c][n] for c, n in ((UNET, LINEAR), (UNET, OUT), (TEXT, QUERY)))
    layer = f"{TEXT}.text_model.encoder.layers.1.self_attn"
    forms = [
        {"unet.{a}.processor.to_k_lora": k, "unet.{a}.processor.to_out_lora": out, "{l}.to_q_lora": q},
        {"{a}.processor.to_k_lora": k, "{a}.processor.to_out_lora": out, "{l}.q_proj.lora_linear_layer": q},
        {"unet.{a}.to_k.lora": k, "unet.{a}.to_out.0.lora": out, "{l}.q_proj.lora": q},
    ]
    for form in forms:
        stems = {stem.format(a=ATTENTION, l=layer): x for stem, x in form.items()}
        state = {f"{stem}.down.weight": x.down for stem, x in stems.items()}
        state |= {f"{stem}.up.weight": x.up for stem, x in stems.items()}
        same(read(state, HUB), wanted)
    peft = {f"unet.{ATTENTION}.to_k.lora_{n}.default.weight": v for n, v in (("A", k.down), ("B", k.up))}
    same(read(peft, HUB), {UNET: {LINEAR: k}})


def test_alphas_of_a_header():
    state, _ = write({UNET: {LINEAR: update(HUB[UNET][LINEAR], 4, None), CONV: update(HUB[UNET][CONV], 2, None)}})
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"resnets.1.conv1": 3}}

    def alphas(**more):
        found = read(state, HUB, json.dumps(settings | more))[UNET]
        return found[LINEAR].alpha, found[CONV].alpha

    assert alphas() == (8, 3)
    assert alphas(**{"unet.use_rslora": True}) == (16, 3 * 2**0.5)
    assert read(state, HUB)[UNET][LINEAR].alpha is None
    for bad in ("{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": NaN}'):
        with pytest.raises(InputError, match="lora_adapter_metadata is damaged"):
            read(state, HUB, bad)


# Merging --------------------------------------------------------------------------------------------------------------


def test_merging_is_the_formula():
    first, second = example(1.0), {UNET: {LINEAR: update(HUB[UNET][LINEAR], 5, None, 9)}}
    merged = merge(HUB, [(first, 0.7), (second, -0.2)])
    for component, weights in HUB.items():
        for name, weight in weights.items():
            expected = weight.astype(np.float64)
            for found, scale in ((first, 0.7), (second, -0.2)):
                if name in found.get(component, {}):
                    x = found[component][name]
                    factor = scale * (1.0 if x.alpha is None else x.alpha / len(x.down))
                    up = x.up.reshape(len(x.up), -1).astype(np.float64)
                    expected = expected + factor * np.tensordot(up, x.down.astype(np.float64), 1)
            np.testing.assert_allclose(merged[component][name], expected, rtol=1e-5, atol=1e-5)
    untouched = {n: v for n, v in HUB[UNET].items() if n not in first[UNET]}
    assert all(merged[UNET][n] is v for n, v in untouched.items())
    same_bits(HUB[UNET], sd_shapes.model("sdxl")[UNET])  # the model is not changed


def test_merging_nothing_changes_nothing_and_unmerging_takes_it_out():
    same_bits(merge(HUB, [])[UNET], HUB[UNET])
    same_bits(merge(HUB, [(example(), 0.0)])[UNET], HUB[UNET])
    loras = [(example(), 0.7), (example(), 0.1)]
    back = lora.unmerge(merge(HUB, loras), loras)
    np.testing.assert_allclose(back[UNET][CONV], HUB[UNET][CONV], atol=2e-6)
    half = {c: {n: v.astype(np.float16) for n, v in w.items()} for c, w in HUB.items()}
    assert merge(half, loras)[UNET][CONV].dtype == np.float16


def test_a_part_in_the_middle():
    weight = HUB[UNET][CONV]
    rng = np.random.default_rng(0)
    shapes = (2, weight.shape[1], 1, 1), (2, 2, 3, 3), (weight.shape[0], 2, 1, 1)
    down, mid, up = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    x = Update(down, up, mid, 4.0)
    wanted = 2 * np.einsum("or,rshw,si->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    np.testing.assert_allclose(lora.difference(x, weight.shape), wanted, rtol=1e-5, atol=1e-6)
    found = read(write({UNET: {CONV: x}}, "kohya")[0], HUB)[UNET][CONV]
    assert found.mid is not None
    same_bits({"mid": found.mid}, {"mid": mid})
    with pytest.raises(InputError, match="use kohya's"):
        write({UNET: {CONV: x}})


def test_linear_parts_for_convolutions_of_width_one():
    hub = sd_shapes.model("sd1")
    name = "down_blocks.0.attentions.0.proj_in.weight"
    assert hub[UNET][name].shape == (8, 8, 1, 1)
    x = update(np.zeros((8, 8)))
    found = read(write({UNET: {name: x}}, "kohya")[0], hub)
    np.testing.assert_array_equal(merge(hub, [(found, 1.0)])[UNET][name][:, :, 0, 0],
                                  hub[UNET][name][:, :, 0, 0] + lora.difference(x, (8, 8)))  # fmt: skip


# Errors ---------------------------------------------------------------------------------------------------------------


def refused(match, state, hub=HUB):
    with pytest.raises(InputError, match=match) as error:
        read(state, hub)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named(tmp_path):
    state, _ = write(example(), "kohya")
    refused(
        "has no place for lora_unet_gone.lora_down.weight",
        {**state, "lora_unet_gone.lora_down.weight": np.ones((2, 2))},
    )
    refused("has no place for b, c", {**state, "b": np.ones(2), "c": np.ones(2)})
    refused("has no place for nothing", {})
    stem = next(name for name in state if name.endswith(".lora_up.weight")).removesuffix(".lora_up.weight")
    refused("lacks its up", {n: v for n, v in state.items() if n != f"{stem}.lora_up.weight"})
    refused("lacks its down and up", {f"{stem}.alpha": np.ones(())})
    refused("alpha of .* is not a number", {**state, f"{stem}.alpha": np.full((), np.nan)})
    refused("alpha of .* is not a number", {**state, f"{stem}.alpha": np.ones(2)})
    refused("two weights for down", {**state, f"unet.{LINEAR.removesuffix('.weight')}.lora_A.weight": np.ones((2, 20))})
    refused("has no place for", state, sd_shapes.model("sd1"))
    other = {**HUB, UNET: {**HUB[UNET], LINEAR: np.zeros((8, 21))}}
    refused(r"for another model: .*to_k.weight is \(8, 21\) here", state, other)
    for shape in ((), (3,), (2, 20, 3, 3), (0, 20)):
        refused("for another model", {**state, f"{stem}.lora_down.weight": np.zeros(shape)})
    with pytest.raises(InputError, match="for another model: this one has no text_encoder_2"):
        merge(sd_shapes.model("sd1"), [({"text_encoder_2": example()["text_encoder_2"]}, 1.0)])
    with pytest.raises(InputError, match="naming='x' is not one of kohya, diffusers"):
        write(example(), "x")  # type: ignore[arg-type]
    path = files.save(tmp_path / "x.safetensors", {"a.lora_down.weight": np.ones((2, 2))})
    with pytest.raises(InputError, match="x.safetensors: it does not fit the model"):
        lora.load(path, HUB)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("lora_unet_x.dora_scale", "DoRA"), ("unet.x.lora_magnitude_vector", "DoRA"), ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"), ("lora_unet_x.diff_b", "not of low rank"),
        ("transformer.x.lora_A.weight", "diffusion transformer"),
        ("lora_unet_double_blocks_0_x.lora_down.weight", "diffusion transformer"),
    ],
)  # fmt: skip
def test_relatives_are_named(name, match):
    refused(match, {name: np.ones((2, 2))})


# Textual inversion ----------------------------------------------------------------------------------------------------

VECTORS = np.arange(16, dtype=np.float32).reshape(2, 8)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"<cat>": VECTORS}, "<cat>"),
        ({"string_to_param.*": VECTORS, "string_to_token.*": np.int64(265)}, "file"),
        ({"emb_params": VECTORS}, "file"),
    ],
)
def test_every_form_of_an_embedding(state, word):
    found = textual_inversion.read(state, name="file")
    assert found.word == word
    same_bits(found.vectors, {"text_encoder": VECTORS})
    assert textual_inversion.read(state, "mine", "file").word == "mine"


def test_embeddings_in_files(tmp_path):
    from test_torch_files import ORDERED, Call, New, Symbol, archive, file_of, tensor

    two = Embedding("two", {"text_encoder": VECTORS, "text_encoder_2": np.ones((2, 12), np.float16)})
    for embedding in (two, Embedding("<cat>", {"text_encoder": VECTORS})):
        found = textual_inversion.load(textual_inversion.save(tmp_path / "two.safetensors", embedding))
        assert found.word == embedding.word
        same_bits(found.vectors, embedding.vectors)
    (tmp_path / "cat.bin").write_bytes(file_of("archive", {"<cat>": VECTORS[0]}))
    same_bits(textual_inversion.load(tmp_path / "cat.bin").vectors, {"text_encoder": VECTORS[:1]})
    # As AUTOMATIC1111 writes them, and as the authors did, who kept a module in the file.
    module = Symbol("torch.nn.modules.container", "ParameterDict")
    vectors = tensor(VECTORS, "0", False)
    parameter = Call(Symbol("torch._utils", "_rebuild_parameter"), vectors, True, Call(ORDERED))

    kept = New(module, state={"training": True, "_parameters": Call(ORDERED, [["*", parameter]])})
    for content in ({"*": vectors}, kept):
        whole = {"string_to_token": {"*": 265}, "string_to_param": content, "name": "x", "step": 7}
        (tmp_path / "style.pt").write_bytes(archive(whole, {"0": VECTORS}))
        found = textual_inversion.load(tmp_path / "style.pt")
        assert found.word == "style"
        same_bits(found.vectors, {"text_encoder": VECTORS})


def test_rows_are_added_behind_the_table_and_words_get_their_ids():
    weights = HUB["text_encoder"]
    cat, dog = (Embedding(w, {"text_encoder": v}) for w, v in (("<cat>", VECTORS), ("<dog>", VECTORS[:1] + 100)))
    grown = textual_inversion.added(weights, [cat, dog])
    table = grown[textual_inversion.TABLE]
    assert table.shape == (23, 8) and weights[textual_inversion.TABLE].shape == (20, 8)
    words = textual_inversion.places(20, [cat, dog])
    assert words == {"<cat>": (20, 21), "<dog>": (22,)}
    np.testing.assert_array_equal(table[list(words["<cat>"])], VECTORS)
    np.testing.assert_array_equal(table[:20], weights[textual_inversion.TABLE])
    half = {n: v.astype(np.float16) for n, v in weights.items()}
    assert textual_inversion.added(half, [cat])[textual_inversion.TABLE].dtype == np.float16
    with pytest.raises(InputError, match="two embeddings for the word <CAT>"):
        textual_inversion.places(20, [cat, cat._replace(word="<CAT>")])
    with pytest.raises(InputError, match="for another model: 8 numbers a vector, not 12"):
        textual_inversion.added(HUB["text_encoder_2"], [Embedding("x", {"t": VECTORS})], "t")
    with pytest.raises(InputError, match="no vectors for text_encoder_2"):
        textual_inversion.added(HUB["text_encoder_2"], [cat], "text_encoder_2")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({}, "holds 0 arrays"),
        ({"a": VECTORS, "b": VECTORS}, "holds 2 arrays"),
        ({"a.weight": VECTORS}, "which is no embedding"),
        ({"a": np.zeros((2, 2, 2))}, "which is no embedding"),
        ({"emb_params": np.zeros((0, 8))}, "not an array of shape"),
        ({"emb_params": np.zeros((2, 2, 2))}, "not an array of shape"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:1]}, "different numbers"),
        ({"emb_params": VECTORS}, "has no name"),
    ],
)
def test_what_is_no_embedding(state, match):
    with pytest.raises(InputError, match=match):
        textual_inversion.read(state)
