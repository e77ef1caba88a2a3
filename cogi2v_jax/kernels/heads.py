"""TPU kernels that split [b s d] into heads and merge heads again, with QK norm and rotary
embedding on the way, and their gradients. XLA makes a dozen passes of this over half-empty lanes,
which take as long as all products of a layer; these kernels read and write each value once and work
on as many heads together as fill the lanes."""

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


@partial(jax.custom_vjp, nondiff_argnames=("epsilon", "factor", "precision", "rows", "interpret"))
def split_rotated_heads(
    x: Float[Array, "b s d"],
    scale: Float[Array, " k"],
    bias: Float[Array, " k"],
    epsilon: float,
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
    precision by its dtype. `cos`, `sin` and `last` are constants without a gradient."""
    k = scale.shape[0]
    heads, together = x.shape[2] // k, _heads_together(k)
    x = _whole_groups(x, k)
    kernel = partial(_rotate, heads=together, epsilon=epsilon, factor=factor, precision=precision)
    whole, tables = _rotation(x.dtype, scale, bias, cos, sin)
    by_rows = *tables, last[:, None].astype(x.dtype)
    return _split(kernel, x, k, k + 1, rows, interpret, whole, by_rows)[:, :heads]


def _split_rotated_heads_forward(*given: Any) -> tuple[Array, tuple[Array, ...]]:
    x, scale, bias, _, cos, sin, *_ = given
    return split_rotated_heads(*given), (x, scale, bias, cos, sin)


def _split_rotated_heads_backward(
    epsilon: float,
    factor: float,
    precision: Precision,
    rows: int,
    interpret: bool,
    kept: tuple[Array, ...],
    grad: Float[Array, "b n s width"],
) -> tuple[Any, ...]:
    x, scale, bias, cos, sin = kept
    (b, s, d), k = x.shape, scale.shape[0]
    x, together = _whole_groups(x, k), _heads_together(k)
    grad = jnp.pad(grad, ((0, 0), (0, x.shape[2] // k - d // k), (0, 0), (0, 0)))
    whole, tables = _rotation(x.dtype, scale, bias, cos, sin)
    lanes = together * k
    flat = pl.BlockSpec((1, rows, lanes), lambda b, row, head: (b, row, head))
    of_x, sums = pl.pallas_call(
        partial(_rotate_backward, epsilon=epsilon, factor=factor, precision=precision),
        grid=(b, s // rows, x.shape[2] // lanes),
        in_specs=[
            pl.BlockSpec((1, together, rows, k + 1), lambda b, row, head: (b, head, row, 0)),
            flat,
            *(pl.BlockSpec(array.shape, lambda b, row, head: (0, 0)) for array in whole),
            *(pl.BlockSpec((rows, lanes), lambda b, row, head: (row, 0)) for _ in tables),
        ],
        out_specs=[flat, pl.BlockSpec((1, 1, 2, lanes), lambda b, row, head: (b, row, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((b, s // rows, 2, lanes), jnp.float32),
        ],
        compiler_params=PARALLEL,
        interpret=interpret,
        name="split_rotated_heads_backward",
    )(grad, x, *whole, *tables)
    of_scale, of_bias = jnp.sum(sums.reshape(-1, 2, together, k), axis=(0, 2))
    of_norm = of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)
    return of_x[:, :, :d], *of_norm, None, None, None


split_rotated_heads.defvjp(_split_rotated_heads_forward, _split_rotated_heads_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def split_heads(
    x: Float[Array, "b s d"], k: int, rows: int, interpret: bool = False
) -> Float[Array, "b n s k"]:
    """Heads of k channels."""

    def kernel(x: Any, out: Any) -> None:
        for head in range(out.shape[1]):
            out[0, head] = x[0, :, head * k : (head + 1) * k]

    return _split(kernel, x, k, k, rows, interpret)


def _split_heads_backward(
    k: int, rows: int, interpret: bool, kept: None, grad: Float[Array, "b n s k"]
) -> tuple[Float[Array, "b s d"]]:
    return (merge_heads(grad, rows=rows, interpret=interpret),)


split_heads.defvjp(lambda *given: (split_heads(*given), None), _split_heads_backward)


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


def _whole_groups(x: Float[Array, "b s d"], k: int) -> Float[Array, "b s d2"]:
    """Whole groups of heads of k channels. Added heads must not be NaN: products with matrices of
    zeros and ones multiply them by zero."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % (_heads_together(k) * k))))


def _rotation(
    dtype: jnp.dtype, scale: Array, bias: Array, cos: Array, sin: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    """((the norm's parameters [4 lanes] of each channel and of its partner, the matrix that moves
    a channel to its partner, the matrix that sums a head), cos and sin [s lanes]) of a group."""
    k, together = scale.shape[0], _heads_together(scale.shape[0])
    own = jnp.stack([scale, bias]).astype(jnp.float32)
    parameters = jnp.concatenate([own, jnp.roll(own, k // 2, axis=-1)])
    # Products with matrices of zeros and ones move and add the channels of a head faster than
    # shuffles of lanes do, and are exact.
    each, unit = np.eye(together), np.eye(k)
    swap, total = (
        jnp.asarray(np.kron(each, block), dtype)
        for block in (np.roll(unit, k // 2, axis=-1), np.ones((k, k)))
    )
    cos = jnp.tile(cos, 2 * together)
    sin = jnp.tile(jnp.concatenate([-sin, sin], axis=-1), together)
    return (jnp.tile(parameters, together), swap, total), (cos, sin)


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
    k, product = out.shape[-1] - 1, partial(_product, precision=precision)
    mean = product(x[0], total) / k
    own, partner = x[0].astype(jnp.float32) - mean, product(x[0], swap) - mean
    deviation = lax.rsqrt(product(jnp.square(own), total) / k + epsilon)
    own = own * deviation * scale + bias
    partner = partner * deviation * partner_scale + partner_bias
    rotated = ((own * cos[...] + partner * sin[...]) * factor).astype(out.dtype)
    for head in range(heads):
        out[0, head, :, :k] = rotated[:, head * k : (head + 1) * k]
        out[0, head, :, k:] = last[...]


def _rotate_backward(
    grad: Any,
    x: Any,
    parameters: Any,
    swap: Any,
    total: Any,
    cos: Any,
    sin: Any,
    of_x: Any,
    sums: Any,
    *,
    epsilon: float,
    factor: float,
    precision: Precision,
) -> None:
    """The kernel of the gradient: grad [1 heads rows k+1], x and of_x [1 rows d], and sums [1 1 2
    d], for scale and bias, over the block's rows and all groups of heads."""
    product, k = partial(_product, precision=precision), grad.shape[-1] - 1
    own = x[0].astype(jnp.float32) - product(x[0], total) / k
    deviation = lax.rsqrt(product(jnp.square(own), total) / k + epsilon)
    own = own * deviation
    rotated = jnp.concatenate([grad[0, head, :, :k] for head in range(grad.shape[1])], axis=-1)
    # Rotated back: `sin` is the partner's and has the other sign here.
    of_affine = rotated.astype(jnp.float32) * cos[...] - product(rotated, swap) * sin[...]
    of_affine = of_affine * factor

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    sums[0, 0, :1] += jnp.sum(of_affine * own, axis=0, keepdims=True)
    sums[0, 0, 1:] += jnp.sum(of_affine, axis=0, keepdims=True)
    of_own = of_affine * parameters[:1, :]
    mean, along = product(of_own, total) / k, product(of_own * own, total) / k
    of_x[0] = ((of_own - mean - own * along) * deviation).astype(of_x.dtype)


def _product(x: Array, matrix: Any, precision: Precision) -> Array:
    matrix, exact = matrix[...].astype(x.dtype), precision(x.dtype)
    return lax.dot(x, matrix, precision=exact, preferred_element_type=jnp.float32)
