"""Frames of several segments: how they are joined, and how colours are matched."""

import numpy as np
import pytest

from cogi2v_jax.media.segments import Segments, clip_frames, match_colours


def picture(rng: np.random.Generator, frames: int) -> np.ndarray:
    return rng.integers(60, 180, (1, frames, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("overlap", [1, 5])
def test_what_segments_have_in_common_comes_once(rng: np.random.Generator, overlap: int) -> None:
    whole = picture(rng, 9 + 2 * (9 - overlap))
    video = Segments(overlap, match_colour=False)
    for first in range(0, whole.shape[1] - overlap, 9 - overlap):
        video.add(whole[:, first : first + 9])
        np.testing.assert_array_equal(video.frames, whole[:, : first + 9])
        np.testing.assert_array_equal(video.last, whole[:, first + 9 - overlap : first + 9])


def test_a_segment_that_is_brighter_and_flatter_is_brought_back(rng: np.random.Generator) -> None:
    right = picture(rng, 9)
    before = right[:, :2]
    wrong = np.rint(0.8 * right + [40, 20, 0]).astype(np.uint8)
    assert np.abs(match_colours(wrong, before).astype(int) - right).max() <= 1
    assert np.abs(wrong.astype(int) - right).max() > 20


def test_every_video_of_a_batch_is_matched_to_its_own(rng: np.random.Generator) -> None:
    right = np.concatenate([picture(rng, 9), picture(rng, 9) // 2])
    wrong = right + np.array([20, 60], np.uint8)[:, None, None, None, None]
    assert np.abs(match_colours(wrong, right[:, :1]).astype(int) - right).max() <= 1


def test_a_channel_without_contrast_is_moved_and_not_stretched() -> None:
    before = np.full((1, 1, 8, 8, 3), 100, np.uint8)
    segment = np.full((1, 9, 8, 8, 3), 110, np.uint8)
    segment[:, 5:, :4] = 150
    matched = match_colours(segment, before)
    assert matched[0, 0].min() == matched[0, 0].max() == 100
    assert matched[0, 8, 0, 0, 0] == 140


def test_what_goes_on_may_reach_back_over_several_segments(rng: np.random.Generator) -> None:
    whole = picture(rng, 13)  # segments of nine frames, of which one is new
    video = Segments(8, match_colour=False)
    for first in range(5):
        video.add(whole[:, first : first + 9])
    np.testing.assert_array_equal(video.last, whole[:, 5:])


def test_a_clip_is_cut_to_its_first_frames(rng: np.random.Generator) -> None:
    frames = picture(rng, 12)[0]
    np.testing.assert_array_equal(clip_frames(frames, 9), frames[:9])


@pytest.mark.parametrize(
    "wrong", [np.zeros((9, 8, 8, 4), np.uint8), np.zeros((9, 8, 8, 3)), [1, 2]]
)
def test_what_is_no_clip_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="video must be a"):
        clip_frames(wrong, 1)
