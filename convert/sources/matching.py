"""A source's tensors against the weight tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cogi2v_jax.config import CheckpointConfig
from cogi2v_jax.lookalikes import by_tensors
from cogi2v_jax.weights.pieces import abstract, layer_count, leaf_names

from ..tables import fused, t5, transformer, vae
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
    copies: tuple[str, ...] = ()  # tensors beside those that they are copies of, and left out


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
    what is stored twice: a T5 embedding under both of its names, and fused projections beside those
    that they were made of."""
    found, tensors = targets(source.config, part), source.tensors(part)
    copies = tuple(name for name in tensors if name not in found and fused.parts_of(name))
    stale = [name for name in copies if not _is_fused(source, part, tensors, name)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
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
    for name in stale:
        whole = " and ".join(fused.parts_of(name))
        faults.append(f"{name} must be a copy of {whole}: it is not")
    absent = sorted(source.absent(part) - found.keys())
    faults += [f"{name} is in the index and in no shard" for name in absent]
    return Match(part, found, tensors, faults, copies)


def _is_fused(source: Source, part: str, tensors: dict[str, Tensor], name: str) -> bool:
    """Whether a tensor is the three beside it, one behind the other, bit for bit."""
    parts = [each for each in fused.parts_of(name) if each in tensors]
    shapes = [tensors[each].shape for each in parts]
    if len(parts) < 3 or not all(shapes):
        return False
    lengths = [shape[0] for shape in shapes]
    if tensors[name].shape != (sum(lengths), *shapes[0][1:]):
        return False
    rows = np.split(source.read(part, name), np.cumsum(lengths)[:-1])
    pairs = zip(rows, parts, strict=True)
    return all(_same_bits(ours, source.read(part, each)) for ours, each in pairs)


def _is_same(source: Source, tensors: dict[str, Tensor], one: str, other: str) -> bool:
    if tensors[one][1:] != tensors[other][1:]:
        return False
    return _same_bits(*(source.read("text_encoder", name) for name in (one, other)))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Compares bits: as numbers, -0 equals 0 and NaN does not equal itself."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    one, other = (np.ascontiguousarray(each).reshape(-1) for each in (one, other))
    return np.array_equal(one.view(np.uint8), other.view(np.uint8))
