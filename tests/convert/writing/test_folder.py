"""Conversions that are killed, concurrent, without disk space or of invalid weights."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.writing import folder as folder_module
from cogi2v_convert.writing import layers, manifest
from cogi2v_convert.writing.folder import make_folder
from folders import left, one_line, rewrite, weights

from cogi2v_jax import loading
from cogi2v_jax.weights.checkpoint import MANIFEST


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A diffusers folder and its conversion; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("made")
    source = twins.save(twins.pipeline("1.0"), folder / "source")
    return source, Path(to_flax(source, folder / "flax"))


@pytest.fixture
def source(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "source"))


@pytest.fixture
def flax(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "flax"))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


# killed

KILLED = """
import os, signal, sys
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.writing import layers
write, count = layers.write_unit, 0
def write_then_kill(*args):
    global count
    write(*args)
    count += 1
    if count == 6:
        os.kill(os.getpid(), signal.SIGKILL)
layers.write_unit = write_then_kill
to_flax(sys.argv[1], sys.argv[2])
"""


def kill(source: Path, destination: Path) -> None:
    """Converts in a process that is killed when it has written six of nine units."""
    command = [sys.executable, "-c", KILLED, str(source), str(destination)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """The units that are written from here on."""
    seen, write = [], layers.write_unit

    def watch(folder: Path, part: str, layer: int | None, leaves: dict) -> None:
        seen.append((part, layer))
        write(folder, part, layer, leaves)

    monkeypatch.setattr(layers, "write_unit", watch)
    return seen


def test_a_killed_conversion_leaves_only_a_hidden_folder_that_does_not_load(
    source: Path, tmp_path: Path
) -> None:
    kill(source, tmp_path / "flax")
    assert left(tmp_path) == {"source", ".flax.part"}
    assert left(tmp_path / ".flax.part") >= {"transformer", "vae"}
    with pytest.raises((ValueError, FileNotFoundError)):
        loading.load(tmp_path / ".flax.part")


def test_the_next_conversion_after_a_kill_makes_the_whole_folder_from_the_start(
    source: Path, made: tuple[Path, Path], tmp_path: Path, written: list
) -> None:
    kill(source, tmp_path / "flax")
    (tmp_path / ".flax.part" / "vae" / "weights" / "stale").touch()
    to_flax(source, tmp_path / "flax")
    assert len(written) == len(set(written)) == 9
    assert left(tmp_path) == {"source", "flax"}
    # Orbax names its files at random; leaves, settings and all else are equal.
    random = {"files": None, "crc32": None}
    ours, whole = (manifest_of(folder) | random for folder in (tmp_path / "flax", made[1]))
    assert ours == whole
    assert list(manifest.check(tmp_path / "flax")) == []


def test_a_conversion_of_something_else_takes_nothing_from_a_killed_one(
    source: Path, tmp_path: Path, written: list
) -> None:
    kill(source, tmp_path / "flax")
    rewrite(source, "transformer", lambda tensors: tensors["proj_out.bias"].add_(1))
    to_flax(source, tmp_path / "flax", "bfloat16")
    assert len(written) == 9
    assert manifest_of(tmp_path / "flax")["dtype"] == "bfloat16"
    assert list(manifest.check(tmp_path / "flax")) == []


# where


@pytest.mark.parametrize("here", [".", "../here", "{}"])
def test_the_current_folder_is_refused(
    here: str, source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = one_line(capsys, ["to-flax", source, here.format(tmp_path / "here")])
    assert line.endswith(" must be a new name: got the current folder")
    assert left(tmp_path) == {"source", "here"}
    assert left(tmp_path / "here") == set()


def test_a_folder_that_can_not_be_made_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    line = one_line(capsys, ["to-flax", source, tmp_path / "file" / "flax"])
    assert line.endswith(
        f"file/flax must be in a folder that can be made: File exists: {tmp_path / 'file'}"
    )
    assert left(tmp_path) == {"source", "file"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_to_the_folder_that_is_filled(there: bool, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "real").mkdir()
    (tmp_path / "link").symlink_to("disk/real")
    with make_folder(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert left(tmp_path) == {"disk", "link"}
    assert left(tmp_path / "disk") == {"real"}
    assert left(tmp_path / "link") == {"file"}


def test_a_link_to_itself_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(FileExistsError, match="must not exist yet"), make_folder(tmp_path / "link"):
        pytest.fail("the work was done")
    assert left(tmp_path) == {"link"}


# concurrent


def test_two_conversions_into_one_folder_are_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    part = tmp_path / ".flax.part"
    part.mkdir()
    (part / "mine").touch()
    lock = os.open(part, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert line.endswith("flax is being made by another program")
    assert left(part) == {"mine"}
    os.close(lock)
    assert main(["to-flax", str(source), str(tmp_path / "flax")]) == 0


def test_a_waiting_conversion_finds_the_folder_of_the_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go, write = threading.Event(), threading.Event(), layers.write_unit

    def slow(*args: object) -> None:
        started.set()
        assert go.wait(60)
        write(*args)

    monkeypatch.setattr(layers, "write_unit", slow)
    first = threading.Thread(target=to_flax, args=(source, tmp_path / "flax"))
    first.start()
    assert started.wait(60)
    errors: list[BaseException] = []

    def second() -> None:
        try:
            to_flax(source, tmp_path / "flax", wait=True)
        except FileExistsError as error:
            errors.append(error)

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    go.set()
    for thread in (first, waiting):
        thread.join(60)
        assert not thread.is_alive()
    assert len(errors) == 1
    assert left(tmp_path) == {"source", "flax"}
    assert list(manifest.check(tmp_path / "flax")) == []


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.ENOTEMPTY, "must not exist yet: another program made it meanwhile"),
        (errno.EEXIST, "must not exist yet: another program made it meanwhile"),
        (errno.EACCES, "Permission denied"),
        (errno.EXDEV, "Invalid cross-device link"),
    ],
)
def test_why_the_finished_folder_could_not_get_its_name_is_said(
    code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, destination: Path) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(destination))

    monkeypatch.setattr(folder_module.os, "rename", fail)
    with pytest.raises(OSError, match=line) as caught, make_folder(tmp_path / "flax") as folder:
        (folder / "file").touch()
    assert isinstance(caught.value, FileExistsError) == ("must not exist" in line)
    assert left(tmp_path) == set()


def test_a_folder_is_on_the_disk_before_it_gets_its_name(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, a name whose bytes were not written yet would be of empty files."""
    synced, renamed, sync, rename = set(), [], os.fsync, os.rename

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def check(folder: Path, destination: Path) -> None:
        if Path(destination).parent == tmp_path:  # orbax renames too
            renamed.append(destination)
            lacking = {path for path in Path(folder).rglob("*") if path.stat().st_ino not in synced}
            assert lacking == set()
        rename(folder, destination)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "rename", check)
    to_flax(made[0], tmp_path / "flax")
    to_torch(made[1], tmp_path / "torch")
    assert renamed == [tmp_path / "flax", tmp_path / "torch"]


