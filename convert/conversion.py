"""Whole folders, both ways, a layer at a time; and what a source holds."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cogi2v_jax import __version__, bucket
from cogi2v_jax.checkpoint import (
    CONFIG_FILES,
    FORMAT,
    MANIFEST,
    NETWORKS,
    abstract,
    layer_count,
    leaf_names,
    open_folder,
    read_leaves,
    unit_shapes,
    weight_files,
    write_unit,
)
from cogi2v_jax.config import CheckpointConfig, read_json

from . import kin, t5, transformer, vae
from .diffusers import CODES, write_index, write_safetensors
from .rules import Home, expand, misfits, refuse
from .sources import Source, gather
from .weights import WIDE, Tensor

TABLES: dict[str, Callable[[Any], tuple]] = {"transformer": transformer.table, "vae": vae.table, "text_encoder": t5.table}

Progress = Callable[[str, int, int], None]  # (part, units done, units)


def homes(config: CheckpointConfig, part: str) -> dict[str, Home]:
    """Where every torch tensor of a part lives with us."""
    return expand(TABLES[part](getattr(config, part)), layer_count(config, part))


class Match(NamedTuple):
    """How a source's tensors meet a network."""

    homes: dict[str, Home]
    tensors: dict[str, Tensor]
    faults: list[str]


