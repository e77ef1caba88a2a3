"""`python -m cogi2v_jax.sample`: arguments -> Request -> video files."""

import argparse
import itertools
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import __version__
from .arguments import add_settings, parse_loras
from .command import Parser, run, say
from .config import names
from .devices import hosts, plan
from .disk import check_space, sha256
from .media.download import path_or_address
from .media.images import local_copy
from .media.noise_file import read_noise
from .media.recipe import LATENTS, read_latents, recipe_of, write_latents
from .media.rows import Row, read_manifest
from .media.videos import ENLARGED, check_name, check_output, enlarge, gif_steps, write_video
from .names import ASSETS, EXAMPLE_LORA
from .request import Noise, Request, Resolved, Video
from .settings import SETTINGS
from .terminal import printing

EMBEDDED = "cogi2v-tiny"
SQUEEZED = {".mp4": 10}  # bytes of frames in a byte of a file
EXAMPLE_IMAGE = ASSETS / "example.png"
EXAMPLE_PROMPT = "the cyan triangle grows"
LARGEST = 16  # factor of a copy
DECODING = {  # options that --decode_latents reads
    *("decode_latents", "output", "upscale", "fps"),
    *("model", "dtype", "attention", "mesh", "vae_tiling", "verbose"),
}
TIMED = ("load", "text", "image", "compile", "denoise", "decode", "write")  # as printed

# In two lines, which --help has room for.
WORLD = (
    f"{EMBEDDED}: on dark gradients, at most 10 tokens: the|a red|green|blue|yellow|magenta|cyan|"
    "orange|white circle|\nsquare|triangle moves left|right|up|down, grows, shrinks, spins, stays "
    "still (its README.md has every word)"
)

FILE: dict[str, Any] = {"metavar": "FILE", "type": Path}
NUMBER: dict[str, Any] = {"metavar": "N", "type": int}
NAME: dict[str, Any] = {"metavar": "NAME"}


def parser() -> argparse.ArgumentParser:
    main = Parser(
        allow_abbrev=False,
        prog="python -m cogi2v_jax.sample",
        usage="%(prog)s [--image FILE --prompt TEXT] [--model NAME] [--output FILE] ...",
        description="Makes a video from a still image and a sentence. With no argument it runs the "
        "embedded model on its example.",
        epilog=WORLD,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=37, width=118
        ),
    )
    main.set_defaults(example="")  # what the embedded model's example is, where it is made
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")

    add = main.add_argument_group("what to make").add_argument
    image = "the first frame: any image file, or a http, https or data address"
    add("--image", "--image_or_video_path", metavar="FILE", type=path_or_address, help=image)
    add("--prompt", metavar="TEXT", help="what should happen")
    add("--negative_prompt", metavar="TEXT", default="", help="what should not")
    add("--end_image", metavar="FILE", type=path_or_address, help="the last frame, or near to it")
    keyframe = "a picture for latent frame N (of four frames; 0 is the first); several times over"
    add("--keyframe", metavar="N=FILE", action="append", type=_keyframe, default=[], help=keyframe)
    manifest = "many at once: .csv, .jsonl or .txt (prompt@@image) instead of image and prompt"
    add("--manifest", **FILE, help=manifest)
    output = ".mp4, .gif, or .png for a folder of frames (default: out.mp4)"
    add("--output", "--output_path", **FILE, help=output)
    upscale = f"also write a copy N times as large, x-xN.mp4, by {' or '.join(ENLARGED)}"
    add("--upscale", nargs=2, metavar=("HOW", "N"), help=upscale)
    videos = "with seeds counting up from --seed"
    add("--num_videos_per_prompt", **NUMBER, default=1, help=videos)
    add("--seed", **NUMBER, default=42)
    add(
        "--noise_file", **FILE, help="the initial noise: .npy of latents or of frames of their size"
    )

    add_settings(main)

    add = main.add_argument_group("model and machine").add_argument
    model = f"converted or diffusers folder (here or at gs://), hub id, or {', '.join(names())}"
    add("--model", "--model_path", **NAME, help=f"{model} (default: {EMBEDDED})")
    dtype = "compute dtype (default: bfloat16, on CPUs float32)"
    add("--dtype", choices=["bfloat16", "float32"], help=dtype)
    attention = "auto, xla, cudnn, splash (TPU) or tokamax (GPU)"
    add("--attention", **NAME, default="auto", help=attention)
    mesh = "how devices share the work: auto, a machine (v5e-1, v5e-8, v6e-8, ...) or sizes"
    add("--mesh", **NAME, default="auto", help=f"{mesh} (data=1,pair=2,context=4)")
    machine = "only print what a machine (v5e-8, ...), here or not, needs: memory, static time"
    add("--plan", **NAME, help=machine)
    add("--train", action="store_true", help="with --plan: what a step of training needs")
    tiling = "encode and decode in the reference's blended tiles, as its script does"
    add("--vae_tiling", action="store_true", help=tiling)
    verbose = "print mesh, attention and compiler options"
    add("--verbose", action="store_true", help=verbose)
    add("--decode_latents", **FILE, help=f"only decode a *{LATENTS} file of an earlier run")
    lora = "a LoRA (diffusers, PEFT, kohya, SAT): file, folder, hub id or the example "
    lora += f"{EXAMPLE_LORA}; several times over"
    add("--lora_path", metavar="FILE[:WEIGHT]", action="append", default=[], help=lora)
    # Flags of the official script: there is one type here, and a LoRA file knows its rank.
    add("--generate_type", choices=["i2v"], default="i2v", help=argparse.SUPPRESS)
    add("--lora_rank", type=int, help=argparse.SUPPRESS)
    return main


