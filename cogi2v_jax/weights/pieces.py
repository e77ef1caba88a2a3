"""What a phase loads, as shapes and places: no orbax, no files."""

import math
import os
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..config import CheckpointConfig
from ..devices.sharding import parameter_shardings
from ..models.t5 import T5
from ..models.transformer import Transformer
from ..models.vae import VAE

NETWORKS = {"transformer": Transformer, "vae": VAE, "text_encoder": T5}
# What a phase loads: a part of the folder, and which of its leaves. The transformer's modulation is
# needed before its loop, not in it.
PIECES = {
    "text_encoder": ("text_encoder", ""),
    "vae": ("vae", ""),
    "modulation": ("transformer", "modulation."),
    "transformer": ("transformer", ""),
}


# Of a device's memory: the largest piece that every device may hold; the rest is for activations.
WHOLE = 0.75


@cache  # tracing a VAE takes most of a second
def abstract(config: CheckpointConfig, part: str, dtype: jnp.dtype) -> nnx.Module:
    """A network with shapes for parameters: no memory, at any size. Everyone gets the same one, to
    read."""
    settings = {"int8": True} if part in config.int8 else {}
    return nnx.eval_shape(
        lambda: NETWORKS[part](getattr(config, part), dtype=dtype, rngs=nnx.Rngs(0), **settings)
    )


@cache
def piece(config: CheckpointConfig, name: str, dtype: jnp.dtype) -> nnx.Module:
    """One of PIECES with shapes for parameters."""
    part, _ = PIECES[name]
    if part != "transformer":
        return abstract(config, part, dtype)
    network: Any = nnx.clone(abstract(config, part, dtype))
    modulation = network.modulation
    if name == "modulation":
        return modulation
    del network.modulation
    return network


def leaf_names(network: nnx.Module) -> dict[str, Any]:
    """Parameters (or their shapes) under dotted names."""
    return {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))
    }


def is_stacked(name: str) -> bool:
    """Whether a leaf has a layer axis in front."""
    return "blocks" in name.split(".")


def unit_shapes(
    config: CheckpointConfig, part: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of a part's leaves as its units hold them: of all that is not stacked, and of a
    layer's."""
    leaves = {
        name: leaf.shape
        for name, leaf in leaf_names(abstract(config, part, jnp.dtype(jnp.float32))).items()
    }
    rest = {name: shape for name, shape in leaves.items() if not is_stacked(name)}
    return rest, {name: shape[1:] for name, shape in leaves.items() if is_stacked(name)}


def layer_count(config: CheckpointConfig, part: str) -> int:
    """Layers that are stacked; the VAE has none."""
    return getattr(getattr(config, part), "num_layers", 0)


def _full_names(name: str, network: nnx.Module) -> dict[str, Any]:
    """A piece's leaves under the transformer's names for them; no other part takes LoRAs."""
    part, prefix = PIECES[name]
    return (
        {prefix + leaf: value for leaf, value in leaf_names(network).items()}
        if part == "transformer"
        else {}
    )


def places(network: nnx.Module) -> list[NamedSharding]:
    """Where a network's parameters, or their shapes, lie."""
    return [leaf.sharding for leaf in jax.tree.leaves(nnx.state(network, nnx.Param))]


def bytes_per_device(network: nnx.Module) -> int:
    """Of a network's parameters, or of their shapes: of all that have no place yet."""
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param))
    shapes = [
        leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        for leaf in leaves
    ]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for leaf, shape in zip(leaves, shapes, strict=True)
    )


def memory_limit(mesh: Any = None) -> int:
    """Bytes that a device has; CPU devices share their host's."""
    local = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    stats = local[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    ) // len(local)


def fits_whole(network: nnx.Module, memory: int) -> bool:
    """Whether every device of so many bytes may hold all of a network and still work."""
    return bytes_per_device(network) <= WHOLE * memory


@cache
def placed(
    config: CheckpointConfig, name: str, dtype: jnp.dtype, mesh: Mesh, memory: int
) -> nnx.Module:
    """One of PIECES with shapes for parameters, and with their places on devices of so many bytes.
    T5 is split, so that its weights need never meet; all else lies whole on every device where it
    fits."""
    network = piece(config, name, dtype)
    whole = name != "text_encoder" and fits_whole(network, memory)
    graph, state = nnx.split(network)
    return nnx.merge(
        graph,
        jax.tree.map(
            lambda leaf, place: leaf.update(sharding=place),
            state,
            parameter_shardings(network, mesh, whole),
        ),
    )