def match(source: Source, part: str) -> Match:
    """Every tensor against the table, from headers and shapes alone."""
    places = homes(source.config, part)
    tensors = source.tensors(part)
    if part == "text_encoder":
        for alias, name in t5.SAME.items():
            if alias in tensors:
                places[alias] = places[name]
                if name not in tensors:
                    del places[name]
    whose = kin.other(name for name in tensors if name not in places)
    if whose:
        return Match(places, tensors, [f"the weights must be of image-to-video from a prompt and a first image alone: got {whose}"])
    leaves = {name: leaf.shape for name, leaf in leaf_names(abstract(source.config, part, jnp.dtype(jnp.float32))).items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    faults = kin.unlike(source.config, shapes) if part == "transformer" else []
    faults += misfits(places, leaves, shapes)
    if part == "text_encoder":
        doubles = {alias: name for alias, name in t5.SAME.items() if alias in tensors and name in tensors}
        faults += [
            f"{alias} must equal {name}, its other name: got other values"
            for alias, name in doubles.items()
            if not _same(source, tensors, alias, name)
        ]
    faults += [f"{name} is in the index and in no shard" for name in sorted(source.absent(part) - places.keys())]
    return Match(places, tensors, faults)


def _same(source: Source, tensors: dict[str, Tensor], one: str, other: str) -> bool:
    """Bit for bit, where a comparison of numbers would take -0 for 0 and no NaN for itself."""
    if tensors[one][1:] != tensors[other][1:]:
        return False
    here, there = (source.read("text_encoder", name) for name in (one, other))
    return np.array_equal(here.view(np.uint8), there.view(np.uint8))


def to_flax(
    sources: Path | str | Sequence[Path | str], destination: Path | str, dtype: str | None = None, progress: Progress | None = None
) -> Path | str:
    """A checkpoint as a converted folder, which appears under its name only when complete. `sources` is a diffusers folder, or that and
    what `gather` replaces parts of it by; `dtype` casts, None keeps every tensor's own and makes float8 bfloat16. Raises ValueError with
    all misfits, FileExistsError where the destination exists, and as `gather` does."""
    cast = None if dtype is None else np.dtype(jnp.dtype(dtype))
    source = gather([sources] if isinstance(sources, Path | str) else sources, cast or WIDE)
    matches = {part: match(source, part) for part in NETWORKS}
    refuse(str(source.folder), [f"{part}: {fault}" for part, matched in matches.items() for fault in matched.faults])
    with appearing(destination) as folder:
        _copy_settings(source.settings, source.folder, folder, source.tokenizer_files)
        recorded = {}
        for part, matched in matches.items():
            layers = [None, *range(layer_count(source.config, part))]
            for done, layer in enumerate(layers):
                leaves: dict[str, np.ndarray] = {}
                for name, (rule, home_layer) in matched.homes.items():
                    if home_layer == layer:
                        value = rule.to_flax(source.read(part, name))
                        leaves[rule.flax] = np.ascontiguousarray(value if cast is None else value.astype(cast))
                write_unit(folder, part, layer, leaves)
                if progress:
                    progress(part, done + 1, len(layers))
            recorded[part] = {
                name: {"file": source.shard(part, tensor), "dtype": str(cast or tensor.dtype)}
                for name, tensor in sorted(matched.tensors.items())
            }
        manifest = {"format": FORMAT, "program": f"cogi2v-jax {__version__}", "tensors": recorded, "files": weight_files(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return destination


def to_torch(source_folder: Path, destination: Path | str, progress: Progress | None = None) -> Path | str:
    """A converted folder as the diffusers folder it came from: the same tensors, bit for bit, in the same files."""
    config = open_folder(source_folder, jnp.dtype(jnp.float32)).config
    recorded = {part: tensors_recorded(source_folder, config, part) for part in NETWORKS}
    with appearing(destination) as folder:
        settings = {part: source_folder / part / name for part, name in CONFIG_FILES.items()}
        _copy_settings(settings, source_folder, folder, [path for path in (source_folder / "tokenizer").iterdir() if path.is_file()])
        for part in NETWORKS:
            places = homes(config, part)
            if part == "text_encoder":
                places |= {alias: places[name] for alias, name in t5.SAME.items()}
            shapes = {name: leaf.shape for name, leaf in leaf_names(abstract(config, part, jnp.dtype(jnp.float32))).items()}
            tensors = {}
            for name, entry in sorted(recorded[part].items(), key=lambda item: (item[1]["file"], places[item[0]].layer or 0)):
                rule, layer = places[name]
                shape = rule.torch_shape(shapes[rule.flax][0 if layer is None else 1 :])
                tensors[name] = Tensor(folder / part / entry["file"], shape, np.dtype(jnp.dtype(entry["dtype"])))
            shards = sorted({tensor.file for tensor in tensors.values()})
            for done, shard in enumerate(shards):
                inside = {name: tensor for name, tensor in tensors.items() if tensor.file == shard}
                write_safetensors(shard, inside, _values(source_folder, config, part, {name: places[name] for name in inside}))
                if progress:
                    progress(part, done + 1, len(shards))
            if len(shards) > 1 or "-of-" in shards[0].name:
                write_index(folder, part, tensors)
    return destination


def tensors_recorded(folder: Path, config: CheckpointConfig, part: str) -> dict[str, dict[str, str]]:
    """File and dtype of every torch tensor that a converted folder came from, checked: the folder may be anyone's."""
    tensors = read_json(folder / MANIFEST).get("tensors")
    entries = tensors.get(part) if isinstance(tensors, dict) else None
    places = homes(config, part)
    same = t5.SAME if part == "text_encoder" else {}
    if not isinstance(entries, dict) or {same.get(name, name) for name in entries} != places.keys():
        raise ValueError(f"{folder / MANIFEST} must record the tensors of this {part}: convert its source again")
    for name, entry in entries.items():
        file, dtype = (entry.get("file"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
            or dtype not in [str(kind) for kind in CODES]
        ):
            raise ValueError(f"{folder / MANIFEST} must give {name} a safetensors file of its folder and a dtype: got {entry}")
    return entries


def _values(folder: Path, config: CheckpointConfig, part: str, places: dict[str, Home]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in order; the unstacked ones and one layer are held at a time."""
    rest, rows = unit_shapes(config, part)

    def unit(layer: int | None) -> dict[str, np.ndarray]:
        return read_leaves(folder, part, layer, rest if layer is None else rows)

    units: dict[int | None, dict[str, np.ndarray]] = {None: unit(None)}
    for name, (rule, layer) in places.items():
        if layer not in units:
            units = {None: units[None], layer: unit(layer)}
        yield name, rule.to_torch(units[layer][rule.flax])


def _copy_settings(settings: dict[str, Path], source: Path, folder: Path, tokenizer_files: list[Path]) -> None:
    for part, file in settings.items():
        (folder / part).mkdir()
        shutil.copyfile(file, folder / part / CONFIG_FILES[part])
    (folder / "tokenizer").mkdir()
    for path in tokenizer_files:
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")


@contextmanager
def appearing(destination: Path | str) -> Iterator[Path]:
    """A folder to fill, which takes its final name only if all went well; otherwise nothing is left. One at gs:// is filled here and
    copied there."""
    if bucket.is_bucket(destination):
        with bucket.uploading(destination, MANIFEST) as folder:
            yield folder
        return
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} must not exist yet: found it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.parent / f".{destination.name}.part-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        try:
            os.rename(folder, destination)
        except OSError:
            raise FileExistsError(f"{destination} must not exist yet: another program made it meanwhile") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