# without disk space


def test_a_full_disk_is_an_error_before_anything_is_written(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    written: list,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert re.search(rf": {tmp_path} must have [\d.]+ MB free for .*: got 1.0 MB$", line), line
    assert left(tmp_path) == {"source"}
    assert written == []


def test_a_disk_that_fills_up_meanwhile_ends_in_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """On a real disk, if this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        usage = shutil.disk_usage
        answers = iter([SimpleNamespace(free=10**12)])  # the first check passes
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers, None) or usage(path))
        line = one_line(capsys, ["to-flax", source, disk / "flax"])
        must = r"/disk must have [\d.]+ MB free for a layer of the transformer: got [\d.]+ MB$"
        assert re.search(must, line), line
        assert left(disk) == set()
    finally:
        subprocess.run(["umount", disk], check=True)


# invalid weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(
    value: float, dtype: torch.dtype, source: Path, tmp_path: Path, capsys
) -> None:
    def set_value(tensors: dict) -> None:
        tensors["transformer_blocks.1.ff.net.2.weight"] = tensors[
            "transformer_blocks.1.ff.net.2.weight"
        ].to(dtype)
        tensors["transformer_blocks.1.ff.net.2.weight"][5, 7] = value

    rewrite(source, "transformer", set_value)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"transformer_blocks.1.ff.net.2.weight must be finite: got {value} at [5, 7]" in line
    assert left(tmp_path) == {"source"}


def test_a_weight_that_a_cast_makes_infinite_is_named(source: Path, tmp_path: Path, capsys) -> None:
    def enlarge(tensors: dict) -> None:
        tensors["proj_out.bias"] = tensors["proj_out.bias"].double()
        tensors["proj_out.bias"][3] = 1e300

    rewrite(source, "transformer", enlarge)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax", "--dtype", "bfloat16"])
    assert "proj_out.bias in bfloat16 must be finite: got inf at [3]" in line


def test_a_file_that_differs_from_its_hash_on_the_hub_is_refused(
    source: Path, tmp_path: Path, capsys
) -> None:
    """The hub's cache calls a large file by its SHA-256, and the snapshot's name is a link to
    it."""
    file = weights(source, "vae")
    data = bytearray(file.read_bytes())
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    file.unlink()
    file.symlink_to(blob)
    blob.write_bytes(data)
    assert main(["to-flax", str(source), str(tmp_path / "flax")]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "flax")
    data[-3] ^= 1
    blob.write_bytes(data)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"must have the SHA-256 {blob.name}, as the hub says: got " in line
    assert not (tmp_path / "flax").exists()
