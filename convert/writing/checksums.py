"""Checksums: of source files while they are converted, and of the converted leaves, which `check`
reads again."""

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from cogi2v_jax.disk import sha256

from .folder import Sums

BLOCK = 2**17  # numbers that are looked at together: what they make fits a core's cache
HUB = re.compile(r"[0-9a-f]{64}")  # what the hub's cache calls a large file: its SHA-256


class Digests:
    """SHA-256 of files, taken one after the other beside other work. `known` are taken already."""

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
        """A file's name, size and SHA-256. Raises ValueError where the hub gave it another."""
        found, blob = self._known.get(file) or self._found[file].result(), file.resolve()
        if HUB.fullmatch(blob.name) and blob.name != found:
            raise ValueError(
                f"{file} must have the SHA-256 {blob.name}, as the hub says: got {found}; delete {blob} and fetch it again"
            )
        return {"file": file.name, "bytes": file.stat().st_size, "sha256": found}


def sums(leaves: Mapping[str, np.ndarray]) -> Sums:
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape), "crc32": crc32(leaf)}
        for name, leaf in leaves.items()
    }


def size_of(sums: Sums) -> int:
    """Bytes of the leaves."""
    return sum(
        math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize for leaf in sums.values()
    )


def crc32(array: np.ndarray) -> str:
    """Of an array's bytes in row-major order."""
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == ml_dtypes.bfloat16:  # by its exponent's bits, at a multiple of the speed
        return int((values.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    return bool(np.isfinite(values).all())


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises ValueError for NaN and infinities."""
    flat = array.reshape(-1)
    fine = array.dtype.kind in "iu" or all(
        _is_finite(flat[first : first + BLOCK]) for first in range(0, flat.size, BLOCK)
    )
    if not fine:
        where = tuple(
            int(index) for index in np.argwhere(~np.isfinite(array.astype(np.float32)))[0]
        )
        raise ValueError(f"{name} must be finite: got {array[where]} at {list(where)}")
