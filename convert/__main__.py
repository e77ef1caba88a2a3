"""`cogi2v-convert`: converts weights between PyTorch folders and ours, and compares both programs'
results."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from cogi2v_jax import __version__
from cogi2v_jax.arguments import add_settings
from cogi2v_jax.disk import one_line
from cogi2v_jax.media.download import path_or_address
from cogi2v_jax.request import Request
from cogi2v_jax.settings import SETTINGS
from cogi2v_jax.terminal import printing

SOURCES = (
    "diffusers folder (here, at gs:// or a hub id), then files or folders that replace parts of it:"
    " .safetensors, .pt, SAT's"
)
DTYPE = (
    "cast every weight (default: each tensor keeps its own dtype); int8 is for the kernels in "
    "blocks, with a scale for each output, and the rest in bfloat16"
)
BAR = 24  # characters of the progress bar


def parser() -> argparse.ArgumentParser:
    what = "Converts CogVideoX image-to-video weights between PyTorch and JAX; compares the videos."
    main = argparse.ArgumentParser(prog="cogi2v-convert", description=what, allow_abbrev=False)
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> Callable:
        about = {"help": help, "description": run.__doc__}
        made = commands.add_parser(name, **about, allow_abbrev=False)
        made.set_defaults(run=run)
        return made.add_argument

    add = command("to-flax", _to_flax, "convert PyTorch weights into a folder for `--model`")
    add("sources", metavar="SRC", nargs="+", help=SOURCES)
    made = "folder to make, here or at gs://; it appears only when complete"
    add("destination", metavar="DST", help=made)
    add("--dtype", choices=["bfloat16", "float32", "int8"], help=DTYPE)

    add = command("to-torch", _to_torch, "convert back, bit for bit")
    add("source", metavar="SRC", help="converted folder, here or at gs://")
    add("destination", metavar="DST", help="diffusers folder to make, here or at gs://")

    add = command("check", _check, "compare a converted folder with its manifest, bit for bit")
    add("folder", metavar="FOLDER", help="converted folder, here or at gs://")

    add = command("inspect", _inspect, "describe weights, and whether every tensor fits")
    what = f"a converted folder, or {SOURCES}; with --model a LoRA (file, folder or hub id)"
    add("sources", metavar="SRC", nargs="+", help=what)
    add("--model", metavar="NAME", help="folder or name of the model that a LoRA is for")
    add("--keys", action="store_true", help="list the matched tensors too, with our names")

    add = command("record", _record, "save what the PyTorch reference computes, stage by stage")
    add("source", metavar="SRC", type=Path, help="diffusers folder")
    made = "safetensors file to make; it appears only when complete"
    add("trace", metavar="TRACE", type=Path, help=made)
    what = "stretched to the size, as the reference does"
    add("--image", metavar="FILE", type=path_or_address, required=True, help=what)
    add("--prompt", metavar="TEXT", required=True)
    add("--negative_prompt", metavar="TEXT", default="")
    add("--seed", metavar="N", type=int, default=42)
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where PyTorch finds it)")
    what = "compute dtype (default: bfloat16, on CPUs float32)"
    add("--dtype", choices=["bfloat16", "float32"], help=what)
    what = "encode and decode in blended tiles, as the official script does"
    add("--vae_tiling", action="store_true", help=what)
    what = "steps whose predictions are saved (default: all); latents and noise always are"
    add("--keep_steps", metavar="N,N,...", type=_numbers, help=what)
    add_settings(commands.choices["record"], ours=False)

    add = command("verify", _verify, "compare a checkpoint with a trace of the reference")
    add("checkpoint", metavar="CHECKPOINT", help="converted folder, or whatever --model takes")
    what = "of cogi2v-convert record; its dtype is the compute dtype"
    add("trace", metavar="TRACE", type=Path, help=what)
    what = "a float32 trace of the same request, to judge a bfloat16 one by"
    add("--truth", metavar="TRACE32", type=Path, help=what)
    add("--json", metavar="FILE", type=Path, help="write every figure there")
    add("--markdown", action="store_true", help="print the table as markdown")

    add = command("compare", _compare, "compare two videos: PSNR and SSIM")
    add("a", metavar="VIDEO_A", type=Path, help="mp4, gif or folder of png frames")
    add("b", metavar="VIDEO_B", type=Path, help="another of as many frames and the same size")
    add("--curve", metavar="FILE.png", type=Path, help="draw both over the frame number")
    what = 'write every figure; an infinite PSNR is the string "inf"'
    add("--json", metavar="FILE.json", type=Path, help=what)
    return main


@printing
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if arguments is None and options.run is not _verify:  # a program, and no device is needed
        os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            return options.run(options)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left behind", 130)


def _say(line: str) -> None:
    print(f"cogi2v-convert: {one_line(line)}", file=sys.stderr)


def _fail(line: str, code: int) -> int:
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)  # over a progress line
    _say(line)
    return code


def _show(line: str, done: int, total: int) -> None:
    """Updates a progress line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _count(part: str, done: int, total: int) -> None:
    _show(f"{part}: {done} of {total}", done, total)


