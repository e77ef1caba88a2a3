"""Converts and writes the units of a folder: a unit is one layer of a part, or all of its leaves
that are not stacked over layers."""

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cogi2v_jax.disk import check_space, sync_all
from cogi2v_jax.weights.checkpoint import read_unit, unit_path, write_unit

from ..sources.gather import Source
from ..sources.matching import Match
from . import int8
from .checksums import Sums, cast_finite, crc32_of, differences, size_of, sums

MARGIN = 2**18  # bytes; an upper bound of what a unit takes on disk beside its leaves
Progress = Callable[[str, int, int], None]  # (part, bytes done of all parts, bytes of all parts)


def cast_of(dtype: str | None) -> np.dtype[Any] | None:
    """What floating-point leaves are cast to."""
    return None if dtype is None else int8.REST if dtype == "int8" else np.dtype(jnp.dtype(dtype))


class Meter:
    """Counts bytes and reports them to `progress`."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    def add(self, part: str, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(part, self.done, self.total)


Unit = tuple[int | None, dict[str, np.ndarray], Sums]  # its layer, its leaves, their checksums


class UnitWriter:
    """Writes units into a folder, and keeps checksums for its manifest."""

    def __init__(self, folder: Path, meter: Meter):
        self.folder, self.meter = folder, meter
        self.sums: dict[tuple[str, int | None], Sums] = {}  # of each unit
        self.crc32: dict[str, str] = {}  # of each weight file

    def write_units(self, part: str, units: Iterable[Unit]) -> None:
        """Writes units of a part, and empties their leaves: while one is written, the next is made.
        Raises OSError where the disk has no room, or holds something else afterwards."""
        with ThreadPoolExecutor(1) as writer:
            writing: Future[None] | None = None
            for unit in units:
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, part, *unit)
            if writing is not None:
                writing.result()

    def _write(
        self, part: str, layer: int | None, leaves: dict[str, np.ndarray], found: Sums
    ) -> None:
        size = size_of(found)
        # Before every unit: on a full disk, orbax prints its own errors as well.
        check_space(self.folder.parent, size + size // 16 + MARGIN, f"a layer of the {part}")
        write_unit(self.folder, part, layer, leaves)
        leaves.clear()  # before they are read back: two layers in memory at most
        unit = unit_path(self.folder, part, layer)
        # Now, while the next layer is converted, and not all layers at the end.
        sync_all(unit)
        back = sums(read_unit(self.folder, part, layer))
        if fault := next(differences(found, back, f"{part}/weights/{unit.name}"), None):
            raise OSError(f"the disk must hold what was written there: {fault}")
        for file in sorted(path for path in unit.rglob("*") if path.is_file()):
            self.crc32[file.relative_to(self.folder).as_posix()] = crc32_of(file)
        self.sums[part, layer] = found
        self.meter.add(part, size)


class Conversion(UnitWriter):
    """The state of one conversion of a source into a folder. `dtype` casts every weight; None keeps
    each tensor's own; "int8" is for the kernels in blocks, with bfloat16 for the rest."""

    def __init__(
        self,
        source: Source,
        matches: Mapping[str, Match],
        folder: Path,
        dtype: str | None = None,
        progress: Progress | None = None,
    ):
        self.source, self.matches, self.dtype = source, matches, dtype
        self.cast = cast_of(dtype)
        self.kernels = {  # names of the leaves to be int8, by part
            part: int8.kernels(source.config, part) if dtype == "int8" else set()
            for part in matches
        }
        super().__init__(folder, Meter(sum(map(self._size, matches)), progress))
        self.errors: dict[str, dict[str, float]] = {}  # of int8 kernels, by part and torch name

    def _size(self, part: str) -> int:
        """Bytes of a part's leaves."""
        _, targets, tensors, *_ = self.matches[part]
        # By leaf: a T5 embedding may be stored under both of its names.
        leaves = {(targets[name].rule.flax, targets[name].layer): tensors[name] for name in tensors}
        total = 0
        for (leaf, _), tensor in leaves.items():
            count = math.prod(tensor.shape)
            if leaf in self.kernels[part]:
                total += count + 4 * tensor.shape[0]  # and a float32 scale for each output
            else:
                total += count * (self.cast or tensor.dtype).itemsize
        return total

    def write_part(self, part: str) -> None:
        """Converts and writes all units of a part. Raises as `write_units`, and ValueError for a
        weight that is not finite."""
        layers = {target.layer for target in self.matches[part].targets.values()}
        order = sorted(layers, key=lambda layer: -1 if layer is None else layer)
        self.write_units(part, ((layer, *self._convert(part, layer)) for layer in order))

    def _convert(self, part: str, layer: int | None) -> tuple[dict[str, np.ndarray], Sums]:
        """The leaves of a unit and their checksums."""
        leaves, names, kernels = {}, {}, self.kernels[part]
        for name, (rule, of_layer) in self.matches[part].targets.items():
            if of_layer == layer:
                cast = None if rule.flax in kernels else self.cast
                tensor = cast_finite(name, self.source.read(part, name), cast)
                leaves[rule.flax], names[rule.flax] = rule.to_flax(tensor), name
        leaves, errors = int8.quantise(leaves, kernels) if kernels else (leaves, {})
        found = sums(leaves)
        for leaf, error in errors.items():
            found[leaf]["error"] = self.errors.setdefault(part, {})[names[leaf]] = error
        return leaves, found
