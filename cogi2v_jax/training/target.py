"""What the program of a step is compiled for: the shapes and shardings of all that it takes, on
devices that need not be there."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..config import CheckpointConfig
from ..devices.compiling import Program
from ..devices.mesh import choose_sizes, make_mesh, sizes_of, work_of
from ..devices.sharding import split
from ..models.attention import ATTENTION
from ..models.transformer import LAYER
from ..request import Resolved
from ..sampling.programs import RequestTarget
from ..weights.pieces import bytes_of, can_replicate, piece, shard_piece
from .adapters import add_lora
from .losses import Clips, Levels, levels
from .recipe import AUTO, Recipe
from .state import Leaves, State, Structure, optimizer, take_apart
from .steps import TRANSFORMER, VAE, Scales

COPIES = 6  # of trained weights in memory: two of the optimiser, gradients, an average, one in work
NETWORKS = {"transformer": ("transformer", "modulation"), "vae": ("vae",)}  # pieces of a part
# What `kept = "auto"` chooses from, the fastest first, with the arrays as wide as the network that
# each keeps of a token in every layer.
CHOICES = {"attention": 2, "layers": 1, "host": 0}
# What a step takes of a device beside its arguments, gradients and what is kept, above the largest
# of configs/plans.toml: such arrays of a token, while one layer is computed, and bytes.
WORKED, FIXED = 40, 2**29


@cache  # one function for each name: programs are compiled for it
def policy(name: str) -> Any:
    """What `jax.checkpoint` keeps of a layer for its backward pass; None: everything."""
    policies = jax.checkpoint_policies
    if name == "host":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER, ATTENTION],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return {
        "all": None,
        "attention": policies.save_only_these_names(ATTENTION),
        "layers": policies.nothing_saveable,
    }[name]


def room(recipe: Recipe, memory: int) -> int:
    """Of a device's memory, what one copy of the network may take."""
    return memory if recipe.method == "lora" else memory // COPIES


def weights_dtype(recipe: Recipe, dtype: jnp.dtype) -> jnp.dtype:
    """Of the network, computed in `dtype`: that of frozen weights beside a LoRA, float32 where they
    are trained."""
    return dtype if recipe.method == "lora" else jnp.dtype(jnp.float32)


def mesh_for(
    recipe: Recipe, config: CheckpointConfig, dtype: jnp.dtype, devices: Sequence[Any], memory: int
) -> Mesh:
    """The mesh that a recipe names, or ("auto") the best one, of devices with `memory` bytes each.
    Training has no guidance pairs: devices that are for them share the sequence. Raises ValueError
    as `choose_sizes` does."""
    asked = recipe.mesh
    if asked != "auto":
        sizes = sizes_of(asked)
        asked = str(sizes._replace(pair=1, context=sizes.pair * sizes.context))
    network = piece(config, recipe.part, weights_dtype(recipe, dtype))
    is_split = not can_replicate(network, room(recipe, memory))
    work = work_of(config, {recipe.part: network} if is_split else {}, recipe.batch, guided=False)
    return make_mesh(choose_sizes(asked, work, devices), devices)


