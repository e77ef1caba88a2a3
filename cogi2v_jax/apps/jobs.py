"""Jobs: requests with a state, kept in an SQLite file of the folder that their videos go into, so
that a lost process loses none. `results.jsonl` beside it has a line for each that has ended. A
bucket can't hold an SQLite file: there, that list is all that is kept."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..disk import PART, first_line, locked, parse_row, replace_when_done
from ..media.videos import written_path
from ..weights import bucket

QUEUED, IN_PROGRESS, COMPLETED, FAILED, CANCELLED = STATES = (
    *("queued", "in_progress"),
    *("completed", "failed", "cancelled"),  # those that a job ends in
)
DATABASE, RESULTS = "jobs.sqlite", "results.jsonl"
# `listed`: whether it is of the latest list. A row that can't be made may have no output.
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    output TEXT UNIQUE, row INTEGER NOT NULL, recipe TEXT NOT NULL, digest TEXT NOT NULL,
    state TEXT NOT NULL, seconds REAL, error TEXT, listed INTEGER NOT NULL
)
"""
COLUMNS = "output, row, recipe, digest, state, seconds, error, listed"


@dataclass(frozen=True)
class Job:
    """A video to make, and where it stands."""

    row: int  # of the list, from 1
    output: str | None  # within the folder; None where the row has no valid one
    recipe: Mapping[str, Any]  # what it is made of, as JSON can hold it
    state: str = QUEUED
    seconds: float | None = None  # that it took
    error: str | None = None

    @property
    def digest(self) -> str:
        """The same for jobs that are made of the same."""
        text = json.dumps(self.recipe, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def line(self) -> str:
        """Its line of the results."""
        fields = {name: getattr(self, name) for name in ("row", "output", "state", "seconds")}
        fields |= {"seed": self.recipe.get("seed"), "error": self.error, "recipe": self.digest}
        return json.dumps(fields) + "\n"


class Store:
    """A list of jobs of a folder. Jobs with an output that is there, and made of the same, are
    completed already; what a process had in progress when it died is queued again. A folder on a
    disk belongs to one store at a time: raises ValueError where another program has it, OSError
    where it can't be used. With `dry` it is only read."""

    def __init__(self, folder: Path, jobs: Sequence[Job], dry: bool = False):
        self.folder = folder
        self._remote = bucket.is_bucket(folder)
        self._reads, self._listed = dry, False
        with ExitStack() as stack, _errors(folder):
            self._database = stack.enter_context(contextlib.closing(self._connect(stack)))
            self._database.execute(TABLE)
            if self._remote or dry:
                self._take_over()
            self._list(jobs)
            self._listed = True
            self._held = stack.pop_all()

    def _connect(self, stack: ExitStack) -> sqlite3.Connection:
        path = ":memory:"
        if not (self._remote or self._reads):
            self.folder.mkdir(exist_ok=True)
            stack.enter_context(locked(self.folder, "output_dir"))
            for left in self.folder.glob(f".*{PART}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            path = self.folder / DATABASE
        return sqlite3.connect(path, isolation_level=None)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        """Queues again what is still in progress, and lets go of the folder."""
        with self._held, self._changing():
            self._set(QUEUED, self.jobs(IN_PROGRESS))

    def jobs(self, *states: str) -> list[Job]:
        """The jobs of the list in these states (all without any), in order."""
        query = f"SELECT {COLUMNS} FROM jobs WHERE listed ORDER BY row"
        with _errors(self.folder):
            rows = self._database.execute(query).fetchall()
        return [
            Job(row, output, json.loads(recipe), state, seconds, error)
            for output, row, recipe, _, state, seconds, error, _ in rows
            if not states or state in states
        ]

    def begin(self, jobs: Collection[Job]) -> None:
        with self._changing():
            self._set(IN_PROGRESS, jobs)

    def complete(self, job: Job, files: Mapping[str, bytes], seconds: float) -> None:
        """Writes an output, whole: a file (its name is "") or those of a folder."""
        self._write(str(written_path(Path(str(job.output)))), files)
        with self._changing():
            self._set(COMPLETED, [job], seconds)

    def end(self, job: Job, state: str, error: str) -> None:
        """A job that ends without an output: failed, or cancelled."""
        with self._changing():
            self._set(state, [job], error=error)

    def _set(
        self,
        state: str,
        jobs: Collection[Job],
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        values = [(state, seconds, error, job.output) for job in jobs]
        change = "UPDATE jobs SET state = ?, seconds = ?, error = ? WHERE output = ?"
        self._database.executemany(change, values)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A transaction, with which the results change too."""
        with _errors(self.folder):
            before = self._lines() if self._listed else None
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                if (lines := self._lines()) != before and not self._reads:
                    self._write(RESULTS, {"": "".join(lines).encode()})
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _lines(self) -> list[str]:
        return [job.line() for job in self.jobs(COMPLETED, FAILED, CANCELLED)]

    def _list(self, jobs: Sequence[Job]) -> None:
        """Makes these the list."""
        query = "SELECT output, digest FROM jobs WHERE state = ?"
        made = dict(self._database.execute(query, [COMPLETED]))
        there = bucket.names(self.folder) if self._remote and made else set()

        def is_there(output: str) -> bool:
            target = written_path(Path(output))
            return str(target) in there if self._remote else (self.folder / target).exists()

        with self._changing():
            self._database.execute("DELETE FROM jobs WHERE output IS NULL")
            self._database.execute("UPDATE jobs SET listed = 0")
            for job in jobs:
                name, digest = job.output, job.digest
                recipe = json.dumps(job.recipe)
                if name is not None and made.get(name) == digest and is_there(name):
                    again = "UPDATE jobs SET listed = 1, row = ?, recipe = ? WHERE output = ?"
                    self._database.execute(again, [job.row, recipe, name])
                    continue
                row = [name, job.row, recipe, digest, job.state, None, job.error, 1]
                new = f"INSERT OR REPLACE INTO jobs ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                self._database.execute(new, row)

    def _take_over(self) -> None:
        """Reads the results of earlier runs."""
        if self._remote:
            content = bucket.read(f"{bucket.url(self.folder)}/{RESULTS}") or b""
        else:
            path = self.folder / RESULTS
            content = path.read_bytes() if path.is_file() else b""
        for number, text in enumerate(content.decode(errors="replace").splitlines(), 1):
            try:
                line = parse_row(text)
                values = [line[name] for name in ("output", "row", "recipe", "state", "seconds")]
            except (ValueError, KeyError):
                where = f"line {number} of {RESULTS} in {self.folder}"
                raise ValueError(f"{where} must be of an earlier run: got {text[:40]!r}") from None
            output, row, digest, state, seconds = values
            self._database.execute(
                f"INSERT OR REPLACE INTO jobs ({COLUMNS}) VALUES (?, ?, '{{}}', ?, ?, ?, ?, 0)",
                [output, row, digest, state, seconds, line.get("error")],
            )

    def _write(self, name: str, files: Mapping[str, bytes]) -> None:
        if self._remote:
            return bucket.write(f"{bucket.url(self.folder)}/{name}", files)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replace_when_done(target) as part:
            for inside, content in files.items():
                file = part / inside if inside else part
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        way = "another DIR, or one without this file, begins anew"
        raise OSError(f"cannot use {folder / DATABASE}: {first_line(error)}; {way}") from None
