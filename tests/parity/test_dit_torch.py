"""Our transformers against PyTorch, on random weights: diffusers' DiT, and a plain transcription of the equations.

The transcription reads the published names, so that the weight tables are tested with it. It follows the papers where
they differ from us in form: positions from a grid of places, rotary positions on pairs of neighbours, attention head
by head.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from diffusion_jax.nets import dit
from diffusion_jax.weights.dit import from_dit, from_sit, to_dit, to_sit

torch.set_num_threads(1)
SIZE, CLASSES, BATCH = (2, 32, 4), 5, 3
DEPTH, WIDTH, HEADS = SIZE
W = dict[str, torch.Tensor]


def random_params(net: Any, seed: int = 0) -> Any:
    """Parameters where nothing is zero or one."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(net.init, jax.random.key(0))
    return jax.tree.map(lambda a: (0.2 * rng.normal(size=a.shape)).astype(np.float32), like)


def inputs(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, *shape)).astype(np.float32)
    return x, rng.uniform(0, 1000, BATCH).astype(np.float32), rng.integers(0, CLASSES + 1, BATCH)


def tensors(state: dict[str, np.ndarray]) -> W:
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def difference(ours: Any, theirs: torch.Tensor) -> float:
    reference = np.moveaxis(theirs.detach().numpy(), 1, -1)
    assert np.std(reference) > 0.05
    return float(np.max(np.abs(np.asarray(ours) - reference)))


# --- the transcription ------------------------------------------------------------------------------------------------


