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
# PIL's limit for files, above which it suspects a decompression bomb; here for arrays too.
MAX_PIXELS = 178_956_970
# PIL's own conversion clips these to 0..255.
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def read_image(source: str | os.PathLike | Image.Image | np.ndarray) -> Image.Image:
    """A picture as an upright 8-bit RGB image in memory, from a path, a PIL image or an array
    (channels last).

    Arrays are uint8 or float in [0, 1], [h w] or [h w 1|3|4]. EXIF orientation is applied, an
    animated file gives its first frame, 16 bits are scaled to 8, and transparency is blended with
    white, as viewers show it; without alpha, hidden colours would appear. Raises FileNotFoundError
    for a missing path, ValueError for a broken picture and for a size beyond the limits (checked
    before decoding).
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "a PIL image")
    if not isinstance(source, str | os.PathLike):
        return _rgb(_from_array(np.asarray(source)), "an array")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"image must be an existing file: got {path}")
    if not path.is_file() or path.stat().st_size == 0:
        what = "empty" if path.is_file() else "a folder or device"
        raise ValueError(f"image must be a picture file: got {path}, which is {what}")
    with decoding("image", path):
        image = Image.open(path)
    with image:
        return _rgb(image, path)


def fit_image(image: Image.Image, height: int, width: int, fit: str) -> np.ndarray:
    """An RGB image as float32 pixels [h w 3] in [-1, 1], resampled once (Lanczos) to height x
    width.

    `stretch` ignores the aspect ratio, bit for bit as the reference (diffusers'
    VideoProcessor.preprocess). `crop` keeps it and cuts equally from both ends; `pad` keeps it and
    centres the image on black. For an image of the target's ratio all are the same. Raises
    ValueError for bad arguments.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be RGB: got {image.mode}; read_image makes it so")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1: got {height}x{width}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}: got {fit!r}")
    # The image's sides at the target's ratio. Multiplied before the division, so that equal ratios
    # give exactly equal sides.
    same_width, same_height = image.height * width / height, image.width * height / width
    box, inner = (0, 0, *image.size), (width, height)
    if fit == "crop":
        x, y = max(0, image.width - same_width) / 2, max(0, image.height - same_height) / 2
        box = (x, y, image.width - x, image.height - y)
    if fit == "pad":
        scales = min(1, image.width / same_width), min(1, image.height / same_height)
        inner = round(scales[0] * width) or 1, round(scales[1] * height) or 1
    image = image.resize(inner, Image.Resampling.LANCZOS, box)
    padded = Image.new("RGB", (width, height))
    padded.paste(image, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return np.asarray(padded, np.float32) / 255 * 2 - 1


@contextmanager
def decoding(what: str, name: str | os.PathLike) -> Iterator[None]:
    """Raises one ValueError for the many exceptions that a broken file causes, and silences PIL's
    warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Image.DecompressionBombError as error:
            got = f"{name} ({error}); scale it down"
            raise ValueError(f"{what} must have at most {MAX_PIXELS} pixels: got {got}") from error
        except Exception as error:
            got = f"{name} ({error}); try saving it anew"
            raise ValueError(f"{what} must be whole and in a common format: got {got}") from error


def _rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    width, height = image.size
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE or width * height > MAX_PIXELS:
        rule = f"sides of 1 to {MAX_SIDE} and at most {MAX_PIXELS} pixels"
        raise ValueError(f"image must have {rule}: got {width}x{height} in {name}")
    with decoding("image", name):
        image = image.copy()  # the caller's stays as it is
        # In place, PIL rotates the image before it rewrites the EXIF block, which fails for that of
        # many cameras.
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
    # Integers are 16 bits. Floats are in 0..1, as TIFF writers have it, or in 0..255, as PIL's
    # convert("F") has it.
    top = 65535 if image.mode != "F" else 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= top):
        got = f"{values.min():g}..{values.max():g} in {name}"
        raise ValueError(f"image of mode {image.mode} must hold 0..{top}: got {got}")
    return Image.fromarray(np.rint(values / top * 255).astype(np.uint8)).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)) or 0 in array.shape:
        rule = "[h w] or [h w 1|3|4], channels last, no side 0"
        raise ValueError(f"image array must be {rule}: got {list(array.shape)}")
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also where there is a NaN
            got = f"{array.min():g}..{array.max():g}"
            raise ValueError(f"float image must be in [0, 1]: got {got}; rescale it")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"image array must be uint8, or float in [0, 1]: got {array.dtype}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
