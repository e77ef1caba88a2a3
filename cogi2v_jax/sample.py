"""`python -m cogi2v_jax.sample`: arguments -> Request -> video files."""

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import __version__
from .apps import making
from .arguments import Listed, add_settings, parse_loras
from .command import Parser, run, say
from .config import names
from .devices import hosts, plan
from .media.download import path_or_address
from .media.enhance import check_address, connect
from .media.images import local_copy, read_image
from .media.recipe import LATENTS
from .media.rows import EVERY_COLUMN, Row, read_manifest
from .media.segments import first_frame
from .media.videos import ENLARGED
from .names import ASSETS, EXAMPLE_LORA
from .request import Request, Video
from .settings import SETTINGS
from .terminal import printing

EMBEDDED = "cogi2v-tiny"
EXAMPLE_IMAGE = ASSETS / "example.png"
EXAMPLE_PROMPT = "the cyan triangle grows"
LARGEST = 16  # factor of a copy
WIDTH = 118  # of --help
IN_ROWS = [name for name in EVERY_COLUMN if name != "output"]  # --output names all videos
DECODING = {  # options that --decode_latents reads
    *("decode_latents", "output", "upscale", "fps"),
    *("model", "dtype", "attention", "mesh", "vae_tiling", "verbose"),
}

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
            prog, max_help_position=37, width=WIDTH
        ),
    )
    main.set_defaults(example="")  # what the embedded model's example is, where it is made
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")

    add = main.add_argument_group("what to make").add_argument
    image = "the first frame: any image file, or a http, https or data address"
    add("--image", "--image_or_video_path", metavar="FILE", type=path_or_address, help=image)
    add("--prompt", metavar="TEXT", help="what should happen")
    add("--negative_prompt", metavar="TEXT", default="", help="what should not")
    url = "a language model rewrites the prompt for the image (as http://127.0.0.1:8000/v1)"
    add("--enhance", metavar="URL", help=url)
    add("--enhance_model", **NAME, help="its name (default: the first that URL/models lists)")
    manifest = "many at once: .csv, .jsonl or .txt (prompt@@image) instead of image and prompt"
    add("--manifest", **FILE, help=manifest)
    output = ".mp4, .gif, or .png for a folder of frames (default: out.mp4)"
    add("--output", "--output_path", **FILE, help=output)
    upscale = f"also write a copy N times as large, x-xN.mp4, by {' or '.join(ENLARGED)}"
    add("--upscale", nargs=2, metavar=("HOW", "N"), help=upscale)
    videos = "with seeds counting up from --seed"
    add("--num_videos_per_prompt", **NUMBER, default=1, help=videos)
    takes = "make each N times, with seeds counting up, and rank them: out.mp4 is the best"
    add("--best_of", **NUMBER, default=1, help=takes)
    add("--seed", **NUMBER, default=42)

    add_settings(main)

    listed = Listed(main, "beyond the reference (docs/craft.md)", WIDTH - 2)
    add, picture = listed.add, {"metavar": "FILE", "type": path_or_address}
    add("--end_image", **picture, help="the last frame, or near to it")
    keyframe = "a picture for latent frame N (of four frames), several times over"
    add(
        "--keyframe",
        metavar="N=FILE",
        action="append",
        type=_keyframe,
        default=[],
        help=keyframe,
    )
    add(
        "--video",
        **FILE,
        help="a clip to start from; its first frame is the image if none is given",
    )
    add("--noise_file", **FILE, help="the initial noise, .npy of latents or frames of their size")
    listed.add_settings()

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
    for name in ("num_videos_per_prompt", "best_of"):
        if (count := getattr(options, name)) < 1:
            reader.error(f"--{name} must be at least 1: got {count}")
    if options.enhance_model and options.enhance is None:
        reader.error("--enhance_model must be given with --enhance")
    if options.enhance is not None:
        try:
            check_address(options.enhance)
        except ValueError as error:
            reader.error(str(error))
    pair = options.image or options.prompt
    given = {name for name, value in vars(options).items() if value != reader.get_default(name)}
    if options.decode_latents and (beside := sorted(given - DECODING)):
        others = ", ".join(f"--{name}" for name in beside)
        reader.error(f"--decode_latents must stand without {others}: decoding reads none of them")
    frames = [frame for frame, _ in options.keyframe]
    if twice := next((frame for frame in frames if frames.count(frame) > 1), None):
        reader.error(f"--keyframe must be given once for a latent frame: got {twice} twice")
    for name, needed in (("strength", "video"), ("overlap", "extend"), ("match_colour", "extend")):
        if name in given and needed not in given and not options.manifest:
            reader.error(f"--{name} must be given with --{needed}")
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
    if options.model in (None, EMBEDDED) and not options.image and not options.video:
        options.image = EXAMPLE_IMAGE
        options.prompt = EXAMPLE_PROMPT if options.prompt is None else options.prompt
        options.example = f"the picture is {EXAMPLE_IMAGE}, the prompt {options.prompt!r}"
    if options.image and options.prompt is None:
        reader.error("--prompt must be given with --image")
    if options.video and options.prompt is None:
        reader.error("--prompt must be given with --video")
    if options.prompt is not None and not options.image and not options.video:
        reader.error("--image must be given with --prompt")
    if not options.image and not options.video:
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

    def load(name: str, dtype: str | None) -> Any:
        from .loading import load

        how = options.attention, options.mesh, options.vae_tiling
        return load(name, dtype, *how, options.lora_path)

    if options.decode_latents:
        Request(image="", prompt="", **_settings(options)).check()
        how = options.output, options.fps, options.upscale
        making.decode_kept(load, options.model, options.dtype, options.decode_latents, *how)
        return
    with tempfile.TemporaryDirectory(prefix="cogi2v-") as folder:
        planned, once = _planned(options, Path(folder)), functools.cache(load)
        model = options.model or EMBEDDED, options.dtype
        for request, _ in planned:
            request.check()
        for request, _ in planned[1:]:  # `make` checks the first one
            making.check(once, *model, request)
        enhance = options.enhance
        for request, outputs in planned:
            making.make(
                once,
                *model,
                request,
                outputs,
                best_of=options.best_of,
                endpoint=enhance and functools.partial(connect, enhance, options.enhance_model),
                noise_file=options.noise_file,
                upscale=options.upscale,
                verbose=options.verbose,
            )
    if options.example:
        say(options.example)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {setting: getattr(options, setting) for setting in SETTINGS}


