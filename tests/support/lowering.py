"""The programs of the stages at a small size, as compilers get them, and the operations in their
text."""

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
# Arithmetic that rounds. Moving, comparing and converting does not.
ROUNDING = (
    "add subtract multiply divide power sqrt rsqrt cbrt exponential exponential_minus_one log "
    "log_plus_one logistic tanh sine cosine reduce"
)


@cache
def checkpoint() -> config.CheckpointConfig:
    """The embedded model with the smallest possible VAE: a TPU's compiler takes long for each
    convolution."""
    tiny = config.named("cogi2v-tiny")
    small = {"block_out_channels": (4, 4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return dataclasses.replace(tiny, vae=dataclasses.replace(tiny.vae, **small))


def target(devices: list[Any], dtype: str, **settings: Any) -> RequestTarget:
    request = Request("photo.jpg", "a circle moves", **settings).resolve(checkpoint())
    mesh = make_mesh(Sizes(), devices)
    return RequestTarget(checkpoint(), jnp.dtype(dtype), mesh, 2**40, request, "xla")


def lowered(stage: str, dtype: str, tpu: str | None = None) -> jax.stages.Lowered:
    """A stage of the pipeline at a small size. Products that state no precision get jax's default,
    whatever the tests run with."""
    devices = jax.devices()[:1] if tpu is None else list(chip(tpu).devices.flat)
    settings = {"num_inference_steps": STEPS, "scheduler": "dpm", "use_dynamic_cfg": True}
    small = target(devices, dtype, **settings)
    match stage:
        case "image":
            call = small.call(stages.encode_image, np.zeros((1, 1, 16, 16, 3), np.float32))
        case "decode":
            latents = np.zeros((1, 1, 2, 2, 16), np.float32)
            call = small.call(stages.decode, latents, np.float32(0.7), strips=1)
        case "text":
            (call,) = small.calls("text")
        case _:
            call = small.calls("denoise")[0 if stage == "modulation" else -1]
    with jax.default_matmul_precision("default"):
        return call.lower()


@cache
def compiled(stage: str, dtype: str, tpu: str) -> str:
    """The TPU compiler's optimised HLO."""
    return lowered(stage, dtype, tpu).compile().as_text() or ""


def stablehlo(stage: str, dtype: str) -> str:
    """The StableHLO of a stage, as compilers get it."""
    return lowered(stage, dtype).as_text()


def operations(text: str, names: str) -> Iterator[tuple[str, str, str]]:
    """(element type of the result, operation, line) of every one of these operations in StableHLO
    or HLO."""
    either = names.replace(" ", "|")
    stable = re.compile(rf"= \"?stablehlo\.({either})\b.*tensor<(?:\d+x)*(\w+)>(?: loc\(.*\))?$")
    optimised = re.compile(rf"= (\w+)\[[^=]*? ({either.replace('_', '-')})\(")
    for line in text.splitlines():
        if found := stable.search(line):
            yield found[2], found[1], line.strip()
        elif found := optimised.search(line):
            yield found[1], found[2], line.strip()


def stablehlo_for_nvidia(stage: str, dtype: str) -> str:
    """The StableHLO of a stage for a CUDA device. Needs no such device."""
    calls = target(jax.devices()[:1], dtype, num_inference_steps=2).calls(stage)
    call = calls[-1 if stage == "denoise" else 0]
    function = partial(call.stage.program.function, **call.static)
    with jax.default_matmul_precision("default"):
        traced = jax.jit(function).trace(*call.args)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
