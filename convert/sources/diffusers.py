"""Diffusers folders: finding the weight files of a part, and writing safetensors a tensor at a
time."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cogi2v_jax.disk import one_line, read_json
from cogi2v_jax.weights.checkpoint import MANIFEST

from .parts import Tensor
from .tensor_files import DTYPES, NARROW

CODES = {dtype: code for code, dtype in DTYPES.items() if code not in NARROW}  # of what we write
# Of weight files and indexes.
STEMS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The shards an index names and the tensors it promises, else the one file and no promises:
    safetensors, else torch's. Raises FileNotFoundError or ValueError, in one line."""
    for suffix in (".safetensors", ".bin"):
        # A file of another precision has a second suffix and stands beside the main one:
        # diffusion_pytorch_model.fp16.safetensors
        indexes = sorted(folder.glob(f"*{suffix}.index*.json"))
        if plain := [path for path in indexes if path.name.count(".") == 3] or indexes:
            return _indexed(plain[0])
        files = sorted(folder.glob(f"*{suffix}"))
        if plain := [path for path in files if path.name.count(".") == 1] or files:
            break
    if len(plain) != 1:
        raise FileNotFoundError(
            f"{folder} must hold one safetensors file or an index of shards: found {len(plain)} files"
        )
    return plain, set()


def _indexed(index: Path) -> tuple[list[Path], set[str]]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} must name files of its own folder: got {one_line(outside[0])}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} must hold every shard its index names: missing {one_line(', '.join(missing))}"
        )
    return [index.parent / name for name in names], set(weight_map)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], read: Iterable[tuple[str, np.ndarray]]
) -> None:
    """A safetensors file of the given names, shapes and dtypes; `read` yields the values in the
    mapping's order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, tensor), (read_name, value) in zip(tensors.items(), read, strict=True):
            assert (name, tensor.shape) == (read_name, value.shape)
            if value.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} must be {tensor.dtype}, as {MANIFEST} says: got {value.dtype}"
                )
            file.write(
                np.ascontiguousarray(value).view(np.uint8).reshape(-1).data
                if value.ndim
                else value.tobytes()
            )


def write_index(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """The index of a sharded part, under the name that transformers and diffusers look for."""
    size = sum(tensor.size for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: tensor.file.name for name, tensor in sorted(tensors.items())},
    }
    (folder / part / f"{STEMS[part]}.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )
