"""Devices to compile for: those of this machine, simulated processors, or a TPU slice that is nowhere near.

TPU programs are compiled by libtpu, a package from PyPI that runs on any x86-64 Linux.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.arguments import closest
from diffusion_jax.training.roofline import CHIPS, Chip, find_chip
from diffusion_jax.typing import InputError

SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
"""Slices that can be rented, by chip; others that the compiler knows work too."""
_SETTINGS = {
    # No questions to a cloud, no warnings that there is none, and other processes may compile at the same time.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology(NamedTuple):
    """Devices, and what joins them. chip: None if its peaks are not known. grid: chips along each axis of the network.

    abstract: the devices can be compiled for but not used.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    grid: tuple[int, ...]
    abstract: bool

    def place(self, partition: int, order: Sequence[Any]) -> tuple[int, ...]:
        """Where on the grid device `partition` of a mesh's flat `order` is."""
        return tuple(getattr(order[partition], "coords", (partition,)))[: len(self.grid)]


def find_topology(name: str, chip: str = "") -> Topology:
    """The devices of a name: "" (this machine's), "cpu:8" (simulated), "v5e:16x16" (a TPU slice).

    chip: whose peaks to reckon with instead, of `roofline.CHIPS`. Must be called before JAX is used. InputError for a
    name or chip that is not known, and if libtpu is missing.
    """
    if chip and find_chip(chip) is None:
        raise InputError(f"chip={chip}: not known{closest(chip, CHIPS)}; there are: {', '.join(CHIPS)}")
    if not name:
        devices, kind = jax.devices(), jax.devices()[0].device_kind
        return Topology(kind, devices, find_chip(chip or kind), (len(devices),), False)
    if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name, _simulated(int(match[1])), find_chip(chip), (int(match[1]),), False)
    match = re.fullmatch(r"(v\d+\w?):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in SLICES:
        raise InputError(f"TOPOLOGY={name}: not known{closest(name, known())}; there are: {', '.join(known())}")
    sizes = [int(n) for n in match[2].split("x")]
    devices = _tpu(name, sizes)
    grid = tuple(1 + max(d.coords[i] for d in devices) for i in range(3))
    chosen = find_chip(chip or match[1])
    cores = len(devices) // (grid[0] * grid[1] * grid[2])
    return Topology(name, devices, _core(chosen, cores), grid, True)


def known() -> list[str]:
    """All names of topologies, besides cpu:N for any N."""
    return ["cpu:8", *(f"{chip}:{shape}" for chip, shapes in SLICES.items() for shape in shapes)]


def _core(chip: Chip | None, cores: int) -> Chip | None:
    """What a device has of a chip that appears as several (TPU v4)."""
    if chip is None or cores <= 1:
        return chip
    shared = ("flops", "flops32", "memory", "bandwidth", "link", "dcn")
    return chip._replace(**{name: getattr(chip, name) / cores for name in shared})


def _simulated(n: int) -> list[Any]:
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX is in use already: what there is must do.
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise InputError(f"TOPOLOGY=cpu:{n}: JAX has been started with {len(devices)} simulated devices already")
    return devices[:n]


def _tpu(name: str, sizes: list[int]) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"TOPOLOGY={name} needs the package libtpu: `make plan` gets it by itself, elsewhere "
            'pip install "jax[tpu]" (x86-64 Linux)'
        )
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")  # all that runs here; libtpu compiles only
    chips = 1
    for size in sizes:
        chips *= size
    small = {"chips_per_host_bounds": [*sizes, *[1] * (3 - len(sizes))]} if chips < 4 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **small).devices)
    except jax.errors.JaxRuntimeError as error:
        text = str(error).splitlines()[0]
        raise InputError(f"TOPOLOGY={name}: {text[:200]}; there are: {', '.join(known())}") from None
