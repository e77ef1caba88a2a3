"""Folders at gs://, through etils (which orbax installs) and gcsfs or TensorFlow. Downloads are
kept in the user's cache. Uploads write the manifest last, because a bucket can't rename a folder.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ..disk import PART, cache_folder, check_space, first_line, one_line, replace_when_done

SCHEME = "gs:/"  # pathlib leaves one slash of two
CHUNK = 2**24  # bytes that are copied at a time


def is_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(SCHEME)


def url(path: str | os.PathLike[str]) -> str:
    return "gs://" + os.fspath(path).removeprefix(SCHEME).strip("/")


def download(path: str | os.PathLike[str], manifest: str, say: Callable[[str], None]) -> Path:
    """Copies a folder into the cache and returns the copy: all files of one with a `manifest`, else
    those that a conversion reads. A file that was copied before and has not changed is not copied
    again. Raises FileNotFoundError, or OSError where there is no space, in one line."""
    from .needed_files import choose_files  # with jax, which whoever writes does not need

    source = url(path)
    target = cache_folder("gs", hashlib.sha256(source.encode()).hexdigest()[:32])
    with _reaching(source):
        root = _root(source)
        names = list(_names(root, source))
        needed = names if manifest in names else choose_files(names)
        stats = {name: (root / name).stat() for name in needed}
    if not needed:
        found = "found neither a diffusers nor a converted folder there"
        raise FileNotFoundError(f"{source} must be a checkpoint's folder: {found}")
    missing = {name: stat for name, stat in stats.items() if not _is_same(target / name, stat)}
    check_space(target, sum(stat.length for stat in missing.values()), source)
    if missing:
        say(f"copying {source} into {target}")
    for name, stat in missing.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with _reaching(source), replace_when_done(target / name) as part:
            with (root / name).open("rb") as there, part.open("wb") as here:
                shutil.copyfileobj(there, here, CHUNK)
            os.utime(part, (stat.mtime, stat.mtime))
    _remove_others(target, stats.keys())
    return target


def _remove_others(folder: Path, names: Collection[str]) -> None:
    """Removes what an earlier state of a bucket's folder had beside these files, as far as it can
    be removed; never what another process is writing."""
    for inside, folders, files in os.walk(folder):  # unlike rglob, it ignores what disappears
        folders[:] = [name for name in folders if PART not in name]
        for path in (Path(inside, file) for file in files):
            if path.relative_to(folder).as_posix() not in names:
                with suppress(OSError):
                    path.unlink()


@contextmanager
def uploading(path: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A local folder to fill, which is then copied to the bucket. The file `last` is copied last: a
    folder without it is not complete. Raises FileExistsError where there are files, and removes
    what was copied if anything is raised."""
    target = url(path)
    with _reaching(target):
        root = _root(target)
        there = next(_names(root, target), None)
    if there is not None:
        raise FileExistsError(f"{target} must not exist yet: found {one_line(there)} in it")
    with tempfile.TemporaryDirectory(prefix="cogi2v-", ignore_cleanup_errors=True) as parent:
        folder = Path(parent, PurePosixPath(target).name)
        folder.mkdir()
        yield folder
        files = [file for file in folder.rglob("*") if file.is_file()]
        try:
            for file in sorted(files, key=lambda file: file.relative_to(folder) == Path(last)):
                name = file.relative_to(folder).as_posix()
                with file.open("rb") as here, (root / name).open("wb") as there:
                    shutil.copyfileobj(here, there, CHUNK)
        except BaseException as error:
            with suppress(Exception):  # what broke the upload may break this too
                root.rmtree(missing_ok=True)
            if isinstance(error, Exception):
                raise OSError(_line(target, error)) from None
            raise


def write(path: str, files: Mapping[str, bytes]) -> None:
    """Writes a file (its name is ""), or those of a folder. A file of a bucket appears whole."""
    with _reaching(path):
        for name, content in files.items():
            with (_root(path) / name if name else _root(path)).open("wb") as there:
                there.write(content)


def read(path: str) -> bytes | None:
    """A file's content; None where there is no such file."""
    with _reaching(path):
        return _root(path).read_bytes() if _root(path).exists() else None


def names(path: str | os.PathLike[str]) -> set[str]:
    """Every file in a folder and below, and every folder, relative to it."""
    with _reaching(url(path)):
        files = [PurePosixPath(name) for name in _names(_root(url(path)), url(path))]
    return {str(one) for file in files for one in (file, *file.parents)}


@contextmanager
def _reaching(folder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # etils' backends raise anything
        raise FileNotFoundError(_line(folder, error)) from None


def _root(source: str) -> Any:
    from etils import epath

    return epath.Path(source)


def _names(root: Any, source: str) -> Iterator[str]:
    """Every file in the folder and below, relative to it."""
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


def _line(target: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"cannot reach {target}: a library is missing; pip install gcsfs"
    way = "gcloud auth application-default login signs in"
    return f"cannot use {target}: {first_line(error)}; {way}"