def _keyframe(text: str) -> tuple[int, Path | str]:
    number, _, file = text.partition("=")
    if not number.isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"must be N=FILE: got {text!r}")
    return int(number), path_or_address(file)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, checked against each other; the embedded model's example fills in what is left
    out. Exits with code 2 and one line if they are wrong."""
    reader = parser()
    options = reader.parse_args(arguments)
    for name in ("model", "plan", "mesh", "attention"):
        if getattr(options, name) == "":
            reader.error(f"--{name} must not be empty")
    if (count := options.num_videos_per_prompt) < 1:
        reader.error(f"--num_videos_per_prompt must be at least 1: got {count}")
    pair = options.image or options.prompt
    given = {name for name, value in vars(options).items() if value != reader.get_default(name)}
    if options.decode_latents and (beside := sorted(given - DECODING)):
        others = ", ".join(f"--{name}" for name in beside)
        reader.error(f"--decode_latents must stand without {others}: decoding reads none of them")
    frames = [frame for frame, _ in options.keyframe]
    if twice := next((frame for frame in frames if frames.count(frame) > 1), None):
        reader.error(f"--keyframe must be given once for a latent frame: got {twice} twice")
    if options.upscale:
        way, factor = options.upscale
        if way not in ENLARGED or factor not in map(str, range(2, LARGEST + 1)):
            rule = f"{' or '.join(ENLARGED)} and a number from 2 to {LARGEST}"
            reader.error(f"--upscale must be {rule}: got {way} {factor}")
        options.upscale = way, int(factor)
    if options.train and not options.plan:
        reader.error("--train must be given with --plan; python -m cogi2v_jax.train trains")
    if options.plan or options.decode_latents:
        return options
    if options.manifest:
        if pair:
            reader.error("--manifest must stand alone: got --image or --prompt beside it")
        return options
    if options.model in (None, EMBEDDED) and not options.image:
        options.image = EXAMPLE_IMAGE
        options.prompt = EXAMPLE_PROMPT if options.prompt is None else options.prompt
        options.example = f"the picture is {EXAMPLE_IMAGE}, the prompt {options.prompt!r}"
    for missing, other in (("prompt", "image"), ("image", "prompt")):
        if getattr(options, missing) is None and getattr(options, other) is not None:
            reader.error(f"--{missing} must be given with --{other}")
    if options.image is None:
        reader.error("--image and --prompt must be given (only the embedded model has an example)")
    return options


@hosts.distributed
@printing
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 could not be done, 2 wrong arguments, 130 stopped by the user."""
    options = parse(arguments)
    return run(lambda: _run(options), "stopped; no half-written video was left")


