"""How well a model of flat shapes does what its prompts say, on scenes it was never trained on.

    python benchmarks/adherence.py [--model NAME] [--lora_path FILE[:WEIGHT]] [--motions NAME ...]
        [--scenes N] [--sheet FILE] [--json FILE] and the settings of `python -m cogi2v_jax.sample`

For every motion it draws N scenes of held-out combinations of colour, shape and motion, makes a
video of each from its first frame and its prompt, and follows the shapes (`tracking.py`):

    follows   the shape does what the prompt says, by thresholds on its track
    nearest   of the clips drawn with every motion, the right one is nearest to the video
    first     PSNR of the first frame against the picture given, dB
    clip      PSNR of the video against the clip drawn at the mean speed, dB
    colour    the shape's error of colour in the last frame, from 0 to 1
    two       of the scenes with two shapes: the named one follows and the other one rests

and three controls, on some of the scenes: the opposite prompt must turn the motion round, an empty
prompt must not pass for one that names a motion, and another picture must bring its colour along.
`--reconstruct` measures the VAE alone: the clip itself, encoded and decoded, is the video, and
`object` is the PSNR of the pixels that a shape covers in some frame."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tracking import (
    Frames,
    colour_error,
    follows,
    nearest_motion,
    psnr,
    rests,
    tracks,
)

import cogi2v_jax
from cogi2v_jax.arguments import Listed, add_settings
from cogi2v_jax.settings import SETTINGS
from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene

SEED = 2026
TOGETHER = 16  # videos of one batch
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
OPPOSITE |= {"grows": "shrinks", "shrinks": "grows"}
NAMING = [*OPPOSITE, "spins"]  # motions that an empty prompt must not make


class Made(NamedTuple):
    """A scene and the video that was made of it."""

    scene: Scene
    video: Frames


def held_out(motions: Sequence[str], scenes: int) -> list[Scene]:
    """So many scenes of every motion, of combinations that are never trained on."""
    drawn = []
    for motion in motions:
        kinds = [kind for kind in shapes.combinations(True) if kind[2] == motion]
        for number in range(scenes):
            random = np.random.default_rng([SEED, [*shapes.MOTIONS].index(motion), number])
            drawn.append(shapes.draw_scene(random, *kinds[number % len(kinds)]))
    return drawn


def make(
    models: Any,
    scenes: Sequence[Scene],
    settings: dict[str, Any],
    on_latents: Callable[..., Any] | None = None,
) -> list[Made]:
    """Videos of the scenes' first frames and prompts; the seed is the number of the scene.
    `on_latents` is that of `generate`."""
    made = []
    for first in range(0, len(scenes), TOGETHER):
        batch = scenes[first : first + TOGETHER]
        request = cogi2v_jax.Request(
            image=[shapes.render(scene)[0] for scene in batch],
            prompt=[scene.prompt for scene in batch],
            seed=[*range(first, first + len(batch))],
            **settings,
        )
        made += map(Made, batch, cogi2v_jax.generate(models, request, on_latents=on_latents).video)
        print(f"\r{len(made)} of {len(scenes)} videos", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return made


def reconstruct(models: Any, scenes: Sequence[Scene]) -> list[Made]:
    """The scenes' own clips through the VAE, of the mean of the posterior."""
    import jax

    from cogi2v_jax.models.vae import posterior

    vae = models.piece("vae")
    through = jax.jit(lambda vae, clip: vae.decode(posterior(vae.encode(clip))[0]))
    made = []
    for scene in scenes:
        clip = shapes.render(scene)[None].astype(np.float32) / 127.5 - 1
        video = np.asarray(through(vae, clip.astype(vae.dtype)), np.float32)[0]
        made.append(Made(scene, np.rint((video.clip(-1, 1) + 1) * 127.5).astype(np.uint8)))
    return made


def figures(made: Sequence[Made], exact: bool) -> dict[str, float]:
    """Means over videos. The truth is drawn at the mean speed, which the picture and the prompt
    don't tell, or at the scene's own where the clip itself was given (`exact`)."""
    rows: dict[str, list[float]] = {}
    for scene, video in made:
        truth = shapes.render(scene if exact else scene._replace(speed=1.0))
        others = tracks(video, scene)[1:]
        found = {
            "follows": follows(video, scene),
            "nearest": nearest_motion(video, scene) == scene.motion,
            "first": psnr(video[0], truth[0]),
            "clip": psnr(video, truth),
            "colour": colour_error(video, scene),
        }
        if others:
            found["two"] = found["follows"] and rests(others[0])
        if exact:
            covered = np.any([track.mask for track in tracks(truth, scene)], axis=(0, 1))
            found["object"] = psnr(video[:, covered], truth[:, covered])
        for name, value in found.items():
            rows.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in rows.items()}


