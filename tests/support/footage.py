"""Small videos to prepare: every frame is of one grey, which says which frame it is."""

from pathlib import Path

import numpy as np

from cogi2v_jax.media.videos import write_video

GREY = 10  # levels between two frames


def film(path: Path, frames: int = 9, height: int = 64, width: int = 64, fps: float = 8) -> Path:
    """Writes frames of the greys 0, 10, 20, ..."""
    greys = (GREY * np.arange(frames)).astype(np.uint8)
    shape = frames, height, width, 3
    return write_video(path, np.broadcast_to(greys[:, None, None, None], shape), fps, {})


def indices(frames: np.ndarray) -> list[int]:
    """Which frames of a film these are."""
    return np.rint(frames.astype(float).mean(axis=(1, 2, 3)) / GREY).astype(int).tolist()


def library(folder: Path, count: int, **sizes: int) -> Path:
    """A folder of films, each with a caption beside it."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        film(folder / f"{number}.mp4", **sizes)
        (folder / f"{number}.txt").write_text(f"the red circle moves {number % 3}")
    return folder
