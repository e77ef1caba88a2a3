"""Command-line arguments of a request, for every program that takes one."""

import argparse
import dataclasses
import math
import os
import re
import textwrap
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .names import ASSETS, EXAMPLE_LORA, LORA_SUFFIXES, parse_hub
from .settings import NEUTRAL, SWITCH, Kind, Settings


def add_settings(parser: argparse.ArgumentParser, ours: bool = True) -> None:
    """Adds a flag for each of `Settings` whose default is the checkpoint's to say, with the
    official script's names; `ours`: also those that only this program has."""
    group = parser.add_argument_group("how to sample (default: what the checkpoint was made for)")
    for setting in dataclasses.fields(Settings):
        is_plain = setting.name not in NEUTRAL
        if is_plain and (ours or setting.metadata["official"]):
            kind, shown = setting.metadata["kind"], setting.metadata["flag"]
            group.add_argument(f"--{setting.name}", **_reading(kind), **shown)


class Listed:
    """A group of flags that `--help` lists in a paragraph, each with a few words."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, width: int):
        self._group, self._width = parser.add_argument_group(title), width
        self._texts: list[str] = []

    def add(self, flag: str, *, help: str, **how: Any) -> None:
        """As `add_argument` of a parser."""
        self._group.add_argument(flag, help=argparse.SUPPRESS, **how)
        is_switch = how.get("action") is argparse.BooleanOptionalAction
        value = f", --no-{flag[2:]}" if is_switch else f" {how['metavar']}"
        self._texts.append(f"{flag}{value}: {help}")
        lines = textwrap.wrap("; ".join(self._texts), self._width, break_on_hyphens=False)
        self._group.description = "\n".join(lines)

    def add_settings(self) -> None:
        """Adds a flag for each of `Settings` that changes nothing by default."""
        for setting in dataclasses.fields(Settings):
            if setting.name in NEUTRAL:
                how = _reading(setting.metadata["kind"]) | setting.metadata["flag"]
                self.add(f"--{setting.name}", **how)


def _reading(kind: Kind) -> dict[str, Any]:
    """How argparse reads a value."""
    if kind is SWITCH:
        return {"action": argparse.BooleanOptionalAction}
    return {"choices": kind.names} if kind.names else {"type": partial(_read, kind)}


def _read(kind: Kind, text: str) -> Any:
    try:
        return kind.convert(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {kind.rule}: got {text!r}") from None


def parse_loras(loras: Any) -> list[tuple[Path | str, float]]:
    """The paths, or as texts the hub ids and addresses, and weights of LoRAs, given as FILE,
    FILE:WEIGHT or (FILE, WEIGHT), one or many, where FILE may be a folder, a hub id, an address of
    the hub or the example's name. Raises FileNotFoundError for a path that doesn't exist,
    ValueError for a weight that is not a finite number and for what is no file."""
    # A tuple of two files is two LoRAs; within a list every pair is a file and its weight.
    if isinstance(loras, str | os.PathLike) or (
        _is_pair(loras) and isinstance(loras[1], float | int)
    ):
        loras = [loras]
    if not isinstance(loras, Iterable):
        raise ValueError(f"loras must be FILE, FILE:WEIGHT or (FILE, WEIGHT): got {loras!r}")
    return [_parse_lora(*lora) if _is_pair(lora) else _parse_lora(lora) for lora in loras]


def _is_pair(lora: object) -> bool:
    return isinstance(lora, tuple) and len(lora) == 2


def _parse_lora(file: object, weight: Any = None) -> tuple[Path | str, float]:
    if not isinstance(file, str | os.PathLike):
        raise ValueError(f"loras must be FILE, FILE:WEIGHT or (FILE, WEIGHT): got {file!r}")
    # Not pathlib's expanduser, which raises for a user that doesn't exist.
    text, (head, _, tail) = os.path.expanduser(str(file)), str(file).rpartition(":")
    # A name may have a colon of its own, and so has an address.
    if weight is None and head and not Path(text).exists() and not tail.startswith("//"):
        text, weight = os.path.expanduser(head), tail
    path, place = Path(text), parse_hub(text)
    if text == EXAMPLE_LORA and not path.exists():
        path = ASSETS / EXAMPLE_LORA
    if not path.exists():
        is_file = path.suffix.lower() in LORA_SUFFIXES
        if place is None or (is_file and not place.file):
            on_hub = re.fullmatch(r"([^./~][^/]*/[^/]+)/(.+)", text) if is_file else None
            at = "https://huggingface.co/{}/blob/main/{}".format(*on_hub.groups()) if on_hub else ""
            way = f"; for a file on the hub give {at}" if at else ""
            must = "lora must be an existing file or folder, or a hub id"
            raise FileNotFoundError(f"{must}: found no {text}{way}")
        path = text
    try:
        number = float(1 if weight is None else weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the weight of lora {path} must be a finite number: got {weight}")
    return path, number
