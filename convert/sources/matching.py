"""A source's tensors against the weight tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.lookalikes import by_tensors
from cogi2v_jax.weights.pieces import abstract, layer_count, leaf_names

from ..tables import t5, transformer, vae
from ..tables.rules import Target, expand, misfits
from . import lookalikes
from .gather import Source
from .parts import Tensor

TABLES: dict[str, Callable[[Any], tuple]] = {
    "transformer": transformer.table,
    "vae": vae.table,
    "text_encoder": t5.table,
}
MOST_LAYERS = 1000  # 42 is the most that a published network has


class Match(NamedTuple):
    """A source's tensors of one part, and our leaves for them."""

    part: str
    targets: dict[str, Target]  # by torch name
    tensors: dict[str, Tensor]  # by torch name
    faults: list[str]  # why they do not fit the network, a line each


def targets(config: CheckpointConfig, part: str) -> dict[str, Target]:
    """Our leaf for each torch name of a part. Raises ValueError for more layers than any network of
    this family has: it would take memory for each."""
    settings = getattr(config, part)
    count = layer_count(config, part)
    if (layers := max(count, getattr(settings, "layers_per_block", 0))) > MOST_LAYERS:
        raise ValueError(f"{part} must have at most {MOST_LAYERS} layers: got {layers}")
    return expand(TABLES[part](settings), count)


def shapes(config: CheckpointConfig, part: str) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a part."""
    leaves = leaf_names(abstract(config, part, jnp.dtype(jnp.float32)))
    return {name: leaf.shape for name, leaf in leaves.items()}


def match(source: Source, part: str) -> Match:
    """Matches every tensor of a part with its target by name and shape. Reads only headers, but for
    a T5 embedding that is stored under both of its names."""
    found, tensors = targets(source.config, part), source.tensors(part)
    twice = {}
    if part == "text_encoder":
        for alias, name in t5.TIED.items():
            if alias in tensors:
                found[alias] = found[name]
                if name in tensors:
                    twice[alias] = name
                else:
                    del found[name]
    if relative := by_tensors(name for name in tensors if name not in found):
        must = "the weights must be of image-to-video from a prompt and a first image alone"
        return Match(part, found, tensors, [f"{must}: got {relative}"])
    sizes = {name: tensor.shape for name, tensor in tensors.items()}
    faults = lookalikes.find_differences(source.config, sizes) if part == "transformer" else []
    faults += misfits(found, shapes(source.config, part), sizes)
    faults += [
        f"{alias} must equal {name}, its other name: got other values"
        for alias, name in twice.items()
        if not _is_same(source, tensors, alias, name)
    ]
    absent = sorted(source.absent(part) - found.keys())
    faults += [f"{name} is in the index and in no shard" for name in absent]
    return Match(part, found, tensors, faults)


def _is_same(source: Source, tensors: dict[str, Tensor], one: str, other: str) -> bool:
    """Compares bits: as numbers, -0 equals 0 and NaN does not equal itself."""
    if tensors[one][1:] != tensors[other][1:]:
        return False
    ours, theirs = (source.read("text_encoder", name).view(np.uint8) for name in (one, other))
    return np.array_equal(ours, theirs)
