"""Positions of tokens: rotary tables on both generations' grids, sine-cosine tables, and the
sinusoid of a timestep. Host numpy, once a request."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..config import TransformerConfig


def sinusoid(
    values: Float[np.ndarray, " i"] | Int[np.ndarray, " i"], width: int
) -> Float[np.ndarray, "i {width}"]:
    """Cosines, then sines of `values` at geometric frequencies. The reference computes in float32,
    where the last bit of a frequency changes the result by 6e-5 at timestep 999; so frequencies are
    rounded where it rounds them, after an exact exponential."""
    half = width // 2
    products = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponents = products / np.float32(half)  # in the reference's order: it rounds both
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values.astype(np.float32)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


class Positions(NamedTuple):
    """Positions of the joint sequence: text tokens first, then the tokens of the grid, frames
    slowest, then padding."""

    cos: Float[Any, "s half"]  # rotary, a column for each pair of channels; identity for text
    sin: Float[Any, "s half"]
    is_text: Bool[Any, " s"]
    # Added to the tokens; None where the network is rotary or learned its own table.
    table: Float[Any, "s d"] | None
    resize: "Resize | None" = None  # of a learned table; None where its size is the grid's


class Resize(NamedTuple):
    """Interpolates a learned table, which is given over frames, rows and columns, to a grid."""

    frames: Float[Any, "f2 f"]
    rows: Float[Any, "h2 h"]
    columns: Float[Any, "w2 w"]


def grid_of(config: TransformerConfig, latents: tuple[int, ...]) -> tuple[int, int, int]:
    """Tokens over the frames, rows and columns of latents, whose sizes are multiples of the
    patch."""
    frames, rows, columns = (n // patch for n, patch in zip(latents, config.patch, strict=True))
    return frames, rows, columns


def token_count(config: TransformerConfig, latents: tuple[int, ...]) -> int:
    """Tokens of the joint sequence for latents of so many frames, rows and columns."""
    return config.max_text_seq_length + math.prod(grid_of(config, latents))


def positions(
    config: TransformerConfig, latents: tuple[int, ...], padded: int | None = None
) -> Positions:
    """Positions for latents of so many frames, rows and columns, and for padding up to `padded`
    tokens."""
    grid, text = grid_of(config, latents), config.max_text_seq_length
    tokens = text + math.prod(grid)
    rotary, learned = (
        config.use_rotary_positional_embeddings,
        config.use_learned_positional_embeddings,
    )
    half = config.attention_head_dim // 2
    angles = rotary_angles(config, grid) if rotary else np.zeros((tokens - text, half), np.float32)
    length, table = padded or tokens, None
    angles = np.pad(angles, ((text, length - tokens), (0, 0)))
    if not rotary and not learned:
        table = np.concatenate([np.zeros((text, config.width), np.float32), sincos(config, grid)])
    resize = resize_of(config, grid) if learned else None
    return Positions(np.cos(angles), np.sin(angles), np.arange(length) < text, table, resize)


def resize_of(config: TransformerConfig, grid: tuple[int, int, int]) -> Resize | None:
    """How a learned table is interpolated: linearly, frames from the first to the last, rows and
    columns between the centres of tokens. A grid of fewer frames, which the reference takes too,
    reads the first ones."""
    (frames, *sides), (known_frames, *known_sides) = grid, config.table_grid
    if frames <= known_frames and sides == known_sides:
        return None
    along = np.arange(frames, dtype=float)
    if frames > known_frames:
        along *= (known_frames - 1) / (frames - 1)
    places = [along]
    for count, known in zip(sides, known_sides, strict=True):
        places.append(((np.arange(count) + 0.5) * known / count - 0.5).clip(0, known - 1))
    shapes = zip(places, config.table_grid, strict=True)
    return Resize(*(interpolation(place, known) for place, known in shapes))


def interpolation(places: np.ndarray, known: int) -> Float[np.ndarray, "n {known}"]:
    """The matrix that interpolates linearly between `known` values, at places from 0 to
    known - 1."""
    distances = np.abs(places[:, None] - np.arange(known))
    return np.maximum(0, 1 - distances).astype(np.float32)


def rotary_angles(
    config: TransformerConfig, grid: tuple[int, int, int]
) -> Float[np.ndarray, "video half"]:
    """A quarter of a head's channels rotate with the frame, three eighths each with the row and the
    column."""
    frames, rows, columns = grid
    k = config.attention_head_dim
    if config.patch_size_t:
        along = np.arange(rows), np.arange(columns)
    else:
        along = fit_grid(rows, columns, *config.table_grid[1:])
    over_frames = axis_angles(np.arange(frames), k // 4)
    if config.use_learned_positional_embeddings and frames > config.table_grid[0]:
        over_frames = without_repetition(over_frames, config.table_grid[0])
    over_sides = (axis_angles(positions, k // 8 * 3) for positions in along)
    return over_grid([over_frames, *over_sides], grid)


def axis_angles(positions: np.ndarray, width: int) -> np.ndarray:
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return positions.astype(np.float32)[:, None] * (1.0 / 10000.0**exponents).astype(np.float32)


def without_repetition(
    angles: Float[np.ndarray, "f half"], known: int
) -> Float[np.ndarray, "f half"]:
    """RIFLEx (arXiv 2502.15894): of the frequencies over the frames, the one whose period is the
    first to exceed the `known` frames of training makes a longer video repeat itself. It is
    lowered, so that all frames are within 0.9 of its period. For released weights (13 frames, 16
    channels) it is the second, with a period of 19.9."""
    frames, frequencies = len(angles), angles[1]
    longer = np.flatnonzero(2 * math.pi / frequencies > known)
    if not longer.size:
        return angles
    intrinsic, lower = longer[0], 0.9 * 2 * math.pi / frames
    angles = angles.copy()
    angles[:, intrinsic] = np.arange(frames) * min(frequencies[intrinsic], np.float32(lower))
    return angles


def over_grid(axes: list[np.ndarray], grid: tuple[int, int, int]) -> Float[np.ndarray, "points c"]:
    """The channels of each axis, [size c] each, side by side at every point of the grid."""
    shape = [1, 1, 1]
    parts = []
    for axis, channels in enumerate(axes):
        own = [*shape[:axis], grid[axis], *shape[axis + 1 :], channels.shape[-1]]
        parts.append(np.broadcast_to(channels.reshape(own), (*grid, channels.shape[-1])))
    return np.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


def fit_grid(
    rows: int, columns: int, base_rows: int, base_columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column positions of a grid that is scaled into the training grid with its aspect
    ratio kept. The stop scales the crop offset too: a quirk of the reference that has no effect at
    the training size and is part of its results at other sizes."""
    if rows / columns > base_rows / base_columns:
        height, width = base_rows, round(base_rows / rows * columns)
    else:
        height, width = round(base_columns / columns * rows), base_columns
    top, left = round((base_rows - height) / 2), round((base_columns - width) / 2)

    def along(start: int, length: int, count: int) -> np.ndarray:
        stop = (start + length) * (count - 1) / count
        return np.linspace(start, stop, count, dtype=np.float32)

    return along(top, height, rows), along(left, width, columns)


def sincos(config: TransformerConfig, grid: tuple[int, int, int]) -> Float[np.ndarray, "video d"]:
    """The fixed table of a network that is neither rotary nor learned: a quarter of the channels
    for the frame, then columns, then rows."""
    frames, rows, columns = grid
    wide = 3 * config.width // 4 // 2

    def waves(along: np.ndarray, width: int) -> np.ndarray:
        exponents = np.arange(width // 2, dtype=np.float64) / (width / 2)
        angles = along[:, None] / 10000.0**exponents
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    over_frames = waves(np.arange(frames) / config.temporal_interpolation_scale, config.width // 4)
    over_columns = waves(np.arange(columns) / config.spatial_interpolation_scale, wide)
    over_rows = waves(np.arange(rows) / config.spatial_interpolation_scale, wide)
    table = over_grid([over_frames, over_columns, over_rows], (frames, columns, rows))
    table = table.reshape(frames, columns, rows, -1).swapaxes(1, 2)
    return table.reshape(frames * rows * columns, -1).astype(np.float32)
