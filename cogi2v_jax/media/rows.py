"""Batch files: many images and prompts for one command."""

import csv
import difflib
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..disk import parse_row, refuse_pointer
from ..settings import SETTINGS, parse_setting
from .download import path_or_address

COLUMNS = ("prompt", "image", "negative_prompt", "seed")
EVERY_COLUMN = (*COLUMNS, "end_image", "output", *SETTINGS)
SEPARATORS = ",;\t"
BEYOND = "cells beyond the header's"
NEEDED = "a prompt and an image (in a .txt file: prompt@@image)"


@dataclass(frozen=True)
class Row:
    """One video to make, as a batch file states it. The command line answers what is None, and the
    settings that are not there."""

    prompt: str
    image: Path | str  # a string is an address
    negative_prompt: str | None = None
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    end_image: Path | str | None = None
    output: str | None = None
    number: int = field(default=0, compare=False)  # of the file's rows, from 1
    line: int = field(default=0, compare=False)  # of the file, its last one


class Fault(NamedTuple):
    """A row that is wrong, and why."""

    number: int
    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


def read_manifest(path: Path, columns: Collection[str] = COLUMNS) -> list[Row]:
    """The rows of a file of these columns alone. Raises as `read_rows`, and ValueError naming every
    wrong line."""
    rows, faults = read_rows(path, columns)
    if faults:
        raise ValueError(f"{path}: {'; '.join(map(str, faults))}")
    return rows


def read_rows(path: Path, columns: Collection[str] = EVERY_COLUMN) -> tuple[list[Row], list[Fault]]:
    """The rows of a .csv file (with a header; separated by commas, semicolons or tabs), a .jsonl
    file (an object a line) or a .txt file (`prompt@@image` a line), and those that are wrong. Names
    of columns may be in capitals. Images are addresses, or paths that are relative to the file's
    folder. Raises ValueError for what is wrong with the whole file, such as a column that is not
    one of `columns`, or FileNotFoundError."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".txt": _txt}
    if path.suffix.lower() not in readers:
        raise ValueError(f"manifest must end in {', '.join(readers)}: got {path.name}")
    refuse_pointer(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"manifest must exist: found no {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"manifest must be UTF-8 text: got {path}, which is not") from None
    rows: list[Row] = []
    faults: list[Fault] = []
    unknown: dict[str, int] = {}  # names of columns, and the first line of each
    try:
        lines = readers[path.suffix.lower()](text)
    except csv.Error as error:
        raise ValueError(f"manifest must be a CSV file: got {path} ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, (line, content) in enumerate(lines, 1):
        try:
            cells = {_name(name): value for name, value in parse_row(content).items()}
            for name in cells.keys() - set(columns) - {BEYOND}:
                unknown.setdefault(name, line)
            rows.append(_row(cells, path.parent, number, line))
        except ValueError as error:
            faults.append(Fault(number, line, str(error)))
    if unknown:
        raise ValueError(f"{path}: {_unknown(unknown, columns)}")
    if not rows and not faults:
        raise ValueError(f"manifest must have at least one row: got {path}, which has none")
    return rows, faults


def _unknown(names: Mapping[str, int], columns: Collection[str]) -> str:
    """What is said of columns, once for a file."""
    got = ", ".join(f"{name or 'no name'} (line {line})" for name, line in sorted(names.items()))
    message = f"columns must be among {', '.join(columns)}: got {got}"
    near = [difflib.get_close_matches(name, columns, 1) for name in sorted(names)]
    if all(near):
        message += f"; nearest is {', '.join(one for (one,) in near)}"
    elif names.keys() <= set(EVERY_COLUMN):
        message += "; python -m cogi2v_jax.batch reads more of them"
    return message


Lines = list[tuple[int, object]]  # numbers, and JSON texts or columns by name


def _name(column: str) -> str:
    """A column's name as ours are spelled."""
    return column if column == BEYOND else re.sub(r"[\s-]+", "_", column.strip().lower())


def _csv(text: str) -> Lines:
    def header(separator: str) -> list[str]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        return [_name(cell) for cell in next(reader, [])]

    # That which most names of columns stand between; of equal ones the first.
    separator = max(SEPARATORS, key=lambda one: len({*header(one)} & {*EVERY_COLUMN}))
    names = header(separator)
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"columns must be named once: got {twice} twice")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=BEYOND, delimiter=separator)
    rows = [
        (reader.line_num, {name: cell for name, cell in row.items() if name or cell})
        for row in reader
    ]
    return [(line, row) for line, row in rows if any(row.values())]  # spreadsheets leave others


def _jsonl(text: str) -> Lines:
    # Not splitlines, which also splits at characters like U+2028, which JSON strings may contain.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _txt(text: str) -> Lines:
    lines = []
    for number, line in _jsonl(text):
        prompt, _, image = str(line).rpartition("@@")
        lines.append((number, {"prompt": prompt.strip(), "image": image.strip()}))
    return lines


def _row(cells: Mapping[str, Any], folder: Path, number: int, line: int) -> Row:
    """The row of these cells. Raises ValueError naming all that is wrong."""
    if cells.get(BEYOND):
        raise ValueError(f"it must have a cell a column: got {BEYOND}")
    if not cells.get("prompt") or not cells.get("image"):
        raise ValueError(f"it must have {NEEDED}")
    faults = [
        f"{column} must be text: got {cells[column]!r}"
        for column in ("prompt", "image", "negative_prompt", "end_image", "output")
        if not isinstance(cells.get(column) or "", str)
    ]
    seed = cells.get("seed")
    if seed in (None, ""):
        seed = None
    elif not re.fullmatch(r"\s*\d{1,20}\s*", str(seed)) or int(seed) >= 2**64:
        faults.append(f"seed must be an integer from 0 to 2**64 - 1: got {seed!r}")
    settings = {}
    for name in SETTINGS:
        if cells.get(name) not in (None, ""):
            try:
                settings[name] = parse_setting(name, cells[name])
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise ValueError("; ".join(faults))

    def picture(text: str) -> Path | str:
        image = path_or_address(text)
        return folder / image if isinstance(image, Path) else image

    return Row(
        cells["prompt"],
        picture(cells["image"]),
        cells.get("negative_prompt") or None,
        None if seed is None else int(seed),
        settings,
        picture(cells["end_image"]) if cells.get("end_image") else None,
        cells.get("output") or None,
        number,
        line,
    )
