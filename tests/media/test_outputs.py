"""Where videos are written: names that are refused, and what a failure leaves."""

import os
from pathlib import Path

import pytest
from pictures import KINDS, clip, one_line

from cogi2v_jax.media import videos
from cogi2v_jax.media.videos import FfmpegError, check_output, read_frames, write_video


@pytest.mark.parametrize(
    "name",
    ["x.mp4", "x.MP4", "x.gif", "x.png", "x", "x/", "take.2.png", "take.2.mp4", "熊 = a;b.mp4"],
)
def test_good_output_names_pass_and_nothing_is_made(tmp_path, name):
    assert check_output(f"{tmp_path}/{name}") == tmp_path / name
    assert check_output(check_output(tmp_path / name)) == tmp_path / name
    assert not list(tmp_path.iterdir())


def test_a_bare_name_is_written_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_video("x.gif", clip(2), 8, {}) == Path("x.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gif"]


@pytest.mark.parametrize(
    "name", ["x.avi", "x.webm", "x.mp4.txt", "..", "no/x.mp4", "file/x.mp4", f"{'x' * 250}.mp4"]
)
def test_bad_output_names_are_refused(tmp_path, name):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(ValueError, match="output") as caught:
        check_output(tmp_path / name)
    one_line(caught)


@pytest.mark.parametrize("name", ["", ".", "/", ".mp4", "frames/.PNG", ".gif/"])
def test_a_path_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        check_output(name)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    # Root may write anywhere.
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK)
    )
    with pytest.raises(ValueError, match="writable") as caught:
        check_output(tmp_path / "x.mp4")
    one_line(caught)


def test_a_folder_where_a_file_should_go_is_refused_and_the_other_way_round(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "frames").write_text("a file")
    for name in ("x.mp4", "frames"):
        with pytest.raises(ValueError, match="must be") as caught:
            check_output(tmp_path / name)
        one_line(caught)


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "frames"])
@pytest.mark.parametrize("had_one", [False, True], ids=["dangling", "over an older one"])
def test_what_a_link_leads_to_is_written(tmp_path, name, had_one):
    (tmp_path / "disk").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    if had_one:
        write_video(tmp_path / "disk" / name, clip(3), 8, {})
    assert write_video(tmp_path / name, clip(2), 8, {}) == tmp_path / name
    assert (tmp_path / name).is_symlink()
    assert len(read_frames(tmp_path / "disk" / name)) == 2


def test_a_link_out_of_any_folder_is_refused(tmp_path):
    (tmp_path / "x.gif").symlink_to(tmp_path / "gone" / "x.gif")
    with pytest.raises(
        ValueError, match=rf"got {tmp_path}/x.gif; make {tmp_path}/gone or"
    ) as caught:
        check_output(tmp_path / "x.gif")
    one_line(caught)


@pytest.mark.parametrize(
    "names",
    [
        ["holiday.jpg"],
        ["recipe.json", "notes.txt"],
        ["00000.png"],
        ["recipe.json", "00000.png", "a.py"],
    ],
)
def test_a_folder_of_other_things_is_never_replaced(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    for path in (tmp_path, f"{tmp_path}.png"):
        with pytest.raises(ValueError, match="only frames written before") as caught:
            write_video(path, clip(1), 8, {})
        one_line(caught)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_a_mount_point_is_refused_for_it_cannot_be_renamed(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    for path in (tmp_path, link):
        with pytest.raises(ValueError, match="inside it"):
            check_output(path)


def test_a_missing_ffmpeg_shows_before_any_slow_work(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(FfmpegError, match=r"does not start: .*/none"):
        check_output(tmp_path / "x.mp4")
    check_output(tmp_path / "x.gif")


# Failing.


def listing(folder) -> dict:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "error", [OSError("disk full"), KeyboardInterrupt()], ids=["an error", "ctrl-c"]
)
@pytest.mark.parametrize("had_one", [False, True], ids=["fresh", "over an older one"])
def test_a_failure_leaves_no_file_and_keeps_the_old_one(
    tmp_path, monkeypatch, name, error, had_one
):
    if had_one:
        write_video(tmp_path / name, clip(2), 8, {"take": 1})
    before = listing(tmp_path)

    def halfway(part, *_):
        if "." in name and not name.endswith(".png"):
            part.write_bytes(b"half")
        else:
            part.mkdir()
            (part / "00000.png").write_bytes(b"half")
        assert listing(tmp_path) != before, "the half was not even written here"
        raise error

    monkeypatch.setitem(videos.WRITERS, Path(name).suffix, halfway)
    with pytest.raises(type(error)):
        write_video(tmp_path / name, clip(3), 8, {"take": 2})
    assert listing(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == had_one


@pytest.mark.parametrize("name", KINDS)
def test_a_failed_rename_puts_the_old_one_back(tmp_path, monkeypatch, name):
    write_video(tmp_path / name, clip(2), 8, {"take": 1})
    before, replace = listing(tmp_path), os.replace

    def failing(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        write_video(tmp_path / name, clip(3), 8, {"take": 2})
    assert listing(tmp_path) == before


def test_a_failing_ffmpeg_is_one_line_with_its_last_message(tmp_path, monkeypatch):
    write_video(tmp_path / "x.mp4", clip(2), 8, {"take": 1})
    before = listing(tmp_path)
    fake = tmp_path.parent / f"{tmp_path.name}-ffmpeg"
    said = r"a long story\nUnknown encoder libx264\n\n"
    fake.write_text(f'#!/bin/sh\nprintf "{said}" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    for refused in (check_output, lambda path: write_video(path, clip(49), 8, {"take": 2})):
        with pytest.raises(FfmpegError, match=r"^ffmpeg failed: Unknown encoder libx264; an mp4 n"):
            refused(tmp_path / "x.mp4")
    assert listing(tmp_path) == before


def test_a_real_ffmpeg_refusal_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "H264", videos.H264.replace("libx264", "libx999"))
    with pytest.raises(FfmpegError, match=r"^ffmpeg failed: .*[Ee]ncoder.*$"):
        write_video(tmp_path / "x.mp4", clip(2), 8, {})
    assert not list(tmp_path.iterdir())
