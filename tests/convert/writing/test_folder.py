"""Folders in the making: killed, crowded, without room, of spoilt weights; and what a finished one
says of itself."""

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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.writing import layers, manifest
from folders import PARTS, left, one_line, raw, rewrite, weights

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
    ours, whole = (manifest_of(folder) | {"files": None} for folder in (tmp_path / "flax", made[1]))
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
def test_the_current_folder_is_no_new_name(
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


# crowded


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


def test_who_waits_for_another_conversion_finds_its_folder(
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


# without room


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    written: list,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert "must have 0.0 GB free for" in line
    assert left(tmp_path) == {"source"}
    assert written == []


def test_a_disk_that_fills_meanwhile_ends_in_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A real one, where this process may make it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        usage = shutil.disk_usage
        answers = iter([SimpleNamespace(free=10**12)])  # there seems to be room, at first
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers, None) or usage(path))
        line = one_line(capsys, ["to-flax", source, disk / "flax"])
        assert (
            "disk/.flax.part must have 0.0 GB free for a layer of the transformer: got 0.0 GB"
            in line
        )
        assert left(disk) == set()
    finally:
        subprocess.run(["umount", disk], check=True)


# spoilt


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(
    value: float, dtype: torch.dtype, source: Path, tmp_path: Path, capsys
) -> None:
    def spoil(tensors: dict) -> None:
        tensors["transformer_blocks.1.ff.net.2.weight"] = tensors[
            "transformer_blocks.1.ff.net.2.weight"
        ].to(dtype)
        tensors["transformer_blocks.1.ff.net.2.weight"][5, 7] = value

    rewrite(source, "transformer", spoil)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"transformer_blocks.1.ff.net.2.weight must be finite: got {value} at [5, 7]" in line
    assert left(tmp_path) == {"source"}


def test_a_number_that_a_cast_makes_infinite_is_named(source: Path, tmp_path: Path, capsys) -> None:
    def enlarge(tensors: dict) -> None:
        tensors["proj_out.bias"] = tensors["proj_out.bias"].double()
        tensors["proj_out.bias"][3] = 1e300

    rewrite(source, "transformer", enlarge)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax", "--dtype", "bfloat16"])
    assert "proj_out.bias in bfloat16 must be finite: got inf at [3]" in line


def test_a_flipped_byte_of_a_file_whose_hash_the_hub_knows_is_found(
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


# finished


def test_the_manifest_says_what_a_folder_was_made_of_and_what_is_in_it(
    made: tuple[Path, Path],
) -> None:
    source, flax = made
    found = manifest_of(flax)
    for part in PARTS:
        (entry,) = found["sources"][part]
        file = weights(source, part)
        assert entry == {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        assert found["count"][part] == len(raw(source, part))
        leaves = [leaf for unit in found["leaves"][part].values() for leaf in unit.values()]
        assert len(leaves) == found["count"][part]
        # The reference keeps its learned table in float64.
        assert {leaf["dtype"] for leaf in leaves} <= {"float32", "float64"}
        assert all(len(leaf["crc32"]) == 8 for leaf in leaves)
    assert found["versions"]["orbax-checkpoint"] == version("orbax-checkpoint")
    assert found["dtype"] is None
    assert set(found["settings"]) >= {
        "transformer/config.json",
        "tokenizer/spiece.model",
        "scheduler/scheduler_config.json",
    }


def test_check_finds_nothing_in_a_whole_folder(flax: Path, capsys) -> None:
    assert main(["check", str(flax)]) == 0
    assert capsys.readouterr().out == f"{flax}: whole: every file and every tensor\n"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def without(*way: str):
    def change(folder: Path) -> None:
        found = inner = manifest_of(folder)
        for key in way[:-1]:
            inner = inner[key]
        del inner[way[-1]]
        (folder / MANIFEST).write_text(json.dumps(found))

    return change


def stating(**values: object):
    def change(folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(manifest_of(folder) | values))

    return change


DAMAGE = {
    "a byte of a layer": (
        lambda folder: flip(largest(folder / "transformer" / "weights" / "001"), -9000),
        r"transformer/weights/001",
    ),
    "a byte of the VAE": (
        lambda folder: flip(largest(folder / "vae" / "weights" / "rest"), 70000),
        r"vae/weights/rest",
    ),
    "a weight file less": (
        lambda folder: largest(folder / "text_encoder" / "weights" / "002").unlink(),
        r"must have \d+ bytes: got no such",
    ),
    "a layer less": (
        lambda folder: shutil.rmtree(folder / "transformer" / "weights" / "000"),
        r"transformer/weights/000",
    ),
    "a file more": (
        lambda folder: (folder / "vae" / "weights" / "more").touch(),
        r"vae/weights/more must not be there",
    ),
    "a configuration": (
        lambda folder: flip(folder / "vae" / "config.json", -2),
        r"vae/config.json must",
    ),
    "the tokenizer": (
        lambda folder: flip(folder / "tokenizer" / "spiece.model", 100),
        r"tokenizer/spiece.model must have the SHA-256",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer" / "spiece.model").unlink(),
        r"tokenizer/spiece.model is missing",
    ),
    "no checksums": (without("leaves"), r"must have a manifest of format 2"),
    "no checksums of a part": (
        without("leaves", "vae"),
        r"vae/weights/rest must hold the 0 tensors that the manifest has: got \d+",
    ),
    "no checksum of a tensor": (
        without("leaves", "transformer", "001", "blocks.attn_norm.bias"),
        r"transformer/weights/001 must hold the \d+ tensors",
    ),
    "a number for checksums": (
        stating(leaves={"transformer": 5}),
        r"must have a manifest of format 2",
    ),
    "a list of files": (stating(files=["x"]), r"must have a manifest of format 2"),
    "a name with a line's end": (stating(settings={"a\nb": "0"}), r"a\\nb is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), r"checkpoint.json"),
    "half a manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:500]),
        r"checkpoint.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_what_is_damaged(damage: str, flax: Path, capsys) -> None:
    change, expected = DAMAGE[damage]
    change(flax)
    assert main(["check", str(flax)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("cogi2v-convert: ") for line in lines)
    assert any(re.search(expected, line) for line in lines), lines


@pytest.mark.parametrize(
    "damage",
    [
        "a byte of a layer",
        "a byte of the VAE",
        "no checksums of a part",
        "no checksum of a tensor",
        "a number for checksums",
    ],
)
def test_no_weights_are_given_back_but_those_that_were_made(
    damage: str, flax: Path, tmp_path: Path, capsys
) -> None:
    change, expected = DAMAGE[damage]
    change(flax)
    line = one_line(capsys, ["to-torch", flax, tmp_path / "torch"])
    assert re.search(expected, line), line
    assert not (tmp_path / "torch").exists()
