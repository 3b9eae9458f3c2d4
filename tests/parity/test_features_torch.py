"""Our feature networks equal independent ones in PyTorch: torch-fidelity, transformers, pytorch-fid's preprocessing.

torch-fidelity's graph of InceptionV3 is imported from its own file: its package asks for torchvision, which the CPU
build of torch does not go with, and this file does not need it. pytorch-fid's network does; it is the same one with the
same names (torch-fidelity's is adapted from it), so that what is tested of it is its preprocessing, in four lines.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import TOKENS, write_tokenizer

from diffusion_jax.evaluation.features import clip, dinov2, inception, net
from diffusion_jax.evaluation.features.resize import resize
from diffusion_jax.nets import count
from diffusion_jax.nets.clip import clip_text, clip_vision
from diffusion_jax.typing import InputError
from diffusion_jax.weights import torch_files
from diffusion_jax.weights.inception import to_torch

torch.set_num_threads(1)


def pictures(b: int, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Noise and a ramp: edges and slopes."""
    noise = np.random.default_rng(seed).integers(0, 256, (b, h, w, 3))
    ramp = np.arange(w)[None, None, :, None] * 255 // max(w - 1, 1)
    return np.where(np.arange(b)[:, None, None, None] % 2, noise, ramp).astype(np.uint8)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights, also those that usually start at one or zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.2 if p.ndim < 2 else 0.02) * torch.randn_like(p))
    return model.eval()


