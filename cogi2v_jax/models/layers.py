"""Layers whose parameters name their axes, so that `sharding.py` can place them without knowing a
model. Sums, moments and gates are float32 inside, with one rounding to the compute dtype on the way
out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]
Pads = tuple[int, int]  # zeros before and after an axis


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Float32 means float32: left alone, such a product is one bfloat16 pass on a TPU and TF32 on a
    GPU."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def param(
    shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, scale: float | None = None
) -> nnx.Param:
    """A parameter with named axes: normal values of standard deviation `scale`, or ones where it is
    None. (Ours to name: flax's own sharding metadata wants a mesh even to build a model's
    shapes.)"""
    value = (
        jnp.ones(shape, dtype)
        if scale is None
        else scale * jax.random.normal(rngs.params(), shape, dtype)
    )
    return nnx.Param(value, axes=axes)


class Linear(nnx.Module):
    """x @ kernel + bias, rounded once. An `int8` kernel is of whole numbers, and `scale` says what
    one is worth, output by output."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: Axes,
        bias: bool = True,
        int8: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (inputs, outputs)
        self.kernel = (
            nnx.Param(jnp.zeros(shape, jnp.int8), axes=axes)
            if int8
            else param(shape, axes, dtype, rngs, inputs**-0.5)
        )
        self.scale = param((outputs,), axes[1:], jnp.dtype(jnp.float32), rngs) if int8 else None
        self.bias = param((outputs,), axes[1:], dtype, rngs, 0.02) if bias else None

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        kernel, scale, bias = (
            None if leaf is None else leaf[...] for leaf in (self.kernel, self.scale, self.bias)
        )
        return lax.platform_dependent(x, kernel, scale, bias, cuda=_by_cublas, default=_by_sums)


