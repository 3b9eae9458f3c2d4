"""LoRA: differences of low rank to the weights of a model, in the names of kohya's trainers and of diffusers.

The difference to a weight W of a linear layer [n_out, n_in] or a convolution [n_out, n_in, h, w], with up B, down A of
rank r and perhaps M between them, is (Hu et al. 2021, arXiv:2106.09685, section 4.1)

    dW = (alpha / r) B A            B [n_out, r], A [r, n_in] or [r, n_in, h, w]                                    (1)
    dW = (alpha / r) B M A          B [n_out, r, 1, 1], M [r, r, h, w], A [r, n_in, 1, 1]                           (2)
    W' = W + sum over LoRAs k of s_k dW_k                                                                           (3)

(2) is LoCon's for convolutions (Yeh et al. 2023, arXiv:2309.14859, section 3). Where a file has no alpha, alpha = r.
(3) is summed in float32 and rounded once to the weight's type. A module is called, for a module a.b_c of a component,

    kohya       lora_unet_a_b_c, lora_te_a_b_c (lora_te1_, lora_te2_ in XL) .lora_down.weight, .lora_up.weight, .alpha,
                .lora_mid.weight; in the U-Net also by the original names of `ldm_names`                            (4)
    diffusers   unet.a.b_c, text_encoder.a.b_c, text_encoder_2.a.b_c .lora_A.weight, .lora_B.weight, with alphas in the
                header; before that .lora.down.weight, .lora_linear_layer.up.weight, or for the projections of an
                attention a.b.processor.to_q_lora.down.weight                                                       (5)

As a_b_c says no more where the dots were, names are looked up among those of the model's own weights.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from diffusion_jax.typing import InputError
from diffusion_jax.weights import files, ldm_names, torch_files
from diffusion_jax.weights.files import State

Hub = Mapping[str, Mapping[str, np.ndarray]]
Naming = Literal["kohya", "diffusers"]
HEADER = "lora_adapter_metadata"


class Update(NamedTuple):
    """A difference (1) or (2) to one weight; alpha None counts as the rank."""

    down: np.ndarray
    up: np.ndarray
    mid: np.ndarray | None = None
    alpha: float | None = None


Lora = dict[str, dict[str, Update]]
"""By component, and the name of the weight in diffusers' layout."""

PREFIXES = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
KEYS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<module>.+)\.lora_(?P<role>down|up|mid|A|B)(\.\w+)?\.weight",
        r"(?P<module>.+)\.(lora|lora_linear_layer)\.(?P<role>down|up)\.weight",
        r"(?P<module>.+?)(\.processor)?\.(?P<projection>to_(q|k|v|out))_lora\.(?P<role>down|up)\.weight",
        r"(?P<module>.+)\.(?P<role>alpha)",
    )
)
ROLES = {"A": "down", "B": "up"}
OTHERS = (
    (r"dora_scale|lora_magnitude_vector", "DoRA, which is not read"),
    (r"\.hada_", "LoHa, which is not read"),
    (r"\.lokr_", "LoKr, which is not read"),
    (r"\.(diff|diff_b)$|\.oft_|\.oft_diag|\.boft_", "differences that are not of low rank, which are not read"),
    (r"^(transformer\.|lora_transformer_|lora_unet_(double|single|joint)_blocks|lora_te3_)", "a LoRA of a diffusion "
     "transformer (Flux, Stable Diffusion 3), not of Stable Diffusion"),
)  # fmt: skip
PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def load(path: str | os.PathLike[str], hub: Hub) -> Lora:
    """The LoRA in a .safetensors file, or one of torch's own, for a model whose weights are `hub`.

    InputError, one line, for a file that cannot be read, that holds something else, or that is for another model.
    """
    own = Path(path).suffix in torch_files.SUFFIXES
    state = torch_files.load(path) if own else files.load(path)
    try:
        return read(state, hub, None if own else files.metadata(path).get(HEADER))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save(path: str | os.PathLike[str], lora: Lora, naming: Naming = "diffusers", *, xl: bool | None = None) -> Path:
    """Write a LoRA as one .safetensors file; inverse of `load`. naming, xl: as `write`."""
    state, header = write(lora, naming, xl=xl)
    return files.save(path, state, {HEADER: header} if header else None)


