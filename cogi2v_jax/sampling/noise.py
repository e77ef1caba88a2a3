"""Noise from seeds, by jax's generator or as torch draws it. Each video draws from its own seed
alone, whatever batch or mesh it is made in."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

# Folded into the key of a seed, one number for each use.
POSTERIOR, INITIAL, STEPS, KEYFRAMES, PIXELS, CLIP = range(6)

FILL = 16  # torch makes values in groups: 8 radii and 8 angles
BLOCK = 2**11 * FILL  # values made at once, whose float64 temporaries fit a cache

Latents = Float[np.ndarray, "b t h w c"]


def seed_keys(seeds: Sequence[int]) -> UInt32[np.ndarray, "b 2"]:
    """Threefry keys of seeds of up to 64 bits, made on the host so that a new seed compiles
    nothing."""
    return np.array([divmod(seed, 2**32) for seed in seeds], np.uint32)


def draw(
    keys: UInt32[Array, "b 2"],
    stream: int,
    shape: tuple[int, ...],
    index: Int[Array, ""] | int | None = None,
) -> Float[Array, "b *shape"]:  # noqa: F821
    """Standard normal values for each key. `stream` is their use; STEPS has a draw for each step
    `index`, KEYFRAMES for each latent frame."""

    def one(data: UInt32[Array, "2"]) -> Float[Array, "*shape"]:
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), stream)
        key = key if index is None else jax.random.fold_in(key, index)
        # The same bits, flat: for more axes than one, compiling takes ten times as long on a CPU.
        return jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)

    return jax.vmap(one)(keys)


class TorchStream:
    """The values of `torch.randn` on a CPU after `torch.Generator().manual_seed(seed)`, as torch
    2.13 computes them. Uniform numbers are equal; normal ones are rounded where torch's AVX2 code
    rounds (which a CPU with AVX-512 runs too), and differ in the last bits of its approximate log,
    cos and sin. The dtype is float32 or bfloat16."""

    def __init__(self, seed: int, dtype: Any):
        # Torch seeds its Mersenne twister with the low half of the seed.
        self._twister = np.random.RandomState(seed % 2**32)
        self._dtype = np.dtype(dtype)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
        """Standard normal values of the stream's dtype, as float32."""
        size = math.prod(shape)
        if size >= FILL:
            values = self._vectorised(size)
        else:
            values = np.array([self._scalar() for _ in range(size)], np.float32)
        return values.astype(self._dtype).astype(np.float32).reshape(shape)

    def skip(self, shape: tuple[int, ...]) -> None:
        """Advances the stream as `normal` does, in an eighth of the time."""
        size = math.prod(shape)
        if size < FILL:
            self.normal(shape)
        else:
            self._integers(size - size % FILL + sum(self._last_group(size)))

    def _integers(self, *shape: int) -> UInt32[np.ndarray, "*shape"]:
        return self._twister.randint(2**32, size=shape, dtype=np.uint32)

    def _uniform(self, size: int) -> Float[np.ndarray, " {size}"]:
        return (self._integers(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _vectorised(self, size: int) -> Float[np.ndarray, " {size}"]:
        values = np.empty(size, np.float32)
        groups = values[: size - size % FILL]
        for block in (groups[first : first + BLOCK] for first in range(0, groups.size, BLOCK)):
            block[:] = _box_muller(self._uniform(block.size))
        dropped, last = self._last_group(size)
        self._integers(dropped)
        values[size - last :] = _box_muller(self._uniform(last))
        return values

    def _last_group(self, size: int) -> tuple[int, int]:
        """Where 16 does not divide the size, torch draws the last 16 values again: (integers that
        it has drawn and drops before, values). Float32 has drawn one for every value by then."""
        rest = size % FILL
        return (rest if self._dtype == np.float32 else 0), (FILL if rest else 0)

    def _scalar(self) -> float:
        """A value of an array of fewer than 16: in double precision and in pairs, whose second
        value waits for the next such array."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u, v = (((a << 32 | b) % 2**53) * 2.0**-53 for a, b in self._integers(2, 2).tolist())
        angle, radius = 2 * math.pi * u, math.sqrt(-2 * math.log1p(-v))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Normal values from uniform ones in groups of 16, rounded to float32 wherever torch's vector
    code has a float32."""
    u, v = np.moveaxis(uniform.reshape(-1, 2, FILL // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log(1 - u, dtype=np.float64).astype(np.float32))
    angle = np.float32(2 * np.pi) * v
    waves = [wave(angle, dtype=np.float64).astype(np.float32) for wave in (np.cos, np.sin)]
    return np.stack([radius * wave for wave in waves], axis=1).reshape(-1)


def draw_as_torch(
    seeds: Sequence[int],
    dtype: Any,
    shape: tuple[int, int, int, int],
    draws: Int[np.ndarray, " i"],
    pictures: int = 1,
) -> tuple[Float[np.ndarray, "b n h w c"], Latents, Float[np.ndarray, "i b t h w c"] | None]:
    """Noise of latents [t h w c] for the image's posterior (of so many latent frames of pictures),
    the start, and the steps (None where no step draws), in the reference's order of drawing, as if
    each video were made alone. Of the `draws` of a step the last one counts."""
    streams, (frames, height, width, channels) = [TorchStream(seed, dtype) for seed in seeds], shape

    def drawn(frames: int) -> Latents:
        size = frames, channels, height, width
        return np.stack([np.moveaxis(stream.normal(size), 1, -1) for stream in streams])

    posterior, initial = drawn(pictures), drawn(frames)
    if not draws.any():
        return posterior, initial, None
    steps = np.zeros((len(draws), *initial.shape), np.float32)
    for step, count in enumerate(draws.tolist()):
        for stream in streams * (count - 1):
            stream.skip((frames, channels, height, width))
        if count:
            steps[step] = drawn(frames)
    return posterior, initial, steps
