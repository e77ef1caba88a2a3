"""A folder that appears under its name only when it is complete: one process at a time fills it,
hidden beside its final name."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogi2v_jax.disk import sync, sync_all
from cogi2v_jax.weights import bucket
from cogi2v_jax.weights.checkpoint import MANIFEST


@contextmanager
def make_folder(destination: Path | str, wait: bool = False) -> Iterator[Path]:
    """A folder to fill, which is renamed to the destination if nothing is raised, and removed
    otherwise. What a killed process left of it is removed first. A link is followed. A destination
    at gs:// is filled here and copied there. Raises FileExistsError where the destination exists,
    or where another process is filling it; `wait` waits for that process first."""
    if bucket.is_bucket(destination):
        with bucket.uploading(destination, MANIFEST) as folder:
            yield folder
        return
    destination = Path(destination)
    if destination.is_symlink():  # a folder can't be renamed to one
        destination = Path(os.path.realpath(destination))
    _check_free(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"{destination} must be in a folder that can be made: "
            f"{error.strerror}: {error.filename}"
        ) from None
    folder = destination.parent / f".{destination.name}.part"
    with _locked(folder, destination, wait):
        try:
            for stale in folder.iterdir():
                is_folder = stale.is_dir() and not stale.is_symlink()
                shutil.rmtree(stale) if is_folder else stale.unlink()
            yield folder
            sync_all(folder)
            _rename(folder, destination)
            sync(destination.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(destination: Path) -> None:
    # Programs in the current folder would stay in the old one when another takes its name.
    if destination.is_dir() and destination.samefile(Path.cwd()):
        raise FileExistsError(f"{destination} must be a new name: got the current folder")
    is_folder = destination.is_dir() and not destination.is_symlink()  # a link to itself is one
    if os.path.lexists(destination) and (not is_folder or any(destination.iterdir())):
        raise FileExistsError(f"{destination} must not exist yet: found it")


@contextmanager
def _locked(folder: Path, destination: Path, wait: bool) -> Iterator[None]:
    """Makes the folder and locks it. The system releases the lock of a killed process."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever held the lock may have renamed or removed the folder: then the name is free,
            # or another folder's.
            if folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                _check_free(destination)
                yield
                return
        except BlockingIOError:
            raise FileExistsError(f"{destination} is being made by another program") from None
        finally:
            os.close(descriptor)
        _check_free(destination)


def _rename(folder: Path, destination: Path) -> None:
    try:
        os.rename(folder, destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise FileExistsError(
            f"{destination} must not exist yet: another program made it meanwhile"
        ) from None
