"""Stable Diffusion 1.5 at its full size against diffusers and transformers, in float32 on the processor.

    .venv-parity/bin/python benchmarks/sd_full_size.py                          256x256, 4 steps: minutes
    .venv-parity/bin/python benchmarks/sd_full_size.py size=512 steps=50        an hour or two
    .venv-parity/bin/python benchmarks/sd_full_size.py toy=True size=64         narrow networks, to try the script

The two sides run one after the other, each in a process of its own. Theirs makes the networks with random weights,
writes them as a folder of 4.3 GB, and keeps what it computes of given numbers; ours reads the folder and computes the
same. Weights are normal with variance gain^2 / (numbers that enter a unit), so that signals neither die out nor grow;
vectors are 1 or 0 and a tenth of noise. Prints a JSON line a measurement: the largest difference (of pictures with
pixels in [0, 1] as it is, of all others as a share of the largest number, where that is above 1), seconds of one call
of all processors, on the clock too, and the most memory the process held in it; then a table. Fails where pictures
differ by 1/255, or others by 1e-4.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffusion_jax.arguments import Count, resolve, split_arguments

PROMPT, NEGATIVE, GUIDANCE = "a lighthouse at dusk, oil on canvas", "blurry", 7.5
GAIN = 0.7
LIMITS = {"text encoder": 1e-4, "U-Net": 1e-4, "encoder": 1e-4, "decoder": 1e-4, "latents": 1e-4, "pictures": 1 / 255}
NO_PARTS = {"vae": "", "controlnet": "", "lora": (), "embedding": (), "tokenizer": ""}


def options(*, size: Count = 256, steps: Count = 4, toy: bool = False, seed: Count = 1, folder: str = "") -> dict:
    """See above.

    Args:
        size: pixels a side, a multiple of 64.
        steps: of DDIM, with guidance.
        toy: networks a tenth as wide.
        seed: of weights and noise.
        folder: where to write the model and keep it; by default it is removed in the end.
    """
    return dict(locals())


# Measuring ------------------------------------------------------------------------------------------------------------


def measured(call, first: bool = True):
    """(what a call gives, its seconds, the GiB that the process held at most). first: call once before, to warm up.

    Seconds are (on the clock, of all processors).
    """
    if first:
        call()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    start = time.perf_counter(), time.process_time()
    found = call()
    took = time.perf_counter() - start[0], time.process_time() - start[1]
    status = Path("/proc/self/status").read_text()
    held = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return found, took, int(held.split()[1]) / 2**20


def keep(folder: Path, side: str, found: dict[str, tuple], **more: float) -> None:
    """Arrays and figures of one side."""
    np.savez(folder / f"{side}.npz", **{name: np.asarray(value) for name, (value, _, _) in found.items()})
    figures = {name: {"clock": took[0], "seconds": took[1], "gib": held} for name, (_, took, held) in found.items()}
    (folder / f"{side}.json").write_text(json.dumps(figures | {name: {"seconds": took} for name, took in more.items()}))


def inputs(size: int, seed: int) -> dict[str, np.ndarray]:
    """Channels last."""
    rng = np.random.default_rng(seed)
    latent = (1, size // 8, size // 8, 4)
    picture = rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    return {"noise": rng.standard_normal(latent, np.float32), "latent": rng.standard_normal(latent, np.float32),
            "picture": picture}  # fmt: skip


# Theirs ---------------------------------------------------------------------------------------------------------------


def networks(toy: bool) -> dict:
    """The networks of Stable Diffusion 1.5 by diffusers and transformers, or narrow ones."""
    import diffusers
    import transformers

    wide, levels, coder = (
        (64, [32, 64, 64, 64], [32] * 4) if toy else (768, [320, 640, 1280, 1280], [128, 256, 512, 512])
    )
    unet = diffusers.UNet2DConditionModel(block_out_channels=levels, cross_attention_dim=wide, sample_size=64)
    vae = diffusers.AutoencoderKL(
        block_out_channels=coder, layers_per_block=2, sample_size=512, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_attention_heads=wide // 64, projection_dim=wide
    )
    return {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(text)}


def randomize(module, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(0, GAIN / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return module.eval()


def pipeline(toy: bool, seed: int):
    """Everything diffusers needs to draw."""
    import diffusers
    import transformers

    from diffusion_jax.text import tokenizer

    vocab, merges = tokenizer.vocabulary(tokenizer.installed())
    words = transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=tokenizer.EOS, model_max_length=77)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts = {name: randomize(net, seed + i) for i, (name, net) in enumerate(networks(toy).items())}
    return diffusers.StableDiffusionPipeline(
        **parts, tokenizer=words, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def theirs(folder: Path, size: int, steps: int, seed: int, toy: int) -> None:
    import torch

    pipe = pipeline(bool(toy), seed)
    pipe.save_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    given = {name: torch.from_numpy(np.moveaxis(x, -1, 1).copy()) for name, x in inputs(size, seed).items()}
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    found: dict[str, tuple] = {}
    with torch.no_grad():
        found["text encoder"] = measured(lambda: pipe.text_encoder(ids)[0])
        tokens = found["text encoder"][0]
        calls = {
            "U-Net": lambda: here(pipe.unet(given["latent"], torch.tensor([500.0]), tokens).sample),
            "encoder": lambda: here(pipe.vae.encode(given["picture"]).latent_dist.mean),
            "decoder": lambda: here(pipe.vae.decode(given["latent"]).sample),
        }
        found |= {name: measured(call) for name, call in calls.items()}
        latents = []

        def remember(pipe, i, t, tensors):
            latents[:] = [tensors["latents"].clone()]
            return {}

        pictures, took, held = measured(
            lambda: pipe(
                PROMPT, negative_prompt=NEGATIVE, guidance_scale=GUIDANCE, num_inference_steps=steps, height=size,
                width=size, latents=given["noise"], output_type="pt", callback_on_step_end=remember,
            ).images, first=False,
        )  # fmt: skip
    found |= {"latents": (here(latents[0]), took, held), "pictures": (here(pictures), took, held)}
    keep(folder, "theirs", found)


def here(x):
    return np.moveaxis(x.numpy(), 1, -1)


# Ours -----------------------------------------------------------------------------------------------------------------


def ours(folder: Path, size: int, steps: int, seed: int) -> None:
    import jax
    import jax.numpy as jnp

    from diffusion_jax import ddim
    from diffusion_jax.generating.loading import load_model, read_files
    from diffusion_jax.generating.prompts import read_prompts
    from diffusion_jax.systems import stable_diffusion as sd

    def loading():
        return load_model(read_files(str(folder / "model")), jnp.float32, NO_PARTS)

    loaded, reading, most = measured(loading, first=False)
    model, params = loaded.model, {}
    for name in list(loaded.params):
        params[name] = jax.device_put(loaded.params.pop(name))
    given = {name: jnp.asarray(x) for name, x in inputs(size, seed).items()}
    prompt, negative = read_prompts(loaded.tokenizers, [PROMPT], [NEGATIVE], 1)
    asked = sd.Request(prompt, negative, jnp.float32(GUIDANCE), jnp.asarray(loaded.grid(steps, "ddim")), given["noise"])
    states, time_ = jnp.asarray(np.load(folder / "theirs.npz")["text encoder"]), jnp.full((1,), 500.0)

    def whole(params, asked):
        z = sd.latents(model, params, jax.random.key(0), asked, asked.noise, ddim(model.schedule))
        return z, sd.decode(model, params, z) / 2 + 0.5

    calls = {
        "text encoder": (lambda p, prompt: sd.encode_prompt(model, p, prompt)["tokens"], params, prompt),
        "U-Net": (lambda p, z: model.unet.apply(p, z, time_, {"tokens": states}), params["unet"], given["latent"]),
        "encoder": (lambda p, x: model.vae.encode(p, x).mean, params["vae"], given["picture"]),
        "decoder": (lambda p, z: model.vae.decode(p, z), params["vae"], given["latent"]),
        "whole": (whole, params, asked),
    }
    found, compiling = {}, {}
    for name, (function, *arguments) in calls.items():
        start = time.process_time()
        program = jax.jit(function).lower(*arguments).compile()
        compiling[f"{name}, compilation"] = time.process_time() - start
        found[name] = measured(lambda: jax.block_until_ready(program(*arguments)), first=name != "whole")  # noqa: B023
    (latents, pictures), took, held = found.pop("whole")
    found |= {"latents": (latents, took, held), "pictures": (pictures, took, held)}
    keep(folder, "ours", found | {"reading the files": (0, reading, most)}, **compiling)


# Both -----------------------------------------------------------------------------------------------------------------


def compared(folder: Path) -> list[dict]:
    """One entry a measurement."""
    arrays = {side: np.load(folder / f"{side}.npz") for side in ("ours", "theirs")}
    figures = {side: json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs")}
    rows = []
    for name, figure in figures["ours"].items():
        row = {f"ours_{key}": round(value, 3) for key, value in figure.items()}
        if name in LIMITS:
            a, b = arrays["ours"][name], arrays["theirs"][name]
            largest = float(np.abs(b).max())
            difference = float(np.abs(a - b).max()) / max(1.0, largest)
            row |= {f"torch_{key}": round(value, 3) for key, value in figures["theirs"][name].items()}
            row |= {"largest": round(largest, 4), "spread": round(float(b.std()), 4), "limit": LIMITS[name],
                    "difference": float(f"{difference:.3g}")}  # fmt: skip
        rows.append({"work": name} | row)
    return rows


def markdown(rows: list[dict]) -> str:
    lines = ["| | largest number | largest difference | ours, s | GiB | compilation, s | PyTorch, s | GiB |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    by_name = {row["work"]: row for row in rows}
    for name in LIMITS:
        row = by_name[name]
        compiling = by_name[f"{'whole' if name in ('latents', 'pictures') else name}, compilation"]["ours_seconds"]
        cells = (
            f"{row['largest']:.3g}",
            f"{row['difference']:.1e}",
            f"{row['ours_seconds']:.2f}",
            f"{row['ours_gib']:.2f}",
            f"{compiling:.0f}",
            f"{row['torch_seconds']:.2f}",
            f"{row['torch_gib']:.2f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    if words[:1] == ["--part"]:
        side, folder, *numbers = words[1:]
        {"theirs": theirs, "ours": ours}[side](Path(folder), *map(int, numbers))
        return 0
    given = resolve(options, split_arguments(words), "sd_full_size")
    numbers = [int(given[name]) for name in ("size", "steps", "seed")]
    folder = Path(given["folder"] or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for side, more in (("theirs", [int(given["toy"])]), ("ours", [])):
            words = [str(n) for n in (*numbers, *more)]
            command = [sys.executable, __file__, "--part", side, str(folder), *words]
            # Threads that wait would otherwise count as work.
            subprocess.run(command, check=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
        rows = compared(folder)
    finally:
        if not given["folder"]:
            shutil.rmtree(folder)
    for row in rows:
        print(json.dumps(row | {name: given[name] for name in ("size", "steps", "toy")}))
    print()
    print(markdown(rows))
    wrong = [row["work"] for row in rows if "limit" in row and not row["difference"] <= row["limit"]]
    for name in wrong:
        print(f"{name}: the difference is above its limit", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
