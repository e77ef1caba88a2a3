"""The colours of pictures: deep values by what their format says, and ICC profiles."""

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from pictures import one_line, picture
from PIL import Image, ImageCms

from cogi2v_jax.media.images import read_image

GREY = picture()[..., 0]


def levels(source: Any) -> np.ndarray:
    """The first channel of a grey picture; all three are equal."""
    seen = np.asarray(read_image(source))
    assert (seen == seen[..., :1]).all()
    return seen[..., 0]


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_an_integer_image_in_memory_has_16_bits(mode: str) -> None:
    image = Image.new(mode, (3, 2), 100 * 257 + 200)  # nearer to 101
    assert (levels(image) == 101).all()


@pytest.mark.parametrize(
    ("dtype", "white", "format", "bits"),
    [
        ("<u2", 65535, 1, 16),
        ("<i2", 32767, 2, 16),
        ("<u4", 2**32 - 1, 1, 32),
        ("<i4", 2**31 - 1, 2, 32),
        ("<f4", 1, 3, 32),
    ],
)
def test_a_tiff_is_scaled_by_its_own_sample_format(
    dtype: str, white: int, format: int, bits: int, tmp_path: Path
) -> None:
    """Also where no value comes near white."""
    values = (GREY.astype(np.float64) / 255 * white / 2).astype(dtype)
    write_tiff(tmp_path / "x.tiff", values, bits, format)
    assert np.abs(levels(tmp_path / "x.tiff").astype(int) - GREY / 2).max() <= 1


@pytest.mark.parametrize(("dtype", "white"), [("u1", 255), ("<u2", 65535), ("<f4", 1)])
def test_a_tiff_may_have_0_for_white(dtype: str, white: int, tmp_path: Path) -> None:
    values = (GREY / 255 * white).astype(dtype)
    format = 3 if dtype == "<f4" else 1
    write_tiff(tmp_path / "x.tiff", values, values.itemsize * 8, format, {262: 0})
    assert np.abs(levels(tmp_path / "x.tiff").astype(int) - (255 - GREY)).max() <= 1


@pytest.mark.parametrize("tag", [{254: 1}, {50706: 1}])
def test_a_raw_photo_is_refused_by_its_name(tag: dict[int, int], tmp_path: Path) -> None:
    write_tiff(tmp_path / "x.dng", GREY, 8, 1, tag)
    with pytest.raises(ValueError, match=r"developed: got .*x.dng, a raw photo; export") as refused:
        read_image(tmp_path / "x.dng")
    one_line(refused)


