"""Lists of clips in every layout, and which frames of a video are taken."""

import errno
import json
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from footage import film, indices

from cogi2v_jax.media.videos import read_frames, write_video
from cogi2v_jax.training.clips import Bucket, choose_bucket, choose_frames, list_clips, read_clip

NAMES, CAPTIONS = ("a.mp4", "sub/b c.MOV"), ("it moves", "ein Kreis, „groß“\u2028und rot")
BOM = "\ufeff"


def beside(folder: Path) -> Path:
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text(f"{BOM}{caption}\n", encoding="utf-8")
    (folder / ".hidden.mp4").touch()
    return folder


def lines(folder: Path, prompts: str = "prompts.txt", videos: str = "videos.txt") -> Path:
    (folder / prompts).write_text("\r\n".join(CAPTIONS) + "\r\n", encoding="utf-8")
    (folder / videos).write_text(BOM + "\n".join(NAMES), encoding="utf-8")
    return folder


def lines_of_other_names(folder: Path) -> Path:
    return lines(folder, "prompt.txt", "video.txt")


def table(folder: Path, name: str, *columns: str) -> Path:
    rows = [dict(zip(columns, row, strict=False)) for row in zip(NAMES, CAPTIONS, strict=True)]
    if name.endswith("csv"):
        cells = [columns, *(row.values() for row in rows)]
        text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in cells)
    else:
        text = "\n".join(map(json.dumps, rows))
    (folder / name).write_text(BOM + text, encoding="utf-8")
    return folder / name


def a_csv(folder: Path) -> Path:
    return table(folder, "list.csv", "video", "caption")


def a_jsonl(folder: Path) -> Path:
    return table(folder, "list.jsonl", "video", "caption")


def hub_csv(folder: Path) -> Path:
    return table(folder, "metadata.csv", "file_name", "prompt").parent


def hub_jsonl(folder: Path) -> Path:
    path = table(folder, "metadata.jsonl", "file_name", "text")
    lines = [json.loads(line) | {"width": 720} for line in path.read_text("utf-8-sig").split("\n")]
    path.write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize(
    "layout", [beside, lines, lines_of_other_names, a_csv, a_jsonl, hub_csv, hub_jsonl]
)
def test_every_layout_gives_the_same_clips(layout, tmp_path: Path) -> None:
    clips = list_clips(layout(tmp_path))
    assert tuple(clip.name for clip in clips) == NAMES
    assert tuple(clip.path for clip in clips) == tuple(tmp_path / name for name in NAMES)
    assert tuple(clip.caption for clip in clips) == CAPTIONS


