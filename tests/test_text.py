"""CLIP's tokenizer and prompts, with a small vocabulary in every form that users have."""

from __future__ import annotations

import gzip
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.text import prompts, tokenizer
from diffusion_jax.text.prompts import Piece, Prompt, parse
from diffusion_jax.typing import InputError

laws = settings(deadline=None, max_examples=200, derandomize=True)
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "a t</w>"]


def archive(folder):
    path = folder / tokenizer.ARCHIVE
    path.write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tokenizer.load(archive(tmp_path_factory.mktemp("vocabulary")))


def write_folder(folder, *, special=None, config=None):
    """Layout (2) with the same vocabulary."""
    folder.mkdir(exist_ok=True)
    vocab, merges = tokenizer.vocabulary(archive(folder))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


# The tokenizer -------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_merges(clip):
    a, t_end = 64, 256 + 83  # the bytes of "!" to "~" come first, then others, and again as ends of words
    cat, dog, at = (512 + i for i in (1, 3, 4))
    assert clip.encode("Cat  DOG\n") == [cat, dog]
    assert clip.encode("at") == [at]
    assert clip.encode("a") == [256 + a]
    assert clip.encode("act") == [a, 66, t_end]
    assert clip.encode("cat's") == [cat, 6, 256 + 82]  # 's is a word
    assert clip.encode("42") == [256 + 19, 256 + 17]  # digits are words
    assert (clip.bos, clip.eos, clip.pad, clip.size) == (517, 518, 518, 519)


@laws
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=30))
def test_every_text_has_tokens_of_its_bytes(clip, text):
    ids = clip.encode(text)
    assert all(0 <= i < clip.bos for i in ids)
    back = clip.decode(ids)
    assert clip.encode(back) == ids or "\ufffd" in back
    assert clip.encode(f" \t{text}\n ") == ids


def test_every_form_of_the_vocabulary_reads_the_same(clip, tmp_path):
    from tokenizers import processors

    folder = write_folder(tmp_path / "tokenizer")
    library = tokenizer._read_folder(folder)
    library.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.BOS} $A {tokenizer.EOS}",
        special_tokens=[(tokenizer.BOS, clip.bos), (tokenizer.EOS, clip.eos)],
    )
    library.enable_truncation(4)
    library.enable_padding()
    (tmp_path / "whole").mkdir()
    library.save(str(tmp_path / "whole" / "tokenizer.json"))
    for form in (folder, tmp_path / "whole"):
        other = tokenizer.load(form)
        for text in ("a cat, a dog and a cat's hat", "Ünïcode 日本 ❤️", "", "<|endoftext|>"):
            assert other.encode(text) == clip.encode(text)
        assert other[2:] == clip[2:]


@pytest.mark.parametrize(
    ("special", "config", "pad"),
    [
        (None, None, 518),
        ({"pad_token": "!"}, {"pad_token": "<|endoftext|>"}, 0),  # as Stable Diffusion 2 has it
        (None, {"pad_token": "!", "model_max_length": 77}, 0),  # XL's second
        ({"pad_token": {"content": "<|endoftext|>", "lstrip": False}}, {"pad_token": None}, 518),  # 1
        (None, {"pad_token": {"content": "!", "__type": "AddedToken"}, "added_tokens_decoder": {"0": {}}}, 0),
    ],
)
def test_pads_are_the_folders(tmp_path, special, config, pad):
    folder = write_folder(tmp_path, special=special, config=config)
    assert tokenizer.load(folder).pad == pad
    other = tokenizer.load(folder, pad="!")
    assert other.pad == 0 and other.encode("cat!!") == [513, 0, 0]  # as transformers has it


def test_added_tokens_of_a_folder(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": 520, "<a>": 519}))
    assert tokenizer.load(folder).encode("cat <a> <b>") == [513, 519, 520]


def test_rows_have_bos_eos_and_pads(clip):
    rows = tokenizer.tokenize(clip._replace(pad=0), ["cat dog", ""], 6)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[517, 513, 515, 518, 0, 0], [517, 518, 0, 0, 0, 0]]
    assert tokenizer.tokenize(clip, ["cat"]).shape == (1, 77)
    assert tokenizer.tokenize(clip, []).shape == (0, 77)
    with pytest.warns(UserWarning, match="longer than 2 tokens and was cut before: cat dog$"):
        assert tokenizer.tokenize(clip, ["dog cat cat dog"], 4).tolist() == [[517, 515, 513, 518]]


