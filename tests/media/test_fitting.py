"""Fitting pictures to the size of the video."""

import warnings

import numpy as np
import pytest
from pictures import one_line
from PIL import Image

from cogi2v_jax.media.images import fit_image
from cogi2v_jax.settings import FITS


@pytest.mark.parametrize("size", [(480, 720), (37, 53), (1000, 300), (1, 1)])
def test_stretch_is_the_reference_bit_for_bit(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the reference's own imports
        VideoProcessor = pytest.importorskip("diffusers.video_processor").VideoProcessor
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8))
        expected = (
            VideoProcessor(vae_scale_factor=8)
            .preprocess(image, height=96, width=160)
            .numpy()[0]
            .transpose(1, 2, 0)
        )
    ours = fit_image(image, 96, 160, "stretch")
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(96, 160), (60, 100), (48, 80), (3, 5), (333, 555), (480, 800)])
def test_an_image_at_the_target_aspect_is_the_same_under_every_fit(fit, size):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size, 3), np.uint8))
    np.testing.assert_array_equal(
        fit_image(image, 96, 160, fit), fit_image(image, 96, 160, "stretch")
    )


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (97, 160), (96, 161), (479, 721), (3000, 7)]
)
def test_every_shape_fits_the_target_exactly(fit, size):
    out = fit_image(Image.new("RGB", size[::-1], "white"), 96, 160, fit)
    assert out.shape == (96, 160, 3)
    assert out.dtype == np.float32
    assert out.max() == 1
    if fit != "pad":
        assert out.min() == 1


def bands(height, width, axis) -> Image.Image:
    """Red, green and blue thirds along an axis."""
    index = np.arange((height, width)[axis]) * 3 // (height, width)[axis]
    rows = np.eye(3, dtype=np.uint8)[index] * np.uint8(255)
    return Image.fromarray(
        np.ascontiguousarray(
            np.broadcast_to(rows[:, None] if axis == 0 else rows[None], (height, width, 3))
        )
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_keeps_the_middle_and_the_aspect(axis):
    size = [32, 32]
    size[axis] = 96
    out = fit_image(bands(*size, axis), 64, 64, "crop").transpose(axis, 1 - axis, 2)
    np.testing.assert_allclose(out[4:-4], np.broadcast_to([-1, 1, -1], (56, 64, 3)), atol=0.02)


@pytest.mark.parametrize("axis", [0, 1])
def test_crop_cuts_both_ends_equally(axis):
    size = [40, 40]
    size[axis] = 61
    flip = (slice(None, None, -1),) if axis == 0 else (slice(None), slice(None, None, -1))
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    out = fit_image(Image.fromarray(image), 32, 32, "crop")
    mirrored = fit_image(Image.fromarray(np.ascontiguousarray(image[flip])), 32, 32, "crop")
    np.testing.assert_allclose(out[flip], mirrored, atol=2.1 / 255 * 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_pad_shows_the_whole_image_centred_on_black(axis):
    size = [32, 32]
    size[axis] = 96
    out = fit_image(bands(*size, axis), 96, 96, "pad").transpose(1 - axis, axis, 2)
    np.testing.assert_array_equal(out[:32], -1)
    np.testing.assert_array_equal(out[64:], -1)
    inner = np.asarray(bands(*size, axis), np.float32).transpose(1 - axis, axis, 2) / 255 * 2 - 1
    np.testing.assert_array_equal(out[32:64], inner)


def test_pixels_span_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    np.testing.assert_allclose(fit_image(image, 1, 1, "stretch")[0, 0], [-1, 1, -0.6], atol=1e-6)


def test_an_unknown_fit_a_zero_size_and_another_mode_are_refused():
    image = Image.new("RGB", (8, 8))
    for arguments, named in (
        ((image, 8, 8, "squash"), "fit"),
        ((image, 0, 8, "pad"), "height"),
        ((image.convert("L"), 8, 8, "pad"), "RGB"),
    ):
        with pytest.raises(ValueError, match=named) as caught:
            fit_image(*arguments)
        one_line(caught)
