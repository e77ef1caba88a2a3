"""Files on disk: the cache, free space, JSON and TOML, and writing that leaves nothing half-written
under a final name."""

import atexit
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

DEEPEST = 64  # levels in JSON; Python's own limit is about 1000 levels of what walks a value
LONGEST = 300  # digits of an integer in JSON; a float holds at most 308
SHA256 = re.compile(r"[0-9a-f]{64}")
POINTER = b"version https://git-lfs"  # the beginning of one
A_POINTER = "a git-lfs pointer; fetch the file with git lfs pull"
SHOWN = 200  # characters of a text in a message
PART = ".part-"  # in the names of files and folders that are being written

at_end = ExitStack()  # what is removed when the process ends; close it before `os._exit`
atexit.register(at_end.close)


def cache_folder(*parts: str) -> Path:
    """A folder of the user's cache, which may not exist yet; for a user without a home, of one for
    this process."""
    try:
        return user_cache_path("cogi2v-jax").joinpath(*parts)
    except RuntimeError:  # from expanding ~
        return process_folder().joinpath(*parts)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder for this process, where its file system can; the system releases it when the
    process ends. Raises ValueError where another one holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{what} {folder} is being written by another program") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@functools.cache
def process_folder() -> Path:
    """A temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="cogi2v-"))
    at_end.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def free_space(folder: Path) -> tuple[int, Path]:
    """Bytes free on the disk of a folder, which may not exist yet, and its nearest parent that
    does."""
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(nearest).free, nearest


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises OSError, in one line, where the disk of a folder, which may not exist yet, has less
    than `needed` bytes free for `what`."""
    free, nearest = free_space(folder)
    if needed > free:
        got = show_size(free)
        raise OSError(f"{nearest} must have {show_size(needed)} free for {what}: got {got}")


def show_size(count: int) -> str:
    """A number of bytes for a person; below 0.1 GB in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def check_target(
    what: str, path: Path, inputs: tuple[Path, ...] = (), suffix: str = "", folder: bool = False
) -> None:
    """Raises ValueError, which begins with `what`, for a file (or a `folder`) that can't be written
    there, or that would replace one of `inputs` or be written into it."""
    if path.name in ("", "..") or len(os.fsencode(path.name)) > 200:
        raise ValueError(f"{what} must have a name of 1 to 200 bytes: got {path}")
    if suffix and path.suffix.lower() != suffix:
        raise ValueError(f"{what} must end in {suffix}: got {path}")
    real = Path(os.path.realpath(path))  # a link is followed, as `replace_when_done` does
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK | os.X_OK):
        way = f"make {real.parent} or choose another"
        raise ValueError(f"{what} must be in an existing, writable folder: got {path}; {way}")
    if not folder and path.exists() and not path.is_file():
        found = f"{path}, which is a folder or a device"
        raise ValueError(f"{what} must be a file or a new name: got {found}")
    if {source.resolve() for source in inputs} & {real, real.parent}:
        raise ValueError(f"{what} must be outside of what is read: got {path}")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raises ValueError, in one line, for a file whose place a pointer of git-lfs still has."""
    try:
        with path.open("rb") as file:
            if not is_pointer(file.read(len(POINTER))):
                return
    except OSError:
        return  # whoever reads the file says so
    raise ValueError(f"{path} must be the file itself: got {A_POINTER}")


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins so is a pointer of git-lfs."""
    return head.startswith(POINTER)


def parse_row(row: object) -> dict[str, Any]:
    """A row of a list: a JSON object, or its text. Raises ValueError for anything else."""
    if isinstance(row, str):
        try:
            row = parse_json(row)
        except ValueError as error:
            raise ValueError(f"it must be a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"it must be a JSON object: got {type(row).__name__}")
    return row


def parse_json(text: str | bytes) -> Any:
    """The value of a user's JSON text. Raises ValueError, in one line, for what is no JSON, and for
    what Python reads but code that uses it would fail at: values nested deeper than DEEPEST,
    integers longer than LONGEST digits."""
    try:
        value = json.loads(text, parse_int=_parse_integer)
        level = [value]
        for _ in range(DEEPEST):
            level = [inner for outer in level for inner in _values(outer)]
        if not level:
            return value
    except RecursionError:
        pass
    raise ValueError(f"its values must be nested at most {DEEPEST} deep: got more")


def _parse_integer(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"its integers must have at most {LONGEST} digits: got {len(digits)}")
    return int(digits)


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError or ValueError in one line."""
    refuse_pointer(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} must hold {path.name}: found none") from None
    except NotADirectoryError:
        must = f"must be a folder with {path.name}"
        raise FileNotFoundError(f"{path.parent} {must}: got a file") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(value).__name__}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError in one line."""
    refuse_pointer(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} must be a TOML file: found none") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} must be a TOML file: {error}") from None


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold. The bytes of a name that are no text become
    characters that it can't."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def one_line(text: str) -> str:
    """The text with escapes for whatever could end the line or move a terminal's cursor: names in
    a file are anyone's."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def quoted(text: str) -> str:
    """The text in quotes, and only its beginning where it is long: for a message."""
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none. The message may quote a
    file: escaped as by `one_line`."""
    return one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))


@contextmanager
def replace_when_done(target: Path) -> Iterator[Path]:
    """A path on the target's disk to write a file or a folder to. It replaces the target, whole, if
    nothing was raised; otherwise the target stays as it was. Its folder is for temporary files. A
    folder is replaced by a folder alone: a file in its place raises OSError. Of a link, what it
    leads to is replaced."""
    target = Path(os.path.realpath(target))
    prefix = f".{target.name}{PART}"
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        part, old = Path(folder, "new"), Path(folder, "old")
        yield part
        sync_all(part)
        try:
            if target.is_dir() and part.is_dir():  # os.replace does not replace a folder
                os.replace(target, old)
            os.replace(part, target)
        finally:
            if old.exists() and not target.exists():
                os.replace(old, target)
        sync(target.parent)


def sync_all(path: Path) -> None:
    """Writes a file, or a folder and all that is in it, from the system's cache to the disk. What
    is renamed afterwards is whole under its new name, even after a power cut."""
    for each in (*path.rglob("*"), path):
        sync(each)


def sync(path: Path) -> None:
    """Writes a file's bytes, or a folder's names, from the system's cache to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network disks can't sync folders; a folder may be written and not be read.
        if error.errno not in (errno.EINVAL, errno.EACCES):
            raise