def read(state: Mapping[str, np.ndarray], hub: Hub, header: str | None = None) -> Lora:
    """The LoRA in a state dict named by (4) or (5). header: the text `HEADER` in a file of diffusers.

    InputError listing names that fit none of the model's weights, and for parts that are missing or of other shapes.
    """
    for pattern, what in OTHERS:
        if any(re.search(pattern, name) for name in state):
            raise InputError(f"this is {what}")
    weights = _aliases(hub)
    parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    strange = []
    for name, value in state.items():
        module, role = _parsed(name)
        where = weights.get(module)
        if where is None:
            strange.append(name)
        elif role in parts.setdefault(where, {}):
            raise InputError(f"two weights for {role} of {'.'.join(where)}: {files.plain(name)} and another")
        else:
            parts[where][role] = value
    if strange or not parts:
        raise InputError(f"it does not fit the model, which has no place for {ldm_names.listed(strange) or 'nothing'}")
    alphas = _alphas(header)
    lora: Lora = {}
    for where, found in parts.items():
        update = _update(".".join(where), found, alphas)
        _check(".".join(where), update, hub[where[0]][where[1]])
        lora.setdefault(where[0], {})[where[1]] = update
    return lora


def write(lora: Lora, naming: Naming = "diffusers", *, xl: bool | None = None) -> tuple[State, str]:
    """The state dict by (4) or (5), and the text `HEADER` for its file, which only diffusers' naming has.

    xl: whether kohya's names are those for two text encoders; if None, whether the LoRA has a second one.
    """
    if naming not in get_args(Naming):
        raise InputError(f"naming={naming!r} is not one of {', '.join(get_args(Naming))}")
    two = "text_encoder_2" in lora if xl is None else xl
    state: State = {}
    for component, updates in lora.items():
        for name, update in updates.items():
            module = name.removesuffix(".weight")
            if naming == "kohya":
                prefix = PREFIXES[component][-1 if two else 0]
                state |= _named(prefix + module.replace(".", "_"), ("lora_down", "lora_up", "lora_mid"), update)
                if update.alpha is not None:
                    state[f"{prefix}{module.replace('.', '_')}.alpha"] = np.asarray(update.alpha, np.float32)
            else:
                if update.mid is not None:
                    raise InputError(f"diffusers has no name for the part between up and down of {name}: use kohya's")
                state |= _named(f"{component}.{module}", ("lora_A", "lora_B"), update)
    return state, _header(lora) if naming == "diffusers" else ""


def merge(hub: Hub, loras: Iterable[tuple[Lora, float]]) -> dict[str, dict[str, np.ndarray]]:
    """Equation (3): a model with LoRAs of some scales in its weights; those of `hub` stay what they are.

    InputError for a LoRA that was read for another model.
    """
    loras = list(loras)
    for lora, _ in loras:
        _check_all(lora, hub)
    merged = {component: dict(weights) for component, weights in hub.items()}
    for component, names in _touched(loras).items():
        for name in names:
            weight = np.asarray(merged[component][name])
            total = sum(
                np.float32(scale) * difference(lora[component][name], weight.shape)
                for lora, scale in loras
                if name in lora.get(component, {})
            )
            merged[component][name] = (weight.astype(np.float32) + total).astype(weight.dtype)
    return merged


def unmerge(hub: Hub, loras: Sequence[tuple[Lora, float]]) -> dict[str, dict[str, np.ndarray]]:
    """A model without LoRAs that were merged into it, up to two roundings of the weights' type.

    Who wants every bit back keeps the model before `merge`, which does not change it.
    """
    return merge(hub, [(lora, -scale) for lora, scale in loras])


