"""Whole folders, both ways, a layer at a time; and what a source holds."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cogi2v_jax import __version__
from cogi2v_jax.config import CheckpointConfig, read_json
from cogi2v_jax.disk import check_space
from cogi2v_jax.weights.checkpoint import CONFIG_FILES, FORMAT, MANIFEST, open_folder, read_leaves
from cogi2v_jax.weights.pieces import NETWORKS, abstract, layer_count, leaf_names, unit_shapes

from .sources import lookalikes
from .sources.diffusers import CODES, write_index, write_safetensors
from .sources.gather import Source, gather
from .sources.parts import WIDE, Tensor
from .tables import t5, transformer, vae
from .tables.rules import Target, contiguous, expand, misfits, refuse
from .writing import int8, manifest
from .writing.checksums import Digests, size_of
from .writing.folder import Journal, appearing
from .writing.layers import Meter, Progress, write_part
from .writing.manifest import share

TABLES: dict[str, Callable[[Any], tuple]] = {
    "transformer": transformer.table,
    "vae": vae.table,
    "text_encoder": t5.table,
}

SHARED = "text_encoder"  # the part that many checkpoints have in common, and half of their bytes


def homes(config: CheckpointConfig, part: str) -> dict[str, Target]:
    """Where every torch tensor of a part lives with us."""
    return expand(TABLES[part](getattr(config, part)), layer_count(config, part))


class Match(NamedTuple):
    """How a source's tensors meet a network."""

    homes: dict[str, Target]
    tensors: dict[str, Tensor]
    faults: list[str]


