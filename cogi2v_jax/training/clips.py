"""Clips to train on: the lists of them that users have, with captions, and their frames, read by
PyAV. No jax."""

import csv
import errno
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..disk import A_POINTER, POINTER, first_line, is_pointer, parse_row, refuse_pointer
from ..media.images import fit_image

# Of the system, or of a file server: another try may succeed.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v")
TABLES = ("metadata.jsonl", "metadata.csv")  # of a data set of the Hugging Face hub
PROMPTS, VIDEOS = ("prompts.txt", "prompt.txt"), ("videos.txt", "video.txt")  # a clip a line
BEYOND = "cells beyond the header's"
SHOWN = 20  # faults named in an error
WIDEST = 10.0  # widths of a pixel, in its height, up to which a file is believed


class Clip(NamedTuple):
    """One row of a list."""

    name: str  # the video, as the list has it
    path: Path
    caption: str


class Bucket(NamedTuple):
    """The size of clips that are trained on together."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Raises ValueError for anything but "49x480x720"."""
        sides = text.strip().split("x")
        if len(sides) != 3 or not all(side.isdecimal() and len(side) < 10 for side in sides):
            raise ValueError(f"bucket must be FRAMESxHEIGHTxWIDTH, as 49x480x720: got {text!r}")
        return cls(*map(int, sides))


class Columns(NamedTuple):
    """Of a list's rows."""

    video: str
    captions: tuple[str, ...]  # names that the caption's may have
    others: bool  # whether there may be more


OURS = Columns("video", ("caption",), others=False)
HUB = Columns("file_name", ("text", "caption", "prompt"), others=True)
Rows = Iterator[tuple[str, Any]]  # where a row is, and its columns or its JSON text


def list_clips(source: Path) -> list[Clip]:
    """The clips of a list. It is one of: a folder of videos with a .txt of the same name beside
    each; a .csv or .jsonl with the columns video and caption; a folder with prompts.txt and
    videos.txt, a clip a line; a folder with Hugging Face's metadata.jsonl or metadata.csv. Paths
    are relative to the folder. Raises FileNotFoundError, or ValueError naming the wrong rows."""
    rows, columns = _rows(source)
    folder = source if source.is_dir() else source.parent
    clips, faults = [], []
    for where, row in rows:
        try:
            clips.append(_clip(row, columns, folder))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ValueError(f"{source}: {'; '.join(faults[:SHOWN])}{more}")
    if not clips:
        lists = f"a list of them ({', '.join(TABLES)}, or {PROMPTS[0]} and {VIDEOS[0]})"
        kinds = f"videos ({', '.join(SUFFIXES)}) or {lists}"
        raise ValueError(f"clips must have {kinds}: got {source}, which has none")
    return clips


def _rows(source: Path) -> tuple[Rows, Columns]:
    rule = "clips must be a folder, a .csv or a .jsonl file"
    if source.is_file():
        if source.suffix.lower() not in READERS:
            raise ValueError(f"{rule}: got {source}")
        return READERS[source.suffix.lower()](source), OURS
    if not source.is_dir():
        raise FileNotFoundError(f"{rule}: found no {source}")
    tables, prompts, videos = (
        [source / name for name in names if (source / name).is_file()]
        for names in (TABLES, PROMPTS, VIDEOS)
    )
    pair = [*prompts, *videos] if prompts and videos else []
    if len(tables) > 1 or len(pair) > 2 or (tables and pair):
        found = ", ".join(path.name for path in (*tables, *pair))
        raise ValueError(f"{source} must have one list of clips: found {found}")
    if tables:
        return READERS[tables[0].suffix](tables[0]), HUB
    return (_lines(*pair) if pair else _beside(source)), OURS


def _clip(row: Any, columns: Columns, folder: Path) -> Clip:
    row = parse_row(row)
    known = {columns.video, *columns.captions}
    unknown = [str(key) for key in row if key not in known and not columns.others]
    if unknown or BEYOND in row:
        named = f"{columns.video} and {' or '.join(columns.captions)}"
        raise ValueError(f"columns must be {named}: got {', '.join(unknown or [BEYOND])}")
    caption = next(filter(None, map(row.get, columns.captions)), None)
    values = {columns.video: row.get(columns.video), " or ".join(columns.captions): caption}
    for name, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"it must have a {name}" + (f": got {value!r}" if value else ""))
    video, caption = (str(value).strip() for value in values.values())
    return Clip(video, folder / video, caption)


