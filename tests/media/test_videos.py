"""Writing videos and reading back their frames and recipes."""

import json
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from pictures import KINDS, clip, close, one_line
from PIL import Image
from recipes import read_recipe

from cogi2v_jax.media.videos import FfmpegError, check_output, read_frames, write_video

RECIPE = {
    "prompt": "a \"quoted\" 'panda'; a=b #1 \\ back\\slash\\\\ 熊猫 🎸 é\n"
    "second line\r\n\ttab \x00 \\n;=#",
    "negative_prompt": "",
    "seed": 2**63,
    "guidance_scale": 6.0,
    "sizes": [49, 480, 720],
    "nested": {"a": None, "b": True},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_comes_back_whole(tmp_path, name):
    path = write_video(tmp_path / name, clip(2, 32, 32), 8, RECIPE)
    assert read_recipe(path) == RECIPE
    assert read_recipe(tmp_path / name) == RECIPE
    assert read_recipe(str(path)) == RECIPE


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_far_longer_than_an_argument_may_be_comes_back_whole(tmp_path, name):
    recipe = {"prompt": RECIPE["prompt"] * 5000}
    assert len(json.dumps(recipe)) > 300_000
    write_video(tmp_path / name, clip(2, 32, 32), 8, recipe)
    assert read_recipe(tmp_path / name) == recipe


def test_every_frame_of_a_folder_carries_the_recipe(tmp_path):
    folder = write_video(tmp_path / "out.png", clip(3), 8, RECIPE)
    assert [read_recipe(folder / f"0000{index}.png") for index in range(3)] == [RECIPE] * 3
    assert json.loads((folder / "recipe.json").read_text()) == RECIPE


@pytest.mark.parametrize("name", KINDS)
def test_frames_come_back_in_order_and_close(tmp_path, name):
    frames = clip(9)
    path = write_video(tmp_path / name, frames, 8, RECIPE)
    back = read_frames(tmp_path / name)
    assert back.dtype == np.uint8
    lossless = path.is_dir()
    assert close(back, frames) <= (0 if lossless else 2.5)
    # Neighbours differ by 4 levels, so swapped frames would not be closest to their own.
    for one, index in zip(back, range(9), strict=True):
        assert np.argmin([close(one, other) for other in frames]) == index


@pytest.mark.parametrize("name", KINDS)
def test_one_frame_is_a_video_too(tmp_path, name):
    write_video(tmp_path / name, clip(1), 8, RECIPE)
    assert close(read_frames(tmp_path / name), clip(1)) < 2.5
    assert read_recipe(tmp_path / name) == RECIPE


def described(path) -> str:
    return subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True
    ).stderr


@pytest.mark.parametrize("fps", [8, 16, 7.5, 23.976])
def test_an_mp4_plays_in_browsers_at_its_speed(tmp_path, fps):
    path = write_video(tmp_path / "x.mp4", clip(9), fps, RECIPE)
    video = next(line for line in described(path).splitlines() if "Video:" in line)
    assert "h264" in video
    assert "yuv420p(tv, bt709" in video
    assert "96x64" in video
    assert float(re.search(r"([\d.]+) fps", video)[1]) == pytest.approx(fps, abs=0.01)
    count, seconds = imageio_ffmpeg.count_frames_and_secs(path)
    assert count == 9
    assert seconds == pytest.approx(9 / fps, abs=0.02)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat"), (
        "a browser would have to load it whole before it plays"
    )


def test_strong_colours_keep_their_hue_in_an_mp4(tmp_path):
    colours = np.array(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [255, 160, 0]], np.uint8
    )
    frames = np.ascontiguousarray(
        np.broadcast_to(colours.repeat(16, 0)[None, None], (3, 32, 96, 3))
    )
    write_video(tmp_path / "x.mp4", frames, 8, {})
    np.testing.assert_allclose(
        read_frames(tmp_path / "x.mp4")[:, :, 8::16].astype(int), frames[:, :, 8::16], atol=6
    )


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 49), (33, 49), (1, 1), (16, 16)])
def test_an_odd_side_grows_by_a_repeated_pixel_in_an_mp4_and_stays_elsewhere(
    tmp_path, height, width
):
    frames = clip(3, height, width)
    write_video(tmp_path / "x.mp4", frames, 8, RECIPE)
    back = read_frames(tmp_path / "x.mp4")
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    assert close(back[:, :height, :width], frames) < 4
    assert (
        close(
            back[:, height - 1 :, width - 1 :],
            np.broadcast_to(frames[:, -1:, -1:], back[:, height - 1 :, width - 1 :].shape),
        )
        < 8
    )
    for name in ("x.gif", "x.png"):
        write_video(tmp_path / name, frames, 8, RECIPE)
        assert read_frames(tmp_path / name).shape == frames.shape


def test_frames_that_are_a_strided_view_are_written_as_they_look(tmp_path):
    frames = clip(9)[::-1, ::2, ::-2]
    for name in KINDS:
        write_video(tmp_path / name, frames, 8, {})
        assert close(read_frames(tmp_path / name), frames) < 3


def test_the_same_frames_make_the_same_file(tmp_path):
    for name in ("x.mp4", "x.gif"):
        first = write_video(tmp_path / name, clip(), 8, RECIPE).read_bytes()
        assert write_video(tmp_path / name, clip(), 8, RECIPE).read_bytes() == first


@pytest.mark.parametrize(("fps", "seconds"), [(8, 9 / 8), (16, 9 / 16), (30, 0.3), (1, 9)])
def test_a_gif_loops_and_lasts_as_long_as_the_video(tmp_path, fps, seconds):
    path = write_video(tmp_path / "x.gif", clip(9), fps, RECIPE)
    with Image.open(path) as image:
        assert image.info["loop"] == 0
        total = 0
        for index in range(image.n_frames):
            image.seek(index)
            total += image.info["duration"]
        assert image.n_frames == 9
    assert total == pytest.approx(seconds * 1000, abs=5)


