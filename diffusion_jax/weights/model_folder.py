"""Models as folders in diffusers' layout: a configuration and weights a component, and an index that lists them.

    model_index.json                           {"_class_name": pipeline, component: [library, class], ...}
    unet/config.json                           a component's configuration
        diffusion_pytorch_model.safetensors    its weights; or in parts with an index, or of a variant,
        diffusion_pytorch_model.fp16.safetensors                                                                    (1)
    vae/, text_encoder/, text_encoder_2/, controlnet/    likewise; those of transformers' are called model.safetensors
    scheduler/scheduler_config.json            numbers only
    tokenizer/, tokenizer_2/                   for `text.tokenizer.load`

The weights themselves are taken in this order: of no variant, fp16, bf16, or the only one there is. A folder of one
component (a ControlNet, an autoencoder) has its configuration and its weights without the folder around them. Weights
keep their type and every bit; safety checkers, feature extractors and image encoders are passed over.

A model is looked for at a path first. A name ORGANISATION/NAME that is no path is looked for on the Hugging Face Hub,
through the package huggingface_hub, which keeps what it gets and finds it again without a network; of its files only
configurations, tokenizers and one variant of the safetensors are fetched, never pickles.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, torch_files
from diffusion_jax.weights.files import State

Config = dict[str, Any]
INDEX = "model_index.json"
CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "controlnet": "ControlNetModel",
    "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
}  # fmt: skip
"""The components that are read, and what they are in diffusers and transformers."""
TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
BARE = ("embeddings.", "encoder.", "final_layer_norm.")
SCHEDULERS = ("scheduler", "low_res_scheduler")
TOKENIZERS = ("tokenizer", "tokenizer_2")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "controlnet": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}  # fmt: skip
VARIANTS = ("", "fp16", "bf16")
"""In the order of preference."""
NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?P<variant>\.[\w-]+?)?(?P<part>-\d+-of-\d+)?"
    r"\.(?P<kind>safetensors|bin)(?P<index>\.index(?P<after>\.[\w-]+)?\.json)?"
)
"""diffusers writes an index as NAME.safetensors.index.VARIANT.json."""


class Folder(NamedTuple):
    """A model. index: model_index.json, empty for one component; configs: by component, schedulers among them.

    hub: the weights of the components by their names in diffusers. tokenizers: the folders of the tokenizers by name.
    """

    index: Config
    configs: dict[str, Config]
    hub: dict[str, State]
    tokenizers: dict[str, Path]


def load(
    path: str | os.PathLike[str], *, variant: str | None = None, components: Sequence[str] | None = None,
    dtype: Any = None,
) -> Folder:  # fmt: skip
    """The model in a folder, or of a name on the Hub.

    variant: "fp16", say, or "" for none, if not the first of (1) that is there. components: only these. dtype: cast
    floating point to it; as it is, if None. InputError, one line, for what is not there, is damaged, or is a model of
    another kind, which it names.
    """
    folder = fetch(path, variant=variant, components=components)
    if not (folder / INDEX).is_file():
        return _one(folder, variant, dtype)
    index = read_json(folder / INDEX)
    wanted = [name for name in _components(folder, index) if components is None or name in components]
    hub = {name: _weights(folder / name, variant, dtype, CLASSES[name] in TOWERS) for name in wanted}
    configs = {name: _config(folder / name / "config.json", CLASSES[name]) for name in wanted}
    for name in SCHEDULERS:
        if _given(index, name):
            configs[name] = read_json(folder / name / "scheduler_config.json")
    tokenizers = {name: folder / name for name in TOKENIZERS if _given(index, name) and (folder / name).is_dir()}
    return Folder(index, configs, hub, tokenizers)


def save(
    path: str | os.PathLike[str], model: Folder, *, variant: str | None = None, part_bytes: int | None = None
) -> Path:
    """Write a model as a folder that diffusers reads; inverse of `load`. Returns the folder.

    A component alone, without an index, has no folder around it. part_bytes: cut weights of more than that into parts.
    InputError for a component without a configuration.
    """
    folder = Path(path)
    alone = not model.index and len(model.configs) == len(model.hub) == 1
    for name, weights in model.hub.items():
        if name not in model.configs:
            raise InputError(f"the component {name} has no configuration to be written with")
        _save_weights(folder if alone else folder / name, STEMS[name], weights, variant, part_bytes)
    for name, config in model.configs.items():
        file = "scheduler_config.json" if name in SCHEDULERS else "config.json"
        _write_json(folder / file if alone else folder / name / file, config)
    if alone:
        return folder
    for name, source in model.tokenizers.items():
        if source.resolve() != (folder / name).resolve():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
    _write_json(folder / INDEX, model.index or index_of(model))
    return folder


def index_of(model: Folder) -> Config:
    """A model_index.json for a model that has none, such as one that was read from a single file."""
    kind = "StableDiffusionXL" if "text_encoder_2" in model.hub else "StableDiffusion"
    index: Config = {"_class_name": f"{kind}Pipeline"}
    index |= {name: ["diffusers" if name in ("unet", "vae", "controlnet") else "transformers", CLASSES[name]]
              for name in CLASSES if name in model.hub}  # fmt: skip
    index |= {name: ["diffusers", model.configs[name]["_class_name"]] for name in SCHEDULERS if name in model.configs}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in model.tokenizers}
    if kind == "StableDiffusion":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


# The Hub --------------------------------------------------------------------------------------------------------------


def fetch(path: str | os.PathLike[str], *, variant: str | None = None, components: Sequence[str] | None = None) -> Path:
    """The folder of a model: the path itself, or where huggingface_hub keeps the model of that name.

    InputError for what is neither, and for a name without the package or without a network.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{path} is a file, not a folder of a model")
    if not NAME.fullmatch(str(path)):
        raise InputError(f"there is no model at {path}: give the path of a folder or file, or ORGANISATION/MODEL")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"there is no folder {path}, and to get the model of that name pip install 'diffusion-jax[hub]' is needed"
        ) from None
    return _snapshot(huggingface_hub, str(path), variant, components)