class Control(NamedTuple):
    """A change of scenes with these motions, and whether a video of a changed scene is right."""

    motions: Sequence[str]
    change: Callable[[Scene], Scene]
    passes: Callable[[Frames, Scene], bool]

    def scenes(self, scenes: Sequence[Scene]) -> list[Scene]:
        """At most about TOGETHER of these, changed: of one shape, which nothing else resembles."""
        alone = [scene for scene in scenes if scene.motion in self.motions and not scene.second]
        return [self.change(scene) for scene in alone[:: max(1, len(alone) // TOGETHER)]]


def turned_round(scene: Scene) -> Scene:
    """With the opposite prompt."""
    motion = OPPOSITE[scene.motion]
    name = " ".join(scene.prompt.split()[:3])
    return scene._replace(prompt=f"{name} {shapes.MOTIONS[motion][0]}", motion=motion)


def recoloured(scene: Scene) -> Scene:
    """With a picture of another colour than the prompt says: the picture decides."""
    names = [*shapes.COLOURS]
    at = names.index(scene.prompt.split()[1])
    colour = np.array(shapes.COLOURS[names[(at + 3) % len(names)]])
    return scene._replace(shape=scene.shape._replace(colour=colour))


CONTROLS = {
    "the opposite prompt turns the motion round": Control([*OPPOSITE], turned_round, follows),
    "an empty prompt does not pass": Control(
        NAMING,
        lambda scene: scene._replace(prompt=""),
        lambda video, scene: not follows(video, scene),
    ),
    "another picture brings its colour": Control(
        [*OPPOSITE], recoloured, lambda video, scene: colour_error(video, scene) < 0.1
    ),
}


def share(control: Control, made: Sequence[Made]) -> float:
    """Of the videos of changed scenes, those that are right."""
    return float(np.mean([control.passes(video, scene) for scene, video in made]))


def sheet(made: Sequence[Made], path: Path, scale: int = 2) -> None:
    """A row for each video: the picture given, five frames, and the prompt above them."""
    side, gap, caption = shapes.SIZE * scale, 4, 16
    shown = [0, 2, 4, 6, 8]
    width = (side + gap) * (len(shown) + 1)
    page = Image.new("RGB", (width, (side + caption + gap) * len(made)), "white")
    draw = ImageDraw.Draw(page)
    for row, (scene, video) in enumerate(made):
        top = row * (side + caption + gap)
        draw.text((2, top + 2), scene.prompt, fill="black")
        for column, frame in enumerate([shapes.render(scene)[0], *video[shown]]):
            picture = Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)
            page.paste(picture, (column * (side + gap), top + caption))
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cogi2v-tiny")
    parser.add_argument("--dtype")
    parser.add_argument("--lora_path", action="append", default=[])
    parser.add_argument(
        "--motions", nargs="+", choices=shapes.MOTIONS, default=[*shapes.TRAINED], metavar="NAME"
    )
    parser.add_argument("--scenes", type=int, default=24, help="of every motion (default: 24)")
    parser.add_argument("--reconstruct", action="store_true", help="the VAE alone")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--sheet", type=Path, help="a page of pictures, of three scenes a motion")
    parser.add_argument("--json", type=Path)
    add_settings(parser)
    Listed(parser, "beyond the reference", 98).add_settings()
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in SETTINGS}
    models = cogi2v_jax.load(options.model, options.dtype, loras=options.lora_path)
    scenes = held_out(options.motions, options.scenes)
    exact = options.reconstruct
    made = reconstruct(models, scenes) if exact else make(models, scenes, settings)
    rows = {
        motion: figures([one for one in made if one.scene.motion == motion], exact)
        for motion in options.motions
    }
    rows["all"] = figures(made, exact)
    names = list(rows["all"])
    print(f"{'':10}" + "".join(f"{name:>9}" for name in names))
    for motion, row in rows.items():
        values = (row.get(name, float("nan")) for name in names)
        print(f"{motion:10}" + "".join(f"{value:9.3f}" for value in values))
    report: dict[str, Any] = {"model": options.model, "scenes": options.scenes, "figures": rows}
    if options.controls:
        report["controls"] = {
            what: share(control, make(models, control.scenes(scenes), settings))
            for what, control in CONTROLS.items()
        }
        for what, passed in report["controls"].items():
            print(f"{what}: {passed:.2f}")
    if options.sheet:
        every = range(0, len(made), options.scenes)
        sheet([made[at + k] for at in every for k in range(min(3, options.scenes))], options.sheet)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
