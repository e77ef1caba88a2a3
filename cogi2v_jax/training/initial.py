"""New weights. For a network that is trained from nothing: random kernels of the size that keeps
the scale of what goes through them, with layers that begin as small changes of what they are added
to. For a LoRA: factors that begin as PEFT's do, so that the change begins at zero."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .state import Leaves

MODULATION = 0.02  # deviation of the kernels of shifts, scales and gates
RESIDUAL = 0.2  # factor of a VAE's second convolutions, whose results are added
SPATIAL = 0.5  # factor of the kernels that make scales and shifts of a VAE's latents
LOG_VARIANCE = -5.0  # of a new posterior: its latents carry more than noise


def new_leaves(leaves: Leaves, seed: int) -> Leaves:
    """Leaves of the same names, shapes and devices as these arrays or shapes. A leaf depends on the
    seed and its place among the sorted names."""
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return {
        name: jax.device_put(_new(name, leaves[name], key), leaves[name].sharding)
        for name, key in zip(sorted(leaves), keys, strict=True)
    }


def _new(name: str, leaf: Any, key: Array) -> Array:
    kind, layer = name.rsplit(".", 1)[-1], f".{name.rsplit('.', 1)[0]}"
    if kind == "down":
        bound = leaf.shape[-2] ** -0.5
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)
    if kind == "up":
        return jnp.zeros(leaf.shape, leaf.dtype)
    spatial = layer.endswith((".scale", ".shift"))  # of a SpatialNorm
    if kind == "scale" or (kind == "bias" and layer.endswith(".scale")):
        return jnp.ones(leaf.shape, leaf.dtype)
    if kind == "bias":
        bias = jnp.zeros(leaf.shape, leaf.dtype)
        if layer == ".encoder.conv_out":
            bias = bias.at[len(bias) // 2 :].set(LOG_VARIANCE)
        return bias
    if layer == ".out":  # a transformer predicts zero at first
        return jnp.zeros(leaf.shape, leaf.dtype)
    stacked = layer.startswith((".blocks.", ".modulation.blocks."))
    deviation = math.prod(leaf.shape[stacked:-1]) ** -0.5
    if layer.startswith((".modulation.blocks.", ".modulation.out")):
        deviation = MODULATION
    deviation *= RESIDUAL if layer.endswith(".conv_2") else SPATIAL if spatial else 1.0
    return deviation * jax.random.normal(key, leaf.shape, leaf.dtype)
