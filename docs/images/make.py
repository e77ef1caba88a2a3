"""Makes the picture of README: a clip of the embedded model for every motion, from a first frame
and a prompt of the first combination of colour, shape and motion that it was never trained on.
`python docs/images/make.py`; seconds on two CPU cores. (The sheet beside it is made by
`python benchmarks/adherence.py --scenes 1 --sheet FILE`.)"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

import cogi2v_jax
from cogi2v_jax.training import shapes

FILE = Path(__file__).with_name("cogi2v-tiny.webp")
SCALE = 2

Video = UInt8[np.ndarray, "f h w 3"]


def draw_scenes() -> list[shapes.Scene]:
    """One of every motion."""
    first = {motion: (colour, form) for colour, form, motion in shapes.combinations(True)[::-1]}
    return [
        shapes.draw_scene(np.random.default_rng(number), *first[motion], motion)
        for number, motion in enumerate(shapes.TRAINED)
    ]


def animate(videos: Sequence[Video], path: Path) -> None:
    """All videos at once, in two rows."""
    half = len(videos) // 2
    rows = [np.concatenate(row, axis=2) for row in (videos[:half], videos[half:])]
    grid = np.concatenate(rows, axis=1)  # [f h w 3]
    size = SCALE * grid.shape[2], SCALE * grid.shape[1]
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in grid]
    durations = [500, *[125] * (len(frames) - 2), 900]  # milliseconds
    more = {"append_images": frames[1:], "duration": durations, "loop": 0, "quality": 85}
    frames[0].save(path, save_all=True, **more)


def main() -> None:
    scenes = draw_scenes()
    images = [shapes.render(scene)[0] for scene in scenes]
    prompts = [scene.prompt for scene in scenes]
    request = cogi2v_jax.Request(images, prompts, seed=[42] * len(scenes))
    videos = list(cogi2v_jax.generate(cogi2v_jax.load("cogi2v-tiny"), request).video)
    animate(videos, FILE)
    print("\n".join(prompts))


if __name__ == "__main__":
    main()
