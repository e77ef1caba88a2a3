"""`cogi2v-convert`: weights between PyTorch folders and ours, and how far their videos are
apart."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from cogi2v_jax import __version__
from cogi2v_jax.arguments import add_settings
from cogi2v_jax.config import one_line
from cogi2v_jax.media.recipe import SETTINGS
from cogi2v_jax.request import Request

SOURCES = "diffusers folder (here, at gs:// or a hub id), then files or folders that replace parts of it: .safetensors, .pt, SAT's"
BAR = 24  # characters of a progress bar
DTYPE = "cast every weight (default: each tensor keeps its own); int8 is of the blocks' kernels, a scale an output, the rest in bfloat16"


def parser() -> argparse.ArgumentParser:
    what = "Converts CogVideoX image-to-video weights between PyTorch and JAX, and compares the videos."
    main = argparse.ArgumentParser(prog="cogi2v-convert", description=what)
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flax = commands.add_parser(
        "to-flax",
        help="PyTorch weights as a folder that `--model` takes",
        description=_to_flax.__doc__,
    )
    flax.add_argument("sources", metavar="SRC", nargs="+", help=SOURCES)
    flax.add_argument(
        "destination",
        metavar="DST",
        help="folder to make, here or at gs://; it appears only when complete",
    )
    flax.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], help=DTYPE)
    flax.set_defaults(run=_to_flax)
    torch = commands.add_parser(
        "to-torch", help="the way back, bit for bit", description=_to_torch.__doc__
    )
    torch.add_argument("source", metavar="SRC", help="converted folder, here or at gs://")
    torch.add_argument(
        "destination", metavar="DST", help="diffusers folder to make, here or at gs://"
    )
    torch.set_defaults(run=_to_torch)
    check = commands.add_parser(
        "check",
        help="a converted folder against its manifest, bit for bit",
        description=_check.__doc__,
    )
    check.add_argument("folder", metavar="FOLDER", help="converted folder, here or at gs://")
    check.set_defaults(run=_check)
    inspect = commands.add_parser(
        "inspect",
        help="what weights are, and whether every tensor has a place",
        description=_inspect.__doc__,
    )
    inspect.add_argument(
        "sources",
        metavar="SRC",
        nargs="+",
        help=f"a converted folder, or {SOURCES}; with --model a LoRA file",
    )
    inspect.add_argument(
        "--model", metavar="NAME", help="the folder or the name of the model that a LoRA is for"
    )
    inspect.add_argument(
        "--keys", action="store_true", help="list the matched tensors too, with their places"
    )
    inspect.set_defaults(run=_inspect)
    record = commands.add_parser(
        "record",
        help="what the PyTorch reference computes, stage by stage",
        description=_record.__doc__,
    )
    record.add_argument("source", metavar="SRC", type=Path, help="diffusers folder")
    record.add_argument(
        "trace",
        metavar="TRACE",
        type=Path,
        help="safetensors file to make; it appears only when complete",
    )
    record.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        required=True,
        help="stretched to the size, as the reference does",
    )
    record.add_argument("--prompt", metavar="TEXT", required=True)
    record.add_argument("--negative_prompt", metavar="TEXT", default="")
    record.add_argument("--seed", metavar="N", type=int, default=42)
    record.add_argument(
        "--device", choices=["cuda", "cpu"], help="(default: cuda where PyTorch finds it)"
    )
    record.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="compute dtype (default: bfloat16, on CPUs float32)",
    )
    record.add_argument(
        "--vae_tiling",
        action="store_true",
        help="encode and decode in blended tiles, as the official script does",
    )
    record.add_argument(
        "--keep_steps",
        metavar="N,N,...",
        type=_numbers,
        help="steps whose predictions are kept (default: all); latents and noise always are",
    )
    add_settings(record, ours=False)
    record.set_defaults(run=_record)
    verify = commands.add_parser(
        "verify", help="a checkpoint against such a trace", description=_verify.__doc__
    )
    verify.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="converted folder, or whatever --model takes"
    )
    verify.add_argument(
        "trace",
        metavar="TRACE",
        type=Path,
        help="of cogi2v-convert record; its dtype is computed in",
    )
    verify.add_argument(
        "--truth",
        metavar="TRACE32",
        type=Path,
        help="a float32 trace of the same request, to judge a bfloat16 one by",
    )
    verify.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    verify.add_argument("--markdown", action="store_true", help="print the table as markdown")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser(
        "compare", help="how far two videos are apart: PSNR and SSIM", description=_compare.__doc__
    )
    compare.add_argument("a", metavar="VIDEO_A", type=Path, help="mp4, gif or folder of png frames")
    compare.add_argument(
        "b", metavar="VIDEO_B", type=Path, help="another of as many frames and the same size"
    )
    compare.add_argument(
        "--curve", metavar="FILE.png", type=Path, help="draw both over the frame number"
    )
    compare.add_argument(
        "--json",
        metavar="FILE.json",
        type=Path,
        help='write every figure; an infinite PSNR is the string "inf"',
    )
    compare.set_defaults(run=_compare)
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(
                f"cogi2v-convert: warning: {message}", file=sys.stderr
            )
            return options.run(options)
    except (ValueError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left behind", 130)


def _fail(line: str, code: int) -> int:
    over = "\r" if sys.stderr.isatty() else ""  # the progress, if there is any
    print(f"{over}cogi2v-convert: {one_line(line)}", file=sys.stderr)
    return code


def _progress(part: str, done: int, total: int) -> None:
    """A line that grows in place, for those who watch."""
    if sys.stderr.isatty():
        print(
            f"\r{part}: {done} of {total}",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )


def _bar() -> Callable[[str, int, int], None]:
    """The same in bytes, with a bar and the time that is left."""
    begin = time.monotonic()

    def show(part: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            seconds = max(time.monotonic() - begin, 1e-3)
            bar = "#" * (BAR * done // max(total, 1))
            left = f"{(total - done) * seconds / max(done, 1):.0f} s left"
            line = f"[{bar:{BAR}}] {done / 1e9:.2f} of {total / 1e9:.2f} GB, {done / seconds / 1e9:.2f} GB/s, {left}, {part}"
            print(f"\r{line:100}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _to_flax(options: argparse.Namespace) -> int:
    """Converts a diffusers folder, a layer at a time. What follows it replaces parts of it, and
    says itself which: a file of ComfyUI's (bf16, fp16, float8 with its scales), a checkpoint of
    SAT's (.pt, or its folder), a part's own folder. With int8 weights, which need pip install
    'cogi2v-jax[int8]', it says how far these are from what they were, and the folder's
    checkpoint.json says it of every one."""
    from cogi2v_jax.weights.bucket import is_bucket

    from .conversion import to_flax
    from .writing.int8 import report

    made = to_flax(options.sources, options.destination, options.dtype, _bar())
    print("\n".join([*([] if is_bucket(made) else report(Path(made))), str(made)]))
    return 0


def _to_torch(options: argparse.Namespace) -> int:
    """Gives back the diffusers folder that a converted folder came from; of int8 weights the
    numbers that they stand for."""
    from cogi2v_jax.weights.checkpoint import int8_errors
    from cogi2v_jax.weights.hub import locate

    from .conversion import to_torch

    source = locate(options.source, must="SRC must be a converted folder")
    folder = to_torch(source, options.destination, _bar())
    if errors := int8_errors(source):
        print(
            f"{folder}: what was int8 of {' and '.join(errors)} is dequantised to bfloat16, not what it once was",
            file=sys.stderr,
        )
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
    """Runs the PyTorch reference on one request and keeps what every stage computes. Needs the
    extra `reference`."""
    from .proof.record import record

    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    request = Request(
        options.image,
        options.prompt,
        options.negative_prompt,
        seed=options.seed,
        fit="stretch",
        noise="torch",
        **settings,
    )
    machine = {
        "device": options.device,
        "dtype": options.dtype,
        "vae_tiling": options.vae_tiling,
        "keep_steps": options.keep_steps,
    }
    print(record(options.source, options.trace, request, **machine))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Runs every stage in JAX, fed with the reference's input and freely from the start. Exits 1
    where one is not the reference's."""
    from cogi2v_jax.disk import beside, check_target

    from .proof.verify import verify

    if options.json:
        check_target(
            "json", options.json, tuple(path for path in (options.trace, options.truth) if path)
        )
    report = verify(options.checkpoint, options.trace, options.truth)
    print("\n".join(report.lines(options.markdown)))
    if options.json:
        with beside(options.json) as part:
            part.write_text(report.json() + "\n", encoding="utf-8")
    return 1 if report.faults else 0


