"""Matches LoRA files with a network: the leaf and the scale of each tensor, and why a file is
refused."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.disk import one_line
from cogi2v_jax.weights.lora import Factors, Lora

from .sources.lora_file import LoraFile
from .sources.matching import shapes, targets
from .tables.lora_keys import KINDS, kind, meaning
from .tables.rules import Target

LARGEST = float(np.finfo(np.float32).max)
SAT_ALPHA = 1.0  # SAT's default, which its published recipes use and its files don't state


class Published(NamedTuple):
    """Sizes of a published model by which its LoRAs differ from another's."""

    width: int
    layers: int
    patch: tuple[int, ...]  # inputs of the patch embedding
    outputs: int  # of the last weight
    ofs: bool = False


MODELS = {
    "CogVideoX-2B": Published(1920, 30, (16, 2, 2), 64),
    "CogVideoX-5B": Published(3072, 42, (16, 2, 2), 64),
    "CogVideoX-5B-I2V": Published(3072, 42, (32, 2, 2), 64),
    "CogVideoX1.5-5B": Published(3072, 42, (128,), 128),
    "CogVideoX1.5-5B-I2V": Published(3072, 42, (256,), 128, True),
}
# Linear weights with as many inputs as the network is wide.
WIDE = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_out")
FIRST, SECOND = "CogVideoX 1.0", "CogVideoX 1.5"
GENERATIONS = {"cogvideox-i2v": FIRST, "cogvideox1.5-i2v": SECOND}  # by a checkpoint's family


class Row(NamedTuple):
    """A tensor of a file, and the leaf that it changes, or the reason why none."""

    key: str
    place: str = ""
    reason: str = ""
    fatal: bool = False  # whether the file is refused for it


@dataclass
class Match:
    """A file matched with a network. `lora` is None if there are any `faults`."""

    file: LoraFile
    title: str
    weight: float
    rows: dict[str, Row] = field(default_factory=dict)  # by key
    general: list[str] = field(default_factory=list)  # faults of the file as a whole
    lora: Lora | None = None
    ranks: set[int] = field(default_factory=set)
    alphas: set[float] = field(default_factory=set)
    unstated: str = ""  # where alpha is from, if the file doesn't state it

    @property
    def faults(self) -> list[str]:
        return self.general + self._misfits

    @property
    def _misfits(self) -> list[str]:
        return [f"{row.key} {row.reason}" for row in self.rows.values() if row.fatal]

    def refuse(self, key: str, reason: str) -> None:
        self.rows[key] = Row(key, reason=reason, fatal=True)

    def line(self) -> str:
        """A summary in one line."""
        matched = sum(bool(row.place) for row in self.rows.values())
        parts = [f"lora {self.file.name}: {matched} of {len(self.rows)} tensors matched"]
        if self.ranks:
            parts.append(f"rank {_span(self.ranks)}")
            parts.append(f"alpha {_span(self.alphas)}{self.unstated}")
        parts.append(f"weight {self.weight:g}")
        if self.file.bases:
            parts.append(f"made for {' and '.join(self.file.bases)}")
        return one_line(", ".join(parts))

    def unmatched(self, shown: int = 20) -> list[str]:
        """A line for each tensor that changes no leaf, `shown` lines at most."""
        unused = [f"{row.key} {row.reason}" for row in self.rows.values() if not row.place]
        rows = [f"  ! {one_line(row)}" for row in unused]
        if len(rows) <= shown:
            return rows
        return [*rows[: shown - 1], f"  ! and {len(rows) - shown + 1} more"]

    def checked(self) -> Lora:
        """The LoRA. Raises ValueError, in one line, if there are faults."""
        if self.lora is None:
            shown = [*self.general, *self._misfits[:1]]
            if more := len(self.faults) - len(shown):
                shown.append(f"and {more} more")
            what = f"lora {self.file.name} must fit {self.title}"
            raise ValueError(one_line(f"{what}: {'; '.join(shown)}"))
        return self.lora


