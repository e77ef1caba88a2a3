"""The colours that a viewer shows: any picture as 8-bit sRGB without transparency."""

import io
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

# PIL's own conversion clips the values of these modes to 0..255.
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
# Tags of TIFF, and values of theirs: bits of a sample, whether it has a sign, and what it means;
# the kind of a picture; the mark of a raw photo.
BITS, FORMAT, PHOTOMETRIC, KIND, DNG = 258, 339, 262, 254, 50706
SIGNED, WHITE_IS_ZERO, THUMBNAIL = 2, 0, 1
# The white of a mode where no file says another. PIL holds 16 bits of PNG and PNM files in "I", and
# its convert("F") makes 0..255; float files have 1 for white.
WHITE = {"I": 65535, "F": 255}
FLOAT_FILES = ("TIFF", "PPM")
# What PIL multiplies the samples of some PNG files by, but not their transparent colour.
FACTORS = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
# What the numbers of a mode are; those of all other modes are RGB.
KINDS = dict.fromkeys(("1", "L", "LA", "La", *DEEP_MODES), "L") | {"CMYK": "CMYK"}
STEPS = range(0, 256, 17)  # of the colours that a profile is tried on


class NoColour(ValueError):
    """Values that have no colour, in one line."""


def to_srgb(image: Image.Image) -> Image.Image:
    """An upright RGB image: EXIF orientation is applied, deep values are scaled to 8 bits, an ICC
    profile is converted to sRGB, and transparency is blended with white; without alpha, hidden
    colours would appear. Raises NoColour for values that no file format explains."""
    profile, kind = image.info.get("icc_profile"), KINDS.get(image.mode, "RGB")
    levels = levels_of(image) if image.mode in DEEP_MODES else None
    hidden = hidden_colour(image)
    image = image.copy()  # the caller's stays as it is
    if hidden is not None:
        image.info["transparency"] = hidden
    # In place, PIL rotates the image before it rewrites the EXIF block, which fails for that of
    # many cameras.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if levels:
        image = scale(image, *levels)
    alpha = None
    if image.mode == "La":  # which PIL converts to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    # An orientation or a transparent colour left here would be applied again.
    image.info.clear()
    colours = convert_profile(image, kind, profile) if profile else image.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return colours.convert("RGB")


def is_raw(image: Image.Image) -> bool:
    """Whether it is a raw photo: PIL reads the small picture that comes first in its file."""
    return bool(_tiff(image, DNG) or _tiff(image, KIND) & THUMBNAIL)


def levels_of(image: Image.Image) -> tuple[int, int]:
    """The values of black and of white of a deep image, as its file format has them: never guessed
    from its values."""
    bits = _tiff(image, BITS)
    if image.mode == "F":
        white = 1 if image.format in FLOAT_FILES else WHITE["F"]
    else:
        white = 2 ** (bits - (_tiff(image, FORMAT) == SIGNED)) - 1 if bits else WHITE["I"]
    return (white, 0) if _tiff(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO else (0, white)


def _tiff(image: Image.Image, tag: int, missing: int = 0) -> int:
    """The first number of a TIFF file's tag; `missing` where there is none."""
    value = getattr(image, "tag_v2", {}).get(tag, missing)
    return int(value[0] if isinstance(value, tuple | bytes) else value)


def hidden_colour(image: Image.Image) -> Any:
    """The transparent colour of an image, as its pixels have it; None where there is none."""
    hidden, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    factor = FACTORS.get(str(tiles[0][3]), 1) if tiles else 1  # none once the pixels were read
    if isinstance(hidden, tuple):
        return tuple(int(value * factor) for value in hidden)
    return int(hidden * factor) if isinstance(hidden, int) else hidden


def scale(image: Image.Image, black: int, white: int) -> Image.Image:
    """A deep image as 8-bit grey, with alpha where it has a transparent value. What is beyond white
    or black is clipped."""
    values = np.asarray(image, np.float64)
    if image.mode == "I" and max(black, white) > 2**31:
        values = values % 2**32  # PIL reads unsigned numbers as signed ones
    if not np.isfinite(values).all():
        raise NoColour("image must hold finite numbers: got others")
    if image.mode == "F" and white == WHITE["F"] and 0 < values.max() <= 1:
        way = "pass the array itself"
        rule = "image of mode F must hold 0..255, as convert('F') makes it"
        raise NoColour(f"{rule}: got at most {values.max():g}; {way}")
    levels = np.clip((values - black) / (white - black), 0, 1)
    grey = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    if isinstance(hidden := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    return grey


def convert_profile(image: Image.Image, kind: str, icc: bytes) -> Image.Image:
    """An 8-bit image of a profile's colours as RGB. A profile that is broken or not for colours of
    this `kind` is ignored, as viewers do, and one of sRGB changes nothing."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        description: Any = profile.profile
        if description.xcolor_space.strip() != {"L": "GRAY"}.get(kind, kind):
            return image.convert("RGB")
        convert = ImageCms.buildTransform(profile, srgb, kind, "RGB")
        if kind == "RGB" and is_identity(convert):
            return image.convert("RGB")
        shown: Any = ImageCms.applyTransform(image.convert(kind), convert)
        return shown
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")


def is_identity(convert: ImageCms.ImageCmsTransform) -> bool:
    """Whether a conversion changes no RGB colour by more than 1, tried on a grid of them."""
    grid = np.stack(np.meshgrid(STEPS, STEPS, STEPS), -1).astype(np.uint8)
    grid = grid.reshape(len(STEPS), -1, 3)
    shown: Any = ImageCms.applyTransform(Image.fromarray(grid), convert)
    return bool(np.abs(np.asarray(shown, int) - grid).max() <= 1)
