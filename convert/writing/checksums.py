"""Checksums of source files, taken while they are converted, and of the converted leaves, which
`check` compares."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cogi2v_jax.disk import SHA256, sha256

Sums = dict[str, dict[str, Any]]  # dtype, shape and CRC-32 of each leaf of a unit
BLOCK = 2**17  # numbers that are checked at a time: temporary arrays of that size stay in the cache


class Digests:
    """SHA-256 of files, computed one after the other in a thread, except for the `known` ones."""

    def __init__(self, files: Iterable[Path], known: Mapping[Path, str] | None = None):
        self._worker = ThreadPoolExecutor(1)
        self._known = known or {}
        self._found: dict[Path, Future[str]] = {
            file: self._worker.submit(sha256, file) for file in files if file not in self._known
        }

    def __enter__(self) -> "Digests":
        return self

    def __exit__(self, *_: Any) -> None:
        self._worker.shutdown(cancel_futures=True)

    def of(self, file: Path) -> dict[str, Any]:
        """Name, size and SHA-256 of a file. The hub's cache names a large file by its SHA-256:
        raises ValueError where that differs."""
        found, blob = self._known.get(file) or self._found[file].result(), file.resolve()
        if SHA256.fullmatch(blob.name) and blob.name != found:
            raise ValueError(
                f"{file} must have the SHA-256 {blob.name}, as the hub says: got {found}; "
                f"delete {blob} and fetch it again"
            )
        return {"file": file.name, "bytes": file.stat().st_size, "sha256": found}


def sums(leaves: Mapping[str, np.ndarray]) -> Sums:
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "crc32": crc32(leaf)}
        for name, leaf in leaves.items()
    }


def differences(expected: Sums, found: Sums, where: str) -> Iterator[str]:
    """A line for each way in which the leaves of a unit are not as expected."""
    if found.keys() != expected.keys():
        count = f"the {len(expected)} tensors that the manifest has"
        yield f"{where} must hold {count}: got {len(found)}"
    for name in sorted(found.keys() & expected.keys()):
        for key, got in found[name].items():
            if got != (must := expected[name].get(key)):
                yield f"{where}: {name} must have the {key} {must}: got {got}"
                break


def size_of(sums: Sums) -> int:
    """Bytes of the leaves."""
    return sum(
        math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in sums.values()
    )


def crc32(array: np.ndarray) -> str:
    """CRC-32 of an array's bytes in row-major order."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def crc32_of(file: Path) -> str:
    """CRC-32 of a file's bytes: several times faster than SHA-256, and enough against accidents."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises ValueError for NaN and infinities."""
    flat = array.reshape(-1)
    blocks = (flat[first : first + BLOCK] for first in range(0, flat.size, BLOCK))
    if array.dtype.kind in "iu" or all(map(_is_finite, blocks)):
        return
    where = tuple(map(int, np.argwhere(~np.isfinite(array.astype(np.float32)))[0]))
    raise ValueError(f"{name} must be finite: got {array[where]} at {list(where)}")


def cast_finite(name: str, array: np.ndarray, dtype: np.dtype[Any] | None) -> np.ndarray:
    """The array in a dtype (None: its own). Raises ValueError for what is not finite, before or
    after."""
    check_finite(name, array)
    if dtype is not None and array.dtype != dtype:
        with np.errstate(over="ignore"):
            array = array.astype(dtype)
        check_finite(f"{name} in {dtype}", array)
    return array


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # its exponent's bits: many times faster than isfinite
        return int((values.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    return bool(np.isfinite(values).all())
