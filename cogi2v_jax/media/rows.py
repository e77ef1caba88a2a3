"""Batch files: many images and prompts for one command."""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

from ..disk import parse_row, refuse_pointer
from .download import path_or_address

COLUMNS = ("prompt", "image", "negative_prompt", "seed")


class Row(NamedTuple):
    """One video to make, as a batch file states it. The command line answers what is None."""

    prompt: str
    image: Path | str  # a string is an address
    negative_prompt: str | None = None
    seed: int | None = None


def read_manifest(path: Path) -> list[Row]:
    """Rows of a .csv file (with a header), a .jsonl file (an object a line) or a .txt file
    (`prompt@@image` a line). Images are addresses, or paths that are relative to the file's folder.
    Raises ValueError naming every wrong line, or FileNotFoundError."""
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
    rows, faults = [], []
    try:
        lines = readers[path.suffix.lower()](text)
    except csv.Error as error:
        raise ValueError(f"manifest must be a CSV file: got {path} ({error})") from None
    for number, line in lines:
        try:
            rows.append(_row(line, path.parent))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if not rows and not faults:
        raise ValueError(f"manifest must have at least one row: got {path}, which has none")
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return rows


Lines = list[tuple[int, object]]  # numbers, and JSON texts or columns by name


def _csv(text: str) -> Lines:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="cells beyond the header's")
    return [(reader.line_num, row) for row in reader]


def _jsonl(text: str) -> Lines:
    # Not splitlines, which also splits at characters like U+2028, which JSON strings may contain.
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _txt(text: str) -> Lines:
    lines = []
    for number, line in _jsonl(text):
        prompt, _, image = str(line).rpartition("@@")
        lines.append((number, {"prompt": prompt.strip(), "image": image.strip()}))
    return lines


def _row(row: object, folder: Path) -> Row:
    row = parse_row(row)
    unknown = [str(key) for key in row if key not in COLUMNS]
    if unknown:
        raise ValueError(f"columns must be among {', '.join(COLUMNS)}: got {', '.join(unknown)}")
    if not row.get("prompt") or not row.get("image"):
        raise ValueError("it must have a prompt and an image (in a .txt file: prompt@@image)")
    for column in COLUMNS[:3]:
        if not isinstance(row.get(column) or "", str):
            raise ValueError(f"{column} must be text: got {row[column]!r}")
    seed = row.get("seed")
    if seed in (None, ""):
        seed = None
    elif not re.fullmatch(r"\s*\d{1,20}\s*", str(seed)) or int(seed) >= 2**64:
        raise ValueError(f"seed must be an integer from 0 to 2**64 - 1: got {seed!r}")
    negative = row.get("negative_prompt") or None
    seed = None if seed is None else int(seed)
    image = path_or_address(row["image"])
    image = folder / image if isinstance(image, Path) else image
    return Row(row["prompt"], image, negative, seed)
