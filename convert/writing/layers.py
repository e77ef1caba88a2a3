"""Writes a part's units, one layer in memory while another goes to the disk."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax.disk import check_space
from cogi2v_jax.weights.checkpoint import write_unit

from ..tables.rules import Target
from . import int8
from .checksums import check_finite, size_of, sums
from .folder import Journal, Sums

MARGIN = 2**18  # bytes of a unit that are no weights, and more
Progress = Callable[[str, int, int], None]  # (part, bytes done of all parts, bytes of all parts)
Leaves = dict[str, np.ndarray]


class Meter:
    """Counts bytes for those who watch."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    def add(self, part: str, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(part, self.done, self.total)


def write_part(
    folder: Path,
    part: str,
    layers: list[int | None],
    homes: Mapping[str, Target],
    read: Callable[[str], np.ndarray],
    cast: np.dtype[Any] | None,
    kernels: set[str],
    journal: Journal,
    meter: Meter,
) -> None:
    """All units that the journal hasn't, of the tensors that `read` gives by name, with `kernels`
    as int8. Raises ValueError for one that is not finite."""
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        for layer in layers:
            names = [name for name, home in homes.items() if home.layer == layer]
            known = journal.units.get((part, layer))
            if known is not None:
                meter.add(part, size_of(known))
                continue
            kinds = {name: None if homes[name].rule.flax in kernels else cast for name in names}
            leaves = {
                homes[name].rule.flax: _converted(name, homes[name], read(name), kinds[name])
                for name in names
            }
            leaves, errors = int8.quantised(leaves, kernels) if kernels else (leaves, {})
            found = sums(leaves)
            for name, error in errors.items():
                found[name]["error"] = error
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, folder, part, layer, leaves, found, journal, meter)
        if writing is not None:
            writing.result()


def _converted(name: str, home: Target, tensor: np.ndarray, cast: np.dtype[Any] | None) -> np.ndarray:
    check_finite(name, tensor)
    if cast is not None and tensor.dtype != cast:
        with np.errstate(over="ignore"):
            tensor = tensor.astype(cast)
        check_finite(f"{name} in {cast}", tensor)
    return home.rule.to_flax(tensor)


def _write(
    folder: Path,
    part: str,
    layer: int | None,
    leaves: Leaves,
    found: Sums,
    journal: Journal,
    meter: Meter,
) -> None:
    size = size_of(found)
    journal.start(part, layer)
    # Asked before each: once the disk is full, orbax fills the screen too.
    check_space(folder, size + size // 16 + MARGIN, f"a layer of the {part}")
    write_unit(folder, part, layer, leaves)
    journal.add(part, layer, found)
    meter.add(part, size)
