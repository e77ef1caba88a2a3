"""Folders at gs://, by etils (which orbax brings) and gcsfs or TensorFlow. What comes is kept in
the user's cache; what goes is written with its manifest last, since no bucket can rename a
folder."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..disk import beside, cache_folder, check_space, first_line
from .needed_files import wanted

SCHEME = "gs:/"  # pathlib leaves one slash of two
BLOCK = 2**24  # bytes that are copied at a time


def is_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(SCHEME)


def url(path: str | os.PathLike[str]) -> str:
    return "gs://" + os.fspath(path).removeprefix(SCHEME).strip("/")


def download(path: str | os.PathLike[str], manifest: str, say: Callable[[str], None]) -> Path:
    """A copy of a folder in the cache: all of one with a `manifest`, else what a conversion reads.
    A file that came before and has not changed since is not copied again. Raises FileNotFoundError
    or ValueError, in one line."""
    source = url(path)
    try:
        root = _root(source)
        names = list(_names(root, source))
        taken = names if manifest in names else wanted(names)
        if not taken:
            raise FileNotFoundError("found neither a diffusers nor a converted folder there")
        target = cache_folder("gs", hashlib.sha256(source.encode()).hexdigest()[:32])
        sizes = {name: (root / name).stat() for name in taken}
        missing = {name: stat for name, stat in sizes.items() if not _is_same(target / name, stat)}
        check_space(target, sum(stat.length for stat in missing.values()), source)
        if missing:
            say(f"copying {source} into {target}")
        for name, stat in missing.items():
            local = target / name
            local.parent.mkdir(parents=True, exist_ok=True)
            with beside(local) as part:
                with (root / name).open("rb") as there, part.open("wb") as here:
                    shutil.copyfileobj(there, here, BLOCK)
                os.utime(part, (stat.mtime, stat.mtime))
        for extra in {file for file in target.rglob("*") if file.is_file()} - {
            target / name for name in taken
        }:
            extra.unlink()  # of what the folder was before
    except Exception as error:  # etils' backends raise anything
        raise FileNotFoundError(_line(source, error)) from None
    return target


@contextmanager
def uploading(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A local folder to fill, which is then copied to the bucket, the file `last` at the end: a
    folder without it is none. Raises FileExistsError where something is there; what was copied is
    removed if all does not go well."""
    target = url(path)
    try:
        root = _root(target)
        there = next(_names(root, target), None)
    except Exception as error:
        raise FileNotFoundError(_line(target, error)) from None
    if there is not None:
        raise FileExistsError(f"{target} must not exist yet: found {there} in it")
    with tempfile.TemporaryDirectory(prefix="cogi2v-", ignore_cleanup_errors=True) as parent:
        folder = Path(parent, PurePosixPath(target).name)
        folder.mkdir()
        yield folder
        names = sorted(
            (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()),
            key=lambda name: name == last,
        )
        try:
            for name in names:
                with (folder / name).open("rb") as here, (root / name).open("wb") as there:
                    shutil.copyfileobj(here, there, BLOCK)
        except BaseException as error:
            _remove(root)
            if isinstance(error, Exception):
                raise OSError(_line(target, error)) from None
            raise


def _root(source: str) -> Any:
    from etils import epath

    return epath.Path(source)


def _names(root: Any, source: str) -> Iterator[str]:
    """Every file below, relative to the folder."""
    if not root.is_dir():
        return
    top = PurePosixPath(source.removeprefix("gs://"))
    for folder, _, files in root.walk():
        inside = PurePosixPath(os.fspath(folder).removeprefix(SCHEME).lstrip("/")).relative_to(top)
        yield from ((inside / file).as_posix() for file in files if file)


def _is_same(local: Path, stat: Any) -> bool:
    try:
        here = local.stat()
    except OSError:
        return False
    return (here.st_size, int(here.st_mtime)) == (stat.length, stat.mtime)


def _remove(root: Any) -> None:
    try:
        root.rmtree(missing_ok=True)
    except (
        Exception
    ):  # what broke the upload may break this too, and a folder without its manifest is none
        return


def _line(target: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{target} must be reached by a library that is missing here: pip install gcsfs"
    return f"{target} must be a folder that you may use: {first_line(error)}; gcloud auth application-default login signs in"
