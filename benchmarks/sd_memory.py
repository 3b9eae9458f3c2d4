"""Whether Stable Diffusion 1.5 fits a TPU chip of 16 GiB, by compiling its programs for one that need not be there.

    make .venv-tpu/ready
    PYTHONPATH=.venv-tpu .venv/bin/python benchmarks/sd_memory.py                     drawing and tuning, on v5e:1x1
    PYTHONPATH=.venv-tpu .venv/bin/python benchmarks/sd_memory.py programs=draw batch=4 size=768 tile=512

draw: the whole program of `make generate`, from token ids to pixels in bytes: text encoder, U-Net under guidance in a
scan over the steps, decoder; kernels in bfloat16. tune: the training program of EXP=stable_diffusion (a LoRA, remat).
From shapes alone: no weights are read or made. Prints a JSON line a program: parameters, GiB of a device's memory as
`make plan` counts them, the compiler's seconds, and the seconds a run would take by the estimate of `make plan`.
Compiling takes minutes, is done once and remembered.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp

from diffusion_jax import ddim
from diffusion_jax.arguments import Count, Natural, resolve, split_arguments
from diffusion_jax.experiment import Experiment, find_experiment
from diffusion_jax.generating import networks
from diffusion_jax.generating.loading import Loaded
from diffusion_jax.nets import clip_vit_l_text, count, sd15, sd_vae, tiled
from diffusion_jax.planning import plan
from diffusion_jax.planning.command import plan_cache
from diffusion_jax.planning.topology import Topology, find_topology
from diffusion_jax.systems import stable_diffusion as sd
from diffusion_jax.systems.tuning import halved
from diffusion_jax.training.data import to_uint8
from diffusion_jax.training.mesh import make_mesh, on_mesh, replicated, split_axis
from diffusion_jax.typing import InputError

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
TOKENS, WIDTH = 77, 768
BF16 = jnp.bfloat16
PROGRAMS = ("draw", "tune")


def options(
    *,
    topology: str = "v5e:1x1",
    programs: tuple[str, ...] = PROGRAMS,
    batch: Count = 1,
    size: Count = 512,
    steps: Count = 50,
    tile: Natural = 0,
    rank: Count = 8,
) -> dict:
    """See above.

    Args:
        topology: the devices to compile for.
        programs: draw, tune, or both with a comma between.
        batch: pictures at a time.
        size: pixels a side, a multiple of 8.
        steps: of DDIM, in draw.
        tile: decode in tiles of so many pixels, in draw; 0 for whole pictures.
        rank: of the LoRA, in tune.
    """
    return dict(locals())


def model(tile: int) -> sd.Model:
    """Stable Diffusion 1.5 in bfloat16."""
    schedule, table, predicts = networks.schedule(SCHEDULER)
    vae = sd_vae(dtype=BF16)
    return sd.Model(
        texts={"text_encoder": clip_vit_l_text(dtype=BF16)}, unet=sd15(dtype=BF16), schedule=schedule,
        vae=tiled(vae, tile, tile // 4) if tile else vae, predicts=predicts, table=table,
    )  # fmt: skip


def lower_draw(topology: Topology, batch: int, size: int, steps: int, tile: int) -> tuple[Any, Any, int]:
    """(the program, its mesh, its parameters) of text to image."""
    made, mesh = model(tile), make_mesh(list(topology.devices))
    rows, whole = split_axis(mesh), replicated(mesh)
    params = jax.eval_shape(partial(parameters, made), jax.eval_shape(lambda: jax.random.key(0)))

    def draw(params: Any, keys: Any, request: sd.Request) -> Any:
        return to_uint8(sd.text_to_image(made, params, keys, request, ddim(made.schedule)))

    def shaped(shape: tuple[int, ...], dtype: Any = jnp.float32, where: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    text = (1, 1, TOKENS)
    prompt = sd.Prompt({"text_encoder": shaped(text, jnp.int32)}, {"text_encoder": shaped(text)})
    noise = shaped((batch, size // 8, size // 8, 4), where=rows)
    request = sd.Request(prompt, prompt, shaped(()), shaped((steps + 1,)), noise)
    keys = shaped((batch,), jax.random.key(0).dtype, rows)
    given = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), params)
    return jax.jit(on_mesh(draw, mesh), out_shardings=rows).lower(given, keys, request), mesh, count(params)


def parameters(made: sd.Model, key: Any) -> dict[str, Any]:
    """As `make generate` keeps them: kernels in bfloat16."""
    nets = {"unet": made.unet, "vae": made.vae, **made.texts}
    return {name: halved(net.init(key), BF16) for name, net in nets.items()}


def tuning(batch: int, size: int, rank: int) -> Experiment:
    """EXP=stable_diffusion with the checkpoint's shapes in the place of a checkpoint."""
    made = model(0)
    loaded = Loaded(made, {}, {}, "plain", (size, size), networks.grid(SCHEDULER), None)
    experiment = find_experiment("stable_diffusion")
    files = {
        "checkpoint": lambda model: loaded,
        "network": lambda model, precision, remat: sd15(dtype=jnp.dtype(precision), remat=remat),
        "text_states": lambda model, texts: jnp.zeros((len(texts), TOKENS, WIDTH)),
    }
    with patch.dict(experiment.__globals__, files):
        return experiment(model="shapes", path="nowhere", batch=batch, size=size, rank=rank)


def drawn(topology: Topology, given: dict[str, Any]) -> dict[str, Any]:
    """What the drawing program takes."""
    lowered, mesh, n = lower_draw(topology, given["batch"], given["size"], given["steps"], given["tile"])
    found = plan._program(plan._compiled(lowered, topology, plan_cache()), topology, mesh, 0.0)
    return entry(n, found, topology)


def tuned(topology: Topology, given: dict[str, Any]) -> dict[str, Any]:
    """What the training program takes."""
    experiment = tuning(given["batch"], given["size"], given["rank"])
    result = plan.make_plan(experiment, topology, sample=False, cache=plan_cache())
    return entry(result["parameters"], result["programs"]["train"], topology)


def entry(n: int, program: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """The figures of one program."""
    if "error" in program:
        return {"parameters": n, "fits": False, "error": program["error"]}
    memory = program["memory"]
    found = {"parameters": n, "gib": {name: round(size / 2**30, 3) for name, size in memory.items()}}
    if topology.chip is not None:
        found |= {
            "fits": memory["total"] <= topology.chip.memory,
            "estimated_seconds": round(program["step_seconds"], 3),
        }
    return found | {"compile_seconds": round(program["compile_seconds"])}


def main(words: list[str]) -> int:
    given = resolve(options, split_arguments(words), "sd_memory")
    unknown = [name for name in given["programs"] if name not in PROGRAMS]
    if unknown:
        raise InputError(f"programs={unknown[0]} is none of {', '.join(PROGRAMS)}")
    topology = find_topology(given["topology"])
    fits = True
    for name in given["programs"]:
        found = {"draw": drawn, "tune": tuned}[name](topology, given)
        fits &= found.get("fits", True)
        print(json.dumps({"program": name, "chip": topology.name, "batch": given["batch"], "size": given["size"],
                          "tile": given["tile"], **found}), flush=True)  # fmt: skip
    return 0 if fits else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(sys.argv[1:]))
