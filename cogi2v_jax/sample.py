"""`python -m cogi2v_jax.sample`: arguments -> Request -> video file."""

import argparse
import itertools
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .arguments import add_settings, weighted
from .config import names
from .devices import hosts, plan
from .media.images import read_image
from .media.recipe import LATENTS, SETTINGS, read_latents, recipe_of, write_latents
from .media.rows import Job, read_manifest
from .media.videos import check_output, write_video
from .request import Request, Video

EMBEDDED = "cogi2v-tiny"
EXAMPLE_IMAGE = Path(__file__).parent / "assets" / "example.png"
EXAMPLE_PROMPT = "the cyan triangle grows"
PHASES = ("load", "text", "image", "compile", "denoise", "decode", "write")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse's own would put nine of usage above it."""
        self.exit(2, f"cogi2v: {message} (--help lists all options)\n")


def parser() -> argparse.ArgumentParser:
    main = _Parser(
        prog="python -m cogi2v_jax.sample",
        description="Makes a video from a still image and a sentence. With no argument it runs the embedded model on its example.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=118
        ),
    )
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")

    what = main.add_argument_group("what to make")
    what.add_argument(
        "--image",
        "--image_or_video_path",
        metavar="FILE",
        type=Path,
        help="the first frame: any image file",
    )
    what.add_argument("--prompt", metavar="TEXT", help="what should happen")
    what.add_argument("--negative_prompt", metavar="TEXT", default="", help="what should not")
    what.add_argument(
        "--manifest",
        metavar="FILE",
        type=Path,
        help="many at once: .csv, .jsonl or .txt (prompt@@image) instead of the two above",
    )
    what.add_argument(
        "--output",
        "--output_path",
        metavar="FILE",
        type=Path,
        help=".mp4, .gif, or .png for a folder of frames (default: out.mp4)",
    )
    what.add_argument(
        "--num_videos_per_prompt",
        metavar="N",
        type=int,
        default=1,
        help="with seeds counting up from --seed",
    )
    what.add_argument("--seed", metavar="N", type=int, default=42)

    add_settings(main)

    model = main.add_argument_group("model and machine")
    model.add_argument(
        "--model",
        "--model_path",
        metavar="NAME",
        help=f"converted or diffusers folder (here or at gs://), hub id, or {', '.join(names())} (default: {EMBEDDED})",
    )
    model.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="compute dtype (default: bfloat16, on CPUs float32)",
    )
    model.add_argument(
        "--attention",
        metavar="NAME",
        default="auto",
        help="auto, xla, cudnn, splash (TPU) or tokamax (GPU)",
    )
    model.add_argument(
        "--mesh",
        metavar="NAME",
        default="auto",
        help="how devices share the work: auto, a machine (v5e-1, v5e-8, v6e-8, ...) or sizes (data=1,pair=2,context=4)",
    )
    model.add_argument(
        "--plan",
        metavar="NAME",
        help="only print what a machine (v5e-8, ...) needs for it, here or not: memory, static time",
    )
    model.add_argument(
        "--vae_tiling",
        action="store_true",
        help="encode and decode in the reference's blended tiles, as its script does",
    )
    model.add_argument(
        "--verbose", action="store_true", help="print mesh, attention and compiler options"
    )
    model.add_argument(
        "--decode_latents",
        metavar="FILE",
        type=Path,
        help=f"only decode a *{LATENTS} file of an earlier run",
    )
    model.add_argument(
        "--lora_path",
        metavar="FILE[:WEIGHT]",
        action="append",
        default=[],
        help="a LoRA file or folder (diffusers, PEFT, kohya, SAT), added to the weights; several times over",
    )
    # Of the official script: there is one type here, and a LoRA file knows its rank.
    model.add_argument("--generate_type", choices=["i2v"], default="i2v", help=argparse.SUPPRESS)
    model.add_argument("--lora_rank", type=int, help=argparse.SUPPRESS)
    return main


