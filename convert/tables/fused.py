"""The projections of queries, keys and values as one tensor, as diffusers' fuse_qkv_projections
makes it, which keeps the three beside it."""

import re
from collections.abc import Iterable, Set

from .rules import FileTensor

FUSED = re.compile(r"(.*\battn1\.to)_qkv\.(weight|bias)")


def parts_of(name: str) -> list[str]:
    """The names of the three, or none for a tensor that isn't fused."""
    fused = FUSED.fullmatch(name)
    return [f"{fused[1]}_{each}.{fused[2]}" for each in "qkv"] if fused else []


def split(names: Iterable[str], all: Set[str]) -> dict[str, FileTensor]:
    """The tensors of a file under diffusers' names. A fused tensor is the three of which none is
    among `all` names; beside them it is a copy, and keeps its name."""
    found: dict[str, FileTensor] = {}
    for name in names:
        parts = [part for part in parts_of(name) if part not in all]
        if len(parts) == 3:
            found |= {part: FileTensor(name, 3, (index,)) for index, part in enumerate(parts)}
        else:
            found[name] = FileTensor(name)
    return found