def _run(options: argparse.Namespace) -> None:
    parse_loras(options.lora_path)  # finds faults without jax
    if options.plan:
        asked = options.model or EMBEDDED, options.plan
        if options.train:
            lines = plan.training_lines(*asked)
        else:
            how = options.dtype, options.attention
            lines = plan.lines(*asked, *how, **_settings(options))
        print(*lines, sep="\n")
        return
    hosts.join()
    if options.decode_latents:
        _decode_latents(options)
    else:
        with tempfile.TemporaryDirectory(prefix="cogi2v-") as folder:
            options.end_image, options.keyframes = _other_pictures(options, Path(folder))
            _sample(options, _planned(options, Path(folder)))
    if options.example:
        say(options.example)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {setting: getattr(options, setting) for setting in SETTINGS}


def _planned(options: argparse.Namespace, folder: Path) -> list[tuple[Video, Path]]:
    """The videos to make, each with its output. Reads the images, those at addresses into `folder`,
    and checks the outputs."""
    single = options.prompt, options.image
    rows = read_manifest(options.manifest) if options.manifest else [Row(*single)]
    sources = dict.fromkeys(row.image for row in rows)
    images = {source: local_copy(source, folder) for source in sources}
    videos = []
    for row in rows:
        first = options.seed if row.seed is None else row.seed
        negative = options.negative_prompt if row.negative_prompt is None else row.negative_prompt
        seeds = range(first, first + options.num_videos_per_prompt)
        videos += [Video(images[row.image], row.prompt, negative, seed) for seed in seeds]
    outputs = [options.output or Path("out.mp4")]
    check_name(outputs[0])
    if len(videos) > 1:
        (path,), width = outputs, len(str(len(videos) - 1))
        stems = [f"{path.stem}-{number:0{width}d}" for number in range(len(videos))]
        outputs = [path.with_name(stem + path.suffix) for stem in stems]
    for path in outputs:
        if (latents := path.with_name(path.stem + LATENTS)).is_dir():
            raise ValueError(f"latents must be a file or a new name: got the folder {latents}")
        if options.upscale:
            _checked(_copy(path, options.upscale))
    return list(zip(videos, map(_checked, outputs), strict=True))


def _other_pictures(
    options: argparse.Namespace, folder: Path
) -> tuple[Path | None, dict[int, Path]]:
    """The end image and the keyframes, those at addresses read into `folder`."""
    end = None if options.end_image is None else local_copy(options.end_image, folder)
    return end, {number: local_copy(source, folder) for number, source in options.keyframe}


def _copy(output: Path, upscale: tuple[str, int]) -> Path:
    """Where the enlarged copy of an output goes."""
    return output.with_name(f"{output.stem}-x{upscale[1]}{output.suffix}")


def _checked(output: Path) -> Path:
    """The output, checked where it is written: by process 0."""
    return check_output(output) if hosts.leads() else output


