"""A converted folder with a trained part."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.sources.matching import targets
from cogi2v_convert.writing import layers
from cogi2v_convert.writing.trained import write_trained
from diffusers import CogVideoXImageToVideoPipeline
from folders import left, raw, settings

import cogi2v_jax
from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.weights.checkpoint import MANIFEST, read_config, write_unit
from cogi2v_jax.weights.pieces import abstract, is_stacked, leaf_names


@pytest.fixture(scope="module")
def flax(saved: dict[str, Path], family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(to_flax(saved[family], tmp_path_factory.mktemp("base") / "flax"))


class Stack:
    """Layers of a leaf that must not be copied at once."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape

    def __getitem__(self, layer: int) -> Any:
        return jnp.asarray(self.array[layer])

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("one layer at a time is to be copied")


def random_leaves(config: CheckpointConfig, part: str) -> dict[str, np.ndarray]:
    random, expected = np.random.default_rng(0), leaf_names(abstract(config, part, jnp.dtype("f4")))
    return {
        name: 0.1 * random.standard_normal(leaf.shape).astype(np.float32)
        for name, leaf in expected.items()
    }


def stacked(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: Stack(leaf) if is_stacked(name) else leaf for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("part", "dtype"), [("transformer", "float32"), ("transformer", "bfloat16"), ("vae", "float32")]
)
def test_a_folder_has_the_trained_part_and_the_base_of_all_else(
    flax: Path, saved: dict[str, Path], family: str, part: str, dtype: str, tmp_path: Path
) -> None:
    config = read_config(flax)
    leaves = random_leaves(config, part)
    folder = tmp_path / "trained"
    assert write_trained(flax, folder, part, stacked(leaves), dtype) == folder
    assert left(tmp_path) == {"trained"}
    assert main(["check", str(folder)]) == 0
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["crc32"].keys() == manifest["files"].keys()
    # In our network.
    networks = (("transformer", ""), ("modulation", "modulation.")) if part != "vae" else ()
    models = cogi2v_jax.load(folder, "float32")
    for piece, prefix in networks or (("vae", ""),):
        for name, leaf in leaf_names(models.piece(piece)).items():
            np.testing.assert_array_equal(leaf, leaves[prefix + name].astype(jnp.dtype(dtype)))
    # In diffusers.
    back = Path(to_torch(folder, tmp_path / "back"))
    loaded = CogVideoXImageToVideoPipeline.from_pretrained(back)
    state = getattr(loaded, part).state_dict()
    for name, (rule, layer) in targets(config, part).items():
        leaf = leaves[rule.flax] if layer is None else leaves[rule.flax][layer]
        theirs = torch.tensor(rule.to_torch(leaf)).to(getattr(torch, dtype))
        assert torch.equal(state[name].to(theirs.dtype), theirs), name
    assert settings(back) == settings(saved[family])
    for other in {"transformer", "vae", "text_encoder"} - {part}:
        assert raw(back, other) == raw(saved[family], other)


first = pytest.mark.parametrize("family", ["1.0"], indirect=True)


@first
def test_weights_of_other_parts_are_linked_and_files_for_people_are_not(
    flax: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "trained"
    write_trained(flax, folder, "vae", random_leaves(read_config(flax), "vae"))
    names = json.loads((flax / MANIFEST).read_text())
    assert {name: (folder / name).samefile(flax / name) for name in names["settings"]} == (
        dict.fromkeys(names["settings"], False)
    )
    others = [name for name in names["files"] if not name.startswith("vae/")]
    assert len(others) > 10
    assert all((folder / name).samefile(flax / name) for name in others)


@first
def test_a_disk_without_links_gets_copies(
    flax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "trained"
    write_trained(flax, folder, "vae", random_leaves(read_config(flax), "vae"))
    assert main(["check", str(folder)]) == 0


@first
@pytest.mark.parametrize(
    ("change", "must"),
    [
        (lambda leaves: leaves["out.bias"].__setitem__(0, np.inf), "out.bias must be finite: got "),
        (
            lambda leaves: leaves.update({"out.bias": np.zeros(3, np.float32)}),
            r"the trained transformer must fit the network: out.bias must have the shape \(\d+,\): "
            r"got \(3,\)$",
        ),
        (lambda leaves: leaves.pop("out.bias"), "out.bias is missing$"),
    ],
    ids=["not finite", "of another shape", "missing"],
)
def test_leaves_that_are_no_weights_of_the_base_leave_nothing_behind(
    flax: Path, change: Any, must: str, tmp_path: Path
) -> None:
    leaves = random_leaves(read_config(flax), "transformer")
    change(leaves)
    with pytest.raises(ValueError, match=must):
        write_trained(flax, tmp_path / "trained", "transformer", leaves)
    assert left(tmp_path) == set()


@first
def test_a_unit_that_reads_back_as_another_is_refused(
    flax: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, part: str, layer: int | None, leaves: dict[str, np.ndarray]) -> None:
        write_unit(folder, part, layer, {name: 2 * leaf for name, leaf in leaves.items()})

    monkeypatch.setattr(layers, "write_unit", write)
    leaves = random_leaves(read_config(flax), "vae")
    with pytest.raises(OSError, match=r"must hold what was written there: vae/weights/rest"):
        write_trained(flax, tmp_path / "trained", "vae", leaves)
    assert left(tmp_path) == set()


@first
def test_the_int8_parts_of_a_base_stay_and_are_not_trained(
    saved: dict[str, Path], family: str, tmp_path: Path
) -> None:
    flax = Path(to_flax(saved[family], tmp_path / "flax", "int8"))
    config = read_config(flax)
    leaves = random_leaves(read_config(saved[family]), "transformer")
    with pytest.raises(ValueError, match=r"flax must be floating-point to be trained: got int8$"):
        write_trained(flax, tmp_path / "trained", "transformer", leaves)
    folder = tmp_path / "trained"
    write_trained(flax, folder, "vae", random_leaves(config, "vae"))
    assert main(["check", str(folder)]) == 0
    assert read_config(folder) == config
    assert json.loads((folder / MANIFEST).read_text())["dtype"] is None  # no longer one for all
    with pytest.raises(ValueError, match=r"^dtype must be one of float64, .*: got int8$"):
        write_trained(flax, tmp_path / "other", "vae", leaves, "int8")
