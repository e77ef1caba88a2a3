"""The size of a video by its picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recipes import read_recipe
from runs import QUICK, enter

from cogi2v_jax import Request
from cogi2v_jax.config import named
from cogi2v_jax.media.images import fit_image, padded_box
from cogi2v_jax.media.sizes import fit_size
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import main


def sized(model: str, size: tuple[int, int], **given: Any) -> tuple[Any, Any]:
    """(height, width) for a picture of `size` (width, height)."""
    request = fit_size(Request(Image.new("RGB", size), "a", fit="auto", **given), named(model))
    return request.height, request.width


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1920, 1080), (768, 1360)),
        ((1080, 1920), (1360, 768)),
        ((1000, 1000), (768, 768)),
        ((1024, 768), (768, 1024)),
        ((5000, 100), (768, 1360)),
    ],
)
def test_a_checkpoint_of_many_sizes_takes_the_nearest(size: Any, expected: Any) -> None:
    assert sized("cogvideox1.5-5b-i2v", size) == expected


@pytest.mark.parametrize(
    ("size", "expected"), [((1920, 1080), (480, 720)), ((600, 900), (720, 480))]
)
def test_a_checkpoint_of_one_size_takes_it_upright_too(size: Any, expected: Any) -> None:
    assert sized("cogvideox-5b-i2v", size) == expected


def test_one_given_side_leaves_the_other_to_the_picture() -> None:
    assert sized("cogvideox1.5-5b-i2v", (1000, 500), height=512) == (512, 1024)
    assert sized("cogvideox1.5-5b-i2v", (1000, 500), width=512) == (256, 512)
    assert sized("cogvideox1.5-5b-i2v", (1000, 500), height=512, width=512) == (512, 512)


def test_other_fits_leave_the_size_to_the_checkpoint() -> None:
    request = Request(Image.new("RGB", (50, 100)), "a")
    assert fit_size(request, named("cogvideox1.5-5b-i2v")) is request


def test_pictures_of_two_aspects_in_one_batch_are_refused() -> None:
    images = [Image.new("RGB", size) for size in ((100, 50), (50, 100))]
    with pytest.raises(ValueError, match="the pictures of a batch must have one aspect with fit"):
        fit_size(Request(images, "a", fit="auto"), named("cogvideox1.5-5b-i2v"))


def test_the_box_of_a_padded_image_is_where_its_pixels_are() -> None:
    white = fit_image(Image.new("RGB", (30, 70), "white"), 64, 96, "pad")
    left, top, right, bottom = padded_box((30, 70), 64, 96)
    rows, columns = np.nonzero(white[..., 0] > 0)
    assert (columns.min(), rows.min()) == (left, top)
    assert (columns.max() + 1, rows.max() + 1) == (right, bottom)


@pytest.mark.filterwarnings("ignore:.*expect")
def test_a_padded_video_is_written_without_its_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch)
    Image.open("photo.png").crop((0, 16, 64, 48)).save("wide.png")
    words = ["--image", "wide.png", "--prompt", "the cyan triangle grows", "--fit", "pad"]
    assert main([*words, *QUICK, "--output", "a.png"]) == 0
    assert read_frames("a.png").shape == (9, 32, 64, 3)
    assert read_recipe("a.png")["visible"] == [0, 16, 64, 48]
    assert main(["--decode_latents", "a.latents.safetensors", "--output", "b.png"]) == 0
    np.testing.assert_array_equal(read_frames("b.png"), read_frames("a.png"))


def test_the_size_that_was_chosen_is_in_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch)
    words = ["--image", "photo.png", "--prompt", "the cyan triangle grows", "--fit", "auto"]
    assert main([*words, *QUICK, "--output", "a.png"]) == 0
    recipe = read_recipe("a.png")
    assert (recipe["fit"], recipe["height"], recipe["width"]) == ("auto", 64, 64)
