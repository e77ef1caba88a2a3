"""Kernels as int8, by qwix: what a unit's leaves become, how far off they are, and what they stand
for on the way back."""

import dataclasses
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float

from cogi2v_jax.config import BLOCKS, CheckpointConfig
from cogi2v_jax.weights.checkpoint import int8_errors
from cogi2v_jax.weights.pieces import abstract, leaf_names

from ..tables.rules import Target
from .folder import Sums

SHOWN = 3  # of a part's tensors: those that are furthest off
# What has no int8 form, and what an int8 folder is given back in.
REST = np.dtype(ml_dtypes.bfloat16)


def check_library() -> None:
    """Raises ValueError where qwix is missing."""
    if not find_spec("qwix"):
        raise ValueError("dtype int8 must have qwix: pip install 'cogi2v-jax[int8]'")


def kernels(config: CheckpointConfig, part: str) -> set[str]:
    """The leaves that are int8 in a network whose blocks are: those of 2-D kernels in its
    blocks."""
    network = abstract(dataclasses.replace(config, int8=BLOCKS), part, jnp.dtype(jnp.float32))
    return {name for name, leaf in leaf_names(network).items() if leaf.dtype == jnp.int8}


def quantised(
    leaves: Mapping[str, np.ndarray], kernels: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """A unit's leaves with its `kernels` as int8 and a float32 scale for each output, and the
    kernels' relative errors. All are finite."""
    import qwix

    made, errors = dict(leaves), {}
    for name in kernels & leaves.keys():
        kernel = leaves[name].astype(np.float32)
        numbers = qwix.quantize(jnp.asarray(kernel), jnp.int8, channelwise_axes=(1,))
        made[name], made[_scale(name)] = np.asarray(numbers.qvalue), np.asarray(numbers.scale)[0]
        errors[name] = _error(kernel, made[name] * made[_scale(name)])
    return made, errors


def errors(
    homes: Mapping[str, Target], part: str, units: Mapping[tuple[str, int | None], Sums]
) -> dict[str, float]:
    """The relative error of every torch tensor of a part that became int8."""
    leaves = ((name, units[part, home.layer][home.rule.flax]) for name, home in homes.items())
    return {name: leaf["error"] for name, leaf in leaves if "error" in leaf}


def dequantised(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A unit's leaves with floating-point kernels again."""
    numbers = [name for name, leaf in leaves.items() if leaf.dtype == np.int8]
    scales = {_scale(name) for name in numbers}
    made = {name: leaf for name, leaf in leaves.items() if name not in scales}
    return made | {name: (leaves[name] * leaves[_scale(name)]).astype(REST) for name in numbers}


def report(folder: Path) -> list[str]:
    """How far a converted folder's int8 kernels are from what they were: a part's mean, and its
    worst. Nothing of any other folder."""
    return [line for part, errors in int8_errors(folder).items() for line in _lines(part, errors)]


def _lines(part: str, errors: Mapping[str, float]) -> Iterator[str]:
    yield f"{part}: {summary(errors)}; the worst:"
    for name in sorted(errors, key=errors.__getitem__, reverse=True)[:SHOWN]:
        yield f"  {errors[name]:7.2%}  {name}"


def summary(errors: Mapping[str, float]) -> str:
    """A part's errors in a few words."""
    return f"{len(errors)} tensors in int8 with a mean relative error of {sum(errors.values()) / len(errors):.2%}"


def _scale(kernel: str) -> str:
    return kernel.removesuffix("kernel") + "scale"


def _error(kernel: Float[np.ndarray, "i o"], approximate: Float[np.ndarray, "i o"]) -> float:
    """|approximate - kernel| / |kernel|; 0 where both are nothing. In units of the largest number,
    whose square float32 may not hold."""
    largest = np.abs(kernel).max()
    return _norm((approximate - kernel) / largest) / _norm(kernel / largest) if largest else 0.0


def _norm(values: Float[np.ndarray, "i o"]) -> float:
    return float(np.sqrt(np.sum(np.square(values), dtype=np.float64)))
