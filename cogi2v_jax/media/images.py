"""Picture files and arrays -> pixels."""

import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..disk import A_POINTER, is_pointer
from ..settings import FITS
from .colours import NoColour, is_raw, to_srgb
from .download import fetch, file_name, path_or_address, shown
from .png import is_cut

MAX_SIDE = 32768
# PIL's limit for files, above which it suspects a decompression bomb; here for arrays too.
MAX_PIXELS = 178_956_970
HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands of such files


def read_image(source: Any) -> Image.Image:
    """A picture as an upright 8-bit sRGB image in memory: from a path, a http, https, data or
    file address, the bytes of a file, an open file, a PIL image or an array (channels last).

    Arrays are unsigned integers, or floats in [0, 1], [h w] or [h w 1|3|4]. An animated file gives
    its first frame; `to_srgb` says how colours are read. Raises FileNotFoundError for a missing
    path, OSError for an address that can't be fetched, ValueError for another address, a broken
    picture and a size beyond the limits (checked before decoding).
    """
    if isinstance(source, Image.Image):
        return _rgb(source, "a PIL image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "bytes")
    if hasattr(source, "read"):
        start = source.tell() if source.seekable() else None
        data = source.read()
        if start is not None:
            source.seek(start)  # several videos of a batch may begin with one open file
        if not isinstance(data, bytes):
            raise ValueError(f"image must be a file opened as binary: got {type(data).__name__}")
        return _decode(data, str(getattr(source, "name", "a file")))
    if isinstance(source, str):
        source = path_or_address(source)
    if isinstance(source, str):
        return _decode(fetch(source), shown(source))
    if not isinstance(source, os.PathLike):
        return _rgb(_from_array(np.asarray(source)), "an array")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"image must be an existing file: got {path}")
    if not path.is_file() or path.stat().st_size == 0:
        what = "empty" if path.is_file() else "a folder or device"
        raise ValueError(f"image must be a picture file: got {path}, which is {what}")
    return _decode(path, str(path))


def local_copy(source: Path | str, folder: Path) -> Path:
    """The path of a picture: itself, or of a copy in a new folder in `folder` where `source` is an
    address. Raises as `read_image`."""
    if isinstance(source, Path):
        read_image(source)
        return source
    data = fetch(source)
    _decode(data, shown(source))
    copy = Path(tempfile.mkdtemp(dir=folder), file_name(source))
    copy.write_bytes(data)
    return copy


def _decode(source: Path | bytes, name: str) -> Image.Image:
    """A picture file, or its bytes."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        _check_head(file.read(32), name)
        file.seek(0)
        with decoding("image", name):
            image = Image.open(file)
        with image:
            seen = _rgb(image, name)
        with decoding("image", name):
            if image.format == "PNG" and is_cut(file):
                raise OSError("image file is truncated")
        return seen


def _check_head(head: bytes, name: str) -> None:
    """Raises ValueError for a file that begins with `head` and can't be read here."""
    if head[4:8] == b"ftyp" and head[8:12] in HEIF and b"avif" not in head:
        if not find_spec("pillow_heif"):
            way = "pip install pillow-heif, or save it as JPEG"
            raise ValueError(
                f"image must be in a format that is read here: got HEIC in {name}; {way}"
            )
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    if is_pointer(head):
        raise ValueError(f"image must be a picture file: got {name}, {A_POINTER}")


def fit_image(image: Image.Image, height: int, width: int, fit: str) -> np.ndarray:
    """An RGB image as float32 pixels [h w 3] in [-1, 1], resampled once (Lanczos) to height x
    width.

    `stretch` ignores the aspect ratio, bit for bit as the reference (diffusers'
    VideoProcessor.preprocess). `crop` keeps it and cuts equally from both ends, and so does `auto`,
    for which the size was chosen by the image; `pad` keeps it and centres the image on black. For
    an image of the target's ratio all are the same. Raises ValueError for bad arguments.
    """
    if image.mode != "RGB":
        raise ValueError(f"image must be RGB: got {image.mode}; read_image makes it so")
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1: got {height}x{width}")
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}: got {fit!r}")
    box = (0, 0, *image.size)
    if fit in ("crop", "auto"):
        same_width, same_height = _at_ratio(image.size, height, width)
        x, y = max(0, image.width - same_width) / 2, max(0, image.height - same_height) / 2
        box = (x, y, image.width - x, image.height - y)
    left, top, right, bottom = (
        padded_box(image.size, height, width) if fit == "pad" else (0, 0, width, height)
    )
    image = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box)
    padded = Image.new("RGB", (width, height))
    padded.paste(image, (left, top))
    return np.asarray(padded, np.float32) / 255 * 2 - 1


def padded_box(size: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Where `pad` puts an image of `size` (width, height): left, top, right, bottom, in pixels of
    the video."""
    same_width, same_height = _at_ratio(size, height, width)
    inner_width = round(min(1, size[0] / same_width) * width) or 1
    inner_height = round(min(1, size[1] / same_height) * height) or 1
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    return left, top, left + inner_width, top + inner_height


def _at_ratio(size: tuple[int, int], height: int, width: int) -> tuple[float, float]:
    """The sides (width, height) that an image has at the target's ratio, keeping the other one.
    Multiplied before the division, so that equal ratios give exactly equal sides."""
    return size[1] * width / height, size[0] * height / width


@contextmanager
def decoding(what: str, name: str | os.PathLike) -> Iterator[None]:
    """Raises one ValueError for the many exceptions that a broken file causes, and silences PIL's
    warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except NoColour:
            raise
        except Image.DecompressionBombError as error:
            got = f"{name} ({error}); scale it down"
            raise ValueError(f"{what} must have at most {MAX_PIXELS} pixels: got {got}") from error
        except Exception as error:
            # PIL's own words name an object in memory.
            why = "unknown format" if isinstance(error, UnidentifiedImageError) else error
            got = f"{name} ({why}); try saving it anew"
            raise ValueError(f"{what} must be whole and in a common format: got {got}") from error


def _rgb(image: Image.Image, name: str | os.PathLike) -> Image.Image:
    width, height = image.size
    if not 1 <= min(width, height) <= max(width, height) <= MAX_SIDE or width * height > MAX_PIXELS:
        rule = f"sides of 1 to {MAX_SIDE} and at most {MAX_PIXELS} pixels"
        raise ValueError(f"image must have {rule}: got {width}x{height} in {name}")
    with decoding("image", name):
        if is_raw(image):
            way = "export it as TIFF or JPEG first"
            raise NoColour(f"image must be developed: got {name}, a raw photo; {way}")
        return to_srgb(image)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim < 2 or array.shape[2:] not in ((), (1,), (3,), (4,)) or 0 in array.shape:
        if array.dtype == object or array.ndim < 2:
            kinds = "a path, an address, bytes, an open file, a PIL image or an array"
            raise ValueError(f"image must be {kinds}: got {type(array.flat[0]).__name__}")
        rule = "[h w] or [h w 1|3|4], channels last, no side 0"
        raise ValueError(f"image array must be {rule}: got {list(array.shape)}")
    if array.dtype in (np.uint16, np.uint32):
        array = array / np.iinfo(array.dtype).max
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # also where there is a NaN
            got = f"{array.min():g}..{array.max():g}"
            raise ValueError(f"float image must be in [0, 1]: got {got}; rescale it")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        rule = "unsigned integers, or float in [0, 1]"
        raise ValueError(f"image array must be {rule}: got {array.dtype}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
