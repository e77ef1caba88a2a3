"""What a training run carries from step to step, and the network in two parts: the leaves that are
trained, in float32, and those that are frozen."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from optax import contrib

from ..devices.sharding import put, split
from .recipe import Recipe

Leaves = dict[str, Any]  # arrays, or their shapes, by dotted names
WARM = 10  # the average follows the leaves closely for some multiples of so many steps


class State(NamedTuple):
    """A checkpoint holds it whole: a run goes on from it to the bit."""

    step: Int[Array, ""]  # steps done
    leaves: Leaves  # trained, float32
    average: Leaves  # their exponential moving average; empty without one
    optimizer: Any

    @property
    def result(self) -> Leaves:
        """The leaves that are written when training ends."""
        return self.average or self.leaves


@dataclass(frozen=True)
class Structure:
    """A network without its leaves. Hashable: a static argument of programs."""

    graph: Any
    paths: tuple[tuple[Any, ...], ...]

    def network(self, *parts: Leaves) -> Any:
        """The network with the leaves of all parts."""
        leaves = {name: leaf for part in parts for name, leaf in part.items()}
        named = [(path, nnx.Param(leaves[_name(path)])) for path in self.paths]
        return nnx.merge(self.graph, nnx.from_flat_state(named))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def take_apart(
    network: nnx.Module, is_trained: Callable[[str], bool]
) -> tuple[Structure, Leaves, Leaves]:
    """(the structure, the shapes of trained leaves in float32, those of frozen ones), of a network
    of shapes."""
    graph, state = nnx.split(network)
    flat = [(path, leaf.get_value()) for path, leaf in nnx.to_flat_state(state)]
    trained, frozen = {}, {}
    for path, leaf in flat:
        if is_trained(name := _name(path)):
            trained[name] = leaf.update(dtype=jnp.float32)
        else:
            frozen[name] = leaf
    return Structure(graph, tuple(path for path, _ in flat)), trained, frozen


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then constant, or falling to `final_rate` of its
    height along a line or a cosine."""
    peak, rest = recipe.learning_rate, max(recipe.steps - recipe.warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * recipe.final_rate, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, recipe.final_rate),
    }[recipe.schedule]
    # From the first step on: a step at a learning rate of zero would train nothing.
    rise = optax.linear_schedule(peak / (recipe.warmup + 1), peak, recipe.warmup or 1)
    return optax.join_schedules([rise, after], [recipe.warmup]) if recipe.warmup else after


@cache
def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Optax's optimiser with the settings of a recipe."""
    rate, decay = learning_rate(recipe), recipe.weight_decay
    matrices: Any = _matrices
    betas = recipe.beta1, recipe.beta2
    chosen = {
        "adamw": lambda: optax.adamw(rate, *betas, weight_decay=decay),
        "prodigy": lambda: contrib.prodigy(rate, betas, weight_decay=decay),
        "muon": lambda: contrib.muon(
            rate,
            weight_decay=decay,
            adam_b1=recipe.beta1,
            adam_b2=recipe.beta2,
            muon_weight_dimension_numbers=matrices,
        ),
    }[recipe.optimizer]()
    clip = optax.clip_by_global_norm(recipe.clip) if recipe.clip else optax.identity()
    return optax.chain(clip, chosen)


def _matrices(leaves: dict[str, Any]) -> dict[str, Any]:
    """Which axes Muon takes as a matrix's: the last two of kernels and LoRA factors, in each layer
    of a stack; of a convolution's kernel the last one and all others. Other leaves (masked nodes,
    where optax asks again) are trained by Adam."""

    def axes(name: str, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        dimensions = getattr(leaf, "ndim", 0)
        if name.split(".")[-1] not in ("kernel", "down", "up") or dimensions < 2:
            return None
        inputs = -2 if dimensions < 4 else tuple(range(dimensions - 1))
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=-1)

    return {name: axes(name, leaf) for name, leaf in leaves.items()}


def begin(recipe: Recipe, leaves: Leaves, mesh: Mesh) -> State:
    """The state before the first step, on the mesh."""
    everywhere = split(mesh)

    def place(leaf: Any) -> Array:
        sharding = getattr(leaf, "sharding", None)
        placed = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return leaf if placed else put(leaf, everywhere)

    average = jax.tree.map(jnp.copy, leaves) if recipe.ema else {}
    step: Any = np.int32(0)
    state = State(step, leaves, average, optimizer(recipe).init(leaves))
    return jax.tree.map(place, state)


def update(recipe: Recipe, state: State, grads: Leaves) -> tuple[State, Float[Array, ""]]:
    """One step of the optimiser, and the norm of the gradients before it is clipped."""
    updates, new = optimizer(recipe).update(grads, state.optimizer, state.leaves)
    leaves: Any = optax.apply_updates(state.leaves, updates)
    average = state.average
    if recipe.ema:
        decay = jnp.minimum(recipe.ema, (1 + state.step) / (WARM + state.step))
        average = jax.tree.map(lambda old, leaf: old + (1 - decay) * (leaf - old), average, leaves)
    return State(state.step + 1, leaves, average, new), optax.tree.norm(grads)
