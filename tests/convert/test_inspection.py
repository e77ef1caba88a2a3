"""What `inspect` prints of folders and of LoRA files."""

import shutil
from pathlib import Path

import loras
import numpy as np
import pytest
import torch
import twins
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax
from folders import KINDS, PARTS, other_width, raw, several

from cogi2v_jax.config import named


@pytest.fixture
def source(saved, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(saved["1.0"], tmp_path / "source"))


def inspect(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_inspect_describes_a_source_that_fits(family, saved, capsys):
    code, out, err = inspect(capsys, saved[family])
    assert (code, err) == (0, "")
    assert {"1.0": "(cogvideox-i2v)", "1.5": "(cogvideox1.5-i2v)"}[family] in out.splitlines()[0]
    for part in PARTS:
        tensors = raw(saved[family], part)
        count = sum(int(np.prod(shape)) for _, _, shape, _ in tensors.values())
        # Diffusers saves the position table in float64.
        dtypes = "float32, float64" if (family, part) == ("1.0", "transformer") else "float32"
        assert (
            f"{part}: {count:,} parameters, {len(tensors)} of {len(tensors)} tensors matched, "
            f"{dtypes}\n" in out
        )
    assert ("learned table of 87 rows" in out) == (family == "1.0")
    assert ("ofs" in out) == (family == "1.5")
    assert "!" not in out


@pytest.mark.parametrize("kind", ["mixed", "embedding by its other name", "embedding twice"])
def test_inspect_describes_a_converted_folder_like_its_source(kind, source, tmp_path, capsys):
    KINDS[kind](source)
    to_flax(source, tmp_path / "flax")
    code, theirs, _ = inspect(capsys, source, "--keys")
    assert code == 0
    assert len(theirs.splitlines()) > 100
    code, ours, _ = inspect(capsys, tmp_path / "flax", "--keys")
    assert code == 0
    assert ours.splitlines()[1:] == theirs.splitlines()[1:]
    assert "converted folder" in ours.splitlines()[0]
    assert "diffusers folder" in theirs.splitlines()[0]


def test_inspect_lists_every_fault_and_fails(source, capsys):
    several(source)
    code, out, err = inspect(capsys, source)
    assert (code, err) == (1, "")
    assert [line.strip() for line in out.splitlines() if "!" in line] == [
        "! extra has no rule",
        "! proj_out.bias is missing",
        "! encoder.conv_out.conv.bias must have the shape [8]: got [3]",
        "! encoder.final_layer_norm.weight is missing",
    ]
    total = len(raw(source, "transformer"))
    assert f" {total - 1} of {total} tensors matched" in out


def test_inspect_lists_all_faults_where_a_conversion_lists_twenty(source, capsys):
    other_width(source)
    code, out, _ = inspect(capsys, source)
    assert code == 1
    assert sum("must have the shape" in line for line in out.splitlines()) > 20
    total = len(raw(source, "vae"))
    matched = int(out.split("vae: ")[1].split("parameters, ")[1].split(" of ")[0])
    assert matched == total - sum(
        "!" in line and "is missing" not in line for line in out.splitlines()
    )


def test_inspect_lists_each_tensor_with_its_leaf_if_asked(saved, capsys):
    _, out, _ = inspect(capsys, saved["1.0"], "--keys")
    assert (
        "  transformer_blocks.2.attn1.to_q.weight -> blocks.attn.q.kernel (n k r) i -> i (n r k)\n"
        in out
    )
    assert "  shared.weight -> embedding\n" in out
    assert sum(" -> " in line for line in out.splitlines()) == sum(
        len(raw(saved["1.0"], part)) for part in PARTS
    )
    _, short, _ = inspect(capsys, saved["1.0"])
    assert not any(line.startswith("  transformer_blocks") for line in short.splitlines())


# LoRA files


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = named("cogi2v-tiny").transformer
    shapes = {"A": (4, config.width), "B": (config.width, 4)}
    stems = [
        f"transformer.transformer_blocks.{layer}.attn1.to_q" for layer in range(config.num_layers)
    ]
    tensors = {
        f"{stem}.lora_{side}.weight": torch.full(shape, 0.01)
        for stem in stems
        for side, shape in shapes.items()
    }
    return loras.save(
        tmp_path / "tiny.safetensors", tensors | {"text_encoder.x.lora_A.weight": torch.zeros(1)}
    )


def test_inspect_prints_the_table(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    count = 2 * named("cogi2v-tiny").transformer.num_layers
    line = (
        f"lora tiny.safetensors: {count} of {count + 1} tensors matched, rank 4, alpha 4 (not "
        "stated: as the rank), weight 1 (cogi2v-tiny)"
    )
    unmatched = "  ! text_encoder.x.lora_A.weight is of a text encoder, which stays as it is"
    assert main(["inspect", str(tiny), "--model", "cogi2v-tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [line, unmatched]
    assert main(["inspect", str(tiny), "--model", str(twins.TINY), "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [line, unmatched]
    assert (
        "  transformer.transformer_blocks.1.attn1.to_q.lora_B.weight -> blocks.attn.q.kernel[1]"
        in lines
    )
    assert len(lines) == 2 + count


def test_inspect_prints_why_a_lora_would_be_refused(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(tiny), "--model", "THUDM/CogVideoX-5b-I2V"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0 of 13 tensors matched, weight 1 (cogvideox-5b-i2v)")
    assert (
        "  ! transformer.transformer_blocks.0.attn1.to_q.lora_A.weight must have the shape [rank, "
        "3072]: got [4, 192]" in lines
    )


def test_inspect_prints_names_from_a_file_with_escapes(
    tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    stem = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.\x1b[2J.weight"
    width = named("cogi2v-tiny").transformer.width
    shapes = {"A": (4, width), "B": (width, 4)}
    tensors = {stem.format(side): torch.ones(shape) for side, shape in shapes.items()}
    loras.save(tiny, tensors)
    assert main(["inspect", str(tiny), "--model", "cogi2v-tiny", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(r"to_q.lora_A.\x1b[2J.weight -> blocks" in line for line in lines) == 1
    assert all(line.isprintable() for line in lines)


def test_an_unknown_user_s_home_is_no_folder(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(tiny), "--model", "~nobody-of-this-name/flax"]) == 1
    assert "found no ~nobody-of-this-name/flax" in capsys.readouterr().err


def test_inspect_asks_for_the_model(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(tiny)]) == 1
    assert (
        "got a LoRA, which is no network but a change of one: inspect it with --model NAME"
        in capsys.readouterr().err
    )
    assert main(["inspect", str(tiny), "--model", "gone"]) == 1
    assert "model must be a folder or one of cogi2v-tiny, " in capsys.readouterr().err
