"""A user's initial noise from a file, as Go-with-the-Flow (arXiv 2501.08331) makes it for a wanted
movement."""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from ..disk import first_line, refuse_pointer
from ..request import LatentShape

MEAN, DEVIATION = 0.1, (0.8, 1.25)  # how far noise may be from a mean of 0 and a deviation of 1


def read_noise(path: Path, shape: LatentShape, frames: int) -> Float[np.ndarray, "1 t h w c"]:
    """Reads a .npy file for latents of a shape, of a video of so many frames: [t h w c] or
    [t c h w], with or without a leading 1, where t is the number of latent frames, or `frames`, of
    which every fourth is taken. Frames of padding get noise of their own. Raises FileNotFoundError,
    and ValueError for another file, another shape, and values that are no noise."""
    if not path.is_file():
        raise FileNotFoundError(f"noise_file must be an existing .npy file: found no {path}")
    refuse_pointer(path)
    try:
        noise = np.load(path, allow_pickle=False)
        if not isinstance(noise, np.ndarray):
            raise ValueError("it holds several arrays")
        noise = noise.astype(np.float32)
    except (OSError, ValueError, TypeError, EOFError) as error:
        reason = first_line(error)
        raise ValueError(
            f"noise_file must be a .npy file of numbers: got {path} ({reason})"
        ) from None
    given = list(noise.shape)
    if noise.ndim == 5 and len(noise) == 1:
        noise = noise[0]
    own = shape.frames - shape.padding
    sizes = (shape.height, shape.width, shape.channels)
    if noise.ndim == 4 and noise.shape[1:] != sizes and noise.shape[1:] == (sizes[2], *sizes[:2]):
        noise = np.moveaxis(noise, 1, -1)
    if noise.ndim == 4 and len(noise) == frames != own:
        noise = noise[:: (frames - 1) // (own - 1)] if own > 1 else noise[:1]
    if noise.shape not in ((own, *sizes), (*shape[:4],)):
        height, width, channels = sizes
        must = f"[{own} or {frames} {height} {width} {channels}], or with channels second"
        raise ValueError(f"noise_file must have the shape {must}: got {given} in {path}")
    mean, deviation = noise.mean(dtype=np.float64), noise.std(dtype=np.float64)
    if not (abs(mean) <= MEAN and DEVIATION[0] <= deviation <= DEVIATION[1]):
        must = "noise_file must have about the mean 0 and the deviation 1"
        raise ValueError(f"{must}: got {mean:.2f} and {deviation:.2f} in {path}")
    missing = shape.frames - len(noise)
    padding = np.random.default_rng(0).standard_normal((missing, *sizes), np.float32)
    return np.concatenate([padding, noise])[None]
