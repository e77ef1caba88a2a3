"""Clips and captions to latents and T5's encodings on disk. Several processes share the files, each
on its own devices; process 0 writes the manifest."""

import dataclasses
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt8

from ..config import CheckpointConfig
from ..devices import hosts
from ..devices.sharding import to_host
from ..disk import PART, check_space, locked, read_json
from ..models.tokenizer import tokenize
from ..request import Request
from ..sampling import stages
from ..sampling.programs import Session, Target, mesh_for
from ..weights import checkpoint
from ..weights.checkpoint import Models
from ..weights.pieces import memory_limit
from . import shards
from .clips import Bucket, Clip, read_clip
from .shards import LATENTS, PIXELS, Plan, Prepared, Shard, fingerprint, write_shard

TEXTS = 8  # captions that are encoded at once
MOST = 16  # clips that are
THREADS = 4  # that read clips

# What is made, how much of it, of how much, and how many clips were skipped; of this process.
OnProgress = Callable[[str, int, int, int], None]
Frames = UInt8[np.ndarray, "f h w 3"]


def check_buckets(
    config: CheckpointConfig,
    buckets: Sequence[tuple[int | None, int | None, int | None]],
    fps: float | None,
) -> tuple[list[Bucket], float]:
    """Buckets and frames a second, with the checkpoint's for None. Raises ValueError naming all
    that its network can't train on, with the nearest that it can."""
    checked, faults, rate = [], [], fps
    for sizes in dict.fromkeys(buckets):
        frames, height, width = sizes
        asked = Request("", "", height=height, width=width, num_frames=frames, fps=fps)
        try:
            found = asked.resolve(config)
            if found.num_frames % 8 != 1:  # the first latent frame of 8k frames is of four
                rule = "num_frames must be 8k+1 to train on"
                got = f"{found.num_frames}; nearest is {found.num_frames + 1}"
                raise ValueError(f"{rule}: got {got}")
            checked.append(Bucket(found.num_frames, found.height, found.width))
            rate = found.fps
        except ValueError as error:
            which = f"bucket {'x'.join(map(str, sizes))}: " if len(buckets) > 1 else ""
            faults.append(which + str(error))
    if faults or rate is None:
        raise ValueError("; ".join(faults))
    return checked, rate


def prepare(
    source: Models | CheckpointConfig,
    clips: Sequence[Clip],
    folder: Path,
    buckets: Sequence[Bucket],
    fps: float,
    on_progress: OnProgress = lambda *_: None,
) -> Prepared:
    """Writes what the networks of `source` encode clips and captions to, or (a configuration alone)
    frames for training the VAE, into a folder that may hold a part of it already. Clips that can't
    be used are skipped, and the manifest says why. Raises ValueError or OSError, in one line, for a
    folder of anything else, and where no clip can be used."""
    plan = plan_of(source, clips, buckets, fps)
    shards.check_folder(folder)
    folder.mkdir(exist_ok=True)
    with locked(folder, "DIR") if hosts.leads() else nullcontext():
        return _prepare(source, plan, folder, on_progress)


def _prepare(
    source: Models | CheckpointConfig, plan: Plan, folder: Path, on_progress: OnProgress
) -> Prepared:
    if hosts.leads():
        for part in folder.glob(f".*{PART}*"):  # of a run that was killed
            shutil.rmtree(part, ignore_errors=True)
    everything = [*plan.texts, *plan.videos]
    missing = plan.remaining(folder, everything)
    check_space(folder, _bytes(source, plan, missing), f"{len(plan.clips)} prepared clips")
    ids = tokenize_captions(source, plan.captions) if isinstance(source, Models) else None
    hosts.meet("planned")  # every process has seen the same
    manifest = folder / shards.MANIFEST
    if hosts.leads() and missing:
        manifest.unlink(missing_ok=True)  # it appears when all is there
    mine = {*everything[jax.process_index() :: jax.process_count()]} & {*missing}
    texts, videos = ([s for s in kind if s in mine] for kind in (plan.texts, plan.videos))
    if texts and isinstance(source, Models) and ids is not None:
        _write_texts(source, ids, folder, texts, on_progress)
    if videos:
        _write_clips(source, plan, folder, videos, on_progress)
    hosts.meet("written")
    if hosts.leads():
        known = read_json(manifest).get("files", {}) if manifest.is_file() else {}
        shards.write_manifest(folder, plan, known)
    hosts.meet("prepared")
    return shards.open(folder)


