"""The stages' programs as compilers are handed them, in small, and the operations in their text."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from topologies import chip

from cogi2v_jax import config
from cogi2v_jax.devices.mesh import Sizes, make_mesh
from cogi2v_jax.request import Request
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import RequestTarget

STEPS = 4
PRODUCTS = "dot_general dot convolution"
STAGES = ("text", "image", "modulation", "denoise", "decode")
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


def target(devices: list[Any], dtype: str, **settings: Any) -> RequestTarget:
    request = Request("photo.jpg", "a prompt", **settings).resolve(checkpoint())
    mesh = make_mesh(Sizes(), devices)
    return RequestTarget(checkpoint(), jnp.dtype(dtype), mesh, 2**40, request, "xla")


def lowered(stage: str, dtype: str, tpu: str | None = None) -> jax.stages.Lowered:
    """One stage of the pipeline in small. Products that state no precision get the default one,
    whatever the tests run with."""
    devices = jax.devices()[:1] if tpu is None else list(chip(tpu).devices.flat)
    settings = {"num_inference_steps": STEPS, "scheduler": "dpm", "use_dynamic_cfg": True}
    place = target(devices, dtype, **settings)
    match stage:
        case "image":
            call = place.call(stages.encode_image, np.zeros((1, 1, 16, 16, 3), np.float32))
        case "decode":
            latents = np.zeros((1, 1, 2, 2, 16), np.float32)
            call = place.call(stages.decode, latents, np.float32(0.7), strips=1)
        case "text":
            (call,) = place.calls("text")
        case _:
            call = place.calls("denoise")[0 if stage == "modulation" else -1]
    with jax.default_matmul_precision("default"):
        return call.lower()


@cache
def compiled(stage: str, dtype: str, tpu: str) -> str:
    """The TPU compiler's optimised HLO."""
    return lowered(stage, dtype, tpu).compile().as_text() or ""


def handed_over(stage: str, dtype: str) -> str:
    return lowered(stage, dtype).as_text()


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


def handed_to_nvidia(stage: str, dtype: str) -> str:
    """A stage's StableHLO as it goes to a CUDA device, none of which is needed."""
    calls = target(jax.devices()[:1], dtype, num_inference_steps=2).calls(stage)
    _, args, static = call = calls[-1 if stage == "denoise" else 0]
    with jax.default_matmul_precision("default"):
        traced = jax.jit(partial(call.stage.program.function, **static)).trace(*args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
