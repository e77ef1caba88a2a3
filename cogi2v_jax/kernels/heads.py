"""TPU kernels that split [b s d] into heads and merge heads again, with QK norm and rotary
embedding on the way. XLA makes a dozen passes of this over half-empty lanes, which take as long as
all products of a layer; these kernels read and write each value once and work on as many heads
together as fill the lanes."""

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

LANES = 128  # of a TPU's vector registers
PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
Precision = Callable[[jnp.dtype], lax.Precision]


def split_rotated_heads(
    x: Float[Array, "b s d"],
    scale: Float[Array, " k"],
    bias: Float[Array, " k"],
    epsilon: float,
    *,
    cos: Float[Array, "s half"],
    sin: Float[Array, "s half"],
    last: Float[Array, " s"],
    factor: float,
    precision: Precision,
    rows: int,
    interpret: bool = False,
) -> Float[Array, "b n s k+1"]:
    """Heads after a layer norm over their k channels, a rotation of the channels i and i + k/2, and
    a multiplication by `factor`, with `last` as one more channel. Float32 inside, rounded once. A
    grid step takes `rows` rows, which must divide the sequence; `precision` gives a product's
    precision by its dtype."""
    k, heads, together = (
        scale.shape[0],
        x.shape[2] // scale.shape[0],
        _heads_together(scale.shape[0]),
    )
    # Whole groups of heads. Added heads must not be NaN: the products below multiply them by zero.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -heads % together * k)))
    own = jnp.stack([scale, bias]).astype(jnp.float32)
    parameters = jnp.concatenate(
        [own, jnp.roll(own, k // 2, axis=-1)]
    )  # [4 k], of channel, partner
    # Products with matrices of zeros and ones move and add the channels of a head faster than
    # shuffles of lanes do, and are exact.
    each, unit = np.eye(together), np.eye(k)
    swap, total = (
        jnp.asarray(np.kron(each, block), x.dtype)
        for block in (np.roll(unit, k // 2, axis=-1), np.ones((k, k)))
    )
    cos = jnp.tile(cos, 2 * together)
    sin = jnp.tile(jnp.concatenate([-sin, sin], axis=-1), together)
    kernel = partial(_rotate, heads=together, epsilon=epsilon, factor=factor, precision=precision)
    whole = jnp.tile(parameters, together), swap, total
    by_rows = cos, sin, last[:, None].astype(x.dtype)
    return _split(kernel, x, k, k + 1, rows, interpret, whole, by_rows)[:, :heads]


def split_heads(
    x: Float[Array, "b s d"], k: int, *, rows: int, interpret: bool = False
) -> Float[Array, "b n s k"]:
    """Heads of k channels."""

    def kernel(x: Any, out: Any) -> None:
        for head in range(out.shape[1]):
            out[0, head] = x[0, :, head * k : (head + 1) * k]

    return _split(kernel, x, k, k, rows, interpret)


def merge_heads(
    x: Float[Array, "b n s k"], *, rows: int, interpret: bool = False
) -> Float[Array, "b s d"]:
    """Heads side by side again."""
    b, n, s, k = x.shape
    together = _heads_together(k)

    def kernel(x: Any, out: Any) -> None:
        out[0] = jnp.concatenate([x[0, head] for head in range(together)], axis=-1)

    return pl.pallas_call(
        kernel,
        grid=(b, s // rows, pl.cdiv(n, together)),
        in_specs=[pl.BlockSpec((1, together, rows, k), lambda b, row, head: (b, head, row, 0))],
        out_specs=pl.BlockSpec((1, rows, together * k), lambda b, row, head: (b, row, head)),
        out_shape=jax.ShapeDtypeStruct((b, s, n * k), x.dtype),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="merge_heads",
    )(x)


def _heads_together(k: int) -> int:
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
    by_rows: tuple[Array, ...] = (),
) -> Float[Array, "b n s width"]:
    """`kernel(x, *whole, *by_rows, out)` for blocks x [1 rows d] and out [1 heads rows width]; it
    gets the block's rows of each array of `by_rows`."""
    (b, s, d), together = x.shape, _heads_together(k)
    return pl.pallas_call(
        kernel,
        # Heads are the last axis, so that the arrays of a row block are read once.
        grid=(b, s // rows, pl.cdiv(d, together * k)),
        in_specs=[
            pl.BlockSpec((1, rows, together * k), lambda b, row, head: (b, row, head)),
            *(pl.BlockSpec(array.shape, lambda b, row, head: (0, 0)) for array in whole),
            *(pl.BlockSpec((rows, a.shape[1]), lambda b, row, head: (row, 0)) for a in by_rows),
        ],
        out_specs=pl.BlockSpec((1, together, rows, width), lambda b, row, head: (b, head, row, 0)),
        out_shape=jax.ShapeDtypeStruct((b, d // k, s, width), x.dtype),
        compiler_params=PARALLEL,
        interpret=interpret,
        name="split_rotated_heads" if by_rows else "split_heads",
    )(x, *whole, *by_rows)


def _rotate(
    x: Any,
    parameters: Any,
    swap: Any,
    total: Any,
    cos: Any,
    sin: Any,
    last: Any,
    out: Any,
    *,
    heads: int,
    epsilon: float,
    factor: float,
    precision: Precision,
) -> None:
    """The kernel of `split_rotated_heads`: x [1 rows d], parameters [4 d], out [1 heads rows
    k+1]."""
    scale, bias, partner_scale, partner_bias = (parameters[row : row + 1, :] for row in range(4))
    k = out.shape[-1] - 1

    def product(x: Array, matrix: Any) -> Array:
        exact = precision(x.dtype)
        matrix = matrix[...].astype(x.dtype)
        return lax.dot(x, matrix, precision=exact, preferred_element_type=jnp.float32)

    mean = product(x[0], total) / k
    own, partner = x[0].astype(jnp.float32) - mean, product(x[0], swap) - mean
    deviation = lax.rsqrt(product(jnp.square(own), total) / k + epsilon)
    own = own * deviation * scale + bias
    partner = partner * deviation * partner_scale + partner_bias
    rotated = ((own * cos[...] + partner * sin[...]) * factor).astype(out.dtype)
    for head in range(heads):
        out[0, head, :, :k] = rotated[:, head * k : (head + 1) * k]
        out[0, head, :, k:] = last[...]
