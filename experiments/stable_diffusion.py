"""Tune a Stable Diffusion checkpoint on own pictures: a LoRA, a subject as in DreamBooth, or the whole U-Net.

    make train EXP=stable_diffusion ARGS='model=PATH path=PICTURES caption="a photo of sks dog"'
    make train EXP=stable_diffusion ARGS='model=PATH path=PICTURES'                  captions in PICTURES/NAME.txt
    make train EXP=stable_diffusion ARGS='... kind=PICTURES_OF_DOGS kind_caption="a photo of a dog"'
    make train EXP=stable_diffusion ARGS='... method=full precision=bfloat16 batch=4 remat=full'
    make generate ARGS='model=PATH lora=runs/stable_diffusion/…/lora.safetensors prompt="sks dog on the moon"'

Latents and texts are encoded once. A LoRA (Hu et al. 2021) comes out as lora.safetensors, in diffusers' or kohya's
names; a whole U-Net as the folder unet/, to be put in place of the model's. `kind` keeps what the network knows of the
subject's kind: its pictures, which the model itself may have drawn, are trained on beside those of the subject (Ruiz et
al. 2023, arXiv:2208.12242, section 3.2). Works for models of one text encoder, Stable Diffusion 1 and 2.
Data: a folder of pictures; one will do to see that it works, five to twenty for a subject.
Loss: that of the model's own training, eps or v. Cost: not measured on an accelerator yet; `make plan` reckons it.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax import denoising_loss, discrete_time, dpmpp_2m, draw_discrete, parameterize
from diffusion_jax.arguments import Amount, Count, Natural
from diffusion_jax.experiment import Experiment
from diffusion_jax.generating import networks
from diffusion_jax.generating.loading import Loaded, load_model, read_files
from diffusion_jax.generating.prompts import read_prompts
from diffusion_jax.systems.stable_diffusion import encode_prompt
from diffusion_jax.systems.tuning import ATTENTION, EVERYTHING, as_lora, halved, low_rank, trained_alone
from diffusion_jax.training import optimizers
from diffusion_jax.training.data import Data, take
from diffusion_jax.training.data import size as examples
from diffusion_jax.training.latents import (
    Encoding,
    draw_from_moments,
    encode_to_store,
    false_colours,
    read_header,
    weights_digest,
)
from diffusion_jax.training.latents import latents as read_latents
from diffusion_jax.training.sources import SUFFIXES, read_image
from diffusion_jax.training.step import make_objective
from diffusion_jax.typing import Array, Cond, InputError, Net, Params
from diffusion_jax.weights import lora as lora_files
from diffusion_jax.weights import model_folder, text_unet

NO_PARTS = {"vae": "", "controlnet": "", "lora": (), "embedding": (), "tokenizer": ""}


def experiment(
    *,
    model: str = "",
    path: str = "",
    caption: str = "",
    kind: str = "",
    kind_caption: str = "",
    method: Literal["lora", "full"] = "lora",
    rank: Count = 8,
    targets: Literal["attention", "everything"] = "attention",
    naming: Literal["diffusers", "kohya"] = "diffusers",
    size: Count | None = None,
    steps: Count = 800,
    batch: Count = 1,
    accumulate: Count = 1,
    learning_rate: Amount = 1e-4,
    drop: Amount = 0.1,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    remat: Literal["none", "dots", "full"] = "full",
    latents: str = "",
    dispatch: Count = 1,
    seed: Natural = 0,
    log_every: Count = 10,
    sample_every: Natural = 0,
    checkpoint_every: Natural = 400,
) -> Experiment:
    """Tune a Stable Diffusion checkpoint.

    Args:
        model: a folder as diffusers writes it, a file of the original layout, or a name on the hub.
        path: the folder of pictures.
        caption: what all of them show; by default NAME.txt beside each picture says it.
        kind: a folder of pictures of the subject's kind that it should not be mistaken for.
        kind_caption: what they show.
        method: train low-rank updates, or the whole U-Net.
        rank: of the updates.
        targets: the kernels that are updated, those of attention or of all blocks.
        naming: of the file of updates.
        size: pixels a side, a multiple of 8; by default the model's own.
        steps: updates to make.
        batch: pictures an update.
        accumulate: parts that a batch is cut into, for small memories.
        learning_rate: AdamW's, constant.
        drop: share of pictures without their caption, for guidance.
        precision: of the arithmetic and of kernels that are not trained.
        remat: what the backward pass keeps of each block.
        latents: the folder of encoded pictures; by default beside them, in .latents.
        dispatch: steps sent to the device at once.
        seed: of the parameters, the order of the data and all noise.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample grids in false colours, 0 for none.
        checkpoint_every: steps between checkpoints, 0 for the last one only.
    """
    if not model or not path:
        raise InputError("model= and path= are needed: a checkpoint, and a folder of pictures")
    if bool(kind) != bool(kind_caption):
        raise InputError("kind= and kind_caption= belong together")
    loaded = checkpoint(model)
    unet = network(model, precision, remat)
    side = size or loaded.size[0]
    if side % loaded.model.factor:
        raise InputError(f"size={side}: a multiple of {loaded.model.factor} is needed")
    wide = side // loaded.model.factor
    scale, dtype = loaded.model.scale, None if precision == "float32" else jnp.dtype(precision)
    chosen = {"attention": ATTENTION, "everything": EVERYTHING}[targets]
    tuned = low_rank(unet, rank=rank, targets=chosen, dtype=dtype) if method == "lora" else unet
    schedule, predicts = loaded.model.schedule, loaded.model.predicts
    optimizer = optimizers.adamw(learning_rate, weight_decay=0.01)
    if method == "lora":
        optimizer = optax.partition({"lora": optimizer, "frozen": optax.set_to_zero()}, trained_alone)
    sets = [(path, caption)] + ([(kind, kind_caption)] if kind else [])
    texts, nothing = () if caption == "" else (caption,), text_states(model, ("",))[0]
    return Experiment(
        data=lambda: prepared(model, sets, side, latents),
        shape=(wide, wide, loaded.model.channels),
        net=tuned,
        schedule=schedule,
        read=lambda net: parameterize(told(net, nothing), schedule, predicts, discrete_time(loaded.model.table)),
        objective=make_objective(schedule, draw_discrete(loaded.model.table), partial(denoising_loss, target=predicts)),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optimizer),
        ema=(),
        sampler=dpmpp_2m(schedule),
        times=lambda n: jnp.asarray(loaded.grid(n, "dpmpp_2m")),
        sample_steps=20,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        null=nothing,
        drop=drop,
        guidance=5.0,
        prepare=draw_from_moments(scale),
        decode=false_colours,
        read_texts=lambda words: text_states(model, tuple(words)),
        texts=texts or ("",),
        start=lambda: begin(model, tuned, method, dtype, seed),
        export=partial(written, method=method, rank=rank, naming=naming, model=model),
        dispatch=dispatch,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
    )


@functools.cache
def checkpoint(model: str) -> Loaded:
    """The model in files, in float32; one with one text encoder, whose U-Net sees the latent alone."""
    loaded = load_model(read_files(model), jnp.float32, NO_PARTS)
    if loaded.kind != "plain" or set(loaded.model.texts) != {"text_encoder"}:
        raise InputError(f"model={model}: only models that draw from a text with one text encoder are tuned here")
    return loaded


def network(model: str, precision: str, remat: Literal["none", "dots", "full"]) -> Net:
    """Its U-Net, for training."""
    loaded, files = checkpoint(model), read_files(model)
    return networks.unet(files.configs["unet"], loaded.model.channels, 0, jnp.dtype(precision), remat)


@functools.cache
def text_states(model: str, texts: tuple[str, ...]) -> np.ndarray:
    """What the U-Net is told for each text, f32[n, m, d]."""
    loaded = checkpoint(model)
    encode = jax.jit(lambda params, prompt: encode_prompt(loaded.model, params, prompt)["tokens"])
    found = []
    for text in texts:
        prompt, _ = read_prompts(loaded.tokenizers, [text], [""], 1)
        found.append(np.asarray(encode(loaded.params, prompt))[0])
    return np.stack(found)


def begin(model: str, tuned: Net, method: str, dtype, seed: int) -> Params:
    """The checkpoint's parameters, with updates that change nothing yet."""
    params = checkpoint(model).params["unet"]
    if method == "full":
        return params
    lora = jax.tree.map(np.asarray, tuned.init(jax.random.key(seed))["lora"])
    return {"frozen": jax.tree.map(np.asarray, halved(params, dtype)), "lora": lora}


