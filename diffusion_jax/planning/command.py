"""make plan and make profile: from words to a page of text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from diffusion_jax.arguments import Count, closest
from diffusion_jax.typing import InputError


def plan_options(
    *,
    topology: str = "",
    chip: str = "",
    devices: Count | None = None,
    split: bool = False,
    tensor: Count = 1,
    sample: bool = True,
    cache: bool = True,
    json: str = "",
) -> dict:
    """What training and sampling would take: memory, operations, communication, time. Nothing is allocated.

    Args:
        topology: v5e:16x16 and its like, cpu:8 for simulated devices; by default this machine's. Make's TOPOLOGY.
        chip: whose peaks the time is reckoned with, such as H100; by default the topology's.
        devices: how many devices to use; by default all.
        split: split parameters and optimizer state over the devices instead of copying them.
        tensor: so many devices share the work within each layer, for networks that can be split so.
        sample: plan the sampler too.
        cache: keep what the compiler says, and ask it only once.
        json: a file to write all numbers to.
    """
    return dict(locals())


def plan_page(
    function: Callable[..., Any], name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, str | None]:
    """(the page, why it does not fit or None) of an experiment made with `arguments`; InputError for bad input."""
    from diffusion_jax.planning.topology import find_topology

    topology = find_topology(options["topology"], options["chip"])  # before anything else uses JAX

    from diffusion_jax.planning import report
    from diffusion_jax.planning.plan import make_plan

    where = {key: options[key] for key in ("devices", "split", "tensor")}
    cache = plan_cache() if options["cache"] else None
    result = make_plan(function(**arguments), topology, **where, sample=options["sample"], cache=cache)
    result = {"experiment": Path(name).stem, "arguments": dict(arguments)} | result
    result["advice"] = report.advice(result, {**arguments, "split": options["split"], "tensor": options["tensor"]})
    if options["json"]:
        Path(options["json"]).write_text(json.dumps(result, indent=1, default=str) + "\n")
    return report.text(result), None if result["fits"] else report.verdict(result)


def plan_cache() -> Path:
    """Where compilations of plans are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "diffusion_jax" / "plans"


def profile_options(
    *,
    data: Literal["real", "made-up"] = "real",
    steps_watched: Count = 5,
    chip: str = "",
    devices: Count | None = None,
    split: bool = False,
    tensor: Count = 1,
    out: str = "",
) -> dict:
    """Where the time of a training step goes: a table by kind of operation and the twenty dearest, and a trace.

    Args:
        data: the experiment's, or random numbers of its form.
        steps_watched: dispatches to watch.
        chip: whose peaks the floor is reckoned with, such as H100; by default the device's.
        devices: how many devices to use; by default all.
        split: split parameters and optimizer state over the devices instead of copying them.
        tensor: so many devices share the work within each layer, for networks that can be split so.
        out: folder of the trace; by default runs/EXPERIMENT/profile.
    """
    return dict(locals())


def profile_page(
    function: Callable[..., Any], name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    """Run and watch some steps of an experiment made with `arguments`; InputError for bad input."""
    import jax

    from diffusion_jax.planning.profile import profile
    from diffusion_jax.training.roofline import CHIPS, find_chip

    chip = find_chip(options["chip"] or jax.devices()[0].device_kind)
    if options["chip"] and chip is None:
        near = closest(options["chip"], CHIPS)
        raise InputError(f"chip={options['chip']}: not known{near}; there are: {', '.join(CHIPS)}")
    folder = Path(options["out"] or Path("runs") / Path(name).stem / "profile")
    where = {key: options[key] for key in ("devices", "split", "tensor")}
    page = profile(
        function(**arguments),
        folder,
        made_up=options["data"] == "made-up",
        steps=options["steps_watched"],
        chip=chip,
        peak=os.environ.get("PEAK", ""),
        **where,
    )
    return page + "\nOpen it at ui.perfetto.dev, or the folder in TensorBoard."
