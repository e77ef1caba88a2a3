"""Whole folders, both ways, a layer at a time; and what a source holds."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
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
    read_unit,
    write_unit,
)
from cogi2v_jax.config import CheckpointConfig, read_json

from . import t5, transformer, vae
from .diffusers import Source, Tensor, open_safetensors, write_index, write_safetensors
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
    parameters: int


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
    return Match(places, tensors, faults, sum(int(np.prod(shape, dtype=np.int64)) for shape in leaves.values()))


def to_flax(source_folder: Path, destination: Path, dtype: str | None = None, progress: Progress | None = None) -> Path:
    """A diffusers folder as a converted one, which appears under its name only when complete. `dtype` casts; None keeps every tensor's own.
    Raises ValueError with all misfits, FileExistsError where the destination exists."""
    source = Source(source_folder)
    matches = {part: match(source, part) for part in NETWORKS}
    refuse(str(source_folder), [f"{part}: {fault}" for part, matched in matches.items() for fault in matched.faults])
    cast = None if dtype is None else np.dtype(jnp.dtype(dtype))
    with appearing(destination) as folder:
        _copy_settings(source.folder, folder, source.tokenizer_files)
        recorded = {}
        for part, matched in matches.items():
            layers = [None, *range(layer_count(source.config, part))]
            with ExitStack() as stack:
                files = {file: stack.enter_context(open_safetensors(file)) for file in source.parts[part]}
                for done, layer in enumerate(layers):
                    leaves: dict[str, np.ndarray] = {}
                    for name, (rule, home_layer) in matched.homes.items():
                        if home_layer == layer:
                            value = rule.to_flax(files[matched.tensors[name].file].get_tensor(name))
                            if rule.flax in leaves and not np.array_equal(
                                leaves[rule.flax].view(np.uint8), np.ascontiguousarray(value).view(np.uint8)
                            ):
                                raise ValueError(f"{source_folder}: {name} must equal its other name's values: got others")
                            leaves[rule.flax] = np.ascontiguousarray(value if cast is None else value.astype(cast))
                    write_unit(folder, part, layer, leaves)
                    if progress:
                        progress(part, done + 1, len(layers))
            recorded[part] = {
                name: {"file": tensor.file.name, "dtype": str(cast or tensor.dtype)} for name, tensor in sorted(matched.tensors.items())
            }
        manifest = {"format": FORMAT, "program": f"cogi2v-jax {__version__}", "tensors": recorded}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return destination


def to_torch(source_folder: Path, destination: Path, progress: Progress | None = None) -> Path:
    """A converted folder as the diffusers folder it came from: the same tensors, bit for bit, in the same files."""
    config = open_folder(source_folder, jnp.dtype(jnp.float32)).config
    recorded = read_json(source_folder / MANIFEST)["tensors"]
    with appearing(destination) as folder:
        _copy_settings(source_folder, folder, [path for path in (source_folder / "tokenizer").iterdir() if path.is_file()])
        for part in NETWORKS:
            places = homes(config, part)
            if part == "text_encoder":
                places |= {alias: places[name] for alias, name in t5.SAME.items()}
            leaves = leaf_names(abstract(config, part, jnp.dtype(jnp.float32)))
            tensors = {}
            for name, entry in sorted(recorded[part].items(), key=lambda item: (item[1]["file"], places[item[0]].layer or 0)):
                rule, layer = places[name]
                shape = rule.torch_shape(leaves[rule.flax].shape[0 if layer is None else 1 :])
                tensors[name] = Tensor(folder / part / entry["file"], shape, np.dtype(jnp.dtype(entry["dtype"])))
            shards = sorted({tensor.file for tensor in tensors.values()})
            for done, shard in enumerate(shards):
                inside = {name: tensor for name, tensor in tensors.items() if tensor.file == shard}
                write_safetensors(shard, inside, _values(source_folder, part, {name: places[name] for name in inside}))
                if progress:
                    progress(part, done + 1, len(shards))
            if len(shards) > 1:
                write_index(folder / part, tensors)
    return destination


def _values(folder: Path, part: str, places: dict[str, Home]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in order; the unstacked ones and one layer are held at a time."""
    units: dict[int | None, dict[str, np.ndarray]] = {None: read_unit(folder, part, None)}
    for name, (rule, layer) in places.items():
        if layer not in units:
            units = {None: units[None], layer: read_unit(folder, part, layer)}
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
