"""What training and sampling of an experiment would take on devices that need not be there.

The programs are the ones a run compiles: `loop.dispatch_program` and `generate.picture_program`, for a mesh of the
topology's devices, from shapes alone. Nothing is allocated, the data set is not read, no parameter gets a value.
What a compilation says is kept below the user's cache folder, by the program's text: the same plan is instant then.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_jax.experiment import Experiment, initial_state, loss_fn
from diffusion_jax.planning.estimate import estimate
from diffusion_jax.planning.hlo import Program
from diffusion_jax.planning.topology import Topology
from diffusion_jax.training.generate import at_a_time, make_draw, picture_program
from diffusion_jax.training.loop import dispatch_program
from diffusion_jax.training.mesh import make_mesh, replicated, split_axis, state_shardings
from diffusion_jax.training.roofline import batch_shapes, train_flops
from diffusion_jax.training.state import parameter_count
from diffusion_jax.typing import InputError

MEMORY = ("arguments", "outputs", "aliased", "temporaries", "code")


def make_plan(
    experiment: Experiment,
    topology: Topology,
    *,
    devices: int | None = None,
    split: bool = False,
    tensor: int = 1,
    sample: bool = True,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Everything `report.text` shows, as numbers and names that JSON can hold; per device unless it says otherwise.

    devices, split, tensor: as in `loop.fit`. sample: plan the sampler too. cache: where compilations are remembered.
    InputError for a mesh or a batch that does not divide, before anything is compiled.
    """
    chosen = topology.devices
    if devices is not None:
        if not 1 <= devices <= len(chosen):
            raise InputError(f"devices={devices}: {topology.name} has {len(chosen)}")
        chosen = chosen[:devices]
    mesh = make_mesh(list(chosen), tensor, batch=experiment.batch // experiment.accumulate)
    shapes = jax.eval_shape(lambda: initial_state(experiment))
    shardings = state_shardings(mesh, shapes, split, experiment.partition)
    lowered: dict[str, Callable[[], Any]] = {"train": lambda: lower_train(experiment, mesh, shapes, shardings)}
    if sample:
        lowered["sample"] = lambda: lower_sample(experiment, mesh, topology, shapes.params)
    texts = {name: lower() for name, lower in lowered.items()}
    with ThreadPoolExecutor() as pool:  # The compiler runs outside of Python: one thread for each program.
        jobs = {name: pool.submit(_compiled, one, topology, cache) for name, one in texts.items()}
        compiled = {name: job.result() for name, job in jobs.items()}
    model = train_flops(experiment, loss_fn(experiment), batch_shapes(experiment)) / mesh.size
    result: dict[str, Any] = {
        "topology": topology.name,
        "compiler": topology.devices[0].platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "chip": topology.chip._asdict() if topology.chip else None,
        "split": split,
        "partitioned": bool(experiment.partition),
        "batch": experiment.batch,
        "parameters": parameter_count(experiment.net),
        "state": state_bytes(shapes, shardings),
        "batch_bytes": sum(_bytes(leaf, split_axis(mesh)) for leaf in batch_shapes(experiment).values()),
        "model_flops": model,
        "programs": {
            name: _program(found, topology, mesh, model if name == "train" else 0.0) for name, found in compiled.items()
        },
    }
    train = result["programs"]["train"]
    if "step_seconds" in train:
        train["images_per_second"] = experiment.batch / train["step_seconds"]
    return result | _fit(result)


def lower_train(experiment: Experiment, mesh: Mesh, shapes: Any, shardings: Any) -> Any:
    """The training program of a run, `dispatch` steps of it, from shapes alone. Batches come from the host."""
    place = split_axis(mesh, 1)

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((experiment.dispatch, *leaf.shape), leaf.dtype, sharding=place)

    state = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    batches = jax.tree.map(stacked, batch_shapes(experiment))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return dispatch_program(experiment, mesh, shardings).lower(state, None, batches, count)


def lower_sample(experiment: Experiment, mesh: Mesh, topology: Topology, params: Any) -> Any:
    """The sampling program, as many pictures at a time as a run draws."""
    whole, rows = replicated(mesh), split_axis(mesh)
    n = at_a_time(experiment, topology.devices[0].platform) * mesh.shape["data"]
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), params)
    keys = jax.ShapeDtypeStruct((n,), jax.random.key(0).dtype, sharding=rows)
    labels = None
    if isinstance(experiment.null, int):
        labels = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows)
    return picture_program(make_draw(experiment), mesh, experiment.decode).lower(params, keys, labels)


