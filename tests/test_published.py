"""What a checkpoint was published for: words of prompts, and backgrounds of pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cogi2v_jax import Request, load
from cogi2v_jax.config import named
from cogi2v_jax.media.images import fit_image, read_image
from cogi2v_jax.pipeline import prepare
from cogi2v_jax.published import Published
from cogi2v_jax.sample import EXAMPLE_IMAGE
from cogi2v_jax.training import shapes

TINY = named("cogi2v-tiny").published


def said(prompt: str, published: Published = TINY) -> list[str]:
    return [*published.outside(64, 64, 9, ["the red circle grows", prompt])]


def gradient(top: tuple[float, ...], bottom: tuple[float, ...]) -> np.ndarray:
    rows = np.linspace(0, 1, 64)[:, None, None]
    return np.broadcast_to(np.array(top) * (1 - rows) + np.array(bottom) * rows, (64, 64, 3))


def test_the_words_of_its_own_clips_are_known_in_any_case() -> None:
    for colour, form, motion in shapes.combinations():
        for phrase in shapes.MOTIONS[motion]:
            assert not said(f"The {colour.upper()} {form} {phrase}.")
    assert not said("")


def test_words_outside_of_its_grammar_are_named_once() -> None:
    [line] = said('a red cat, the "cat" jumps')
    assert line == f"prompts of {len(TINY.words)} words (not cat, jumps)"
    assert not said("a red cat jumps", Published())


def test_pictures_of_its_own_clips_are_known() -> None:
    random = np.random.default_rng(0)
    for kind in shapes.combinations():
        pixels = shapes.render(shapes.draw_scene(random, *kind))[0] / 127.5 - 1
        assert not TINY.is_strange(pixels), kind
    assert not TINY.is_strange(fit_image(read_image(EXAMPLE_IMAGE), 64, 64, "crop"))


@pytest.mark.parametrize(
    "picture",
    [
        gradient((0.2, 0.2, 0.2), (0.9, 0.3, 0.3)),
        gradient((0.7, 0.7, 0.7), (0.7, 0.7, 0.7)),
        np.swapaxes(gradient((0.1, 0.1, 0.1), (0.4, 0.4, 0.4)), 0, 1),
        np.random.default_rng(0).uniform(0, 0.45, (64, 64, 3)),
        np.concatenate([gradient((0.1,) * 3, (0.4,) * 3)[:32], np.full((32, 64, 3), 0.1)]),
    ],
    ids=["light below", "light", "from left to right", "noise", "two halves"],
)
def test_pictures_with_another_background_are_strange(picture: np.ndarray) -> None:
    assert TINY.is_strange(picture * 2 - 1)
    assert not Published().is_strange(picture * 2 - 1)


def test_a_strange_picture_is_computed_with_one_warning() -> None:
    models, light = load("cogi2v-tiny"), Image.new("RGB", (64, 64), "white")
    request = Request([EXAMPLE_IMAGE, light], "the cyan triangle grows", seed=[1, 2])
    with pytest.warns(UserWarning, match="^cogi2v-tiny knows pictures of flat shapes") as warned:
        prepare(models, request)
    assert len(warned) == 1
    prepare(models, Request(EXAMPLE_IMAGE, "the cyan triangle grows"))  # a warning would raise


@pytest.mark.parametrize("given", [{"num_frames": 57}, {"height": 96}, {"width": 32}], ids=str)
def test_positions_that_were_not_learned_are_warned_of(given: dict[str, int]) -> None:
    own = dataclasses.replace(named("cogvideox-5b-i2v"), published=Published())
    line = "cogvideox-5b-i2v learned positions for 49 frames of 480x720, which are interpolated"
    with pytest.warns(UserWarning, match=f"^{line}: expect worse results$"):
        Request(EXAMPLE_IMAGE, "a", **given).resolve(own)
    Request(EXAMPLE_IMAGE, "a", num_frames=9).resolve(own)  # a warning would raise