def linear(w: W, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def norm(w: W, name: str, x: torch.Tensor) -> torch.Tensor:
    return rms(x, w[f"{name}.weight"]) if f"{name}.weight" in w else F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotated(z: torch.Tensor, grid: tuple[int, int], before: int) -> torch.Tensor:
    """Turn neighbours (z_2j, z_2j+1) of one head, token by token: by the row in the first half, then by the column."""
    out, d = z.clone(), z.shape[-1]
    for i in range(grid[0] * grid[1]):
        for j in range(d // 2):
            place = i // grid[1] if j < d // 4 else i % grid[1]
            angle = place * 10000.0 ** (-4 * (j % (d // 4)) / d)
            a, b = z[:, before + i, 2 * j], z[:, before + i, 2 * j + 1]
            out[:, before + i, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, before + i, 2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def heads_of(
    w: W, name: str, x: torch.Tensor, place: tuple[tuple[int, int], int] | None
) -> list[tuple[torch.Tensor, ...]]:
    """q, k, v of each head."""
    split = [part.chunk(HEADS, dim=-1) for part in linear(w, f"{name}.qkv", x).chunk(3, dim=-1)]
    result = []
    for q, k, v in zip(*split, strict=True):
        if f"{name}.q_norm.weight" in w:
            q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
        if place is not None:
            q, k = rotated(q, *place), rotated(k, *place)
        result.append((q, k, v))
    return result


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if there is not None:
        scores = scores.masked_fill(~there[:, None, :], -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def mlp(w: W, name: str, x: torch.Tensor) -> torch.Tensor:
    if f"{name}.fc1.weight" in w:
        return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))
    u, v = linear(w, f"{name}.w12", x).chunk(2, dim=-1)
    return linear(w, f"{name}.w3", F.silu(u) * v)


def modulated(w: W, name: str, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return norm(w, name, x) * (1 + scale[:, None]) + shift[:, None]


def finish(w: W, name: str, x: torch.Tensor, y: torch.Tensor, m: tuple, tokens: Any) -> torch.Tensor:
    x = x + m[2][:, None] * linear(w, f"{name}.attn.proj", y)
    if tokens is not None and f"{name}.cross_attn.q.weight" in w:
        context, there = tokens
        q = linear(w, f"{name}.cross_attn.q", F.layer_norm(x, x.shape[-1:], eps=1e-6)).chunk(HEADS, dim=-1)
        k, v = (part.chunk(HEADS, dim=-1) for part in linear(w, f"{name}.cross_attn.kv", context).chunk(2, dim=-1))
        mixed = [softmax_attention(*head, there) for head in zip(q, k, v, strict=True)]
        x = x + linear(w, f"{name}.cross_attn.proj", torch.cat(mixed, dim=-1))
    return x + m[5][:, None] * mlp(w, f"{name}.mlp", modulated(w, f"{name}.norm2", x, m[3], m[4]))


def block(w: W, name: str, x: torch.Tensor, c: torch.Tensor, place: Any, tokens: Any) -> torch.Tensor:
    m = linear(w, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
    heads = heads_of(w, f"{name}.attn", modulated(w, f"{name}.norm1", x, m[0], m[1]), place)
    y = torch.cat([softmax_attention(*head, None) for head in heads], dim=-1)
    return finish(w, name, x, y, m, tokens)


def joint_block(w: W, name: str, x: torch.Tensor, context: torch.Tensor, c: torch.Tensor, there: Any) -> Any:
    streams, modulations = [], []
    for stream, z in (("context_block", context), ("x_block", x)):
        weights = w[f"{name}.{stream}.adaLN_modulation.1.weight"]
        m = linear(w, f"{name}.{stream}.adaLN_modulation.1", F.silu(c)).chunk(len(weights) // WIDTH, dim=1)
        streams.append(heads_of(w, f"{name}.{stream}.attn", modulated(w, f"{name}.{stream}.norm1", z, *m[:2]), None))
        modulations.append(m)
    there = None if there is None else torch.cat([there, torch.ones(x.shape[:2], dtype=torch.bool)], dim=1)
    both = [[torch.cat(pair, dim=1) for pair in zip(*heads, strict=True)] for heads in zip(*streams, strict=True)]
    y = torch.cat([softmax_attention(q, k, v, there) for q, k, v in both], dim=-1)
    m = context.shape[1]
    x = finish(w, f"{name}.x_block", x, y[:, m:], modulations[1], None)
    if len(modulations[0]) == 6:
        context = finish(w, f"{name}.context_block", context, y[:, :m], modulations[0], None)
    return x, context


def embedded(w: W, x: torch.Tensor, p: int) -> torch.Tensor:
    if "x_embedder.proj.weight" in w:
        tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    else:
        tokens = F.conv2d(x, w["x_embedder.proj1.weight"], stride=p)
        tokens = F.conv2d(tokens, w["x_embedder.proj2.weight"], w["x_embedder.proj2.bias"])
    grid, n = tokens.shape[2:], tokens.shape[1]
    rates = 10000.0 ** (-torch.arange(n // 4, dtype=torch.float64) / (n / 4))
    for row in range(grid[0]):
        for column in range(grid[1]):
            parts = [f(place * rates) for place in (column, row) for f in (torch.sin, torch.cos)]
            tokens[:, :, row, column] += torch.cat(parts).float()
    return tokens.flatten(2).transpose(1, 2)


def transcription(
    w: W, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, *, patch: int, rotary: bool = False, start: int = 0,
    tokens: torch.Tensor | None = None, there: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    p, grid = patch, (x.shape[2] // patch, x.shape[3] // patch)
    angles = t[:, None] * (10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)).float()
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    row = w["y_embedder.embedding_table.weight"][y]
    c = linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", features))) + row
    h, context, extra = embedded(w, x, p), None, 0
    if "context_embedder.weight" in w:
        context = w["context_null.weight"][None].expand(len(x), -1, -1)
        if tokens is not None:
            context = torch.cat([context, linear(w, "context_embedder", tokens)], dim=1)
        if there is not None:
            there = torch.cat([torch.ones(len(x), 1, dtype=torch.bool), there], dim=1)
    for i in range(DEPTH):
        if "in_context_posemb" in w and i == start:
            extra = w["in_context_posemb"].shape[1]
            h = torch.cat([row[:, None].expand(-1, extra, -1) + w["in_context_posemb"], h], dim=1)
        if f"blocks.{i}.x_block.attn.qkv.weight" in w:
            h, context = joint_block(w, f"blocks.{i}", h, context, c, there)
        else:
            h = block(w, f"blocks.{i}", h, c, (grid, extra) if rotary else None, (context, there))
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    out = linear(w, "final_layer.linear", modulated(w, "final_layer.norm_final", h[:, extra:], shift, scale))
    out = out.reshape(len(x), *grid, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(len(x), out.shape[-1], *x.shape[2:])


# --- the comparisons --------------------------------------------------------------------------------------------------

KIT = {"norm": "rms", "rotary": True, "qk_norm": True, "swiglu": True, "in_context": (3, 1), "bottleneck": 6}


@pytest.mark.parametrize(
    ("patch", "shape", "options"),
    [(2, (8, 8, 4), {}), (4, (8, 16, 3), {"learned_variance": False}), (2, (4, 8, 3), KIT)],
    ids=["dit", "patch4", "jit"],
)
def test_equal_to_the_transcription(patch, shape, options):
    net = dit(SIZE, patch, shape, classes=CLASSES, **options)
    params = random_params(net)
    x, t, labels = inputs(shape)
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), jnp.asarray(labels, jnp.int32))
    rotary = options.get("rotary", False)
    state = to_dit(params, grid=(shape[0] // patch, shape[1] // patch), rotary=rotary)
    with torch.no_grad():
        theirs = transcription(
            tensors(state), channels_first(x), torch.from_numpy(t), torch.from_numpy(labels), patch=patch,
            rotary=rotary, start=options.get("in_context", (0, 0))[1],
        )  # fmt: skip
    assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("context", ["cross", "joint"])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_equal_to_the_transcription(context, masked):
    net = dit(SIZE, 2, (8, 8, 3), classes=CLASSES, tokens=6, context=context)
    params = random_params(net)
    x, t, labels = inputs((8, 8, 3))
    rng = np.random.default_rng(2)
    tokens, mask = rng.normal(size=(BATCH, 4, 6)).astype(np.float32), rng.uniform(size=(BATCH, 4)) < 0.5
    mask[0] = False
    cond = {"label": jnp.asarray(labels, jnp.int32), "tokens": tokens} | ({"tokens_mask": mask} if masked else {})
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), cond)
    with torch.no_grad():
        theirs = transcription(
            tensors(to_dit(params)), channels_first(x), torch.from_numpy(t), torch.from_numpy(labels), patch=2,
            tokens=torch.from_numpy(tokens), there=torch.from_numpy(mask) if masked else None,
        )  # fmt: skip
    assert difference(ours, theirs) < 1e-4


def to_diffusers(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The published names in diffusers' words; it has a copy of the embeddings of t and label in every block."""
    found = {}
    ends = {"final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
    embeddings = {
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder.embedding_table": "class_embedder.embedding_table",
    }
    inner = {
        "adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }  # fmt: skip
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem == "x_embedder.proj":
            found[f"pos_embed.proj.{leaf}"] = value
        elif stem in ends:
            found[f"{ends[stem]}.{leaf}"] = value
        elif stem in embeddings:
            for i in range(DEPTH):
                found[f"transformer_blocks.{i}.norm1.emb.{embeddings[stem]}.{leaf}"] = value
        elif stem.startswith("blocks."):
            _, i, part = stem.split(".", 2)
            if part == "attn.qkv":
                for letter, piece in zip("qkv", np.split(value, 3), strict=True):
                    found[f"transformer_blocks.{i}.attn1.to_{letter}.{leaf}"] = piece
            else:
                found[f"transformer_blocks.{i}.{inner[part]}.{leaf}"] = value
    return found


def test_equal_to_diffusers():
    """With DiT's frequencies and constant: diffusers spaces the frequencies by 1/127 and adds 1e-5 to variances."""
    net = dit(SIZE, 2, (8, 8, 4), classes=CLASSES)
    params = random_params(net)
    x, t, labels = inputs((8, 8, 4))
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8, num_layers=DEPTH,
        sample_size=8, patch_size=2, num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for peer in model.transformer_blocks:
        peer.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    model.load_state_dict(tensors(to_diffusers(to_dit(params, grid=(4, 4)))), strict=True)
    with torch.no_grad():
        theirs = model(channels_first(x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), jnp.asarray(labels, jnp.int32))
    assert difference(ours, theirs) < 1e-4


def test_published_sit():
    """Its outputs for a variance are there, are not used, and come back as zeros."""
    wide, net = (dit(SIZE, 2, (8, 8, 4), classes=CLASSES, learned_variance=two) for two in (True, False))
    state = to_dit(random_params(wide))
    params = from_sit(state, jax.eval_shape(net.init, jax.random.key(0)))
    x, t, labels = inputs((8, 8, 4))
    with torch.no_grad():
        theirs = transcription(
            tensors(state), channels_first(x), torch.from_numpy(t), torch.from_numpy(labels), patch=2
        ).chunk(2, dim=1)[0]
    ours = jax.jit(net.apply)(params, x, jnp.asarray(t), jnp.asarray(labels, jnp.int32))
    assert difference(ours, theirs) < 1e-4
    back = to_sit(params)
    changed = {name for name in state if not np.array_equal(back[name], state[name])}
    assert back.keys() == state.keys() and changed == {"final_layer.linear.weight", "final_layer.linear.bias"}


def test_names_are_the_published_ones():
    """The keys of a published DiT and JiT, written out."""
    block = [
        "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    ]  # fmt: skip
    ends = [
        "pos_embed", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "final_layer.linear.weight",
        "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
    ]  # fmt: skip
    old = ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    new = ["mlp.w12.weight", "mlp.w12.bias", "mlp.w3.weight", "mlp.w3.bias", "attn.q_norm.weight", "attn.k_norm.weight"]
    new += ["norm1.weight", "norm2.weight"]
    dit_names = {*ends, "x_embedder.proj.weight", "x_embedder.proj.bias"}
    jit_names = {*ends, "x_embedder.proj1.weight", "x_embedder.proj2.weight", "x_embedder.proj2.bias"}
    jit_names |= {"in_context_posemb", "final_layer.norm_final.weight"}
    for net, rotary, outside, inside in (
        (dit(SIZE, 2, (8, 8, 4)), False, dit_names, [*block, *old]),
        (dit(SIZE, 8, (8, 8, 3), **KIT), True, jit_names, [*block, *new]),
    ):
        like = jax.eval_shape(net.init, jax.random.key(0))
        params = jax.tree.map(lambda a: np.broadcast_to(np.float32(0), a.shape), like)
        state = to_dit(params, rotary=rotary)
        depth = len(like["blocks"])
        assert state.keys() == outside | {f"blocks.{i}.{name}" for i in range(depth) for name in inside}
        assert jax.tree.map(np.shape, from_dit(state, like, rotary=rotary)) == jax.tree.map(np.shape, like)