def _check(options: argparse.Namespace) -> int:
    """Reads a converted folder again, every tensor of it, and says what is not as its manifest
    says. Exits 1 where something is not."""
    from cogi2v_jax.weights.hub import locate

    from .writing.manifest import check

    faults = 0
    for fault in check(locate(options.folder, must="FOLDER must be a converted folder")):
        print(f"cogi2v-convert: {options.folder}: {one_line(fault)}", file=sys.stderr)
        faults += 1
    count = f"{faults} fault{'s' * (faults > 1)}; convert its source again"
    print(f"{options.folder}: {count if faults else 'whole: every file and every tensor'}")
    return 1 if faults else 0


def _inspect(options: argparse.Namespace) -> int:
    """Says what a checkpoint is, or a file alone, or (with --model) what a LoRA file changes of a
    model. Exits 1 where a tensor has no place or is missing, of a LoRA where sampling would refuse
    it."""
    from .inspection import lora_report, report

    if options.model and len(options.sources) > 1:
        raise ValueError(f"--model must come with one LoRA: got {len(options.sources)} sources")
    sources, keys = options.sources, options.keys
    lines, whole = (
        lora_report(Path(sources[0]), options.model, keys)
        if options.model
        else report(sources, keys)
    )
    print("\n".join(lines))
    return 0 if whole else 1


def _compare(options: argparse.Namespace) -> int:
    """Prints PSNR and SSIM of two videos and their worst frame, counted from 0. The video's PSNR is
    that of the mean squared error over all frames, "inf" where they are equal; its SSIM is the mean
    over frames, by Wang et al.'s window. mp4 and gif are lossy and measure their codec too; folders
    of png frames measure the models alone. Needs pip install 'cogi2v-jax[compare]'."""
    from .proof.compare import report

    print("\n".join(report(options.a, options.b, options.curve, options.json, _progress)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
