"""Convolutions and their gradients against PyTorch's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import assert_close

from cogi2v_jax.models.layers import convolve

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
