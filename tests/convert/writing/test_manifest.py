"""The manifest of a converted folder, and what `check` and `to-torch` find to differ from it."""

import hashlib
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.writing import manifest
from folders import PARTS, one_line, raw, weights

from cogi2v_jax.weights.checkpoint import MANIFEST


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A diffusers folder and its conversion; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("made")
    source = twins.save(twins.pipeline("1.0"), folder / "source")
    return source, Path(to_flax(source, folder / "flax"))


@pytest.fixture
def flax(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "flax"))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def test_the_manifest_lists_sources_and_contents(made: tuple[Path, Path]) -> None:
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
    "a list of files' checksums": (stating(crc32=["x"]), r"must have a manifest of format 2"),
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


def test_check_sums_the_bytes_of_every_file(flax: Path) -> None:
    files = [path for path in sorted(flax.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 50
    for path in files:
        if path.name != MANIFEST:
            whole = path.read_bytes()
            flip(path, len(whole) // 3)
            name = path.relative_to(flax).as_posix()
            assert any(fault.startswith(name) for fault in manifest.check(flax)), name
            path.write_bytes(whole)
    assert list(manifest.check(flax)) == []


def test_check_says_that_an_earlier_folder_has_no_checksums_of_files(flax: Path, capsys) -> None:
    without("crc32")(flax)
    assert main(["check", str(flax)]) == 0
    assert "whole: every tensor, and every file's size (it has no" in capsys.readouterr().out


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 791656\n" % 0


def test_a_pointer_that_was_converted_is_found(flax: Path, capsys) -> None:
    """As versions did which copied the tokenizer unread."""
    path, found = flax / "tokenizer" / "spiece.model", manifest_of(flax)
    path.write_bytes(POINTER)
    found["settings"]["tokenizer/spiece.model"] = hashlib.sha256(POINTER).hexdigest()
    stating(**found)(flax)
    expected = f"cogi2v-convert: {flax}: {path} must be the file itself: got a git-lfs pointer; "
    assert main(["check", str(flax)]) == 1
    assert expected in capsys.readouterr().err
    line = one_line(capsys, ["inspect", flax])
    assert f"{path} must be the file itself" in line


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
def test_to_torch_refuses_leaves_that_differ_from_the_manifest(
    damage: str, flax: Path, tmp_path: Path, capsys
) -> None:
    change, expected = DAMAGE[damage]
    change(flax)
    line = one_line(capsys, ["to-torch", flax, tmp_path / "torch"])
    assert re.search(expected, line), line
    assert not (tmp_path / "torch").exists()
