"""Weight files under their own names: what one holds, and a tensor or some rows of it at a time, so
that no file is ever in memory whole. What a file is, its first bytes say, whatever it is called."""

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cogi2v_jax.disk import first_line

# Safetensors' names of the dtypes that weights may have. The last two are narrow: they come with
# scales, and no network here holds them.
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
BYTES = "U8"  # no weights: a tokenizer's model or a note in JSON
TORCH = {  # the same, as torch has them
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.uint8": BYTES,
}
# Where programs keep the tensors among the other things that they save.
INSIDE = ("module", "state_dict", "model")


class Entry(NamedTuple):
    """A tensor as its file states it; `dtype` is safetensors' name, which need not be one of
    DTYPES."""

    shape: tuple[int, ...]
    dtype: str


class Safetensors:
    """Raises ValueError, in one line, for a file that is none or is cut short."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy"):  # checks the header, to its last offset
                pass
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a whole safetensors file: {first_line(error)}"
            ) from None
        self.note: dict[str, str] = header.pop("__metadata__", {})
        self.entries = {
            name: Entry(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()
        }
        self._starts = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        shape, code = self.entries[name]
        dtype = np.dtype(np.uint8) if code == BYTES else DTYPES[code]
        row = int(np.prod(shape[1:], dtype=np.int64))
        stop = (shape[0] if shape else 1) if stop is None else stop
        offset = self._starts[name] + start * row * dtype.itemsize
        if start >= stop or not row:
            return np.empty((stop - start, *shape[1:]) if shape else (), dtype)
        # Mapped, not read: it goes into memory once, where it is used, and out again with the
        # array.
        return np.memmap(self.path, dtype, "r", offset, (stop - start, *shape[1:]) if shape else ())


class Pickled:
    """A file of `torch.save`, read by torch's restricted unpickler, which builds tensors and plain
    containers and nothing else. Raises ValueError, in one line, for one that asks for more, and for
    what is none. A file in the format before 1.6 is read into memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import torch
        except ImportError:
            raise ValueError(
                f"{path} must be safetensors where torch is missing: got a torch file; pip install torch"
            ) from None
        try:
            if path.suffix == ".safetensors":  # by which alone torch would tell what it is
                with path.open("rb") as file:
                    saved = torch.load(file, map_location="cpu", weights_only=True)
            else:
                saved = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+) was", str(error)) or re.search(
                r"WeightsUnpickler error: (.*)", str(error)
            )
            what = asked[1] if asked else first_line(error)
            raise ValueError(
                f"{path} must hold tensors and nothing that runs: got a pickle that asks for {what}, and loading it could run anything; "
                "have its tensors alone saved as safetensors by someone who trusts it"
            ) from None
        except Exception as error:  # a broken file breaks the parser anywhere
            raise ValueError(f"{path} must be a whole torch file: {first_line(error)}") from None
        self.note: dict[str, str] = {}
        self._tensors = {
            name: tensor
            for name, tensor in _tensors(saved).items()
            if tensor.layout == torch.strided
        }
        self.entries = {
            name: Entry(tuple(tensor.shape), TORCH.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }
        if not self.entries:
            raise ValueError(
                f"{path} must hold tensors by name, or under {', '.join(INSIDE)}: found none"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        import torch

        tensor, code = self._tensors[name].detach(), self.entries[name].dtype
        tensor = (tensor[start:stop] if tensor.ndim else tensor).contiguous()
        # numpy knows no bfloat16 and no float8 of torch's: the bits pass as integers.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            tensor.element_size()
        ]
        values = tensor.view(bits).numpy()
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
        raise ValueError(
            f"{path} must be safetensors or a torch file: got GGUF; take the bf16, fp16 or fp8 file of the same model"
        )
    if head[8:] != b"{" and (
        head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] <= b"\x05")
    ):
        return Pickled(path)
    return Safetensors(path)


def _tensors(saved: Any) -> dict[str, Any]:
    import torch

    for values in (saved, *(saved.get(key) for key in INSIDE if isinstance(saved, dict))):
        if isinstance(values, dict):
            found = {
                name: value
                for name, value in values.items()
                if isinstance(name, str) and isinstance(value, torch.Tensor)
            }
            if found:
                return found
    return {}
