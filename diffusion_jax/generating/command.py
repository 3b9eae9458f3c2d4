"""`make generate`: from words on the command line to PNG files, a contact sheet, and a line that says where it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion_jax.experiment import check_seed
from diffusion_jax.generating import files
from diffusion_jax.generating.loading import Loaded, load_models
from diffusion_jax.generating.prompts import read_prompts, with_sizes
from diffusion_jax.generating.tasks import SAMPLERS, Common, Parts, Stage, Use, chosen_use
from diffusion_jax.ops import fold, normal_like
from diffusion_jax.systems import stable_diffusion as sd
from diffusion_jax.training.data import to_uint8
from diffusion_jax.training.generate import example_keys
from diffusion_jax.training.mesh import make_mesh, on_mesh, replicated, split_axis
from diffusion_jax.training.pictures import fitting_scale, grid, save_picture
from diffusion_jax.training.roofline import convolution_bytes, memory_of
from diffusion_jax.typing import Array, InputError, Params, Sampler

TO_SHOW = 25
"""Pictures on the contact sheet."""
MOST_NOISE = 350
"""What the published upscaler takes of the 1000 levels of its noise."""
NUMBERS = ("guidance", "image_guidance", "control_scale", "strength", "noise_level")
"""Options that a program is given as arrays."""
Options = Mapping[str, Any]


class Job(NamedTuple):
    """What is drawn: the use, what all pictures share, height and width of the latents, and noise that was given."""

    use: Use
    common: Common
    latent: tuple[int, int]
    noise: np.ndarray | None

    @property
    def steps(self) -> int:
        return sum(int(np.sum(np.diff(stage.times) < 0)) for stage in self.common.stages.values())


def generate(options: Options) -> str:
    """Draw what the options ask for, see `generate_options`; InputError for what cannot be, before anything long."""
    check(options)
    loaded = load_models(options)
    job = prepare(options, loaded)
    out = Path(options["out"] or Path("runs") / "generate" / time.strftime("%Y-%m-%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in options.items() if name not in ("out", "devices", "batch")}
    told = {name: _bare(value) for name, value in settings.items()}
    shown: list[np.ndarray] = []
    for i, image in enumerate(pictures(options, loaded, job)):
        files.save_with_settings(out / f"{i:04d}.png", image, {**told, "number": i})
        shown += [image] if len(shown) < TO_SHOW else []
    columns = int(np.ceil(np.sqrt(len(shown))))
    save_picture(out / "sheet.png", grid(np.stack(shown), columns, fitting_scale(shown[0].shape[1], columns)))
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    return f"{len(shown)} pictures in {out}: 0000.png …, sheet.png"


def check(options: Options) -> None:
    """InputError for options that are missing or contradict each other, before any file is read."""
    if not options["model"]:
        raise InputError("which model? give model=PATH, a folder or a .safetensors file of Stable Diffusion")
    for name, other in {"mask": "init", "expand": "init", "control": "controlnet", "controlnet": "control"}.items():
        if options[name] and not options[other]:
            raise InputError(f"{name}= needs {other}= too")
    if options["expand"] and options["size"]:
        raise InputError("expand= adds to the size of init: give no size= with it")
    if options["init"] and not 0 < options["strength"] <= 1:
        raise InputError(f"strength={options['strength']}: a part of the way, above 0 and up to 1")
    for name in ("init", "mask", "control"):
        if options[name] and not Path(options[name]).expanduser().is_file():
            raise InputError(f"{name}={options[name]}: there is no such file")
    if options["size"]:
        files.parse_size(options["size"])
    if options["noise_level"] > MOST_NOISE:
        raise InputError(f"noise_level={options['noise_level']} is above {MOST_NOISE}, the most that was trained on")
    check_seed(options["seed"])
    make_mesh(options["devices"])


def prepare(options: Options, loaded: Mapping[str, Loaded]) -> Job:
    """Everything a program is given, read and checked."""
    main, seen = loaded["main"], pictures_to_start_from(options, loaded["main"])
    use = chosen_use(options, loaded)
    size = seen["init"].shape[:2] if "init" in seen else _wanted_size(options, main)
    stages = {name: _stage(options, name, one, size) for name, one in loaded.items()}
    numbers = {name: jnp.float32(options[name]) for name in NUMBERS}
    arrays = {name: jnp.asarray(value[None]) for name, value in seen.items()}
    latent = size if main.kind == "upscaling" else (size[0] // main.model.factor, size[1] // main.model.factor)
    noise = None
    if options["latents"]:
        noise = files.read_latents(options["latents"], options["n"], (latent[0], latent[1], main.model.channels))
    return Job(use, Common(stages, arrays, numbers), latent, noise)


def pictures_to_start_from(options: Options, main: Loaded) -> dict[str, np.ndarray]:
    """ "init" and "control", f32[h, w, 3], and "mask", f32[h, w, 1], of one size, as far as the options give them."""
    found: dict[str, np.ndarray] = {}
    wanted = files.parse_size(options["size"], main.model.factor) if options["size"] else None
    if options["init"]:
        found["init"] = files.read_picture(options["init"], wanted, main.model.factor)
        size = found["init"].shape[:2]
        if options["mask"] or options["expand"]:
            own = files.picture_size(options["init"])
            mask = files.read_mask(options["mask"], own, size) if options["mask"] else np.zeros((*size, 1), np.float32)
            found["mask"] = mask
        if options["expand"]:
            found["init"], found["mask"] = files.extended(
                found["init"], found["mask"], files.parse_expand(options["expand"], main.model.factor)
            )
    if options["control"]:
        size = found["init"].shape[:2] if found else wanted or main.size
        found["control"] = files.read_picture(options["control"], size, main.model.factor)
    return found


def pictures(options: Options, loaded: Mapping[str, Loaded], job: Job) -> Iterator[np.ndarray]:
    """Pictures u8[h, w, 3] one after the other; the next batch is computed while the caller writes this one."""
    mesh = make_mesh(options["devices"])
    n = options["n"]
    batch = min(-(-n // mesh.shape["data"]), options["batch"] or _at_once()) * mesh.shape["data"]
    program = picture_program(options, loaded, job, mesh, lambda: bar.update())
    params = {name: one.params for name, one in loaded.items()}
    check_memory(program, params, job, batch, mesh)
    bar = tqdm(total=job.steps * -(-n // batch), desc="drawing", unit="step", dynamic_ncols=True)
    params = jax.device_put(params, replicated(mesh))
    rows = split_axis(mesh)
    keys_of = jax.jit(example_keys, static_argnums=2, out_shardings=rows)

    def begin(start: int) -> Array:
        keys = keys_of(np.uint32(options["seed"]), np.int32(start), batch)
        noise = None
        if job.noise is not None:
            noise = jax.device_put(job.noise[np.minimum(np.arange(start, start + batch), n - 1)], rows)
        return program(params, job.common, keys, noise)

    with bar:
        ahead = begin(0)
        for start in range(0, n, batch):
            drawn = ahead
            if start + batch < n:
                ahead = begin(start + batch)
            done = np.asarray(drawn)[: n - start]
            bar.update(max(0, job.steps * (start // batch + 1) - bar.n))
            yield from done


def picture_program(
    options: Options, loaded: Mapping[str, Loaded], job: Job, mesh: Mesh, tick: Callable[[], Any]
) -> Callable[[Mapping[str, Params], Common, Array, Array | None], Array]:
    """(params, common, keys [b], noise f32[b, h, w, c] or None) -> u8[b, h, w, 3], jitted whole.

    tick: called after each step where that is possible.
    """
    chosen = {name: SAMPLERS[options["sampler"]](one.model.schedule) for name, one in loaded.items()}
    if jax.devices()[0].platform == "cpu":  # elsewhere a program that calls back could not be kept on disk
        chosen = {name: reporting(sampler, tick) for name, sampler in chosen.items()}
    bare = {name: one._replace(params=None) for name, one in loaded.items()}

    def draw(params: Mapping[str, Params], common: Common, keys: Array, noise: Array | None) -> Array:
        if noise is None:
            like = jnp.zeros((keys.shape[0], *job.latent, bare["main"].model.channels))
            noise = normal_like(fold(keys, 0), like)
        return to_uint8(job.use(Parts(bare, params, chosen), fold(keys, 1), common, noise))

    return jax.jit(on_mesh(draw, mesh), out_shardings=split_axis(mesh))


def check_memory(program: Any, params: Mapping[str, Params], job: Job, batch: int, mesh: Mesh) -> None:
    """InputError where a device cannot hold the parameters and the largest layer's arrays; nothing is compiled."""
    device = mesh.devices.flat[0]
    there = memory_of(device)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Shapes that lie as the arrays will, so that this trace is the one that is compiled.
    shaped = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)))
    keys = jax.eval_shape(partial(example_keys, 0, 0, batch)).update(sharding=split_axis(mesh))
    noise = None
    if job.noise is not None:
        noise = jax.ShapeDtypeStruct((batch, *job.noise.shape[1:]), jnp.float32, sharding=split_axis(mesh))
    layer = convolution_bytes(program, shaped(params), job.common, keys, noise) // mesh.shape["data"]
    if there is not None and held + layer > there:
        gib = [f"{n / 2**30:.1f} GiB" for n in (held, layer, there)]
        raise InputError(
            f"not enough memory: {gib[0]} of parameters and {gib[1]} for the largest layer alone, and this "
            f"{device.platform} has {gib[2]}; batch=1, a smaller size=, tile=512 and precision=bfloat16 take less"
        )


