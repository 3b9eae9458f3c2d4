"""Models from files: networks by their configurations, parameters by the tables of weights, tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.generating import networks
from diffusion_jax.nets.autoencoder import Autoencoder
from diffusion_jax.nets.tiles import tiled
from diffusion_jax.systems.stable_diffusion import Model
from diffusion_jax.systems.tuning import halved
from diffusion_jax.text import tokenizer as tokenizers
from diffusion_jax.text.tokenizer import Tokenizer, with_words
from diffusion_jax.typing import InputError, Params
from diffusion_jax.weights import autoencoder as vae_weights
from diffusion_jax.weights import clip as clip_weights
from diffusion_jax.weights import ldm_configs, lora, model_folder, single_file, textual_inversion
from diffusion_jax.weights import text_unet as unet_weights

Kind = Literal["plain", "inpainting", "editing", "upscaling"]
KINDS: dict[int, Kind] = {0: "plain", 5: "inpainting", 4: "editing", 3: "upscaling"}
"""What a U-Net is for, by the channels that it sees beside the latent."""
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
Options = Mapping[str, Any]


class Loaded(NamedTuple):
    """A model that can draw.

    size: height and width in pixels it was made for. grid: (steps, sampler) -> times. sizes: what the U-Net is told of
    a picture of a size, by whether it is the prompt that is told; None where it is told nothing.
    """

    model: Model
    params: Params
    tokenizers: dict[str, Tokenizer]
    kind: Kind
    size: tuple[int, int]
    grid: Callable[[int, str], np.ndarray]
    sizes: Callable[[tuple[int, int], bool], tuple[float, ...]] | None


class Files(NamedTuple):
    """A model as it lies in files: configurations and weights by component, and the folders of its tokenizers."""

    configs: dict[str, dict[str, Any]]
    hub: dict[str, dict[str, np.ndarray]]
    tokenizers: dict[str, Path]
    name: str


def load_models(options: Options) -> dict[str, Loaded]:
    """The models that the options name: "main" and perhaps "refiner", "upscaler". InputError for what does not fit."""
    dtype = jnp.dtype(options["precision"] or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    main = read_files(options["model"], options["prediction"])
    main = with_parts(main, options)
    found = {"main": load_model(main, dtype, options)}
    for name, key in (("refiner", "refiner"), ("upscaler", "upscale")):
        if options[key]:
            found[name] = load_model(read_files(options[key]), dtype, {**options, "embedding": ()})
    if "refiner" in found:
        _check_refiner(found["main"].model, found["refiner"].model, options["refiner"])
    return found


def read_files(path: str, prediction: str | None = None) -> Files:
    """A model in a folder, in one file, or of a name on the Hub; InputError for anything else."""
    where = Path(path).expanduser()
    if where.is_file():
        checkpoint = single_file.load(where)
        configs = ldm_configs.configs(checkpoint.family, checkpoint.hub, checkpoint.extras, prediction=prediction)
        return Files(configs, checkpoint.hub, {}, path)
    folder = model_folder.load(path)
    return Files(folder.configs, folder.hub, folder.tokenizers, path)


def with_parts(files: Files, options: Options) -> Files:
    """The model with another autoencoder, a ControlNet and merged LoRAs, as far as the options name them."""
    for component, key in (("vae", "vae"), ("controlnet", "controlnet")):
        if options[key]:
            other = read_files(options[key])
            if component not in other.hub:
                raise InputError(f"{key}={options[key]} holds {', '.join(other.hub)} and no {component}")
            config = other.configs[component]
            if component == "vae" and Path(options[key]).expanduser().is_file():  # which does not hold its scale
                config = {**config, "scaling_factor": files.configs["vae"].get("scaling_factor", 0.18215)}
            files = files._replace(
                hub={**files.hub, component: other.hub[component]}, configs={**files.configs, component: config}
            )
    updates = [(lora.load(file, files.hub), scale) for file, scale in map(_with_scale, options["lora"])]
    return files._replace(hub=lora.merge(files.hub, updates)) if updates else files


def load_model(files: Files, dtype: Any, options: Options) -> Loaded:
    """Networks and parameters of one model. InputError listing what is missing, left over or of another shape."""
    _check_components(files)
    networks.check_settings(files.configs)
    networks.check_together({name: files.configs[name] for name in files.hub})
    texts = {name: files.configs[name] for name in TOKENIZER_OF if name in files.hub}
    pooled = texts.get("text_encoder_2", {}).get("projection_dim", 0)
    words = {name: _tokenizer(files, name, options["tokenizer"]) for name in texts}
    files, texts, words = _with_embeddings(files, texts, words, options["embedding"])
    schedule, table, predicts = networks.schedule(files.configs.get("scheduler", {}))
    vae, latent = files.configs["vae"], files.configs["vae"]["latent_channels"]
    config = files.configs["unet"]
    numbers, factor = networks.size_numbers(config, pooled), 2 ** (len(vae["block_out_channels"]) - 1)
    xl = bool(numbers)
    model = Model(
        texts={name: networks.text_encoder(
                   one, dtype, eos=words[name].eos, before_last=xl, projected=name == "text_encoder_2"
               )
               for name, one in texts.items()},
        unet=networks.unet(config, latent, pooled, dtype),
        vae=_by_tiles(networks.autoencoder(vae, dtype), options.get("tile", 0), factor),
        schedule=schedule, predicts=predicts, table=table, scale=vae.get("scaling_factor", 0.18215), factor=factor,
        channels=latent, pooled=xl,
        noised=_noised(files), control=_control(files, pooled, dtype),
    )  # fmt: skip
    kind = KINDS.get(config["in_channels"] - latent)
    if kind is None:
        raise InputError(f"the U-Net of {files.name} sees {config['in_channels'] - latent} channels beside the latent")
    side = (config.get("sample_size") or 64) * factor
    return Loaded(
        model, parameters(model, files, dtype), words, kind, (side, side),
        networks.grid(files.configs.get("scheduler", {})),
        partial(_sizes, numbers) if xl else None,
    )  # fmt: skip


def parameters(model: Model, files: Files, dtype: Any) -> dict[str, Params]:
    """The parameters of all networks, their kernels in `dtype`."""
    tables = {"unet": unet_weights.from_diffusers, "vae": vae_weights.from_diffusers,
              "controlnet": unet_weights.from_diffusers}  # fmt: skip
    nets = {"unet": model.unet, "vae": model.vae, "controlnet": model.control, **model.texts}
    found = {}
    for name, net in nets.items():
        if net is None:
            continue
        like = jax.eval_shape(net.init, jax.eval_shape(lambda: jax.random.key(0)))
        table = tables.get(name, clip_weights.text_from_transformers)
        try:
            found[name] = halved(table(files.hub[name], like), None if dtype == jnp.float32 else dtype)
        except ValueError as error:
            first, *rest = str(error).splitlines()[1:] or [str(error)]
            more = f", and {len(rest)} more" if rest else ""
            raise InputError(f"{files.name}: the {name} is another network: {first.strip()}{more}") from None
    return found


def _check_components(files: Files) -> None:
    missing = [name for name in ("unet", "vae") if name not in files.hub]
    if not missing and not any(name in files.hub for name in TOKENIZER_OF):
        missing = ["text_encoder"]
    if missing:
        have = ", ".join(files.hub) or "nothing"
        raise InputError(f"{files.name} holds {have} and no {missing[0]}: it is not a whole model")


def _check_refiner(main: Model, refiner: Model, name: str) -> None:
    if (main.channels, main.factor, main.scale) != (refiner.channels, refiner.factor, refiner.scale):
        raise InputError(f"refiner={name} has other latents than the model: it cannot go on with what was begun")


def _by_tiles(vae: Autoencoder, tile: int, factor: int) -> Autoencoder:
    """The autoencoder on tiles of so many pixels, a quarter of which neighbours share; 0 for whole pictures."""
    if tile % (8 * factor):
        raise InputError(f"tile={tile}: a multiple of {8 * factor} is needed here, or 0 for whole pictures")
    return tiled(vae, tile, tile // 4, factor=factor) if tile else vae


def _tokenizer(files: Files, encoder: str, given: str) -> Tokenizer:
    """That of the model, or the one that is given, or that of an installed package."""
    second = encoder == "text_encoder_2" or files.configs[encoder].get("hidden_act") == "gelu"
    if given:
        return tokenizers.load(given)
    own = files.tokenizers.get(TOKENIZER_OF[encoder]) or files.tokenizers.get("tokenizer")
    return tokenizers.load(own) if own else tokenizers.load(pad="!" if second else None)


def _with_embeddings(files: Files, texts: dict, words: dict, given: tuple[str, ...]) -> tuple[Files, dict, dict]:
    """Textual inversion: new rows of the text encoders' tables, and words that stand for them."""
    if not given:
        return files, texts, words
    found = [textual_inversion.load(*_with_word(text)) for text in given]
    hub, configs, known = dict(files.hub), dict(texts), dict(words)
    for name in texts:
        first = hub[name][textual_inversion.TABLE].shape[0]
        hub[name] = textual_inversion.added(hub[name], found, name)
        configs[name] = {**texts[name], "vocab_size": hub[name][textual_inversion.TABLE].shape[0]}
        known[name] = with_words(words[name], textual_inversion.places(first, found))
    return files._replace(hub=hub), configs, known


