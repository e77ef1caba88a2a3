"""Clips of flat shapes on a gradient, which the embedded model is made for: drawn by a program, so
that examples and tests of training need nobody's videos.

    python -m cogi2v_jax.training.shapes DIR --motions circles --clips 300

writes DIR/00000.mp4, ... and their captions beside them. The clips are lossless: the usual mp4 has
one colour for four pixels, which blurs the edges of shapes this small. No jax."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ..disk import replace_when_done
from ..terminal import printing

SIZE, FRAMES, FPS = 64, 9, 8
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.75, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.88, 0.12),
    "magenta": (0.88, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.88),
    "orange": (0.98, 0.52, 0.08),
    "white": (0.97, 0.97, 0.97),
}
FORMS = ("circle", "square", "triangle")
# What a shape does, and what a caption calls it: what the embedded model is trained on, and what is
# left for others to teach it.
TRAINED = {
    "left": ("moves left", "slides left", "drifts to the left"),
    "right": ("moves right", "slides right", "drifts to the right"),
    "up": ("moves up", "slides up", "drifts upwards"),
    "down": ("moves down", "slides down", "drifts downwards"),
    "grows": ("grows", "gets bigger"),
    "shrinks": ("shrinks", "gets smaller"),
    "spins": ("spins", "rotates"),
    "still": ("stays still", "does not move"),
}
SPARE = {"circles": ("circles",), "bounces": ("bounces",), "wobbles": ("wobbles",)}
MOTIONS = TRAINED | SPARE
TURNING = ("spins", "wobbles")  # of which a circle shows nothing
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FACTORS = {"grows": 1.7, "shrinks": 0.5}  # of the radius, from the first to the last frame
WAY, TURN = 16.0, 60.0  # pixels and degrees from the first to the last frame
ORBIT, HOP, SWING = 6.0, 10.0, 25.0  # radius and height in pixels, and degrees to either side
SECOND = 0.4  # share of clips with another shape that stays where it is


class Shape(NamedTuple):
    """One flat shape; pixels and radians."""

    form: str
    colour: Float[np.ndarray, " 3"]
    centre: Float[np.ndarray, " 2"]  # x, y
    radius: float
    angle: float


class Scene(NamedTuple):
    """A clip to draw."""

    prompt: str
    shape: Shape
    motion: str
    speed: float  # of the motion; 1 is WAY, TURN or FACTORS
    background: Float[np.ndarray, "2 3"]  # colours at the top and at the bottom
    second: Shape | None


def combinations(held_out: bool | None = None) -> list[tuple[str, str, str]]:
    """(colour, form, motion) of every clip there can be: of those that are never trained on, of the
    others, or (None) of all."""
    names = tuple(COLOURS), FORMS, tuple(MOTIONS)
    every = itertools.product(*(enumerate(kind) for kind in names))
    return [
        (colour, form, motion)
        for (i, colour), (j, form), (k, motion) in every
        if form != "circle" or motion not in TURNING
        if held_out is None or ((i + 2 * j + 3 * k) % 7 == 0) == held_out
    ]


def draw_scene(random: np.random.Generator, colour: str, form: str, motion: str) -> Scene:
    """A scene of these, with everything else at random."""
    shape = _shape(random, colour, form)
    article, phrase = (str(random.choice(words)) for words in (("the", "a"), MOTIONS[motion]))
    second = None
    if random.random() < SECOND:
        other = str(random.choice([name for name in COLOURS if name != colour]))
        second = _shape(random, other, str(random.choice(FORMS)))
        corners = np.array([[12, 12], [52, 12], [12, 52], [52, 52]], float)
        far = corners[np.argsort(-np.linalg.norm(corners - shape.centre, axis=1))[:2]]
        second = second._replace(centre=far[random.integers(2)], radius=random.uniform(5, 7))
    background = random.uniform(0.05, 0.45, (2, 3))
    prompt = f"{article} {colour} {form} {phrase}"
    return Scene(prompt, shape, motion, random.uniform(0.9, 1.1), background, second)


def _shape(random: np.random.Generator, colour: str, form: str) -> Shape:
    rgb = np.clip(np.array(COLOURS[colour]) + random.uniform(-0.04, 0.04, 3), 0, 1)
    angle = 0.0 if form == "circle" else random.uniform(-0.25, 0.25)
    return Shape(form, rgb, random.uniform(24, 40, 2), random.uniform(7, 10), angle)


def render(scene: Scene) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a scene."""
    return np.stack([_frame(scene, time) for time in np.linspace(0, 1, FRAMES)])