def prepared(model: str, sets: Sequence[tuple[str, str]], side: int, latents: str) -> Data:
    """Latents of the pictures with what the U-Net is told of them; a set that is smaller is repeated to be as large."""
    parts = [one_set(model, Path(path).expanduser(), caption, side, latents) for path, caption in sets]
    n = max(len(part["image"]) for part in parts)
    rows = [np.arange(n) % len(part["image"]) for part in parts]
    joined = {key: np.concatenate([p[key][r] for p, r in zip(parts, rows, strict=True)]) for key in parts[0]}
    wide = side // checkpoint(model).model.factor
    return Data(joined, None, (), (wide, wide, checkpoint(model).model.channels))


def one_set(model: str, path: Path, caption: str, side: int, latents: str) -> dict[str, np.ndarray]:
    """Moments, labels and token states of one folder."""
    loaded = checkpoint(model)
    store = Path(latents or path / ".latents") / f"{path.name}-{side}"
    params, digest = loaded.params["vae"], weights_digest(loaded.params["vae"])
    if not ((store / "header.json").is_file() and read_header(store)["complete"]):
        source = f"{path} at {side} pixels"
        data = partial(all_pictures, path, side)
        encode_to_store(
            Encoding(data, source, loaded.model.vae.encode, params, loaded.model.scale, store, batch=1, mirror=False)
        )
    data = read_latents(store, weights=digest, scale=loaded.model.scale)
    every = take(data.train, np.arange(examples(data.train)))
    words = [caption] if caption else [caption_of(name) for name in names_in(path)]
    states = text_states(model, tuple(words)).astype(np.float16)
    return {**every, "cond": states[np.zeros_like(every["label"]) if caption else every["label"]]}