def _planned(options: argparse.Namespace, folder: Path) -> list[tuple[Request, list[Path]]]:
    """The requests of all videos, one for rows of equal settings, and their outputs. Reads the
    images, those at addresses into `folder`, and checks the outputs."""
    count, takes, output = options.num_videos_per_prompt, options.best_of, options.output
    rows = read_manifest(options.manifest, IN_ROWS) if options.manifest else []
    videos = count * max(1, len(rows))
    outputs = making.outputs_of(output or Path("out.mp4"), videos, options.upscale, takes)
    if not rows:
        image = options.image or first_frame(options.video, folder)
        rows = [Row(options.prompt, image)]
    ends = [row.end_image or options.end_image for row in rows]
    sources = dict.fromkeys([*(row.image for row in rows), *filter(None, ends)])
    images = {source: local_copy(source, folder) for source in sources}
    keyframes = {number: local_copy(source, folder) for number, source in options.keyframe}
    planned: dict[Any, tuple[dict[str, Any], list[Video], list[Path]]] = {}
    each = count * takes
    for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
        first = options.seed if row.seed is None else row.seed
        negative = options.negative_prompt if row.negative_prompt is None else row.negative_prompt
        settings = {**_settings(options), **row.settings, "end_image": end and images[end]}
        # Where the pictures choose the size, those of one request have one.
        own = read_image(images[row.image]).size if settings["fit"] == "auto" else None
        _, videos, paths = planned.setdefault((repr(settings), own), (settings, [], []))
        # Each video has the seeds of its takes to itself.
        seeds = range(first, first + each, takes)
        videos += [Video(images[row.image], row.prompt, negative, seed) for seed in seeds]
        paths += outputs[number * each : (number + 1) * each]
    others = {"keyframes": keyframes, "video": options.video}
    requests = []
    for settings, videos, paths in planned.values():
        columns = dict(zip(Video._fields, map(list, zip(*videos, strict=True)), strict=True))
        requests.append((Request(**columns, **settings, **others), paths))
    return requests


if __name__ == "__main__":
    sys.exit(main())
