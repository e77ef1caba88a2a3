"""LoRA files against a network: where each tensor goes, at which scale, and why a file is
refused."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.weights.lora import Factors, Lora
from cogi2v_jax.weights.pieces import abstract, leaf_names

from .sources.lora_file import LoraFile
from .tables.lora_keys import KINDS, kind, meaning
from .tables.rules import Target, expand
from .tables.transformer import table

SAT_ALPHA = 1.0  # SAT's default, which its published recipes keep and its files don't tell


class Published(NamedTuple):
    """What tells a published model's LoRAs from another's."""

    width: int
    layers: int
    patch: tuple[int, ...]  # inputs of the patches' weight
    outputs: int  # of the last weight
    ofs: bool = False


MODELS = {
    "CogVideoX-2B": Published(1920, 30, (16, 2, 2), 64),
    "CogVideoX-5B": Published(3072, 42, (16, 2, 2), 64),
    "CogVideoX-5B-I2V": Published(3072, 42, (32, 2, 2), 64),
    "CogVideoX1.5-5B": Published(3072, 42, (128,), 128),
    "CogVideoX1.5-5B-I2V": Published(3072, 42, (256,), 128, True),
}
# Whose inputs are as wide as the network.
WIDE = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out")
# By a checkpoint's family.
GENERATIONS = {"cogvideox-i2v": "CogVideoX 1.0", "cogvideox1.5-i2v": "CogVideoX 1.5"}


class Row(NamedTuple):
    """A tensor of a file, and where it goes or why nowhere."""

    key: str
    place: str = ""
    reason: str = ""
    fatal: bool = False  # whether the file is refused for it


@dataclass
class Match:
    """How a file meets a network. With any `faults` there is no Lora."""

    file: LoraFile
    title: str
    weight: float
    rows: dict[str, Row] = field(default_factory=dict)  # by key
    general: list[str] = field(default_factory=list)  # what is wrong with the file as a whole
    lora: Lora | None = None
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)
    unstated: str = ""  # whence the alphas are, where the file doesn't state them

    @property
    def faults(self) -> list[str]:
        return self.general + self._misfits

    @property
    def _misfits(self) -> list[str]:
        return [f"{row.key} {row.reason}" for row in self.rows.values() if row.fatal]

    def refuse(self, key: str, reason: str) -> None:
        self.rows[key] = Row(key, reason=reason, fatal=True)

    def line(self) -> str:
        """All of it in one line."""
        placed = sum(bool(row.place) for row in self.rows.values())
        told = [f"lora {self.file.name}: {placed} of {len(self.rows)} tensors matched"]
        told += (
            [f"rank {_span(self.ranks)}", f"alpha {_span(self.alphas)}{self.unstated}"]
            if self.ranks
            else []
        )
        return ", ".join(
            [
                *told,
                f"weight {self.weight:g}",
                *([f"made for {self.file.base}"] if self.file.base else []),
            ]
        )

    def unmatched(self, shown: int = 20) -> list[str]:
        """The tensors without a place, or as many as a screen takes."""
        rows = [f"  ! {row.key} {row.reason}" for row in self.rows.values() if not row.place]
        return (
            rows
            if len(rows) <= shown
            else [*rows[: shown - 1], f"  ! and {len(rows) - shown + 1} more"]
        )

    def checked(self) -> Lora:
        """The Lora. Raises ValueError, in one line, where there is none."""
        if self.lora is None:
            told = [*self.general, *self._misfits[:1]]
            more = len(self.faults) - len(told)
            raise ValueError(
                f"lora {self.file.name} must fit {self.title}: {'; '.join([*told, *([f'and {more} more'] if more else [])])}"
            )
        return self.lora


def match(file: LoraFile, config: CheckpointConfig, weight: float = 1.0) -> Match:
    """Every tensor of a file against a network. Values are read only where everything else fits."""
    transformer = config.transformer
    homes = expand(table(transformer), transformer.num_layers).items()
    targets = {name.removesuffix(".weight"): home for name, home in homes if home.rule.is_linear}
    found, modules = Match(file, config.title, weight), {}
    for key in file.shapes:
        module, side, reason = meaning(key)
        if module in targets:
            keys: dict[str, str] = modules.setdefault(module, {})
            rule, layer = targets[module]
            found.rows[key] = Row(key, rule.flax if layer is None else f"{rule.flax}[{layer}]")
            if side in keys:
                found.refuse(key, f"must be the only {side} of its weight: got {keys[side]} too")
            keys[side] = key
        elif kind(module) in KINDS:
            found.refuse(key, "must be of a weight that this network has: it has none of this name")
        else:
            found.rows[key] = Row(key, reason=reason or "is of no linear weight of this network")
    leaves = {
        name: leaf.shape
        for name, leaf in leaf_names(abstract(config, "transformer", np.dtype(np.float32))).items()
    }
    shapes = {
        module: home.rule.torch_shape(leaves[home.rule.flax][-2:])
        for module, home in targets.items()
        if module in modules
    }
    for module, keys in modules.items():
        for key, reason in _misfits(file, keys, shapes[module]):
            found.refuse(key, reason)
    if whose := _whose(file, config, bool(found.faults)):
        found.general = [whose]
    elif not modules and not found.faults:
        first = next(iter(found.rows.values()), Row("the file", reason="is empty"))
        found.general = [
            f"none of its {len(found.rows)} tensors changes a weight of it: {first.key} {first.reason}"
        ]
    if not found.faults:
        _read(found, modules, targets, shapes)
    return found


def _misfits(
    file: LoraFile, keys: Mapping[str, str], shape: tuple[int, ...]
) -> list[tuple[str, str]]:
    """What keeps a module's tensors from changing a weight of this torch shape: keys and
    reasons."""
    missing = [side for side in "AB" if side not in keys]
    if missing:
        return [
            (key, f"must come with the {missing[0]} of its weight: got none")
            for key in keys.values()
        ]
    outputs, *inputs = shape
    a, b = (file.shapes[keys[side]] for side in "AB")
    rank = a[0] if a else 0
    faults = []
    # Not flat either: 1.5's text-to-video patches have as many numbers as 1.0's image-to-video
    # ones.
    if not rank or a[1:] != tuple(inputs):
        faults.append(
            (keys["A"], f"must have the shape [rank, {', '.join(map(str, inputs))}]: got {list(a)}")
        )
    if rank and (b[:2] != (outputs, rank) or math.prod(b[2:]) != 1):
        faults.append((keys["B"], f"must have the shape [{outputs}, {rank}]: got {list(b)}"))
    if "alpha" in keys and math.prod(file.shapes[keys["alpha"]]) != 1:
        faults.append(
            (keys["alpha"], f"must be one number: got the shape {list(file.shapes[keys['alpha']])}")
        )
    return faults


def _read(
    found: Match,
    modules: Mapping[str, Mapping[str, str]],
    targets: Mapping[str, Target],
    shapes: Mapping[str, Any],
) -> None:
    """The factors themselves."""
    factors, file = {}, found.file
    for module, keys in modules.items():
        values = {side: file.read(key) for side, key in keys.items()}
        odd = {
            keys[side]: value
            for side, value in values.items()
            if not np.isfinite(value.astype(np.float32)).all()
        }
        for key, value in odd.items():
            found.refuse(
                key, f"must be finite: got {value[~np.isfinite(value.astype(np.float32))].flat[0]}"
            )
        outputs, *inputs = shapes[module]
        rank = len(values["A"])
        try:
            scale, alpha, unstated = _scale(
                file.settings, module, rank, values.get("alpha"), ".matrix_" in keys["A"]
            )
        except ValueError as error:
            found.refuse(keys["A"], str(error))
            continue
        rule, layer = targets[module]
        down, up = rule.factors(
            values["A"].reshape(rank, *inputs), values["B"].reshape(outputs, rank)
        )
        factors[rule.flax, layer] = Factors(down, up, scale)
        found.ranks.add(rank)
        found.alphas.add(alpha)
        found.unstated = unstated
    if not found.faults:
        found.lora = Lora(file.name, file.sha256, found.weight, factors)


def _scale(
    settings: Mapping[str, Any], module: str, rank: int, own: np.ndarray | None, sat: bool
) -> tuple[float, float, str]:
    """(alpha / rank, alpha, whence if the file doesn't state it): the module's own, else by PEFT's
    settings, else SAT's, else the rank. Raises ValueError for settings that are none."""
    if own is not None:
        alpha = float(own.astype(np.float64).item())
        return alpha / rank, alpha, ""
    stated = _of_module(settings, "r", "rank_pattern", module)
    if stated is not None and stated != rank:
        raise ValueError(f"must have the rank that the file states, {stated:g}: got {rank}")
    alpha = _of_module(settings, "lora_alpha", "alpha_pattern", module)
    if alpha is not None:
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), alpha, ""
    return (
        (SAT_ALPHA / rank, SAT_ALPHA, " (not stated: SAT's own)")
        if sat
        else (1.0, float(rank), " (not stated: as the rank)")
    )


