"""The low-pass of `motion`, as matrices: the factor is then data of one program."""

import numpy as np
from jaxtyping import Float


def low_pass_matrix(size: int, factor: float) -> Float[np.ndarray, "n n"]:
    """What resizing a row of `size` values to `factor` of its length and back multiplies it by, in
    float32: bilinear and antialiased, as torch's `interpolate` does it."""
    small = max(1, int(size * factor))
    return (_resize(small, size) @ _resize(size, small)).astype(np.float32)


def _resize(size: int, target: int) -> Float[np.ndarray, "m n"]:
    """Triangles around the centres of the target's values, as wide as the larger of both
    pixels."""
    scale = size / target
    centres = (np.arange(target)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(size) - centres) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)