def state_bytes(shapes: Any, shardings: Any) -> dict[str, int]:
    """Bytes on each device of parameters, averages and optimizer."""

    def total(tree: Any, where: Any) -> int:
        return sum(jax.tree.leaves(jax.tree.map(_bytes, tree, where)))

    return {
        "parameters": total(shapes.params, shardings.params),
        "averages": total(shapes.averages, shardings.averages),
        "optimizer": total(shapes.opt_state, shardings.opt_state),
    }


def _bytes(leaf: Any, where: Any) -> int:
    return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _compiled(lowered: Any, topology: Topology, cache: Path | None) -> dict[str, Any]:
    """What the compiler says of a program: {"text", "memory", "cost", "seconds"}, or {"error"} if it does not fit."""
    path = cache_path(lowered, topology, cache) if cache else None
    if path is not None and path.is_file():
        return json.loads(gzip.decompress(path.read_bytes()))
    found = _compile(lowered)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(gzip.compress(json.dumps(found).encode(), 6))
        part.replace(path)
    return found


def cache_path(lowered: Any, topology: Topology, cache: Path) -> Path:
    """The file in which the compilation of a program for a topology is remembered."""
    key = hashlib.sha256("\n".join([lowered.as_text(), topology.name, str(topology.grid), *_versions()]).encode())
    return cache / f"{key.hexdigest()}.json.gz"


def _compile(lowered: Any) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "memory" not in str(error):
            raise
        return {"error": _out_of_memory(str(error)), "seconds": time.perf_counter() - start}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    fields = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "text": compiled.as_text(),
        "memory": dict(zip(MEMORY, (getattr(memory, f"{f}_size_in_bytes") for f in fields), strict=True)),
        "cost": {name: cost.get(name, 0.0) for name in ("flops", "bytes accessed", "transcendentals")},
        "seconds": time.perf_counter() - start,
    }


def _out_of_memory(text: str) -> str:
    """The sentence that says how much was asked for, of the compiler's many."""
    match = re.search(r"Used [\d.]+\w* of [\d.]+\w* \w+", text)
    return match[0] if match else text.splitlines()[0][:200]


def _versions() -> list[str]:
    found = []
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return [*found, os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")]


def _program(found: Mapping[str, Any], topology: Topology, mesh: Mesh, model: float) -> dict[str, Any]:
    """What is shown of one program."""
    if "error" in found:
        return {"error": found["error"], "compile_seconds": found["seconds"]}
    program = Program(found["text"])
    memory = dict(found["memory"])
    memory["total"] = sum(memory[name] for name in ("arguments", "outputs", "temporaries", "code")) - memory["aliased"]
    order = list(mesh.devices.flat)
    result = {
        "compile_seconds": found["seconds"],
        "memory": memory,
        "xla_flops": found["cost"]["flops"],
        "xla_bytes": found["cost"]["bytes accessed"],
        "collectives": [
            c._asdict() | {"group": list(c.group[:4]), "sent": c.sent * c.times} for c in program.collectives()
        ],
    }
    if topology.chip is None:
        return result
    work = estimate(program, topology.chip, topology.grid, lambda i: topology.place(i, order))
    result |= work._asdict() | {"floor": dict(zip(("compute", "memory", "collectives"), work.floor, strict=True))}
    result["step_seconds"] = work.step
    if model:
        result["mfu"] = model / (work.step * topology.chip.flops)
    return result


def _fit(result: Mapping[str, Any]) -> dict[str, Any]:
    """Whether it fits, and what each program needs beside what stays in memory."""
    programs, chip = result["programs"], result["chip"]
    if any("error" in program for program in programs.values()):
        return {"fits": False}
    state = sum(result["state"].values())
    needs = {"train": programs["train"]["memory"]["total"]}
    if "sample" in programs:
        # The state stays while pictures are drawn; unless it is split, the averages drawn from are part of it.
        own = programs["sample"]["memory"]["total"]
        needs["sample"] = state + own - (0 if result["split"] else result["state"]["parameters"])
    return {"needs": needs, "fits": chip is None or max(needs.values()) <= chip["memory"]}
