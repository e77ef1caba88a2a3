"""Command-line arguments of a request, for every program that takes one."""

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

from .request import FITS, IMAGE_LATENT_SCALES, NOISES


def add_settings(parser: argparse.ArgumentParser, ours: bool = True) -> None:
    """The flags of `Request`'s settings, named as the official script names them; those that only
    we have, if they are asked for."""
    how = parser.add_argument_group("how to sample (default: what the checkpoint was made for)")
    how.add_argument("--height", metavar="PX", type=int, help="multiple of 16")
    how.add_argument("--width", metavar="PX", type=int, help="multiple of 16")
    how.add_argument("--num_frames", metavar="N", type=int, help="8k+1")
    how.add_argument("--fps", metavar="N", type=float)
    how.add_argument("--num_inference_steps", metavar="N", type=int)
    how.add_argument(
        "--guidance_scale",
        metavar="X",
        type=float,
        help="1 or less samples without guidance, in half the time",
    )
    how.add_argument(
        "--use_dynamic_cfg",
        action=argparse.BooleanOptionalAction,
        help="guidance that varies over the steps",
    )
    how.add_argument("--scheduler", choices=["dpm", "ddim"])
    if not ours:
        return
    how.add_argument(
        "--fit", choices=FITS, help="how the image meets the size; stretch is the reference's way"
    )
    how.add_argument(
        "--image_latent_scale",
        metavar="X",
        type=_scale,
        help=f"{', '.join(IMAGE_LATENT_SCALES)} or a number; sat helps 1.5 videos that start too bright",
    )
    how.add_argument(
        "--noise",
        choices=NOISES,
        help="whose random numbers a seed means; torch draws those of the official script",
    )


def weighted(loras: Iterable[object]) -> list[tuple[Path, float]]:
    """Files, as FILE or FILE:WEIGHT or pairs of both, and their weights. Raises FileNotFoundError
    for no file or folder, ValueError for a weight that is none."""
    return [_weighted(*lora) if isinstance(lora, tuple) else _weighted(str(lora)) for lora in loras]


def _weighted(file: object, weight: object = None) -> tuple[Path, float]:
    path, (head, _, tail) = Path(str(file)).expanduser(), str(file).rpartition(":")
    if weight is None and head and not path.exists():  # a name may have a colon of its own
        path, weight = Path(head).expanduser(), tail
    if not path.exists():
        raise FileNotFoundError(f"lora must be an existing file or folder: found no {path}")
    try:
        number = float(1.0 if weight is None else weight)  # pyright: ignore[reportArgumentType] (what is no number raises)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the weight of lora {path} must be a finite number: got {weight}")
    return path, number


def _scale(text: str) -> str | float:
    try:
        return text if text in IMAGE_LATENT_SCALES else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(IMAGE_LATENT_SCALES)} or a number: got {text!r}"
        ) from None
