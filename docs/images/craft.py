"""Makes the pictures of docs/craft.md: what each flag does to one scene of the embedded model, and
a loop. `python docs/images/craft.py`; a minute on two CPU cores."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

import cogi2v_jax
from cogi2v_jax import Request
from cogi2v_jax.sample import EXAMPLE_IMAGE, EXAMPLE_PROMPT
from cogi2v_jax.training import shapes

FOLDER = Path(__file__).parent
SHOWN = 9  # frames of a row
LABEL = 170  # pixels
GAP = 3

Video = UInt8[np.ndarray, "f h w 3"]


def scene_of(colour: str, form: str, motion: str, seed: int) -> shapes.Scene:
    return shapes.draw_scene(np.random.default_rng(seed), colour, form, motion)


def rows() -> dict[str, dict[str, Any]]:
    """Flags as the page writes them, with their settings."""
    first = scene_of("yellow", "square", "right", 3)
    clip = shapes.render(first)
    return {
        "defaults": {},
        "--motion 1": {"motion": 1.0},
        "--noise_aug 0.3": {"noise_aug": 0.3},
        "--end_image (its right end)": {"end_image": clip[-1]},
        "--keyframe 1=FILE": {"keyframes": {1: clip[3]}},
        "--video (down) --strength 0.8": {"video": moved_down(first), "strength": 0.8},
        "--video (down) --strength 0.4": {"video": moved_down(first), "strength": 0.4},
        "--guidance_scale 8": {"guidance_scale": 8.0},
        "  --guidance_method apg": {"guidance_scale": 8.0, "guidance_method": "apg"},
        "  --guidance_method cfg_zero": {"guidance_scale": 8.0, "guidance_method": "cfg_zero"},
        "  --guidance_interval 0:0.5": {"guidance_scale": 8.0, "guidance_interval": (0.0, 0.5)},
        "--image_guidance 2": {"image_guidance": 2.0},
        "--loop": {"loop": True},
        "--extend 1": {"extend": 1},
        "--extend 1 --overlap 5": {"extend": 1, "overlap": 5},
        "--num_frames 17": {"num_frames": 17},
        "--scheduler dpm3m, 8 steps": {"scheduler": "dpm3m", "num_inference_steps": 8},
    }


def moved_down(scene: shapes.Scene) -> Video:
    """The same start with another motion."""
    return shapes.render(scene._replace(motion="down"))


def strip(label: str, video: Video) -> Image.Image:
    """A label and frames at equal distances, the first and the last among them."""
    numbers = np.linspace(0, len(video) - 1, SHOWN).round().astype(int)
    height, width = video.shape[1:3]
    row = Image.new("RGB", (LABEL + SHOWN * (width + GAP), height + GAP), "white")
    ImageDraw.Draw(row).text((4, height // 2 - 6), label, fill="black")
    for place, number in enumerate(numbers):
        row.paste(Image.fromarray(video[number]), (LABEL + place * (width + GAP), 0))
    return row


def main() -> None:
    models = cogi2v_jax.load("cogi2v-tiny")
    scene = scene_of("yellow", "square", "right", 3)
    image = shapes.render(scene)[0]
    strips = []
    for label, settings in rows().items():
        (video,) = cogi2v_jax.generate(models, Request(image, scene.prompt, **settings)).video
        strips.append(strip(label, video))
    sheet = Image.new("RGB", (strips[0].width, sum(row.height for row in strips)), "white")
    for number, row in enumerate(strips):
        sheet.paste(row, (0, number * row.height))
    sheet.save(FOLDER / "craft.png", optimize=True)
    loop = Request(EXAMPLE_IMAGE, EXAMPLE_PROMPT, loop=True)
    (video,) = cogi2v_jax.generate(models, loop).video
    frames = [
        Image.fromarray(frame).resize((192, 192), Image.Resampling.NEAREST) for frame in video
    ]
    more = {"append_images": frames[1:], "duration": 125, "loop": 0, "quality": 85}
    frames[0].save(FOLDER / "craft-loop.webp", save_all=True, **more)


if __name__ == "__main__":
    main()
