"""Converting to int8 weights: which become int8, with which errors, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.sources.matching import targets
from cogi2v_convert.writing import int8
from diffusers import CogVideoXImageToVideoPipeline
from folders import left, one_line, rewrite, scale_of, units, weights
from safetensors.torch import load_file
from tolerances import relative_error

from cogi2v_jax import config
from cogi2v_jax.weights.checkpoint import int8_errors, open_folder
from cogi2v_jax.weights.pieces import NETWORKS

FLOAT32, HALF = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
KERNELS = {
    "transformer": ["attn.k", "attn.out", "attn.q", "attn.v", "mlp.down", "mlp.up"],
    "text_encoder": ["attn.k", "attn.out", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up"],
}


@pytest.fixture
def source(saved: dict[str, Path]) -> Path:
    return saved["1.0"]


@pytest.fixture(scope="module")
def folder(saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_flax(saved["1.0"], tmp_path_factory.mktemp("converted") / "int8", "int8")


@pytest.mark.parametrize("part", NETWORKS)
def test_the_kernels_of_blocks_are_int8_with_a_scale_an_output_and_all_else_bfloat16(
    part: str, folder: Path
) -> None:
    for layer, leaves in units(folder, part):
        found = sorted(name for name, leaf in leaves.items() if leaf.dtype == np.int8)
        assert found == (
            [] if layer is None else [f"blocks.{name}.kernel" for name in KERNELS[part]]
        )
        scales = {scale_of(name): leaves[name].shape[1:] for name in found}
        assert {name: leaves[name].shape for name in scales} == scales
        assert {leaves[name].dtype.name for name in scales} <= {"float32"}
        assert {
            leaf.dtype.name for name, leaf in leaves.items() if name not in {*found, *scales}
        } == {"bfloat16"}
        for name in found:
            # The largest weight of an output is +-127.
            assert (np.abs(leaves[name].astype(int)).max(axis=0) >= 127).all()


def test_tensors_converted_both_ways_have_the_errors_in_the_manifest_and_load_in_diffusers(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    back = to_torch(folder, tmp_path / "back")
    errors, counts = int8_errors(folder), {"transformer": 3 * 6, "vae": 0, "text_encoder": 3 * 7}
    assert {part: len(errors.get(part, {})) for part in NETWORKS} == counts
    for part in NETWORKS:
        theirs, ours = load_file(weights(source, part)), load_file(weights(back, part))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == torch.bfloat16
            if name in errors.get(part, {}):
                error = errors[part][name]
                assert 0.003 < error < 0.01
                # Rounding to bfloat16 adds up to 2^-9 of each number, and nothing that leans either
                # way.
                assert relative_error(
                    ours[name].double().numpy(), tensor.double().numpy()
                ) == pytest.approx(np.hypot(error, 0.0017), rel=0.03)
            else:
                assert torch.equal(ours[name], tensor.bfloat16())
    loaded = CogVideoXImageToVideoPipeline.from_pretrained(back)
    state = loaded.transformer.state_dict()
    assert all(
        torch.equal(state[name].bfloat16(), tensor)
        for name, tensor in load_file(weights(back, "transformer")).items()
    )


def test_no_weight_differs_by_more_than_half_a_step(source: Path, folder: Path) -> None:
    for part in config.BLOCKS:
        theirs = load_file(weights(source, part))
        places = targets(open_folder(folder, FLOAT32).config, part)
        read = dict(units(folder, part))
        for name in int8_errors(folder)[part]:
            (rule, layer), leaves = places[name], read[places[name].layer]
            scale = leaves[scale_of(rule.flax)]
            assert layer is not None
            assert (
                np.abs(leaves[rule.flax] * scale - rule.to_flax(theirs[name].numpy()))
                <= 0.5001 * scale
            ).all()


def test_errors_of_zeros_and_of_the_smallest_and_largest_numbers_are_finite(
    rng: np.random.Generator,
) -> None:
    drawn = rng.normal(size=(8, 6)).astype(np.float32)
    column = drawn * (np.arange(6) != 2)
    kernels = {
        "column": column,
        "row": drawn * (np.arange(8) != 2)[:, None],
        "all": 0 * drawn,
        "tiny": 1e-30 * drawn,
        "huge": 1e37 * drawn,
    }
    kernels |= {
        "half": drawn.astype(np.float16),
        "bfloat16": drawn.astype(HALF),
        "double": drawn.astype(np.float64),
    }
    made, errors = int8.quantise(
        {f"{name}.kernel": kernel for name, kernel in kernels.items()},
        {f"{name}.kernel" for name in kernels},
    )
    assert errors.keys() == {f"{name}.kernel" for name in kernels}
    assert all(np.isfinite(error) for error in errors.values())
    assert all(np.isfinite(leaf).all() for leaf in made.values())
    assert errors["all.kernel"] == 0
    assert all(
        0 < errors[f"{name}.kernel"] < 0.01
        for name in ("column", "row", "huge", "half", "bfloat16", "double")
    )
    back = int8.dequantise(made)
    assert not back["column.kernel"][:, 2].any()
    assert not back["row.kernel"][2].any()
    assert {leaf.dtype for leaf in back.values()} == {HALF}
    assert back.keys() == {f"{name}.kernel" for name in kernels}


def test_the_commands_print_the_errors_of_int8_weights(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-flax", str(source), str(tmp_path / "int8"), "--dtype", "int8"]) == 0
    *table, where = capsys.readouterr().out.splitlines()
    assert where == str(tmp_path / "int8")
    assert [line.split(": ")[0] for line in table if not line.startswith(" ")] == [
        "transformer",
        "text_encoder",
    ]
    assert len(table) == 2 + 2 * int8.SHOWN
    worst = max(int8_errors(tmp_path / "int8")["transformer"].items(), key=lambda item: item[1])
    assert table[1].split() == [f"{worst[1]:.2%}", worst[0]]
    assert main(["inspect", str(tmp_path / "int8")]) == 0
    ours = [line for line in capsys.readouterr().out.splitlines() if " parameters, " in line]
    assert main(["inspect", str(source)]) == 0
    theirs = [line for line in capsys.readouterr().out.splitlines() if " parameters, " in line]
    # Parameters and tensors are as many as before.
    cast = [line.replace("float32", "bfloat16") for line in theirs]
    assert [line.split(", ", 3)[:3] for line in ours] == [line.split(", ", 3)[:3] for line in cast]
    assert [" tensors in int8 with a mean relative error of 0." in line for line in ours] == [
        True,
        False,
        True,
    ]
    assert main(["to-torch", str(tmp_path / "int8"), str(tmp_path / "back")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "int8 weights of transformer and text_encoder were dequantised to bfloat16" in line


def test_without_qwix_nothing_is_started(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    line = one_line(capsys, ["to-flax", source, tmp_path / "int8", "--dtype", "int8"])
    assert line == "cogi2v-convert: dtype int8 must have qwix: pip install 'cogi2v-jax[int8]'"
    assert left(tmp_path) == set()
    assert main(["to-flax", str(source), str(tmp_path / "flax")]) == 0


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_nothing_is_left(
    value: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    name = "transformer_blocks.1.ff.net.2.weight"
    rewrite(copy, "transformer", lambda tensors: tensors[name][0, 0].fill_(float(value)))
    line = one_line(capsys, ["to-flax", copy, tmp_path / "int8", "--dtype", "int8"])
    assert f"{name} must be finite: got {value} at [0, 0]" in line
    assert left(tmp_path) == {"source"}
