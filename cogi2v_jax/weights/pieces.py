"""What a stage loads, as shapes and shardings: no orbax, no files."""

import functools
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..config import CheckpointConfig
from ..devices.hosts import host_memory
from ..devices.sharding import parameter_shardings
from ..models.layers import LowRank
from ..models.t5 import T5
from ..models.transformer import Transformer
from ..models.vae import VAE
from .lora import Ranks

NETWORKS = {"transformer": Transformer, "vae": VAE, "text_encoder": T5}
# Pieces: a part of the folder, and the prefix of its leaves. The transformer's modulation is
# evaluated before the loop and not loaded for it.
PIECES = {
    "text_encoder": ("text_encoder", ""),
    "vae": ("vae", ""),
    "modulation": ("transformer", "modulation."),
    "transformer": ("transformer", ""),
}
# Of a device's memory: the largest piece that is replicated; the rest is for activations.
REPLICATED = 0.75


@cache  # tracing a VAE takes most of a second
def abstract(config: CheckpointConfig, part: str, dtype: jnp.dtype) -> nnx.Module:
    """A network with shapes for parameters: no memory, at any size. Shared by all callers, to be
    read only."""
    settings = {"int8": True} if part in config.int8 else {}
    return NETWORKS[part](getattr(config, part), dtype=dtype, **settings)


@cache
def piece(config: CheckpointConfig, name: str, dtype: jnp.dtype) -> nnx.Module:
    """One of PIECES with shapes for parameters."""
    part, _ = PIECES[name]
    if part != "transformer":
        return abstract(config, part, dtype)
    network: Any = nnx.clone(abstract(config, part, dtype))
    modulation = network.modulation
    del network.modulation
    return modulation if name == "modulation" else network


@cache
def shard_piece(
    config: CheckpointConfig,
    name: str,
    dtype: jnp.dtype,
    mesh: Mesh,
    memory: int,
    ranks: Ranks = (),
) -> nnx.Module:
    """One of PIECES with shapes and shardings for parameters, on devices of `memory` bytes each. T5
    is always split, so that its weights are never gathered; other pieces are replicated where they
    fit. `ranks` are the layers of the transformer that have a branch for LoRAs."""
    network = piece(config, name, dtype)
    if name == "transformer" and ranks:
        network = _with_branches(network, ranks, dtype)
    shardings = parameter_shardings(
        network, mesh, name != "text_encoder" and can_replicate(network, memory)
    )
    graph, state = nnx.split(network)
    leaves = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)
    return nnx.merge(graph, leaves)


def _with_branches(network: nnx.Module, ranks: Ranks, dtype: jnp.dtype) -> nnx.Module:
    network = nnx.clone(network)
    for name, rank in ranks:
        layer: Any = functools.reduce(getattr, name.split("."), network)
        *stack, inputs, outputs = layer.kernel.shape
        down = jax.ShapeDtypeStruct((*stack, inputs, rank), dtype)
        up = jax.ShapeDtypeStruct((*stack, rank, outputs), dtype)
        layer.lora = LowRank(down, up, 1.0)
    return network


def can_replicate(network: nnx.Module, memory: int) -> bool:
    """Whether devices of `memory` bytes can each hold the whole network and still work."""
    return bytes_per_device(network) <= REPLICATED * memory


def leaf_names(network: nnx.Module) -> dict[str, Any]:
    """Parameters, or their shapes, under dotted names."""
    parameters = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in parameters}


def transformer_leaves(name: str, network: nnx.Module) -> dict[str, Any]:
    """The leaves of a piece under the transformer's names for them; none of another part, which
    takes no LoRAs."""
    part, prefix = PIECES[name]
    leaves = leaf_names(network) if part == "transformer" else {}
    return {prefix + leaf: value for leaf, value in leaves.items()}


def is_stacked(name: str) -> bool:
    """Whether a leaf has a layer axis in front."""
    return "blocks" in name.split(".")


def layer_count(config: CheckpointConfig, part: str) -> int:
    """Layers that are stacked; the VAE has none."""
    return getattr(getattr(config, part), "num_layers", 0)


Shapes = dict[str, tuple[int, ...]]


def unit_shapes(config: CheckpointConfig, part: str) -> tuple[Shapes, Shapes]:
    """Shapes of a part's leaves as its units on disk hold them: (all that is not stacked, one
    layer)."""
    leaves = leaf_names(abstract(config, part, jnp.dtype(jnp.float32)))
    rest = {name: leaf.shape for name, leaf in leaves.items() if not is_stacked(name)}
    return rest, {name: leaf.shape[1:] for name, leaf in leaves.items() if is_stacked(name)}


def shardings(network: nnx.Module) -> list[NamedSharding]:
    """The shardings of a network's parameters, or of their shapes."""
    return [leaf.sharding for leaf in jax.tree.leaves(network)]


def bytes_per_device(network: nnx.Module) -> int:
    """Bytes of a network's parameters, or of their shapes, on one device."""
    return sum(map(bytes_of, jax.tree.leaves(network)))


def bytes_of(leaf: Any) -> int:
    """Bytes of an array, or of its shape, on one device; all where it has no sharding."""
    sharding = leaf.sharding
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def memory_limit(mesh: Any = None) -> int:
    """Bytes of a device of the mesh (None: of the default one); the CPU devices of a host share its
    memory."""
    local: list[Any] = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    stats = local[0].memory_stats() or {}
    return stats.get("bytes_limit") or host_memory() // len(local)
