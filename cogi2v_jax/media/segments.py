"""Clips to start from, and videos of several segments, as uint8 frames."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from .videos import read_frames

LEAST = 1.0  # of the deviation of a channel, in 256ths, below which it has no contrast to match


def clip_frames(source: Any, count: int) -> UInt8[np.ndarray, "{count} h w 3"]:
    """The first `count` frames of a clip: a file or frame folder, or uint8 frames [f h w 3]. Raises
    FileNotFoundError, ValueError for other arrays and for shorter clips, and as `read_frames`."""
    is_file = isinstance(source, str | os.PathLike)
    try:
        frames = read_frames(source, count) if is_file else np.asarray(source)
    except (TypeError, ValueError) as error:
        if is_file:
            raise
        raise ValueError(f"video must be a file or uint8 frames [f h w 3]: got {error}") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        got = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"video must be a file or uint8 frames [f h w 3]: got {got}")
    if len(frames) < count:
        name = f" in {os.fspath(source)}" if is_file else ""
        rule = f"at least the {count} frames of the request"
        way = "give a longer one or a smaller num_frames"
        raise ValueError(f"video must have {rule}: got {len(frames)}{name}; {way}")
    return frames[:count]


def first_frame(path: Path, folder: Path) -> Path:
    """The first frame of a clip, written to `folder`. Raises as `clip_frames`."""
    frame = folder / f"first frame of {path.name}.png"
    Image.fromarray(clip_frames(path, 1)[0]).save(frame)
    return frame


class Segments:
    """Frames of segments, each of which begins with the `overlap` last frames of the one before,
    made anew; they are cut off, and before it the colours are matched."""

    def __init__(self, overlap: int, match_colour: bool):
        self._overlap, self._match_colour = overlap, match_colour
        self._parts: list[UInt8[np.ndarray, "b f h w 3"]] = []
        self.last = np.zeros((0, 0, 0, 0, 3), np.uint8)  # frames from which the next one goes on

    @property
    def frames(self) -> UInt8[np.ndarray, "b f h w 3"]:
        """All so far."""
        return np.concatenate(self._parts, axis=1)

    def add(self, segment: UInt8[np.ndarray, "b f h w 3"]) -> None:
        if self._parts:
            if self._match_colour:
                segment = match_colours(segment, self.last)
            segment = segment[:, self._overlap :]
            self.last = np.concatenate([self.last, segment], axis=1)[:, -self._overlap :]
        else:
            self.last = segment[:, -self._overlap :]
        self._parts.append(segment)


def match_colours(
    segment: UInt8[np.ndarray, "b f h w 3"], before: UInt8[np.ndarray, "b f2 h w 3"]
) -> UInt8[np.ndarray, "b f h w 3"]:
    """A segment whose channels have their mean and deviation changed as its first frames differ
    from those `before`, which show the same."""
    own, other = segment[:, : before.shape[1]], before
    axes = {"axis": (1, 2, 3), "keepdims": True}
    before_mean, mean = other.mean(**axes), own.mean(**axes)
    before_spread, spread = other.std(**axes), own.std(**axes)
    has_contrast = np.minimum(before_spread, spread) > LEAST
    gain = np.where(has_contrast, before_spread / np.maximum(spread, LEAST), 1.0)
    gain, offset = gain.astype(np.float32), (before_mean - gain * mean).astype(np.float32)
    changed = [np.rint(frame * gain[:, 0] + offset[:, 0]) for frame in np.moveaxis(segment, 1, 0)]
    return np.stack([frame.clip(0, 255).astype(np.uint8) for frame in changed], axis=1)
