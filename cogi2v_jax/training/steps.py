"""The programs of training: one step of the transformer, and one of the VAE."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8, UInt32

from ..devices.compiling import Program
from ..devices.sharding import Layout, pin
from ..models.positions import Positions
from ..models.vae import VAE as Autoencoder
from .losses import (
    Clips,
    Dropout,
    Levels,
    add_noise,
    clip_keys,
    condition,
    v_error,
    vae_errors,
)
from .recipe import Recipe
from .state import Leaves, State, Structure, learning_rate, update

# The logarithm of the noise on an image: its mean and deviation, of all public trainers.
IMAGE_NOISE = (-3.0, 0.5)


class Figures(NamedTuple):
    """What a step reports."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]  # of the gradients
    rate: Float[Array, ""]  # of learning
    parts: dict[str, Float[Array, ""]]  # terms of the loss


class Scales(NamedTuple):
    """Factors of the latents of clips, and of images."""

    clip: Float[Any, ""]
    image: Float[Any, ""]


def train_transformer(
    state: State,
    frozen: Leaves,
    vae: Autoencoder,
    clips: Clips,  # [accumulate, batch, ...] each, without keys
    seed: UInt32[Array, " 2"],
    empty_text: Float[Array, "p d"],
    levels: Levels,
    positions: Positions,
    scales: Scales,
    *,
    recipe: Recipe,
    structure: Structure,
    dtype: jnp.dtype,
    layout: Layout,
    frames: int,
) -> tuple[State, Figures]:
    """One step on latents, of which the network takes so many `frames`. The VAE encodes the images,
    each with fresh noise."""
    noise = IMAGE_NOISE if recipe.image_noise else None
    dropout = Dropout(recipe.text_dropout, recipe.image_dropout, noise)

    def loss(leaves: Leaves, clips: Clips) -> tuple[Float[Array, ""], dict[str, Array]]:
        given = clips.image, clips.keys, scales.image, dropout
        image = condition(vae, *given, frames=frames, mesh=layout.mesh)
        timesteps = len(levels.alpha)
        noised = add_noise(clips, image, empty_text, scales.clip, dropout, timesteps=timesteps)
        noised = jax.tree.map(lambda x: pin(x, layout.mesh, "video"), noised)
        network = structure.network(leaves, frozen)
        return v_error(network, noised, levels, positions, dtype=dtype, layout=layout), {}

    return _train(state, clips, seed, loss, recipe)


def train_vae(
    state: State,
    frozen: Leaves,
    pixels: UInt8[Array, "accumulate batch f h w 3"],
    seed: UInt32[Array, " 2"],
    *,
    recipe: Recipe,
    structure: Structure,
    dtype: jnp.dtype,
    mesh: Mesh,
) -> tuple[State, Figures]:
    """One step on frames: L1 + MSE + kl * KL."""

    def loss(leaves: Leaves, clips: Clips) -> tuple[Float[Array, ""], dict[str, Array]]:
        vae = structure.network(leaves, frozen)
        errors = vae_errors(vae, clips.image, clips.keys, dtype=dtype, mesh=mesh)
        return errors.l1 + errors.mse + recipe.kl * errors.kl, errors._asdict()

    return _train(state, Clips(None, None, pixels, None), seed, loss, recipe)


def _train(
    state: State,
    clips: Clips,
    seed: UInt32[Array, " 2"],
    loss: Callable[[Leaves, Clips], tuple[Float[Array, ""], dict[str, Array]]],
    recipe: Recipe,
) -> tuple[State, Figures]:
    """A step of the optimiser by the mean gradient of all batches, computed one after the other."""
    rows = jnp.arange(recipe.clips)
    keys = clip_keys(seed, state.step, rows).reshape(recipe.accumulate, recipe.batch, 2)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def add(total: Any, clips: Clips) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(state.leaves, clips)), None

    batches = clips._replace(keys=keys)
    shapes = jax.eval_shape(gradient, state.leaves, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = lax.scan(add, zeros, batches, unroll=recipe.accumulate == 1)
    (error, parts), grads = jax.tree.map(lambda x: x / recipe.accumulate, total)
    new, norm = update(recipe, state, grads)
    rate = jnp.asarray(learning_rate(recipe)(state.step), jnp.float32)
    return new, Figures(error, norm, rate, parts)


def _placed(state: State, *_: Any, **__: Any) -> tuple[Any, None]:
    """`out_shardings`: the new state as the old one, which it overwrites."""
    return jax.tree.map(lambda leaf: leaf.sharding, state), None


TRANSFORMER = Program(train_transformer, loop=True, out_shardings=_placed, donated=(0,))
VAE = Program(train_vae, out_shardings=_placed, donated=(0,))