# InceptionV3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's module of InceptionV3, without its package's __init__, which needs torchvision."""
    spec = importlib.machinery.PathFinder.find_spec("torch_fidelity")
    assert spec is not None and spec.submodule_search_locations
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def random_inception() -> dict[str, torch.Tensor]:
    """Weights for which activations neither vanish nor explode over the depth: He's variance, and gains near one."""
    like = jax.eval_shape(inception.inception_v3().init, jax.random.key(0))
    shapes = to_torch(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like))
    torch.manual_seed(0)
    made = {}
    for name, value in shapes.items():
        noise = torch.randn(value.shape)
        if noise.ndim > 1:
            made[name] = noise * (2 / noise[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            made[name] = 0.75 + 0.5 * torch.rand(value.shape)
        else:
            made[name] = 0.2 * noise
    return made


@pytest.fixture(scope="module")
def inceptions(fidelity, tmp_path_factory):
    """The peer and our parameters, from one file; that the peer takes it proves the names."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception(), path, _use_new_zipfile_serialization=False)  # as the published files are
    model = fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    loaded = inception.inception_v3().load(path)
    assert loaded.sha256 == net.sha256(path)
    return model, loaded.params


def peer_features(model, x: torch.Tensor, method: str) -> dict[str, np.ndarray]:
    spatial = []
    hook = model.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: spatial.append(out))
    own = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    original = own.interpolate_bilinear_2d_like_tensorflow1x
    if method == "pytorch_fid":  # ToTensor, F.interpolate, 2 x - 1; its network takes over from there
        ready = 2 * F.interpolate(x.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1
        own.interpolate_bilinear_2d_like_tensorflow1x = lambda *_, **__: 128 * ready + 128
    try:
        with torch.no_grad():
            pooled, logits = model(x)
    finally:
        hook.remove()
        own.interpolate_bilinear_2d_like_tensorflow1x = original
    # ADM's reader: NHWC, the first 7 channels, flattened.
    flat = spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(len(x), -1)
    return {
        "pooled": pooled.numpy(), "probabilities": torch.softmax(logits, 1).numpy(), "spatial": flat.numpy(),
    }  # fmt: skip


@pytest.mark.parametrize("numerics", ["tensorflow", "pytorch_fid"])
def test_inception_equals(inceptions, numerics):
    model, params = inceptions
    images = pictures(2, 32, 32)
    ours = inception.inception_v3(numerics)
    features = jax.jit(ours.apply)(params, ours.prepare(images))
    reference = peer_features(model, nchw(images), numerics)
    assert features.keys() == reference.keys()
    assert features["spatial"].shape == (2, 2023)
    for name, value in reference.items():
        assert value.std() > 1e-2 * np.abs(value).max()
        np.testing.assert_allclose(features[name], value, atol=1e-4 * min(1, value.max()), rtol=0, err_msg=name)


def test_the_numerics_differ():
    images = pictures(2, 32, 32)
    a, b = (inception.preprocess(jnp.asarray(images), n) for n in ("tensorflow", "pytorch_fid"))
    assert np.abs(a - b).max() > 0.05


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (299, 299), (320, 400)], ids=str)
def test_inception_preprocessing(fidelity, size):
    images = pictures(2, *size)
    x = nchw(images).float()
    tf1 = fidelity.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    fid = F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False)
    for numerics, reference in (("tensorflow", (tf1 - 128) / 128), ("pytorch_fid", 2 * fid - 1)):
        ours = inception.preprocess(jnp.asarray(images), numerics)
        # torch may fuse the place's product and sum: its last digit, at 300 pixels, is 3e-5 of a step of 1.
        np.testing.assert_allclose(ours, np.moveaxis(reference.numpy(), 1, -1), atol=6e-5)


# Resizes -------------------------------------------------------------------------------------------------------------

TORCH = {
    "bilinear": {"mode": "bilinear"}, "bicubic": {"mode": "bicubic"},
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(8, 12, 5, 30), (32, 32, 56, 56), (50, 40, 14, 14), (7, 7, 7, 9)], ids=str)
@pytest.mark.parametrize("method", TORCH)
def test_resize_is_torchs(method, sizes):
    h, w, *out = sizes
    x = np.random.default_rng(0).uniform(0, 255, (2, h, w, 3)).astype(np.float32)
    reference = F.interpolate(nchw(x), size=tuple(out), align_corners=False, **TORCH[method])
    np.testing.assert_allclose(
        resize(jnp.asarray(x), tuple(out), method), np.moveaxis(reference.numpy(), 1, -1), atol=2e-3
    )


# CLIP ----------------------------------------------------------------------------------------------------------------

TINY_CLIP = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 7, "projection_dim": 12}  # fmt: skip


def tiny_tower():
    return clip_vision(size=28, patch=7, width=16, depth=2, heads=2, mlp=40, n_out=12)


def test_clip_equals(tmp_path):
    model = shaken(CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_CLIP)))
    model.save_pretrained(tmp_path)
    ours = clip.clip_features("tiny", tiny_tower(), 28, "cmmd")
    loaded = ours.load(tmp_path)
    assert loaded.sha256 == net.sha256(tmp_path / "model.safetensors")
    images = pictures(3, 40, 28)
    ready = ours.prepare(images)
    square = [Image.fromarray(image).crop((0, 6, 28, 34)) for image in images]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(ready, square, strict=True))
    x = (nchw(ready).float() / 255 - torch.tensor(clip.MEAN)[:, None, None]) / torch.tensor(clip.DEVIATION)[
        :, None, None
    ]
    with torch.no_grad():
        reference = model(pixel_values=x).image_embeds.numpy()
    assert reference.std() > 0.05
    np.testing.assert_allclose(jax.jit(ours.apply)(loaded.params, ready)["pooled"], reference, atol=1e-4, rtol=1e-4)


def test_the_whole_clip_is_read_too(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(text_config={**text, "projection_dim": 12}, vision_config=TINY_CLIP, projection_dim=12)
    )
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    params = clip.clip_features("tiny", tiny_tower(), 28, "cmmd").load(tmp_path / "pytorch_model.bin").params
    reference = model.state_dict()["vision_model.encoder.layers.1.mlp.fc1.weight"].numpy()
    np.testing.assert_array_equal(params["vision_model"]["encoder"]["layers"]["1"]["mlp"]["fc1"]["kernel"], reference.T)


def test_texts_equal_in_a_file_of_the_whole_clip(tmp_path):
    """Ids by our tokenizer from the folder's files, embeddings by the text tower; the pictures' tower is left out."""
    write_tokenizer(tmp_path)
    words = len(TOKENS)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "projection_dim": 12, "vocab_size": words, "eos_token_id": words - 1}  # fmt: skip
    model = shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=TINY_CLIP, projection_dim=12)))
    model.save_pretrained(tmp_path)
    texts = ["a red apple", "", "two words"]
    tower = clip_text(width=16, depth=2, heads=2, mlp=24, vocab=words, n_out=12, eos=words - 1)
    found = clip.clip_texts(tmp_path, texts, encoder=tower)
    ids = CLIPTokenizer.from_pretrained(str(tmp_path))(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        reference = model.get_text_features(input_ids=ids["input_ids"])
    reference = getattr(reference, "pooler_output", reference).numpy()
    assert reference.std() > 0.05
    np.testing.assert_allclose(found, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [224, 336])
def test_full_clip_has_as_many_parameters(size):
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=size,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    like = jax.eval_shape(clip_vision(size=size).init, jax.random.key(0))
    assert count(like) == sum(p.numel() for p in model.parameters())


# DINOv2 --------------------------------------------------------------------------------------------------------------

TINY_DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 3, "image_size": 70,
             "patch_size": 14}  # fmt: skip


def tiny_dino(extra: float):
    return dinov2.dinov2_net(learned=5, width=16, depth=2, heads=2, mlp=48, extra=extra)


def reference_input(images: np.ndarray, how: str, size: int) -> torch.Tensor:
    """dgm-eval's and EDM2's ways to the network's input."""
    if how == "pillow":
        resized = [np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images]
        x = nchw(np.stack(resized)).float() / 255
    else:
        x = F.interpolate(nchw(images).float(), size=(size, size), mode="bicubic", antialias=True) / 255
    return (x - torch.tensor(dinov2.MEAN)[:, None, None]) / torch.tensor(dinov2.DEVIATION)[:, None, None]


@pytest.mark.parametrize("how", ["pillow", "torch"])
@pytest.mark.parametrize("extra", [dinov2.PUBLISHED, dinov2.TRANSFORMERS])
def test_dinov2_equals(tmp_path, how, extra, monkeypatch):
    model = shaken(Dinov2Model(Dinov2Config(**TINY_DINO)))
    model.save_pretrained(tmp_path)
    ours = dinov2.dinov2_features("tiny", tiny_dino(extra), 42, how)
    params, images = ours.load(tmp_path).params, pictures(3, 32, 24)
    if extra:  # Meta's code interpolates the places by a scale factor, to the 3 x 3 patches of 42 pixels
        whole = model.embeddings.position_embeddings.detach()
        grid = whole[:, 1:].reshape(1, 5, 5, -1).permute(0, 3, 1, 2)
        scaled = F.interpolate(grid, scale_factor=((3 + extra) / 5,) * 2, mode="bicubic")
        assert scaled.shape[2:] == (3, 3)
        places = torch.cat([whole[:, :1], scaled.permute(0, 2, 3, 1).reshape(1, 9, -1)], 1)
        monkeypatch.setattr(model.embeddings, "interpolate_pos_encoding", lambda *_: places)
    with torch.no_grad():
        reference = model(pixel_values=reference_input(images, how, 42)).last_hidden_state[:, 0].numpy()
    features = jax.jit(ours.apply)(params, ours.prepare(images))
    np.testing.assert_allclose(features["pooled"], reference, atol=1e-4, rtol=1e-4)


def test_metas_names(tmp_path):
    model = shaken(Dinov2Model(Dinov2Config(**TINY_DINO)))
    model.save_pretrained(tmp_path)
    ours = dinov2.dinov2_features("tiny", tiny_dino(0.1), 42, "torch")
    params = ours.load(tmp_path).params
    torch.save(as_meta_writes(model.state_dict()), tmp_path / "tiny_pretrain.pth")
    jax.tree.map(np.testing.assert_array_equal, ours.load(tmp_path / "tiny_pretrain.pth").params, params)
    with pytest.raises(InputError, match="does not hold the picture tower of tiny: left over: blocks.0"):
        clip.clip_features("tiny", tiny_tower(), 28, "cmmd").load(tmp_path / "tiny_pretrain.pth")


def as_meta_writes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of `dinov2_vits14_pretrain.pth` and its like."""
    made, qkv = {}, {}
    for name, value in state.items():
        name = name.replace("encoder.layer.", "blocks.").replace("lambda1", "gamma").replace("layer_scale", "ls")
        name = name.replace("attention.o_proj", "attn.proj").replace("layernorm", "norm")
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.position_embeddings", "pos_embed").replace("embeddings.", "")
        if "_proj." in name:
            block, rest = name.split(".attention.")
            qkv.setdefault(f"{block}.attn.qkv.{rest.split('.')[1]}", {})[rest[0]] = value
        else:
            made[name] = value
    return made | {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in qkv.items()}


def test_full_dinov2_has_as_many_parameters():
    config = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)
    with torch.device("meta"):
        model = Dinov2Model(config)
    like = jax.eval_shape(dinov2.dinov2_net().init, jax.random.key(0))
    assert count(like) == sum(p.numel() for n, p in model.named_parameters() if "mask_token" not in n)


# Files ---------------------------------------------------------------------------------------------------------------

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
         torch.uint8, torch.bool]  # fmt: skip


@pytest.mark.parametrize("new", [True, False], ids=["archive", "stream"])
def test_torchs_files(tmp_path, new):
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    state = {f"k{i}": (10 * torch.randn(3, 2)).to(kind) for i, kind in enumerate(KINDS)}
    state |= {"turned": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(7), "none": torch.zeros(0, 3)}
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3)).state_dict()
    path = tmp_path / "w.pth"
    torch.save({"model": model, "epoch": 3, "note": "x", "rest": state}, path, _use_new_zipfile_serialization=new)
    found = torch_files.load(path)
    expected = {f"model.{k}": v for k, v in model.items()} | {f"rest.{k}": v for k, v in state.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = value.detach().contiguous()
        assert found[name].shape == tuple(value.shape), name
        assert found[name].tobytes() == bytes(value.reshape(-1).view(torch.uint8).numpy()), name


@pytest.mark.parametrize("new", [True, False], ids=["archive", "stream"])
def test_whole_modules_are_refused_by_name(tmp_path, new):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        torch_files.load(tmp_path / "m.pt")


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "s.pt")
    with pytest.raises(InputError, match="TorchScript"):
        torch_files.load(tmp_path / "s.pt")
