"""How a video is sampled: every setting with the values that it takes. Checks, command-line flags,
recipes and traces are made from these fields."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

# What the image's latents are multiplied by. Three code bases feed the 1.5 network at three scales;
# the reference's is the default.
IMAGE_LATENT_SCALES = ("reference", "sat", "trainer")
# How the image is fitted to the size of the video; for auto the size is fitted to the image first.
FITS = ("crop", "pad", "stretch", "auto")


class Kind(NamedTuple):
    """The values that some settings take."""

    rule: str  # follows "must be"
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any]  # from numpy's type, or from a flag's text
    names: tuple[str, ...] = ()  # all values, where they can be listed


def is_real(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_name(value: Any, names: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in names  # an array has no single truth value


def one_of(*names: str) -> Kind:
    rule = f"{', '.join(names[:-1])} or {names[-1]}"
    return Kind(rule, lambda value: _is_name(value, names), str, names)


# The shapes of arrays are 32 or 64 bits wide.
COUNT = Kind(
    "a positive integer below 2**31", lambda value: is_whole(value) and 0 < value < 2**31, int
)
# A GIF can hold a frame for at most 655 seconds, and no screen shows more than 240 a second.
RATE = Kind("a number from 0.01 to 240", lambda v: is_real(v) and 0.01 <= v <= 240, float)
SCALE = Kind("a finite number and not negative", lambda v: is_real(v) and v >= 0, float)
SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SWITCH = Kind("true or false", lambda value: isinstance(value, (bool, np.bool_)), bool)
LATENT_SCALE = Kind(
    f"{', '.join(IMAGE_LATENT_SCALES)} or a positive number",
    lambda value: _is_name(value, IMAGE_LATENT_SCALES) or (is_real(value) and value > 0),
    lambda value: value if value in IMAGE_LATENT_SCALES else float(value),
)


def _numbers(value: Any) -> tuple[float, ...]:
    """Numbers of a list, or of a text with commas."""
    return tuple(map(float, value.split(",") if isinstance(value, str) else value))


GUIDANCE = Kind(
    "a finite number and not negative, or one for each step",
    lambda v: SCALE.fits(v) or (is_sequence(v) and len(v) > 0 and all(map(SCALE.fits, v))),
    lambda v: _numbers(v) if is_sequence(v) or "," in str(v) else float(v),
)
INTERVAL = Kind(
    "A:B with 0 <= A < B <= 1, shares of the steps",
    lambda v: is_sequence(v) and len(v) == 2 and all(map(is_real, v)) and 0 <= v[0] < v[1] <= 1,
    lambda v: _numbers(v.replace(":", ",") if isinstance(v, str) else v),
)
SHARE = Kind("a number from 0 to 1", lambda v: is_real(v) and 0 <= v <= 1, float)
PART = Kind("a number above 0 and at most 1", lambda v: is_real(v) and 0 < v <= 1, float)
SEGMENTS = Kind("an integer from 0 to 999", lambda v: is_whole(v) and 0 <= v < 1000, int)


def is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and np.ndim(value) == 1


def _setting(kind: Kind, official: bool = True, neutral: Any = None, **flag: str) -> Any:
    """A field with its values, whether the official script has its flag, what every checkpoint has
    as its default (where that is not the checkpoint's to say: what the reference does), and what
    `--help` shows for it."""
    return field(metadata={"kind": kind, "official": official, "neutral": neutral, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`Request` has each of them once more, where None leaves it to the checkpoint."""

    height: int = _setting(COUNT, metavar="PX", help="multiple of 16")
    width: int = _setting(COUNT, metavar="PX", help="multiple of 16")
    num_frames: int = _setting(COUNT, metavar="N", help="8k+1")
    fps: float = _setting(RATE, metavar="N")
    num_inference_steps: int = _setting(COUNT, metavar="N")
    guidance_scale: float | tuple[float, ...] = _setting(
        GUIDANCE,
        metavar="X",
        help="1 or less: no guidance, in half the time; X,X,...: one for each step",
    )
    use_dynamic_cfg: bool = _setting(SWITCH, help="guidance that varies over the steps")
    scheduler: str = _setting(one_of("ddim", "dpm", "dpm2m", "dpm3m", "deis"))
    fit: str = _setting(
        one_of(*FITS),
        official=False,
        help="how the image is fitted to the size; stretch is the reference's way, auto fits the "
        "size to the image",
    )
    image_latent_scale: str | float = _setting(
        LATENT_SCALE,
        official=False,
        metavar="X",
        help="reference, sat, trainer or a number; sat helps 1.5 videos that start too bright",
    )
    noise: str = _setting(
        one_of("jax", "torch"),
        official=False,
        help="whose random numbers a seed means; torch draws those of the official script",
    )
    motion: float = _setting(
        SHARE,
        official=False,
        neutral=0.0,
        metavar="X",
        help="0 to 1: more of it, by blurring the image's latents in the first steps",
    )
    noise_aug: float = _setting(
        SCALE,
        official=False,
        neutral=0.0,
        metavar="X",
        help="noise on the image, as in training (about 0.05): less bound to it",
    )
    strength: float = _setting(
        PART,
        official=False,
        neutral=0.8,
        metavar="X",
        help="with --video: the share of the steps that are run",
    )
    loop: bool = _setting(
        SWITCH, official=False, neutral=False, help="a video that ends where it begins"
    )
    extend: int = _setting(
        SEGMENTS,
        official=False,
        neutral=0,
        metavar="N",
        help="go on N times from the last frames",
    )
    overlap: int = _setting(
        COUNT,
        official=False,
        neutral=1,
        metavar="N",
        help="the frames, 4k+1, from which --extend goes on",
    )
    match_colour: bool = _setting(
        SWITCH,
        official=False,
        neutral=True,
        help="with --extend: as the segment before",
    )
    guidance_method: str = _setting(
        one_of("cfg", "apg", "cfg_zero"),
        official=False,
        neutral="cfg",
        metavar="NAME",
        help="how the two predictions of a step are combined: cfg, apg or cfg_zero",
    )
    guidance_interval: tuple[float, float] = _setting(
        INTERVAL,
        official=False,
        neutral=(0.0, 1.0),
        metavar="A:B",
        help="the share of the steps that are guided; the others take half the time",
    )
    guidance_skip: float = _setting(
        SCALE,
        official=False,
        neutral=0.0,
        metavar="X",
        help="do not guide steps whose guidance is this near to 1",
    )
    image_guidance: float = _setting(
        SCALE,
        official=False,
        neutral=1.0,
        metavar="X",
        help="more than 1 keeps nearer to the image, with a third prediction in each step",
    )


KINDS: dict[str, Kind] = {one.name: one.metadata["kind"] for one in dataclasses.fields(Settings)}
SETTINGS = tuple(KINDS)
NEUTRAL: dict[str, Any] = {
    one.name: one.metadata["neutral"]
    for one in dataclasses.fields(Settings)
    if one.metadata["neutral"] is not None
}


def misfits(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values of settings."""
    return [
        f"{name} must be {kind.rule}: got {settings[name]!r}"
        for name, kind in KINDS.items()
        if name in settings and not kind.fits(settings[name])
    ]


def parse_setting(name: str, value: Any) -> Any:
    """The value of a setting in a file: of JSON, or a text as its flag takes it, and true or false
    for a switch. Raises ValueError."""
    kind, given = KINDS[name], value
    if isinstance(value, str):
        try:
            text = value.strip()
            value = SWITCHES[text.lower()] if kind is SWITCH else kind.convert(text)
        except (ValueError, KeyError):
            raise ValueError(f"{name} must be {kind.rule}: got {given!r}") from None
    if not kind.fits(value):
        raise ValueError(f"{name} must be {kind.rule}: got {given!r}")
    return kind.convert(value)
