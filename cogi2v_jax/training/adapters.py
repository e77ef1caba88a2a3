"""LoRA in training: which linear layers of the transformer have one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from ..models.layers import Linear, LowRank
from ..models.transformer import Transformer

# Names that stand for several layers, beside the layers' own.
GROUPS = {
    "attention": ("blocks.attn.q", "blocks.attn.k", "blocks.attn.v", "blocks.attn.out"),
    "mlp": ("blocks.mlp.up", "blocks.mlp.down"),
}


def linear_layers(network: Transformer) -> dict[str, Linear]:
    """The linear layers of the network by their dotted names."""
    modules = nnx.iter_modules(network)
    return {".".join(map(str, path)): layer for path, layer in modules if isinstance(layer, Linear)}


def resolve_targets(network: Transformer, targets: Sequence[str]) -> list[str]:
    """The names of layers for names of layers and groups ("all": every linear layer). Raises
    ValueError for any other name."""
    layers = linear_layers(network)
    groups = GROUPS | {"all": tuple(layers)}
    names = [name for target in targets for name in groups.get(target, (target,))]
    if unknown := [name for name in names if name not in layers]:
        valid = ", ".join((*groups, *layers))
        raise ValueError(f"targets must be among {valid}: got {', '.join(unknown)}")
    return list(dict.fromkeys(names))


def add_lora(
    network: Transformer,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: float,
    sharding: NamedSharding | None = None,
) -> None:
    """Adds a LoRA to linear layers, to every layer of the stack where they are stacked; its float32
    factors are shapes. Raises ValueError for an unknown target."""
    layers = linear_layers(network)
    for name in resolve_targets(network, targets):
        *stack, inputs, outputs = layers[name].kernel.shape
        shapes = (*stack, inputs, rank), (*stack, rank, outputs)
        down, up = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes)
        layers[name].lora = LowRank(down, up, alpha / rank)
