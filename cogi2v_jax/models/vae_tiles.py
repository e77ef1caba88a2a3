"""The reference's optional tiling (`enable_tiling` of AutoencoderKLCogVideoX): overlapping tiles go
through the network one by one, each with its own group-norm statistics, and are blended. It is not
faster and its result differs from the whole picture's. It reproduces the official script's output.

The loop over tiles runs on the host, so that tiles of one shape share one compiled program. There
are at most four shapes, and one program that blends."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..config import VAEConfig

OVERLAP = (1 / 6, 1 / 5)  # of a tile's rows and columns

Network = Callable[[Float[Any, "b f h w c"]], Float[Array, "b f2 h2 w2 c2"]]


class Side(NamedTuple):
    """Tiles along rows or columns: `size` and `stride` in units of the network's input, `blend` and
    `keep` in units of its output."""

    size: int
    stride: int
    blend: int
    keep: int


def sides(config: VAEConfig, encodes: bool) -> tuple[Side, Side]:
    """The tiles of (rows, columns). Raises ValueError for sample sizes for which the reference's
    own tiling returns a picture of the wrong size."""
    found, ratio = [], config.spatial_ratio
    for name, overlap in zip(("sample_height", "sample_width"), OVERLAP, strict=True):
        pixels = getattr(config, name) // 2
        latents = pixels // ratio
        read, written = (pixels, latents) if encodes else (latents, pixels)
        blend = int(written * overlap)
        side = Side(read, int(read * (1 - overlap)), blend, written - blend)
        if side.stride * written != side.keep * read:
            unit = 2 * ratio * round(1 / overlap)
            raise ValueError(
                f"{name} of a VAE that is tiled must be a multiple of {unit}: got {2 * pixels}, "
                "for which the reference's tiling changes the size of the picture; leave tiling off"
            )
        found.append(side)
    return found[0], found[1]


def encode_tiled(
    moments: Network, video: Float[Any, "b f h w c"], config: VAEConfig
) -> Float[Array, "b t h2 w2 z2"]:
    """`VAE.moments` of a video, in tiles if it is larger than one. `moments` is that function
    compiled, called once a tile."""
    return in_tiles(moments, video, *sides(config, encodes=True))


def decode_tiled(
    decode: Network, latents: Float[Any, "b t h w z"], config: VAEConfig
) -> Float[Array, "b f h2 w2 c"]:
    """`VAE.decode` of latents, in tiles if they are larger than one. `decode` is that function
    compiled, called once a tile."""
    return in_tiles(decode, latents, *sides(config, encodes=False))


def in_tiles(
    network: Network, x: Float[Any, "b f h w c"], rows: Side, columns: Side
) -> Float[Array, "b f2 h2 w2 c2"]:
    """The network's outputs for overlapping tiles of x, blended."""
    height, width = x.shape[2:4]
    if height <= rows.size and width <= columns.size:
        return network(x)
    tops, lefts = range(0, height, rows.stride), range(0, width, columns.stride)
    tiles = [
        [network(x[:, :, top : top + rows.size, left : left + columns.size]) for left in lefts]
        for top in tops
    ]
    return blend_tiles(tiles, rows, columns)


@partial(jax.jit, static_argnames=("rows", "columns"))
def blend_tiles(
    tiles: list[list[Float[Array, "b f _ _ c"]]], rows: Side, columns: Side
) -> Float[Array, "b f h w c"]:
    """The picture from its tiles. Each is blended with the one above it, then with the one to its
    left, after these were blended themselves."""
    blended: list[list[Array]] = []
    for i, row in enumerate(tiles):
        blended.append([])
        for j, tile in enumerate(row):
            if i > 0:
                tile = cross_fade(blended[i - 1][j], tile, rows.blend, axis=2)
            if j > 0:
                tile = cross_fade(blended[i][j - 1], tile, columns.blend, axis=3)
            blended[i].append(tile)
    cropped = [[tile[:, :, : rows.keep, : columns.keep] for tile in row] for row in blended]
    return jnp.concatenate([jnp.concatenate(row, axis=3) for row in cropped], axis=2)


def cross_fade(
    before: Float[Array, "b f h w c"], tile: Float[Array, "b f h2 w2 c"], extent: int, axis: int
) -> Float[Array, "b f h2 w2 c"]:
    """`tile` with its first `extent` values along `axis` cross-faded from the last of `before`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    old = old.astype(jnp.float32)
    new, rest = jnp.split(tile, [extent], axis=axis)
    weight = (jnp.arange(extent) / max(extent, 1)).reshape(-1, *[1] * (tile.ndim - 1 - axis))
    mixed = (old * (1 - weight) + new * weight).astype(tile.dtype)
    return jnp.concatenate([mixed, rest], axis=axis)
