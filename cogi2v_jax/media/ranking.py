"""Plain figures of a video, by which takes of it are ranked: how far things in it move, and how
near it stays to its picture. numpy alone."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

LUMA = (0.299, 0.587, 0.114)
GRID = 64  # pixels of the shorter side, about, that movement is looked for in
CELL = 8  # pixels of that grid; a block has two cells each way
REACH = 12  # pixels of that grid that a block is looked for around its place
SHIFTS = 2 * REACH + 1  # each way
APART = 3  # frames from one that is compared to the next; with the 4 of a latent frame, flicker of
# that period would not be seen
CLEAR = 0.25  # a block has moved if its error there is less than this share of that at its place
STILL = 1.0  # squared levels, of a pixel: less at its own place is rounding
LEAST = 0.1  # added to the motion, so that of still videos the nearer one is better
SEEN = 1.0  # levels of error below which no video is better for it
BEST = 99.0  # dB of equal pictures


class Figures(NamedTuple):
    """What `figures_of` finds in a video."""

    motion: float  # per cent of the shorter side that blocks move in a frame, on average
    first: float  # PSNR of the first frame against the picture, dB, at most BEST
    drift: float  # levels of 255 by which the luminance of followed blocks changes, on average

    @property
    def score(self) -> float:
        """What takes are ranked by: the motion by the error. 6 dB less of the first frame need
        twice the motion."""
        error = np.hypot(255 * 10 ** (-self.first / 20), self.drift)
        return float((self.motion + LEAST) / max(error, SEEN))


def figures_of(
    video: UInt8[np.ndarray, "f h w 3"], picture: Float[np.ndarray, "h w 3"], among: int = 1
) -> Figures:
    """The figures of a video that begins with a picture, in [-1, 1] and of its size: its first
    frame, or the nearest `among` the first ones, as in a loop.

    Every block of the luminance is looked for in the frame that is APART later, around its place.
    The error there is the variance of the difference, so that a change of brightness is none; it
    is the drift. Where even the least error is more than the share CLEAR of that at the block's
    own place, it has not moved: what only flickers or is noise is not found elsewhere."""
    error = np.square(video[:among] - (picture + 1) * 127.5).mean((1, 2, 3)).min()
    first = float(min(BEST, -10 * np.log10(max(error, 1e-9) / 255**2)))
    grid, factor = _luminance(video)
    apart = min(APART, len(grid) - 1)
    if not apart:
        return Figures(0.0, first, 0.0)
    starts = range(0, len(grid) - apart, apart)
    now, later = grid[[*starts]], grid[[start + apart for start in starts]]
    far, change = _followed(*_differences(now, later))
    # Of a frame, so that what leaves it or comes into it does not count.
    drift = np.median(np.abs(change), axis=(1, 2)).mean()
    motion = 100 * far.mean() / apart * factor / min(video.shape[1:3])
    return Figures(float(motion), first, float(drift))


def rank(
    videos: Sequence[UInt8[np.ndarray, "f h w 3"]],
    picture: Float[np.ndarray, "h w 3"],
    among: int = 1,
) -> list[tuple[int, Figures]]:
    """The numbers of videos that begin with a picture, and their figures: the best one first, of
    equal ones the earlier."""
    found = [figures_of(video, picture, among) for video in videos]
    return sorted(enumerate(found), key=lambda pair: -pair[1].score)


def _luminance(
    video: UInt8[np.ndarray, "f h w 3"],
) -> tuple[Float[np.ndarray, "f y x"], int]:
    """The mean luminance of squares of pixels, and the side of a square."""
    count, height, width, _ = video.shape
    factor = max(1, round(min(height, width) / GRID))
    y, x = height // factor, width // factor
    squares = video[:, : y * factor, : x * factor].reshape(count, y, factor, x, factor, 3)
    weights = np.asarray(LUMA, np.float32)
    return np.stack(
        [square.mean(axis=(1, 3), dtype=np.float32) @ weights for square in squares]
    ), factor


def _differences(
    now: Float[np.ndarray, "n y x"], later: Float[np.ndarray, "n y x"]
) -> tuple[Float[np.ndarray, "s n v u"], Float[np.ndarray, "s n v u"]]:
    """The variance and the mean of each block's difference at every shift, row by row. Beyond the
    frame the variance is infinite."""
    cell = max(1, min(CELL, min(now.shape[1:]) // 2))
    rows, columns = (side // cell * cell for side in now.shape[1:])
    now = now[:, :rows, :columns]
    around = [(0, 0), (REACH, REACH), (REACH, REACH)]
    later = np.pad(later, around, constant_values=np.nan)
    variances, means = [], []
    for y, x in itertools.product(range(SHIFTS), repeat=2):
        difference = later[:, y : y + rows, x : x + columns] - now
        mean, square = (_blocks(each, cell) for each in (difference, np.square(difference)))
        variances.append(square - np.square(mean))
        means.append(mean)
    return np.nan_to_num(np.stack(variances), nan=np.inf), np.stack(means)


def _blocks(values: Float[np.ndarray, "n y x"], cell: int) -> Float[np.ndarray, "n v u"]:
    """Means of blocks of two by two cells, one at every cell."""
    count, y, x = values.shape
    cells = values.reshape(count, y // cell, cell, x // cell, cell).mean(axis=(2, 4))
    if min(cells.shape[1:]) == 1:
        return cells
    rows = cells[:, 1:] + cells[:, :-1]
    return (rows[:, :, 1:] + rows[:, :, :-1]) / 4


def _followed(
    errors: Float[np.ndarray, "s n v u"], changes: Float[np.ndarray, "s n v u"]
) -> tuple[Float[np.ndarray, "n v u"], Float[np.ndarray, "n v u"]]:
    """How far each block has moved, in pixels of the grid, and how its luminance has changed. Parts
    of a pixel are the lowest points of parabolas through the least error and its neighbours."""

    def at(values: np.ndarray, shift: np.ndarray) -> np.ndarray:
        shift = np.clip(shift, 0, SHIFTS**2 - 1)
        return np.take_along_axis(values, shift[None], axis=0)[0].astype(float)

    centre = REACH * SHIFTS + REACH
    best = errors.argmin(axis=0)
    least = lowest = at(errors, best)
    places = []
    for place, stride in zip(np.divmod(best, SHIFTS), (SHIFTS, 1), strict=True):
        before, after = at(errors, best - stride), at(errors, best + stride)
        usable = (place > 0) & (place < SHIFTS - 1) & np.isfinite(before + after)
        before, after = (np.where(usable, each, least) for each in (before, after))
        slope, bend = before - after, before + after - 2 * least
        part = np.divide(slope, 2 * bend, out=np.zeros_like(least), where=bend > 0)
        lowest = lowest - slope * part / 4
        places.append(place - REACH + part)
    moved = (errors[centre] > STILL) & (lowest < CLEAR * errors[centre])
    change = at(changes, np.where(moved, best, centre))
    return np.where(moved, np.hypot(*places), 0), change
