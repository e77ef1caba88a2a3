"""What a converted folder says of itself: what it was made of, and the checksum of every tensor and
every other file; and whether that holds."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax import __version__
from cogi2v_jax.config import read_json
from cogi2v_jax.disk import cache_folder, sha256, sync
from cogi2v_jax.weights.checkpoint import (
    CONFIG_FILES,
    FORMAT,
    MANIFEST,
    read_config,
    read_unit,
    unit_name,
    weight_files,
)
from cogi2v_jax.weights.pieces import NETWORKS, layer_count

from .checksums import crc32
from .folder import Journal, Sums

PACKAGES = ("jax", "numpy", "orbax-checkpoint")
Origins = Mapping[str, list[dict[str, Any]]]  # the source files of every part: name, bytes, SHA-256
# The checksums of every part's layers, and (None) of what is not stacked.
Units = Mapping[tuple[str, int | None], Sums]


def write(
    folder: Path,
    dtype: str | None,
    origins: Origins,
    tensors: Mapping[str, Any],
    units: Units,
    errors: Mapping[str, Mapping[str, float]],
) -> None:
    """The manifest of a folder that is otherwise complete; `errors` are those of int8 kernels, by
    part and torch tensor."""
    leaves: dict[str, dict[str, Sums]] = {part: {} for part in NETWORKS}
    for (part, layer), sums in units.items():
        leaves[part][unit_name(layer)] = sums
    others = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "weights" not in path.relative_to(folder).parts
    ]
    manifest = {
        "format": FORMAT,
        "program": f"cogi2v-jax {__version__}",
        "versions": {name: version(name) for name in PACKAGES},
        "dtype": dtype,  # None: every tensor's own
        "sources": origins,
        **({"int8": errors} if errors else {}),
        "tensors": tensors,
        "count": {
            part: sum(len(sums) for sums in units.values()) for part, units in leaves.items()
        },
        "leaves": leaves,
        "settings": {path.relative_to(folder).as_posix(): sha256(path) for path in others},
        "files": weight_files(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """A converted folder's manifest. Raises ValueError or FileNotFoundError, in one line, for what
    is none of this format."""
    manifest = read_json(folder / MANIFEST)
    # Parts, units and leaves lead to what is said of a leaf.
    depths = {"leaves": 3, "settings": 0, "files": 0}
    if manifest.get("format") != FORMAT or not all(
        _is_nested(manifest.get(key), depth) for key, depth in depths.items()
    ):
        raise ValueError(
            f"{folder} must have a manifest of format {FORMAT}: got {manifest.get('format')!r}; convert its source again"
        )
    return manifest


def _is_nested(value: Any, depth: int) -> bool:
    return isinstance(value, dict) and (
        not depth or all(_is_nested(inner, depth - 1) for inner in value.values())
    )


def check(folder: Path) -> Iterator[str]:
    """Every fault of a converted folder against its manifest, a line each: files, settings, and
    each tensor's bits. Raises ValueError or FileNotFoundError for what is no such folder."""
    manifest, found = read(folder), weight_files(folder)
    broken = {name: size for name, size in manifest["files"].items() if found.get(name) != size}
    yield from (
        f"{name} must have {size} bytes: got {found.get(name, 'no such file')}"
        for name, size in broken.items()
    )
    yield from (
        f"{name} must not be there: the manifest has no such file"
        for name in sorted(found.keys() - manifest["files"].keys())
    )
    for name, expected in manifest["settings"].items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256(path) != expected:
            yield f"{name} must have the SHA-256 {expected}: got other bytes"
    config = read_config(folder)
    for part in NETWORKS:
        for layer in (None, *range(layer_count(config, part))):
            if any(name.startswith(f"{part}/weights/{unit_name(layer)}/") for name in broken):
                continue  # what is not whole is not worth reading
            try:
                yield from check_unit(manifest, part, layer, read_unit(folder, part, layer))
            except ValueError as error:
                yield str(error)


def check_unit(
    manifest: Mapping[str, Any], part: str, layer: int | None, leaves: Mapping[str, Any]
) -> Iterator[str]:
    """Every fault of a unit's leaves against what `read` gave, a line each."""
    where = f"{part}/weights/{unit_name(layer)}"
    expected: Sums = manifest["leaves"].get(part, {}).get(unit_name(layer), {})
    if leaves.keys() != expected.keys():
        yield f"{where} must hold the {len(expected)} tensors that the manifest has: got {len(leaves)}"
    for name in sorted(leaves.keys() & expected.keys()):
        leaf = np.asarray(leaves[name])
        got = {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "crc32": crc32(leaf)}
        if wrong := next((key for key in got if got[key] != expected[name].get(key)), None):
            yield f"{where}: {name} must have the {wrong} {expected[name].get(wrong)}: got {got[wrong]}"


def twin_of(
    destination: Path, part: str, dtype: str | None, config: Path, files: list[Path]
) -> tuple[Path, dict[str, Any]] | None:
    """A converted folder beside the destination, or in the cache, a part of which may be of the
    same files by their sizes; and its manifest."""
    for parent in dict.fromkeys((destination.parent, cache_folder("converted"))):
        for path in sorted(parent.glob(f"*/{MANIFEST}")):
            try:
                manifest, there = read(path.parent), weight_files(path.parent)
                sizes = [entry["bytes"] for entry in manifest["sources"][part]]
                same = manifest["dtype"] == dtype and sizes == [
                    file.stat().st_size for file in files
                ]
                whole = all(
                    there.get(name) == size
                    for name, size in manifest["files"].items()
                    if name.startswith(f"{part}/")
                )
                if (
                    same
                    and whole
                    and (path.parent / part / CONFIG_FILES[part]).read_bytes()
                    == config.read_bytes()
                ):
                    return path.parent, manifest
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
            ):  # not one of ours, or another version's
                continue
    return None


def share(
    twin: Path, manifest: Mapping[str, Any], folder: Path, part: str, journal: Journal
) -> None:
    """Makes a part's weights those of another converted folder: the same files, under one more name
    each where the disk can."""
    # What a killed conversion left of its own.
    shutil.rmtree(folder / part / "weights", ignore_errors=True)
    for name in manifest["files"]:
        if name.startswith(f"{part}/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(twin / name, folder / name)
            except OSError:
                shutil.copyfile(twin / name, folder / name)
    for unit, sums in manifest["leaves"][part].items():
        journal.units[part, None if unit == "rest" else int(unit)] = sums