def difference(update: Update, shape: tuple[int, ...]) -> np.ndarray:
    """Equations (1) and (2) as f32 of the weight's shape."""
    down, up = (np.asarray(part, np.float32) for part in (update.down, update.up))
    rank = down.shape[0]
    if update.mid is None:
        product = up.reshape(len(up), rank) @ down.reshape(rank, -1)
    else:
        middle = np.asarray(update.mid, np.float32)
        product = np.einsum("or,rs...,si->oi...", up.reshape(len(up), rank), middle, down.reshape(rank, -1))
    scale = 1.0 if update.alpha is None else update.alpha / rank
    return np.float32(scale) * product.reshape(shape)


# Names ----------------------------------------------------------------------------------------------------------------


def _parsed(name: str) -> tuple[str, str]:
    """The module and the role of a weight; a role that is none where the name is of no known form."""
    for pattern in KEYS:
        found = pattern.fullmatch(name)
        if found:
            module, role = found["module"], found["role"]
            projection = found.groupdict().get("projection")
            return f"{module}.{projection}" if projection else module, ROLES.get(role, role)
    return "", ""


def _aliases(hub: Hub) -> dict[str, tuple[str, str]]:
    """Every name that a module can have -> component, weight. Names that two modules have are left out."""
    found: dict[str, tuple[str, str]] = {}
    twice = set()
    for component in PREFIXES.keys() & hub.keys():
        original = ldm_names.unet(hub[component], True) if component == "unet" else {}
        for name, weight in hub[component].items():
            if not name.endswith(".weight") or np.ndim(weight) not in (2, 4):
                continue
            where = (component, name)
            for alias in _names(component, name.removesuffix(".weight"), original):
                if found.setdefault(alias, where) != where:
                    twice.add(alias)
    return {alias: where for alias, where in found.items() if alias not in twice}


def _names(component: str, module: str, original: Mapping[str, str]) -> set[str]:
    plain = {module}
    if component != "unet":
        plain.add(module.removeprefix("text_model."))
        for there, here in PROJECTIONS.items():
            if module.endswith(f".{here}"):
                plain.add(f"{module.removesuffix(here)}{there}")
    names = {f"{component}.{name}" for name in plain} | {f"base_model.model.{module}"}
    names |= {f"{component}.base_model.model.{name}" for name in plain}
    names |= {prefix + name.replace(".", "_") for prefix in PREFIXES[component] for name in plain}
    if component == "unet":
        names |= {module} | ({f"unet.{module[:-2]}", module[:-2]} if module.endswith(".to_out.0") else set())
    there = ldm_names.rename(module, dict(original)) if original else None
    return names | ({f"lora_unet_{there.replace('.', '_')}", f"diffusion_model.{there}"} if there else set())


def _named(module: str, roles: tuple[str, ...], update: Update) -> State:
    parts = zip(roles, (update.down, update.up, update.mid), strict=False)
    return {f"{module}.{role}.weight": part for role, part in parts if part is not None}


# Parts ----------------------------------------------------------------------------------------------------------------


def _update(where: str, parts: Mapping[str, np.ndarray], alphas: Alphas | None) -> Update:
    lost = {"down", "up"} - parts.keys()
    if lost:
        raise InputError(f"{where} lacks its {' and '.join(sorted(lost))}")
    down, alpha = parts["down"], parts.get("alpha")
    if alpha is not None:
        if np.size(alpha) != 1 or not np.isfinite(np.asarray(alpha, np.float64)).all():
            raise InputError(f"the alpha of {where} is not a number")
        return Update(down, parts["up"], parts.get("mid"), float(np.asarray(alpha, np.float64).ravel()[0]))
    known = None if alphas is None or not down.ndim else alphas.of(where.removesuffix(".weight"), down.shape[0])
    return Update(down, parts["up"], parts.get("mid"), known)


