"""A request -> video files, each with the latents and the recipe that make it again, also several
takes of each; and kept latents -> a video file."""

import contextlib
import itertools
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..command import say
from ..devices import hosts
from ..disk import check_space, sha256
from ..media.enhance import Endpoint
from ..media.noise_file import read_noise
from ..media.ranking import rank
from ..media.recipe import LATENTS, read_latents, recipe_of, without_padding, write_latents
from ..media.segments import Segments, clip_frames
from ..media.sizes import fit_size
from ..media.videos import check_name, check_output, enlarge, gif_steps, write_video
from ..request import Noise, Request, Resolved
from . import choosing, rewriting

if TYPE_CHECKING:
    from ..pipeline import Job
    from ..weights.checkpoint import Models

SQUEEZED = {".mp4": 10}  # bytes of frames in a byte of a file
TIMED = ("load", "text", "image", "compile", "denoise", "decode", "write")  # as printed

Upscale = tuple[str, int]  # of an enlarged copy: one of `videos.ENLARGED`, and the factor
Load = Callable[[str, str | None], "Models"]  # a checkpoint's name and a dtype -> models


@dataclass
class Made:
    """A video that is being made."""

    kept: Path  # where its latents are
    recipe: dict[str, Any]
    request: Resolved  # of its batch
    image: Path
    is_kept: bool = False
    latents: Any = None  # [1 t h w c]
    frames: Any = None  # uint8 [f h w 3]


def outputs_of(output: Path, videos: int, upscale: Upscale | None, best_of: int = 1) -> list[Path]:
    """Where so many videos go: x.mp4, or x-0.mp4, x-1.mp4, ...; and after each the other takes of
    it, from the second best on: x-1.mp4, ..., or x-0-1.mp4, ... Raises ValueError and OSError as
    `check_output` does, also for the files beside them."""
    check_name(output)
    bests = _numbered(output, range(videos)) if videos > 1 else [output]
    outputs = [path for best in bests for path in (best, *_numbered(best, range(1, best_of)))]
    for path in outputs:
        _check_latents(_latents_of(path))
        if upscale:
            _checked(_copy(path, upscale))
    return [*map(_checked, outputs)]


def _numbered(output: Path, numbers: range) -> list[Path]:
    width = len(str(numbers.stop - 1))
    return [
        output.with_name(f"{output.stem}-{number:0{width}d}{output.suffix}") for number in numbers
    ]


def _check_latents(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"latents must be a file or a new name: got the folder {path}")


def make(
    load: Load,
    name: str,
    dtype: str | None,
    request: Request,
    outputs: Sequence[Path],
    *,
    best_of: int = 1,
    endpoint: Callable[[], Endpoint] | None = None,
    noise_file: Path | None = None,
    upscale: Upscale | None = None,
    verbose: bool = False,
) -> None:
    """Makes each video of a request, whose images are files, `best_of` times, and writes all to
    their outputs, the takes of one video from the best on. An `endpoint` rewrites their prompts.
    Everything is checked before the first is sampled. Raises ValueError and OSError."""
    started = time.perf_counter()
    asked, request = request, request.takes(best_of)
    request.check()
    kept = _kept(outputs, best_of)
    from ..pipeline import generate
    from ..weights.hub import known_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `generate` gives them
        if known := known_config(name):  # before a model is fetched and converted
            resolved = fit_size(request, known).resolve(known)
            if noise_file:
                read_noise(noise_file, resolved.latent_shape(known), resolved.num_frames)
            if resolved.video is not None:
                clip_frames(resolved.video, resolved.num_frames)
    answers = None
    if endpoint:
        began = time.perf_counter()
        answers = rewriting.ask(endpoint, asked.videos)
        started += time.perf_counter() - began
    models = load(name, dtype)
    planned, job = _prepared(models, request)
    given, made_of = None, {}
    if noise_file:
        given = read_noise(noise_file, job.shape, job.request.num_frames)
        made_of = {"noise_file": {"file": noise_file.name, "sha256": sha256(noise_file)}}
    if hosts.leads():
        needed = len(outputs) * _bytes(job, outputs[0])
        check_space(outputs[0].parent, needed, "latents and videos")
    if verbose:
        say("\n".join(job.report()))
    notes: list[dict[str, Any]] = [{}] * len(asked.videos)
    if answers:
        asked, notes = rewriting.rewritten(models, asked, answers)
        prompts = iter([video.prompt for video in asked.takes(best_of).videos])
        for number, (batch, resolved) in enumerate(planned):
            texts = [*itertools.islice(prompts, len(batch.videos))]
            planned[number] = batch.with_prompts(texts), resolved.with_prompts(texts)
    coming = zip(kept, (note for note in notes for _ in range(best_of)), strict=True)
    batches: list[tuple[Request, list[Made]]] = []
    for batch, resolved in planned:
        batches.append((batch, []))
        for video, (path, note) in zip(resolved.videos, coming, strict=False):
            recipe = recipe_of(models, name, resolved, video) | made_of | note
            batches[-1][1].append(Made(path, recipe, resolved, video.image))
    loading = time.perf_counter() - started
    remaining = iter(outputs)
    takes: list[Made] = []  # that are not ranked yet
    written: list[tuple[str, dict[str, Any]]] = []
    for batch, new in batches:
        # Only the process that leads has the files.
        length = (job.request.extend + 1) * (job.shape.frames - job.shape.padding)
        done = _done(new, length) if job.request.extend and hosts.alone() else None

        def keep(latents: Any, _: Resolved, new=new) -> None:
            """Writes the latents of a batch, each with its recipe."""
            if not hosts.leads():
                return
            for number, made in enumerate(new):
                write_latents(made.kept, latents[number : number + 1], made.recipe)
                made.is_kept = True

        try:
            noise = None if given is None else Noise(initial=given.repeat(len(new), 0))
            result = generate(models, batch, noise, progress(), keep, done)
            if hosts.leads():
                for number, made in enumerate(new):
                    made.latents = result.latents[number : number + 1]
                    made.frames = result.video[number]
                takes += new
                whole = len(takes) // best_of * best_of
                named = _named(takes[:whole], remaining, best_of)
                written += _finish(named, result.seconds, loading, upscale)
                for made in takes[:whole]:
                    made.latents = made.frames = None
                del takes[:whole]
        except Exception as error:
            if new[0].is_kept:
                way = f"--decode_latents {new[0].kept} makes the video"
                error.add_note(f"the latents are kept: {way}")
            raise
        loading = 0.0
    if best_of > 1 and written:
        print("\n".join(choosing.table(written)))