def _by_sums(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # Every whole number of int8 is one of bfloat16, so that widening a kernel rounds nothing.
    y = jnp.dot(
        x, kernel.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=jnp.float32
    )
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _by_cublas(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # In this form XLA gives the bias to cuBLASLt, which sums in float32 and rounds once; the other
    # writes float32 sums to memory. Nor is there a scale by outputs in what cuBLASLt does on its
    # way out, so an int8 kernel gets it: a pass over one weight, not over all tokens.
    if scale is not None:
        kernel = kernel.astype(jnp.float32) * scale
    y = jnp.dot(x, kernel.astype(x.dtype), precision=precision(x.dtype))
    return y if bias is None else y + bias


class LayerNorm(nnx.Module):
    """Over the last axis, affine, biased variance about the mean. The result is float32: what
    follows (a modulation, a rotation) rounds."""

    def __init__(
        self, width: int, *, epsilon: float, axes: Axes = (None,), dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.scale = param((width,), axes, dtype, rngs)
        self.bias = param((width,), axes, dtype, rngs, 0.02)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class RMSNorm(nnx.Module):
    """T5's norm: no mean, no bias; float32 in, the kernel dtype out."""

    def __init__(
        self, width: int, *, epsilon: float, axes: Axes = (None,), dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.scale = param((width,), axes, dtype, rngs)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.scale.dtype)


class NormCoefficients(NamedTuple):
    """A normalisation whose moments are known, in float32: (x - mean) * scale + shift. Scale and
    shift may be coarser than x by whole factors of its frames, rows and columns."""

    mean: Float[Array, "b 1 1 1 c"]
    scale: Float[Array, "b t h w c"]
    shift: Float[Array, "b t h w c"]


class GroupNorm(nnx.Module):
    """Over frames, rows, columns and the channels of a group, for each video of the batch. Frames
    count by their `frame_weights`, whose sum is one. It returns what is to be done with every value, which
    can then happen a few rows at a time."""

    def __init__(
        self, channels: int, groups: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.scale = param((channels,), ("channels",), dtype, rngs)
        self.bias = param((channels,), ("channels",), dtype, rngs, 0.02)
        self.groups = groups
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "b f h w c"], frame_weights: Float[Array, " f"]
    ) -> NormCoefficients:
        x = x.astype(jnp.float32)
        mean = self._grouped_mean(x, frame_weights)
        deviation = lax.rsqrt(
            self._grouped_mean(jnp.square(x - mean), frame_weights) + self.epsilon
        )
        shift = jnp.broadcast_to(self.bias[...].astype(jnp.float32), mean.shape)
        return NormCoefficients(mean, deviation * self.scale[...].astype(jnp.float32), shift)

    def _grouped_mean(
        self, x: Float[Array, "b f h w c"], frame_weights: Float[Array, " f"]
    ) -> Float[Array, "b 1 1 1 c"]:
        # Channels first reduce alone, which keeps them in the minor dimension; their groups meet
        # only afterwards.
        b, *_, c = x.shape
        means = (
            jnp.sum(jnp.mean(x, axis=(2, 3)) * frame_weights[:, None], axis=1)
            .reshape(b, self.groups, c // self.groups)
            .mean(axis=-1)
        )
        return jnp.repeat(means, c // self.groups, axis=-1).reshape(b, 1, 1, 1, c)


class Conv(nnx.Module):
    """A 2-D convolution of every frame. `rows` and `columns` are the zeros (before, after) them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(
            (size, size, inputs, outputs),
            (None, None, "inputs", "channels"),
            dtype,
            rngs,
            (size * size * inputs) ** -0.5,
        )
        self.bias = param((outputs,), ("channels",), dtype, rngs, 0.02)
        self.stride = stride

    def __call__(
        self, x: Float[Array, "b f h w c"], *, rows: tuple[int, int], columns: tuple[int, int]
    ) -> Float[Array, "b f h2 w2 c2"]:
        return convolve(x, self.kernel[...][None], self.bias[...], rows, columns, self.stride)


def convolve(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    rows: Pads,
    columns: Pads,
    stride: int = 1,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Over frames, rows and columns, summed in float32 and rounded once. `stride` is that of rows
    and columns; frames have no padding."""
    how = {"rows": rows, "columns": columns, "stride": stride}
    return lax.platform_dependent(
        x, kernel, bias, cuda=partial(_by_frames, **how), default=partial(_by_columns, **how)
    )


def _by_frames(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    rows: Pads,
    columns: Pads,
    stride: int,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Frame taps lie side by side on the channels, and frames are the batch of a 2-D convolution:
    channels last and in bfloat16, what cuDNN's matrix units take, with the bias inside. XLA turns a
    3-D one to channels first, and asked for float32 sums of bfloat16 it computes in float32
    altogether."""
    taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    y = lax.conv_general_dilated(
        rearrange(x, "b f h w c -> (b f) h w c"),
        rearrange(kernel, "p q r c c2 -> q r (p c) c2"),
        (stride, stride),
        (rows, columns),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )
    return rearrange(y + bias, "(b f) h w c -> b f h w c", b=len(x))


def _by_columns(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    rows: Pads,
    columns: Pads,
    stride: int,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Column taps lie side by side on the channels, and columns are the batch of a 2-D convolution
    over frames and rows: there are always many of them. With the frames as its batch, of which
    there are two to nine, a TPU pads or splits pictures to fill its tiles: twice the cycles and
    five times the time to compile, by the compiler's own account."""
    taps, last = kernel.shape[2], x.shape[3] + sum(columns) - kernel.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), columns, (0, 0)))
    x = jnp.concatenate([x[:, :, :, tap : tap + last + 1 : stride] for tap in range(taps)], axis=-1)
    y = lax.conv_general_dilated(
        rearrange(x, "b f h w c -> (b w) f h c"),
        rearrange(kernel, "p q r c c2 -> p q (r c) c2"),
        (1, stride),
        ((0, 0), rows),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return (rearrange(y, "(b w) f h c -> b f h w c", b=len(x)) + bias.astype(jnp.float32)).astype(
        x.dtype
    )


def stacked(layers: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`layers` equal modules in one, each parameter with a new first axis: one program for all of
    them."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def make(keys: nnx.Rngs) -> nnx.Module:
        return build(keys)

    return make(rngs)


def rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """In the compute dtype, and the compiler is held to it: left alone it hands float32 values to
    the next layer, at twice the memory."""
    return lax.optimization_barrier(x.astype(dtype))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.silu(x.astype(jnp.float32))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation, as both the transformer and T5 have it."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)
