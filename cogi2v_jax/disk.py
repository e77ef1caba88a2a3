"""Files on disk: the cache, free space, JSON and TOML, and writing that leaves nothing half-written
under a final name."""

import hashlib
import json
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path


def cache_folder(*parts: str) -> Path:
    """A folder of the user's cache, which may not exist yet."""
    return user_cache_path("cogi2v-jax").joinpath(*parts)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises OSError, in one line, where the disk of a folder, which may not exist yet, has less
    than `needed` bytes free for `what`."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if needed > free:
        raise OSError(
            f"{nearest} must have {needed / 1e9:.1f} GB free for {what}: got {free / 1e9:.1f} GB"
        )


def check_target(
    what: str, path: Path, inputs: tuple[Path, ...] = (), suffix: str = "", folder: bool = False
) -> None:
    """Raises ValueError, which begins with `what`, for a file (or a `folder`) that can't be written
    there, or that would replace one of `inputs` or be written into it."""
    if path.name in ("", "..") or len(os.fsencode(path.name)) > 200:
        raise ValueError(f"{what} must have a name of 1 to 200 bytes: got {path}")
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{what} must end in {suffix}: got {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        way = f"make {path.parent} or choose another"
        raise ValueError(f"{what} must be in an existing, writable folder: got {path}; {way}")
    if not folder and path.exists() and not path.is_file():
        found = f"{path}, which is a folder or a device"
        raise ValueError(f"{what} must be a file or a new name: got {found}")
    if {source.resolve() for source in inputs} & {path.resolve(), path.parent.resolve()}:
        raise ValueError(f"{what} must be outside of what is read: got {path}")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError in one line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} must hold {path.name}: found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError in one line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be a TOML file: {error}") from None


def one_line(text: str) -> str:
    """The text with escapes for whatever could end the line or move a terminal's cursor: names in
    a file are anyone's."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path on the target's disk to write a file or a folder to. It replaces the target, whole, if
    nothing was raised; otherwise the target stays as it was. Its folder is for temporary files. A
    folder is replaced by a folder alone: a file in its place raises OSError."""
    prefix = f".{target.name}.part-"
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        part, old = Path(folder, "new"), Path(folder, "old")
        yield part
        try:
            if target.is_dir() and part.is_dir():  # os.replace does not replace a folder
                os.replace(target, old)
            os.replace(part, target)
        finally:
            if old.exists() and not target.exists():
                os.replace(old, target)


def sync(path: Path) -> None:
    """Writes a file's bytes, or a folder's names, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
