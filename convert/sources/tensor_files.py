"""Weight files, read one tensor or some rows of it at a time, so that no file is in memory whole.
The first bytes of a file decide its format, not its name."""

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cogi2v_jax.disk import first_line, one_line, parse_json, refuse_pointer

from . import blocks

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
# Not for weights: alphas and counters; bytes are a tokenizer's model, a note in JSON, or GGUF's
# blocks.
BYTES = "U8"
INTEGERS: dict[str, np.dtype[Any]] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    BYTES: np.dtype(np.uint8),
}
STORED = DTYPES | INTEGERS
TORCH = {  # by torch's names
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": BYTES,
}
# Keys under which programs save their tensors.
INSIDE = (
    *("module", "state_dict", "model", "model_state_dict", "params", "transformer"),
    *("ema", "ema_model", "ema_state_dict", "model_ema", "params_ema"),
)
# What wrappers of torch (compile, DDP, FSDP, checkpointing) put before a module's name.
WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


class Entry(NamedTuple):
    """A tensor in a file's header. `dtype` is a name from safetensors or one of `blocks.KINDS`, or
    of neither. A tensor of blocks is read as float32, of this shape."""

    shape: tuple[int, ...]
    dtype: str


def plain_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """The names in a file, by what they are without wrappers. Raises ValueError for two that are
    the same then."""
    found: dict[str, str] = {}
    for name in names:
        plain = blocks.QWEIGHT.sub(".weight", WRAPPER.sub("", name))
        if plain in found:
            both = one_line(f"{found[plain]} and {name}")
            raise ValueError(f"{path} must hold each tensor once: got {both}")
        found[plain] = name
    return found


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
        self.entries: dict[str, Entry] = {}
        self._stored: dict[str, tuple[tuple[int, ...], int]] = {}  # shapes and offsets of the data
        for name, inside in plain_names(header, path).items():
            entry = header[inside]
            stored, code = tuple(entry["shape"]), entry["dtype"]
            kind = blocks.QWEIGHT.search(inside) if code == BYTES else None
            self.entries[name] = (
                _of_blocks(path, inside, kind[1], stored) if kind else Entry(stored, code)
            )
            self._stored[name] = stored, 8 + length + entry["data_offsets"][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        code = self.entries[name].dtype
        shape, offset = self._stored[name]
        dtype = STORED.get(code, np.dtype(np.uint8))
        row = math.prod(shape[1:])
        stop = (shape[0] if shape else 1) if stop is None else stop
        taken = (stop - start, *shape[1:]) if shape else ()
        if start >= stop or not row:
            return np.empty(taken, dtype)
        # Mapped, not read: its pages are loaded once, when used, and freed with the array.
        values = np.memmap(self.path, dtype, "r", offset + start * row * dtype.itemsize, taken)
        return blocks.dequantise(code, values) if code in blocks.KINDS else values


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
        self.note = _note(saved)
        tensors = _tensors(path, saved)
        empty = [name for name, tensor in tensors.items() if not tensor.numel()]
        if 2 * len(empty) > len(tensors):
            way = "merge its processes' files with its zero_to_fp32.py and give the file it makes"
            got = f"{len(empty)} empty ones, as DeepSpeed's ZeRO stage 3 saves"
            raise ValueError(f"{path} must hold whole tensors: got {got}; {way}")
        for name, tensor in tensors.items():
            if tensor.is_meta or tensor.layout != torch.strided:
                got = "on the device meta, without values" if tensor.is_meta else tensor.layout
                raise ValueError(f"{path} must hold whole tensors: got {one_line(name)} {got}")
        self._tensors = {
            name: tensors[inside] for name, inside in plain_names(tensors, path).items()
        }
        self.entries = {
            name: Entry(tuple(tensor.shape), TORCH.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        import torch

        tensor, code = self._tensors[name].detach(), self.entries[name].dtype
        tensor = (tensor[start:stop] if tensor.ndim else tensor).contiguous()
        # Torch can't give numpy bfloat16 and float8: pass the bits as integers.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return tensor.view(bits[tensor.element_size()]).numpy().view(STORED[code])


class Gguf:
    """A file of llama.cpp and ComfyUI. Raises ValueError, in one line, for a file that is cut short
    or of another version, and where the library is missing."""

    def __init__(self, path: Path):
        self.path, self.note, self.entries = path, dict[str, str](), dict[str, Entry]()
        try:
            blocks.library()
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        try:
            reader = blocks.read_header(path)
            tensors = {tensor.name: tensor for tensor in reader.tensors}
            shapes = {name: self._shape(reader, tensor) for name, tensor in tensors.items()}
        except Exception as error:  # a broken file raises anything
            raise ValueError(f"{path} must be a whole GGUF file: {first_line(error)}") from None
        self._data = {}
        for name, inside in plain_names(tensors, path).items():
            self._data[name] = tensors[inside].data
            self.entries[name] = Entry(shapes[inside], tensors[inside].tensor_type.name)

    @staticmethod
    def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
        # GGUF has at most four axes: ComfyUI's programs note the shape of what had more.
        field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        noted = tuple(int(field.parts[part][0]) for part in field.data) if field else ()
        shape = noted or tuple(map(int, reversed(tensor.shape)))
        if math.prod(shape) != tensor.n_elements:
            raise ValueError(f"{tensor.name} must have {tensor.n_elements} numbers: got {shape}")
        return shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor, or its rows from `start` to `stop`."""
        shape, code = self.entries[name]
        data = self._data[name]
        values = blocks.dequantise(code, data) if code in blocks.KINDS else data.view(DTYPES[code])
        return values.reshape(shape)[start:stop] if shape else values.reshape(())


WeightFile = Safetensors | Pickled | Gguf


def open_file(path: Path) -> WeightFile:
    """Raises FileNotFoundError or ValueError, in one line."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise FileNotFoundError(f"{path} must be a readable file: {error.strerror}") from None
    refuse_pointer(path)
    if head[:4] == b"GGUF":
        return Gguf(path)
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


def _of_blocks(path: Path, name: str, kind: str, stored: tuple[int, ...]) -> Entry:
    try:
        return Entry(blocks.shape_of(kind, stored), kind)
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(name)} {error}") from None


def _note(saved: Any) -> dict[str, str]:
    """The texts and numbers beside the tensors, as a header of safetensors has them."""
    values = saved.items() if isinstance(saved, dict) else ()
    noted = {key: value for key, value in values if isinstance(value, str | int | float)}
    return {str(key): str(value) for key, value in noted.items()}


def _tensors(path: Path, saved: Any) -> dict[str, Any]:
    """The tensors by name in what `torch.load` returned."""
    import torch

    found: dict[str, dict[str, Any]] = {}
    values = saved if isinstance(saved, dict) else {}
    for key, inside in {"": values, **{key: values.get(key) for key in INSIDE}}.items():
        named = inside.items() if isinstance(inside, dict) else ()
        tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, torch.Tensor)}
        if any(tensor.ndim for tensor in tensors.values()):  # not counters and decays alone
            found[key] = tensors
    if len(found) == 1 or "" in found:
        return next(iter(found.values()))
    if found:
        way = "save the one to convert in a file of its own"
        raise ValueError(f"{path} must hold one set of tensors: got {', '.join(found)}; {way}")
    got = one_line(", ".join(map(str, values))) or type(saved).__name__
    must = f"must hold tensors by name, or under {', '.join(INSIDE[:3])} or the like"
    raise ValueError(f"{path} {must}: got {got[:200]}")
