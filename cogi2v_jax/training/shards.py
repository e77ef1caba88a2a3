"""Prepared clips on disk: what `preparation.py` writes and training reads. No jax.

    manifest.json               format, model, buckets, captions, clips; sizes and sums of all files
    text-00000.safetensors      T5's encodings [p d] of captions, under their numbers; 0 is of ""
    clips-00000.safetensors     of clip n `n.moments` [t h w 2c], the mean and the log-variance of
                                its latents, unscaled, and `n.image` uint8 [h w 3], its first frame;
                                or of data for the VAE `n.pixels` uint8 [f h w 3]

Every shard is of a fixed range of captions or of the list of clips, and its header says what it was
made of: the same command keeps what is there, and makes the rest."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (with it numpy knows bfloat16)
import numpy as np

from .. import __version__
from ..disk import first_line, one_line, read_json, replace_when_done, sha256
from .clips import Bucket, Clip

FORMAT = 1  # of the folder; a reader refuses any other
MANIFEST = "manifest.json"
HEADER = "prepared"  # the key of a shard's metadata
LATENTS, PIXELS = "latents", "pixels"  # kinds
CAPTIONS = 64  # of a shard
CLIPS = {LATENTS: 16, PIXELS: 2}  # of a shard, by kind; it is in memory while it is written
SHARD = re.compile(r"(text|clips)-\d{5,}\.safetensors")
AGAIN = "delete it and prepare the clips again"


class Shard(NamedTuple):
    """A file to be."""

    name: str
    numbers: range  # of its captions, or of its clips in the list
    fingerprint: str  # of all that determines it


@dataclass(frozen=True)
class Plan:
    """All that determines what is written."""

    kind: str
    clips: Sequence[Clip]
    buckets: Sequence[Bucket]
    fps: float
    dtype: str
    model: Mapping[str, Any]  # title, configs and, for latents, `weights`: a fingerprint by part

    @cached_property
    def captions(self) -> list[str]:
        """All different ones, after the empty one."""
        return list(dict.fromkeys(["", *(clip.caption for clip in self.clips)]))

    @cached_property
    def texts(self) -> list[Shard]:
        if self.kind == PIXELS:
            return []
        settings = {"weights": self.model["weights"]["text_encoder"], "dtype": self.dtype}
        return _shards("text", self.captions, CAPTIONS, settings)

    @cached_property
    def videos(self) -> list[Shard]:
        settings = {"kind": self.kind, "buckets": self.buckets, "fps": self.fps}
        if self.kind == LATENTS:
            settings |= {"weights": self.model["weights"]["vae"], "dtype": self.dtype}
        # Captions are not part of it: correcting one leaves latents as they are.
        identities = [[clip.name, *_stamp(clip.path)] for clip in self.clips]
        return _shards("clips", identities, CLIPS[self.kind], settings)

    def remaining(self, folder: Path, shards: Sequence[Shard]) -> list[Shard]:
        """The shards that a folder doesn't have yet. Raises ValueError for files that were made of
        anything else, and for broken ones."""
        planned = {shard.name: shard for shard in shards}
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        strange = [
            name
            for name in names
            if name not in planned
            or read_header(folder / name).get("fingerprint") != planned[name].fingerprint
        ]
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            what = f"{folder} must hold only what these clips, captions and settings make"
            got = f"{', '.join(strange[:3])}{more} of others"
            raise ValueError(f"{what}: got {got}; delete these files, or name another folder")
        return [shard for shard in shards if shard.name not in names]


def _shards(kind: str, items: Sequence[Any], size: int, settings: Mapping[str, Any]) -> list[Shard]:
    ranges = [range(first, min(first + size, len(items))) for first in range(0, len(items), size)]
    return [
        Shard(
            f"{kind}-{index:05d}.safetensors",
            numbers,
            fingerprint([FORMAT, settings, numbers.start, items[numbers.start : numbers.stop]]),
        )
        for index, numbers in enumerate(ranges)
    ]


def _stamp(path: Path) -> tuple[int, int] | tuple[None, None]:
    """Size and time of a file; None of one that is missing."""
    try:
        stat = path.stat()
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


def fingerprint(value: Any) -> str:
    """The SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_shard(
    folder: Path,
    shard: Shard,
    tensors: Mapping[str, np.ndarray],
    buckets: Mapping[int, int] | None = None,
    skipped: Mapping[int, str] | None = None,
) -> None:
    """Writes a file whole; of clips also the buckets of those that it has, and why it lacks
    others."""
    from safetensors.numpy import save

    header = {"fingerprint": shard.fingerprint, "buckets": buckets, "skipped": skipped}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replace_when_done(folder / shard.name) as part:
        # One key: several are in an order that differs from process to process.
        part.write_bytes(save(contiguous, metadata={HEADER: json.dumps(header)}))


def read_header(path: Path) -> dict[str, Any]:
    """What `write_shard` said of a file; nothing of another's."""
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get(HEADER, "{}"))


