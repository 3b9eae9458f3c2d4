"""Whole pipelines of 50 steps, from the same noise, against diffusers': latents to 1e-4, pictures to 1/255.

The models are written by diffusers and transformers, tiny and of random weights, and read from their files here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_models import CONTROLNET, SCHEDULER, TEXT, TEXT_2, UNET, UNETS, VAE, write_tokenizer  # noqa: E402

from diffusion_jax import ddim  # noqa: E402
from diffusion_jax.generating.loading import load_model, read_files, with_parts  # noqa: E402
from diffusion_jax.generating.prompts import read_prompts, with_sizes  # noqa: E402
from diffusion_jax.systems import stable_diffusion as sd  # noqa: E402

torch.set_num_threads(1)
STEPS, GUIDANCE, SIZE = 50, 5.0, (16, 24)
PROMPT, NEGATIVE = "a red cat", "a dog"
NO_PARTS = {"vae": "", "controlnet": "", "lora": (), "embedding": (), "tokenizer": ""}
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((2, 8, 12, 4)).astype(np.float32)
IMAGE = RNG.uniform(-1, 1, (1, *SIZE, 3)).astype(np.float32)
MASK = np.zeros((1, *SIZE, 1), np.float32)
MASK[:, 4:12, 6:20] = 1


def randomize(module, seed):
    """Weights none of which is at its usual start, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.2
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def clip(config, cls):
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    return cls(transformers.CLIPTextConfig(**known, bos_token_id=config["vocab_size"] - 2))


def made(kind: str, folder: Path):
    """The pipeline's components by diffusers and transformers, and a folder that they were saved to."""
    ids = write_tokenizer(folder / "ids")
    words = transformers.CLIPTokenizer.from_pretrained(str(ids))
    plain = {k: v for k, v in (UNET | UNETS[kind]).items() if k != "_class_name"}
    plain["up_block_types"] = [name.replace("Down", "Up") for name in plain["down_block_types"][::-1]]
    vae = {k: v for k, v in VAE.items() if k != "_class_name"}
    unet = randomize(diffusers.UNet2DConditionModel(**plain), 0)
    coder = randomize(
        diffusers.AutoencoderKL(
            **vae, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2
        ), 1,
    )  # fmt: skip
    settings = {k: v for k, v in SCHEDULER.items() if k != "_class_name"}
    settings |= {"prediction_type": "v_prediction"} if kind == "sd2" else {}
    scheduler = diffusers.DDIMScheduler(**settings)
    first = randomize(clip(TEXT if kind != "sd2" else {**TEXT, "hidden_act": "gelu"}, transformers.CLIPTextModel), 2)
    parts = {"unet": unet, "vae": coder, "scheduler": scheduler, "text_encoder": first, "tokenizer": words}
    if kind == "sdxl":
        second = randomize(clip(TEXT_2, transformers.CLIPTextModelWithProjection), 3)
        return {**parts, "text_encoder_2": second, "tokenizer_2": words}
    return {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def ours(folder: Path, **parts):
    return load_model(with_parts(read_files(str(folder)), NO_PARTS | parts), jnp.float32, NO_PARTS | parts)


def request(loaded, noise, times, size=SIZE, guidance=GUIDANCE):
    prompt, negative = read_prompts(loaded.tokenizers, [PROMPT], [NEGATIVE], 4)
    if loaded.sizes is not None:
        prompt, negative = (with_sizes(p, loaded.sizes(size, low)) for p, low in ((prompt, True), (negative, False)))
    return sd.Request(prompt, negative, jnp.float32(guidance), jnp.asarray(times), jnp.asarray(noise))


def torch_like(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def here(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def check(folder, theirs, use, tolerance=1e-4, **parts):
    """Latents at the end of both, then pictures. use(loaded, request, params) -> latents."""
    loaded = ours(folder, **parts)
    times = sd.fill(loaded.grid(STEPS, "ddim"))
    z = np.asarray(jax.jit(lambda params, asked: use(loaded, params, asked))(loaded.params, request(loaded, NOISE, times)))
    reference = here(theirs)
    scale = np.abs(reference).max()
    assert 0.1 < scale < 1e3
    np.testing.assert_allclose(z, reference, atol=tolerance * max(1, scale), rtol=0)
    return loaded, z


def call(pipeline, **more):
    """Latents of a pipeline of theirs."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2, "guidance_scale": GUIDANCE,
                 "num_inference_steps": STEPS, "output_type": "latent", "latents": torch_like(NOISE)}  # fmt: skip
    with torch.no_grad():
        return pipeline(**(arguments | more)).images


def text(loaded, params, asked):
    return sd.latents(loaded.model, params, jax.random.key(0), asked, asked.noise, ddim(loaded.model.schedule))


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("sd15", diffusers.StableDiffusionPipeline),
        ("sd2", diffusers.StableDiffusionPipeline),
        ("sdxl", diffusers.StableDiffusionXLPipeline),
    ],
)
def test_text_to_image(kind, cls, tmp_path):
    pipeline = cls(**made(kind, tmp_path))
    pipeline.save_pretrained(tmp_path / "model")
    size = {"height": SIZE[0], "width": SIZE[1]}
    loaded, z = check(tmp_path / "model", call(pipeline, **size), text)
    pictures = np.asarray(sd.decode(loaded.model, loaded.params, jnp.asarray(z)))
    with torch.no_grad():
        reference = here(pipeline.vae.decode(torch_like(z) / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1))
    assert np.abs(pictures - reference).max() / 2 < 1 / 255
