"""Converted folders: what is restored is what was written, one piece at a time, and damage is
refused by name."""

import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.conversion import to_flax
from cogi2v_convert.sources.matching import targets

from cogi2v_jax.weights import checkpoint
from cogi2v_jax.weights.checkpoint import (
    MANIFEST,
    Models,
    open_folder,
    read_unit,
    unit_path,
    write_unit,
)
from cogi2v_jax.weights.pieces import (
    NETWORKS,
    PIECES,
    abstract,
    bytes_per_device,
    is_stacked,
    layer_count,
    leaf_names,
    piece,
)

FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return twins.pipeline("1.0")


@pytest.fixture(scope="module")
def converted(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("converted")
    return to_flax(twins.save(pipeline, folder / "source"), folder / "flax")


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "flax"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Every unit that is read, in order."""
    seen, read = [], checkpoint.read_shards

    def read_and_keep(
        folder: Path, part: str, layer: int | None, *others: Any, **named: Any
    ) -> Any:
        seen.append((part, layer))
        return read(folder, part, layer, *others, **named)

    monkeypatch.setattr(checkpoint, "read_shards", read_and_keep)
    return seen


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory of a device, in bytes."""

    def set_limit(size: int) -> None:
        monkeypatch.setattr(checkpoint, "memory_limit", lambda *_: size)

    return set_limit


def refused(call: Callable[..., Any], *arguments: Any) -> str:
    """The one line of a refusal."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert " must " in str(caught.value)
    return str(caught.value)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", NETWORKS)
def test_restoring_gives_what_was_written_in_the_given_dtype(
    part: str, dtype: str, converted: Path, pipeline: Any
) -> None:
    models, leaves = open_folder(converted, jnp.dtype(dtype)), {}
    for name, (owner, prefix) in PIECES.items():
        if owner == part:
            network = leaf_names(models.piece(name))
            leaves |= {prefix + name: np.asarray(leaf) for name, leaf in network.items()}
    tensors = getattr(pipeline, part).state_dict()
    rules = targets(models.config, part)
    assert {leaf.dtype.name for leaf in leaves.values()} == {dtype}
    for name, (rule, layer) in rules.items():
        leaf = leaves[rule.flax] if layer is None else leaves[rule.flax][layer]
        ours = np.ascontiguousarray(rule.to_torch(leaf)).tobytes()
        assert ours == bits(tensors[name].to(getattr(torch, dtype)))
    assert {rule.flax for rule, _ in rules.values()} == leaves.keys()


def test_a_restored_network_computes(converted: Path) -> None:
    text = open_folder(converted, FLOAT32).piece("text_encoder")(jnp.zeros((1, 12), jnp.int32))
    assert text.shape == (1, 12, 20)
    assert bool(jnp.isfinite(text).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_unit_is_read_as_it_was_written_in_every_dtype(
    dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    kind = jnp.dtype(dtype)
    # Random bits, with NaNs of any payload among them.
    drawn = rng.integers(0, 256, (5, 7, kind.itemsize), dtype=np.uint8).view(kind)[..., 0]
    leaves = {
        "any.bits": drawn,
        "negative.zero": np.full((3,), -0.0).astype(kind),
        "zero": np.zeros((2, 2), kind),
        "one": np.ones((1,), kind),
    }
    write_unit(tmp_path, "vae", None, leaves)
    write_unit(tmp_path, "vae", 7, {"other": np.zeros((1,), kind)})
    read = read_unit(tmp_path, "vae", None)
    assert read.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert (read[name].dtype, read[name].shape) == (leaf.dtype, leaf.shape)
        assert read[name].tobytes() == leaf.tobytes()
    assert unit_path(tmp_path, "vae", 7) == tmp_path / "vae" / "weights" / "007"


def test_threads_may_write_and_read_units_at_once(tmp_path: Path) -> None:
    leaves = {f"leaf.{number}": np.full((20, 20), number, np.float32) for number in range(20)}
    write_unit(tmp_path, "shared", 0, leaves)
    faults = []

    def work(number: int) -> None:
        try:
            for layer in range(4):
                write_unit(tmp_path, f"part{number}", layer, leaves)
                for part, written in (("shared", 0), (f"part{number}", layer)):
                    read = read_unit(tmp_path, part, written)
                    assert all(np.array_equal(read[name], leaf) for name, leaf in leaves.items())
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_the_shapes_of_a_network_need_no_memory(converted: Path) -> None:
    config = open_folder(converted, FLOAT32).config
    network = abstract(config, "transformer", FLOAT32)
    leaves = leaf_names(network)
    assert not any(hasattr(leaf, "addressable_shards") for leaf in leaves.values())
    assert leaves["blocks.attn.q.kernel"].shape == (3, 96, 96)
    assert is_stacked("blocks.attn.q.kernel")
    assert not is_stacked("table")
    assert [layer_count(config, part) for part in NETWORKS] == [3, 0, 3]


# pieces


def test_a_piece_is_not_read_before_it_is_needed(converted: Path, reads: list) -> None:
    models = open_folder(converted, FLOAT32)
    assert reads == []
    models.piece("vae")
    assert reads == [("vae", None)]
    models.piece("text_encoder")
    assert reads == [("vae", None), *(("text_encoder", layer) for layer in (None, 0, 1, 2))]


def size(models: Models, *names: str) -> int:
    return sum(bytes_per_device(piece(models.config, name, FLOAT32)) for name in names)


def test_pieces_stay_loaded_where_they_fit_together(
    converted: Path, reads: list, limit: Callable[[int], None]
) -> None:
    models = open_folder(converted, FLOAT32)
    limit(size(models, *PIECES) + 1000)
    first = [models.piece(name, workspace=1000) for name in PIECES]
    count = len(reads)
    assert [models.piece(name, workspace=1000) for name in PIECES] == first
    assert len(reads) == count


def test_the_least_recently_used_piece_is_dropped_first_and_only_where_there_is_no_room(
    converted: Path, limit: Callable[[int], None]
) -> None:
    models = open_folder(converted, FLOAT32)
    limit(size(models, *PIECES) + 1000)
    for name in ("text_encoder", "vae", "modulation", "transformer", "text_encoder"):
        models.piece(name)
    assert models.loaded == ["vae", "modulation", "transformer", "text_encoder"]
    models.piece("transformer", workspace=1001)
    assert models.loaded == ["modulation", "text_encoder", "transformer"]
    # A piece that does not fit is still loaded, alone: the device raises if it can't hold it.
    models.piece("transformer", workspace=2**40)
    assert models.loaded == ["transformer"]


def test_the_memory_of_a_dropped_piece_is_freed(
    converted: Path, limit: Callable[[int], None]
) -> None:
    models = open_folder(converted, FLOAT32)
    limit(size(models, "transformer"))
    gone = weakref.ref(models.piece("text_encoder").norm.scale.get_value())
    models.piece("transformer")
    assert gone() is None


def test_ahead_of_its_stage_a_piece_is_loaded_only_if_no_other_must_be_dropped(
    converted: Path, limit: Callable[[int], None]
) -> None:
    models = open_folder(converted, FLOAT32)
    models.piece("text_encoder")
    limit(size(models, "text_encoder", "transformer"))
    assert models.piece("transformer", workspace=1, ahead=True) is None
    assert models.loaded == ["text_encoder"]
    ahead = models.piece("transformer", ahead=True)
    assert models.piece("transformer") is ahead


def test_a_loaded_piece_that_is_asked_for_ahead_stays_where_its_stage_lacks_room(
    converted: Path, limit: Callable[[int], None], reads: list
) -> None:
    models = open_folder(converted, FLOAT32)
    limit(size(models, "vae", "transformer"))
    first = [models.piece(name) for name in ("vae", "transformer")]
    count = len(reads)
    assert models.piece("vae", workspace=1, ahead=True) is None
    assert models.piece("vae", workspace=1) is first[0]
    assert len(reads) == count


def test_the_pieces_of_the_transformer_are_all_of_it(converted: Path) -> None:
    config = open_folder(converted, FLOAT32).config
    whole = leaf_names(abstract(config, "transformer", FLOAT32))
    blocks, modulation = (
        leaf_names(piece(config, name, FLOAT32)) for name in ("transformer", "modulation")
    )
    assert blocks.keys() | {f"modulation.{name}" for name in modulation} == whole.keys()
    assert not any(name.startswith("modulation") for name in blocks)


def test_the_memory_limit_is_that_of_the_machine() -> None:
    assert 2**28 < checkpoint.memory_limit() < 2**50


def test_a_converted_folder_loads_wherever_it_is_moved(
    folder: Path, converted: Path, tmp_path: Path
) -> None:
    moved = folder.rename(tmp_path / "elsewhere, with a space")
    paths = (moved, converted)
    ours, theirs = (leaf_names(open_folder(path, FLOAT32).piece("vae")) for path in paths)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_relative_path_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert isinstance(open_folder(Path("flax"), FLOAT32), Models)
    open_folder(Path("flax"), FLOAT32).piece("vae")


# broken folders


def test_a_folder_that_is_not_a_converted_one_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} must hold checkpoint.json" in refused(open_folder, tmp_path, FLOAT32)
    assert "checkpoint.json" in refused(open_folder, tmp_path / "nothing", FLOAT32)
    (tmp_path / MANIFEST).write_text("{")
    assert f"{MANIFEST} must be a JSON file" in refused(open_folder, tmp_path, FLOAT32)


def change_manifest(folder: Path, **keys: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | keys))


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_refused(version: Any, folder: Path) -> None:
    change_manifest(folder, format=version)
    line = refused(open_folder, folder, FLOAT32)
    assert f"{folder} must have format 2: got {version!r}; convert its source again" in line


@pytest.mark.parametrize("files", [None, ["transformer/weights/rest"], 3])
def test_a_manifest_without_sizes_of_files_is_refused(files: Any, folder: Path) -> None:
    change_manifest(folder, files=files)
    line = refused(open_folder, folder, FLOAT32)
    assert f"{folder / MANIFEST} must list the sizes of its files" in line


def test_a_missing_configuration_is_refused(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler must hold scheduler_config.json" in refused(open_folder, folder, FLOAT32)


def largest(unit: Path) -> Path:
    files = [path for path in unit.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


INCOMPLETE = {
    "no unit": shutil.rmtree,
    "an empty unit": lambda unit: [shutil.rmtree(unit), unit.mkdir()],
    "a missing file": lambda unit: largest(unit).unlink(),
    "a file cut short": lambda unit: largest(unit).write_bytes(largest(unit).read_bytes()[:-1]),
    "an empty file": lambda unit: largest(unit).write_bytes(b""),
}


@pytest.mark.parametrize("damage", INCOMPLETE)
@pytest.mark.parametrize(("part", "layer"), [("vae", None), ("transformer", 1)])
def test_an_incomplete_copy_is_refused_before_anything_is_loaded(
    part: str, layer: int | None, damage: str, folder: Path, reads: list
) -> None:
    unit = unit_path(folder, part, layer)
    INCOMPLETE[damage](unit)
    line = refused(open_folder, folder, FLOAT32)
    assert f"{folder} must be whole" in line
    assert unit.relative_to(folder).as_posix() in line
    assert reads == []


@pytest.mark.parametrize("damage", ["garbage", "gone", "not a folder"])
@pytest.mark.parametrize(("part", "layer"), [("vae", None), ("transformer", 1)])
def test_a_unit_that_is_damaged_after_opening_is_refused_by_name(
    part: str, layer: int | None, damage: str, folder: Path
) -> None:
    models = open_folder(folder, FLOAT32)
    unit = unit_path(folder, part, layer)
    if damage == "garbage":
        (unit / "_METADATA").write_bytes(b"garbage")
    else:
        shutil.rmtree(unit)
        if damage == "not a folder":
            unit.write_text("x")
    assert f"{unit} must be a whole orbax checkpoint" in refused(models.piece, part)


NARROW = np.zeros((3,), np.float32)


@pytest.mark.parametrize(
    ("removed", "added", "expected"),
    [
        (["norm.scale"], {}, "norm.scale missing"),
        ([], {"new": np.zeros(2)}, "new not of this network"),
        (["norm.scale"], {"norm.scale": NARROW}, "norm.scale [3]"),
        (["embedding", "norm.scale"], {}, "embedding missing, norm.scale missing"),
    ],
)
def test_a_unit_of_another_network_is_refused_with_the_leaves_that_differ(
    removed: list[str], added: dict[str, np.ndarray], expected: str, folder: Path
) -> None:
    models = open_folder(folder, FLOAT32)
    unit = unit_path(folder, "text_encoder", None)
    leaves = read_unit(folder, "text_encoder", None)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in removed} | added
    shutil.rmtree(unit)
    write_unit(folder, "text_encoder", None, leaves)
    line = refused(models.piece, "text_encoder")
    assert f"{unit} must hold the network's leaves: got {expected}" in line


def test_a_relative_path_is_of_the_current_folder(tmp_path: Path, monkeypatch: Any) -> None:
    for number, name in enumerate(("one", "two")):
        (tmp_path / name / "[x]").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        write_unit(Path("[x]"), "vae", None, {"leaf": np.full(3, number)})
        write_unit(Path("x"), "vae", None, {"leaf": np.full(3, number)})
    for number, name in enumerate(("one", "two")):
        monkeypatch.chdir(tmp_path / name)
        for folder in (Path("[x]"), Path("x")):
            np.testing.assert_array_equal(read_unit(folder, "vae", None)["leaf"], number)
