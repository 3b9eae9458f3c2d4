"""A number with its protocol: what was measured, on what, how, and how sure it is.

Two numbers may be compared when everything that the metric depends on beside the model is the same: the feature
network's bits, the resize, the reference set and the number of samples. What belongs to the model, such as its sampler,
evaluations, average and seeds, is told but may differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.typing import InputError


@dataclass(frozen=True)
class Protocol:
    """How a number was measured.

    features, features_hash: the feature network, and sha256 of its weights (its first 12 digits are shown).
    resize: how pictures came to its size. reference, reference_hash, reference_n: the real examples. n: samples.
    Told, but free to differ: sampler, evaluations (network calls a sample), guidance, average (of parameters), seeds.
    """

    features: str
    features_hash: str
    resize: str
    reference: str
    reference_hash: str
    reference_n: int
    n: int
    sampler: str = ""
    evaluations: int = 0
    guidance: float = 1.0
    average: str = ""
    seeds: tuple[int, ...] = ()


BINDING = ("features", "features_hash", "resize", "reference", "reference_hash", "reference_n", "n")
"""The fields of a `Protocol` in which two comparable results agree."""


@dataclass(frozen=True)
class Result:
    """A metric's value, its standard error (nan: none) and its protocol."""

    metric: str
    value: float
    standard_error: float
    protocol: Protocol

    def line(self) -> str:
        """One line for people.

        >>> p = Protocol("inception", "ab" * 32, "bilinear 299", "cifar10 train", "cd" * 32, 50000, 50000, "heun", 35)
        >>> Result("fid", 1.97, float("nan"), p).line()
        'fid 1.97  n=50000 features=inception(abababababab) resize=bilinear 299 reference=cifar10 train(50000) sampler=heun evaluations=35'
        """  # noqa: E501
        p = self.protocol
        error = "" if math.isnan(self.standard_error) else f" +- {self.standard_error:.2g}"
        told = [f"n={p.n}", f"features={p.features}({p.features_hash[:12]})", f"resize={p.resize}"]
        told.append(f"reference={p.reference}({p.reference_n})")
        for name in ("sampler", "evaluations", "average"):
            if getattr(p, name):
                told.append(f"{name}={getattr(p, name)}")
        if p.guidance != 1.0:
            told.append(f"guidance={p.guidance:g}")
        if p.seeds:
            told.append(f"seeds={','.join(map(str, p.seeds))}")
        return f"{self.metric} {self.value:.4g}{error}  {' '.join(told)}"

    def json(self) -> str:
        """The same as one line of JSON; a missing standard error is null."""
        entry = asdict(self)
        if math.isnan(self.standard_error):
            entry["standard_error"] = None
        return json.dumps(entry)


def read_result(text: str) -> Result:
    """The inverse of `Result.json`; InputError for anything else."""
    try:
        entry = json.loads(text)
        protocol = dict(entry.pop("protocol"))
        protocol["seeds"] = tuple(protocol.get("seeds", ()))
        error = entry.pop("standard_error")
        return Result(**entry, standard_error=math.nan if error is None else error, protocol=Protocol(**protocol))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(f"not a result of an evaluation ({problem}): {text[:80]}") from None


def difference(a: Result, b: Result) -> tuple[float, float]:
    """a - b and its standard error (nan if one has none); InputError with the reason if they cannot be compared."""
    reasons = [f"metric: {a.metric} and {b.metric}"] if a.metric != b.metric else []
    same = a.protocol.reference_hash == b.protocol.reference_hash != ""
    for name in BINDING:
        if name == "reference" and same:
            continue  # the same examples under another name
        one, other = getattr(a.protocol, name), getattr(b.protocol, name)
        if one != other:
            reasons.append(f"{name}: {one} and {other}")
    if reasons:
        raise InputError(f"these results cannot be compared, they differ in {'; '.join(reasons)}")
    return a.value - b.value, math.hypot(a.standard_error, b.standard_error)


def over_seeds(results: list[Result]) -> Result:
    """The mean over results that differ in their seeds only, with the standard error of that mean."""
    for other in results[1:]:
        difference(results[0], other)
        names = [f.name for f in fields(Protocol) if f.name != "seeds"]
        changed = [n for n in names if getattr(results[0].protocol, n) != getattr(other.protocol, n)]
        if changed:
            raise InputError(f"a mean over seeds of results that differ in {', '.join(changed)}")
    values = np.array([r.value for r in results])
    seeds = tuple(seed for r in results for seed in r.protocol.seeds)
    error = results[0].standard_error if len(values) == 1 else float(values.std(ddof=1) / np.sqrt(len(values)))
    protocol = Protocol(**{**vars(results[0].protocol), "seeds": seeds})
    return Result(results[0].metric, float(values.mean()), error, protocol)


def sha256(data: Path | Mapping[str, np.ndarray]) -> str:
    """Of a file's bytes, or of named arrays: their names, types, shapes and bits, in the order of the names."""
    digest = hashlib.sha256()
    if isinstance(data, Path):
        with data.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()
    for name in sorted(data):
        array: Any = np.ascontiguousarray(data[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
