"""Random streams. Each video draws from its own seed alone, whatever batch or mesh it is made in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# What a seed's streams are folded with.
POSTERIOR, INITIAL, STEPS = range(3)


def seed_words(seeds: Sequence[int]) -> UInt32[np.ndarray, "b 2"]:
    """Seeds of up to 64 bits as threefry keys, made on the host so that a new seed compiles nothing."""
    return np.array([divmod(seed, 2**32) for seed in seeds], np.uint32)


def draw(
    words: UInt32[Array, "b 2"], stream: int, shape: tuple[int, ...], index: Int[Array, ""] | int | None = None
) -> Float[Array, "b *shape"]:
    """Standard normal values of one stream, a row a seed; `index` is the step for the stream that has many draws."""

    def one(word: UInt32[Array, "2"]) -> Float[Array, "*shape"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(word, impl="threefry2x32"), stream)
        return jax.random.normal(key if index is None else jax.random.fold_in(key, index), shape, jnp.float32)

    return jax.vmap(one)(words)