def test_a_gif_step_is_never_so_short_that_browsers_slow_it(tmp_path):
    path = write_video(tmp_path / "x.gif", clip(4), 200, {})
    with Image.open(path) as image:
        assert image.info["duration"] == 20


def test_png_frames_are_named_so_that_they_sort(tmp_path):
    folder = write_video(tmp_path / "out.png", clip(11, 4, 4), 8, RECIPE)
    assert folder == tmp_path / "out"
    assert sorted(file.name for file in folder.iterdir()) == [
        *(f"{index:05d}.png" for index in range(11)),
        "recipe.json",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "take.2.png",
        "a = b; #1.mp4",
        "熊猫.gif",
        "-y.mp4",
        "12:30.mp4",
        "%d.mp4",
        "OUT.MP4",
        "OUT.PNG",
    ],
)
def test_odd_names_are_written_under_that_very_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write_video(name, clip(2), 8, RECIPE)
    assert path == Path(re.sub(r"\.png$", "", name, flags=re.IGNORECASE))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_recipe(name) == RECIPE
    assert len(read_frames(name)) == 2


@pytest.mark.parametrize("name", KINDS)
def test_an_older_output_is_replaced_and_nothing_stays_beside(tmp_path, name):
    write_video(tmp_path / name, clip(5), 8, {"take": 1})
    path = write_video(tmp_path / name, clip(2), 8, {"take": 2})
    assert read_recipe(path) == {"take": 2}
    assert len(read_frames(path)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write_video(tmp_path / "out", clip(2), 8, {})
    assert len(read_frames(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("frames", "fps", "recipe", "named"),
    [
        (clip().astype(np.float32), 8, {}, "frames"),
        (clip()[0], 8, {}, "frames"),
        (clip()[..., :2], 8, {}, "frames"),
        (clip()[:0], 8, {}, "frames"),
        (clip(), 0, {}, "fps"),
        (clip(), -8, {}, "fps"),
        (clip(), float("nan"), {}, "fps"),
        (clip(), float("inf"), {}, "fps"),
        (clip(), 8, {"a": object()}, "recipe"),
        (clip(), 8, {"a": float("nan")}, "recipe"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path, frames, fps, recipe, named):
    with pytest.raises(ValueError, match=f"{named} must") as caught:
        write_video(tmp_path / "x.mp4", frames, fps, recipe)
    one_line(caught)
    assert not list(tmp_path.iterdir())


def test_reading_what_is_no_video_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("text.mp4", "text.gif", "text.png"):
        (tmp_path / name).write_text("this is not a video")
    for name in ("text.mp4", "text.gif", "text.png", "folder"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))) as caught:
            read_frames(tmp_path / name)
        one_line(caught)
    for name in ("no.mp4", "no.gif", "no.png", "no"):
        with pytest.raises(FileNotFoundError, match="no") as caught:
            read_frames(tmp_path / name)
        one_line(caught)


# Other ffmpegs.

UNKNOWN = "echo 'Error splitting the argument list: Option not found' >&2; exit 1"
REAL = f'exec "{imageio_ffmpeg.get_ffmpeg_exe()}" "$@"'


def use_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """Puts a shell script, or nothing, in the place of ffmpeg."""
    fake = folder / "ffmpeg"
    if script is not None:
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))


@pytest.mark.parametrize("option", ["fps_mode", "vsync"])
def test_videos_are_read_by_ffmpegs_that_are_older_or_newer(tmp_path, monkeypatch, option):
    write_video(tmp_path / "x.mp4", clip(9), 8, {})
    script = f'case "$*" in *-{option}*) {UNKNOWN};; esac; {REAL}'
    use_ffmpeg(tmp_path, monkeypatch, script)
    assert close(read_frames(tmp_path / "x.mp4"), clip(9)) < 2.5


def test_every_frame_of_an_uneven_video_is_read_once(tmp_path):
    write_video(tmp_path / "x.mp4", clip(9), 8, {})
    uneven = ["-vf", "setpts=N*N/TB/8", "-c:v", "libx264", "-bf", "2", tmp_path / "uneven.mkv"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "x.mp4", "-enc_time_base", "1/99"]
    subprocess.run([*command, *uneven], check=True, capture_output=True)
    assert close(read_frames(tmp_path / "uneven.mkv"), clip(9)) < 2.5


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (f'case "$*" in *ppm*) {UNKNOWN};; esac; {REAL}', "failed: Error splitting"),
        ("exit 0", "failed: it ended without an error and wrote no picture"),
        ("echo hello", "failed: it ended without an error and wrote no picture"),
        (None, "does not start: .*No such file"),
    ],
)
def test_what_ffmpeg_lacks_is_no_fault_of_a_video(tmp_path, monkeypatch, script, why):
    write_video(tmp_path / "x.mp4", clip(2), 8, {})
    use_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(FfmpegError, match=rf"^ffmpeg {why}.*; .* ppm: unset IMAGEIO_FFMPEG_EXE$"):
        read_frames(tmp_path / "x.mp4")


@pytest.mark.parametrize("script", ["exit 0", 'for last; do :; done; : >"${last#file:}"'])
def test_an_ffmpeg_that_writes_nothing_shows_before_any_slow_work(tmp_path, monkeypatch, script):
    use_ffmpeg(tmp_path, monkeypatch, script)
    with pytest.raises(FfmpegError, match="wrote no mp4; an mp4 needs an ffmpeg with libx264"):
        check_output(tmp_path / "x.mp4")
