"""Whole folders, both ways, a layer at a time; and what a source holds."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cogi2v_jax import __version__
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

from . import int8, t5, transformer, vae
from .diffusers import CODES, Source, Tensor, open_safetensors, write_index, write_safetensors
from .rules import Home, expand, misfits, refuse

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
    leaves = {name: leaf.shape for name, leaf in leaf_names(abstract(source.config, part, jnp.dtype(jnp.float32))).items()}
    faults = misfits(places, leaves, {name: tensor.shape for name, tensor in tensors.items()})
    if part == "text_encoder":
        doubles = {alias: name for alias, name in t5.SAME.items() if alias in tensors and name in tensors}
        faults += [
            f"{alias} must equal {name}, its other name: got other values"
            for alias, name in doubles.items()
            if not _same(tensors, alias, name)
        ]
    faults += [f"{name} is in the index and in no shard" for name in sorted(source.indexed[part] - tensors.keys() - places.keys())]
    return Match(places, tensors, faults)


def _same(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Bit for bit, where a comparison of numbers would take -0 for 0 and no NaN for itself."""
    if tensors[one][1:] != tensors[other][1:]:
        return False
    with open_safetensors(tensors[one].file) as here, open_safetensors(tensors[other].file) as there:
        return np.array_equal(here.get_tensor(one).view(np.uint8), there.get_tensor(other).view(np.uint8))


def to_flax(source_folder: Path, destination: Path, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """A diffusers folder as a converted one, which appears under its name only when complete. `dtype` casts; None keeps every tensor's own,
    and int8 is of the blocks' kernels, with bfloat16 around them. Raises ValueError with all misfits, FileExistsError where the destination
    exists."""
    if dtype == "int8":
        int8.check_library()
    source = Source(source_folder)
    matches = {part: match(source, part) for part in NETWORKS}
    refuse(str(source_folder), [f"{part}: {fault}" for part, matched in matches.items() for fault in matched.faults])
    cast = None if dtype is None else int8.REST if dtype == "int8" else np.dtype(jnp.dtype(dtype))
    with appearing(destination) as folder:
        _copy_settings(source.folder, folder, source.tokenizer_files)
        recorded, errors = {}, {}
        for part, matched in matches.items():
            kernels = int8.kernels(source.config, part) if dtype == "int8" else set()
            layers = [None, *range(layer_count(source.config, part))]
            with ExitStack() as stack:
                files = {file: stack.enter_context(open_safetensors(file)) for file in source.parts[part]}
                for done, layer in enumerate(layers):
                    leaves: dict[str, np.ndarray] = {}
                    for name, (rule, home_layer) in matched.homes.items():
                        if home_layer == layer:
                            value = rule.to_flax(files[matched.tensors[name].file].get_tensor(name))
                            leaves[rule.flax] = np.ascontiguousarray(value if cast is None or rule.flax in kernels else value.astype(cast))
                    if kernels:
                        leaves, off = int8.quantised(leaves, kernels)
                        found = {name: off[rule.flax] for name, (rule, home) in matched.homes.items() if home == layer and rule.flax in off}
                        errors.setdefault(part, {}).update(found)
                    write_unit(folder, part, layer, leaves)
                    if progress:
                        progress(part, done + 1, len(layers))
            recorded[part] = {
                name: {"file": tensor.file.name, "dtype": str(cast or tensor.dtype)} for name, tensor in sorted(matched.tensors.items())
            }
        manifest = {"format": FORMAT, "program": f"cogi2v-jax {__version__}", "tensors": recorded, "files": weight_files(folder)}
        if errors:
            manifest["int8"] = errors
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return destination


def to_torch(source_folder: Path, destination: Path, progress: Progress | None = None) -> Path:
    """A converted folder as the diffusers folder it came from: the same tensors, bit for bit, in the same files. Of int8 kernels it
    gives what they stand for, in bfloat16."""
    config = open_folder(source_folder, jnp.dtype(jnp.float32)).config
    recorded = {part: tensors_recorded(source_folder, config, part) for part in NETWORKS}
    with appearing(destination) as folder:
        _copy_settings(source_folder, folder, [path for path in (source_folder / "tokenizer").iterdir() if path.is_file()])
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
        return int8.dequantised(read_leaves(folder, part, layer, rest if layer is None else rows))

    units: dict[int | None, dict[str, np.ndarray]] = {None: unit(None)}
    for name, (rule, layer) in places.items():
        if layer not in units:
            units = {None: units[None], layer: unit(layer)}
        yield name, rule.to_torch(units[layer][rule.flax])


def _copy_settings(source: Path, folder: Path, tokenizer_files: list[Path]) -> None:
    for part, name in CONFIG_FILES.items():
        (folder / part).mkdir()
        shutil.copyfile(source / part / name, folder / part / name)
    (folder / "tokenizer").mkdir()
    for path in tokenizer_files:
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")


@contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name only if all went well; otherwise nothing is left."""
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