def _check(where: str, update: Update, weight: np.ndarray) -> None:
    """InputError for a difference that has not the weight's shape."""
    down, up, mid = update.down.shape, update.up.shape, None if update.mid is None else update.mid.shape
    shape, rank = weight.shape, down[0] if down else 0
    inside = math.prod(down[2:]) if mid is None else math.prod(mid[2:])
    fits = (
        rank > 0 and len(down) in (2, 4) and len(up) in (2, 4) and up[:2] == (shape[0], rank) and math.prod(up[2:]) == 1
        and down[1] == shape[1] and inside == math.prod(shape[2:])
        and (mid is None or (len(mid) == 4 and mid[:2] == (rank, rank) and math.prod(down[2:]) == 1))
    )  # fmt: skip
    if not fits:
        raise InputError(f"it is for another model: {where} is {shape} here, and the LoRA's up {up}, down {down}")


def _check_all(lora: Lora, hub: Hub) -> None:
    for component, updates in lora.items():
        for name, update in updates.items():
            weight = hub.get(component, {}).get(name)
            if weight is None:
                raise InputError(f"the LoRA is for another model: this one has no {component}.{name}")
            _check(f"{component}.{name}", update, weight)


def _touched(loras: Sequence[tuple[Lora, float]]) -> dict[str, list[str]]:
    """The weights that some LoRA changes."""
    names: dict[str, dict[str, None]] = {}
    for lora, _ in loras:
        for component, updates in lora.items():
            names.setdefault(component, {}).update(dict.fromkeys(updates))
    return {component: list(found) for component, found in names.items()}


class Alphas(NamedTuple):
    """What a header says of alphas, by component: PEFT's settings."""

    settings: Mapping[str, Mapping[str, Any]]

    def of(self, module: str, rank: int) -> float | None:
        """The alpha of a module, by a pattern that ends its name or its component's own; None if nothing is said."""
        component, _, inner = module.partition(".")
        own = self.settings.get(component, {})
        patterns = own.get("alpha_pattern") or {}
        fitting = [a for pattern, a in patterns.items() if inner == pattern or inner.endswith(f".{pattern}")]
        alpha = fitting[0] if fitting else own.get("lora_alpha")
        if alpha is None:
            return None
        return float(alpha) * (math.sqrt(rank) if own.get("use_rslora") else 1.0)


def _alphas(header: str | None) -> Alphas | None:
    """The alphas in diffusers' header, {"unet.lora_alpha": 8, "unet.alpha_pattern": {module: alpha}, ...}."""
    if not header:
        return None
    try:
        settings: dict[str, dict[str, Any]] = {}
        for name, value in json.loads(header).items():
            component, _, key = name.partition(".")
            settings.setdefault(component, {})[key] = value
        for own in settings.values():
            numbers = [own.get("lora_alpha", 1), *(own.get("alpha_pattern") or {}).values()]
            if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                raise TypeError("an alpha that is not a number")
        return Alphas(settings)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"the header's {HEADER} is damaged") from error


def _header(lora: Lora) -> str:
    """PEFT's settings for ranks and alphas, which diffusers reads them from."""
    found: dict[str, Any] = {}
    for component, updates in lora.items():
        # Without the model's own name, which transformers 5 has no longer: PEFT looks for the ends of names.
        modules = {n.removesuffix(".weight").removeprefix("text_model."): update for n, update in updates.items()}
        ranks = {module: update.down.shape[0] for module, update in modules.items()}
        alphas = {m: ranks[m] if u.alpha is None else u.alpha for m, u in modules.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        settings = {
            "r": rank, "lora_alpha": alpha, "target_modules": sorted(modules),
            "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
            "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        }  # fmt: skip
        found |= {f"{component}.{key}": value for key, value in settings.items()}
    return json.dumps(found, indent=2, sort_keys=True)
