"""Rows of a batch file -> jobs, all checked, and the names of their videos."""

import os
import re
import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..disk import is_text, process_folder, sha256
from ..media.images import local_copy
from ..media.rows import Fault, Row, read_rows
from ..media.videos import check_place, written_path
from ..request import Request
from ..weights.bucket import is_bucket
from .jobs import DATABASE, FAILED, RESULTS, Job

SLUG = 40  # bytes of a prompt in the name of its video


class Asked(NamedTuple):
    """What holds for every row that does not say otherwise."""

    model: str
    seed: int
    negative_prompt: str
    settings: Mapping[str, Any]  # of a request
    others: Mapping[str, Any]  # what else a video depends on, as JSON can hold it


@dataclass
class Listing:
    """The jobs of a file, in its order, and the rows that can't be made."""

    jobs: list[Job] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lines: dict[int, int] = field(default_factory=dict)  # of the file, by row
    files: dict[str, Path] = field(default_factory=dict)  # pictures by SHA-256

    @property
    def all(self) -> list[Job]:
        """A job for every row."""
        failed = [Job(one.number, None, {}, FAILED, error=one.message) for one in self.faults]
        return sorted([*self.jobs, *failed], key=lambda job: job.row)

    def refuse(self, faults: Mapping[int, str]) -> None:
        """Moves rows, by number, from the jobs to the faults."""
        self.jobs = [job for job in self.jobs if job.row not in faults]
        self.faults += [Fault(row, self.lines[row], faults[row]) for row in sorted(faults)]


def list_jobs(file: Path, target: Path, asked: Asked, folder: Path) -> Listing:
    """The rows of a batch file as jobs for the folder `target`. Every picture is read, those at
    addresses into `folder`. Raises ValueError and OSError as `read_rows` does."""
    rows, wrong = read_rows(file)
    listing = Listing(lines={one.number: one.line for one in (*rows, *wrong)})
    pictures: dict[Path | str, tuple[Path, str] | Exception] = {}  # files with their SHA-256
    names = _Names(target)
    faults = {fault.number: [fault.message] for fault in wrong}
    for row in rows:
        output = row.output or name_of(row)
        here = faults[row.number] = names.take(output, row.line)
        recipe = {
            **asked.others,
            "model": asked.model,
            "prompt": row.prompt,
            "negative_prompt": row.negative_prompt or asked.negative_prompt,
            "seed": asked.seed if row.seed is None else row.seed,
            "settings": {**asked.settings, **row.settings},
        }
        for name, source in (("image", row.image), ("end_image", row.end_image)):
            if source is None:
                continue
            if source not in pictures:
                pictures[source] = _read(source, folder)
            if isinstance(found := pictures[source], Exception):
                here.append(f"{'end_image: ' * (name != 'image')}{found}")
                continue
            path, digest = found
            listing.files[digest] = path
            recipe |= {name: path.name, f"{name}_sha256": digest}
        listing.jobs.append(Job(row.number, output, recipe))
    found = [one for one in pictures.values() if not isinstance(one, Exception)]
    read = {path.resolve() for path in (file, *(path for path, _ in found))}
    for job in listing.jobs:
        output = written_path(target / str(job.output))
        if not faults[job.row] and output.resolve() in read:
            faults[job.row].append(f"output must be outside of what is read: got {job.output}")
    for number, line in _settings_faults(asked.model, listing.jobs).items():
        faults[number].append(line)
    listing.refuse({number: "; ".join(lines) for number, lines in faults.items() if lines})
    return listing


def name_of(row: Row) -> str:
    """A name that ties a video to its row: the row's number and the beginning of its prompt."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", row.prompt).lower())
    slug = "-".join(words).encode()[:SLUG].decode(errors="ignore").strip("-")
    return f"{'-'.join(filter(None, (f'{row.number:04d}', slug)))}.mp4"


def _read(source: Path | str, folder: Path) -> tuple[Path, str] | Exception:
    try:
        path = local_copy(source, folder)
        return path, sha256(path)
    except (ValueError, OSError) as error:
        return error


def _settings_faults(model: str, jobs: list[Job]) -> dict[int, str]:
    """What is wrong with the settings and texts of jobs, by row, as far as it is known before a
    model is loaded."""
    faults = {}

    def check(job: Job, take: Any) -> None:
        values = {name: job.recipe[name] for name in ("prompt", "negative_prompt", "seed")}
        end = job.recipe.get("end_image")
        try:
            take(Request(image="", **values, **job.recipe["settings"], end_image=end))
        except ValueError as error:
            faults[job.row] = str(error)

    for job in jobs:
        check(job, Request.check)
    from ..weights.hub import known_config

    if known := known_config(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # who makes the videos gives them
            for job in jobs:
                check(job, lambda request: request.resolve(known))
    return faults


class _Names:
    """The outputs of rows within a folder: none twice, none outside."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken: dict[PurePosixPath, int] = {}  # what is written, by line of the file
        self.above: dict[PurePosixPath, int] = {}  # the folders that it is in

    def take(self, output: str, line: int) -> list[str]:
        """What is wrong with an output, which is a row's from now on."""
        path = PurePosixPath(output)
        if not is_text(output) or not output.isprintable() or path.is_absolute():
            return [f"output must be a name in the folder: got {output!r}"]
        if ".." in path.parts or not path.name or path.parts[0].startswith((DATABASE, RESULTS)):
            return [f"output must be a name in the folder: got {output!r}"]
        faults = []
        # Without capitals: some disks do not tell them apart.
        place = PurePosixPath(written_path(Path(output.casefold())))
        clashes = [self.taken[one] for one in (place, *place.parents) if one in self.taken]
        if clashes := clashes or [self.above[place]] if place in self.above else clashes:
            faults.append(f"output must be one row's alone: got {output}, as line {clashes[0]} has")
        self.taken.setdefault(place, line)
        for parent in place.parents:
            self.above.setdefault(parent, line)
        try:
            check_place(self._nearest(path) / path.name)
        except ValueError as error:
            faults.append(str(error))
        return faults

    def _nearest(self, path: PurePosixPath) -> Path:
        """The folder for an output, or the nearest one above that is there already."""
        if is_bucket(self.folder):
            return process_folder()
        parent = (self.folder / path).parent
        while not parent.exists() and parent != self.folder.parent:
            parent = parent.parent
        if not Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(self.folder.parent)):
            raise ValueError(f"output must be a name in the folder: got {path}, which leads out")
        return parent