@hosts.distributed
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 could not be done, 2 wrong arguments, 130 stopped by the user."""
    arguments_parser = parser()
    options = arguments_parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            weighted(options.lora_path)  # faults that need no jax
            if not options.plan:
                hosts.join()
            if options.plan:
                settings = {setting: getattr(options, setting) for setting in SETTINGS}
                print(
                    "\n".join(
                        plan.lines(
                            options.model or EMBEDDED,
                            options.plan,
                            options.dtype,
                            options.attention,
                            **settings,
                        )
                    )
                )
            elif options.decode_latents:
                if options.image or options.prompt or options.manifest or options.lora_path:
                    arguments_parser.error(
                        "--decode_latents must stand alone: got --image, --prompt, --manifest or --lora_path beside it"
                    )
                _decode_alone(options)
            else:
                _sample(options, _jobs(options, arguments_parser))
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return _fail(f"the device ran out of memory: {str(error).splitlines()[0]}")
        if "ffmpeg" in str(error):  # not installed, or it failed
            return _fail(str(error).splitlines()[0])
        raise
    except KeyboardInterrupt:
        print(
            f"{chr(10) if sys.stderr.isatty() else ''}cogi2v: stopped; no half-written video was left",
            file=sys.stderr,
        )
        return 130
    return 0


def _say(line: str, end: str = "\n") -> None:
    """What is not an error, once, however many processes there are."""
    if hosts.leads():
        print(line, end=end, file=sys.stderr, flush=True)


def _fail(line: str) -> int:
    print(f"cogi2v: {line}", file=sys.stderr)
    return 1


def _jobs(
    options: argparse.Namespace, arguments_parser: argparse.ArgumentParser
) -> list[tuple[Job, int, Path]]:
    """What to make, each with its seed and its output, checked as far as files can be."""
    if options.num_videos_per_prompt < 1:
        arguments_parser.error(
            f"--num_videos_per_prompt must be at least 1: got {options.num_videos_per_prompt}"
        )
    if options.manifest:
        if options.image or options.prompt:
            arguments_parser.error("--manifest must stand alone: got --image or --prompt beside it")
        jobs = read_manifest(options.manifest)
    else:
        embedded = options.model in (None, EMBEDDED)
        image = options.image or (EXAMPLE_IMAGE if embedded else None)
        prompt = (
            options.prompt
            if options.prompt is not None
            else (EXAMPLE_PROMPT if embedded and not options.image else None)
        )
        if image is None or prompt is None:
            arguments_parser.error(
                "--image and --prompt must be given (only the embedded model has an example)"
            )
        jobs = [Job(prompt, image)]
    for job in jobs:
        read_image(job.image)
    output = options.output or Path("out.mp4")
    runs = []
    for job in jobs:
        first = options.seed if job.seed is None else job.seed
        runs += [(job, first + number) for number in range(options.num_videos_per_prompt)]
    width = len(str(len(runs) - 1))
    numbered = [
        output
        if len(runs) == 1
        else output.with_name(f"{output.stem}-{number:0{width}d}{output.suffix}")
        for number in range(len(runs))
    ]
    return [(job, seed, _output(path)) for (job, seed), path in zip(runs, numbered, strict=True)]


def _output(path: Path) -> Path:
    """A file to write, checked where it will be written."""
    return check_output(path) if hosts.leads() else path


def _sample(options: argparse.Namespace, jobs: list[tuple[Job, int, Path]]) -> None:
    watch = time.perf_counter()
    request = _request(options, jobs)
    request.check()
    from .loading import load
    from .pipeline import generate, prepare, videos_at_once

    name = options.model or EMBEDDED
    models = load(
        name, options.dtype, options.attention, options.mesh, options.vae_tiling, options.lora_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `generate` gives them
        batches = request.batches(videos_at_once(models, request))
        # So that the last one's fault doesn't wait until all others are sampled.
        for batch in batches:
            job = prepare(models, batch)
    for line in job.report() if options.verbose else ():
        _say(line)
    loading = time.perf_counter() - watch
    outputs = iter([output for *_, output in jobs])
    for batch in batches:
        made = list(itertools.islice(outputs, len(batch.videos)))
        recipes: list[dict[str, Any]] = []

        def keep(
            latents: Any,
            resolved: Request,
            made: list[Path] = made,
            recipes: list[dict[str, Any]] = recipes,
        ) -> None:
            for number, (video, output) in enumerate(zip(resolved.videos, made, strict=True)):
                recipes.append(recipe_of(models, name, resolved, video))
                if hosts.leads():
                    write_latents(
                        output.with_name(output.stem + LATENTS),
                        latents[number : number + 1],
                        recipes[-1],
                    )

        with _interrupts() as came:
            result = generate(models, batch, on_step=_progress(came), on_latents=keep)
        seconds = {**result.seconds, "load": result.seconds["load"] + loading}
        _finish(zip(made, result.video, recipes, strict=True), seconds)
        loading = 0.0


def _request(options: argparse.Namespace, jobs: list[tuple[Job, int, Path]]) -> Request:
    """All jobs in one."""
    videos = [
        Video(
            job.image,
            job.prompt,
            options.negative_prompt if job.negative_prompt is None else job.negative_prompt,
            seed,
        )
        for job, seed, _ in jobs
    ]
    columns = dict(zip(Video._fields, map(list, zip(*videos, strict=True)), strict=True))
    return Request(**columns, **{setting: getattr(options, setting) for setting in SETTINGS})


def _decode_alone(options: argparse.Namespace) -> None:
    watch = time.perf_counter()
    latents, recipe = read_latents(options.decode_latents)
    stem = options.decode_latents.name.removesuffix(LATENTS)
    output = _output(options.output or options.decode_latents.with_name(f"{stem}.mp4"))
    from .loading import load
    from .pipeline import decode

    models = load(
        options.model or recipe["model"],
        options.dtype or recipe["dtype"],
        options.attention,
        options.mesh,
        options.vae_tiling,
    )
    channels = models.config.vae.latent_channels
    if latents.shape[-1] != channels:
        raise ValueError(
            f"latents must have {channels} channels for {models.config.title}: got {latents.shape[-1]}"
        )
    seconds: dict[str, float] = {}
    loading = time.perf_counter() - watch
    video = decode(models, latents, seconds)[0]
    recipe |= {"fps": options.fps or recipe["fps"]}
    _finish(
        [(output, video, recipe)],
        {**seconds, "load": seconds["load"] + loading},
    )


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Whether one came. Python loses an interrupt that arrives inside a destructor or a callback of
    the garbage collector, where jax has some, so that the next step must ask."""
    came = threading.Event()

    def note(*_: Any) -> NoReturn:
        came.set()
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _progress(came: threading.Event) -> Callable[[int, int, Any], None]:
    """A line that grows old in place: step, seconds a step, time left. Raises KeyboardInterrupt if
    one `came` and was lost."""
    started = time.perf_counter()
    live = sys.stderr.isatty()

    def show(step: int, steps: int, latents: Any) -> None:
        nonlocal started
        if came.is_set():
            raise KeyboardInterrupt
        if step == 1:  # what came before was compiling and loading
            started = time.perf_counter()
        if not live and step not in (1, steps):
            return
        each = (time.perf_counter() - started) / max(step - 1, 1)
        left = (
            f"{each:.2f} s a step, {_clock(each * (steps - step))} left"
            if step > 1
            else "first step done"
        )
        _say(
            f"{chr(13) if live else ''}step {step} of {steps}: {left}   ",
            end="\n" if step == steps or not live else "",
        )

    return show


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _finish(videos: Iterable[tuple[Path, Any, dict[str, Any]]], seconds: dict[str, float]) -> None:
    """Writes videos with their recipes, and says what was done."""
    if not hosts.leads():
        return
    started = time.perf_counter()
    lines = []
    for output, video, recipe in videos:
        frames, height, width, _ = video.shape
        lines.append(
            f"{write_video(output, video, recipe['fps'], recipe)}: {frames} frames of {height}x{width} at {recipe['fps']:g} fps"
        )
    seconds = {**seconds, "write": time.perf_counter() - started}
    shown = "  ".join(f"{phase} {seconds[phase]:.1f}" for phase in PHASES if phase in seconds)
    print(f"seconds: {shown}  (total {sum(seconds.values()):.1f})")
    print(f"peak memory: {_peak_memory()}")
    print("\n".join(lines))


def _peak_memory() -> str:
    import jax

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    device = f", device {max(peak for peak in peaks if peak) / 2**30:.1f} GiB" if any(peaks) else ""
    return f"host {host / 2**30:.1f} GiB{device}"


if __name__ == "__main__":
    sys.exit(main())