def write_tiff(
    path: Path,
    values: np.ndarray,
    bits: int,
    sample_format: int,
    others: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """An uncompressed grey TIFF, whose tags PIL does not choose."""
    data, (rows, columns) = values.tobytes(), values.shape
    tags = [(256, columns), (257, rows), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, rows), (279, len(data)), (339, sample_format)]
    tags = sorted((dict(tags) | dict(others)).items())
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_highlights_of_a_float_file_are_clipped(tmp_path: Path) -> None:
    values = np.array([[-0.5, 0.0, 0.5, 1.0, 8.0, 300.0]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert levels(tmp_path / "x.tiff").tolist() == [[0, 0, 128, 255, 255, 255]]


def test_a_portable_float_map_has_1_for_white(tmp_path: Path) -> None:
    data = np.array([0.25, 1.0, 7.0], "<f4").tobytes()
    (tmp_path / "x.pfm").write_bytes(b"Pf\n3 1\n-1.0\n" + data)
    assert levels(tmp_path / "x.pfm").tolist() == [[64, 255, 255]]


@pytest.mark.parametrize("most", [1023, 65535])
def test_a_grey_map_is_scaled_by_its_own_maximum(most: int, tmp_path: Path) -> None:
    values = np.array([0, most // 2, most], ">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(b"P5\n3 1\n%d\n" % most + values)
    assert levels(tmp_path / "x.pgm").tolist() == [[0, 127, 255]]


def test_a_float_image_in_memory_is_as_pil_makes_it() -> None:
    np.testing.assert_array_equal(levels(Image.fromarray(GREY).convert("F")), GREY)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_a_float_image_that_nothing_explains_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"image .*must hold") as refused:
        read_image(Image.fromarray(np.full((2, 2), value, np.float32)))
    one_line(refused)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_an_array_of_deep_integers_is_scaled_by_its_dtype(dtype: Any) -> None:
    deep = (GREY / 255 * np.iinfo(dtype).max).round().astype(dtype)
    np.testing.assert_array_equal(levels(deep), GREY)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


P3 = {"r": (0.51512, 0.2412, -0.00105), "g": (0.29198, 0.69225, 0.04189)}
P3 |= {"b": (0.1571, 0.06657, 0.78407)}


def profile_of(colours: str, primaries: dict[str, tuple[float, ...]]) -> bytes:
    """An ICC profile of gamma 2.2 with primaries, or for grey without."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(2.2 * 256)) + b"\0\0"
    white = (0.9642, 1.0, 0.8249)
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + fixed(*white)), (b"cprt", b"text\0\0\0\0none\0\0\0\0")]
    tags += [(b"desc", b"desc\0\0\0\0\0\0\0\2x\0" + bytes(82))]
    for name, values in primaries.items():
        tags += [(f"{name}XYZ".encode(), b"XYZ \0\0\0\0" + fixed(*values))]
        tags += [(f"{name}TRC".encode(), curve)]
    tags += [] if primaries else [(b"kTRC", curve)]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags:
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 2**25, b"mntr", b"", b"XYZ ")
    head = head[:16] + colours.ljust(4).encode() + head[20:]
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(*white)
    return head + bytes(128 - len(head)) + table + body


def shown(image: Image.Image, profile: bytes) -> np.ndarray:
    """What a viewer with colour management shows."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted: Any = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return np.asarray(converted, int)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_a_wide_profile_is_converted_to_srgb(suffix: str, tmp_path: Path) -> None:
    profile, path = profile_of("RGB", P3), tmp_path / f"x.{suffix}"
    Image.fromarray(picture()).save(path, icc_profile=profile, lossless=True, quality=95)
    with Image.open(path) as stored:
        expected = shown(stored, profile)
        assert np.abs(expected - np.asarray(stored, int)).max() > 10
    assert np.abs(np.asarray(read_image(path), int) - expected).max() <= 1


def test_transparency_is_blended_after_the_profile(tmp_path: Path) -> None:
    profile, image = profile_of("RGB", P3), Image.new("RGB", (2, 1), (200, 60, 40))
    opaque = shown(image, profile)[0, 0]
    image.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    image.save(tmp_path / "x.png", icc_profile=profile)
    seen = np.asarray(read_image(tmp_path / "x.png"))
    assert np.abs(seen[0, 0] - opaque).max() <= 1
    assert seen[0, 1].tolist() == [255] * 3


def test_a_grey_profile_is_converted(tmp_path: Path) -> None:
    profile = profile_of("GRAY", {})
    Image.fromarray(GREY).save(tmp_path / "x.png", icc_profile=profile)
    seen, expected = levels(tmp_path / "x.png"), shown(Image.fromarray(GREY), profile)[..., 0]
    assert np.abs(seen - expected).max() <= 1


def test_the_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture()).save(tmp_path / "x.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), picture())


@pytest.mark.parametrize("profile", [b"no profile", profile_of("GRAY", {}), profile_of("CMYK", P3)])
def test_a_profile_that_is_broken_or_for_other_colours_is_ignored(
    profile: bytes, tmp_path: Path
) -> None:
    Image.fromarray(picture()).convert("RGB").save(tmp_path / "x.png", icc_profile=profile)
    seen = np.asarray(read_image(tmp_path / "x.png"), int)
    assert np.abs(seen - picture()).max() == 0