@dataclass(frozen=True)
class StepTarget:
    """What the steps of a recipe are compiled for: a checkpoint, computed in `dtype`, on a mesh
    whose devices have `memory` bytes each."""

    recipe: Recipe
    config: CheckpointConfig
    dtype: jnp.dtype
    mesh: Mesh
    memory: int

    def piece(self, name: str) -> nnx.Module:
        """The shapes and shardings of a piece of the part that is trained."""
        dtype = weights_dtype(self.recipe, self.dtype)
        return shard_piece(self.config, name, dtype, self.mesh, room(self.recipe, self.memory))

    @cached_property
    def vae(self) -> nnx.Module:
        """The VAE that encodes the images."""
        return shard_piece(self.config, "vae", self.dtype, self.mesh, self.memory)

    @cached_property
    def _parts(self) -> tuple[Structure, Leaves, Leaves]:
        recipe = self.recipe
        network: Any
        network, *others = (nnx.clone(self.piece(name)) for name in NETWORKS[recipe.part])
        for modulation in others:
            network.modulation = modulation
        if recipe.method == "lora":
            ranks: Any = {"rank": recipe.rank, "alpha": recipe.alpha}
            add_lora(network, recipe.targets, sharding=split(self.mesh), **ranks)
        return take_apart(network, recipe.trains)

    @property
    def structure(self) -> Structure:
        return self._parts[0]

    @property
    def trained(self) -> Leaves:
        """The shapes of the leaves that are trained."""
        return self._parts[1]

    @property
    def frozen(self) -> Leaves:
        """The shapes of the other ones."""
        return self._parts[2]

    @cached_property
    def state(self) -> State:
        """The shapes of what a step hands to the next. Where the optimiser holds an array like a
        leaf's, it lies where the leaf lies."""
        leaves, everywhere = self.trained, split(self.mesh)

        def placed(path: tuple[Any, ...], leaf: Any) -> Any:
            names = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            like = (leaves[name] for name in names if name in leaves)
            places = (other.sharding for other in like if other.shape == leaf.shape)
            return leaf.update(sharding=next(places, everywhere))

        kept = jax.eval_shape(optimizer(self.recipe).init, leaves)
        step: Any = self._shaped((), jnp.int32)
        return State(
            step,
            leaves,
            leaves if self.recipe.ema else {},
            jax.tree_util.tree_map_with_path(placed, kept),
        )

    @property
    def bytes_of_state(self) -> int:
        """Of a checkpoint, without its step."""
        held = self.state.leaves, self.state.average, self.state.optimizer
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))

    def sampling(self, request: Resolved, attention: str) -> RequestTarget:
        """What sampling clips like a request's would be compiled for."""
        memory = room(self.recipe, self.memory)
        return RequestTarget(self.config, self.dtype, self.mesh, memory, request, attention)

    def program(self, sampling: RequestTarget | None) -> tuple[Program, dict[str, Any]]:
        """The program of a step with its static arguments. `sampling` is of the clips; None trains
        the VAE."""
        recipe = self.recipe
        static = {"recipe": recipe, "structure": self.structure, "dtype": self.dtype}
        if sampling is None:
            return VAE, static | {"mesh": self.mesh}
        kept = policy(self.kept(sampling))
        layout = dataclasses.replace(sampling.layout, sequential=False, kept=kept)
        return TRANSFORMER, static | {"layout": layout, "frames": sampling.shape.frames}

    def kept(self, sampling: RequestTarget) -> str:
        """What a layer keeps for its backward pass, of clips like a request's: what the recipe
        says, or ("auto") the fastest choice that fits. On a CPU that is to compute layers again."""
        if self.recipe.kept != AUTO:
            return self.recipe.kept
        if self.mesh.devices.flat[0].platform == "cpu":
            return "layers"
        clips = self.recipe.batch // self.mesh.shape["data"]
        tokens = clips * sampling.layout.padded // self.mesh.shape["context"]
        network = self.config.transformer
        held = [*jax.tree.leaves((self.state, self.frozen, nnx.state(self.vae)))]
        held += self.trained.values()  # their gradients
        free = self.memory - FIXED - sum(map(bytes_of, held))
        arrays = free // (tokens * network.width * self.dtype.itemsize) - WORKED
        fit = (name for name, each in CHOICES.items() if each * network.num_layers <= arrays)
        return next(fit, "host")

    def scales(self, sampling: RequestTarget) -> Scales:
        return Scales(np.float32(self.config.vae.scaling_factor), sampling.image_scale)

    def levels(self) -> Levels:
        return levels(self.config)

    def arguments(self, sampling: RequestTarget) -> tuple[Any, ...]:
        """Shapes for the arguments of a step of the transformer, on clips that were prepared in the
        dtype of the target."""
        shape, size, text = sampling.shape, sampling.request, self.config.transformer
        clips = Clips(
            self._rows((shape.frames - shape.padding, *shape[1:3], 2 * shape.channels), self.dtype),
            self._rows((text.max_text_seq_length, text.text_embed_dim), self.dtype),
            self._rows((size.height, size.width, self.config.vae.in_channels), jnp.uint8),
            None,
        )
        empty = self._shaped((text.max_text_seq_length, text.text_embed_dim), self.dtype)
        of_levels = jax.tree.map(lambda x: self._shaped(x.shape, x.dtype), self.levels())
        seed = self._shaped((2,), jnp.uint32)
        where = sampling.position_shapes()
        given = seed, empty, of_levels, where, self.scales(sampling)
        return (self.state, self.frozen, self.vae, clips, *given)

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Values of all clips of a step."""
        rows = self.recipe.accumulate, self.recipe.batch
        sharding = split(self.mesh, None, "video")
        return jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=sharding)

    def _shaped(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split(self.mesh))
