"""The manifest of a converted folder: what it was made of, and a checksum for every tensor and
every other file; and the check of a folder against it."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax import __version__
from cogi2v_jax.disk import read_json, sha256
from cogi2v_jax.models import tokenizer
from cogi2v_jax.weights.checkpoint import (
    FORMAT,
    MANIFEST,
    list_weights,
    read_config,
    read_unit,
    unit_name,
)
from cogi2v_jax.weights.pieces import NETWORKS, layer_count

from ..sources.diffusers import STEMS
from ..sources.matching import targets
from .checksums import Digests, Sums, crc32_of, differences, sums
from .layers import Conversion, UnitWriter

PACKAGES = ("jax", "numpy", "orbax-checkpoint")


def write(conversion: Conversion, digests: Digests) -> None:
    """Writes the manifest into a folder that is otherwise complete."""
    folder, source, cast = conversion.folder, conversion.source, conversion.cast
    leaves = {part: _units(conversion, part) for part in NETWORKS}
    tensors = {  # what `to-torch` gives back, with the files' names
        part: {
            name: {"file": source.shard(part, tensor), "dtype": str(cast or tensor.dtype)}
            for name, tensor in sorted(matched.tensors.items())
        }
        for part, matched in conversion.matches.items()
    }
    settings = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "weights" not in path.relative_to(folder).parts
    }
    manifest = {
        **_writer(),
        "dtype": conversion.dtype,  # None: every tensor's own
        "sources": {part: [digests.of(file) for file in source.parts[part]] for part in NETWORKS},
        **({"int8": conversion.errors} if conversion.errors else {}),
        "tensors": tensors,
        "count": {part: _count(units) for part, units in leaves.items()},
        "leaves": leaves,
        "settings": settings,
        "files": list_weights(folder),
        "crc32": conversion.crc32,  # of the same files
    }
    _save(folder, manifest)


def write_replaced(base: Mapping[str, Any], writer: UnitWriter, part: str, dtype: str) -> None:
    """Writes the manifest of a folder that has all files of the one with the manifest `base`, from
    `read`, but for the weights of one part, which `writer` wrote in this dtype."""
    folder, units = writer.folder, _units(writer, part)
    record = {"file": f"{STEMS[part]}.safetensors", "dtype": dtype}
    tensors = {name: record for name in targets(read_config(folder), part)}
    others = base.get("crc32", {}).items()
    changed = {"sources": [], "tensors": tensors, "count": _count(units), "leaves": units}
    # Of these `read` checks the leaves alone. `to-torch` refuses a folder without the tensors.
    parts = {key: value if isinstance(value := base.get(key), dict) else {} for key in changed}
    manifest = {
        **base,
        **_writer(),
        "dtype": dtype if base.get("dtype") == dtype else None,
        **{key: parts[key] | {part: value} for key, value in changed.items()},
        "files": list_weights(folder),
        "crc32": {name: crc32 for name, crc32 in others if not name.startswith(f"{part}/")}
        | writer.crc32,
    }
    _save(folder, manifest)


def _writer() -> dict[str, Any]:
    """The format of a folder, and the programs that wrote it."""
    versions = {name: version(name) for name in PACKAGES}
    return {"format": FORMAT, "program": f"cogi2v-jax {__version__}", "versions": versions}


def _units(writer: UnitWriter, part: str) -> dict[str, Sums]:
    """Checksums of a part by unit."""
    return {unit_name(layer): sums for (of, layer), sums in writer.sums.items() if of == part}


def _count(units: Mapping[str, Sums]) -> int:
    return sum(map(len, units.values()))


def _save(folder: Path, manifest: Mapping[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder. Raises ValueError or FileNotFoundError, in one line, for
    one of another format."""
    manifest = read_json(folder / MANIFEST)
    # How deep the JSON objects are nested: leaves by part, unit and leaf.
    depths = {"leaves": 3, "settings": 0, "files": 0, "crc32": 0}
    if manifest.get("format") != FORMAT or not all(
        _is_nested(({"crc32": {}} | manifest).get(key), depth) for key, depth in depths.items()
    ):
        raise ValueError(
            f"{folder} must have a manifest of format {FORMAT}: got {manifest.get('format')!r}; "
            "convert its source again"
        )
    return manifest


def _is_nested(value: Any, depth: int) -> bool:
    return isinstance(value, dict) and (
        not depth or all(_is_nested(inner, depth - 1) for inner in value.values())
    )


def check(folder: Path) -> Iterator[str]:
    """Compares a converted folder with its manifest: files, settings, and the bits of each tensor;
    and parses what sampling will. Yields a line for each fault. Raises as `read`."""
    manifest, found = read(folder), list_weights(folder)
    files = manifest["files"]
    broken = {name for name, size in files.items() if found.get(name) != size}
    for name in sorted(broken):
        yield f"{name} must have {files[name]} bytes: got {found.get(name, 'no such file')}"
    # Whoever converted before these were written has none.
    for name, expected in manifest.get("crc32", {}).items():
        if name in found and name not in broken and (got := crc32_of(folder / name)) != expected:
            yield f"{name} must have the CRC-32 {expected}: got {got}"
            broken.add(name)
    for name in sorted(found.keys() - files.keys()):
        yield f"{name} must not be there: the manifest has no such file"
    for name, expected in manifest["settings"].items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256(path) != expected:
            yield f"{name} must have the SHA-256 {expected}: got other bytes"
    try:
        tokenizer.check_files(folder / "tokenizer")
    except (ValueError, OSError) as error:
        yield str(error)
    config = read_config(folder)
    for part in NETWORKS:
        for layer in (None, *range(layer_count(config, part))):
            if any(name.startswith(f"{part}/weights/{unit_name(layer)}/") for name in broken):
                continue  # reading it would only fail again
            try:
                yield from check_unit(manifest, part, layer, read_unit(folder, part, layer))
            except ValueError as error:
                yield str(error)


def check_unit(
    manifest: Mapping[str, Any], part: str, layer: int | None, leaves: Mapping[str, Any]
) -> Iterator[str]:
    """Compares the leaves of a unit with a manifest from `read`. Yields a line for each fault."""
    where = f"{part}/weights/{unit_name(layer)}"
    expected: Sums = manifest["leaves"].get(part, {}).get(unit_name(layer), {})
    found = sums({name: np.asarray(leaf) for name, leaf in leaves.items()})
    yield from differences(expected, found, where)
