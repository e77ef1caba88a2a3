"""Layers whose parameters name their axes, for `devices/sharding.py`. Sums, moments and gates are
float32 inside, with one rounding to the compute dtype at the end."""

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
    ):
        shape, axes = (size, size, inputs, outputs), (None, None, "inputs", "channels")
        self.kernel = param(shape, axes, dtype)
        self.bias = param((outputs,), ("channels",), dtype)
        self.stride = stride

    def __call__(
        self, x: Float[Array, "b f h w c"], *, rows: Pads, columns: Pads
    ) -> Float[Array, "b f h2 w2 c2"]:
        return convolve(x, self.kernel[...][None], self.bias[...], rows, columns, self.stride)


# Any: the decorator hides the result's type from static checkers.
with_gradient: Any = partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))


@with_gradient
def convolve(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    rows: Pads,
    columns: Pads,
    stride: int = 1,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """A convolution over frames (without padding), rows and columns (both with `stride`), in the
    dtype of x, summed in float32 and rounded once. The gradient of a float32 kernel is float32, as
    that of `product`."""
    kernel = kernel.astype(x.dtype)
    settings: Any = {"rows": rows, "columns": columns, "stride": stride}
    # On a CPU, frames as the batch take half of the time of columns, and a quarter for one frame.
    nvidia = partial(_convolve_frames, **settings, sums=x.dtype)
    cpu = partial(_convolve_frames, **settings, sums=jnp.dtype(jnp.float32))
    others = partial(_convolve_columns, **settings)
    return lax.platform_dependent(x, kernel, bias, cuda=nvidia, cpu=cpu, default=others)


def _convolve_forward(
    x: Array, kernel: Array, bias: Array, *settings: Any
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel, bias, *settings), (x, kernel)


def _convolve_backward(
    rows: Pads, columns: Pads, stride: int, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, Array, Array]:
    """The gradient of x is a convolution too, that of the kernel a matrix product for each tap over
    frames. By XLA's own rule the kernel's is a convolution with a window as large as the picture,
    which takes a CPU many times as long inside a loop."""
    x, kernel = saved
    taps, height, width = kernel.shape[:3]
    of_bias = jnp.sum(wide(grad), axis=(0, 1, 2, 3)).astype(kernel.dtype)
    # As if the stride were one: zeros where it left results out.
    sides = zip(x.shape[2:4], (rows, columns), (height, width), grad.shape[2:4], strict=True)
    left_out = [
        (0, side + sum(pads) - tap - stride * (size - 1), stride - 1)
        for side, pads, tap, size in sides
    ]
    every = [(0, 0, 0)]
    grad = lax.pad(grad, jnp.zeros((), grad.dtype), [*every * 2, *left_out, *every])

    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    around = jnp.pad(grad, [(0, 0), (taps - 1, taps - 1), (0, 0), (0, 0), (0, 0)])
    ends = [
        (tap - 1 - before, tap - 1 - after)
        for tap, (before, after) in ((height, rows), (width, columns))
    ]
    of_x = convolve(around, flipped, jnp.zeros(x.shape[-1], kernel.dtype), *ends)

    # Column taps lie side by side on the channels of x, row taps on those of the gradient.
    frames, last = grad.shape[1], grad.shape[3]
    x = jnp.pad(x, [(0, 0), (0, 0), rows, columns, (0, 0)])
    x = jnp.concatenate([x[:, :, :, tap : tap + last] for tap in range(width)], axis=-1)
    shifts = [((0, 0), (0, 0), (tap, height - 1 - tap), (0, 0), (0, 0)) for tap in range(height)]
    grad = jnp.concatenate([jnp.pad(grad, shift) for shift in shifts], axis=-1)
    grad = rearrange(grad, "b f h w o -> (b f h w) o")
    products = [
        jnp.einsum("nc,no->co", rearrange(each, "b f h w c -> (b f h w) c"), grad, **exact(x))
        for each in (x[:, tap : tap + frames] for tap in range(taps))
    ]
    of_kernel = rearrange(products, "p (r c) (q o) -> p q r c o", r=width, q=height)
    return of_x, of_kernel.astype(kernel.dtype), of_bias


convolve.defvjp(_convolve_forward, _convolve_backward)


def _convolve_frames(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    rows: Pads,
    columns: Pads,
    stride: int,
    sums: jnp.dtype,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Frames are the batch of a 2-D convolution over rows and columns, and frame taps lie side by
    side on the channels: channels last and in bfloat16, which cuDNN's matrix units take, with the
    bias inside. For NVIDIA's devices XLA transposes a 3-D convolution to channels first, and
    computes all of it in float32 if float32 `sums` are asked for; cuDNN's are float32 anyway."""
    taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    x = jnp.concatenate([x[:, tap : tap + frames] for tap in range(taps)], axis=-1)
    y = lax.conv_general_dilated(
        rearrange(x, "b f h w c -> (b f) h w c"),
        rearrange(kernel, "p q r c c2 -> q r (p c) c2"),
        (stride, stride),
        (rows, columns),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
        preferred_element_type=sums,
    )
    y = (y + bias.astype(sums)).astype(x.dtype)
    return rearrange(y, "(b f) h w c -> b f h w c", b=len(x))


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
