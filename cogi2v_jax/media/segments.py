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
    frames = read_frames(source) if is_file else np.asarray(source)
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
    frame = folder / f"{path.stem}-0.png"
    Image.fromarray(clip_frames(path, 1)[0]).save(frame)
    return frame


class Segments:
    """Frames of segments, each of which begins with the `overlap` last frames of the one before,
    made anew; they are cut off, and before it the colours are matched."""

    def __init__(self, overlap: int, match_colour: bool):
        self._overlap, self._match_colour = overlap, match_colour
        self._parts: list[UInt8[np.ndarray, "b f h w 3"]] = []

    @property
    def frames(self) -> UInt8[np.ndarray, "b f h w 3"]:
        """All so far."""
        return np.concatenate(self._parts, axis=1)

    def add(self, segment: UInt8[np.ndarray, "b f h w 3"]) -> None:
        if not self._parts:
            self._parts.append(segment)
            return
        if self._match_colour:
            segment = match_colours(segment, self.frames, self._overlap)
        self._parts.append(segment[:, self._overlap :])


def match_colours(
    segment: UInt8[np.ndarray, "b f h w 3"], before: UInt8[np.ndarray, "b f2 h w 3"], overlap: int
) -> UInt8[np.ndarray, "b f h w 3"]:
    """A segment whose channels have their mean and deviation changed as the `overlap` frames that
    it has in common with the one before differ."""
    own, other = segment[:, :overlap], before[:, -overlap:]
    axes = {"axis": (1, 2, 3), "keepdims": True}
    before_mean, mean = other.mean(**axes), own.mean(**axes)
    before_spread, spread = other.std(**axes), own.std(**axes)
    has_contrast = np.minimum(before_spread, spread) > LEAST
    gain = np.where(has_contrast, before_spread / np.maximum(spread, LEAST), 1.0)
    changed = (segment - mean) * gain + before_mean
    return np.rint(changed).clip(0, 255).astype(np.uint8)
