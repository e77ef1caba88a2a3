"""A folder in the making: hidden beside its name, filled by one process at a time, and renamed when
it is complete. What a killed process left is gone on with where it was made of the same things, and
removed where not."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogi2v_jax.disk import sync
from cogi2v_jax.weights import bucket
from cogi2v_jax.weights.checkpoint import MANIFEST, unit_path

JOURNAL = "journal.jsonl"
Sums = dict[str, dict[str, Any]]  # of a unit's leaves: dtype, shape and CRC-32


@contextmanager
def appearing(destination: Path | str, wait: bool = False, again: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes its final name only if all went well; otherwise nothing is
    left. Where another process is filling it, that is an error, or is waited for. `again` keeps
    what a killed one left. One at gs:// is filled here and copied there. Raises FileExistsError
    where the destination exists, also by the time that the wait is over."""
    if bucket.is_bucket(destination):
        with bucket.uploading(destination, MANIFEST) as folder:
            yield folder
        return
    destination = Path(destination)
    _check_free(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"{destination} must lie in a folder that can be made: {error.strerror}: {error.filename}"
        ) from None
    folder = destination.parent / f".{destination.name}.part"
    with _held(folder, destination, wait):
        try:
            if not again:
                _empty(folder)
            yield folder
            _rename(folder, destination)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(destination: Path) -> None:
    # Whoever stands in a folder does not see another one take its place.
    if destination.is_dir() and destination.samefile(Path.cwd()):
        raise FileExistsError(f"{destination} must be a new name: got the current folder")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} must not exist yet: found it")


@contextmanager
def _held(folder: Path, destination: Path, wait: bool) -> Iterator[None]:
    """The folder, made if need be, and locked; a lock goes with the process that has it."""
    while True:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if folder.is_dir() and os.path.samestat(os.fstat(lock), folder.stat()):
                _check_free(destination)
                yield
                return
        except BlockingIOError:
            raise FileExistsError(
                f"{destination} must not be in the making: another program is at it"
            ) from None
        finally:
            os.close(lock)
        _check_free(destination)  # it was renamed or removed by whoever had it


def _rename(folder: Path, destination: Path) -> None:
    try:
        os.rename(folder, destination)
    except OSError:
        raise FileExistsError(
            f"{destination} must not exist yet: another program made it meanwhile"
        ) from None
    sync(destination.parent)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class Journal:
    """The units of a folder that are on disk, a line each, written when their files are. `made_of`
    is all that decides what they hold."""

    def __init__(self, folder: Path, made_of: Mapping[str, Any]):
        self._folder, self._path = folder, folder / JOURNAL
        self.units: dict[tuple[str, int | None], Sums] = {}
        first, *lines = list(_lines(self._path)) or [{}]
        if first != made_of:
            _empty(folder)
            lines = []
        self._path.unlink(missing_ok=True)  # and written again: its last line may be half a one
        self._append(dict(made_of))
        for line in lines:
            self.units[line["part"], line["layer"]] = line["leaves"]
            self._append(line)

    def start(self, part: str, layer: int | None) -> None:
        """Clears the place of a unit that is not here, where half of one may lie."""
        shutil.rmtree(unit_path(self._folder, part, layer), ignore_errors=True)

    def add(self, part: str, layer: int | None, leaves: Sums) -> None:
        """A unit is complete, and outlasts a loss of power."""
        for path in sorted(unit_path(self._folder, part, layer).rglob("*"), reverse=True):
            sync(path)
        sync(unit_path(self._folder, part, layer))
        self.units[part, layer] = leaves
        self._append({"part": part, "layer": layer, "leaves": leaves})

    def close(self) -> None:
        """The folder is complete, and its manifest says what the journal did."""
        self._path.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines: the last one may be cut off."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return
