"""`python -m cogi2v_jax.prepare`: clips with captions -> what training reads."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .command import Parser, run, say
from .config import names
from .devices import hosts
from .disk import check_target, one_line
from .request import Request
from .terminal import printing
from .training.clips import Bucket, list_clips
from .training.shards import MANIFEST

SHOWN = 20  # skipped clips that are listed
CLIPS = (
    "a folder of videos with a .txt beside each, or with prompts.txt and videos.txt, or with "
    "metadata.jsonl or .csv; a .csv or .jsonl file with the columns video and caption"
)


def parser() -> argparse.ArgumentParser:
    main = Parser(
        allow_abbrev=False,
        prog="python -m cogi2v_jax.prepare",
        description="Encodes clips and their captions once, for training. The same command again "
        "keeps what is there and makes the rest.",
    )
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    add = main.add_argument
    add("clips", metavar="CLIPS", type=Path, help=CLIPS)
    add("folder", metavar="DIR", type=Path, help="the folder to make, or to go on with")
    model = f"converted or diffusers folder (here or at gs://), hub id, or {', '.join(names())}"
    add("--model", "--model_path", metavar="NAME", required=True, help=model)
    size = "(default: what the checkpoint was made for)"
    add("--height", metavar="PX", type=int, help=f"of all clips {size}")
    add("--width", metavar="PX", type=int, help=f"of all clips {size}")
    add("--num_frames", metavar="N", type=int, help=f"8k+1 {size}")
    several = "several sizes, FRAMESxHEIGHTxWIDTH: a clip takes the one of the nearest aspect ratio"
    add("--buckets", metavar="SIZE,SIZE", help=f"{several}, then of most frames")
    fps = "frames a second to take, where a clip is long enough"
    add("--fps", metavar="N", type=float, help=f"{fps} {size}")
    dtype = "compute dtype (default: bfloat16, on CPUs float32)"
    add("--dtype", choices=["bfloat16", "float32"], help=dtype)
    pixels = "write frames instead of latents and texts, to train the VAE on"
    add("--pixels", action="store_true", help=pixels)
    return main


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, checked against each other. Exits with code 2 and one line if they are
    wrong."""
    reader = parser()
    options = reader.parse_args(arguments)
    sizes = options.num_frames, options.height, options.width
    if options.buckets and any(sizes):
        reader.error("--buckets must stand alone: got --num_frames, --height or --width beside it")
    return options


@hosts.distributed
@printing
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 could not be done, 2 wrong arguments, 130 stopped by the user."""
    options = parse(arguments)
    return run(lambda: _prepare(options), "stopped; the same command goes on")


def _prepare(options: argparse.Namespace) -> None:
    buckets = [Bucket.parse(text) for text in (options.buckets or "").split(",") if text.strip()]
    sizes = {"num_frames": options.num_frames, "height": options.height, "width": options.width}
    Request(image="", prompt="", fps=options.fps, **sizes).check()
    clips = list_clips(options.clips)
    check_target("DIR", options.folder, (options.clips,), folder=True)
    if not any(clip.path.is_file() for clip in clips):
        first = one_line(str(clips[0].path))
        raise ValueError(f"one clip at least must exist: got {len(clips)} that don't; {first}")
    hosts.join()
    from .training.preparation import check_buckets, prepare
    from .weights.checkpoint import read_config
    from .weights.hub import known_config, locate

    asked = buckets or [tuple(sizes.values())]
    if known := known_config(options.model):  # before a model is fetched and converted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_buckets(known, asked, options.fps)
    if options.pixels:
        hosts.start_devices()
        source = config = read_config(locate(options.model, say))
    else:
        from .loading import load

        source = load(options.model, options.dtype)
        config = source.config
    settings = check_buckets(config, asked, options.fps)
    prepared = prepare(source, clips, options.folder, *settings, _progress())
    if hosts.leads():
        for clip in prepared.skipped[:SHOWN]:
            say(one_line(f"skipped {clip['video']}: {clip['reason']}"))
        if (more := len(prepared.skipped) - SHOWN) > 0:
            say(f"skipped {more} more; {MANIFEST} lists them")
        used = len({clip.bucket for clip in prepared.clips.values()})
        size = sum(file["bytes"] for file in prepared.files.values())
        print(
            f"{options.folder}: {len(prepared.clips)} clips in {used} bucket{'s' * (used > 1)}, "
            f"{len(prepared.skipped)} skipped, {size / 1e6:.1f} MB"
        )


def _progress() -> Callable[[str, int, int, int], None]:
    """Prints what is done, how fast, and the time left: in one line of a terminal, or every tenth
    of it in a log."""
    terminal = sys.stderr.isatty()
    # By what is made: when the first were done, and how many these were; tenths shown.
    started: dict[str, tuple[float, int]] = {}
    shown: set[tuple[str, int]] = set()

    def show(what: str, done: int, count: int, skipped: int) -> None:
        since, first = started.setdefault(what, (time.perf_counter(), done))
        tenth = what, done * 10 // count
        if not terminal and tenth in shown:
            return
        shown.add(tenth)
        seconds = time.perf_counter() - since
        line = f"{what}: {done} of {count}"
        if done > first and done < count:  # the time before was spent on loading and compiling
            minutes, left = divmod(round(seconds / (done - first) * (count - done)), 60)
            line += f", {(done - first) / seconds:.2f} a second, {minutes}:{left:02d} left"
        line += f", {skipped} skipped" if skipped else ""
        if terminal:
            say(f"\r{line:78}", end="\n" if done == count else "")
        else:
            say(line)

    return show


if __name__ == "__main__":
    sys.exit(main())