def _snapshot(hub: Any, name: str, variant: str | None, components: Sequence[str] | None) -> Path:
    """What the Hub has of a model, or, if it cannot be asked, what of it was kept before."""
    reason: Exception | None = None
    try:
        names = [file.rfilename for file in hub.HfApi().model_info(name, timeout=20).siblings]
    except Exception as error:  # of many kinds, by version: no network, no such model, no leave to read it
        names, reason = None, error
    patterns = None if names is None else wanted(names, variant, components)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns, local_files_only=names is None))
    except Exception as error:
        why = " ".join(str(reason or error).split())[:200]
        raise InputError(f"there is no folder {name}, and the model of that name cannot be had: {why}") from error


def wanted(names: Iterable[str], variant: str | None = None, components: Sequence[str] | None = None) -> list[str]:
    """Which of a model's files are needed: configurations, tokenizers, and weights of one variant a component."""
    names = sorted(names)
    folders = {"", *(components or CLASSES), *SCHEDULERS, *TOKENIZERS}
    found = [n for n in names if n.endswith((".json", ".txt")) and n.rpartition("/")[0] in folders
             and not WEIGHTS.fullmatch(n.rpartition("/")[2])]  # fmt: skip
    bare = [] if INDEX in names else [""]
    for folder in [name for name in CLASSES if components is None or name in components] + bare:
        inside = [n.rpartition("/")[2] for n in names if n.rpartition("/")[0] == folder]
        chosen = choose([n for n in inside if ".safetensors" in n], variant)
        found += [f"{folder}/{n}".lstrip("/") for n in chosen]
        if not chosen and any(WEIGHTS.fullmatch(n) for n in inside):
            raise InputError(f"{folder or 'the model'} has no safetensors{_of(variant)} there; pickles are not fetched")
    return found


def choose(names: Iterable[str], variant: str | None = None) -> list[str]:
    """The files of the weights of one component: one, or an index and its parts, by the order of (1)."""
    found: dict[tuple[bool, str], list[str]] = {}
    for name in sorted(names):
        match = WEIGHTS.fullmatch(name)
        if match:
            of = (match["variant"] or match["after"] or "").lstrip(".")
            found.setdefault((match["kind"] == "bin", of), []).append(name)
    order = [variant] if variant is not None else [*VARIANTS, *sorted({of for _, of in found} - set(VARIANTS))]
    for pickled in (False, True):
        for of in order:
            if (pickled, of) in found:
                whole = [name for name in found[pickled, of] if "-of-" not in name and ".index." not in name]
                return whole[:1] or found[pickled, of]
    return []


