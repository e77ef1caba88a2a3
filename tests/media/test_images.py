"""Reading pictures of every kind, and what is refused."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from pictures import close, one_line, picture
from PIL import Image

from cogi2v_jax.media.images import read_image


def pixels(image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def png_file(width, height, rows=b"\0", bits=8, kind=2, hidden=None, interlaced=0) -> bytes:
    """A PNG file of packed rows, with a transparent colour."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)) if hidden else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "ppm"])
def test_a_lossless_file_is_read_as_it_was_written(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(picture()).save(path, lossless=True)
    np.testing.assert_array_equal(pixels(read_image(path)), picture())
    np.testing.assert_array_equal(pixels(read_image(str(path))), picture())


@pytest.mark.parametrize(
    ("width", "height", "bits", "kind", "interlaced", "size"),
    [
        (8, 8, 8, 2, 0, 8 * (1 + 24)),
        (3, 2, 1, 0, 0, 2 * (1 + 1)),
        (5, 9, 16, 6, 0, 9 * (1 + 40)),
        (1, 1, 8, 2, 1, 1 + 3),
        (5, 3, 8, 0, 1, 2 + 2 + 0 + 2 + 4 + 2 * 3 + 6),
    ],
)
def test_a_png_file_is_whole_with_all_bytes_of_its_rows(
    width, height, bits, kind, interlaced, size
):
    kinds = {"bits": bits, "kind": kind, "interlaced": interlaced}
    assert read_image(png_file(width, height, bytes(size), **kinds)).size == (width, height)
    with pytest.raises(ValueError, match="must be whole"):
        read_image(png_file(width, height, bytes(size - 1), **kinds))


def test_a_jpeg_is_read_closely(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "x.jpg", quality=95)
    assert close(pixels(read_image(tmp_path / "x.jpg")), picture()) < 3


def test_the_file_is_closed_and_the_image_lives_on(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(picture()).save(path)
    image = read_image(path)
    path.unlink()
    np.testing.assert_array_equal(pixels(image.copy()), picture())


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "YCbCr", "CMYK", "HSV"])
def test_colour_modes_keep_their_colours(mode):
    assert close(pixels(read_image(Image.fromarray(picture()).convert(mode))), picture()) < 3


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_modes_become_three_equal_channels(mode):
    grey = Image.fromarray(picture()).convert(mode)
    expected = np.asarray(grey.convert("L"))
    assert expected.max() > expected.min()
    np.testing.assert_array_equal(pixels(read_image(grey)), np.repeat(expected[..., None], 3, 2))


def test_a_palette_image_shows_its_palette():
    image = Image.fromarray(picture()).quantize(200)
    np.testing.assert_array_equal(pixels(read_image(image)), np.asarray(image.convert("RGB")))
    assert close(pixels(read_image(image)), picture()) < 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_transparent_pixels_become_white_not_the_colour_hidden_under_them(mode):
    rgba = np.full((4, 6, 4), (200, 10, 10, 255), np.uint8)
    rgba[:, :2] = (0, 0, 0, 0)
    rgba[:, 2:4] = (0, 0, 0, 128)
    seen = pixels(read_image(Image.fromarray(rgba).convert(mode)))
    np.testing.assert_array_equal(seen[:, :2], 255)
    np.testing.assert_allclose(seen[:, 2:4].astype(int), 127, atol=1)
    np.testing.assert_array_equal(
        seen[:, 4:], np.asarray(Image.fromarray(rgba).convert(mode).convert("RGBA"))[:, 4:, :3]
    )


def test_opaque_alpha_changes_nothing():
    image = Image.fromarray(picture())
    image.putalpha(255)
    np.testing.assert_array_equal(pixels(read_image(image)), picture())


@pytest.mark.parametrize("transparency", [0, b"\0"])
def test_a_palette_file_with_transparency_is_blended_with_white(tmp_path, transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 0, 0])
    image.paste(0, (0, 0, 2, 4))
    image.save(tmp_path / "x.png", transparency=transparency)
    seen = pixels(read_image(tmp_path / "x.png"))
    np.testing.assert_array_equal(seen[:, :2], 255)
    np.testing.assert_array_equal(seen[:, 2:], np.full((4, 2, 3), (250, 0, 0)))


def test_a_colour_keyed_png_is_blended_with_white(tmp_path):
    Image.fromarray(np.full((2, 2, 3), (1, 2, 3), np.uint8)).save(
        tmp_path / "x.png", transparency=(1, 2, 3)
    )
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "x.png")), 255)


@pytest.mark.parametrize(
    ("bits", "kind", "samples", "others"),
    [
        (2, 0, bytes([0b10_01_00_11]), [85, 0, 255]),
        (4, 0, bytes([0xA5, 0x0F]), [85, 0, 255]),
        (16, 0, struct.pack(">4H", 6000, 6001, 0, 65535), [23, 0, 255]),
        (
            16,
            2,
            struct.pack(">12H", *[6000] * 3, *[9000] * 3, *[0] * 3, *[65535] * 3),
            [35, 0, 255],
        ),
    ],
)
def test_a_hidden_colour_of_any_depth_is_blended_with_white(bits, kind, samples, others):
    hidden = {2: [2], 4: [10], 16: [6000] * (1 + kind)}[bits]
    seen = pixels(read_image(png_file(4, 1, b"\0" + samples, bits, kind, hidden)))
    assert seen[0, :, 0].tolist() == [255, *others]


