"""Random streams: jax's keys, and torch's own stream. Each video draws from its own seed alone,
whatever batch or mesh it is made in."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# What a seed's streams are folded with.
POSTERIOR, INITIAL, STEPS = range(3)

FILL = 16  # values of torch's that are made together: 8 radii and 8 angles
BLOCK = 2**11 * FILL  # values that are made at once: their float64 temporaries stay in a cache


def seed_words(seeds: Sequence[int]) -> UInt32[np.ndarray, "b 2"]:
    """Seeds of up to 64 bits as threefry keys, made on the host so that a new seed compiles
    nothing."""
    return np.array([divmod(seed, 2**32) for seed in seeds], np.uint32)


def draw(
    words: UInt32[Array, "b 2"],
    stream: int,
    shape: tuple[int, ...],
    index: Int[Array, ""] | int | None = None,
) -> Float[Array, "b *shape"]:
    """Standard normal values of one stream, a row a seed; `index` is the step for the stream that
    has many draws."""

    def one(word: UInt32[Array, "2"]) -> Float[Array, "*shape"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(word, impl="threefry2x32"), stream)
        return jax.random.normal(
            key if index is None else jax.random.fold_in(key, index), shape, jnp.float32
        )

    return jax.vmap(one)(words)


class TorchStream:
    """What `torch.randn` draws on a CPU from `torch.Generator().manual_seed(seed)`, as torch 2.13
    does it: uniform numbers exactly, normal ones rounded where its AVX2 code rounds (a CPU's that
    has AVX-512 too), but for the last bits of its approximate log, cos and sin. The dtype is
    float32 or bfloat16."""

    def __init__(self, seed: int, dtype: Any):
        # Torch's Mersenne twister is seeded by the low half alone.
        self._twister = np.random.RandomState(seed % 2**32)
        self._dtype = np.dtype(dtype)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
        """Standard normal values of the stream's dtype, as float32."""
        size = math.prod(shape)
        values = (
            self._filled(size)
            if size >= FILL
            else np.array([self._single() for _ in range(size)], np.float32)
        )
        return values.astype(self._dtype).astype(np.float32).reshape(shape)

    def skip(self, shape: tuple[int, ...]) -> None:
        """Draws what nobody reads: an eighth of the time."""
        size = math.prod(shape)
        if size < FILL:
            self.normal(shape)
        else:
            self._words(size - size % FILL + sum(self._end(size)))

    def _words(self, *shape: int) -> UInt32[np.ndarray, "*shape"]:
        return self._twister.randint(2**32, size=shape, dtype=np.uint32)

    def _uniform(self, size: int) -> Float[np.ndarray, " {size}"]:
        return (self._words(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _filled(self, size: int) -> Float[np.ndarray, " {size}"]:
        values = np.empty(size, np.float32)
        even = values[: size - size % FILL]
        for block in (even[first : first + BLOCK] for first in range(0, even.size, BLOCK)):
            block[:] = _box_muller(self._uniform(block.size))
        dropped, anew = self._end(size)
        self._words(dropped)
        values[size - anew :] = _box_muller(self._uniform(anew))
        return values

    def _end(self, size: int) -> tuple[int, int]:
        """Where 16 doesn't divide the size the last 16 are drawn anew: (words dropped before,
        values). In float32 every value has had its word by then."""
        ragged = size % FILL
        return (ragged if self._dtype == np.float32 else 0), (FILL if ragged else 0)

    def _single(self) -> float:
        """A value of an array of fewer than 16: in double precision and in pairs, whose second
        waits for the next such array if need be."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        turn, tail = (
            ((high << 32 | low) % 2**53) * 2.0**-53 for high, low in self._words(2, 2).tolist()
        )
        radius, angle = math.sqrt(-2 * math.log1p(-tail)), 2 * math.pi * turn
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Normal values from uniform ones, 16 at a time, rounded to float32 wherever torch's vector
    code has a float32."""
    tail, turn = np.moveaxis(uniform.reshape(-1, 2, FILL // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log(1 - tail, dtype=np.float64).astype(np.float32))
    angle = np.float32(2 * np.pi) * turn
    waves = [wave(angle, dtype=np.float64).astype(np.float32) for wave in (np.cos, np.sin)]
    return np.stack([radius * wave for wave in waves], axis=1).reshape(-1)


def draw_as_torch(
    seeds: Sequence[int], dtype: Any, shape: tuple[int, int, int, int], draws: Int[np.ndarray, " i"]
) -> tuple[
    Float[np.ndarray, "b 1 h w c"],
    Float[np.ndarray, "b t h w c"],
    Float[np.ndarray, "i b t h w c"] | None,
]:
    """Noise of the image's posterior, of the start, and of the steps (None where none draws), of
    latents [t h w c]: in the order in which the reference draws it, as if each video were made
    alone. Of a step's `draws` the last one counts."""
    streams, (frames, height, width, channels) = [TorchStream(seed, dtype) for seed in seeds], shape

    def drawn(frames: int) -> Float[np.ndarray, "b t h w c"]:
        return np.stack(
            [
                np.moveaxis(stream.normal((frames, channels, height, width)), 1, -1)
                for stream in streams
            ]
        )

    posterior, initial = drawn(1), drawn(frames)
    if not draws.any():
        return posterior, initial, None
    steps = np.zeros((len(draws), *initial.shape), np.float32)
    for step, count in enumerate(draws.tolist()):
        for stream in streams * (count - 1):
            stream.skip((frames, channels, height, width))
        if count:
            steps[step] = drawn(frames)
    return posterior, initial, steps
