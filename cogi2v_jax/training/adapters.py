"""LoRA in training: which linear layers of the transformer have one, and its parameters."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

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
    network: Transformer, targets: Sequence[str], *, rank: int, alpha: float, seed: int
) -> None:
    """Adds a LoRA to linear layers: to every layer of the stack where they are stacked. Its float32
    factors begin as PEFT's do, so that the change begins at zero. Raises ValueError for an unknown
    target."""
    layers, names = linear_layers(network), resolve_targets(network, targets)
    for name, key in zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True):
        *stack, inputs, outputs = layers[name].kernel.shape
        bound = inputs**-0.5
        down = jax.random.uniform(key, (*stack, inputs, rank), minval=-bound, maxval=bound)
        layers[name].lora = LowRank(down, jnp.zeros((*stack, rank, outputs)), alpha / rank)
