"""Diffusers folders: finding every tensor of a source, and writing safetensors a tensor at a time."""

import json
import struct
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cogi2v_jax.checkpoint import CONFIG_FILES, MANIFEST, NETWORKS, read_config
from cogi2v_jax.config import read_json

# Safetensors' names of the dtypes.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}  # of weight files and indexes


class Tensor(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class Source:
    """A diffusers folder. Raises FileNotFoundError or ValueError, in one line, for what is no such folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "transformer").is_dir():
            raise FileNotFoundError(f"{folder} must be a diffusers or converted folder: found no transformer/ in it")
        self.config = read_config(folder)
        found = {part: _weight_files(folder / part) for part in NETWORKS}
        self.parts = {part: files for part, (files, _) in found.items()}
        self.indexed = {part: names for part, (_, names) in found.items()}
        self.tokenizer_files = sorted(path for path in (folder / "tokenizer").glob("*") if path.is_file())
        if not any(path.name in ("spiece.model", "tokenizer.json") for path in self.tokenizer_files):
            raise FileNotFoundError(f"{folder / 'tokenizer'} must hold spiece.model or tokenizer.json: found neither")

    @cached_property
    def files(self) -> list[Path]:
        """All that decides what the checkpoint is: configurations, tokenizer and weights."""
        settings = [self.folder / part / name for part, name in CONFIG_FILES.items()]
        return settings + self.tokenizer_files + [file for files in self.parts.values() for file in files]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Every tensor of a part, from the headers alone."""
        found: dict[str, Tensor] = {}
        for file in self.parts[part]:
            with open_safetensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    view = tensors.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(f"{file}: {name} must be one of {', '.join(DTYPES)}: got {view.get_dtype()}")
                    if name in found:
                        raise ValueError(f"{file.parent}: {name} must be in one file: got it in {found[name].file.name} and {file.name}")
                    found[name] = Tensor(file, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        return found


def open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a whole safetensors file: {error}") from None


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The shards an index names and the tensors it promises, else the one safetensors file and no promises."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    # A file of another precision or version has a second suffix and stands beside the main one: diffusion_pytorch_model.fp16.safetensors
    plain = [path for path in indexes if path.name.count(".") == 3] or indexes
    if plain:
        weight_map = read_json(plain[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{plain[0]} must have a weight_map from tensors to files")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{plain[0]} must name files of its own folder: got {outside[0]}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} must hold every shard its index names: missing {', '.join(missing)}")
        return [folder / name for name in names], set(weight_map)
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if path.name.count(".") == 1] or files
    if len(plain) != 1:
        others = [path.name for path in sorted(folder.glob("*.bin"))]
        hint = f" (save {', '.join(others)} as safetensors first)" if others and not plain else ""
        raise FileNotFoundError(f"{folder} must hold one safetensors file or an index of shards: found {len(plain)} files{hint}")
    return plain, set()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], read: Iterable[tuple[str, np.ndarray]]) -> None:
    """A safetensors file of the given names, shapes and dtypes; `read` yields the values in the mapping's order, one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, tensor), (read_name, value) in zip(tensors.items(), read, strict=True):
            assert (name, tensor.shape) == (read_name, value.shape)
            if value.dtype != tensor.dtype:
                raise ValueError(f"{name} must be {tensor.dtype}, as {MANIFEST} says: got {value.dtype}")
            file.write(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data if value.ndim else value.tobytes())


def write_index(folder: Path, part: str, tensors: Mapping[str, Tensor]) -> None:
    """The index of a sharded part, under the name that transformers and diffusers look for."""
    size = sum(int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: tensor.file.name for name, tensor in sorted(tensors.items())}}
    (folder / part / f"{STEMS[part]}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
