"""Weak scaling from 1 to 256 chips, without one: the tables of docs/scaling.md.

    python benchmarks/scaling.py                            arithmetic alone, a minute
    PYTHONPATH=.venv-tpu python benchmarks/scaling.py compile=True      compiles for the chips too, hours; remembered

Arithmetic: the examples of a chip stay the same, so that its operations do too, and the collectives of data parallelism
follow from the parameters. With P parameters, F model FLOPs of a chip and g chips,

    replicated     all-reduce of 4 P bytes of gradients: each chip sends 8 P (g - 1) / g                             (1)
    split          gathers weights twice and scatters gradients once: 2 * 2 P + 4 P, each times (g - 1) / g          (2)
    efficiency     T / (T + t) if nothing overlaps, min(1, T / t) if all does, with T = F / (utilisation peak)       (3)

where weights travel in bfloat16. (3) is given at a utilisation of 0.4 for the chip alone: the less it reaches, the
better it scales.

Compiled: the program of a few blocks is compiled for the slice, twice; every figure of a stack of equal blocks is
a + b blocks, and the table gives it at full depth. Figures of one JSON line each; a table in Markdown follows.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from diffusion_jax import cosine, denoising_loss, dpmpp_2m, draw_stratified, parameterize, uniform
from diffusion_jax.arguments import resolve, split_arguments
from diffusion_jax.experiment import Experiment, find_experiment, loss_fn
from diffusion_jax.nets.dit import dit
from diffusion_jax.planning.command import plan_cache
from diffusion_jax.planning.estimate import collective_seconds
from diffusion_jax.planning.hlo import Collective
from diffusion_jax.planning.plan import make_plan, state_bytes
from diffusion_jax.planning.topology import find_topology
from diffusion_jax.training import ema
from diffusion_jax.training.mesh import make_mesh, state_shardings
from diffusion_jax.training.roofline import batch_shapes, train_flops
from diffusion_jax.training.step import make_objective

DEPTH, SHORT = 28, (2, 4)
ALONE = 0.4
CHIPS = {"v5e": ("1x1", "2x4", "8x8", "16x16"), "v6e": ("1x1", "2x4", "8x8", "16x16")}
MODELS = {
    # name: (a chip's examples, experiment of that batch, sharding that fits)
    "DiT-XL/2": (32, lambda batch: find_experiment("imagenet256_dit_xl2")(batch=batch)),
    "EDM2-S": (64, lambda batch: find_experiment("imagenet64_edm2_s")(batch=batch)),
    "EDM2-XXL": (16, lambda batch: find_experiment("imagenet64_edm2_s")(batch=batch, width=448)),
    "EDM DDPM++": (64, lambda batch: find_experiment("cifar10_edm")(batch=batch, precision="bfloat16")),
}


def options(*, compile: bool = False, slices: tuple[str, ...] = ("v6e:1x1", "v6e:16x16")) -> dict:
    """See above.

    Args:
        compile: compile what is not remembered.
        slices: to compile for.
    """
    return dict(locals())


def short_dit(depth: int, batch: int) -> Experiment:
    """DiT-XL/2 of `depth` blocks under the plainest objective, which is not what scales."""
    schedule, shape = cosine(), (32, 32, 4)
    return Experiment(
        data=lambda: None,
        shape=shape,
        net=dit((depth, 1152, 16), 2, shape, learned_variance=False, dtype=jnp.dtype("bfloat16")),
        schedule=schedule,
        read=lambda net: parameterize(net, schedule, "v", time=lambda t: 1000 * t),
        objective=make_objective(schedule, draw_stratified(), partial(denoising_loss, target="v")),
        optimizer=optax.adamw(1e-4),
        ema=ema.constant(0.9999),
        sampler=dpmpp_2m(schedule),
        times=uniform,
        sample_steps=20,
        steps=10,
        batch=batch,
        null=1000,
        drop=0.1,
        guidance=1.5,
    )


def arithmetic(name: str) -> list[dict]:
    """Equations (1) to (3) on every slice; nothing is compiled."""
    from diffusion_jax.experiment import initial_state

    per_chip, make = MODELS[name]
    one = make(per_chip)
    shapes = jax.eval_shape(lambda: initial_state(one))
    p = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    flops = train_flops(one, loss_fn(one), batch_shapes(one))
    rows = []
    for kind, slices in CHIPS.items():
        for shape in slices:
            topology = find_topology(f"{kind}:{shape}")
            mesh = make_mesh(list(topology.devices))
            n, chip = mesh.size, topology.chip
            order = list(mesh.devices.flat)
            for split in (False, True) if n > 1 else (False,):
                state = state_bytes(shapes, state_shardings(mesh, shapes, split, one.partition))
                kinds = {"all-gather": 4 * p, "reduce-scatter": 4 * p} if split else {"all-reduce": 4 * p}
                group = tuple(range(n))
                parts = [Collective(kind_, size, group, n, 1, True) for kind_, size in kinds.items()]
                t = sum(collective_seconds(c, chip, topology.grid, lambda i: topology.place(i, order)) for c in parts)  # noqa: B023
                alone = flops / (ALONE * chip.flops)
                rows.append(
                    {
                        "model": name, "chips": f"{kind}:{shape}", "n": n, "batch": per_chip * n, "split": split,
                        "parameters": p, "tflop_per_chip": flops / 1e12, "state_gib": sum(state.values()) / 2**30,
                        "sent_gib": sum(c.sent for c in parts) / 2**30, "step_alone_ms": 1e3 * alone,
                        "collectives_ms": 1e3 * t, "efficiency_none_hidden": alone / (alone + t),
                        "efficiency_all_hidden": min(1.0, alone / t) if t else 1.0,
                    }
                )  # fmt: skip
    return rows


def compiled(slice_: str, split: bool, allowed: bool) -> dict | None:
    """DiT-XL/2 at full depth from two short compilations, or None if they are not remembered and not allowed."""
    topology = find_topology(slice_)
    found = []
    for depth in SHORT:
        experiment = short_dit(depth, 32 * len(topology.devices))
        if not allowed and not remembered(experiment, topology, split):
            return None
        result = make_plan(experiment, topology, split=split, sample=False, cache=plan_cache())
        train = result["programs"]["train"]
        sent: dict[str, float] = {}
        for c in train["collectives"]:
            key = c["kind"] + (" (asynchronous)" if c["overlaps"] else "")
            sent[key] = sent.get(key, 0) + c["sent"] / 2**30
        memory = train["memory"]
        found.append(
            {
                "total_gib": memory["total"] / 2**30, "temporaries_gib": memory["temporaries"] / 2**30,
                "tflop": train["flops"] / 1e12, "model_tflop": result["model_flops"] / 1e12,
                "ops_ms": 1e3 * train["ops"],
                "collectives_ms": 1e3 * train["seconds"]["collective"], "exposed_ms": 1e3 * train["exposed"],
                "sent_gib": sum(sent.values()), **{f"sent_gib: {key}": value for key, value in sent.items()},
            }
        )  # fmt: skip
    a, b = found
    more = (DEPTH - SHORT[0]) / (SHORT[1] - SHORT[0])
    deep = {k: a.get(k, 0) + more * (b.get(k, 0) - a.get(k, 0)) for k in {**a, **b}}
    deep["efficiency"] = deep["ops_ms"] / (deep["ops_ms"] + deep["exposed_ms"])
    deep["efficiency_none_hidden"] = deep["ops_ms"] / (deep["ops_ms"] + deep["collectives_ms"])
    deep["mfu"] = deep["model_tflop"] * 1e12 / ((deep["ops_ms"] + deep["exposed_ms"]) * 1e-3 * topology.chip.flops)
    return {"model": "DiT-XL/2, compiled", "chips": slice_, "n": len(topology.devices), "split": split, **deep}


def remembered(experiment: Experiment, topology, split: bool) -> bool:
    """Whether `make_plan` would have to compile."""
    from diffusion_jax.experiment import initial_state
    from diffusion_jax.planning.plan import cache_path, lower_train

    mesh = make_mesh(list(topology.devices))
    shapes = jax.eval_shape(lambda: initial_state(experiment))
    lowered = lower_train(experiment, mesh, shapes, state_shardings(mesh, shapes, split, experiment.partition))
    return cache_path(lowered, topology, plan_cache()).is_file()


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a table: column -> format."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(format(row[c], f) if f else str(row[c]) for c, f in columns.items()) + " |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    given = options(**resolve(options, split_arguments(words), "scaling"))
    rows = [row for name in MODELS for row in arithmetic(name)]
    deep = [compiled(name, split, given["compile"]) for name in given["slices"] for split in (False, True)]
    deep = [row for row in deep if row is not None and (row["n"] > 1 or not row["split"])]
    for row in [*rows, *deep]:
        print(json.dumps(row))
    print()
    print(markdown(rows, {"model": "", "chips": "", "batch": ",", "split": "", "state_gib": ".2f", "sent_gib": ".2f",
                          "step_alone_ms": ".1f", "collectives_ms": ".2f", "efficiency_none_hidden": ".1%",
                          "efficiency_all_hidden": ".1%"}))  # fmt: skip
    if deep:
        print()
        print(markdown(deep, {"chips": "", "split": "", "total_gib": ".1f", "tflop": ".1f", "ops_ms": ".1f",
                              "sent_gib": ".2f", "collectives_ms": ".2f", "exposed_ms": ".2f", "mfu": ".1%",
                              "efficiency": ".1%", "efficiency_none_hidden": ".1%"}))  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(sys.argv[1:])
