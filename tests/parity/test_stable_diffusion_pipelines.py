"""Whole pipelines of 50 steps, from the same noise, against diffusers': latents to 1e-4, pictures to 1/255.

The models are written by diffusers and transformers, tiny and of random weights, and read from their files here.
"""

from __future__ import annotations

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
from tiny_models import CONTROLNET, SCHEDULER, TEXT, TEXT_2, UNET, UNETS, VAE, write_tokenizer

from diffusion_jax import ddim, normal_like
from diffusion_jax.generating.loading import load_model, read_files, with_parts
from diffusion_jax.generating.prompts import read_prompts, with_sizes
from diffusion_jax.systems import stable_diffusion as sd

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


def call(pipeline, **more):
    """Latents of a pipeline of theirs."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2, "guidance_scale": GUIDANCE,
                 "num_inference_steps": STEPS, "output_type": "latent", "latents": torch_like(NOISE)}  # fmt: skip
    arguments = {name: value for name, value in (arguments | more).items() if value is not ...}
    with torch.no_grad():
        return pipeline(**arguments).images


KEY = jax.random.key(7)


def run(loaded, use, times, *more, **static):
    """Latents of one of our uses, jitted whole."""

    def whole(params, asked, more):
        return use(loaded.model, params, KEY, asked, ddim(loaded.model.schedule), *more, **static)

    return np.asarray(jax.jit(whole)(loaded.params, request(loaded, NOISE, times), tuple(map(as_arrays, more))))


def as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def close(z, theirs):
    reference = here(theirs)
    scale = np.abs(reference).max()
    assert 0.1 < scale < 1e3
    np.testing.assert_allclose(z, reference, atol=1e-4 * max(1, scale), rtol=0)


@pytest.fixture
def latents_alone(monkeypatch):
    """Ours stop before the decoder; theirs take the mean of the autoencoder's Gaussian, as ours do, and our noise."""
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())

    def same_noise(module, noise=NOISE):
        monkeypatch.setattr(sd, "decode", lambda model, params, z: z)
        if module is None:
            return

        def drawn(shape, **_):
            assert tuple(shape) == torch_like(noise).shape
            return torch_like(noise)

        monkeypatch.setattr(module, "randn_tensor", drawn)

    return same_noise


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("sd15", diffusers.StableDiffusionPipeline),
        ("sd2", diffusers.StableDiffusionPipeline),
        ("sdxl", diffusers.StableDiffusionXLPipeline),
    ],
)
def test_text_to_image(kind, cls, tmp_path, latents_alone):
    pipeline = cls(**made(kind, tmp_path))
    pipeline.save_pretrained(tmp_path / "model")
    size = {"height": SIZE[0], "width": SIZE[1]}
    loaded = ours(tmp_path / "model")
    times = sd.fill(loaded.grid(STEPS, "ddim"))
    pictures = run(loaded, sd.text_to_image, times)
    reference = here(call(pipeline, **size, output_type="pt"))
    assert np.abs(pictures / 2 + 0.5 - reference).max() < 1 / 255
    latents_alone(None)
    close(run(loaded, sd.text_to_image, times), call(pipeline, **size))


def in_unit_interval(x):
    return torch_like(x) / 2 + 0.5


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(strength, tmp_path, latents_alone):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    latents_alone(module)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**made("sd15", tmp_path))
    pipeline.save_pretrained(tmp_path / "model")
    theirs = call(pipeline, image=in_unit_interval(IMAGE), strength=strength, latents=...)
    loaded = ours(tmp_path / "model")
    times = sd.fill(sd.from_strength(loaded.grid(STEPS, "ddim"), strength))
    z = run(loaded, sd.image_to_image, times, IMAGE)
    close(z, theirs)


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["sd15", "inpainting"])
def test_inpainting(kind, strength, tmp_path, latents_alone):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as module

    latents_alone(module)
    pipeline = diffusers.StableDiffusionInpaintPipeline(**made(kind, tmp_path))
    pipeline.save_pretrained(tmp_path / "model")
    theirs = call(
        pipeline, image=in_unit_interval(IMAGE), mask_image=torch_like(MASK), strength=strength, latents=...,
        height=SIZE[0], width=SIZE[1],
    )  # fmt: skip
    loaded = ours(tmp_path / "model")
    assert loaded.kind == ("plain" if kind == "sd15" else kind)
    times = sd.fill(sd.from_strength(loaded.grid(STEPS, "ddim"), strength))
    whole, own = jnp.asarray(strength == 1.0), kind == "inpainting"
    close(run(loaded, sd.inpaint, times, IMAGE, MASK, whole=whole, own=own), theirs)


def test_editing(tmp_path, latents_alone):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_instruct_pix2pix as module

    latents_alone(module)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**made("editing", tmp_path))
    pipeline.save_pretrained(tmp_path / "model")
    theirs = call(pipeline, image=in_unit_interval(IMAGE), image_guidance_scale=1.7)
    loaded = ours(tmp_path / "model")
    assert loaded.kind == "editing"
    close(run(loaded, sd.edit, sd.fill(loaded.grid(STEPS, "ddim")), IMAGE, jnp.float32(1.7)), theirs)


def test_upscaling(tmp_path, latents_alone):
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as module

    small = np.asarray(jax.random.uniform(jax.random.key(3), (2, 8, 12, 3), minval=-1, maxval=1))
    added = np.asarray(normal_like(jax.random.fold_in(KEY, 1), jnp.asarray(small)))
    latents_alone(module, added)
    parts = {
        k: v
        for k, v in made("upscaling", tmp_path).items()
        if k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    }
    noises = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    pipeline = diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=noises)
    pipeline.save_pretrained(tmp_path / "model")
    theirs = call(pipeline, image=in_unit_interval(small), noise_level=30)
    loaded = ours(tmp_path / "model")
    assert loaded.kind == "upscaling"
    close(run(loaded, sd.upscale, sd.fill(loaded.grid(STEPS, "ddim")), small, jnp.int32(30)), theirs)


def test_control(tmp_path, latents_alone):
    plain = {k: v for k, v in CONTROLNET.items() if k != "_class_name"}
    network = randomize(diffusers.ControlNetModel(**plain), 4)
    network.save_pretrained(tmp_path / "controlnet")
    latents_alone(None)
    pipeline = diffusers.StableDiffusionControlNetPipeline(**made("sd15", tmp_path), controlnet=network)
    pipeline.save_pretrained(tmp_path / "model")
    theirs = call(pipeline, image=in_unit_interval(IMAGE), controlnet_conditioning_scale=0.8)
    loaded = ours(tmp_path / "model", controlnet=str(tmp_path / "controlnet"))
    control = sd.Control(jnp.asarray(IMAGE / 2 + 0.5), jnp.float32(0.8))
    close(run(loaded, sd.text_to_image, sd.fill(loaded.grid(STEPS, "ddim")), control), theirs)
