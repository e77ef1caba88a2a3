"""The stages' programs as compilers are handed them, in small, and the operations in their text."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from topologies import chip

from cogi2v_jax import config
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.request import Request
from cogi2v_jax.sampling import programs, stages
from cogi2v_jax.sampling.programs import Phases

STEPS = 4
PRODUCTS = "dot_general dot convolution"
PHASES = ("text", "image", "shifts", "denoise", "decode")
# Arithmetic that rounds. Moving, comparing and converting doesn't.
ROUNDING = "add subtract multiply divide power sqrt rsqrt cbrt exponential exponential_minus_one log log_plus_one logistic tanh sine cosine reduce"


@cache
def checkpoint() -> config.CheckpointConfig:
    """The embedded model with a VAE as small as they come: each of its convolutions takes a TPU's
    compiler a while."""
    tiny = config.named("cogi2v-tiny")
    return dataclasses.replace(
        tiny,
        vae=dataclasses.replace(
            tiny.vae, block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2
        ),
    )


def lowered(phase: str, dtype: str, tpu: str | None = None) -> jax.stages.Lowered:
    """One phase of the pipeline in small. Products that state no precision get the default one,
    whatever the tests run with."""
    devices = jax.devices()[:1] if tpu is None else list(chip(tpu).devices.flat)
    request = Request(
        "photo.jpg", "a prompt", num_inference_steps=STEPS, scheduler="dpm", use_dynamic_cfg=True
    ).resolve(checkpoint())
    place = Phases(
        checkpoint(), jnp.dtype(dtype), make_mesh(Sizes(), devices), 2**40, request, "xla"
    )
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


PROGRAMS = {"text": stages.encode_text, "denoise": stages.denoise, "decode": stages.decode_latents}


def handed_to_nvidia(phase: str, dtype: str) -> str:
    """A phase's StableHLO as it goes to a CUDA device, none of which is needed."""
    small = checkpoint()
    request = Request("photo.jpg", "a prompt", num_inference_steps=2).resolve(small)
    place = programs.Phases(
        small, jnp.dtype(dtype), make_mesh(Sizes(), jax.devices()[:1]), 2**40, request, "xla"
    )
    call = place.calls(phase)[-1 if phase == "denoise" else 0]
    assert call.piece is not None
    with jax.default_matmul_precision("default"):
        traced = jax.jit(partial(PROGRAMS[phase], **call.static)).trace(
            place.network(call.piece), *call.args
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()