def _bar() -> Callable[[str, int, int], None]:
    """Progress in bytes, with a bar and the time left."""
    begin = time.monotonic()

    def show(part: str, done: int, total: int) -> None:
        seconds = max(time.monotonic() - begin, 1e-3)
        bar = "#" * (BAR * done // max(total, 1))
        left = (total - done) * seconds / max(done, 1)
        line = (
            f"[{bar:{BAR}}] {done / 1e9:.2f} of {total / 1e9:.2f} GB, "
            f"{done / seconds / 1e9:.2f} GB/s, {left:.0f} s left, {part}"
        )
        _show(f"{line:100}", done, total)

    return show


def _to_flax(options: argparse.Namespace) -> int:
    """Converts a diffusers folder, layer by layer. Further sources replace parts of it; their
    contents say which: a file from ComfyUI (bf16, fp16, float8 with its scales), a checkpoint from
    SAT (.pt, or its folder), the folder of a part. A conversion to int8, which needs pip install
    'cogi2v-jax[int8]', prints the quantisation errors; checkpoint.json has them for every
    tensor."""
    from cogi2v_jax.weights.bucket import is_bucket

    from .conversion import to_flax
    from .writing.int8 import error_lines

    made = to_flax(options.sources, options.destination, options.dtype, _bar())
    if not is_bucket(made):
        for line in error_lines(Path(made)):
            print(line)
    print(made)
    return 0


def _to_torch(options: argparse.Namespace) -> int:
    """Makes the diffusers folder that a converted folder came from; int8 weights become the numbers
    they stand for."""
    from cogi2v_jax.weights.checkpoint import int8_errors
    from cogi2v_jax.weights.hub import locate

    from .conversion import to_torch

    source = locate(options.source, must="SRC must be a converted folder")
    folder = to_torch(source, options.destination, _bar())
    if errors := int8_errors(source):
        what = f"the int8 weights of {' and '.join(errors)} were dequantised to bfloat16"
        print(f"{folder}: {what}; they are not the original weights", file=sys.stderr)
    print(folder)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be step numbers with commas between them: got {text!r}"
        ) from None


def _record(options: argparse.Namespace) -> int:
    """Runs the PyTorch reference on one request and saves what every stage computes. Needs the
    extra `reference`."""
    from .proof.record import record

    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    settings |= {"seed": options.seed, "fit": "stretch", "noise": "torch"}
    request = Request(options.image, options.prompt, options.negative_prompt, **settings)
    names = ("device", "dtype", "vae_tiling", "keep_steps")
    machine = {name: getattr(options, name) for name in names}
    print(record(options.source, options.trace, request, **machine))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Runs every stage in JAX, on the reference's inputs and on its own. Exits 1 where one differs
    from the reference."""
    from cogi2v_jax.disk import check_target, replace_when_done

    from .proof.verify import verify

    if options.json:
        inputs = tuple(path for path in (options.trace, options.truth) if path)
        check_target("json", options.json, inputs)
    report = verify(options.checkpoint, options.trace, options.truth)
    print("\n".join(report.lines(options.markdown)))
    if options.json:
        with replace_when_done(options.json) as part:
            part.write_text(report.json() + "\n", encoding="utf-8")
    return 1 if report.faults else 0


def _check(options: argparse.Namespace) -> int:
    """Reads every tensor of a converted folder and prints what differs from its manifest. Exits 1
    where something does."""
    from cogi2v_jax.weights.hub import locate

    from .writing.manifest import check, read

    faults, folder = 0, locate(options.folder, must="FOLDER must be a converted folder")
    for fault in check(folder):
        _say(f"{options.folder}: {fault}")
        faults += 1
    count = f"{faults} fault{'s' * (faults > 1)}; convert its source again"
    whole = "whole: every file and every tensor"
    if not faults and "crc32" not in read(folder):
        whole = "whole: every tensor, and every file's size (it has no checksums of files)"
    print(f"{options.folder}: {count if faults else whole}")
    return 1 if faults else 0


def _inspect(options: argparse.Namespace) -> int:
    """Describes a checkpoint, or a file alone, or (with --model) what a LoRA file changes of a
    model. Exits 1 where a tensor is unknown or missing, or where sampling would refuse the LoRA."""
    from .inspection import describe, describe_lora

    sources, keys = options.sources, options.keys
    if options.model and len(sources) > 1:
        raise ValueError(f"--model must come with one LoRA: got {len(sources)} sources")
    lines, fits = (
        describe_lora(sources[0], options.model, keys) if options.model else describe(sources, keys)
    )
    print("\n".join(lines))
    return 0 if fits else 1


def _compare(options: argparse.Namespace) -> int:
    """Prints PSNR and SSIM of two videos and their worst frame, counted from 0. The video's PSNR is
    that of the mean squared error over all frames, "inf" where they are equal; its SSIM is the mean
    over frames, by Wang et al.'s window. mp4 and gif are lossy and measure their codec too; folders
    of png frames measure the models alone. Needs pip install 'cogi2v-jax[compare]'."""
    from .proof.compare import report

    print("\n".join(report(options.a, options.b, options.curve, options.json, _count)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