def test_placeholders_become_their_ids(clip):
    known = tokenizer.with_words(clip, {"<it>": [600, 601], "easy": [602]})
    assert known.encode("cat <IT>dog Easy") == [513, 600, 601, 515, 602]
    assert known.encode("easycat uneasy") == clip.encode("easycat uneasy")
    assert known.size == 603 and clip.encode("easy") != [602]
    both = tokenizer.with_words(known, {"<it>er": [700]})
    assert both.encode("<it>er <it>") == [700, 600, 601]
    assert both.words == {"<it>": (600, 601), "easy": (602,), "<it>er": (700,)}
    for bad in ({" ": [1]}, {"x": []}):
        with pytest.raises(InputError, match="a placeholder"):
            tokenizer.with_words(clip, bad)


def test_an_installed_open_clip_is_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    archive(package)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert tokenizer.load().encode("cat") == [513]
    (package / tokenizer.ARCHIVE).unlink()
    with pytest.raises(InputError, match="pip install --no-deps open_clip_torch"):
        tokenizer.load()


def test_what_is_no_tokenizer_is_told_in_a_line(tmp_path):
    def refused(path, match):
        with pytest.raises(InputError, match=match) as error:
            tokenizer.load(path)
        assert "\n" not in str(error.value)

    refused(tmp_path / "gone", "there is no tokenizer at")
    refused(tmp_path, "holds no tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, "is damaged")
    good = archive(tmp_path).read_bytes()
    for damaged in (good[:-9], good[:3], b"", gzip.compress(b"\xff\xfe\n\xff"), gzip.compress(b"a\nb\n")):
        (tmp_path / "x.gz").write_bytes(damaged)
        refused(tmp_path / "x.gz", "damaged or not CLIP's")
    folder = write_folder(tmp_path / "folder", special={"pad_token": "gone"})
    refused(folder, "no token 'gone'")
    (folder / "special_tokens_map.json").write_text("[]")
    refused(folder, "holds no names")
    (folder / "special_tokens_map.json").write_text("{}")
    for name, content in (
        ("vocab.json", "{"),
        ("vocab.json", "[1]"),
        ("merges.txt", "a b c\n"),
        ("merges.txt", "q q\n"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        refused(folder, "is damaged")
        (folder / name).write_text(before)


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [[]]),
        ("a cat", [[("a cat", 1)]]),
        ("(a) [b] (c:1.3)", [[("a", 1.1), ("b", 1 / 1.1), ("c", 1.3)]]),
        ("((a) b:2)", [[("a", 2.2), (" b", 2)]]),
        ("[a (b: .5)]", [[("a ", 1 / 1.1), ("b", 0.5 / 1.1)]]),
        (r"\(a\) \[b\] \\ \c", [[(r"(a) [b] \ \c", 1)]]),
        ("a) b] :1.5) :)", [[("a) b] :1.5) :)", 1)]]),
        ("a (b [c", [[("a ", 1), ("b ", 1.1), ("c", 1.0)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        ("(a:-1) (b:+2)", [[("a", -1), ("b", 2)]]),
        ("(()) [] (:3)", [[]]),
        ("a BREAK b BREAKS", [[("a ", 1)], [(" b BREAKS", 1)]]),
        ("(a BREAK b:2) BREAK", [[("a ", 2)], [(" b", 2)]]),
        ("at 10:30 (now)", [[("at 10:30 ", 1), ("now", 1.1)]]),
    ],
)
def test_the_notation_of_weights(text, parts):
    found = parse(text)
    assert [[p.text for p in part] for part in found] == [[t for t, _ in part] for part in parts]
    for part, expected in zip(found, parts, strict=True):
        np.testing.assert_allclose([p.weight for p in part], [w for _, w in expected], rtol=1e-12)


@laws
@given(st.text("ab(:)[]\\1.2 ", max_size=40))
def test_any_text_is_a_prompt(text):
    (pieces,) = parse(text)
    assert all(np.isfinite(p.weight) and p.text.strip() for p in pieces)


@laws
@given(st.text("ab ,()[]\\", max_size=30))
def test_an_escaped_text_is_itself(text):
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert parse(escaped) == [[Piece(text, 1.0)] if text.strip() else []]


def test_a_prompt_is_a_row_of_ids_and_weights(clip):
    found = prompts.encode(clip, "cat (dog:1.5)", length=6)
    assert found.ids.tolist() == [[517, 513, 515, 518, 518, 518]]
    assert found.weights.tolist() == [[1, 1, 1.5, 1, 1, 1]]
    assert (found.ids.dtype, found.weights.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(prompts.encode(clip, "cat dog").ids, tokenizer.tokenize(clip, ["cat dog"]))
    np.testing.assert_array_equal(prompts.encode(clip, "", max_chunks=1).ids, tokenizer.tokenize(clip, [""]))
    plain = prompts.encode(clip, "(cat)", weighted=False)
    assert plain.ids[0, 1:4].tolist() == clip.encode("(cat)") and (plain.weights == 1).all()


@laws
@given(st.lists(st.sampled_from(["cat", "dog", "at"]), max_size=20), st.integers(3, 9))
def test_chunks_hold_all_tokens_in_their_order(clip, words, length):
    found = prompts.encode(clip, " ".join(words), length=length)
    assert found.ids.shape == (max(1, -(-len(words) // (length - 2))), length)
    assert (found.ids[:, 0] == clip.bos).all() and (found.ids[:, 1:] == clip.eos).any(axis=1).all()
    assert [i for i in found.ids.ravel() if i < clip.bos] == clip.encode(" ".join(words))


def test_breaks_and_placeholders_begin_chunks(clip):
    known = tokenizer.with_words(clip, {"<it>": [600, 601]})
    rows = prompts.encode(known, "cat BREAK dog cat <it>", length=5).ids
    assert rows.tolist() == [[517, 513, 518, 518, 518], [517, 515, 513, 518, 518], [517, 600, 601, 518, 518]]
    with pytest.raises(InputError, match="placeholder of 2 vectors does not fit"):
        prompts.encode(known, "<it>", length=3)


def test_too_long_without_chunks_names_what_is_too_much(clip):
    with pytest.raises(InputError, match="longer than 4 tokens: .* beyond is: dog cat$"):
        prompts.encode(clip, "cat cat cat cat dog cat", max_chunks=2, length=4)
    assert prompts.encode(clip, "cat cat cat cat", max_chunks=2, length=4).ids.shape == (2, 4)


def test_prompts_together_have_the_same_chunks(clip):
    long, short = prompts.encode(clip, "cat (dog:2) cat", length=4), prompts.encode(clip, "", length=4)
    both = prompts.together(clip, [long, short])
    assert both.ids.shape == both.weights.shape == (2, 2, 4)
    np.testing.assert_array_equal(both.ids[0], long.ids)
    np.testing.assert_array_equal(both.weights[0], long.weights)
    np.testing.assert_array_equal(both.ids[1], np.repeat(short.ids, 2, 0))
    assert isinstance(both, Prompt) and (both.weights[1] == 1).all()


def test_weights_scale_and_keep_the_mean():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(1, 1, (2, 5, 3)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.5, 2, (2, 5)), jnp.float32)
    out = prompts.weighted(hidden, weights)
    np.testing.assert_allclose(out.mean((1, 2)), hidden.mean((1, 2)), rtol=1e-5)
    ratio = out / hidden / weights[..., None]
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-5)  # one number each
    np.testing.assert_array_equal(out[1:], prompts.weighted(hidden[1:], weights[1:]))  # neighbours do not matter
    np.testing.assert_array_equal(prompts.weighted(hidden, jnp.ones((2, 5))), hidden)
    assert prompts.weighted(hidden.astype(jnp.bfloat16), weights).dtype == jnp.bfloat16
    plain = prompts.weighted(hidden, weights, keep_mean=False)
    np.testing.assert_allclose(plain, hidden * weights[..., None], rtol=1e-6)
    assert not prompts.weighted(hidden, jnp.zeros((2, 5))).any()  # no 0 / 0
