"""Float32 that must be float32, read in what compilers are handed and in what the TPU's makes of
it. There, left alone, a float32 product is one bfloat16 pass."""

import re

import pytest
from lowering import (
    PRODUCTS,
    ROUNDING,
    STAGES,
    STEPS,
    checkpoint,
    compiled,
    handed_over,
    operations,
)


@pytest.mark.parametrize("phase", STAGES)
def test_every_product_of_a_float32_network_states_full_precision(phase: str) -> None:
    products = list(operations(handed_over(phase, "float32"), PRODUCTS))
    assert len(products) >= 5
    assert [
        line
        for kind, _, line in products
        if kind != "f32" or len(re.findall(r"\bHIGHEST\b", line)) != 2
    ] == []


@pytest.mark.parametrize("phase", STAGES)
def test_every_product_of_a_float32_network_has_full_precision_on_a_tpu(phase: str) -> None:
    products = list(operations(compiled(phase, "float32", "v5e"), PRODUCTS))
    assert len(products) >= 5
    assert [
        line
        for kind, _, line in products
        if kind != "f32" or "operand_precision={highest,highest}" not in line
    ] == []


@pytest.mark.parametrize("phase", STAGES)
def test_every_product_of_a_bfloat16_network_sums_in_float32(phase: str) -> None:
    products = list(operations(handed_over(phase, "bfloat16"), PRODUCTS))
    assert len(products) >= 5
    assert [line for kind, _, line in products if kind != "f32" or line.count("bf16>") != 2] == []


@pytest.mark.parametrize("phase", STAGES)
def test_arithmetic_of_a_bfloat16_network_is_float32(phase: str) -> None:
    """Norms' statistics, gates, rotations, softmax, guidance and the schedule; all but sums of a
    stream with what a layer adds to it. (In its own program a TPU's compiler widens all arithmetic:
    there, what was asked for can't be seen.)"""
    found = list(operations(handed_over(phase, "bfloat16"), ROUNDING))
    assert len(found) >= 10
    assert [line for kind, operation, line in found if kind == "bf16" and operation != "add"] == []


def carries(text: str) -> list[list[str]]:
    """What each loop of a TPU's program carries, as shapes. The compiler makes float32 bfloat16
    where it thinks that nobody can tell."""
    return [
        re.findall(r"\w+\[[\d,]*\]", line.partition(" while(")[0])
        for line in text.splitlines()
        if " while(" in line
    ]


def test_the_residual_stream_of_t5_is_float32_from_layer_to_layer_on_a_tpu() -> None:
    encoder, tokens = checkpoint().text_encoder, checkpoint().transformer.max_text_seq_length
    loops = carries(compiled("text", "bfloat16", "v5e"))
    assert [f"f32[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [True]
    assert [f"bf16[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [False]


def test_latents_are_float32_from_step_to_step_on_a_tpu() -> None:
    """x and x0; what the network is given of the image is not."""
    loops = carries(compiled("denoise", "bfloat16", "v5e"))
    assert [loop.count("f32[1,3,8,8,16]") for loop in loops if f"f32[{STEPS}]" in loop] == [2]