POINTER = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({"a.mp4": "", "b.mp4": "", "b.txt": " "}, ".", ("a.mp4: it must have a caption", "b.mp4")),
        ({"a.mp4": "", "a.txt": POINTER}, ".", ("git-lfs pointer",)),
        ({"a.mp4": "", "a.txt": "x"}, "a.mp4", ("a .csv or a .jsonl",)),
        ({"notes.txt": "x"}, ".", ("which has none",)),
        ({}, "nowhere", ("found no",)),
        ({"prompts.txt": "a\nb", "videos.txt": "c"}, ".", ("equally many lines: got 2 and 1",)),
        ({"prompts.txt": "a\n\nb", "videos.txt": "c\nd\ne"}, ".", ("line 2: it must have a",)),
        ({"prompts.txt": "a", "prompt.txt": "a", "videos.txt": "c"}, ".", ("one list",)),
        ({"metadata.csv": "a", "metadata.jsonl": "a"}, ".", ("one list",)),
        ({"x.csv": "video,caption\na.mp4,\n,b\n"}, "x.csv", ("line 2: it must", "line 3: it must")),
        ({"x.csv": "path,caption\na.mp4,b\n"}, "x.csv", ("line 2: columns must be", "path")),
        ({"metadata.csv": "file_name,text\na.mp4,b,c\n"}, ".", ("beyond the header",)),
        ({"x.csv": "video,caption\na," + "b" * 200_000}, "x.csv", ("x.csv must be a CSV",)),
        ({"x.csv": POINTER}, "x.csv", ("git-lfs pointer",)),
        ({"x.csv": b"video,caption\na,\xff\n"}, "x.csv", ("UTF-8",)),
        (
            {"x.jsonl": '{"video": "a"\n[1]\n{"video": 3}'},
            "x.jsonl",
            ("line 1", "line 2", "line 3"),
        ),
        ({"x.jsonl": "[]\n" * 99}, "x.jsonl", ("line 20", "and 79 more")),
    ],
)
def test_all_wrong_rows_are_named_in_one_line(files, source, said, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list_clips(tmp_path / source)
    assert [part for part in said if part not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


BUCKETS = [Bucket(49, 480, 720), Bucket(25, 480, 720), Bucket(49, 720, 480), Bucket(9, 480, 720)]


@pytest.mark.parametrize(
    ("frames", "height", "width", "expected"),
    [
        (100, 1080, 1920, 0),
        (100, 1920, 1080, 2),
        (49, 480, 720, 0),
        (48, 480, 720, 1),
        (48, 720, 480, 1),  # none of its ratio is as short
        (9, 720, 480, 3),
        (100, 100, 101, 0),
        (100, 101, 100, 2),
    ],
)
def test_a_clip_has_the_nearest_ratio_and_then_the_most_frames(
    frames: int, height: int, width: int, expected: int
) -> None:
    assert choose_bucket(BUCKETS, frames, height, width) == expected


def test_a_clip_too_short_for_every_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 9 frames: got 8"):
        choose_bucket(BUCKETS, 8, 480, 720)


@pytest.mark.parametrize(
    ("frames", "rate", "expected"),
    [
        (5, 100.0, [0, 1, 2, 3, 4]),  # all, whatever the rate
        (5, 1.0, [0, 1, 2, 3, 4]),
        (100, 8.0, [0, 1, 2, 3, 4]),
        (100, 24.0, [0, 3, 6, 9, 12]),
        (100, 30.0, [0, 4, 8, 11, 15]),
        (100, 20.0, [0, 3, 5, 8, 10]),
        (9, 30.0, [0, 2, 4, 6, 8]),  # too short for 8 a second
        (8, 30.0, [0, 2, 4, 5, 7]),
    ],
)
def test_frames_are_as_near_to_the_rate_asked_for_as_the_clip_is_long(
    frames: int, rate: float, expected: list[int]
) -> None:
    assert choose_frames(5, frames, rate, 8.0) == expected
    assert choose_frames(1, frames, rate, 8.0) == [0]


def ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"])
def test_frames_of_every_container_are_those_asked_for(suffix: str, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=20, fps=20)
    if suffix != ".mp4":
        ffmpeg("-i", path, path := path.with_suffix(suffix))
    number, frames = read_clip(path, [Bucket(5, 32, 32)], 8.0)
    assert (number, frames.shape, frames.dtype) == (0, (5, 32, 32, 3), np.uint8)
    assert indices(frames) == [0, 3, 5, 8, 10]


def test_colours_are_those_that_ffmpeg_reads(tmp_path: Path, rng: np.random.Generator) -> None:
    coarse = rng.integers(0, 256, (9, 4, 4, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", coarse.repeat(16, axis=1).repeat(16, axis=2), 8, {})
    _, frames = read_clip(path, [Bucket(9, 64, 64)], 8.0)
    assert np.array_equal(frames, read_frames(path))


def test_a_rotated_video_is_upright(tmp_path: Path, rng: np.random.Generator) -> None:
    coarse = rng.integers(0, 256, (9, 4, 8, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    path = write_video(tmp_path / "a.mp4", coarse, 8, {})
    ffmpeg("-display_rotation", 90, "-i", path, "-c", "copy", tmp_path / "b.mp4")
    number, frames = read_clip(tmp_path / "b.mp4", [Bucket(9, 64, 128), Bucket(9, 128, 64)], 8.0)
    assert number == 1
    assert np.array_equal(frames, read_frames(tmp_path / "b.mp4"))


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    path, wide = film(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    shape = "h264_metadata=sample_aspect_ratio=2/1"
    ffmpeg("-i", path, "-c", "copy", "-bsf:v", shape, wide)
    assert read_clip(wide, [Bucket(9, 64, 64), Bucket(9, 32, 64)], 8.0)[0] == 1


def test_a_video_with_fewer_frames_than_it_says_gives_those_it_has(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=20, fps=20)
    ffmpeg("-i", path, path := path.with_suffix(".avi"))
    data = bytearray(path.read_bytes())
    for chunk, field in ((b"avih", 16), (b"strh", 32)):  # the number of frames
        at = data.index(chunk) + 8 + field
        assert int.from_bytes(data[at : at + 4], "little") == 20
        data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    assert indices(read_clip(path, [Bucket(20, 64, 64)], 2.0)[1]) == list(range(20))
    with pytest.raises(ValueError, match="at least 25 frames: got 20"):
        read_clip(path, [Bucket(25, 64, 64)], 8.0)


def test_a_fault_of_the_system_is_no_fault_of_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match=r"a\.mp4 cannot be read now: Stale file handle"):
        read_clip(tmp_path / "a.mp4", [Bucket(9, 16, 16)], 8.0)


def test_a_clip_that_is_of_no_use_says_why(tmp_path: Path) -> None:
    (tmp_path / "garbage.mp4").write_bytes(b"no video" * 99)
    (tmp_path / "pointer.mp4").write_text(POINTER)
    (tmp_path / "empty.mp4").touch()
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.1", tmp_path / "sound.mp4")
    film(tmp_path / "short.mp4", frames=8)
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    found = {}
    for name in ("garbage", "pointer", "empty", "sound", "short", "cut", "missing"):
        with pytest.raises(ValueError, match=r"\A.+\Z") as caught:
            read_clip(tmp_path / f"{name}.mp4", [Bucket(9, 64, 64)], 8.0)
        found[name] = str(caught.value)
    invalid = "it cannot be read: Invalid data found when processing input"
    assert [found.pop(name) for name in ("garbage", "empty", "cut")] == [invalid] * 3
    assert "git-lfs" in found.pop("pointer")
    assert found == {
        "sound": "it has no video",
        "short": "it must have at least 9 frames: got 8",
        "missing": "there is no such file",
    }