def _beside(folder: Path) -> Rows:
    for path in sorted(folder.rglob("[!.]*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            name, text = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
            caption = _read_text(text) if text.is_file() else None
            yield name, {"video": name, "caption": caption}


def _lines(prompts: Path, videos: Path) -> Rows:
    # Not splitlines, which also splits at characters like U+2028.
    captions, names = (_read_text(path).rstrip().split("\n") for path in (prompts, videos))
    if len(captions) != len(names):
        got = f"{len(captions)} and {len(names)}"
        raise ValueError(f"{prompts} and {videos.name} must have equally many lines: got {got}")
    for number, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
        yield f"line {number}", {"video": name, "caption": caption}


def _csv(path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), restkey=BEYOND)
    try:
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV file: {error}") from None


def _jsonl(path: Path) -> Rows:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


READERS = {".csv": _csv, ".jsonl": _jsonl}


def _read_text(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} must be UTF-8 text: got other bytes") from None


def choose_bucket(buckets: Sequence[Bucket], frames: int, height: int, width: int) -> int:
    """The number of the bucket for a clip: of those that it has enough frames for, one of the
    nearest aspect ratio, and of these the one with most frames. Raises ValueError where it is too
    short for all."""

    def rank(number: int) -> tuple[float, int]:
        bucket = buckets[number]
        ratio = (bucket.height / bucket.width) / (height / width)
        return round(abs(math.log(ratio)), 6), -bucket.frames

    filled = [number for number, bucket in enumerate(buckets) if bucket.frames <= frames]
    if not filled:
        least = min(bucket.frames for bucket in buckets)
        raise ValueError(f"it must have at least {least} frames: got {frames}")
    return min(filled, key=rank)


def choose_frames(wanted: int, frames: int, rate: float, fps: float) -> list[int]:
    """The indices of `wanted` frames of a clip that has `frames` at `rate` a second: from the first
    on, as near to `fps` a second as the clip is long enough for."""
    stride = max(1.0, min(rate / fps, (frames - 1) / max(wanted - 1, 1)))
    return [math.floor(number * stride + 0.5) for number in range(wanted)]


def read_clip(path: Path, buckets: Sequence[Bucket], fps: float) -> tuple[int, np.ndarray]:
    """(the number of a video's bucket; its frames there, uint8 [f h w 3]). Frames are turned
    upright, and those that are not chosen are decoded alone. Raises ValueError, without the path,
    for a video that is missing, broken or too short; OSError where another try may succeed."""
    from av.error import FFmpegError

    try:
        with path.open("rb") as file:
            if is_pointer(file.read(len(POINTER))):
                raise ValueError(A_POINTER)
        count = _count_frames(path)
        while True:
            number, frames, decoded = _decode(path, buckets, fps, count)
            if len(frames) == buckets[number].frames:
                return number, np.stack(frames)
            count = decoded  # fewer than the file says
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (FFmpegError, OSError) as error:
        reason = error.strerror or first_line(error)
        if error.errno in PASSING:
            raise OSError(f"{path} cannot be read now: {reason}") from None
        raise ValueError(f"it cannot be read: {reason}") from None


def _count_frames(path: Path) -> int:
    """As a video says or, where it doesn't, by its packets, without decoding."""
    import av

    with av.open(f"file:{path}") as video:
        stream = _stream(video)
        return stream.frames or sum(packet.size > 0 for packet in video.demux(stream))


def _stream(video: Any) -> Any:
    if not video.streams.video:
        raise ValueError("it has no video")
    return video.streams.video[0]


def _decode(
    path: Path, buckets: Sequence[Bucket], fps: float, count: int
) -> tuple[int, list[np.ndarray], int]:
    """(bucket, its frames, the number of frames that were decoded) of a video that may have `count`
    frames. Where it has fewer, so has the result."""
    import av

    with av.open(f"file:{path}") as video:
        stream = _stream(video)
        rate = float(stream.average_rate or stream.guessed_rate or fps)
        pixel = float(stream.sample_aspect_ratio or 1)
        decoded = video.decode(stream)
        first = next(decoded, None)
        if first is None:
            raise ValueError("it has no frame")
        upright = _upright(first, pixel)
        number = choose_bucket(buckets, count, upright.height, upright.width)
        bucket, frames, index = buckets[number], [], -1
        chosen = choose_frames(bucket.frames, count, rate, fps)
        for index, frame in enumerate(itertools.chain([first], decoded)):
            if index == chosen[len(frames)]:
                fitted = fit_image(_upright(frame, pixel), bucket.height, bucket.width, "crop")
                frames.append(np.rint((fitted + 1) * 127.5).astype(np.uint8))
                if len(frames) == len(chosen):
                    break
        return number, frames, index + 1


def _upright(frame: Any, pixel: float) -> Image.Image:
    """A frame as it is to be shown, with square pixels; `pixel` is the width of the file's."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if pixel != 1 and 1 / WIDEST < pixel < WIDEST:
        image = image.resize(
            (max(1, round(image.width * pixel)), image.height), Image.Resampling.LANCZOS
        )
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
