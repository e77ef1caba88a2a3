"""Videos of several segments, loops and clips to start from, through the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import read_recipe
from runs import QUICK, enter, failed

from cogi2v_jax.apps import making
from cogi2v_jax.disk import sha256
from cogi2v_jax.media.recipe import read_latents
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def stopping_at(count: int) -> Callable[[], Callable[..., None]]:
    """A progress display that is interrupted at the `count`-th step of all."""
    seen: list[int] = []

    def show(*_: Any) -> None:
        seen.append(0)
        if len(seen) == count:
            raise KeyboardInterrupt

    return lambda: show


def test_a_run_that_was_stopped_goes_on_after_its_last_segment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--extend", "2", *QUICK]
    assert main([*words, "--output", "whole.png"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(making, "progress", stopping_at(4))
        assert main([*words, "--output", "out.png"]) == 130
    latents, _ = read_latents(Path("out.latents.safetensors"))
    assert (latents.shape[1], Path("out").exists()) == (3, False)
    capsys.readouterr()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(making, "progress", lambda: lambda *step: steps.append(step[0]))
        assert main([*words, "--output", "out.png"]) == 0
    assert "going on from the segments in out.latents.safetensors" in capsys.readouterr().err
    assert steps == [1, 2, 1, 2]
    np.testing.assert_array_equal(read_frames("out.png"), read_frames("whole.png"))
    assert main(["--extend", "3", *QUICK, "--output", "out.png"]) == 0
    assert "going on" in capsys.readouterr().err
    np.testing.assert_array_equal(read_frames("out.png")[:25], read_frames("whole.png"))
    assert main([*words, "--seed", "1", "--output", "out.png"]) == 0  # another recipe
    assert "going on" not in capsys.readouterr().err
    assert not np.array_equal(read_frames("out.png"), read_frames("whole.png"))


@pytest.mark.parametrize(
    "flags", [("--extend", "1"), ("--extend", "1", "--overlap", "5"), ("--loop",)]
)
def test_kept_latents_decode_to_the_same_video(flags: tuple[str, ...]) -> None:
    assert main([*flags, *QUICK, "--output", "a.png"]) == 0
    assert main(["--decode_latents", "a.latents.safetensors", "--output", "b.png"]) == 0
    frames = read_frames("a.png")
    assert len(frames) == {1: 12, 2: 17, 4: 13}[len(flags)]
    np.testing.assert_array_equal(read_frames("b.png"), frames)


def test_a_clip_gives_its_first_frame_as_the_image_and_is_in_the_recipe() -> None:
    assert main([*QUICK, "--output", "clip.png"]) == 0
    words = ["--video", "clip", "--prompt", "the cyan triangle spins", "--strength", "0.5"]
    assert main([*words, *QUICK, "--output", "a.mp4"]) == 0
    recipe = read_recipe("a.mp4")
    assert (recipe["video"], recipe["image"]) == ("clip", "first frame of clip.png")
    assert (recipe["strength"], len(recipe["video_sha256"])) == (0.5, 64)
    Path("clip", "notes").mkdir()  # is no frame
    words[1] = "clip.png"
    assert main(["--image", "photo.png", *words, *QUICK, "--output", "b.mp4"]) == 0
    other = read_recipe("b.mp4")
    assert other["image_sha256"] == sha256(Path("photo.png"))
    assert other["video_sha256"] == recipe["video_sha256"]


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["--video", "photo.png"], 2, "--prompt must be given with --video"),
        (["--video", "no such.mp4", "--prompt", "a"], 1, "video must be an existing file"),
        (["--strength", "0.5"], 2, "--strength must be given with --video"),
        (["--no-match_colour"], 2, "--match_colour must be given with --extend"),
        (["--loop", "--extend", "1"], 1, "loop must be without extend: got both"),
        (
            ["--video", "photo.png", "--prompt", "a", "--strength", "0"],
            1,
            "strength must be a number above 0 and at most 1: got 0",
        ),
        (["--extend", "two"], 2, "must be an integer from 0 to 999: got 'two'"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    flags: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in failed(capsys, flags, code)
