"""GGUF's blocks, in ComfyUI's safetensors and in .gguf files, against arithmetic written here."""

import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from cogi2v_convert.__main__ import main
from cogi2v_convert.sources import blocks
from cogi2v_convert.sources.gather import gather
from folders import assert_reads, one_line, weights
from safetensors.torch import load_file, save_file

KINDS = ("Q8_0", "Q4_0")
ROWS = {"Q8_0": 34, "Q4_0": 18}  # bytes of 32 numbers


def quantise(kind: str, values: np.ndarray) -> np.ndarray:
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def worth(kind: str, rows: np.ndarray) -> torch.Tensor:
    """What the blocks of some rows stand for: a half-precision scale times integers, of which Q4_0
    has two in a byte, the lower half first."""
    found = rows.reshape(len(rows), -1, ROWS[kind])
    scale = found[..., :2].copy().view(np.float16).astype(np.float32)
    codes = found[..., 2:]
    if kind == "Q8_0":
        numbers = codes.copy().view(np.int8).astype(np.float32)
    else:
        numbers = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32) - 8
    return torch.from_numpy((numbers * scale).reshape(len(rows), -1)).bfloat16()


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    named = name.endswith(".weight") and re.search("attn1.to|ff.net", name)
    return bool(named) and tensor.ndim == 2 and not tensor.shape[1] % 32


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_safetensors_are_read(kind, prefix, saved, base, tmp_path):
    made, expected = {}, {}
    for name, tensor in load_file(weights(saved["1.0"], "transformer")).items():
        if is_quantised(name, tensor):
            rows = quantise(kind, tensor.numpy())
            made[f"{prefix}{name.removesuffix('.weight')}.{kind}_qweight"] = torch.from_numpy(rows)
            expected[name] = worth(kind, rows)
        else:
            made[prefix + name] = expected[name] = tensor.half()
    assert sum(name.endswith("qweight") for name in made) == 18
    save_file(made, tmp_path / "x.safetensors")
    assert_reads(gather([base["1.0"], tmp_path / "x.safetensors"]), "transformer", expected)


def write(
    path: Path, tensors: dict[str, torch.Tensor], kind: str, **order: gguf.GGUFEndian
) -> dict[str, torch.Tensor]:
    """Writes a .gguf file; what was quantised is replaced by what it stands for."""
    writer, expected = gguf.GGUFWriter(path, "cogvideox", **order), {}
    for name, tensor in tensors.items():
        value = tensor.numpy()
        if value.ndim > 4:  # as ComfyUI's programs do
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            value = value.reshape(-1, value.shape[-1])
        if is_quantised(name, tensor) or re.search(r"attn_o\.weight", name):
            rows = quantise(kind, value)
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
            expected[name] = worth(kind, rows)
        elif name.endswith("bias"):
            writer.add_tensor(name, value)
            expected[name] = tensor
        else:
            writer.add_tensor(name, value.astype(np.float16))
            expected[name] = tensor.half()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_gguf_file_is_read(part, kind, saved, base, tmp_path):
    tensors = {
        name: tensor.float() for name, tensor in load_file(weights(saved["1.0"], part)).items()
    }
    expected = write(tmp_path / "x.gguf", tensors, kind)
    assert_reads(gather([base["1.0"], tmp_path / "x.gguf"]), part, expected)
    assert main(["inspect", str(base["1.0"]), str(tmp_path / "x.gguf")]) == 0


LLAMA = {
    "shared.": "token_embd.",
    "encoder.final_layer_norm.": "enc.output_norm.",
    "encoder.block.": "enc.blk.",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}


def test_a_t5_encoder_has_llama_cpp_s_names_in_gguf(saved, base, tmp_path):
    theirs, names = {}, {}
    for name, tensor in load_file(weights(saved["1.0"], "text_encoder")).items():
        other = name
        for ours, llama in LLAMA.items():
            other = other.replace(ours, llama)
        theirs[other], names[other] = tensor, name
    expected = write(tmp_path / "x.gguf", theirs, "Q8_0")
    expected = {names[name]: tensor for name, tensor in expected.items()}
    assert_reads(gather([base["1.0"], tmp_path / "x.gguf"]), "text_encoder", expected)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(saved, tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "cogvideox")
    writer.add_array("numbers", [7] * 99)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "x.gguf").read_bytes()
    count = (99).to_bytes(8, "little")
    assert data.count(count) == 1
    (tmp_path / "x.gguf").write_bytes(data.replace(count, (2**60).to_bytes(8, "little")))
    line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / "x.gguf"])
    assert "must be a whole GGUF file: it ends before what its header says" in line


def test_a_file_of_the_other_byte_order_is_refused(saved, tmp_path, capsys):
    big = gguf.GGUFEndian.BIG
    write(tmp_path / "x.gguf", {"proj_out.bias": torch.ones(3)}, "Q8_0", endianess=big)
    line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / "x.gguf"])
    assert "must be a whole GGUF file: its numbers must be little-endian" in line


def test_without_the_library_the_extra_is_named(saved, tmp_path, monkeypatch, capsys):
    write(tmp_path / "x.gguf", {"proj_out.bias": torch.zeros(3)}, "Q8_0")
    save_file({"a.Q8_0_qweight": torch.zeros(3, 34, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for name in ("x.gguf", "x.safetensors"):
        line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / name])
        assert f"{name}" in line
        assert "must be read by the library gguf: pip install 'cogi2v-jax[gguf]', or take" in line


def test_a_row_of_half_a_block_is_refused(saved, tmp_path, capsys):
    save_file({"a.Q4_0_qweight": torch.zeros(3, 20, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    line = one_line(capsys, ["inspect", saved["1.0"], tmp_path / "x.safetensors"])
    assert "a.Q4_0_qweight must have rows of whole blocks of 18 bytes: got [3, 20]" in line


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_every_kind_is_one_that_the_library_reads(kind):
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = np.zeros((2, 3 * size), np.uint8)
    assert blocks.shape_of(kind, rows.shape) == (2, 3 * numbers)
    # The values are the library's own: only their shape is compared.
    assert blocks.dequantise(kind, rows).shape == (2, 3 * numbers)