def _with_scale(text: str) -> tuple[str, float]:
    """FILE or FILE:SCALE.

    >>> _with_scale("a.safetensors:0.5"), _with_scale("a.safetensors")
    (('a.safetensors', 0.5), ('a.safetensors', 1.0))
    """
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _with_word(text: str) -> tuple[str, str | None]:
    """FILE or FILE:WORD; a file that is there may have a colon in its name.

    >>> _with_word("a.safetensors:<cat>"), _with_word("a.safetensors")
    (('a.safetensors', '<cat>'), ('a.safetensors', None))
    """
    file, colon, word = text.rpartition(":")
    return (file, word) if colon and not Path(text).is_file() else (text, None)


def _noised(files: Files) -> Any:
    config = files.configs.get("low_res_scheduler")
    if config is None and files.configs["unet"].get("num_class_embeds"):
        config = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
    return None if config is None else networks.schedule(config)[0]


def _control(files: Files, pooled: int, dtype: Any) -> Any:
    config = files.configs.get("controlnet")
    return None if config is None or "controlnet" not in files.hub else networks.control_network(config, pooled, dtype)


def _sizes(numbers: int, size: tuple[int, int], positive: bool) -> tuple[float, ...]:
    """Original size, no crop, and the target size, or for 5 numbers an aesthetic score: 6 for the prompt, 2.5 for the
    negative one, as in diffusers' pipelines (Podell et al. 2023, section 2.5)."""
    height, width = size
    return (height, width, 0, 0, 6.0 if positive else 2.5) if numbers == 5 else (height, width, 0, 0, height, width)
