"""The command line of `make generate`."""

from __future__ import annotations

from typing import Literal

from diffusion_jax.arguments import Amount, Count, Natural

SamplerName = Literal[
    "dpmpp_2m", "ddim", "euler", "heun", "unipc", "deis", "dpmpp_3m", "euler_ancestral", "dpmpp_2m_sde", "ddpm"
]  # fmt: skip


def generate_options(
    *,
    prompt: str = "",
    negative: str = "",
    model: str = "",
    n: Count = 1,
    size: str = "",
    steps: Count = 30,
    seed: Natural = 0,
    guidance: Amount = 7.5,
    sampler: SamplerName = "dpmpp_2m",
    init: str = "",
    strength: Amount = 0.8,
    mask: str = "",
    expand: str = "",
    image_guidance: Amount = 1.5,
    upscale: str = "",
    noise_level: Natural = 20,
    control: str = "",
    controlnet: str = "",
    control_scale: Amount = 1.0,
    lora: tuple[str, ...] = (),
    embedding: tuple[str, ...] = (),
    vae: str = "",
    prediction: Literal["epsilon", "v_prediction"] | None = None,
    refiner: str = "",
    refine: Amount = 0.2,
    tokenizer: str = "",
    chunks: Count = 4,
    latents: str = "",
    precision: Literal["float32", "bfloat16"] | None = None,
    batch: Count | None = None,
    tile: Natural = 0,
    out: str = "",
    devices: Count | None = None,
) -> dict:
    """Draw pictures from a text, or change pictures, with a model in files. Picture i depends on the seed and i alone.

    Args:
        prompt: what to draw; (word:1.3) counts more, [word] less, BREAK begins a new chunk of 75 tokens.
        negative: what to stay away from.
        model: a folder as diffusers writes it, a .safetensors or .ckpt file of the original layout, or a name on the
            hub, which is downloaded once with the extra diffusion-jax[hub].
        n: number of pictures.
        size: WIDTHxHEIGHT in pixels, multiples of 8; by default the model's own, or that of init.
        steps: of the sampler.
        seed: all randomness.
        guidance: how strongly the prompt counts against the negative one; 1 takes the prompt alone.
        sampler: how to step.
        init: a picture to start from, or to edit where the model is one for that.
        strength: how much of it to draw anew, up to 1.
        mask: a picture that is white where init is to be drawn anew.
        expand: so many pixels to add to init at the left, top, right and bottom and to fill, as LEFT,TOP,RIGHT,BOTTOM.
        image_guidance: how much of init an editing model keeps.
        upscale: an upscaling model, by which the pictures are enlarged in the end.
        noise_level: noise that an upscaling model adds to what it enlarges, 0 to 350.
        control: a picture that a ControlNet follows, such as edges.
        controlnet: the ControlNet, a folder or a file.
        control_scale: how much it counts.
        lora: files to merge, each as FILE or FILE:SCALE, with commas between.
        embedding: files of textual inversion, each as FILE or FILE:WORD, with commas between.
        vae: another autoencoder, a folder or a file.
        prediction: what the U-Net of a model in one file was trained on, where its family does not say it: those of
            Stable Diffusion 2 are taken for v_prediction.
        refiner: a model that draws the last part of the way, SDXL's refiner.
        refine: which part that is.
        tokenizer: a folder with the tokenizer, for models without one.
        chunks: how many chunks of 75 tokens a prompt may have.
        latents: .npy file of the noise to start from, f32[n, h, w, c], in place of the seed's.
        precision: of the arithmetic; by default bfloat16 on accelerators.
        batch: pictures at a time on each device.
        tile: decode in tiles of so many pixels, for pictures that do not fit in memory; 0 decodes them whole.
        out: folder to write to; by default runs/generate/ and the time.
        devices: how many devices to use; by default all.
    """
    return dict(locals())