def match(source: Source, part: str) -> Match:
    """Every tensor against the table, from headers and shapes alone."""
    places = homes(source.config, part)
    tensors = source.tensors(part)
    if part == "text_encoder":
        for alias, name in t5.TIED.items():
            if alias in tensors:
                places[alias] = places[name]
                if name not in tensors:
                    del places[name]
    whose = lookalikes.other(name for name in tensors if name not in places)
    if whose:
        return Match(
            places,
            tensors,
            [
                f"the weights must be of image-to-video from a prompt and a first image alone: got {whose}"
            ],
        )
    leaves = {
        name: leaf.shape
        for name, leaf in leaf_names(abstract(source.config, part, jnp.dtype(jnp.float32))).items()
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    faults = lookalikes.unlike(source.config, shapes) if part == "transformer" else []
    faults += misfits(places, leaves, shapes)
    if part == "text_encoder":
        doubles = {
            alias: name for alias, name in t5.TIED.items() if alias in tensors and name in tensors
        }
        faults += [
            f"{alias} must equal {name}, its other name: got other values"
            for alias, name in doubles.items()
            if not _same(source, tensors, alias, name)
        ]
    faults += [
        f"{name} is in the index and in no shard"
        for name in sorted(source.absent(part) - places.keys())
    ]
    return Match(places, tensors, faults)


def _same(source: Source, tensors: dict[str, Tensor], one: str, other: str) -> bool:
    """Bit for bit, where a comparison of numbers would take -0 for 0 and no NaN for itself."""
    if tensors[one][1:] != tensors[other][1:]:
        return False
    here, there = (source.read("text_encoder", name) for name in (one, other))
    return np.array_equal(here.view(np.uint8), there.view(np.uint8))


def to_flax(
    sources: Path | str | Sequence[Path | str],
    destination: Path | str,
    dtype: str | None = None,
    progress: Progress | None = None,
    wait: bool = False,
    known: Mapping[Path, str] | None = None,
) -> Path | str:
    """A checkpoint as a converted folder, which appears under its name only when complete; what a
    killed conversion of the same left is gone on with. `sources` is a diffusers folder, or that and
    what `gather` replaces parts of it by; `dtype` casts, None keeps every tensor's own and makes
    float8 bfloat16, and int8 is of the blocks' kernels, with bfloat16 around them. `wait` is for
    another process that makes the same folder; `known` are files' SHA-256. Raises ValueError with
    all misfits, or for a weight that is not finite, FileExistsError where the destination exists,
    OSError where the disk has no room, and as `gather` does."""
    if dtype == "int8":
        int8.check_library()
    cast = None if dtype is None else int8.REST if dtype == "int8" else np.dtype(jnp.dtype(dtype))
    source = gather([sources] if isinstance(sources, Path | str) else sources, cast or WIDE)
    matches = {part: match(source, part) for part in NETWORKS}
    refuse(
        str(source.folder),
        [f"{part}: {fault}" for part, matched in matches.items() for fault in matched.faults],
    )
    made_of = {
        "format": FORMAT,
        "program": __version__,
        "dtype": dtype,
        "files": [_identity(file) for file in source.files],
    }
    files = [file for part in NETWORKS for file in source.parts[part]]
    kernels = {
        part: int8.kernels(source.config, part) if dtype == "int8" else set() for part in NETWORKS
    }
    sizes = {part: bytes_of(matched, cast, kernels[part]) for part, matched in matches.items()}
    meter = Meter(sum(sizes.values()), progress)
    with appearing(destination, wait, again=True) as folder, Digests(files, known) as digests:
        journal = Journal(folder, made_of)
        check_space(folder, meter.total - bytes_in(journal), str(destination))
        _copy_settings(source.settings, source.folder, folder, source.tokenizer_files)
        for part, matched in matches.items():
            if part == SHARED and (twin := _twin(source, Path(destination), dtype, digests)):
                share(*twin, folder, part, journal)
                meter.add(part, sizes[part])
                continue
            layers = [None, *range(layer_count(source.config, part))]
            write_part(
                folder,
                part,
                layers,
                matched.homes,
                partial(source.read, part),
                cast,
                kernels[part],
                journal,
                meter,
            )
        origins = {part: [digests.of(file) for file in source.parts[part]] for part in NETWORKS}
        recorded = {
            part: {
                name: {"file": source.shard(part, tensor), "dtype": str(cast or tensor.dtype)}
                for name, tensor in sorted(matched.tensors.items())
            }
            for part, matched in matches.items()
        }
        errors = {
            part: int8.errors(matches[part].homes, part, journal.units)
            for part in NETWORKS
            if kernels[part]
        }
        journal.close()
        manifest.write(folder, dtype, origins, recorded, journal.units, errors)
    return destination


def _identity(file: Path) -> list[Any]:
    stat = file.stat()
    return [str(file.resolve()), stat.st_size, stat.st_mtime_ns]


def bytes_of(matched: Match, cast: np.dtype[Any] | None, kernels: set[str]) -> int:
    """Of a part when it is converted."""
    homes = matched.homes
    # One may have two names.
    kept = {
        (homes[name].rule.flax, homes[name].layer): tensor
        for name, tensor in matched.tensors.items()
    }
    total = 0
    for (leaf, _), tensor in kept.items():
        if leaf in kernels:
            # And a float32 scale for each output.
            total += math.prod(tensor.shape) + 4 * tensor.shape[0]
        else:
            total += tensor.size if cast is None else math.prod(tensor.shape) * cast.itemsize
    return total


def bytes_in(journal: Journal) -> int:
    """Of what a killed conversion left."""
    return sum(map(size_of, journal.units.values()))


def _twin(
    source: Source, destination: Path, dtype: str | None, digests: Digests
) -> tuple[Path, dict[str, Any]] | None:
    """A converted folder whose T5 is of the same bytes, and its manifest."""
    files = source.parts[SHARED]
    found = manifest.twin_of(destination, SHARED, dtype, source.settings[SHARED], files)
    same = found and [entry["sha256"] for entry in found[1]["sources"][SHARED]] == [
        digests.of(file)["sha256"] for file in files
    ]
    return found if same else None


def to_torch(
    source_folder: Path, destination: Path | str, progress: Progress | None = None
) -> Path | str:
    """A converted folder as the diffusers folder it came from: the same tensors, bit for bit, in
    the same files. Of int8 kernels it gives what they stand for, in bfloat16. Raises ValueError for
    a folder that is not as its manifest says."""
    config = open_folder(source_folder, jnp.dtype(jnp.float32)).config
    recorded = {part: tensors_recorded(source_folder, config, part) for part in NETWORKS}
    with appearing(destination) as folder:
        settings = {part: source_folder / part / name for part, name in CONFIG_FILES.items()}
        _copy_settings(
            settings,
            source_folder,
            folder,
            [path for path in (source_folder / "tokenizer").iterdir() if path.is_file()],
        )
        files = {
            part: _torch_files(folder, config, part, entries) for part, entries in recorded.items()
        }
        meter = Meter(
            sum(tensor.size for tensors in files.values() for tensor in tensors.values()), progress
        )
        for part, tensors in files.items():
            places = _places(config, part)
            shards = sorted({tensor.file for tensor in tensors.values()})
            for shard in shards:
                inside = {name: tensor for name, tensor in tensors.items() if tensor.file == shard}
                write_safetensors(
                    shard,
                    inside,
                    _values(
                        source_folder, config, part, {name: places[name] for name in inside}, meter
                    ),
                )
            if len(shards) > 1 or "-of-" in shards[0].name:
                write_index(folder, part, tensors)
    return destination


def _places(config: CheckpointConfig, part: str) -> dict[str, Target]:
    """Where every torch tensor lives with us, under each of its names."""
    places = homes(config, part)
    return (
        places | {alias: places[name] for alias, name in t5.TIED.items()}
        if part == "text_encoder"
        else places
    )


def _torch_files(
    folder: Path, config: CheckpointConfig, part: str, entries: Mapping[str, Mapping[str, str]]
) -> dict[str, Tensor]:
    """Every tensor to write, file by file and layer by layer."""
    places = _places(config, part)
    shapes = {
        name: leaf.shape
        for name, leaf in leaf_names(abstract(config, part, jnp.dtype(jnp.float32))).items()
    }
    tensors = {}
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1]["file"], places[item[0]].layer or 0)
    ):
        rule, layer = places[name]
        shape = rule.torch_shape(shapes[rule.flax][0 if layer is None else 1 :])
        tensors[name] = Tensor(
            folder / part / entry["file"], shape, np.dtype(jnp.dtype(entry["dtype"]))
        )
    return tensors


