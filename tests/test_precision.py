"""Float32 that must be float32, read in what compilers are handed and in what the TPU's makes of it. There, left alone, a float32 product
is one bfloat16 pass."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from topologies import chip

from cogi2v_jax import config
from cogi2v_jax.phases import Phases
from cogi2v_jax.request import Request
from cogi2v_jax.sharding import Sizes, make_mesh

STEPS = 4
PHASES = ("text", "image", "shifts", "denoise", "decode")
# Arithmetic that rounds. Moving, comparing and converting doesn't.
ROUNDING = (
    "add subtract multiply divide power sqrt rsqrt cbrt exponential exponential_minus_one log log_plus_one logistic tanh sine cosine reduce"
)


@cache
def checkpoint() -> config.CheckpointConfig:
    """The embedded model with a VAE as small as they come: each of its convolutions takes a TPU's compiler a while."""
    tiny = config.named("cogi2v-tiny")
    return dataclasses.replace(
        tiny, vae=dataclasses.replace(tiny.vae, block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2)
    )


def lowered(phase: str, dtype: str, tpu: str | None = None) -> jax.stages.Lowered:
    """One phase of the pipeline in small. Products that state no precision get the default one, whatever the tests run with."""
    devices = jax.devices()[:1] if tpu is None else list(chip(tpu).devices.flat)
    request = Request("photo.jpg", "a prompt", num_inference_steps=STEPS, scheduler="dpm", use_dynamic_cfg=True).resolve(checkpoint())
    place = Phases(checkpoint(), jnp.dtype(dtype), make_mesh(Sizes(), devices), 2**40, request, "xla")
    match phase:
        case "image":
            call = place.moments(np.zeros((1, 1, 16, 16, 3), np.float32))
        case "decode":
            call = place.decode(np.zeros((1, 1, 2, 2, 16), np.float32))
        case "text":
            (call,) = place.calls("text")
        case _:
            call = place.calls("denoise")[0 if phase == "shifts" else -1]
    with jax.default_matmul_precision("default"):
        return call.lower(place)


@cache
def compiled(phase: str, dtype: str, tpu: str) -> str:
    """The TPU compiler's optimised HLO."""
    return lowered(phase, dtype, tpu).compile().as_text() or ""


def handed_over(phase: str, dtype: str) -> str:
    return lowered(phase, dtype).as_text()


def operations(text: str, names: str) -> Iterator[tuple[str, str, str]]:
    """(element type of the result, operation, line), of StableHLO or HLO, for these operations."""
    words = names.replace(" ", "|")
    stable = re.compile(rf"= \"?stablehlo\.({words})\b.*tensor<(?:\d+x)*(\w+)>(?: loc\(.*\))?$")
    optimised = re.compile(rf"= (\w+)\[[^=]*? ({words.replace('_', '-')})\(")
    for line in text.splitlines():
        if found := stable.search(line):
            yield found[2], found[1], line.strip()
        elif found := optimised.search(line):
            yield found[1], found[2], line.strip()


PRODUCTS = "dot_general dot convolution"


@pytest.mark.parametrize("phase", PHASES)
def test_every_product_of_a_float32_network_states_full_precision(phase: str) -> None:
    products = list(operations(handed_over(phase, "float32"), PRODUCTS))
    assert len(products) >= 5
    assert [line for kind, _, line in products if kind != "f32" or len(re.findall(r"\bHIGHEST\b", line)) != 2] == []


@pytest.mark.parametrize("phase", PHASES)
def test_every_product_of_a_float32_network_has_full_precision_on_a_tpu(phase: str) -> None:
    products = list(operations(compiled(phase, "float32", "v5e"), PRODUCTS))
    assert len(products) >= 5
    assert [line for kind, _, line in products if kind != "f32" or "operand_precision={highest,highest}" not in line] == []


@pytest.mark.parametrize("phase", PHASES)
def test_every_product_of_a_bfloat16_network_sums_in_float32(phase: str) -> None:
    products = list(operations(handed_over(phase, "bfloat16"), PRODUCTS))
    assert len(products) >= 5
    assert [line for kind, _, line in products if kind != "f32" or line.count("bf16>") != 2] == []


@pytest.mark.parametrize("phase", PHASES)
def test_arithmetic_of_a_bfloat16_network_is_float32(phase: str) -> None:
    """Norms' statistics, gates, rotations, softmax, guidance and the schedule; all but sums of a stream with what a layer adds to it. (In
    its own program a TPU's compiler widens all arithmetic: there, what was asked for can't be seen.)"""
    found = list(operations(handed_over(phase, "bfloat16"), ROUNDING))
    assert len(found) >= 10
    assert [line for kind, operation, line in found if kind == "bf16" and operation != "add"] == []


def carries(text: str) -> list[list[str]]:
    """What each loop of a TPU's program carries, as shapes. The compiler makes float32 bfloat16 where it thinks that nobody can tell."""
    return [re.findall(r"\w+\[[\d,]*\]", line.partition(" while(")[0]) for line in text.splitlines() if " while(" in line]


def test_the_residual_stream_of_t5_is_float32_from_layer_to_layer_on_a_tpu() -> None:
    encoder, tokens = checkpoint().text_encoder, checkpoint().transformer.max_text_seq_length
    loops = carries(compiled("text", "bfloat16", "v5e"))
    assert [f"f32[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [True]
    assert [f"bf16[2,{tokens},{encoder.d_model}]" in loop for loop in loops] == [False]


def test_latents_are_float32_from_step_to_step_on_a_tpu() -> None:
    """x and x0; what the network is given of the image is not."""
    loops = carries(compiled("denoise", "bfloat16", "v5e"))
    assert [loop.count("f32[1,3,8,8,16]") for loop in loops if f"f32[{STEPS}]" in loop] == [2]