def _kept(outputs: Sequence[Path], best_of: int) -> list[Path]:
    """Where latents are kept, take by take, until the takes are ranked: x-take0, x-take1, ..."""
    if best_of == 1:
        return [*map(_latents_of, outputs)]
    kept = [
        best.with_name(f"{best.stem}-take{take}{LATENTS}")
        for best in outputs[::best_of]
        for take in range(best_of)
    ]
    for path in kept:
        _check_latents(path)
    return kept


def _named(
    takes: Sequence[Made], outputs: Iterator[Path], best_of: int
) -> Iterator[tuple[Path, Any, dict[str, Any]]]:
    """Outputs, frames and recipes of all takes of some videos, from the best take of each on, whose
    latents get the name of the output too."""
    if best_of == 1:
        yield from ((next(outputs), made.frames, made.recipe) for made in takes)
        return
    for first in range(0, len(takes), best_of):
        group = takes[first : first + best_of]
        picture = choosing.fitted(group[0].request, group[0].image)
        among = choosing.begins(group[0].request)
        ranked = rank([made.frames for made in group], picture, among)
        for place, (number, figures) in enumerate(ranked, 1):
            made, output = group[number], next(outputs)
            old = made.kept
            made.recipe |= choosing.entry(figures, place, best_of)
            write_latents(_latents_of(output), made.latents, made.recipe)
            made.kept = _latents_of(output)
            old.unlink(missing_ok=True)
            yield output, made.frames, made.recipe


def _done(new: Sequence[Made], length: int) -> Any:
    """The latents, at most `length` frames, of the segments that an earlier run of the same recipes
    has left, also of one with another number of segments; or None."""
    # An end picture is in the last segment.
    free = {"fps"} if new[0].request.end_image is not None else {"fps", "extend"}
    found = []
    for made in new:
        if not made.kept.is_file():
            return None
        with contextlib.suppress(ValueError):
            latents, known = read_latents(made.kept)
            asked = json.loads(json.dumps(made.recipe))
            if all(known.get(key) == asked.get(key) for key in {*known, *asked} - free):
                found.append(latents)
    if len(found) < len(new) or len({latents.shape for latents in found}) > 1:
        return None
    say(f"going on from the segments in {new[0].kept}")
    return np.concatenate(found)[:, :length]


def check(load: Load, name: str, dtype: str | None, request: Request) -> None:
    """What `make` checks of a request before it samples, for one that comes after others."""
    _prepared(load(name, dtype), request)


def _prepared(models: "Models", request: Request) -> tuple[list[tuple[Request, Any]], "Job"]:
    """The batches of a request that can all be made, as asked and resolved, and the last one's
    job."""
    from ..pipeline import prepare, videos_at_once

    planned = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `generate` gives them
        for batch in request.batches(videos_at_once(models, request)):
            job = prepare(models, batch)
            planned.append((batch, job.request))
    return planned, job


