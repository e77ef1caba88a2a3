"""Layers whose parameters name their axes, for `devices/sharding.py`. Sums, moments and gates are
float32 inside, with one rounding to the compute dtype at the end."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]
Pads = tuple[int, int]  # zeros before and after an axis


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Full precision for float32: by default such a product is one bfloat16 pass on a TPU and TF32
    on a GPU."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def param(
    shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, scale: float | None = None
) -> nnx.Param:
    """A parameter with named axes: normal values of standard deviation `scale`, or ones where it is
    None. (Flax's own sharding metadata needs a mesh even to build a model's shapes.)"""
    if scale is None:
        return nnx.Param(jnp.ones(shape, dtype), axes=axes)
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


class Linear(nnx.Module):
    """x @ kernel + bias, rounded once. An `int8` kernel is multiplied by a float32 `scale` for each
    output."""

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
        if int8:
            self.kernel = nnx.Param(jnp.zeros((inputs, outputs), jnp.int8), axes=axes)
        else:
            self.kernel = param((inputs, outputs), axes, dtype, rngs, inputs**-0.5)
        self.scale = param((outputs,), axes[1:], jnp.dtype(jnp.float32), rngs) if int8 else None
        self.bias = param((outputs,), axes[1:], dtype, rngs, 0.02) if bias else None

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        parameters = (self.kernel, self.scale, self.bias)
        kernel, scale, bias = (None if leaf is None else leaf[...] for leaf in parameters)
        return lax.platform_dependent(
            x, kernel, scale, bias, cuda=_linear_cublas, default=_linear_float32_sums
        )


def _linear_float32_sums(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # bfloat16 represents all of int8, so that widening a kernel rounds nothing.
    exact: Any = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}
    y = jnp.dot(x, kernel.astype(x.dtype), **exact)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def _linear_cublas(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # In this form XLA hands the bias to cuBLASLt, which sums in float32 and rounds once; the other
    # form writes float32 sums to memory. cuBLASLt's epilogue has no scale by outputs, so that an
    # int8 kernel is scaled before: a pass over one weight instead of one over all tokens.
    if scale is not None:
        kernel = kernel.astype(jnp.float32) * scale
    y = jnp.dot(x, kernel.astype(x.dtype), precision=precision(x.dtype))
    return y if bias is None else y + bias


class LayerNorm(nnx.Module):
    """Over the last axis, with scale and bias. The result is float32; the modulation or rotation
    after it rounds."""

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
    """T5's norm, without mean and bias: float32 inside, the parameters' dtype at the end."""

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
    """A normalisation with known moments, in float32: (x - mean) * scale + shift. Scale and shift
    may be coarser than x, by whole factors of its frames, rows and columns."""

    mean: Float[Array, "b 1 1 1 c"]
    scale: Float[Array, "b t h w c"]
    shift: Float[Array, "b t h w c"]


class GroupNorm(nnx.Module):
    """Over frames, rows, columns and the channels of a group, for each video of the batch. A frame
    counts with its weight, of which the sum is one. Returns mean, scale and shift instead of the
    normalised x, so that the caller can apply them strip by strip."""

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
        mean = self._group_mean(x, frame_weights)
        variance = self._group_mean(jnp.square(x - mean), frame_weights)
        scale = lax.rsqrt(variance + self.epsilon) * self.scale[...].astype(jnp.float32)
        shift = jnp.broadcast_to(self.bias[...].astype(jnp.float32), mean.shape)
        return NormCoefficients(mean, scale, shift)

    def _group_mean(
        self, x: Float[Array, "b f h w c"], frame_weights: Float[Array, " f"]
    ) -> Float[Array, "b 1 1 1 c"]:
        # Channels are reduced one by one, which keeps them in the minor dimension, groups after.
        b, *_, c = x.shape
        channels = jnp.sum(jnp.mean(x, axis=(2, 3)) * frame_weights[:, None], axis=1)
        means = channels.reshape(b, self.groups, c // self.groups).mean(axis=-1)
        return jnp.repeat(means, c // self.groups, axis=-1).reshape(b, 1, 1, 1, c)


class Conv(nnx.Module):
    """A 2-D convolution of every frame, with zeros (before, after) its `rows` and `columns`."""

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
        shape, axes = (size, size, inputs, outputs), (None, None, "inputs", "channels")
        self.kernel = param(shape, axes, dtype, rngs, (size * size * inputs) ** -0.5)
        self.bias = param((outputs,), ("channels",), dtype, rngs, 0.02)
        self.stride = stride

    def __call__(
        self, x: Float[Array, "b f h w c"], *, rows: Pads, columns: Pads
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
    """A convolution over frames (without padding), rows and columns (both with `stride`), summed in
    float32 and rounded once."""
    settings: Any = {"rows": rows, "columns": columns, "stride": stride}
    nvidia, others = partial(_convolve_frames, **settings), partial(_convolve_columns, **settings)
    return lax.platform_dependent(x, kernel, bias, cuda=nvidia, default=others)


def _convolve_frames(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    rows: Pads,
    columns: Pads,
    stride: int,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Frames are the batch of a 2-D convolution over rows and columns, and frame taps lie side by
    side on the channels: channels last and in bfloat16, which cuDNN's matrix units take, with the
    bias inside. XLA transposes a 3-D convolution to channels first, and computes all of it in
    float32 if float32 sums are asked for."""
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


def _convolve_columns(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    rows: Pads,
    columns: Pads,
    stride: int,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Columns, of which there are always many, are the batch of a 2-D convolution over frames and
    rows, and column taps lie side by side on the channels. With the two to nine frames as its batch
    a TPU pads or splits images to fill its tiles: twice the cycles and five times the compile time,
    by the compiler's own account."""
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
    y = rearrange(y, "(b w) f h c -> b f h w c", b=len(x))
    return (y + bias.astype(jnp.float32)).astype(x.dtype)


def stacked(layers: int, build: Callable[[nnx.Rngs], Any], rngs: nnx.Rngs) -> Any:
    """`layers` equal modules as one whose parameters have a layer axis in front, so that one
    program can scan over them."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def make(keys: nnx.Rngs) -> nnx.Module:
        return build(keys)

    return make(rngs)


def rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Rounds to the compute dtype behind a barrier, without which the compiler hands float32 values
    to the next layer, at twice the memory."""
    return lax.optimization_barrier(x.astype(dtype))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.silu(x.astype(jnp.float32))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation, as both the transformer and T5 use it."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)
