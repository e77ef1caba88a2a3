"""Where a token stands: rotary tables on both grids, sine-cosine tables, and the sinusoid of a
timestep. Host numpy, once a request."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..config import TransformerConfig


def sinusoid(
    values: Float[np.ndarray, " i"] | Int[np.ndarray, " i"], width: int
) -> Float[np.ndarray, "i {width}"]:
    """Cosines then sines of `values` at geometric frequencies. The reference computes them in
    float32, and at timestep 999 the last bit of a frequency is worth 6e-5 of the result; so each is
    rounded where it rounds, the exponential as exactly as it can be."""
    half = width // 2
    exponents = (
        np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    angles = values.astype(np.float32)[:, None] * np.exp(exponents.astype(np.float64)).astype(
        np.float32
    )
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


class Positions(NamedTuple):
    """What the transformer is told about its joint sequence: text rows first, then the grid's
    tokens, frames slowest."""

    cos: Float[Any, "s half"]  # rotary, one column a channel pair; identity rows for text
    sin: Float[Any, "s half"]
    is_text: Bool[Any, " s"]
    # Added to the tokens; None where the network is rotary or learned its own.
    table: Float[Any, "s d"] | None


def token_count(config: TransformerConfig, latents: tuple[int, ...]) -> int:
    """Tokens of the joint sequence for latents of so many frames, rows and columns."""
    return config.max_text_seq_length + math.prod(
        size // patch for size, patch in zip(latents, config.patch, strict=True)
    )


def positions(
    config: TransformerConfig, latents: tuple[int, ...], rows: int | None = None
) -> Positions:
    """Positions of latents of so many frames, rows and columns, whose sizes are multiples of the
    patch. `rows`, where given, makes the rotary tables longer than the sequence, for tokens that
    only even it out."""
    grid = tuple(size // patch for size, patch in zip(latents, config.patch, strict=True))
    text, video = config.max_text_seq_length, math.prod(grid)
    turns = (
        _turns(config, grid)
        if config.use_rotary_positional_embeddings
        else np.zeros((video, config.attention_head_dim // 2), np.float32)
    )
    rows = text + video if rows is None else rows
    turns = np.pad(turns, ((text, rows - text - video), (0, 0)))
    fixed = not (
        config.use_rotary_positional_embeddings or config.use_learned_positional_embeddings
    )
    table = (
        np.concatenate([np.zeros((text, config.width), np.float32), _sincos(config, grid)])
        if fixed
        else None
    )
    return Positions(np.cos(turns), np.sin(turns), np.arange(rows) < text, table)


def _turns(config: TransformerConfig, grid: tuple[int, ...]) -> Float[np.ndarray, "video half"]:
    """Rotary angles: a quarter of a head's channels turn with the frame, three eighths each with
    the row and the column."""
    frames, rows, columns = grid
    k = config.attention_head_dim
    if config.patch_size_t:
        axes = (np.arange(frames), np.arange(rows), np.arange(columns))
    else:
        axes = (np.arange(frames), *_fitted(rows, columns, *config.table_grid[1:]))
    angles = [
        _angles(along, width)
        for along, width in zip(axes, (k // 4, k // 8 * 3, k // 8 * 3), strict=True)
    ]
    return _outer(angles, grid)


def _outer(parts: list[np.ndarray], grid: tuple[int, ...]) -> np.ndarray:
    """Channels of each axis, [size c] each, side by side at every point of the grid."""
    spread = [
        np.expand_dims(part, [d for d in range(len(grid)) if d != axis])
        for axis, part in enumerate(parts)
    ]
    return np.concatenate(
        [np.broadcast_to(part, (*grid, part.shape[-1])) for part in spread], axis=-1
    ).reshape(math.prod(grid), -1)


def _angles(positions: np.ndarray, width: int) -> np.ndarray:
    frequencies = (
        1.0 / 10000.0 ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    ).astype(np.float32)
    return positions.astype(np.float32)[:, None] * frequencies


def _fitted(
    rows: int, columns: int, base_rows: int, base_columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a grid fitted into the training grid with its aspect kept. The stop scales the
    crop offset too: a quirk of the reference, invisible at the training size and part of what its
    other sizes look like."""
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)

    def along(start: int, length: int, count: int) -> np.ndarray:
        return np.linspace(start, (start + length) * (count - 1) / count, count, dtype=np.float32)

    return along(top, height, rows), along(left, width, columns)


def _sincos(config: TransformerConfig, grid: tuple[int, ...]) -> Float[np.ndarray, "video d"]:
    """The fixed table of a network that is neither rotary nor learned: a quarter of the channels
    for the frame, then columns, then rows."""
    frames, rows, columns = grid
    wide = 3 * config.width // 4 // 2

    def waves(along: np.ndarray, width: int) -> np.ndarray:
        angles = along[:, None] / 10000.0 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    over_frames = waves(np.arange(frames) / config.temporal_interpolation_scale, config.width // 4)
    over_columns = waves(np.arange(columns) / config.spatial_interpolation_scale, wide)
    over_rows = waves(np.arange(rows) / config.spatial_interpolation_scale, wide)
    table = _outer([over_frames, over_columns, over_rows], (frames, columns, rows)).reshape(
        frames, columns, rows, -1
    )
    return table.swapaxes(1, 2).reshape(frames * rows * columns, -1).astype(np.float32)