def reporting(inner: Sampler, tick: Callable[[], Any]) -> Sampler:
    """`inner`, calling `tick` with each step."""

    def step(key: Any, x: Array, *rest: Any) -> Any:
        jax.debug.callback(tick)
        return inner.step(key, x, *rest)

    return Sampler(inner.init, step)


def _bare(value: Any) -> Any:
    """A file by its name alone: pictures are given away, and the folders of whoever drew them are nobody's business."""
    if isinstance(value, tuple | list):
        return [_bare(one) for one in value]
    if not isinstance(value, str) or Path(value).name == value:
        return value
    there = any(Path(text).expanduser().exists() for text in (value, value.rpartition(":")[0]) if text)
    return Path(value).name if there else value


def _stage(options: Options, name: str, loaded: Loaded, size: files.Size) -> Stage:
    """The prompts and times of one model."""
    prompt, negative = read_prompts(loaded.tokenizers, [options["prompt"]], [options["negative"]], options["chunks"])
    if loaded.sizes is not None:
        prompt, negative = with_sizes(prompt, loaded.sizes(size, True)), with_sizes(negative, loaded.sizes(size, False))
    try:
        times = loaded.grid(options["steps"], options["sampler"])
    except ValueError as error:
        raise InputError(f"steps={options['steps']} is not possible here: {error}") from None
    if options["init"] and name == "main" and loaded.kind in ("plain", "inpainting"):
        times = sd.from_strength(times, options["strength"])
    if options["refiner"] and name in ("main", "refiner"):
        times = _part(times, name, options["refine"])
    return Stage(prompt, negative, jnp.asarray(sd.fill(times)))


def _part(times: np.ndarray, name: str, share: float) -> np.ndarray:
    """The first or the last part of the way, the refiner's being `share` of the steps."""
    n = len(times) - 1
    cut = n - round(n * share)
    if not 0 < cut < n:
        raise InputError(f"refine={share} leaves one of the two models without any of {n} steps")
    return times[: cut + 1] if name == "main" else times[cut:]


def _wanted_size(options: Options, main: Loaded) -> files.Size:
    return files.parse_size(options["size"], main.model.factor) if options["size"] else main.size


def _at_once() -> int:
    return 1 if jax.devices()[0].platform == "cpu" else 4
