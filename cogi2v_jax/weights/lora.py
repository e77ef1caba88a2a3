"""LoRA (Hu et al., arXiv 2106.09685): low-rank changes of the transformer's weights. They are added
to floating-point kernels while these are loaded: the network and its programs stay the same,
another LoRA compiles nothing and costs no time in a step. An int8 kernel stays as it is, and its
changes are a branch beside it (a `LowRank`), of one program for all LoRAs of like rank."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from ..devices.sharding import put

# Factors are added in slices of this rank, so that all files share one program for each shape.
RANK = 64

LeafLayer = tuple[str, int | None]  # a leaf, and its layer where it is stacked


class Factors(NamedTuple):
    """The change of one weight: kernel += weight * scale * down @ up."""

    down: Float[np.ndarray, "inputs r"]
    up: Float[np.ndarray, "r outputs"]
    scale: float  # alpha / rank


@dataclass(frozen=True, eq=False)
class Lora:
    """The changes of one file, in our names and layouts."""

    name: str
    sha256: str  # of the file
    weight: float
    factors: Mapping[LeafLayer, Factors] = field(repr=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for LoRAs that add the same. (Scales may come from another file than the
        factors.)"""
        scales = tuple((leaf, factors.scale) for leaf, factors in self.factors.items())
        return self.sha256, self.weight, scales


def select_loras(loras: Iterable[Lora], leaves: Iterable[str]) -> list[Lora]:
    """The LoRAs that change any of these leaves."""
    leaves = set(leaves)
    return [lora for lora in loras if any(leaf in leaves for leaf, _ in lora.factors)]


# Linear layers with a branch for LoRAs, and its rank.
Ranks = tuple[tuple[str, int], ...]
DOWN, UP = ".lora.down", ".lora.up"  # what the factors of a branch are called after its layer


def ranks_beside(loras: Iterable[Lora], leaves: Mapping[str, Any]) -> Ranks:
    """The branches that hold all these LoRAs beside the int8 kernels among `leaves` (arrays or
    shapes), each of a multiple of RANK."""
    ranks: dict[str, int] = {}
    for lora in loras:
        own: dict[str, int] = {}
        for (name, _), factors in lora.factors.items():
            if name in leaves and leaves[name].dtype == jnp.int8:
                own[name] = max(own.get(name, 0), len(factors.up))
        ranks |= {name: ranks.get(name, 0) + rank for name, rank in own.items()}
    return tuple(
        (name.removesuffix(".kernel"), math.ceil(rank / RANK) * RANK)
        for name, rank in sorted(ranks.items())
    )


Leaves = Mapping[str, jax.ShapeDtypeStruct]


def read_merged(
    loras: Sequence[Lora],
    layer: int | None,
    leaves: Leaves,
    read: Callable[[Leaves], dict[str, Array]],
) -> dict[str, Array]:
    """The leaves of a layer (None: those that are not stacked) as `read` returns them, with all
    LoRAs added in order. Changed leaves are read and summed in float32 and rounded once; those
    with a branch are not changed, and the branch has the LoRAs' factors."""
    beside = {name.removesuffix(DOWN) for name in leaves if name.endswith(DOWN)}
    stored = {name: leaf for name, leaf in leaves.items() if not name.endswith((DOWN, UP))}
    changed = {name for name in stored for lora in loras if (name, layer) in lora.factors}
    changed -= {f"{name}.kernel" for name in beside}
    assert all(jnp.issubdtype(leaves[name].dtype, jnp.floating) for name in changed)
    merged = read(stored | {name: stored[name].update(dtype=jnp.float32) for name in changed})
    for name in changed:
        for lora in loras:
            if (name, layer) in lora.factors:
                merged[name] = _added(merged[name], lora.factors[name, layer], lora.weight)
        merged[name] = _rounder(leaves[name].sharding, leaves[name].dtype)(merged[name])
    for name in beside:
        names = name + DOWN, name + UP
        pair = _concatenated(loras, (f"{name}.kernel", layer), *(leaves[one] for one in names))
        merged |= dict(zip(names, pair, strict=True))
    return merged


def _concatenated(
    loras: Sequence[Lora], of: LeafLayer, down: jax.ShapeDtypeStruct, up: jax.ShapeDtypeStruct
) -> tuple[Array, Array]:
    """The factors of a branch with these shapes: those of all LoRAs, with weight and scale in the
    second one, then zeros."""
    downs, ups = np.zeros(down.shape, np.float32), np.zeros(up.shape, np.float32)
    first = 0
    for lora in loras:
        if factors := lora.factors.get(of):
            rows = slice(first, first + len(factors.up))
            downs[:, rows] = factors.down
            ups[rows] = np.float32(lora.weight * factors.scale) * factors.up
            first = rows.stop
    return put(downs.astype(down.dtype), down.sharding), put(ups.astype(up.dtype), up.sharding)


def _added(kernel: Float[Array, "i o"], factors: Factors, weight: float) -> Float[Array, "i o"]:
    """A device gets the rows and columns of its own part of the kernel, and computes that part of
    the sum."""
    assert isinstance(kernel.sharding, NamedSharding)
    mesh, (rows, columns) = kernel.sharding.mesh, (*kernel.sharding.spec, None, None)[:2]
    of_down = NamedSharding(mesh, PartitionSpec(rows, None))
    of_up = NamedSharding(mesh, PartitionSpec(None, columns))
    scale = np.float32(weight * factors.scale)
    for first in range(0, len(factors.up), RANK):
        down = factors.down[:, first : first + RANK].astype(np.float32)
        up = factors.up[first : first + RANK].astype(np.float32)
        missing = RANK - len(up)
        down, up = np.pad(down, ((0, 0), (0, missing))), np.pad(up, ((0, missing), (0, 0)))
        kernel = _adder(kernel.sharding)(kernel, put(down, of_down), put(up, of_up), scale)
    return kernel


@cache
def _adder(sharding: NamedSharding) -> Callable[..., Array]:
    def add(kernel: Array, down: Array, up: Array, scale: Array) -> Array:
        return kernel + scale * jnp.matmul(down, up, precision=lax.Precision.HIGHEST)

    return jax.jit(add, donate_argnums=0, out_shardings=sharding)


@cache
def _rounder(sharding: NamedSharding, dtype: jnp.dtype) -> Callable[[Array], Array]:
    return jax.jit(lambda kernel: kernel.astype(dtype), out_shardings=sharding)
