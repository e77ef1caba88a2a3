"""Convolutions of videos over frames, rows and columns, each in the form that its kind of device is
fastest at."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from .layers import exact, param, precision, wide

Pads = tuple[int, int]  # zeros before and after an axis


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
with_gradient: Any = partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))


@with_gradient
def convolve(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    rows: Pads,
    columns: Pads,
    stride: int = 1,
    still: bool = False,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """A convolution over frames (without padding), rows and columns (both with `stride`), in the
    dtype of x, summed in float32 and rounded once. `still` says that x is one frame, repeated for
    every frame tap. The gradient of a float32 kernel is float32, as that of `product`."""
    kernel = kernel.astype(x.dtype)
    settings: Any = {"rows": rows, "columns": columns, "stride": stride}
    nvidia = partial(_convolve_frames, **settings, sums=x.dtype)
    cpu = partial(_convolve_on_cpu, **settings, still=still)
    others = partial(_convolve_columns, **settings)
    return lax.platform_dependent(x, kernel, bias, cuda=nvidia, cpu=cpu, default=others)


def _convolve_forward(
    x: Array, kernel: Array, bias: Array, *settings: Any
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel, bias, *settings), (x, kernel)


def _convolve_backward(
    rows: Pads, columns: Pads, stride: int, _still: bool, saved: tuple[Array, Array], grad: Array
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


def _convolve_on_cpu(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "p q r c c2"],
    bias: Float[Array, " c2"],
    *,
    still: bool,
    **settings: Any,
) -> Float[Array, "b f2 h2 w2 c2"]:
    """With frames as the batch: half of the time of columns, and a quarter for one frame. Of a
    still the frame taps are added first, which leaves a third of the work; not in bfloat16, which
    would round the sums."""
    if still and x.dtype == jnp.float32:
        x, kernel = x[:, :1], jnp.sum(kernel, axis=0, keepdims=True)
    return _convolve_frames(x, kernel, bias, **settings, sums=jnp.dtype(jnp.float32))


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
