"""Weight files, read one tensor or some rows of it at a time, so that no file is in memory whole.
The first bytes of a file decide its format, not its name."""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cogi2v_jax.disk import first_line, one_line, parse_json

# Weights' dtypes by their names in safetensors. Float8 comes with scales; no network here holds it.
NARROW: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **NARROW,
}
BYTES = "U8"  # not for weights: a tokenizer's model or a note in JSON
TORCH = {  # by torch's names
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.uint8": BYTES,
}
INSIDE = ("module", "state_dict", "model")  # keys under which programs save their tensors


class Entry(NamedTuple):
    """A tensor in a file's header; `dtype` is a name from safetensors that may not be in DTYPES."""

    shape: tuple[int, ...]
    dtype: str


class Safetensors:
    """Raises ValueError, in one line, for a file that is not safetensors or is cut short."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy"):  # checks the header, to its last offset
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = parse_json(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            line = first_line(error)
            raise ValueError(f"{path} must be a whole safetensors file: {line}") from None
        self.note: dict[str, str] = header.pop("__metadata__", None) or {}
        self.entries, self._starts = {}, {}
        for name, entry in header.items():
            self.entries[name] = Entry(tuple(entry["shape"]), entry["dtype"])
            self._starts[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        shape, code = self.entries[name]
        dtype = np.dtype(np.uint8) if code == BYTES else DTYPES[code]
        row = int(np.prod(shape[1:], dtype=np.int64))
        stop = (shape[0] if shape else 1) if stop is None else stop
        taken = (stop - start, *shape[1:]) if shape else ()
        if start >= stop or not row:
            return np.empty(taken, dtype)
        # Mapped, not read: its pages are loaded once, when used, and freed with the array.
        offset = self._starts[name] + start * row * dtype.itemsize
        return np.memmap(self.path, dtype, "r", offset, taken)


class Pickled:
    """A file of `torch.save`, read by torch's restricted unpickler, which makes tensors and plain
    containers and nothing else. Raises ValueError, in one line, for a file that asks for more or is
    not of this format. A file in the format before torch 1.6 is read into memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch
        except ImportError:
            must = "must be safetensors where torch is missing"
            raise ValueError(f"{path} {must}: got a torch file; pip install torch") from None
        try:
            # Torch would take a path that ends in .safetensors for that format.
            with path.open("rb") as file:
                mapped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
                where: Any = path if mapped else file
                saved = torch.load(where, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} must hold tensors and nothing that runs: got a pickle that asks for "
                f"{_asked(error)}, and loading it could run anything; have its tensors alone "
                "saved as safetensors by someone who trusts it"
            ) from None
        except Exception as error:  # a broken file raises anything
            raise ValueError(f"{path} must be a whole torch file: {first_line(error)}") from None
        self.note: dict[str, str] = {}
        tensors = _tensors(saved).items()
        self._tensors = {name: each for name, each in tensors if each.layout == torch.strided}
        self.entries = {
            name: Entry(tuple(tensor.shape), TORCH.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }
        if not self.entries:
            where = ", ".join(INSIDE)
            raise ValueError(f"{path} must hold tensors by name, or under {where}: found none")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        import torch

        tensor, code = self._tensors[name].detach(), self.entries[name].dtype
        tensor = (tensor[start:stop] if tensor.ndim else tensor).contiguous()
        # Torch can't give numpy bfloat16 and float8: pass the bits as integers.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        values = tensor.view(bits[tensor.element_size()]).numpy()
        return values if code == BYTES else values.view(DTYPES[code])


WeightFile = Safetensors | Pickled


def open_file(path: Path) -> WeightFile:
    """Raises FileNotFoundError or ValueError, in one line."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileNotFoundError(f"{path} must be a readable file: {error.strerror}") from None
    if head[:4] == b"GGUF":
        must = "must be safetensors or a torch file"
        way = "take the bf16, fp16 or fp8 file of the same model"
        raise ValueError(f"{path} {must}: got GGUF; {way}")
    is_pickle = head[:1] == b"\x80" and head[1:2] <= b"\x05"
    if head[8:] != b"{" and (head[:4] == b"PK\x03\x04" or is_pickle):
        return Pickled(path)
    return Safetensors(path)


def _asked(error: pickle.UnpicklingError) -> str:
    """What a pickle asked for, from torch's message."""
    for pattern in (r"GLOBAL (\S+) was", r"WeightsUnpickler error: (.*)"):
        if found := re.search(pattern, str(error)):
            return one_line(found[1])
    return first_line(error)


def _tensors(saved: Any) -> dict[str, Any]:
    import torch

    inside = [saved.get(key) for key in INSIDE] if isinstance(saved, dict) else []
    for values in (saved, *inside):
        if isinstance(values, dict):
            named = ((name, value) for name, value in values.items() if isinstance(name, str))
            found = {name: value for name, value in named if isinstance(value, torch.Tensor)}
            if found:
                return found
    return {}