def names_in(path: Path) -> list[Path]:
    """The pictures of a folder in their order; InputError where there are none."""
    names = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not names:
        raise InputError(f"no pictures in {path}: expected files ending in {', '.join(SUFFIXES)}")
    return names


def all_pictures(path: Path, side: int) -> Data:
    """Every picture of a folder, cropped and resized, its number for a label."""
    names = names_in(path)
    images = np.stack([read_image(name, 3, side) for name in names])
    return Data({"image": images, "label": np.arange(len(names), dtype=np.int32)}, None, (), (side, side, 3))


def told(net: Callable[[Array, Array, Cond], Array], nothing: np.ndarray) -> Callable[[Array, Array, Cond], Array]:
    """The network given token states alone, those of no text where there are none."""

    def given(x: Array, t: Array, cond: Cond) -> Array:
        tokens = jnp.broadcast_to(nothing, (x.shape[0], *nothing.shape)) if cond is None else cond
        return net(x, t, {"tokens": tokens.astype(jnp.float32)})

    return given


def caption_of(picture: Path) -> str:
    """The text beside a picture; InputError if there is none."""
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise InputError(f"{picture} has no caption: give caption=, or write one in {file.name} beside it")
    return " ".join(file.read_text().split())


def written(params: Params, folder: Path, *, method: str, rank: int, naming: str, model: str) -> None:
    """lora.safetensors, or the folder unet/."""
    if method == "lora":
        lora_files.save(folder / "lora.safetensors", as_lora(params["lora"], rank), naming)
        return
    config = read_files(model).configs["unet"]
    hub = {"unet": text_unet.to_diffusers(params)}
    model_folder.save(folder / "unet", model_folder.Folder({}, {"unet": dict(config)}, hub, {}))