def background(scene: Scene) -> Float[np.ndarray, "h w 3"]:
    """What lies behind the shapes, in [0, 1]."""
    top, bottom = scene.background
    rows = np.linspace(0, 1, SIZE)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * rows, (SIZE, SIZE, 3))


def _frame(scene: Scene, time: float) -> UInt8[np.ndarray, "h w 3"]:
    image = background(scene)
    for shape in filter(None, (scene.second, _moved(scene, time * scene.speed))):
        cover = np.clip(0.5 - _distance(shape), 0, 1)[..., None]  # edges are one pixel wide
        image = image * (1 - cover) + shape.colour * cover
    return np.rint(image * 255).astype(np.uint8)


def _moved(scene: Scene, part: float) -> Shape:
    """The shape after this part of its motion."""
    shape, motion, turn = scene.shape, scene.motion, 2 * np.pi * part
    ways = {way: WAY * part * np.array(direction) for way, direction in DIRECTIONS.items()}
    ways |= {
        "circles": ORBIT * np.array([np.cos(turn) - 1, np.sin(turn)]),
        "bounces": np.array([0, -HOP * abs(np.sin(turn))]),
    }
    angles = {"spins": TURN * part, "wobbles": SWING * np.sin(2 * turn)}
    return shape._replace(
        centre=shape.centre + ways.get(motion, 0.0),
        radius=shape.radius * FACTORS.get(motion, 1.0) ** part,
        angle=shape.angle + np.radians(angles.get(motion, 0.0)),
    )


def _distance(shape: Shape) -> Float[np.ndarray, "h w"]:
    """Of every pixel from the shape's edge, negative inside."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    x, y = x - shape.centre[0], y - shape.centre[1]
    if shape.form == "circle":
        return np.hypot(x, y) - shape.radius
    # Regular polygons: the largest distance from the lines of their sides.
    sides, inner, first = {
        "square": (4, 0.9 * shape.radius, 0.0),
        "triangle": (3, 0.625 * shape.radius, np.pi / 2),  # half of the circumradius; apex up
    }[shape.form]
    angles = shape.angle + first + 2 * np.pi * np.arange(sides) / sides
    away = (x * np.cos(angle) + y * np.sin(angle) - inner for angle in angles)
    return np.maximum.reduce([*away])


def write_clips(folder: Path, motions: Sequence[str], clips: int, seed: int) -> None:
    """Writes clips of these motions in turn, of combinations that are trained on, with captions
    beside them; a motion that is named twice has twice the share. Raises ValueError for a folder
    that is not new or empty, OSError where a file can't be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty: got {folder}")
    folder.mkdir(exist_ok=True)
    kinds = {motion: [c for c in combinations(False) if c[2] == motion] for motion in motions}
    for number, motion in zip(range(clips), itertools.cycle(motions)):
        random = np.random.default_rng([seed, number])
        scene = draw_scene(random, *kinds[motion][random.integers(len(kinds[motion]))])
        _write_clip(folder / f"{number:05d}.mp4", render(scene))
        (folder / f"{number:05d}.txt").write_text(f"{scene.prompt}\n", encoding="utf-8")


def _write_clip(path: Path, frames: UInt8[np.ndarray, "f h w 3"]) -> None:
    """Writes lossless H.264 of RGB."""
    import av

    with replace_when_done(path) as part, av.open(str(part), "w", format="mp4") as file:
        stream: Any = file.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


@printing
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 could not be done, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m cogi2v_jax.training.shapes",
        description="Draws clips of shapes with captions, to try training with.",
    )
    count: dict[str, Any] = {"metavar": "N", "type": int}
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument(
        "--motions", nargs="+", choices=MOTIONS, default=[*TRAINED], metavar="NAME",
        help=f"of {', '.join(MOTIONS)} (default: the first {len(TRAINED)})",
    )  # fmt: skip
    parser.add_argument("--clips", **count, default=300, help="how many (default: 300)")
    parser.add_argument("--seed", **count, default=0)
    options = parser.parse_args(arguments)
    try:
        write_clips(options.folder, options.motions, options.clips, options.seed)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"cogi2v: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {options.clips} clips of {FRAMES} frames of {SIZE}x{SIZE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
