"""Converts whole folders, both ways, with two layers in memory at most: into ours, one is written
while the next is converted; back, one is read at a time."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cogi2v_jax.disk import check_space, one_line, read_json
from cogi2v_jax.models import tokenizer
from cogi2v_jax.weights.checkpoint import CONFIG_FILES, MANIFEST, open_folder, read_leaves
from cogi2v_jax.weights.pieces import NETWORKS, unit_shapes

from .sources.diffusers import CODES, write_index, write_safetensors
from .sources.gather import gather
from .sources.matching import match, shapes, targets
from .sources.parts import WIDE, Tensor
from .tables import t5
from .tables.rules import refuse
from .writing import int8, manifest
from .writing.checksums import Digests
from .writing.folder import make_folder
from .writing.layers import Conversion, Meter, Progress, cast_of


def to_flax(
    sources: Path | str | Sequence[Path | str],
    destination: Path | str,
    dtype: str | None = None,
    progress: Progress | None = None,
    wait: bool = False,
    known: Mapping[Path, str] | None = None,
) -> Path | str:
    """Converts a checkpoint into a folder that appears under its name only when complete.

    `sources` is a diffusers folder, or that and what replaces parts of it, as `gather` takes them.
    `dtype` is as in `Conversion`; None makes float8 bfloat16. `wait` waits for another process that
    makes the same folder. `known` are SHA-256 of files. Raises ValueError with all misfits, or for
    a weight that is not finite, FileExistsError where the destination exists, OSError where the
    disk has no room, and as `gather`."""
    if dtype == "int8":
        int8.check_library()
    sources = [sources] if isinstance(sources, Path | str) else sources
    source = gather(sources, wide=cast_of(dtype) or WIDE)
    matches = {part: match(source, part) for part in NETWORKS}
    faults = [f"{part}: {fault}" for part, found in matches.items() for fault in found.faults]
    faulty = (part for part, found in matches.items() if found.faults)
    refuse(" and ".join(dict.fromkeys(str(source.place(part)) for part in faulty)), faults)
    files = [file for part in NETWORKS for file in source.parts[part]]
    with make_folder(destination, wait) as folder, Digests(files, known) as digests:
        conversion = Conversion(source, matches, folder, dtype, progress)
        check_space(folder.parent, conversion.meter.total, str(destination))
        _copy_settings(source.settings, source.folder, source.tokenizer_files, folder)
        for part in NETWORKS:
            conversion.write_part(part)
        manifest.write(conversion, digests)
    return destination


def to_torch(source: Path, destination: Path | str, progress: Progress | None = None) -> Path | str:
    """Converts a folder back into the diffusers folder it came from: the same tensors, bit for bit,
    in the same files; int8 kernels as their values in bfloat16. Raises ValueError for a folder that
    differs from its manifest."""
    converted = Converted(source)
    parts = {part: converted.tensors(part) for part in NETWORKS}
    size = sum(tensor.size for tensors in parts.values() for tensor in tensors.values())
    meter = Meter(size, progress)
    with make_folder(destination) as folder:
        settings = {part: source / part / name for part, name in CONFIG_FILES.items()}
        _copy_settings(settings, source, tokenizer.list_files(source / "tokenizer"), folder)
        for part, tensors in parts.items():
            files = sorted({tensor.file for tensor in tensors.values()})
            for file in files:
                inside = {name: tensor for name, tensor in tensors.items() if tensor.file == file}
                values = converted.read(part, inside, meter)
                write_safetensors(folder / part / file, inside, values)
            if len(files) > 1 or "-of-" in files[0].name:
                write_index(folder, part, tensors)
    return destination


class Converted:
    """A converted folder, with its tensors under diffusers' names. Raises as `open_folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        tokenizer.check_files(folder / "tokenizer")
        self.config = open_folder(folder, jnp.dtype(jnp.float32)).config
        # A T5 embedding has two names.
        self.targets = {part: targets(self.config, part) for part in NETWORKS}
        embedding = self.targets["text_encoder"]
        embedding |= {alias: embedding[name] for alias, name in t5.TIED.items()}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return manifest.read(self.folder)

    def recorded(self, part: str) -> dict[str, dict[str, str]]:
        """File and dtype of every torch tensor that a part came from. Raises ValueError where the
        manifest, which anyone may have written, does not give them."""
        path = self.folder / MANIFEST
        record = read_json(path).get("tensors")
        entries = record.get(part) if isinstance(record, dict) else None
        if (
            not isinstance(entries, dict)
            or {t5.TIED.get(name, name) for name in entries}
            != self.targets[part].keys() - t5.TIED.keys()
        ):
            raise ValueError(
                f"{path} must record the tensors of this {part}: convert its source again"
            )
        for name, entry in entries.items():
            if not _is_record(entry):
                raise ValueError(
                    f"{path} must give {name} a safetensors file of its folder and a dtype: "
                    f"got {entry}"
                )
        return entries

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The torch tensors of a part, file by file and layer by layer."""
        leaves, found = shapes(self.config, part), {}
        for name, entry in self.recorded(part).items():
            rule, layer = self.targets[part][name]
            shape = rule.torch_shape(leaves[rule.flax][0 if layer is None else 1 :])
            found[name] = Tensor(Path(entry["file"]), shape, np.dtype(jnp.dtype(entry["dtype"])))

        def order(item: tuple[str, Tensor]) -> tuple[Path, int]:
            return item[1].file, self.targets[part][item[0]].layer or 0

        return dict(sorted(found.items(), key=order))

    def read(
        self, part: str, names: Iterable[str], meter: Meter
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields torch tensors, with the leaves of one layer, and those of none, in memory. Raises
        ValueError for leaves that differ from the manifest."""
        units: dict[int | None, dict[str, np.ndarray]] = {None: self._unit(part, None)}
        for name in names:
            rule, layer = self.targets[part][name]
            if layer not in units:
                units = {None: units[None]}  # frees the layer before
                units[layer] = self._unit(part, layer)
            value = units[layer][rule.flax]
            yield name, rule.to_torch(value)
            meter.add(part, value.nbytes)

    def _unit(self, part: str, layer: int | None) -> dict[str, np.ndarray]:
        rest, rows = unit_shapes(self.config, part)
        leaves = read_leaves(self.folder, part, layer, rest if layer is None else rows)
        if fault := next(manifest.check_unit(self.manifest, part, layer, leaves), None):
            what = f"{self.folder} is damaged: {one_line(fault)}"
            raise ValueError(f"{what}; convert its source again")
        return int8.dequantise(leaves)


def _is_record(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(file := entry.get("file"), str):
        return False
    is_name = Path(file).name == file and file.endswith(".safetensors")
    return is_name and entry.get("dtype") in [str(dtype) for dtype in CODES]


def _copy_settings(
    settings: Mapping[str, Path], source: Path, tokenizer: Iterable[Path], folder: Path
) -> None:
    """Copies the configuration files, those of the tokenizer and model_index.json."""
    for part, file in settings.items():
        (folder / part).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / part / CONFIG_FILES[part])
    (folder / "tokenizer").mkdir(exist_ok=True)
    for path in tokenizer:
        shutil.copyfile(path, folder / "tokenizer" / path.name)
    if (source / "model_index.json").is_file():
        shutil.copyfile(source / "model_index.json", folder / "model_index.json")
