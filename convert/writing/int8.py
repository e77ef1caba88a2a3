"""Int8 kernels, quantised by qwix: a unit's leaves as int8 with scales, their errors, and the way
back to floating point."""

import dataclasses
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from cogi2v_jax.config import BLOCKS, CheckpointConfig
from cogi2v_jax.disk import one_line
from cogi2v_jax.weights.checkpoint import int8_errors
from cogi2v_jax.weights.pieces import abstract, leaf_names

SHOWN = 3  # how many tensors of a part, those with the largest errors, are listed
REST = np.dtype(ml_dtypes.bfloat16)  # of all other leaves, and of kernels on the way back


def check_library() -> None:
    """Raises ValueError where qwix is missing."""
    if not find_spec("qwix"):
        raise ValueError("dtype int8 must have qwix: pip install 'cogi2v-jax[int8]'")


def kernels(config: CheckpointConfig, part: str) -> set[str]:
    """The leaves of a part that int8 conversion quantises: 2-D kernels in its blocks."""
    network = abstract(dataclasses.replace(config, int8=BLOCKS), part, jnp.dtype(jnp.float32))
    return {name for name, leaf in leaf_names(network).items() if leaf.dtype == jnp.int8}


def quantise(
    leaves: Mapping[str, np.ndarray], kernels: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """A unit's leaves with its `kernels` [i o] as int8 and a float32 scale [o] for each, and the
    relative error of each kernel. All weights must be finite."""
    import qwix

    made, errors = dict(leaves), {}
    for name in sorted(kernels & leaves.keys()):
        kernel = leaves[name].astype(np.float32)
        numbers = qwix.quantize(jnp.asarray(kernel), jnp.int8, channelwise_axes=(1,))
        made[name], made[_scale(name)] = np.asarray(numbers.qvalue), np.asarray(numbers.scale)[0]
        errors[name] = _error(kernel, made[name] * made[_scale(name)])
    return made, errors


def dequantise(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A unit's leaves with kernels in bfloat16 in place of int8 kernels and their scales."""
    kernels = [name for name, leaf in leaves.items() if leaf.dtype == np.int8]
    scales = {_scale(name) for name in kernels}
    made = {name: leaf for name, leaf in leaves.items() if name not in scales}
    return made | {name: (leaves[name] * leaves[_scale(name)]).astype(REST) for name in kernels}


def error_lines(folder: Path) -> Iterator[str]:
    """The quantisation errors of a converted folder: for each int8 part the mean, then the tensors
    with the largest. Nothing for any other folder."""
    for part, errors in int8_errors(folder).items():
        yield f"{part}: {summary(errors)}; the worst:"
        for name in sorted(errors, key=errors.__getitem__, reverse=True)[:SHOWN]:
            yield f"  {errors[name]:7.2%}  {one_line(name)}"


def summary(errors: Mapping[str, float]) -> str:
    mean = sum(errors.values()) / len(errors)
    return f"{len(errors)} tensors in int8 with a mean relative error of {mean:.2%}"


def _scale(kernel: str) -> str:
    return kernel.removesuffix("kernel") + "scale"


def _error(kernel: Float[np.ndarray, "i o"], approximate: Float[np.ndarray, "i o"]) -> float:
    """|approximate - kernel| / |kernel|, or 0 for a kernel of zeros. Divided by the largest number
    first, because its square may overflow float32."""
    largest = np.abs(kernel).max()
    return _norm((approximate - kernel) / largest) / _norm(kernel / largest) if largest else 0.0


def _norm(values: Float[np.ndarray, "i o"]) -> float:
    return float(np.sqrt(np.sum(np.square(values), dtype=np.float64)))
