"""Chunked evaluation of the VAE over time, as in the reference. Every causal convolution caches the
last two frames of its input for the next chunk. Chunk sizes are part of the numerics, not tuning,
because group norms take their statistics over one chunk."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from .vae_strips import in_strips

ENCODE_CHUNK = 8  # pixel frames
DECODE_CHUNK = 2  # latent frames

Cached = Any  # a pytree of [b 2 h w c], the last two input frames of causal convolutions


class ConvCache:
    """The convolution cache of one chunk. Each causal convolution, in call order, pops the frames
    that the previous chunk left for it, and appends those for the next chunk to `new`. Without a
    previous chunk, the video's first frame is repeated.

    If the number of frames is odd, the first chunk has one frame more than the others. The others
    then start with a padding frame, which no statistics count and no convolution reads, so that
    all chunks have one shape and compile once. `is_first` says whether this is the first chunk."""

    def __init__(
        self, cached: Sequence[Cached] | None = None, is_first: Bool[Array, ""] | bool = True
    ):
        self._cached = None if cached is None else iter(cached)
        self.is_first = is_first
        self.new: list[Cached] = []

    def pop(self) -> Cached:
        return None if self._cached is None else next(self._cached)

    def in_strips(
        self, layer: Callable[..., Sequence[Any]], strips: int, *tensors: Array
    ) -> list[Array]:
        """Runs a layer with a convolution, as `in_strips`. The first tensor that it is given, and
        the first result, are the convolution's cached frames."""
        cached, *results = in_strips(layer, strips, self.pop(), *tensors)
        self.new.append(cached)
        return results

    def prepend(self, x: Float[Array, "b f h w c"], cached: Cached) -> Float[Array, "b f+2 h w c"]:
        """x after the two frames before it."""
        repeated = jnp.repeat(x[:, :1], 2, axis=1)
        if cached is None:
            return jnp.concatenate([repeated, x], axis=1)
        padding = x.shape[1] % 2  # it moves in front of the cached frames, out of reach
        start = jnp.where(
            self.is_first,
            jnp.concatenate([repeated, x[:, :padding]], axis=1),
            jnp.concatenate([x[:, :padding], cached], axis=1),
        )
        return jnp.concatenate([start, x[:, padding:]], axis=1)

    def frame_weights(self, frames: int) -> Float[Array, " f"]:
        """The weight of each frame in a mean over frames: zero for a padding frame."""
        weights = jnp.ones(frames)
        weights = weights.at[0].set(jnp.where(self.is_first, 1.0, 0.0) if frames % 2 else 1.0)
        return weights / weights.sum()


def in_chunks(
    network: Callable, x: Float[Array, "b f h w c"], chunk: int, strips: Callable[[int], int]
) -> Float[Array, "b f2 h2 w2 c2"]:
    """Runs network(frames, cache, strips) over the chunks of x as one scan that carries the cache.
    The remainder joins the first chunk. Raises ValueError if there are several chunks and the
    remainder is more than one frame."""
    remainder = x.shape[1] % chunk
    if x.shape[1] <= chunk + remainder:
        return network(x, ConvCache(), strips)
    if remainder > 1:
        raise ValueError(
            f"frames of a video in several chunks must be {chunk}k or {chunk}k+1: got {x.shape[1]}"
        )
    # With a remainder, every later chunk starts with the frame before it, as its padding frame.
    starts = range(0, x.shape[1] - remainder, chunk)
    parts = jnp.stack([x[:, start : start + chunk + remainder] for start in starts])
    graph, params = nnx.split(network)

    def run(cached: list[Cached] | None, part: Array, is_first: Any) -> tuple[list[Cached], Array]:
        cache = ConvCache(cached, is_first)
        y = nnx.merge(graph, params)(part, cache, strips)
        return cache.new, y

    def write(carry: tuple[list[Cached], Array], given: tuple[Array, Array]) -> tuple[Any, None]:
        (cached, video), (part, index) = carry, given
        cached, y = run(cached, part, index == 0)
        first = lax.dynamic_slice_in_dim(video, index * new, remainder, axis=1)
        first = jnp.where(index == 0, y[:, :remainder], first)  # a padding frame overwrites nothing
        y = jnp.concatenate([first, y[:, remainder:]], axis=1)
        return (cached, lax.dynamic_update_slice_in_dim(video, y, index * new, axis=1)), None

    cached, y = jax.eval_shape(lambda part: run(None, part, True), parts[0])
    cached = jax.tree.map(lambda frames: jnp.zeros(frames.shape, frames.dtype), cached)
    new = y.shape[1] - remainder  # frames of a chunk
    video = jnp.zeros((len(y), remainder + len(starts) * new, *y.shape[2:]), y.dtype)
    return lax.scan(write, (cached, video), (parts, jnp.arange(len(starts))))[0][1]
