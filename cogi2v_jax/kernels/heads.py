"""Heads out of the flat layout and back into it, with the norm and the rotation of queries and keys
on the way, as TPU kernels. XLA makes a dozen passes of it over lanes that are half empty, which
takes as long as all products of a layer; these read and write each value once, and work on as many
heads together as fill the lanes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128  # of a TPU's vectors
IN_ANY_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def turn_heads(
    x: Float[Array, "b s d"],
    scale: Float[Array, " k"],
    bias: Float[Array, " k"],
    cos: Float[Array, "s half"],
    sin: Float[Array, "s half"],
    last: Float[Array, " s"],
    *,
    epsilon: float,
    factor: float,
    precision: Callable[[jnp.dtype], lax.Precision],
    rows: int,
    interpret: bool = False,
) -> Float[Array, "b n s k+1"]:
    """Every head after a layer norm over its k channels, a rotation of channel i with i + k/2, and
    times `factor`, with `last` as one more channel; float32 inside, rounded once. A step takes
    `rows` of the sequence, which they divide."""
    k, heads, together = scale.shape[0], x.shape[2] // scale.shape[0], _together(scale.shape[0])
    # What is no head must not be NaN: products below mix it in, times zero.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -heads % together * k)))
    both = jnp.stack([scale, bias]).astype(jnp.float32)
    # [4 d]: of each channel, then of its partner.
    channels = jnp.tile(jnp.concatenate([both, jnp.roll(both, k // 2, axis=-1)]), together)
    # Products with zeros and ones, which move and add channels within a head faster than lanes are
    # shuffled, and are exact.
    each, unit = np.eye(together), np.eye(k)
    partner, head = (
        jnp.asarray(np.kron(each, block), x.dtype)
        for block in (np.roll(unit, k // 2, axis=-1), np.ones((k, k)))
    )
    cos, sin = (
        jnp.tile(cos, 2 * together),
        jnp.tile(jnp.concatenate([-sin, sin], axis=-1), together),
    )
    kernel = partial(_turn, heads=together, epsilon=epsilon, factor=factor, precision=precision)
    tables = (cos, sin, last[:, None].astype(x.dtype))
    return _split(
        kernel, x, k, k + 1, rows, interpret, whole=(channels, partner, head), tables=tables
    )[:, :heads]


def split_heads(
    x: Float[Array, "b s d"], k: int, *, rows: int, interpret: bool = False
) -> Float[Array, "b n s k"]:
    """Heads of k channels, as they are."""

    def kernel(x: Any, out: Any) -> None:
        for head in range(out.shape[1]):
            out[0, head] = x[0, :, head * k : (head + 1) * k]

    return _split(kernel, x, k, k, rows, interpret)


def merge_heads(
    x: Float[Array, "b n s k"], *, rows: int, interpret: bool = False
) -> Float[Array, "b s d"]:
    """The other way round."""
    b, n, s, k = x.shape
    together = _together(k)

    def kernel(x: Any, out: Any) -> None:
        out[0] = jnp.concatenate([x[0, head] for head in range(together)], axis=-1)

    return pl.pallas_call(
        kernel,
        grid=(b, s // rows, pl.cdiv(n, together)),
        in_specs=[
            pl.BlockSpec(
                (1, together, rows, k), lambda video, block, heads: (video, heads, block, 0)
            )
        ],
        out_specs=pl.BlockSpec(
            (1, rows, together * k), lambda video, block, heads: (video, block, heads)
        ),
        out_shape=jax.ShapeDtypeStruct((b, s, n * k), x.dtype),
        compiler_params=IN_ANY_ORDER,
        interpret=interpret,
        name="merge_heads",
    )(x)


def _together(k: int) -> int:
    """The fewest heads of k channels that fill the lanes."""
    return math.lcm(k, LANES) // k


def _split(
    kernel: Callable[..., None],
    x: Float[Array, "b s d"],
    k: int,
    width: int,
    rows: int,
    interpret: bool,
    whole: tuple[Array, ...] = (),
    tables: tuple[Array, ...] = (),
) -> Float[Array, "b n s width"]:
    """`kernel(x, *whole, *tables, out)` for blocks [1 rows d] and [1 heads rows width]; of `tables`
    it sees the block's rows."""
    (b, s, d), together = x.shape, _together(k)
    wholes = [pl.BlockSpec(array.shape, lambda video, block, heads: (0, 0)) for array in whole]
    by_rows = [
        pl.BlockSpec((rows, array.shape[1]), lambda video, block, heads: (block, 0))
        for array in tables
    ]
    return pl.pallas_call(
        kernel,
        # Heads last: a block's tables stay where they are.
        grid=(b, s // rows, pl.cdiv(d, together * k)),
        in_specs=[
            pl.BlockSpec(
                (1, rows, together * k), lambda video, block, heads: (video, block, heads)
            ),
            *wholes,
            *by_rows,
        ],
        out_specs=pl.BlockSpec(
            (1, together, rows, width), lambda video, block, heads: (video, heads, block, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((b, d // k, s, width), x.dtype),
        compiler_params=IN_ANY_ORDER,
        interpret=interpret,
        name="turn_heads" if tables else "split_heads",
    )(x, *whole, *tables)


def _turn(
    x: Any,
    channels: Any,
    partner: Any,
    head: Any,
    cos: Any,
    sin: Any,
    last: Any,
    out: Any,
    *,
    heads: int,
    epsilon: float,
    factor: float,
    precision: Callable[[jnp.dtype], lax.Precision],
) -> None:
    scale, bias, partner_scale, partner_bias = (channels[row : row + 1, :] for row in range(4))
    width = out.shape[-1] - 1

    def product(x: Array, matrix: Any) -> Array:
        return lax.dot(
            x,
            matrix[...].astype(x.dtype),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )

    mean = product(x[0], head) / width
    own, other = x[0].astype(jnp.float32) - mean, product(x[0], partner) - mean
    spread = lax.rsqrt(product(jnp.square(own), head) / width + epsilon)
    own, other = own * spread * scale + bias, other * spread * partner_scale + partner_bias
    turned = ((own * cos[...] + other * sin[...]) * factor).astype(out.dtype)
    for which in range(heads):
        out[0, which, :, :width] = turned[:, which * width : (which + 1) * width]
        out[0, which, :, width:] = last[...]
