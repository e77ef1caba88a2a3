"""`cogi2v-convert`: weights between PyTorch folders and ours, and how far their videos are apart."""

import argparse
import sys
import warnings
from pathlib import Path

from cogi2v_jax import __version__
from cogi2v_jax.arguments import add_settings
from cogi2v_jax.recipe import SETTINGS
from cogi2v_jax.request import Request

DTYPE = "cast every weight (default: each tensor keeps its own); int8 is of the blocks' kernels, a scale an output, the rest in bfloat16"


def parser() -> argparse.ArgumentParser:
    what = "Converts CogVideoX image-to-video weights between PyTorch and JAX, and compares the videos."
    main = argparse.ArgumentParser(prog="cogi2v-convert", description=what)
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flax = commands.add_parser("to-flax", help="a diffusers folder as a folder that `--model` takes", description=_to_flax.__doc__)
    flax.add_argument("source", metavar="SRC", type=Path, help="diffusers folder: transformer/ vae/ text_encoder/ tokenizer/ scheduler/")
    flax.add_argument("destination", metavar="DST", type=Path, help="folder to make; it appears only when complete")
    flax.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], help=DTYPE)
    flax.set_defaults(run=_to_flax)
    torch = commands.add_parser("to-torch", help="the way back, bit for bit", description=_to_torch.__doc__)
    torch.add_argument("source", metavar="SRC", type=Path, help="converted folder")
    torch.add_argument("destination", metavar="DST", type=Path, help="diffusers folder to make")
    torch.set_defaults(run=_to_torch)
    inspect = commands.add_parser("inspect", help="what a folder holds, and whether every tensor has a place", description=_inspect.__doc__)
    inspect.add_argument("source", metavar="SRC", type=Path, help="diffusers or converted folder; with --model a LoRA file")
    inspect.add_argument("--model", metavar="NAME", help="the folder or the name of the model that a LoRA is for")
    inspect.add_argument("--keys", action="store_true", help="list the matched tensors too, with their places")
    inspect.set_defaults(run=_inspect)
    record = commands.add_parser("record", help="what the PyTorch reference computes, stage by stage", description=_record.__doc__)
    record.add_argument("source", metavar="SRC", type=Path, help="diffusers folder")
    record.add_argument("trace", metavar="TRACE", type=Path, help="safetensors file to make; it appears only when complete")
    record.add_argument("--image", metavar="FILE", type=Path, required=True, help="stretched to the size, as the reference does")
    record.add_argument("--prompt", metavar="TEXT", required=True)
    record.add_argument("--negative_prompt", metavar="TEXT", default="")
    record.add_argument("--seed", metavar="N", type=int, default=42)
    record.add_argument("--device", choices=["cuda", "cpu"], help="(default: cuda where PyTorch finds it)")
    record.add_argument("--dtype", choices=["bfloat16", "float32"], help="compute dtype (default: bfloat16, on CPUs float32)")
    record.add_argument("--vae_tiling", action="store_true", help="encode and decode in blended tiles, as the official script does")
    record.add_argument(
        "--keep_steps",
        metavar="N,N,...",
        type=_numbers,
        help="steps whose predictions are kept (default: all); latents and noise always are",
    )
    add_settings(record, ours=False)
    record.set_defaults(run=_record)
    verify = commands.add_parser("verify", help="a checkpoint against such a trace", description=_verify.__doc__)
    verify.add_argument("checkpoint", metavar="CHECKPOINT", help="converted folder, or whatever --model takes")
    verify.add_argument("trace", metavar="TRACE", type=Path, help="of cogi2v-convert record; its dtype is computed in")
    verify.add_argument("--truth", metavar="TRACE32", type=Path, help="a float32 trace of the same request, to judge a bfloat16 one by")
    verify.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    verify.add_argument("--markdown", action="store_true", help="print the table as markdown")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser("compare", help="how far two videos are apart: PSNR and SSIM", description=_compare.__doc__)
    compare.add_argument("a", metavar="VIDEO_A", type=Path, help="mp4, gif or folder of png frames")
    compare.add_argument("b", metavar="VIDEO_B", type=Path, help="another of as many frames and the same size")
    compare.add_argument("--curve", metavar="FILE.png", type=Path, help="draw both over the frame number")
    compare.add_argument("--json", metavar="FILE.json", type=Path, help='write every figure; an infinite PSNR is the string "inf"')
    compare.set_defaults(run=_compare)
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"cogi2v-convert: warning: {message}", file=sys.stderr)
            return options.run(options)
    except (ValueError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was left behind", 130)


def _fail(line: str, code: int) -> int:
    print(f"{chr(13) if sys.stderr.isatty() else ''}cogi2v-convert: {line}", file=sys.stderr)  # over the progress, if there is any
    return code


def _progress(part: str, done: int, total: int) -> None:
    """A line that grows in place, for those who watch."""
    if sys.stderr.isatty():
        print(f"\r{part}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _to_flax(options: argparse.Namespace) -> int:
    """Converts a diffusers folder, a layer at a time. With int8 weights, which need pip install 'cogi2v-jax[int8]', it says how far these
    are from what they were, and the folder's checkpoint.json says it of every one."""
    from .conversion import to_flax
    from .int8 import report

    folder = to_flax(options.source, options.destination, options.dtype, _progress)
    print("\n".join([*report(folder), str(folder)]))
    return 0


def _to_torch(options: argparse.Namespace) -> int:
    """Gives back the diffusers folder that a converted folder came from; of int8 weights the numbers that they stand for."""
    from cogi2v_jax.checkpoint import int8_errors

    from .conversion import to_torch

    folder = to_torch(options.source, options.destination, _progress)
    if errors := int8_errors(options.source):
        print(f"{folder}: what was int8 of {' and '.join(errors)} is dequantised to bfloat16, not what it once was", file=sys.stderr)
    print(folder)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be step numbers with commas between them: got {text!r}") from None


def _record(options: argparse.Namespace) -> int:
    """Runs the PyTorch reference on one request and keeps what every stage computes. Needs the extra `reference`."""
    from .reference import record

    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    request = Request(options.image, options.prompt, options.negative_prompt, seed=options.seed, fit="stretch", noise="torch", **settings)
    machine = {"device": options.device, "dtype": options.dtype, "vae_tiling": options.vae_tiling, "keep_steps": options.keep_steps}
    print(record(options.source, options.trace, request, **machine))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Runs every stage in JAX, fed with the reference's input and freely from the start. Exits 1 where one is not the reference's."""
    from .targets import beside, check_target
    from .verify import verify

    if options.json:
        check_target("json", options.json, tuple(path for path in (options.trace, options.truth) if path))
    report = verify(options.checkpoint, options.trace, options.truth)
    print("\n".join(report.lines(options.markdown)))
    if options.json:
        with beside(options.json) as part:
            part.write_text(report.json() + "\n", encoding="utf-8")
    return 1 if report.faults else 0


def _inspect(options: argparse.Namespace) -> int:
    """Says what a folder holds, or what a LoRA file changes of a model. Exits 1 where a tensor has no place or is missing, of a LoRA where
    sampling would refuse it."""
    from .inspection import lora_report, report

    if options.model is None and options.source.is_file():
        raise ValueError(f"--model must name the model that a LoRA is for: got {options.source} alone")
    lines, whole = lora_report(options.source, options.model, options.keys) if options.model else report(options.source, options.keys)
    print("\n".join(lines))
    return 0 if whole else 1


def _compare(options: argparse.Namespace) -> int:
    """Prints PSNR and SSIM of two videos and their worst frame, counted from 0. The video's PSNR is that of the mean squared error over all
    frames, "inf" where they are equal; its SSIM is the mean over frames, by Wang et al.'s window. mp4 and gif are lossy and
    measure their codec too; folders of png frames measure the models alone. Needs pip install 'cogi2v-jax[compare]'."""
    from .compare import report

    print("\n".join(report(options.a, options.b, options.curve, options.json, _progress)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
