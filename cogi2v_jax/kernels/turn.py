"""Norm and rotation of queries and keys as one TPU kernel. XLA makes a dozen passes of it, half of them in float32 over lanes that are half
empty, which takes as long as all products of a layer; this one reads a head and writes it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ..layers import precision


def turn(
    x: Float[Array, "b n s k"],
    scale: Float[Array, " k"],
    bias: Float[Array, " k"],
    cos: Float[Array, "s half"],
    sin: Float[Array, "s half"],
    last: Float[Array, " s"],
    *,
    epsilon: float,
    factor: float,
    rows: int,
    interpret: bool = False,
) -> Float[Array, "b n s k+1"]:
    """Layer norm over k, rotation of channel i with i + k/2, times `factor`, and `last` as one more channel; float32 inside, rounded once.
    A step takes `rows` of the sequence, which they divide."""
    b, n, s, k = x.shape
    both = jnp.stack([scale, bias]).astype(jnp.float32)
    channels = jnp.concatenate([both, jnp.roll(both, k // 2, axis=-1)])  # [4 k]: of each channel, then of its partner
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    swap = jnp.roll(jnp.eye(k, dtype=x.dtype), k // 2, axis=-1)

    def table(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, width), lambda video, block, head: (block, 0))

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda video, block, head: (0,) * len(shape))

    def of_head(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, rows, width), lambda video, block, head: (video, head, block, 0))

    return pl.pallas_call(
        partial(_kernel, epsilon=epsilon, factor=factor),
        grid=(b, s // rows, n),  # heads last: the tables of a block stay where they are
        in_specs=[of_head(k), whole(4, k), whole(k, k), table(k), table(k), table(1)],
        out_specs=of_head(k + 1),
        out_shape=jax.ShapeDtypeStruct((b, n, s, k + 1), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="turn",
    )(x, channels, swap, cos, sin, last[:, None].astype(x.dtype))


def _kernel(x: Any, channels: Any, swap: Any, cos: Any, sin: Any, last: Any, out: Any, *, epsilon: float, factor: float) -> None:
    scale, bias, partner_scale, partner_bias = (channels[row : row + 1, :] for row in range(4))
    own = x[0, 0]
    # A product with a permutation moves lanes faster than shuffling them, and is exact.
    partner = lax.dot(own, swap[...], precision=precision(own.dtype), preferred_element_type=jnp.float32)
    own = own.astype(jnp.float32)
    mean = jnp.mean(own, axis=-1, keepdims=True)
    own, partner = own - mean, partner - mean
    spread = lax.rsqrt(jnp.mean(jnp.square(own), axis=-1, keepdims=True) + epsilon)
    own, partner = own * spread * scale + bias, partner * spread * partner_scale + partner_bias
    turned = (own * cos[...] + partner * sin[...]) * factor
    width = turned.shape[-1]
    out[0, 0, :, :width] = turned.astype(out.dtype)
    out[0, 0, :, width:] = last[...]
