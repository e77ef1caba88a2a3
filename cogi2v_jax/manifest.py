"""Batches on file: many images and prompts for one command."""

import csv
import json
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("prompt", "image", "negative_prompt", "seed")


class Job(NamedTuple):
    """One video to make; None is left to the command line."""

    prompt: str
    image: Path
    negative_prompt: str | None = None
    seed: int | None = None


def read_manifest(path: Path) -> list[Job]:
    """Jobs of a .csv file (with a header), a .jsonl file (an object a line) or a .txt file (`prompt@@image` a line). Image paths are
    relative to the file's folder. Raises ValueError or FileNotFoundError naming every line at fault."""
    readers = {".csv": _csv, ".jsonl": _jsonl, ".txt": _txt}
    if path.suffix.lower() not in readers:
        raise ValueError(f"manifest must end in {', '.join(readers)}: got {path.name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"manifest must exist: found no {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"manifest must be UTF-8 text: {path} is not") from None
    jobs, faults = [], []
    for number, row in readers[path.suffix.lower()](text):
        try:
            jobs.append(_job(row, path.parent))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if not jobs and not faults:
        faults = ["it has no jobs"]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return jobs


Rows = list[tuple[int, object]]


def _csv(text: str) -> Rows:
    reader = csv.DictReader(text.splitlines())
    return [(reader.line_num, row) for row in reader]


def _jsonl(text: str) -> Rows:
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _txt(text: str) -> Rows:
    rows: Rows = []
    for number, line in _jsonl(text):
        prompt, mark, image = str(line).rpartition("@@")
        rows.append((number, {"prompt": prompt.strip(), "image": image.strip()} if mark else {}))
    return rows


def _job(row: object, folder: Path) -> Job:
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"it must be a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("it must be a JSON object")
    unknown = [str(key) for key in row if key not in COLUMNS]
    if unknown:
        raise ValueError(f"columns must be among {', '.join(COLUMNS)}: got {', '.join(unknown)}")
    if not row.get("prompt") or not row.get("image"):
        raise ValueError("it must have a prompt and an image (in a .txt file: prompt@@image)")
    seed = row.get("seed")
    try:
        seed = None if seed in (None, "") else int(seed)
    except (TypeError, ValueError):
        raise ValueError(f"seed must be an integer: got {seed!r}") from None
    return Job(str(row["prompt"]), folder / str(row["image"]), row.get("negative_prompt") or None, seed)
