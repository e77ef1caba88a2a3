"""What happens in a clip of shapes: where the shapes of a scene are in every frame, and whether
they do what the prompt says. For `adherence.py` and the tests; no jax."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene

Frames = UInt8[np.ndarray, "f h w 3"]


class Track(NamedTuple):
    """A shape in every frame: its pixels, their number and their centre (x, y; NaN for none)."""

    mask: Bool[np.ndarray, "f h w"]
    area: Float[np.ndarray, " f"]
    centre: Float[np.ndarray, "f 2"]

    @property
    def growth(self) -> float:
        """The last area by the first."""
        return self.area[-1] / max(self.area[0], 1.0)

    @property
    def way(self) -> Float[np.ndarray, " 2"]:
        """From the first centre to the last one."""
        return self.centre[-1] - self.centre[0]


def tracks(video: Frames, scene: Scene) -> list[Track]:
    """Of the scene's shape and, where there is one, of the second. A pixel belongs to what its
    colour is nearest to: a shape, or the background at its place. Of these the largest piece
    counts: the soft edge of one shape may have the colour of another."""
    drawn = [shape for shape in (scene.shape, scene.second) if shape is not None]
    colours = [shapes.background(scene), *(shape.colour for shape in drawn)]
    distances = [np.linalg.norm(video / 255 - colour, axis=-1) for colour in colours]
    label = np.argmin(distances, axis=0)
    return [
        _track(np.stack([_largest(frame == number) for frame in label]))
        for number in range(1, len(colours))
    ]


def _largest(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The largest connected piece."""
    pieces, count = ndimage.label(mask)
    sizes = np.bincount(pieces[mask], minlength=count + 1)
    return mask & (pieces == np.argmax(sizes))


def _track(mask: Bool[np.ndarray, "f h w"]) -> Track:
    area = mask.sum(axis=(1, 2)).astype(float)
    rows, columns = np.mgrid[: mask.shape[1], : mask.shape[2]] + 0.5
    with np.errstate(invalid="ignore"):
        centre = [(mask * places).sum(axis=(1, 2)) / area for places in (columns, rows)]
    return Track(mask, area, np.stack(centre, axis=-1))


def nearest_motion(video: Frames, scene: Scene) -> str:
    """The motion whose clip of this scene, drawn at its mean speed, is nearest to the video: of
    those that the embedded model is trained on, and the scene's own."""
    errors = {}
    for motion in {**shapes.TRAINED, scene.motion: ()}:
        if scene.shape.form != "circle" or motion not in shapes.TURNING:
            truth = shapes.render(scene._replace(motion=motion, speed=1.0))
            errors[motion] = np.square(video.astype(float) - truth).mean()
    return min(errors, key=lambda motion: errors[motion])


def follows(video: Frames, scene: Scene) -> bool:
    """Whether the shape does what the prompt says, by its track alone, and for motions that leave
    its centre where it is, by the nearest motion too."""
    track, motion = tracks(video, scene)[0], scene.motion
    drift = float(np.linalg.norm(track.way))
    if motion in shapes.DIRECTIONS:
        x, y = shapes.DIRECTIONS[motion]
        along, across = track.way @ (x, y), track.way @ (y, x)
        return bool(along > 8 and abs(across) < 4 and 0.6 < track.growth < 1.5)
    if motion in shapes.FACTORS:
        enough = track.growth > 1.6 if motion == "grows" else track.growth < 0.6
        return bool(enough and drift < 4)
    kept = bool(0.7 < track.growth < 1.4)
    if motion == "circles":
        return kept and _circles(track)
    if motion == "bounces":
        return kept and _bounces(track)
    return kept and drift < 3 and nearest_motion(video, scene) == motion


def _circles(track: Track) -> bool:
    """Once around a point to the left of where it began, at about the right distance."""
    x, y = (track.centre - track.centre[0] + (shapes.ORBIT, 0)).T
    turns = np.unwrap(np.arctan2(y, x))[-1] / (2 * np.pi)
    distance = np.hypot(x, y) / shapes.ORBIT
    return bool(0.75 < turns < 1.25 and distance.min() > 0.5 and distance.max() < 1.5)


def _bounces(track: Track) -> bool:
    """Up twice, and down between."""
    x, height = (track.centre[0] - track.centre).T / shapes.HOP
    middle = len(height) // 2
    hops = min(height[:middle].max(), height[middle + 1 :].max())
    return bool(hops > 0.6 and height[middle] < 0.5 and np.abs(x).max() < 0.4)


def rests(track: Track) -> bool:
    """Whether a shape stays where it is, and of its size."""
    return bool(np.linalg.norm(track.way) < 3 and 0.7 < track.growth < 1.4)


def colour_error(video: Frames, scene: Scene) -> float:
    """How far the mean of the shape's inner pixels in the last frame is from its colour, in RGB
    from 0 to 1; 1 where it has none."""
    mask = tracks(video, scene)[0].mask[-1]
    inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    if not inner.any():
        return 1.0
    pixels = video[-1, 1:-1, 1:-1][inner] / 255
    return float(np.linalg.norm(pixels.mean(axis=0) - scene.shape.colour))


def psnr(video: UInt8[np.ndarray, "*shape"], truth: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB, at most 99."""
    error = np.square(video.astype(float) - truth).mean() / 255**2
    return float(min(99.0, -10 * np.log10(max(error, 1e-12))))
