"""Float32 arithmetic must stay float32: checked in the programs that compilers get, and in what the
TPU's compiler makes of them. By default a float32 product on a TPU is one bfloat16 pass."""

import re

import pytest
from lowering import PRODUCTS, ROUNDING, STAGES, STEPS, checkpoint, compiled, operations, stablehlo


@pytest.mark.parametrize("stage", STAGES)
def test_every_product_of_a_float32_network_states_full_precision(stage: str) -> None:
    products = list(operations(stablehlo(stage, "float32"), PRODUCTS))
    assert len(products) >= 5
    for kind, _, line in products:
        assert kind == "f32", line
        assert len(re.findall(r"\bHIGHEST\b", line)) == 2, line


@pytest.mark.parametrize("stage", STAGES)
def test_every_product_of_a_float32_network_has_full_precision_on_a_tpu(stage: str) -> None:
    products = list(operations(compiled(stage, "float32", "v5e"), PRODUCTS))
    assert len(products) >= 5
    for kind, _, line in products:
        assert kind == "f32", line
        assert "operand_precision={highest,highest}" in line


@pytest.mark.parametrize("stage", STAGES)
def test_every_product_of_a_bfloat16_network_sums_in_float32(stage: str) -> None:
    products = list(operations(stablehlo(stage, "bfloat16"), PRODUCTS))
    assert len(products) >= 5
    for kind, _, line in products:
        assert kind == "f32", line
        assert line.count("bf16>") == 2, line


@pytest.mark.parametrize("stage", STAGES)
def test_arithmetic_of_a_bfloat16_network_is_float32(stage: str) -> None:
    """Statistics of norms, gates, rotations, softmax, guidance and the schedule: everything but the
    additions to a residual stream. (Read in the program that compilers get: a TPU's compiler widens
    all arithmetic in its own, so that one can't show what was asked for.)"""
    found = list(operations(stablehlo(stage, "bfloat16"), ROUNDING))
    assert len(found) >= 10
    assert [line for kind, operation, line in found if kind == "bf16" and operation != "add"] == []


def carries(text: str) -> list[list[str]]:
    """The shapes that each loop of a TPU's program carries. The compiler replaces float32 by
    bfloat16 where it finds that this changes no result."""
    loops = [line.partition(" while(")[0] for line in text.splitlines() if " while(" in line]
    return [re.findall(r"\w+\[[\d,]*\]", loop) for loop in loops]


def test_the_residual_stream_of_t5_is_float32_from_layer_to_layer_on_a_tpu() -> None:
    encoder, tokens = checkpoint().text_encoder, checkpoint().transformer.max_text_seq_length
    loops = carries(compiled("text", "bfloat16", "v5e"))
    assert [f"f32[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [True]
    assert [f"bf16[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [False]


def test_latents_are_float32_from_step_to_step_on_a_tpu() -> None:
    """x and x0 are. What the network gets of the image is not."""
    loops = carries(compiled("denoise", "bfloat16", "v5e"))
    assert [loop.count("f32[1,3,16,16,16]") for loop in loops if f"f32[{STEPS}]" in loop] == [2]
