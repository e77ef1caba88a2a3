"""Files to make: checked before the slow work that makes them, and whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(what: str, path: Path, inputs: tuple[Path, ...], suffix: str = "") -> None:
    """Raises ValueError for a path that can't be written, or that would replace what is read."""
    if (suffix and path.suffix.lower() != suffix) or len(os.fsencode(path.name)) > 200:
        ending = f" that ends in {suffix}" if suffix else ""
        raise ValueError(f"{what} must be a name of at most 200 bytes{ending}: got {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"{what} must lie in an existing, writable folder: got {path}; make {path.parent} or choose another"
        )
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{what} must be a file or a new name: got {path}, which is a folder or a device"
        )
    if {source.resolve() for source in inputs} & {path.resolve(), path.parent.resolve()}:
        # A file would be replaced, a folder get one more.
        raise ValueError(f"{what} must lie outside of what is read: got {path}")


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes the target if all goes well."""
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.part-", dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        yield (part := Path(folder, "new"))
        os.replace(part, target)
