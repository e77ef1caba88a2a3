"""Logical and physical axes. Arrays name their axes where they are made (`split(mesh, "video")`,
`param(..., axes=("embed", "heads"))`), a mesh names those of the devices, and RULES maps the first
to the second, for every machine. Networks name the axes of their parameters and know no mesh."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

# From least to most communication: videos exchange nothing, a guidance pair once a step, parts of a
# sequence in every layer.
AXES = ("data", "pair", "context")
# Mesh axes over which a logical axis is split; an axis that is not listed here is an error.
RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "video": ("data",),
    "batch": ("pair", "data"),  # the guidance pair's halves, each of all videos
    "sequence": ("context",),
    "rows": ("rows",),  # of the mesh that `mesh.spatial` makes
    "columns": ("columns",),
    # of parameters that are split where they do not fit on every device
    "heads": AXES,
    "mlp": AXES,
    "modulation": AXES,
    # of parameters that are never split
    "embed": (),
    "inputs": (),
    "channels": (),
    "vocabulary": (),
}


def split(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes; None and further axes are not split.
    Spelled as jax spells the sharding of results: without mesh axes of size 1 and trailing Nones.
    Raises ValueError for an axis without a rule."""
    spec: list[Any] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"axis must be one of {', '.join(RULES)}: got {axis!r}")
        ways = [name for name in (RULES[axis] if axis else ()) if mesh.shape[name] > 1]
        spec.append(tuple(ways) if len(ways) > 1 else ways[0] if ways else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def pin(x: Array, mesh: Mesh, *axes: str | None) -> Array:
    """Constrains an array inside a program to the sharding of its logical axes."""
    return lax.with_sharding_constraint(x, split(mesh, *axes))


def parameter_shardings(network: nnx.Module, mesh: Mesh, replicated: bool) -> Any:
    """The shardings of a network's parameters, as a state: `replicated` on every device, or split
    by the rules of their axes."""

    def sharding(parameter: nnx.Param) -> nnx.Variable:
        axes = () if replicated else parameter.get_metadata()["axes"]
        layers = [None] * (parameter.get_value().ndim - len(axes)) if axes else []  # of a stack
        return parameter.replace(split(mesh, *layers, *axes))

    parameters = nnx.state(network, nnx.Param)
    return jax.tree.map(sharding, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def put(value: Any, sharding: NamedSharding) -> Array:
    """Host data that every process holds, on a mesh that may span several processes."""
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(x: Array) -> np.ndarray:
    """An array's values on every process, however it is sharded."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)


@dataclass(frozen=True)
class Layout:
    """How the transformer of one request is spread over devices: what the network is handed instead
    of a mesh."""

    mesh: Mesh
    backend: Any  # of models/attention.py, for one device
    tokens: int  # of the joint sequence, without padding
    replicated: bool = True  # whether every device holds all weights
    sequential: bool = False  # whether a device computes one video of a batch after another
    # In training: the policy of `jax.checkpoint` for what a layer keeps for its backward pass.
    kept: Callable[..., Any] | None = None

    @property
    def padded(self) -> int:
        """Tokens of the joint sequence with padding: the length that the backend is fastest at,
        divisible by the parts of the sequence."""
        return self.backend.padded(self.tokens, self.mesh.shape["context"])

    def one_by_one(self, predict: Callable[..., Array]) -> Callable[..., Array]:
        """`predict` of arrays with a batch axis, computed by each device for one video after
        another where the layout is sequential: a long sequence fills a device alone, so that this
        costs no time and saves memory."""
        ways = math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

        def in_sequence(*batch: Array) -> Array:
            if len(batch[0]) == ways:
                return predict(*batch)
            # [groups ways ...]: every device computes one video of each group.
            groups = [jnp.moveaxis(x.reshape(ways, -1, *x.shape[1:]), 1, 0) for x in batch]
            y = lax.map(lambda group: predict(*group), groups)
            return jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])

        return in_sequence if self.sequential else predict

    def pad(self, x: Float[Array, "b s d"]) -> Float[Array, "b s2 d"]:
        """The joint sequence with padding, split into parts. Pad before sharding: 226 text tokens
        divide by almost no mesh size, and concatenating shards would cost an all-to-all."""
        x = jnp.pad(pin(x, self.mesh, "batch"), ((0, 0), (0, self.padded - self.tokens), (0, 0)))
        return self.shard(x)

    def shard(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """A padded sequence split into parts."""
        return pin(x, self.mesh, "batch", "sequence")

    def unpad(self, x: Float[Array, "b s d"]) -> Float[Array, "b s2 d"]:
        """The whole joint sequence without padding, on every device of its group. For the output
        alone, where a token is narrow: cutting a sharded sequence moves it."""
        return pin(x, self.mesh, "batch")[:, : self.tokens]

    def rematerialise(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """A layer whose backward pass computes anew what the policy does not keep."""
        if self.kept is None:
            return layer
        return jax.checkpoint(layer, policy=self.kept, prevent_cse=False)

    def gather(self, layer: Any) -> Any:
        """A layer's weights on every device, for as long as the layer needs them."""
        return layer if self.replicated else jax.tree.map(lambda x: pin(x, self.mesh), layer)

    @cached_property
    def attend(self) -> Callable[..., Float[Array, "b s d"]]:
        """`attend(q, k, v, norms, positions)` of a padded, sharded sequence: Ulysses (arXiv
        2309.14509). A device exchanges its part of the sequence with all heads for the whole
        sequence with its part of the heads, attends alone, and exchanges back. All exchanges are of
        [b s d] arrays, whose lanes are full."""
        parts = PartitionSpec(RULES["batch"], *RULES["sequence"])
        specs = (parts, parts, parts, PartitionSpec(), PartitionSpec())
        return jax.shard_map(
            self._attend, mesh=self.mesh, in_specs=specs, out_specs=parts, check_vma=False
        )

    def _attend(
        self, q: Array, k: Array, v: Array, norms: Any, positions: Any
    ) -> Float[Array, "b s d"]:
        """One device's share of `attend`."""
        to_heads = "b s (parts d) -> parts b s d", "parts b s d -> b (parts s) d"
        to_sequence = "b (parts s) d -> parts b s d", "parts b s d -> b s (parts d)"
        q, k, v = (self._exchange(x, *to_heads) for x in (q, k, v))
        return self._exchange(self.backend(q, k, v, norms, positions, self.tokens), *to_sequence)

    def _exchange(self, x: Float[Array, "b s d"], give: str, take: str) -> Float[Array, "b s2 d2"]:
        """An all-to-all in the sequence's group. The exchanged axis is moved to the front: with an
        inner axis some TPU compilers pass over the whole array at a higher cost than the products
        beside it (libtpu 0.0.42: 5.9 ms instead of 1.1 on eight v5e)."""
        parts = self.mesh.shape["context"]
        if parts == 1:
            return x
        x = rearrange(x, give, parts=parts)
        return rearrange(lax.all_to_all(x, "context", 0, 0, tiled=True), take)