def match(file: LoraFile, config: CheckpointConfig, weight: float = 1.0) -> Match:
    """Matches every tensor of a file with a network. Values are read only if all shapes fit."""
    linear = {
        name.removesuffix(".weight"): target
        for name, target in targets(config, "transformer").items()
        if target.rule.is_linear
    }
    found, modules = Match(file, config.title, weight), {}
    for key in file.shapes:
        module, side, reason = meaning(key)
        if module in linear:
            keys: dict[str, str] = modules.setdefault(module, {})
            rule, layer = linear[module]
            found.rows[key] = Row(key, rule.flax if layer is None else f"{rule.flax}[{layer}]")
            if side in keys:
                found.refuse(key, f"must be the only {side} of its weight: got {keys[side]} too")
            keys[side] = key
        elif kind(module) in KINDS:
            found.refuse(key, "must be of a weight that this network has: it has none of this name")
        else:
            found.rows[key] = Row(key, reason=reason or "is of no linear weight of this network")
    leaves = shapes(config, "transformer")
    torch_shapes = {
        module: linear[module].rule.torch_shape(leaves[linear[module].rule.flax][-2:])
        for module in modules
    }
    for module, keys in modules.items():
        for key, reason in _misfits(file, keys, torch_shapes[module]):
            found.refuse(key, reason)
    if other := _other_model(file, config, bool(found.faults)):
        found.general = [other]
    elif not modules and not found.faults:
        first = next(iter(found.rows.values()), Row("the file", reason="is empty"))
        none = f"none of its {len(found.rows)} tensors changes a weight of it"
        found.general = [f"{none}: {first.key} {first.reason}"]
    if not found.faults:
        _read(found, modules, linear, torch_shapes)
    return found


