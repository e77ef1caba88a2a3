"""Files on disk: what a failure leaves, and which targets are refused."""

import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogi2v_jax import disk
from cogi2v_jax.disk import (
    beside,
    cache_folder,
    check_space,
    check_target,
    first_line,
    read_json,
    sha256,
)


def test_the_cache_is_the_users_and_is_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("a", "b") == tmp_path / "cogi2v-jax" / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_a_lack_of_space_is_one_line_naming_the_nearest_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
    check_space(tmp_path / "new" / "folder", 2 * 10**9, "weights")
    line = rf"^{tmp_path} must have 3.0 GB free for weights: got 2.0 GB$"
    with pytest.raises(OSError, match=line):
        check_space(tmp_path / "new" / "folder", 3 * 10**9, "weights")


def test_a_checksum_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"bytes").hexdigest()


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\none\ntwo"), "one"), (ValueError(), "ValueError"), (OSError(" \n"), "OSError")],
)
def test_an_error_has_one_line_also_without_a_message(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_target_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path, name: str) -> None:
    target = old(tmp_path, name)
    with beside(target) as part:
        write(part, name, "new")
        part.with_name("temporary").write_text("")
        assert content(target, name) == "old"
    assert content(target, name) == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["file", "folder"])
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_after_an_error_the_old_target_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    target, replace = old(tmp_path, name), os.replace

    def fail(source: Path, destination: Path) -> None:
        if Path(source).name == "new":
            raise OSError("full")
        replace(source, destination)

    def renew() -> None:
        with beside(target) as part:
            write(part, name, "new")
            if moment == "writing":
                raise OSError("full")

    if moment == "renaming":
        monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        renew()
    assert content(target, name) == "old"
    assert list(tmp_path.iterdir()) == [target]


def write(path: Path, name: str, text: str) -> None:
    if name == "folder":
        path.mkdir()
        path = path / "inside"
    path.write_text(text)


def content(path: Path, name: str) -> str:
    return (path / "inside" if name == "folder" else path).read_text()


def old(folder: Path, name: str) -> Path:
    write(folder / name, name, "old")
    return folder / name


def test_a_target_that_can_be_written_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_text("")
    (tmp_path / "folder").mkdir()
    check_target("curve", tmp_path / "new.PNG", suffix=".png")
    check_target("curve", tmp_path / "old.png", (tmp_path / "folder",), ".png")
    check_target("output", tmp_path / "folder", folder=True)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("..", "x must have a name of 1 to 200 bytes"),
        ("é" * 101, "x must have a name of 1 to 200 bytes"),
        ("a.jpg", r"x must end in \.png"),
        ("missing/a.png", "x must be in an existing, writable folder"),
        ("folder.png", "x must be a file or a new name"),
        ("read/a.png", "x must be outside of what is read"),
        ("read/../input.png", "x must be outside of what is read"),
    ],
)
def test_a_target_that_can_not_be_written_is_refused(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "read").mkdir()
    inputs = (tmp_path / "read", tmp_path / "input.png")
    with pytest.raises(ValueError, match=rf"^{line}: got "):
        check_target("x", tmp_path / name, inputs, ".png")


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("kept")
    with pytest.raises(OSError, match="target"), beside(target) as part:
        part.write_text("new")
    assert (target / "mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("content", "kind", "line"),
    [
        (b"{", ValueError, "must be a JSON file: "),
        (b'{"a": "\xff"}', ValueError, "must be a JSON file: "),
        (b"[1]", ValueError, "must hold a JSON object: got list"),
        (None, FileNotFoundError, "must hold config.json: found none"),
    ],
)
def test_an_unreadable_file_is_one_line_naming_it(
    tmp_path: Path, content: bytes | None, kind: type[Exception], line: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=line) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_json_file_is_read_as_its_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "config.json") == {"é": [1, None]}