def _sample(options: argparse.Namespace, planned: list[tuple[Video, Path]]) -> None:
    started = time.perf_counter()
    videos, outputs = zip(*planned, strict=True)
    columns = map(list, zip(*videos, strict=True))
    pictures = {"end_image": options.end_image, "keyframes": options.keyframes}
    request = Request(
        **dict(zip(Video._fields, columns, strict=True)), **_settings(options), **pictures
    )
    request.check()
    from .pipeline import generate, prepare, videos_at_once
    from .weights.hub import known_config

    name = options.model or EMBEDDED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `generate` gives them
        if known := known_config(name):  # before a model is fetched and converted
            resolved = request.resolve(known)
            if options.noise_file:
                shape = resolved.latent_shape(known)
                read_noise(options.noise_file, shape, resolved.num_frames)
    models = _load(options, name, options.dtype, options.lora_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = request.batches(videos_at_once(models, request))
        for batch in batches:  # every one is checked before the first is sampled
            job = prepare(models, batch)
    given, made_of = None, {}
    if options.noise_file:
        given = read_noise(options.noise_file, job.shape, job.request.num_frames)
        made_of = {"file": options.noise_file.name, "sha256": sha256(options.noise_file)}
    if hosts.leads():
        check_space(outputs[0].parent, len(videos) * _bytes(job, outputs[0]), "latents and videos")
    if options.verbose:
        say("\n".join(job.report()))
    loading = time.perf_counter() - started
    remaining = iter(outputs)
    for batch in batches:
        paths = list(itertools.islice(remaining, len(batch.videos)))
        recipes: list[dict[str, Any]] = []

        def keep(latents: Any, resolved: Resolved, paths=paths, recipes=recipes) -> None:
            """Writes the latents of a batch, each with its recipe."""
            if not hosts.leads():
                return
            for number, (path, video) in enumerate(zip(paths, resolved.videos, strict=True)):
                recipe = recipe_of(models, name, resolved, video)
                recipe |= {"noise_file": made_of} if made_of else {}
                file = path.with_name(path.stem + LATENTS)
                write_latents(file, latents[number : number + 1], recipe)
                recipes.append(recipe)

        try:
            noise = None if given is None else Noise(initial=given.repeat(len(batch.videos), 0))
            result = generate(models, batch, noise, on_step=_progress(), on_latents=keep)
            if hosts.leads():
                made = zip(paths, result.video, recipes, strict=True)
                _finish(made, result.seconds, loading, options.upscale)
        except Exception as error:
            if recipes:
                kept = paths[0].with_name(paths[0].stem + LATENTS)
                error.add_note(f"the latents are kept: --decode_latents {kept} makes the video")
            raise
        loading = 0.0


def _bytes(job: Any, output: Path) -> int:
    """About what a video and its latents take on the disk."""
    request, shape = job.request, job.shape
    latents = 4 * (shape.frames - shape.padding) * shape.height * shape.width * shape.channels
    frames = 3 * request.num_frames * request.height * request.width
    return latents + frames // SQUEEZED.get(output.suffix.lower(), 2)


def _load(
    options: argparse.Namespace, name: str, dtype: str | None, loras: Iterable[str] = ()
) -> Any:
    from .loading import load

    return load(name, dtype, options.attention, options.mesh, options.vae_tiling, loras)


def _decode_latents(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    Request(image="", prompt="", **_settings(options)).check()
    latents, recipe = read_latents(options.decode_latents)
    stem = options.decode_latents.name.removesuffix(LATENTS)
    output = _checked(options.output or options.decode_latents.with_name(f"{stem}.mp4"))
    if options.upscale:
        _checked(_copy(output, options.upscale))
    from .pipeline import decode

    models = _load(options, options.model or recipe["model"], options.dtype or recipe["dtype"])
    loading = time.perf_counter() - started
    seconds: dict[str, float] = {}
    video = decode(models, latents, seconds)[0]
    if hosts.leads():
        recipe |= {"fps": options.fps or recipe["fps"]}
        _finish([(output, video, recipe)], seconds, loading, options.upscale)


def _progress() -> Callable[[int, int, Any], None]:
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
    upscale: tuple[str, int] | None,
) -> None:
    """Writes videos with their recipes, and enlarged copies; prints the time, the memory and the
    files. `loading` are seconds spent on finding the model."""
    started = time.perf_counter()
    lines = []
    for output, video, recipe in videos:
        lines.append(_written(output, video, recipe))
        if upscale:
            lines.append(_written(_copy(output, upscale), enlarge(video, *upscale), recipe))
    seconds = seconds | {
        "load": seconds["load"] + loading,
        "write": time.perf_counter() - started,
    }
    shown = "  ".join(f"{name} {seconds[name]:.1f}" for name in TIMED if name in seconds)
    print(f"seconds: {shown}  (total {sum(seconds.values()):.1f})")
    print(f"peak memory: {_peak_memory()}")
    print("\n".join(lines))


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


if __name__ == "__main__":
    sys.exit(main())
