"""Enlarged copies, and what a run of the example says at its end; nothing is sampled."""

from pathlib import Path

import numpy as np
import pytest
from recipes import read_recipe
from runs import enter, failed, without_sampling

from cogi2v_jax.media.videos import enlarge, read_frames, write_video
from cogi2v_jax.sample import EXAMPLE_IMAGE, main


@pytest.fixture(autouse=True)
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    enter(tmp_path, monkeypatch)
    return without_sampling(monkeypatch)


def test_a_copy_is_written_beside_the_video(capsys: pytest.CaptureFixture) -> None:
    assert main(["--output", "out.png", "--upscale", "nearest", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "out: 9 frames of 64x64 at 8 fps",
        "out-x3: 9 frames of 192x192 at 8 fps",
    ]
    assert read_frames("out-x3").shape == (9, 192, 192, 3)
    assert read_recipe("out-x3") == read_recipe("out")


def test_where_the_copy_cannot_be_written_is_found_at_the_start(
    capsys: pytest.CaptureFixture, requests: list
) -> None:
    Path("out-x2").mkdir()
    Path("out-x2", "notes.txt").touch()
    assert "out-x2" in failed(capsys, ["--output", "out.png", "--upscale", "nearest", "2"], 1)
    assert not requests


@pytest.mark.parametrize("asked", [("cubic", "2"), ("nearest", "1"), ("lanczos", "x")])
def test_other_ways_and_factors_are_refused(
    asked: tuple[str, str], capsys: pytest.CaptureFixture
) -> None:
    line = failed(capsys, ["--upscale", *asked], 2)
    assert f"--upscale must be nearest or lanczos and a number from 2 to 16: got {asked[0]}" in line


def test_nearest_repeats_pixels_and_lanczos_is_smooth() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3)).astype(np.uint8)
    exact = np.repeat(np.repeat(frames, 3, axis=1), 3, axis=2)
    np.testing.assert_array_equal(enlarge(frames, "nearest", 3), exact)
    smooth = enlarge(frames, "lanczos", 3)
    assert smooth.shape == exact.shape
    steps = [np.abs(np.diff(video.astype(int), axis=1)).max() for video in (smooth, exact)]
    assert steps[0] < steps[1]


def test_the_codec_loses_less_of_small_videos() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 280, 280, 1))
    grey = np.repeat(noise, 3, axis=3).astype(np.uint8)  # of colour it keeps a quarter anyway
    losses = []
    for name, frames in (("small", grey[:, :64, :64]), ("large", grey)):
        write_video(f"{name}.mp4", frames, 8, {})
        losses.append(np.abs(read_frames(f"{name}.mp4").astype(int) - frames).mean())
    assert losses[0] < 0.5 * losses[1]


def test_the_example_says_what_it_is_of_and_other_runs_do_not(
    capsys: pytest.CaptureFixture,
) -> None:
    assert main([]) == 0
    said = f"the picture is {EXAMPLE_IMAGE}, the prompt 'the cyan triangle grows'"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert main(["--image", "photo.png", "--prompt", "a circle moves"]) == 0
    assert "the picture is" not in capsys.readouterr().err