def tensors_recorded(
    folder: Path, config: CheckpointConfig, part: str
) -> dict[str, dict[str, str]]:
    """File and dtype of every torch tensor that a converted folder came from, checked: the folder
    may be anyone's."""
    tensors = read_json(folder / MANIFEST).get("tensors")
    entries = tensors.get(part) if isinstance(tensors, dict) else None
    places = homes(config, part)
    same = t5.TIED if part == "text_encoder" else {}
    if not isinstance(entries, dict) or {same.get(name, name) for name in entries} != places.keys():
        raise ValueError(
            f"{folder / MANIFEST} must record the tensors of this {part}: convert its source again"
        )
    for name, entry in entries.items():
        file, dtype = (
            (entry.get("file"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        )
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
            or dtype not in [str(kind) for kind in CODES]
        ):
            raise ValueError(
                f"{folder / MANIFEST} must give {name} a safetensors file of its folder and a dtype: got {entry}"
            )
    return entries


def _values(
    folder: Path, config: CheckpointConfig, part: str, places: dict[str, Target], meter: Meter
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors in order, as the manifest has them; the unstacked ones and one layer are held at a
    time."""
    rest, rows = unit_shapes(config, part)
    recorded = manifest.read(folder)

    def unit(layer: int | None) -> dict[str, np.ndarray]:
        leaves = read_leaves(folder, part, layer, rest if layer is None else rows)
        if fault := next(manifest.check_unit(recorded, part, layer, leaves), None):
            raise ValueError(f"{folder} must be as it was made: {fault}; convert its source again")
        return int8.dequantised(leaves)

    units: dict[int | None, dict[str, np.ndarray]] = {None: unit(None)}
    for name, (rule, layer) in places.items():
        if layer not in units:
            units = {None: units[None], layer: unit(layer)}
        value = units[layer][rule.flax]
        yield name, contiguous(rule.to_torch(value))
        meter.add(part, value.nbytes)


def _copy_settings(
    settings: dict[str, Path], source: Path, folder: Path, tokenizer_files: list[Path]
) -> None:
    for part, file in settings.items():
        (folder / part).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / part / CONFIG_FILES[part])
    (folder / "tokenizer").mkdir(exist_ok=True)
    for path in tokenizer_files:
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
