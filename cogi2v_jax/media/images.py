"""Picture files and arrays -> pixels."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..request import FITS

MAX_SIDE = 32768
# Where PIL refuses a file as a decompression bomb; here for pixels of every origin.
MAX_PIXELS = 178_956_970
# PIL's own conversion clips these to 0..255.
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def read_image(source: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """A picture as an upright 8-bit RGB image in memory, from a path, a PIL image or an array
    (channels last).

    Arrays are uint8 or float in [0, 1], [h w] or [h w 1|3|4]. EXIF orientation is applied, an
    animated file gives its first frame, 16 bits are scaled to 8, transparency is laid on white:
    what viewers show, where dropping alpha would bare colours hidden under it. Raises
    FileNotFoundError for a missing path, ValueError for what is not a whole picture of sane size
    (checked before decoding).
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "a PIL image")
    if not isinstance(source, str | os.PathLike):
        return _rgb(_from_array(np.asarray(source)), "an array")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"image must be an existing file: got {path}")
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(
            f"image must be a picture file: got {path}, which is {'empty' if path.is_file() else 'a folder or device'}"
        )
    with decoding("image", path):
        image = Image.open(path)
    with image:
        return _rgb(image, path)


def fit_image(image: Image.Image, height: int, width: int, fit: str) -> np.ndarray:
    """An RGB image as float32 pixels [h w 3] in [-1, 1], resampled once (Lanczos) to height x
    width.

    `stretch` ignores the aspect: the reference (diffusers' VideoProcessor.preprocess) bit for bit.
    `crop` keeps the aspect and cuts equally from both ends; `pad` keeps it and centres on black. On
    the target's own aspect all agree. ValueError for bad arguments.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be RGB: got {image.mode}; read_image makes it so")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1: got {height}x{width}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}: got {fit!r}")
    # The image's sides at the target's aspect. Multiplied first, so that equal aspects give exactly
    # equal sides.
    same_width, same_height = image.height * width / height, image.width * height / width
    box, inner = (0, 0, *image.size), (width, height)
    if fit == "crop":
        x, y = max(0, image.width - same_width) / 2, max(0, image.height - same_height) / 2
        box = (x, y, image.width - x, image.height - y)
    if fit == "pad":
        inner = (
            round(min(1, image.width / same_width) * width) or 1,
            round(min(1, image.height / same_height) * height) or 1,
        )
    image = image.resize(inner, Image.Resampling.LANCZOS, box)
    padded = Image.new("RGB", (width, height))
    padded.paste(image, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(padded, np.float32) / 255 * 2 - 1


@contextmanager
def decoding(what: str, name: str | os.PathLike) -> Iterator[None]:
    """The many exceptions for a broken file become one ValueError, and PIL's warnings stay
    inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{what} must have at most {MAX_PIXELS} pixels: got {name} ({error}); scale it down"
            ) from error
        except Exception as error:
            raise ValueError(
                f"{what} must be whole and in a common format: got {name} ({error}); try saving it anew"
            ) from error


def _rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    if (
        not 1 <= min(image.size) <= max(image.size) <= MAX_SIDE
        or image.width * image.height > MAX_PIXELS
    ):
        size = f"{image.width}x{image.height}"
        raise ValueError(
            f"image must have sides of 1 to {MAX_SIDE} and at most {MAX_PIXELS} pixels: got {size} in {name}"
        )
    with decoding("image", name):
        image = image.copy()  # the caller's stays as it is
        # In place PIL turns first and rewrites the EXIF block after, which fails for many a
        # camera's.
        with suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode not in DEEP_MODES:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            # An orientation or a transparent colour left here would be applied again.
            image.info.clear()
            return image
        values = np.asarray(image, np.float32)
    # Integers hold 16 bits. Floats hold 0..1, as TIFF writers leave them, or 0..255, as PIL's own
    # convert("F") does.
    top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= top):
        raise ValueError(
            f"image of mode {image.mode} must hold 0..{top}: got {values.min():g}..{values.max():g} in {name}"
        )
    return Image.fromarray(np.rint(values / top * 255).astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if (
        array.ndim not in (2, 3)
        or array.shape[2:] not in ((), (1,), (3,), (4,))
        or 0 in array.shape
    ):
        raise ValueError(
            f"image array must be [h w] or [h w 1|3|4], channels last, no side 0: got {list(array.shape)}"
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # so written that NaN fails too
            raise ValueError(
                f"float image must lie in [0, 1]: got {array.min():g}..{array.max():g}; rescale it"
            )
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"image array must be uint8, or float in [0, 1]: got {array.dtype}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
