"""Diffusers folders: finding the weight files of a part, and writing safetensors files one tensor
at a time."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax.disk import one_line, read_json
from cogi2v_jax.weights.checkpoint import MANIFEST
from cogi2v_jax.weights.needed_files import BESIDE, SUFFIXES

from .parts import Tensor
from .tensor_files import DTYPES, NARROW

# Safetensors' names of the dtypes that are written.
CODES = {dtype: code for code, dtype in DTYPES.items() if code not in NARROW}
STEMS = {  # of the names of weight files and indexes
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def list_weights(folder: Path) -> list[Path]:
    """Every safetensors and torch file that may hold weights."""
    files = (file for suffix in SUFFIXES for file in sorted(folder.glob(f"*{suffix}")))
    return [file for file in files if not BESIDE.fullmatch(file.stem)]


def find_weights(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of an index with the names of its tensors, or a single file with no names:
    safetensors before torch files. Raises FileNotFoundError or ValueError, in one line."""
    for suffix in SUFFIXES:
        # Weights of another precision, with one more suffix, may be in the same folder:
        # diffusion_pytorch_model.fp16.safetensors
        indexes = sorted(folder.glob(f"*{suffix}.index*.json"))
        if plain := [path for path in indexes if path.name.count(".") == 3] or indexes:
            return _indexed(plain[0])
        files = [file for file in list_weights(folder) if file.suffix == suffix]
        if plain := [path for path in files if path.name.count(".") == 1] or files:
            break
    if len(plain) != 1:
        what = "one safetensors file or an index of shards"
        raise FileNotFoundError(f"{folder} must hold {what}: found {len(plain)} files")
    return plain, set()


def _indexed(index: Path) -> tuple[list[Path], set[str]]:
    found = read_json(index).get("weight_map")
    files: dict[str, Any] = found if isinstance(found, dict) else {}
    if not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    names = sorted(set(files.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index} must name files of its own folder: got {one_line(outside[0])}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index.parent} must hold every shard its index names: "
            f"missing {one_line(', '.join(missing))}"
        )
    return [index.parent / name for name in names], set(files)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], values: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a safetensors file of these names, shapes and dtypes. `values` yields the names and
    arrays in the same order, one at a time. Raises ValueError for an array of another dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.size
        entry = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, tensor), (its_name, value) in zip(tensors.items(), values, strict=True):
            assert (name, tensor.shape) == (its_name, value.shape)
            if value.dtype != tensor.dtype:
                must = f"must be {tensor.dtype}, as {MANIFEST} says"
                raise ValueError(f"{name} {must}: got {value.dtype}")
            flat = np.ascontiguousarray(value).reshape(-1)
            file.write(flat.view(np.uint8).data)


def write_index(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes the index of a sharded part, under the name that transformers and diffusers expect."""
    files = {name: tensor.file.name for name, tensor in sorted(tensors.items())}
    size = sum(tensor.size for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2)
    path = folder / part / f"{STEMS[part]}.safetensors.index.json"
    path.write_text(text + "\n", encoding="utf-8")
