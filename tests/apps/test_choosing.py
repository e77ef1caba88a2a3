"""Several takes from Python: their seeds, their order, and the table of their figures."""

from typing import Any

import numpy as np
import pytest
from tolerances import TOLERANCE, assert_close

import cogi2v_jax
from cogi2v_jax import Request
from cogi2v_jax.apps import choosing
from cogi2v_jax.media.ranking import Figures, figures_of
from cogi2v_jax.sample import EXAMPLE_IMAGE

PROMPTS = ["the cyan triangle grows", "the cyan triangle moves left"]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return cogi2v_jax.load("cogi2v-tiny", "float32", mesh="data=2")


def test_each_video_has_its_takes_the_best_first(tiny: Any) -> None:
    request = Request(EXAMPLE_IMAGE, PROMPTS, seed=[7, 40], num_inference_steps=2)
    both = cogi2v_jax.best_of(tiny, request, 3)
    assert [{take.seed for take in takes} for takes in both] == [{7, 8, 9}, {40, 41, 42}]
    picture = choosing.fitted(request.resolve(tiny.config), EXAMPLE_IMAGE)
    for prompt, takes in zip(PROMPTS, both, strict=True):
        scores = [take.figures.score for take in takes]
        assert scores == sorted(scores, reverse=True)
        for take in takes:
            assert take.figures == figures_of(take.video, picture)
        best = takes[0]
        twice = Request(EXAMPLE_IMAGE, prompt, seed=[best.seed] * 2, num_inference_steps=2)
        again = cogi2v_jax.generate(tiny, twice).latents[0]
        assert_close(best.latents, again, TOLERANCE["module"])


def test_takes_count_their_seeds_up_from_each_video_s_own() -> None:
    request = Request("a.png", ["x", "y"], seed=np.array([5, 2**63], np.uint64))
    takes = request.takes(2).videos
    assert [(take.prompt, take.seed) for take in takes] == [
        ("x", 5),
        ("x", 6),
        ("y", 2**63),
        ("y", 2**63 + 1),
    ]
    assert Request("a.png", "x", seed=3).takes(1) == Request("a.png", "x", seed=3)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_another_count_is_refused(count: Any, without_type_hooks: None) -> None:
    with pytest.raises(ValueError, match=r"best_of must be a positive integer .*: got "):
        Request("a.png", "x").takes(count)


def test_seeds_that_are_none_are_refused_in_the_words_of_a_seed(without_type_hooks: None) -> None:
    takes = Request("a.png", "x", seed=2**64 - 1).takes(2)
    with pytest.raises(ValueError, match=r"seed must be an integer from 0 to 2\*\*64 - 1: got"):
        takes.check()
    with pytest.raises(ValueError, match=r"seed must be an integer .*: got 'x'"):
        Request("a.png", "x", seed="x").takes(2)  # pyright: ignore[reportArgumentType]


def test_the_table_has_a_line_for_each_name() -> None:
    rows = [
        (name, {"seed": seed} | choosing.entry(Figures(*found), 1, 2))
        for name, seed, found in (
            ("out.mp4", 42, (1.25, 40.0, 0.126)),
            ("out-1.mp4", 9, (0.0, 99.0, 0.0)),
        )
    ]
    assert choosing.table(rows) == [
        "           seed  motion  first  drift  score",
        "out.mp4      42    1.25   40.0   0.13  0.529",
        "out-1.mp4     9    0.00   99.0   0.00  0.100",
    ]
