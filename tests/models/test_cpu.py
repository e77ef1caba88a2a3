"""The forms of convolutions for CPUs: the work in programs that are compiled for one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from cogi2v_jax.models.convolutions import convolve

FRAMES = jax.ShapeDtypeStruct((1, 3, 16, 16, 8), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 3, 8, 8), jnp.float32)
BIAS = jax.ShapeDtypeStruct((8,), jnp.float32)


def operations(function: Callable[..., Any], *shapes: Any) -> float:
    """Floating-point operations of the compiled program."""
    cost: Any = jax.jit(function).lower(*shapes).compile().cost_analysis()
    return cost["flops"]


def convolved(x: jax.Array, kernel: jax.Array, bias: jax.Array, still: bool = False) -> jax.Array:
    return convolve(x, kernel, bias, (1, 1), (1, 1), 1, still)


def test_the_frame_taps_of_a_still_are_added_before_the_convolution() -> None:
    forms = (partial(convolved, still=still) for still in (True, False))
    still, video = (operations(form, FRAMES, KERNEL, BIAS) for form in forms)
    assert still <= 0.4 * video