# Folders --------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Config:
    """A file of settings; InputError if it is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: it holds no settings")
    return found


def _one(folder: Path, variant: str | None, dtype: Any) -> Folder:
    """A folder of one component."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no model: {INDEX} or config.json is missing")
    config = read_json(folder / "config.json")
    kind = _class(config)
    name = next((name for name, known in CLASSES.items() if known == kind), None)
    if name is None:
        raise InputError(f"{folder} holds a {kind}; {', '.join(sorted(CLASSES.values()))} are read")
    return Folder({}, {name: config}, {name: _weights(folder, variant, dtype, kind in TOWERS)}, {})


def _components(folder: Path, index: Config) -> list[str]:
    """The components there are; InputError for a model of another kind."""
    kind = _word(index.get("_class_name", "model without a name"))
    if not _given(index, "unet"):
        raise InputError(f"{folder} holds a {kind}, which is not of Stable Diffusion's kind: it has no U-Net")
    found = [name for name in CLASSES if _given(index, name)]
    for name in found:
        what = index[name][1]
        if what != CLASSES[name] and not (what in TOWERS and CLASSES[name] in TOWERS):
            raise InputError(f"{folder} holds a {kind}, whose {name} is a {_word(what)} instead of a {CLASSES[name]}")
    return found


def _given(index: Config, name: str) -> bool:
    """Whether an index names a class for a component; [null, null] stands for none."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _config(path: Path, known: str) -> Config:
    config = read_json(path)
    kind = _class(config)
    if kind != known and not (kind in TOWERS and known in TOWERS):
        raise InputError(f"{path} is of a {kind} instead of a {known}")
    return config


def _class(config: Config) -> str:
    """diffusers says what a configuration is of as `_class_name`, transformers in `architectures`, if at all."""
    own = config.get("architectures")
    if not own and config.get("model_type") == "clip_text_model":
        return CLASSES["text_encoder"]
    return _word(config.get("_class_name") or (own[0] if isinstance(own, list) and own else "model without a name"))


def _word(value: Any) -> str:
    """In an error's one line."""
    return files.plain(value, 80)


def _weights(folder: Path, variant: str | None, dtype: Any, tower: bool = False) -> State:
    if not folder.is_dir():
        raise InputError(f"{folder} is missing")
    names = choose([path.name for path in folder.iterdir()], variant)
    if not names:
        raise InputError(f"{folder} holds no weights{_of(variant)}: {STEMS.get(folder.name, 'model')}.safetensors")
    path = folder / next((name for name in names if files.AN_INDEX.search(name)), names[0])
    if len(names) > 1 and not files.AN_INDEX.search(path.name):
        raise InputError(f"{folder} holds parts of weights, {path.name} and others, and no index of safetensors")
    state = torch_files.load(path) if path.suffix == ".bin" else files.load(path)
    # A tower that transformers 5 has written alone names its weights without the model they are of.
    state = {f"text_model.{n}" if n.startswith(BARE) else n: v for n, v in state.items()} if tower else state
    return state if dtype is None else cast(state, dtype)


def cast(state: Mapping[str, np.ndarray], dtype: Any) -> State:
    """Weights with those in floating point as another type."""
    import ml_dtypes

    floats = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    return {name: value.astype(dtype) if value.dtype in floats else value for name, value in state.items()}


def _save_weights(folder: Path, stem: str, weights: State, variant: str | None, part_bytes: int | None) -> None:
    name = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    written = files.save(folder / name, weights, part_bytes=part_bytes)
    if variant and files.AN_INDEX.search(written.name):
        written.rename(folder / f"{stem}.safetensors.index.{variant}.json")


def _of(variant: str | None) -> str:
    return f" of the variant {variant!r}" if variant else ""


def _write_json(path: Path, content: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(path)