def plan_of(
    source: Models | CheckpointConfig, clips: Sequence[Clip], buckets: Sequence[Bucket], fps: float
) -> Plan:
    """What `prepare` writes."""
    if not isinstance(source, Models):
        pixels = {"title": source.title, "vae": dataclasses.asdict(source.vae)}
        return Plan(PIXELS, clips, buckets, fps, "uint8", pixels)
    converted = read_json(source.folder / checkpoint.MANIFEST)
    leaves, settings = converted["leaves"], converted["settings"]
    tokenizer = {file: sum for file, sum in settings.items() if file.startswith("tokenizer/")}
    parts = {"vae": leaves["vae"], "text_encoder": [leaves["text_encoder"], tokenizer]}
    model = {part: dataclasses.asdict(getattr(source.config, part)) for part in parts}
    weights = {part: fingerprint([model[part], value]) for part, value in parts.items()}
    model |= {"title": source.config.title, "weights": weights}
    return Plan(LATENTS, clips, buckets, fps, str(source.dtype), model)


def _bytes(source: Models | CheckpointConfig, plan: Plan, missing: Sequence[Shard]) -> int:
    """How many bytes the missing shards have at most."""
    if not isinstance(source, Models):
        clip, text = max(3 * frames * height * width for frames, height, width in plan.buckets), 0
    else:
        network, vae, size = source.config.transformer, source.config.vae, source.dtype.itemsize
        text = size * network.max_text_seq_length * network.text_embed_dim
        latent = 2 * vae.latent_channels * size / vae.spatial_ratio**2  # bytes of a pixel's latents
        clip = max(((b.frames // 4 + 1) * latent + 3) * b.height * b.width for b in plan.buckets)
    texts = {*plan.texts}
    return int(sum(len(s.numbers) * (text if s in texts else clip) for s in missing))


def session(models: Models, together: int) -> Session:
    """For a batch of so many clips or captions, on the devices of this process alone."""
    memory = memory_limit()
    work = models.config, models.dtype, models.mesh, together, False
    mesh = mesh_for(*work, jax.local_devices(), memory)
    return Session(models, Target(models.config, models.dtype, mesh, memory))


def tokenize_captions(models: Models, captions: Sequence[str]) -> Int[np.ndarray, "b p"]:
    """Token ids. Long captions are cut, as by the official trainers, with one warning. Raises
    ValueError for an id beyond T5's table."""
    length = models.config.transformer.max_text_seq_length
    ids, counts = tokenize(models.folder / "tokenizer", captions, length)
    if ids.max() >= (size := models.config.text_encoder.vocab_size):
        row = int(np.argmax(ids.max(axis=1)))
        what = f"token ids must be below {size}, the size of T5's table"
        raise ValueError(f"{what}: got {ids.max()} in {captions[row]!r}")
    if long := sum(count > length for count in counts):
        of = f"captions longer than {length} tokens, the end mark included"
        warnings.warn(f"{long} of {len(captions)} {of}: the rest is cut off", stacklevel=3)
    return ids


def _write_texts(
    models: Models,
    ids: Int[np.ndarray, "b p"],
    folder: Path,
    missing: Sequence[Shard],
    on_progress: OnProgress,
) -> None:
    run, done = session(models, TEXTS), 0
    count = sum(len(shard.numbers) for shard in missing)
    for shard in missing:
        tensors: dict[str, np.ndarray] = {}
        for first in shard.numbers[::TEXTS]:
            rows = ids[first : min(first + TEXTS, shard.numbers.stop)]
            text = to_host(run(stages.encode_text, _pad(rows, TEXTS)))
            tensors |= {str(first + row): text[row] for row in range(len(rows))}
            on_progress("captions", done + len(tensors), count, 0)
        write_shard(folder, shard, tensors)
        done += len(tensors)


def _pad(batch: np.ndarray, size: int) -> np.ndarray:
    """A batch filled up with zeros, so that one program serves all."""
    return np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])


class Encoder(NamedTuple):
    """Of the clips of a bucket."""

    size: int  # clips that are encoded at once
    encode: Callable[[Sequence[Frames]], list[dict[str, np.ndarray]]]  # tensors by name


def encoder(source: Models | CheckpointConfig, bucket: Bucket) -> Encoder:
    """Each device has as many clips at once as fill a frame of the checkpoint's own size: the VAE
    works on eight frames at a time, so that their number takes no memory."""
    if not isinstance(source, Models):
        return Encoder(1, lambda clips: [{"pixels": frames} for frames in clips])
    config, devices = source.config, jax.local_devices()
    each = config.defaults["height"] * config.defaults["width"] // (bucket.height * bucket.width)
    # The CPU devices of a host share its threads.
    size = min(MOST, max(1, each) * (1 if devices[0].platform == "cpu" else len(devices)))
    run = session(source, size)

    def encode(clips: Sequence[Frames]) -> list[dict[str, np.ndarray]]:
        pixels = _pad(np.stack(clips), size).astype(np.float32) / 255 * 2 - 1
        rows, columns = (side // config.vae.spatial_ratio for side in bucket[1:])
        # Several clips take the memory of one that is as many times as wide.
        strips = run.target.strips(rows, columns * size // run.target.mesh.shape["data"])
        moments = to_host(run(stages.encode_image, pixels, strips=strips))
        # The batch has more rows than there are clips, where it was filled up.
        pairs = zip(moments, clips, strict=False)
        return [{"moments": latents, "image": frames[0]} for latents, frames in pairs]

    return Encoder(size, encode)


def _write_clips(
    source: Models | CheckpointConfig,
    plan: Plan,
    folder: Path,
    missing: Sequence[Shard],
    on_progress: OnProgress,
) -> None:
    encoders = [encoder(source, bucket) for bucket in plan.buckets]
    sizes = [encoder.size for encoder in encoders]
    numbers = [number for shard in missing for number in shard.numbers]
    done = failed = 0

    def read(number: int) -> tuple[int, Frames] | str:
        try:
            return read_clip(plan.clips[number].path, plan.buckets, plan.fps)
        except ValueError as error:
            return str(error)

    with closing(read_ahead(read, numbers, THREADS + max(sizes))) as found:
        for shard in missing:
            tensors: dict[str, np.ndarray] = {}
            skipped: dict[int, str] = {}
            buckets: dict[int, int] = {}
            for bucket, clips in batches(zip(shard.numbers, found, strict=False), sizes, skipped):
                encoded = zip(clips, encoders[bucket].encode([*clips.values()]), strict=True)
                for number, values in encoded:
                    tensors |= {f"{number}.{name}": value for name, value in values.items()}
                buckets |= dict.fromkeys(clips, bucket)
                ready = done + len(buckets) + len(skipped)
                on_progress("clips", ready, len(numbers), failed + len(skipped))
            write_shard(folder, shard, tensors, buckets, skipped)
            done, failed = done + len(shard.numbers), failed + len(skipped)
            on_progress("clips", done, len(numbers), failed)


def read_ahead(
    read: Callable[[int], Any], numbers: Iterable[int], ahead: int
) -> Generator[Any, None, None]:
    """What `read` returns of all numbers, in their order. Threads read `ahead` of what is taken."""
    with ThreadPoolExecutor(THREADS) as pool:
        reading: deque[Future[Any]] = deque()
        try:
            for number in numbers:
                reading.append(pool.submit(read, number))
                if len(reading) > ahead:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(
    found: Iterable[tuple[int, tuple[int, Frames] | str]],
    sizes: Sequence[int],
    skipped: dict[int, str],
) -> Iterator[tuple[int, Mapping[int, Frames]]]:
    """(bucket, the frames of some of its clips by their number): as many as `sizes` says of a
    bucket, at the end fewer. What was found is a bucket and frames, or why a clip is `skipped`."""
    waiting: dict[int, dict[int, Frames]] = {}
    for number, result in found:
        if isinstance(result, str):
            skipped[number] = result
            continue
        bucket, frames = result
        clips = waiting.setdefault(bucket, {})
        clips[number] = frames
        if len(clips) == sizes[bucket]:
            yield bucket, waiting.pop(bucket)
    yield from sorted(waiting.items())