def decode_kept(
    load: Load,
    name: str | None,
    dtype: str | None,
    kept: Path,
    output: Path | None,
    fps: float | None,
    upscale: Upscale | None,
) -> None:
    """Decodes a file of latents that `make` kept. What is None is as the file's recipe has it.
    Raises ValueError and OSError."""
    started = time.perf_counter()
    latents, recipe = read_latents(kept)
    beside = kept.with_name(f"{kept.name.removesuffix(LATENTS)}.mp4")
    (output,) = outputs_of(output or beside, 1, upscale)
    models = load(name or recipe["model"], dtype or recipe["dtype"])
    loading = time.perf_counter() - started
    seconds: dict[str, float] = {}
    video = _decoded(models, latents, recipe, seconds)
    if hosts.leads():
        recipe |= {"fps": fps or recipe["fps"]}
        _finish([(output, video, recipe)], seconds, loading, upscale)


def _decoded(
    models: "Models", latents: Any, recipe: dict[str, Any], seconds: dict[str, float]
) -> Any:
    """The frames of kept latents, of one or several segments."""
    from ..pipeline import decode

    video = Segments(recipe.get("overlap", 1), recipe.get("match_colour", True))
    ratio, count = models.config.vae.temporal_compression_ratio, 1
    if recipe.get("extend"):
        count = max(1, latents.shape[1] // ((recipe["num_frames"] - 1) // ratio + 1))
    for segment in np.split(latents, count, axis=1):
        video.add(decode(models, segment, seconds, recipe.get("loop", False)))
    return video.frames[0]


def _latents_of(output: Path) -> Path:
    return output.with_name(output.stem + LATENTS)


def _copy(output: Path, upscale: Upscale) -> Path:
    """Where the enlarged copy of an output goes."""
    return output.with_name(f"{output.stem}-x{upscale[1]}{output.suffix}")


def _checked(output: Path) -> Path:
    """The output, checked where it is written: by process 0."""
    return check_output(output) if hosts.leads() else output


def _bytes(job: Any, output: Path) -> int:
    """About what a video and its latents take on the disk."""
    request, shape = job.request, job.shape
    latents = 4 * (shape.frames - shape.padding) * shape.height * shape.width * shape.channels
    frames = 3 * request.frames_made(job.config) * request.height * request.width
    latents *= 1 + request.extend
    return latents + frames // SQUEEZED.get(output.suffix.lower(), 2)


def progress() -> Callable[[int, int, Any], None]:
    """Prints the step, the seconds of a step and the time left: in one line of a terminal, or for
    the first and the last step in a log."""
    terminal = sys.stderr.isatty()
    first = 0.0

    def show(step: int, steps: int, latents: Any) -> None:
        nonlocal first
        if step == 1:  # the time before was spent on loading and compiling
            first = time.perf_counter()
        if not terminal and step not in (1, steps):
            return
        each = (time.perf_counter() - first) / max(step - 1, 1)
        minutes, seconds = divmod(round(each * (steps - step)), 60)
        left = f"{each:.2f} s a step, {minutes}:{seconds:02d} left"
        line = f"step {step} of {steps}: {left if step > 1 else 'first step done'}   "
        if terminal:
            say(f"\r{line}", end="\n" if step == steps else "")
        else:
            say(line)

    return show


def _finish(
    videos: Iterable[tuple[Path, Any, dict[str, Any]]],
    seconds: dict[str, float],
    loading: float,
    upscale: Upscale | None,
) -> list[tuple[str, dict[str, Any]]]:
    """Writes videos with their recipes, and enlarged copies; prints the time, the memory and the
    files. `loading` are seconds spent on finding the model. Returns names and recipes."""
    started = time.perf_counter()
    lines, written = [], []
    for output, video, recipe in videos:
        video = without_padding(video, recipe)
        lines.append(_written(output, video, recipe))
        written.append((output.name, recipe))
        if upscale:
            lines.append(_written(_copy(output, upscale), enlarge(video, *upscale), recipe))
    seconds = seconds | {
        "load": seconds["load"] + loading,
        "write": time.perf_counter() - started,
    }
    shown = "  ".join(f"{name} {seconds[name]:.1f}" for name in TIMED if name in seconds)
    print(f"seconds: {shown}  (total {sum(seconds.values()):.1f})")
    print(f"peak memory: {_peak_memory()}")
    for line in lines:
        print(line)
    return written


def _written(output: Path, video: Any, recipe: dict[str, Any]) -> str:
    """Writes a video, and says in a line what it is."""
    frames, height, width, _ = video.shape
    written = write_video(output, video, recipe["fps"], recipe)
    line = f"{written}: {frames} frames of {height}x{width} at {recipe['fps']:g} fps"
    steps = {*gif_steps(frames, recipe["fps"])} if written.suffix.lower() == ".gif" else set()
    if {step * recipe["fps"] for step in steps} - {100}:
        line += f" (in a gif: {' and '.join(map(str, sorted(steps)))} hundredths of a second)"
    return line


def _peak_memory() -> str:
    import jax

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(found.get("peak_bytes_in_use", 0) for found in stats)
    device = f", device {peak / 2**30:.1f} GiB" if peak else ""
    return f"host {host / 2**30:.1f} GiB{device}"
