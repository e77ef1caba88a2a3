"""Convolutions and their gradients against PyTorch's in float64, and the dtype of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from tolerances import assert_close

from cogi2v_jax.models import layers
from cogi2v_jax.models.convolutions import convolve

CASES = {  # taps over frames, rows and columns; zeros around rows and columns; stride
    "whole": ((3, 3, 3), (1, 1), (1, 1), 1),
    "strip": ((3, 3, 3), (0, 1), (1, 1), 1),
    "frame": ((1, 3, 3), (1, 1), (1, 1), 1),
    "halved": ((1, 3, 3), (0, 1), (0, 1), 2),
    "halved, even": ((1, 3, 3), (1, 1), (1, 1), 2),
    "pointwise": ((1, 1, 1), (0, 0), (0, 0), 1),
    "uneven": ((2, 3, 1), (2, 0), (0, 0), 1),
}


@pytest.mark.parametrize(("taps", "rows", "columns", "stride"), CASES.values(), ids=CASES)
def test_a_convolution_and_its_gradients_are_the_references(
    taps: tuple[int, ...],
    rows: tuple[int, int],
    columns: tuple[int, int],
    stride: int,
    rng: np.random.Generator,
) -> None:
    x, kernel = rng.normal(size=(2, 5, 8, 6, 3)), rng.normal(size=(*taps, 3, 4))
    bias = rng.normal(size=4)
    leaves = [torch.tensor(leaf, requires_grad=True) for leaf in (x, kernel, bias)]
    padded = torch.nn.functional.pad(leaves[0].permute(0, 4, 1, 2, 3), (*columns, *rows))
    theirs = torch.nn.functional.conv3d(
        padded, leaves[1].permute(4, 3, 0, 1, 2), leaves[2], stride=(1, stride, stride)
    ).permute(0, 2, 3, 4, 1)
    weights = rng.normal(size=theirs.shape)
    theirs.backward(torch.tensor(weights))

    given = (jnp.asarray(leaf, jnp.float32) for leaf in (x, kernel, bias))
    ours, back = jax.vjp(lambda *args: convolve(*args, rows, columns, stride), *given)
    assert_close(ours, theirs.detach().numpy(), 1e-6)
    for found, leaf in zip(back(jnp.asarray(weights, jnp.float32)), leaves, strict=True):
        assert leaf.grad is not None
        assert_close(found, leaf.grad.numpy(), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_still_is_a_video_of_one_repeated_frame(dtype: str, rng: np.random.Generator) -> None:
    frame, kernel, bias = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in ((2, 1, 8, 6, 3), (3, 3, 3, 3, 4), (4,))
    )
    given = jnp.repeat(frame, 3, axis=1), kernel, bias
    sides = (1, 1), (1, 1), 1
    (video, back), (still, back_of_still) = (
        jax.vjp(lambda *args, still=still: convolve(*args, *sides, still), *given)
        for still in (False, True)
    )
    assert_close(still, video, 1e-6)
    grad = jnp.asarray(rng.normal(size=video.shape), dtype)
    for found, expected in zip(back_of_still(grad), back(grad), strict=True):
        assert_close(found, expected, 1e-6)


def test_the_gradient_of_a_float32_kernel_is_not_rounded_to_the_dtype_of_x(
    rng: np.random.Generator,
) -> None:
    x, grad = (jnp.asarray(rng.normal(size=(1, 4, 6, 6, 8)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(1, 3, 3, 8, 8)), jnp.float32)

    def gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
        sides = (1, 1), (1, 1)
        result, back = jax.vjp(lambda k: convolve(x, k, jnp.zeros(8, k.dtype), *sides), kernel)
        assert result.dtype == x.dtype
        return back(grad)[0]

    exact = gradient(x.astype(jnp.float32), grad.astype(jnp.float32))
    assert gradient(x, grad).dtype == jnp.float32
    assert_close(gradient(x, grad), exact, 1e-5)


@pytest.mark.parametrize("form", ["default", "cuda"])
def test_the_gradients_of_a_linear_layer_are_not_rounded_either(
    form: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.lax, "platform_dependent", lambda *args, **forms: forms[form](*args))
    x, grad = (jnp.asarray(rng.normal(size=(2, 64, 8)), jnp.bfloat16) for _ in range(2))
    kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 8), (8,)))
    layer = layers.Linear(8, 8, axes=(None, None), dtype=jnp.dtype("float32"))

    def apply(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        values = {"kernel": kernel, "bias": bias}
        return twins.filled(layer, lambda name, _: values[name])(x)

    def gradients(x: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        result, back = jax.vjp(apply, x, kernel, bias)
        assert result.dtype == x.dtype
        return back(grad)

    ours = gradients(x, grad)
    exact = gradients(x.astype(jnp.float32), grad.astype(jnp.float32))
    assert [leaf.dtype for leaf in ours] == [jnp.bfloat16, jnp.float32, jnp.float32]
    for found, expected in zip(ours[1:], exact[1:], strict=True):
        assert_close(found, expected, 1e-5)
