"""Layers whose parameters name their axes, for `devices/sharding.py`. Sums, moments and gates are
float32 inside, with one rounding to the compute dtype at the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Full precision for float32: by default such a product is one bfloat16 pass on a TPU and TF32
    on a GPU."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def wide(x: Array) -> Array:
    """In the dtype of sums, moments and gates: float32, or float64 where a check computes in it."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def exact(x: Array) -> dict[str, Any]:
    """Arguments of a product of arrays of this dtype: full precision, and sums as in `wide`."""
    sums = jnp.promote_types(x.dtype, jnp.float32)
    return {"precision": precision(x.dtype), "preferred_element_type": sums}


def param(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """A parameter with named axes. A network is built of shapes alone, and gets its values from a
    checkpoint. (Flax's own sharding metadata needs a mesh even for shapes.)"""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


@jax.custom_vjp
def product(x: Float[Array, "*rows i"], kernel: Float[Array, "i o"]) -> Float[Array, "*rows o"]:
    """x @ kernel in the dtype of x, summed in float32. The gradient of a float32 kernel is float32
    too: by the chain rule of the cast it would be rounded to the dtype of x, and summed over
    devices in it."""
    return jnp.dot(x, kernel.astype(x.dtype), **exact(x))


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    grad = grad.astype(x.dtype)
    of_x = jnp.einsum("...o,io->...i", grad, kernel.astype(x.dtype), **exact(x))
    of_kernel = jnp.einsum("...i,...o->io", x, grad, **exact(x))
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


class LowRank(nnx.Module):
    """The change of a frozen kernel, scale * down @ up (LoRA, arXiv 2106.09685), of arrays or of
    their shapes."""

    def __init__(
        self,
        down: Float[Any, "*layers inputs rank"],
        up: Float[Any, "*layers rank outputs"],
        scale: float,
    ):
        self.down, self.up = (nnx.Param(factor, axes=(None, None)) for factor in (down, up))
        self.scale = scale  # alpha / rank

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """The change of the linear layer's result, not rounded."""
        return self.scale * product(product(x, self.down[...]).astype(x.dtype), self.up[...])


class Linear(nnx.Module):
    """x @ kernel + bias, rounded once. An `int8` kernel is multiplied by a float32 `scale` for each
    output. `lora` may be a LowRank, which is added: in training, and beside an int8 kernel."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        axes: Axes,
        bias: bool = True,
        int8: bool = False,
        dtype: jnp.dtype,
    ):
        self.kernel = param((inputs, outputs), axes, jnp.dtype(jnp.int8) if int8 else dtype)
        self.scale = param((outputs,), axes[1:], jnp.dtype(jnp.float32)) if int8 else None
        self.bias = param((outputs,), axes[1:], dtype) if bias else None
        self.lora: LowRank | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        parameters = (self.kernel, self.scale, self.bias)
        kernel, scale, bias = (None if leaf is None else leaf[...] for leaf in parameters)
        y = lax.platform_dependent(
            x, kernel, scale, bias, cuda=_linear_cublas, default=_linear_float32_sums
        )
        return y if self.lora is None else (wide(y) + self.lora(x)).astype(x.dtype)


def _linear_float32_sums(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # bfloat16 represents all of int8, so that widening a kernel rounds nothing.
    y = product(x, kernel if scale is None else kernel.astype(x.dtype))
    y = y if scale is None else y * scale
    return (y if bias is None else y + wide(bias)).astype(x.dtype)


def _linear_cublas(
    x: Float[Array, "*rows i"], kernel: Array, scale: Array | None, bias: Array | None
) -> Float[Array, "*rows o"]:
    # In this form XLA hands the bias to cuBLASLt, which sums in float32 and rounds once; the other
    # form writes float32 sums to memory. cuBLASLt's epilogue has no scale by outputs, so that an
    # int8 kernel is scaled before: a pass over one weight instead of one over all tokens.
    if scale is not None:
        kernel = kernel.astype(jnp.float32) * scale
    return _product_and_bias(x, kernel, bias)


@jax.custom_vjp
def _product_and_bias(
    x: Float[Array, "*rows i"], kernel: Float[Array, "i o"], bias: Float[Array, " o"] | None
) -> Float[Array, "*rows o"]:
    """With the gradients of `product`."""
    y = jnp.dot(x, kernel.astype(x.dtype), precision=precision(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


def _product_and_bias_forward(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _product_and_bias(x, kernel, bias), (x, kernel, bias)


def _product_and_bias_backward(
    saved: tuple[Array, Array, Array | None], grad: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    of_x, of_kernel = _product_backward((x, kernel), grad)
    if bias is None:
        return of_x, of_kernel, None
    rows = tuple(range(grad.ndim - 1))
    return of_x, of_kernel, jnp.sum(wide(grad), axis=rows).astype(bias.dtype)


_product_and_bias.defvjp(_product_and_bias_forward, _product_and_bias_backward)


class LayerNorm(nnx.Module):
    """Over the last axis, with scale and bias. The result is float32; the modulation or rotation
    after it rounds."""

    def __init__(self, width: int, *, epsilon: float, axes: Axes = (None,), dtype: jnp.dtype):
        self.scale = param((width,), axes, dtype)
        self.bias = param((width,), axes, dtype)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        x = wide(x)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x * wide(self.scale[...]) + wide(self.bias[...])


class RMSNorm(nnx.Module):
    """T5's norm, without mean and bias: float32 inside, the parameters' dtype at the end."""

    def __init__(self, width: int, *, epsilon: float, axes: Axes = (None,), dtype: jnp.dtype):
        self.scale = param((width,), axes, dtype)
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

    def __init__(self, channels: int, groups: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = param((channels,), ("channels",), dtype)
        self.bias = param((channels,), ("channels",), dtype)
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


def stacked(layers: int, layer: nnx.Module) -> Any:
    """`layers` equal modules as one whose parameters have a layer axis in front, so that one
    program can scan over them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), layer)


def rounded(x: Float[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """Rounds to the compute dtype behind a barrier, without which the compiler hands float32 values
    to the next layer, at twice the memory."""
    return lax.optimization_barrier(x.astype(dtype))


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.nn.silu(wide(x))


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The tanh approximation, as both the transformer and T5 use it."""
    return jax.nn.gelu(wide(x), approximate=True)
