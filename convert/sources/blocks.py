"""GGUF's quantised weights: each row is blocks of some numbers and their scale, as the library
`gguf` describes them. An extra of this package installs it."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# How ComfyUI's safetensors files name the bytes of a weight: NAME.Q4_0_qweight
QWEIGHT = re.compile(rf"\.({'|'.join(KINDS)})_qweight$")


def library() -> ModuleType:
    """Raises ValueError, in one line, where the library is missing."""
    try:
        import gguf
    except ImportError:
        way = "pip install 'cogi2v-jax[gguf]', or take the bf16, fp16 or fp8 file of the same model"
        raise ValueError(f"must be read by the library gguf: {way}") from None
    return gguf


def read_header(path: Path) -> Any:
    """The library's reader of a .gguf file. It raises anything for a broken one."""

    class Reader(library().GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, **given: Any) -> np.ndarray:
            # Behind the file's end the library returns empty arrays, for each of the entries that
            # the header promises: a count of 2**60 would never end.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends before what its header says")
            return super()._get(offset, dtype, count, **given)

    reader = Reader(path)
    if reader.byte_order == "S":  # swapped
        raise ValueError("its numbers must be little-endian: got big-endian ones")
    return reader


def shape_of(kind: str, bytes_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight whose bytes have `bytes_shape`. Raises ValueError for a row that is no
    whole number of blocks."""
    gguf = library()
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if not bytes_shape or bytes_shape[-1] % size:
        raise ValueError(f"must have rows of whole blocks of {size} bytes: got {[*bytes_shape]}")
    return (*bytes_shape[:-1], bytes_shape[-1] // size * numbers)


def dequantise(kind: str, rows: np.ndarray) -> np.ndarray:
    """The numbers of some rows, in float32."""
    gguf = library()
    with np.errstate(all="ignore"):  # a scale may be no number: the conversion refuses it by name
        return gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
