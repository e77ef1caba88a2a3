"""gs:// as a local folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils.epath import testing


@contextmanager
def cloud_in(folder: Path) -> Iterator[None]:
    def here(path):
        return folder / os.fspath(path).removeprefix("gs://")

    def opened(original, path, mode):
        if "w" in mode:  # a bucket has no folders to make first
            here(path).parent.mkdir(parents=True, exist_ok=True)
        return original(here(path), mode)

    def walked(original, top, **options):
        for root, folders, files in original(here(top), **options):
            # As gcsfs gives them: without the scheme.
            yield Path(root).relative_to(folder).as_posix(), folders, files

    def moved(original, path, *arguments, **options):
        return original(here(path), *arguments, **options)

    with testing.mock_epath(
        open=opened, walk=walked, isdir=moved, exists=moved, stat=moved, rmtree=moved
    ):
        yield
