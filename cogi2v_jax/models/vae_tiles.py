"""The reference's optional tiles (`enable_tiling` of AutoencoderKLCogVideoX): overlapping pictures
that go through the network each on its own, with statistics of its own, and are blended. Faster it
is not, and its result is another one than the whole picture's: it is there for who wants the
official script's output to the letter.

The host walks the tiles, so that equal ones share one compiled program: there are four shapes at
most, and one program that blends."""

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
    """Tiles along rows or columns: `size` and `stride` in what the network reads, `blend` and
    `keep` in what it makes."""

    size: int
    stride: int
    blend: int
    keep: int


def sides(config: VAEConfig, encodes: bool) -> tuple[Side, Side]:
    """Tiles over rows and columns. Raises ValueError for sample sizes whose tiles the reference
    itself puts together to a wrong size."""
    made, ratio = [], config.spatial_ratio
    for name, overlap in zip(("sample_height", "sample_width"), OVERLAP, strict=True):
        pixels = getattr(config, name) // 2
        latents = pixels // ratio
        read, written = (pixels, latents) if encodes else (latents, pixels)
        side = Side(
            read,
            int(read * (1 - overlap)),
            int(written * overlap),
            written - int(written * overlap),
        )
        if side.stride * written != side.keep * read:
            unit = 2 * ratio * round(1 / overlap)
            raise ValueError(
                f"{name} of a VAE that is tiled must be a multiple of {unit}: got {2 * pixels}, whose tiles the reference puts together to "
                "another size than the picture's; leave tiling off"
            )
        made.append(side)
    return made[0], made[1]


def encode_tiled(
    moments: Network, video: Float[Any, "b f h w c"], config: VAEConfig
) -> Float[Array, "b t h2 w2 z2"]:
    """The posterior's moments, before they are split, of a picture in tiles if it is larger than
    one. `moments` is a compiled `VAE.moments`, called once a tile."""
    return in_tiles(moments, video, *sides(config, encodes=True))


def decode_tiled(
    decode: Network, latents: Float[Any, "b t h w z"], config: VAEConfig
) -> Float[Array, "b f h2 w2 c"]:
    """As `VAE.decode`, in tiles if the picture is larger than one. `decode` is it, compiled, called
    once a tile."""
    return in_tiles(decode, latents, *sides(config, encodes=False))


def in_tiles(
    network: Network, x: Float[Any, "b f h w c"], rows: Side, columns: Side
) -> Float[Array, "b f2 h2 w2 c2"]:
    height, width = x.shape[2:4]
    if height <= rows.size and width <= columns.size:
        return network(x)
    tops, lefts = range(0, height, rows.stride), range(0, width, columns.stride)
    return assemble(
        [[network(x[:, :, i : i + rows.size, j : j + columns.size]) for j in lefts] for i in tops],
        rows,
        columns,
    )


@partial(jax.jit, static_argnames=("rows", "columns"))
def assemble(
    tiles: list[list[Float[Array, "b f _ _ c"]]], rows: Side, columns: Side
) -> Float[Array, "b f h w c"]:
    """Each tile fades in from the one above it, then from the one to its left, both as they are
    once they are blended themselves."""
    done: list[list[Array]] = []
    for i, row in enumerate(tiles):
        done.append([])
        for j, tile in enumerate(row):
            if i > 0:
                tile = fade(done[i - 1][j], tile, rows.blend, axis=2)
            if j > 0:
                tile = fade(done[i][j - 1], tile, columns.blend, axis=3)
            done[i].append(tile)
    return jnp.concatenate(
        [
            jnp.concatenate([tile[:, :, : rows.keep, : columns.keep] for tile in row], axis=3)
            for row in done
        ],
        axis=2,
    )


def fade(
    before: Float[Array, "b f h w c"], tile: Float[Array, "b f h2 w2 c"], extent: int, axis: int
) -> Float[Array, "b f h2 w2 c"]:
    """`tile`, whose first values along `axis` go over from the last ones of `before`."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    old = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis).astype(
        jnp.float32
    )
    new, rest = jnp.split(tile, [extent], axis=axis)
    share = (jnp.arange(extent) / max(extent, 1)).reshape(-1, *[1] * (tile.ndim - 1 - axis))
    return jnp.concatenate([(old * (1 - share) + new * share).astype(tile.dtype), rest], axis=axis)
