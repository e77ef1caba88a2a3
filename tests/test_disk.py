"""Files on disk: what a failure leaves, and which targets are refused."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogi2v_jax import disk
from cogi2v_jax.disk import (
    cache_folder,
    check_space,
    check_target,
    first_line,
    parse_json,
    read_json,
    read_toml,
    replace_when_done,
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
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 10**6))
    with pytest.raises(OSError, match=r"must have 5.3 MB free for weights: got 2.0 MB$"):
        check_space(tmp_path, 53 * 10**5, "weights")


def test_a_checksum_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"bytes").hexdigest()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\none\ntwo"), "one"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
        (ValueError("found \x1b[2J"), r"found \x1b[2J"),
    ],
)
def test_an_error_has_one_line_also_without_a_message(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_target_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path, name: str) -> None:
    target = old(tmp_path, name)
    with replace_when_done(target) as part:
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
        with replace_when_done(target) as part:
            write(part, name, "new")
            if moment == "writing":
                raise OSError("full")

    if moment == "renaming":
        monkeypatch.setattr(disk.os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        renew()
    assert content(target, name) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_target_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a power cut, a name whose bytes were not written yet would be of an empty file."""
    synced, sync, replace = set(), os.fsync, os.replace

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def check(source: Path, destination: Path) -> None:
        inside = [Path(source), *Path(source).rglob("*")]
        assert {path.stat().st_ino for path in inside} <= synced
        replace(source, destination)

    monkeypatch.setattr(disk.os, "fsync", record)
    monkeypatch.setattr(disk.os, "replace", check)
    with replace_when_done(tmp_path / name) as part:
        write(part, name, "new")
    assert tmp_path.stat().st_ino in synced
    assert content(tmp_path / name, name) == "new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.EIO])
def test_a_disk_that_can_not_sync_is_written_to_and_one_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, "no")

    def renew() -> None:
        with replace_when_done(target) as part:
            part.write_text("new")

    target = old(tmp_path, "file")
    monkeypatch.setattr(disk.os, "fsync", fail)
    if code == errno.EIO:
        with pytest.raises(OSError, match="no"):
            renew()
    else:
        renew()
    assert target.read_text() == ("old" if code == errno.EIO else "new")


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
    with pytest.raises(OSError, match="target"), replace_when_done(target) as part:
        part.write_text("new")
    assert (target / "mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(
    ("content", "kind", "line"),
    [
        (b"{", ValueError, "must be a JSON file: "),
        (b'{"a": "\xff"}', ValueError, "must be a JSON file: "),
        (b"[1]", ValueError, "must hold a JSON object: got list"),
        (b'{"a": ' * 99_999, ValueError, "must be a JSON file: .* at most 64 deep: got more"),
        (b"1" * 400, ValueError, "must be a JSON file: .* at most 300 digits: got 400"),
        (b"1" * 9999, ValueError, "must be a JSON file: .* at most 300 digits: got 9999"),
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
    (tmp_path / "config.json").write_text("{}", encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {}


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    must = rf"^{tmp_path}/photo.png must be a folder with checkpoint.json: got a file$"
    with pytest.raises(FileNotFoundError, match=must):
        read_json(tmp_path / "photo.png" / "checkpoint.json")


def test_json_is_read_as_deep_and_as_long_as_any_reader_can_take() -> None:
    for text in ("[" * 64 + "]" * 64, "-" + "9" * 299, '{"a": [1, -2.5e300, "x", null, true]}'):
        assert parse_json(text) == json.loads(text)
    for text in ("[" * 65 + "]" * 65, '{"a":' * 65 + "0" + "}" * 65, "9" * 301, b"\xff", "{"):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (each has a message of its own)
            parse_json(text)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [None, b"a = ", b"\xff", b"a = " + b"[" * 9999])
def test_an_unreadable_toml_file_is_one_line_naming_it(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} must be a TOML file: ") as caught:
        read_toml(path)
    assert str(caught.value).isprintable()


def test_a_user_without_a_home_has_a_cache_for_this_process(monkeypatch) -> None:
    def homeless(name: str) -> Path:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(disk, "user_cache_path", homeless)
    folder = disk.cache_folder("converted")
    assert folder == disk.cache_folder("converted") == disk.process_folder() / "converted"
    assert disk.process_folder().is_dir()