def read_tensors(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Raises ValueError, naming the file, for one that is missing or broken."""
    with _opened(path) as file:
        return [file.get_tensor(name) for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole shard: {first_line(error)}; {AGAIN}") from None


def write_manifest(folder: Path, plan: Plan, sums: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the manifest of a folder that has all shards of a plan. `sums` are the entries of
    files that are known already. Raises ValueError where no clip could be used, and deletes the
    shards that say so."""
    clips, skipped = [], []
    numbers = {caption: number for number, caption in enumerate(plan.captions)}
    for shard in plan.videos:
        header = read_header(folder / shard.name)
        buckets, reasons = header["buckets"], header["skipped"]
        for number in shard.numbers:
            name, _, caption = plan.clips[number]
            if (bucket := buckets.get(str(number))) is None:
                skipped.append({"video": name, "reason": reasons[str(number)]})
            else:
                found = {"number": number, "video": name, "caption": numbers[caption]}
                clips.append(found | {"bucket": bucket, "file": shard.name})
    if not clips:
        for shard in plan.videos:
            (folder / shard.name).unlink()
        first = one_line(f"{skipped[0]['video']}: {skipped[0]['reason']}")
        raise ValueError(f"one clip at least must be usable: got {len(skipped)} skipped; {first}")
    manifest = {
        "format": FORMAT,
        "program": f"cogi2v-jax {__version__}",
        "kind": plan.kind,
        "model": plan.model,
        "dtype": plan.dtype,
        "fps": plan.fps,
        "buckets": plan.buckets,
        "captions": plan.captions,
        "clips": clips,
        "skipped": skipped,
        "files": {
            shard.name: sums.get(shard.name) or _sum(folder / shard.name)
            for shard in (*plan.texts, *plan.videos)
        },
    }
    with replace_when_done(folder / MANIFEST) as part:
        part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


class PreparedClip(NamedTuple):
    """A clip in a folder."""

    number: int  # in the list that it was prepared from
    video: str  # as that list has it
    caption: int
    bucket: int
    file: str


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared clips."""

    folder: Path
    kind: str  # "latents" or "pixels"
    model: Mapping[str, Any]  # title, vae and text_encoder (configs), weights (fingerprints)
    dtype: str  # of latents and texts
    fps: float
    buckets: tuple[Bucket, ...]
    captions: tuple[str, ...]
    clips: Mapping[int, PreparedClip]  # by number
    skipped: Sequence[Mapping[str, str]]  # video and reason
    files: Mapping[str, Mapping[str, Any]]  # bytes and sha256, by name

    def read(self, number: int) -> dict[str, np.ndarray]:
        """Of a clip `moments` [t h w 2c], `image` uint8 [h w 3] and `text` [p d]; or, for the VAE,
        `pixels` uint8 [f h w 3]. Raises ValueError, in one line, naming the file that is broken."""
        clip = self.clips[number]
        names = ("moments", "image") if self.kind == LATENTS else ("pixels",)
        tensors = read_tensors(self.folder / clip.file, [f"{number}.{name}" for name in names])
        values: dict[str, np.ndarray] = dict(zip(names, tensors, strict=True))
        return values | {"text": self.text(clip.caption)} if self.kind == LATENTS else values

    def text(self, caption: int) -> np.ndarray:
        """The encoding [p d] of a caption."""
        file = f"text-{caption // CAPTIONS:05d}.safetensors"
        return read_tensors(self.folder / file, [str(caption)])[0]

    @cached_property
    def empty_text(self) -> np.ndarray:
        """The encoding [p d] of no caption."""
        return self.text(0)


def check_folder(folder: Path) -> None:
    """Raises ValueError for a folder with anything that `prepare` does not leave, but for hidden
    files, which systems and killed runs leave."""
    if not folder.is_dir():
        return

    def is_ours(path: Path) -> bool:
        if path.name == MANIFEST:
            return read_json(path).get("kind") in CLIPS
        return path.name.startswith(".") or bool(SHARD.fullmatch(path.name))

    if strange := sorted(path.name for path in folder.iterdir() if not is_ours(path)):
        raise ValueError(
            f"{folder} must be new, empty, or of prepared clips: got {one_line(strange[0])} in it"
        )


def open(folder: Path, check: bool = False) -> Prepared:
    """A folder of prepared clips, whose files are all there with their sizes and, with `check`,
    with their sums. Raises ValueError or FileNotFoundError in one line."""
    manifest = read_json(folder / MANIFEST)
    if (got := manifest.get("format")) != FORMAT:
        raise ValueError(
            f"{folder} must be prepared in format {FORMAT}: got {got!r}; prepare its clips again"
        )
    try:
        clips = [PreparedClip(**clip) for clip in manifest["clips"]]
        prepared = Prepared(
            folder,
            *(manifest[name] for name in ("kind", "model", "dtype", "fps")),
            buckets=tuple(Bucket(*sizes) for sizes in manifest["buckets"]),
            captions=tuple(manifest["captions"]),
            clips={clip.number: clip for clip in clips},
            skipped=manifest["skipped"],
            files=manifest["files"],
        )
        sizes = {name: entry["bytes"] for name, entry in prepared.files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"{type(error).__name__} {first_line(error)}"
        raise ValueError(
            f"{folder / MANIFEST} must be as it was written: {fault}; {AGAIN}"
        ) from None
    paths = {name: folder / name for name in sizes}
    broken = [
        name
        for name, path in paths.items()
        if not path.is_file() or path.stat().st_size != sizes[name]
    ]
    if check and not broken:
        broken = [n for n, path in paths.items() if sha256(path) != prepared.files[n]["sha256"]]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        got = f"{one_line(broken[0])}{more} missing or with other bytes"
        raise ValueError(
            f"{folder} must be whole: got {got}; delete them and prepare the clips again"
        )
    return prepared
