"""Makes the picture of README: clips of the embedded model side by side, each from a first frame
that is drawn here and its prompt. `python docs/images/make.py`; seconds on two CPU cores."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import cogi2v_jax

SIDE, SCALE, SMOOTH = 64, 3, 8  # pixels of a clip; enlarged so often; drawn so much larger
CLIPS = {
    "the red circle moves right": ("circle", (230, 31, 31), (26, 34)),
    "the yellow square moves up": ("square", (242, 224, 31), (32, 38)),
    "a cyan triangle moves left": ("triangle", (26, 217, 224), (38, 32)),
    "the white circle grows": ("circle", (247, 247, 247), (32, 32)),
}
FILE = Path(__file__).with_name("cogi2v-tiny.webp")


def first_frame(shape: str, colour: tuple[int, int, int], centre: tuple[int, int]) -> Image.Image:
    """One flat shape of radius 8 on a vertical gradient."""
    ramp = np.linspace((25, 30, 60), (70, 55, 80), SIDE * SMOOTH).astype(np.uint8)
    picture = Image.fromarray(np.repeat(ramp[:, None], SIDE * SMOOTH, axis=1))
    (x, y), r = (SMOOTH * at for at in centre), 8 * SMOOTH
    draw = ImageDraw.Draw(picture)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        sides, radius = {"square": (4, 1.27 * r), "triangle": (3, 1.25 * r)}[shape]
        draw.regular_polygon((x, y, radius), sides, fill=colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    images = [first_frame(*drawn) for drawn in CLIPS.values()]
    request = cogi2v_jax.Request(images, [*CLIPS], seed=[42] * len(CLIPS))
    videos = cogi2v_jax.generate(cogi2v_jax.load("cogi2v-tiny"), request).video
    row = np.concatenate(list(videos), axis=2)  # [f h w 3]
    size = SCALE * row.shape[2], SCALE * row.shape[1]
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in row]
    durations = [500, *[125] * (len(frames) - 2), 900]  # milliseconds
    more = {"append_images": frames[1:], "duration": durations, "loop": 0, "quality": 85}
    frames[0].save(FILE, save_all=True, **more)


if __name__ == "__main__":
    main()