def _misfits(
    file: LoraFile, keys: Mapping[str, str], shape: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Yields (key, reason) for each tensor of a module that can't change a weight of this torch
    shape."""
    if missing := [side for side in "AB" if side not in keys]:
        for key in keys.values():
            yield key, f"must come with the {missing[0]} of its weight: got none"
        return
    outputs, *inputs = shape
    a, b = (file.shapes[keys[side]] for side in "AB")
    rank = a[0] if a else 0
    # The number of inputs is not enough: patches of 1.5's text-to-video have as many as patches of
    # 1.0's image-to-video.
    if not rank or a[1:] != tuple(inputs):
        must = f"[rank, {', '.join(map(str, inputs))}]"
        yield keys["A"], f"must have the shape {must}: got {list(a)}"
    if rank and (b[:2] != (outputs, rank) or math.prod(b[2:]) != 1):
        yield keys["B"], f"must have the shape [{outputs}, {rank}]: got {list(b)}"
    if "alpha" in keys and math.prod(alpha := file.shapes[keys["alpha"]]) != 1:
        yield keys["alpha"], f"must be one number: got the shape {list(alpha)}"


def _read(
    found: Match,
    modules: Mapping[str, Mapping[str, str]],
    linear: Mapping[str, Target],
    torch_shapes: Mapping[str, Any],
) -> None:
    """Reads the factors and makes the Lora."""
    factors, file = {}, found.file
    for module, keys in modules.items():
        values = {side: file.read(key) for side, key in keys.items()}
        for side, key in keys.items():
            with np.errstate(over="ignore"):
                numbers = values[side].astype(np.float32)
            if not np.isfinite(numbers).all():
                bad = values[side][~np.isfinite(numbers)].flat[0]
                found.refuse(key, f"must be finite: got {bad}")
        outputs, *inputs = torch_shapes[module]
        rank, is_sat = len(values["A"]), ".matrix_" in keys["A"]
        try:
            own = values.get("alpha")
            scale, alpha, unstated = _scale(file.settings, module, rank, own, is_sat)
            if abs(total := found.weight * scale) > LARGEST:
                raise ValueError(f"must have a scale that float32 holds: got {total:g}")
        except ValueError as error:
            found.refuse(keys["A"], str(error))
            continue
        rule, layer = linear[module]
        a, b = values["A"].reshape(rank, *inputs), values["B"].reshape(outputs, rank)
        factors[rule.flax, layer] = Factors(*rule.factors(a, b), scale)
        found.ranks.add(rank)
        found.alphas.add(alpha)
        found.unstated = unstated
    if not found.faults:
        found.lora = Lora(file.name, file.sha256, found.weight, factors)


def _scale(
    settings: Mapping[str, Any], module: str, rank: int, own: np.ndarray | None, is_sat: bool
) -> tuple[float, float, str]:
    """(alpha / rank, alpha, where alpha is from if the file doesn't state it): the module's own
    alpha, else PEFT's setting, else SAT's default, else the rank. Raises ValueError for invalid
    settings."""
    if own is not None:
        alpha = float(own.astype(np.float64).item())
        return alpha / rank, alpha, ""
    stated = _of_module(settings, "r", "rank_pattern", module)
    if stated is not None and stated != rank:
        raise ValueError(f"must have the rank that the file states, {stated:g}: got {rank}")
    alpha = _of_module(settings, "lora_alpha", "alpha_pattern", module)
    if alpha is not None:
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), alpha, ""
    if is_sat:
        return SAT_ALPHA / rank, SAT_ALPHA, " (not stated: SAT's own)"
    return 1.0, float(rank), " (not stated: as the rank)"


def _of_module(settings: Mapping[str, Any], name: str, patterns: str, module: str) -> float | None:
    """A number from PEFT's settings: that of the first pattern that matches the end of a module's
    name, else that for all modules."""
    try:
        value = settings.get(name)
        for pattern, of_pattern in dict(settings.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                value = of_pattern
                break
        number = None if value is None else float(value)
    # A pattern's repetitions may be too many, and its brackets too deep.
    except (re.error, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"must have a number as {name}, {patterns} a number for each module: {error}"
        ) from None
    if number is not None and not math.isfinite(number):
        raise ValueError(f"must have a finite number as {name}: got {number}")
    return number


# A model's name in a path or a hub id; some leave out the X before 1.5.
NAME = re.compile(r"cogvideo(?:x|1\.5)[^/\\]*", re.IGNORECASE)
# 1.5 anywhere in a name, or 15 and 1-5 right behind "CogVideoX".
SECONDS_NAME = re.compile(r"1[._]5|x[-_]?1-?5(?!\d)", re.IGNORECASE)


def _other_model(file: LoraFile, config: CheckpointConfig, misfits: bool) -> str:
    """A sentence if the file is for another model, by what it states or, if there are misfits, by
    its shapes; else ""."""
    ours = GENERATIONS[config.family]
    for base in file.bases:
        # The last one: folders before it may be a trainer's, and have any number in their names.
        named = NAME.findall(base)
        generation = SECOND if named and SECONDS_NAME.search(named[-1]) else FIRST
        if named and generation != ours:
            return f"it says that it was made for {base}, of {generation}, and this is {ours}"
    if not misfits:
        return ""
    facts = _facts(file)
    models = [
        name
        for name, model in MODELS.items()
        if all(getattr(model, fact) == value for fact, value in facts.items())
    ]
    is_one = (config.name or "").lower() in map(str.lower, models)
    if models and len(models) < len(MODELS) and not is_one:
        return f"its shapes are those of {' or '.join(models)}"
    generation = ours
    if "patch" in facts:
        generation = SECOND if len(facts["patch"]) == 1 else FIRST
    elif "ofs" in facts:
        generation = SECOND
    return f"it was made for {generation}, and this is {ours}" if generation != ours else ""


def _facts(file: LoraFile) -> dict[str, Any]:
    """What its shapes say of the network that it was made for, as fields of `Published`."""
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
    if layers in {model.layers for model in MODELS.values()}:
        facts["layers"] = layers
    return facts


def _span(values: set[Any]) -> str:
    return f"{min(values):g}" if len(values) == 1 else f"{min(values):g} to {max(values):g}"
