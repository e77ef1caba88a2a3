"""Which device does what. A mesh has the axes of `AXES` on every machine, all of size 1 on one
chip, and `RULES` says which of them an axis of an array is split over. Networks name the axes of
their parameters and know no mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# Of growing appetite for the wires: videos never talk to each other, a guidance pair once a step,
# parts of a sequence in every layer.
AXES = ("data", "pair", "context")
RULES: dict[str, str | tuple[str, ...]] = {
    "video": "data",
    "batch": ("pair", "data"),  # the guidance pair's halves, each of all videos
    "sequence": "context",
    "rows": "rows",  # of `spatial`'s view of the same devices
    "columns": "columns",
    # of parameters that are split at all
    "heads": AXES,
    "mlp": AXES,
}


def split(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Where an array lies whose axes have these names; None and unnamed axes are not split. In the
    one spelling that jax itself gives a result's place: nothing of mesh axes of size 1, nothing
    after the last axis that is split."""
    spec: list[Any] = []
    for axis in axes:
        over = RULES.get(axis, ()) if axis else ()
        ways = [
            name for name in ((over,) if isinstance(over, str) else over) if mesh.shape[name] > 1
        ]
        spec.append(tuple(ways) if len(ways) > 1 else ways[0] if ways else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def pin(x: Array, mesh: Mesh, *axes: str | None) -> Array:
    """Holds an array inside a program to its split."""
    return lax.with_sharding_constraint(x, split(mesh, *axes))


def parameter_shardings(network: nnx.Module, mesh: Mesh, whole: bool) -> Any:
    """Where a network's parameters lie, as its state: `whole` on every device, or split as their
    axes' names say."""

    def place(parameter: nnx.Param) -> nnx.Variable:
        named = () if whole else parameter.get_metadata()["axes"]
        # A stack's layers come first.
        stacked = [None] * (parameter.get_value().ndim - len(named)) if named else []
        return parameter.replace(split(mesh, *stacked, *named))

    return jax.tree.map(
        place, nnx.state(network, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)
    )


def put(value: Any, sharding: NamedSharding) -> Array:
    """Host data that every process has, onto a mesh that may reach beyond this process."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def fetch(x: Array) -> np.ndarray:
    """An array's values on every process, wherever they lie."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x)


@dataclass(frozen=True)
class Layout:
    """How one request's transformer is spread: what the network is handed instead of a mesh."""

    mesh: Mesh
    attention: Any  # a backend of attention.py, for one device
    tokens: int  # of the joint sequence, without what evens it out
    whole: bool = True  # whether every device holds all weights
    turns: bool = False  # whether a device takes one video of a batch after another

    @property
    def padded(self) -> int:
        """Tokens of the joint sequence as the layers see it: what the backend is quickest at, and
        as many in every part."""
        return self.attention.rows(self.tokens, self.mesh.shape["context"])

    def exchange(
        self, parts: tuple[Array, Array, Array], norms: Any, positions: Any
    ) -> Float[Array, "b s d"]:
        """Attention by Ulysses (arXiv 2309.14509): a device trades its part of the sequence with
        all heads for the whole sequence with its part of the heads, attends alone, and trades back.
        What is moved is [b s d] as it is, on full lanes."""
        heads = PartitionSpec(RULES["batch"], RULES["sequence"])
        graph, norms = nnx.split(norms)

        def local(parts: tuple[Array, Array, Array], norms: Any, positions: Any) -> Array:
            q, k, v = (
                self._trade(part, "b s (parts d) -> parts b s d", "parts b s d -> b (parts s) d")
                for part in parts
            )
            y = self.attention(q, k, v, nnx.merge(graph, norms), positions, self.tokens)
            return self._trade(y, "b (parts s) d -> parts b s d", "parts b s d -> b s (parts d)")

        specs = (heads, PartitionSpec(), PartitionSpec())
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=specs, out_specs=heads, check_vma=False
        )(parts, norms, positions)

    def _trade(self, x: Float[Array, "b s d"], give: str, take: str) -> Float[Array, "b s2 d2"]:
        """What is traded lies in front, a part for each device: of an exchange along an inner axis
        some TPU compilers make passes over the whole array that cost more than the products beside
        them (libtpu 0.0.42: 5.9 ms instead of 1.1 on eight v5e)."""
        parts = self.mesh.shape["context"]
        if parts == 1:
            return x
        return rearrange(
            lax.all_to_all(rearrange(x, give, parts=parts), "context", 0, 0, tiled=True), take
        )

    def in_turn(self, predict: Callable[..., Array], *batch: Array) -> Array:
        """Predictions of a batch: all at once, or on each device one after another. A long sequence
        fills a device alone, so that turns cost no time there, and need less memory."""
        ways = math.prod(self.mesh.shape[axis] for axis in RULES["batch"])
        if not self.turns or len(batch[0]) == ways:
            return predict(*batch)
        turns = [jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0) for x in batch]
        y = lax.map(lambda parts: predict(*parts), turns)
        return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])

    def gather(self, layer: Any) -> Any:
        """A layer's weights, brought to every device for as long as it needs them."""
        return layer if self.whole else jax.tree.map(lambda leaf: pin(leaf, self.mesh), layer)

    def split(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Each part of the sequence where it is computed."""
        return pin(x, self.mesh, "batch", "sequence")

    def join(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The whole sequence on every device of its group."""
        return pin(x, self.mesh, "batch")
