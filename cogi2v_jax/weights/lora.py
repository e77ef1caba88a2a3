"""LoRA: low-rank changes of a transformer's weights, added to them while they are restored. The
network and its programs stay what they are: another LoRA compiles nothing, costs no step anything,
and lies on every mesh as the weights do. Hu et al., arXiv:2106.09685."""

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

# Of one addition: a file's rank is added in slices of it, so that all files share one program a
# shape.
RANK = 64

Place = tuple[str, int | None]  # a leaf, and its layer where it is stacked


class Factors(NamedTuple):
    """One weight's change: kernel += weight * scale * down @ up."""

    down: Float[np.ndarray, "inputs r"]
    up: Float[np.ndarray, "r outputs"]
    scale: float  # alpha / rank


@dataclass(frozen=True, eq=False)
class Lora:
    """One file's changes, in our names and layouts."""

    name: str
    sha256: str  # of the file
    weight: float
    factors: Mapping[Place, Factors] = field(repr=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal where the same is added: a file's scales may also stand in another file."""
        return (
            self.sha256,
            self.weight,
            tuple((place, factors.scale) for place, factors in self.factors.items()),
        )


def changing(loras: Iterable[Lora], leaves: Iterable[str]) -> list[Lora]:
    """Those of them that change any of these leaves."""
    leaves = set(leaves)
    return [lora for lora in loras if any(leaf in leaves for leaf, _ in lora.factors)]


def check_leaves(loras: Iterable[Lora], leaves: Mapping[str, Any]) -> None:
    """Raises ValueError for leaves, arrays or shapes under full names, that nothing can be added
    to: numbers of a quantised weight."""
    for lora in loras:
        changed = {leaf: leaves[leaf].dtype for leaf, _ in lora.factors if leaf in leaves}
        faults = [
            f"{leaf} of {dtype}"
            for leaf, dtype in changed.items()
            if not jnp.issubdtype(dtype, jnp.floating)
        ]
        if faults:
            raise ValueError(
                f"lora {lora.name} must meet floating-point weights: got {faults[0]}; load the model without quantisation"
            )


Leaves = Mapping[str, jax.ShapeDtypeStruct]


def read_merged(
    loras: Sequence[Lora],
    layer: int | None,
    leaves: Leaves,
    read: Callable[[Leaves], dict[str, Array]],
) -> dict[str, Array]:
    """A layer's leaves (None: those that are not stacked) as `read` gives them, with all LoRAs
    added in order. What changes is read and added up in float32, and rounded once."""
    changed = {name for name in leaves for lora in loras if (name, layer) in lora.factors}
    if not changed:
        return read(leaves)
    merged = read(
        {
            name: leaf.update(dtype=jnp.float32) if name in changed else leaf
            for name, leaf in leaves.items()
        }
    )
    for name in changed:
        for lora in loras:
            if (name, layer) in lora.factors:
                merged[name] = _added(merged[name], lora.factors[name, layer], lora.weight)
        merged[name] = _rounder(leaves[name].sharding, leaves[name].dtype)(merged[name])
    return merged


def _added(kernel: Float[Array, "i o"], factors: Factors, weight: float) -> Float[Array, "i o"]:
    """A device is handed the rows and columns of its own part of the kernel, and makes no more of
    the sum than that."""
    assert isinstance(kernel.sharding, NamedSharding)
    mesh, (rows, columns) = kernel.sharding.mesh, (*kernel.sharding.spec, None, None)[:2]
    places = (
        NamedSharding(mesh, PartitionSpec(rows, None)),
        NamedSharding(mesh, PartitionSpec(None, columns)),
    )
    scale = np.float32(weight * factors.scale)
    for first in range(0, len(factors.up), RANK):
        down, up = (
            factors.down[:, first : first + RANK].astype(np.float32),
            factors.up[first : first + RANK].astype(np.float32),
        )
        missing = RANK - len(up)
        slices = np.pad(down, ((0, 0), (0, missing))), np.pad(up, ((0, missing), (0, 0)))
        kernel = _adder(kernel.sharding)(kernel, *map(put, slices, places), scale)
    return kernel


@cache
def _adder(place: NamedSharding) -> Callable[..., Array]:
    def add(kernel: Array, down: Array, up: Array, scale: Array) -> Array:
        return kernel + scale * jnp.matmul(down, up, precision=lax.Precision.HIGHEST)

    return jax.jit(add, donate_argnums=0, out_shardings=place)


@cache
def _rounder(place: NamedSharding, dtype: jnp.dtype) -> Callable[[Array], Array]:
    return jax.jit(lambda kernel: kernel.astype(dtype), out_shardings=place)