def test_grey_with_premultiplied_alpha_is_blended_with_white():
    image = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 51)])
    assert np.abs(pixels(read_image(image.convert("La"))).astype(int) - 224).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight_not_clipped(tmp_path, suffix):
    grey = picture()[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(
        pixels(read_image(tmp_path / f"x.{suffix}")), np.repeat(grey[..., None], 3, 2)
    )


ROTATIONS = {  # orientation -> how the camera stored an upright picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
def test_an_exif_rotated_photo_is_rotated_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(ROTATIONS[orientation](picture())))
    stored.save(tmp_path / f"x.{suffix}", exif=exif, lossless=True, quality=95)
    once = read_image(tmp_path / f"x.{suffix}")
    assert close(pixels(once), picture()) <= (3 if suffix == "jpg" else 0)
    np.testing.assert_array_equal(pixels(read_image(once)), pixels(once))


def test_a_broken_exif_block_is_ignored(tmp_path):
    Image.fromarray(picture()).save(
        tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"
    )
    assert read_image(tmp_path / "x.jpg").size == (36, 24)


def test_an_exif_block_that_pil_cannot_rewrite_still_rotates_the_photo_once(tmp_path):
    # Two tags: the maker as a float, which PIL reads but can't write.
    exif = struct.pack(">6s2sHIH", b"Exif", b"MM", 42, 8, 2)
    exif += (
        struct.pack(">HHIf", 0x010F, 11, 1, 1.5)
        + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
        + struct.pack(">I", 0)
    )
    Image.fromarray(np.ascontiguousarray(ROTATIONS[6](picture()))).save(
        tmp_path / "x.jpg", exif=exif, quality=95
    )
    once = read_image(tmp_path / "x.jpg")
    assert close(pixels(once), picture()) < 3
    np.testing.assert_array_equal(pixels(read_image(once)), pixels(once))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for suffix in ("gif", "webp", "png"):
        frames[0].save(
            tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], lossless=True
        )
        np.testing.assert_array_equal(
            pixels(read_image(tmp_path / f"x.{suffix}"))[0, 0], (255, 0, 0)
        )


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "float16"])
def test_arrays_of_every_depth_and_dtype_are_read(shape, dtype):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    values[..., 3:] = 255
    array = values if dtype == "uint8" else (values / 255).astype(dtype)
    three = values.reshape(4, 5, -1)[..., :3]
    np.testing.assert_allclose(
        pixels(read_image(array)).astype(int),
        np.broadcast_to(three, (4, 5, 3)),
        atol=dtype == "float16",
    )


def test_floats_are_rounded_to_the_nearest_level():
    np.testing.assert_array_equal(
        pixels(read_image(np.array([[0.0019, 0.002, 0.999]])))[0, :, 0], [0, 1, 255]
    )


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((1, 4, 5, 3), np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((4, 0), np.float32),
        np.zeros((4, 5, 3), np.int16),
        np.zeros((4, 5, 3), bool),
        np.full((4, 5, 3), 2.0),
        np.full((4, 5, 3), -0.1),
        np.full((4, 5, 3), np.nan),
        np.zeros((32769, 1), np.uint8),
    ],
    ids=str,
)
def test_arrays_that_are_no_picture_are_refused(array):
    with pytest.raises(ValueError, match="image") as caught:
        read_image(array)
    one_line(caught)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "no.png"))) as caught:
        read_image(tmp_path / "no.png")
    one_line(caught)


def broken_files():
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        whole, "JPEG"
    )
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        png, "PNG"
    )
    return {
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "truncated.png": png.getvalue()[: len(png.getvalue()) // 2],
        "header_only.png": png.getvalue()[:20],
        "text.png": b"this is not a picture\n" * 9,
        "few_rows.png": png_file(8, 64, b"\0" * 20 * 25),
        "few_passes.png": png_file(8, 8, b"\0" * 107, interlaced=1),
        "empty.png": b"",
        "bomb.png": png_file(100_000, 100_000),
        "long.png": png_file(40_000, 10),
        "large.png": png_file(20_000, 20_000),
        "flat.png": png_file(0, 10),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_file_that_is_no_whole_picture_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            read_image(path)
    assert not leaked
    assert isinstance(caught.value, ValueError)
    text = one_line(caught)
    rule = {
        "empty": "which is empty",
        "bomb": "at most",
        "large": "at most",
        "long": "sides of 1 to 32768",
    }.get(path.stem, "whole")
    assert rule in text


@pytest.mark.parametrize("size", [(40_000, 10), (15_000, 12_000)])
def test_a_size_beyond_the_limits_is_refused_before_a_pixel_is_decoded(tmp_path, monkeypatch, size):
    (tmp_path / "x.png").write_bytes(png_file(*size))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="pixels"):
        read_image(tmp_path / "x.png")


def test_a_bomb_is_refused_where_pils_own_limit_was_lifted(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "x.png").write_bytes(png_file(20_000, 20_000))
    with pytest.raises(ValueError, match="20000x20000") as caught:
        read_image(tmp_path / "x.png")
    one_line(caught)


def test_a_large_photo_within_the_limits_warns_of_nothing(tmp_path):
    # Above PIL's warning, below its error.
    Image.new("L", (10_000, 9_000)).save(tmp_path / "x.png", compress_level=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.png").size == (10_000, 9_000)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ValueError, match="folder") as caught:
        read_image(tmp_path)
    one_line(caught)


def test_a_callers_image_stays_open_and_unchanged(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).convert("RGBA").save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert read_image(image).size == image.size[::-1]
        assert image.mode == "RGBA"
        assert image.getexif()[0x0112] == 6
        np.testing.assert_array_equal(np.asarray(image)[..., :3], picture())