def _of_module(settings: Mapping[str, Any], name: str, patterns: str, module: str) -> float | None:
    """A number of PEFT's settings: of the first pattern that a module's name ends in, else of all
    modules."""
    try:
        of_some = dict(settings.get(patterns) or {})
        value = next(
            (
                value
                for pattern, value in of_some.items()
                if re.fullmatch(rf"(.*\.)?({pattern})", module)
            ),
            settings.get(name),
        )
        number = None if value is None else float(value)
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(
            f"must have a number as {name}, {patterns} a number for each module: {error}"
        ) from None
    if number is not None and not math.isfinite(number):
        raise ValueError(f"must have a finite number as {name}: got {number}")
    return number


def _whose(file: LoraFile, config: CheckpointConfig, misfits: bool) -> str:
    """Whose LoRA this is, where it is another's: by what it says of itself, or by what its shapes
    tell where they don't fit."""
    ours = GENERATIONS[config.family]
    # Folders above it may have any number in their names.
    said = re.search(r"cogvideox[^/]*", file.base, re.IGNORECASE)
    if (
        said
        and (
            generation := GENERATIONS[
                "cogvideox1.5-i2v" if re.search(r"1[._]5", said[0]) else "cogvideox-i2v"
            ]
        )
        != ours
    ):
        return f"it says that it was made for {file.base}, of {generation}, and this is {ours}"
    if not misfits:
        return ""
    facts = _facts(file)
    models = [
        name
        for name, model in MODELS.items()
        if all(getattr(model, fact) == value for fact, value in facts.items())
    ]
    if (
        models
        and len(models) < len(MODELS)
        and (config.name or "").lower() not in [name.lower() for name in models]
    ):
        return f"its shapes are those of {' or '.join(models)}"
    told = (
        {"patch": len(facts["patch"]) == 1}
        if "patch" in facts
        else {"ofs": True}
        if "ofs" in facts
        else {}
    )
    for newer in told.values():
        generation = GENERATIONS["cogvideox1.5-i2v" if newer else "cogvideox-i2v"]
        if generation != ours:
            return f"it was made for {generation}, and this is {ours}"
    return ""


def _facts(file: LoraFile) -> dict[str, Any]:
    """What its shapes tell of the network that it was made for, in the fields of `Published`."""
    facts: dict[str, Any] = {}
    layers = 0
    for key, shape in file.shapes.items():
        module, side, _ = meaning(key)
        if block := re.match(r"transformer_blocks\.(\d+)\.", module):
            layers = max(layers, int(block[1]) + 1)
        if (kind(module), side) == ("patch_embed.proj", "A"):
            facts["patch"] = tuple(shape[1:])
        elif (kind(module), side) == ("proj_out", "B") and shape:
            facts["outputs"] = shape[0]
        elif module.startswith("ofs_embedding"):
            facts["ofs"] = True
        elif side == "A" and len(shape) == 2 and kind(module).endswith(WIDE):
            facts["width"] = shape[1]
    return facts | (
        {"layers": layers} if layers in {model.layers for model in MODELS.values()} else {}
    )


def _span(values: set[Any]) -> str:
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g} to {max(values):g}"
