"""What motion, kinds of guidance and samplers do to the videos of the embedded model: the tables of
docs/craft.md.

    python benchmarks/craft.py [--model NAME] [--scenes N] [--tables guidance samplers drift]
        [--write]

On the held-out scenes of `adherence.py`, which says what the columns are; `moved` is how far the
named shape's centre goes from the first to the last frame, in pixels, where the prompt says left,
right, up or down. `error` of a sampler without noise is the root mean square difference of its
latents from those of 1,000 steps of DDIM, as a share of these, with the same noise and guidance."""

import argparse
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from adherence import Made, figures, held_out, make
from tracking import tracks
from vs_reference import align, replace_tables

import cogi2v_jax
from cogi2v_jax import Request
from cogi2v_jax.sampling.samplers import SAMPLERS
from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene

PAGE = Path(__file__).parent.parent / "docs" / "craft.md"
COLUMNS = ("follows", "moved", "first", "clip", "colour")
MOVES = ("left", "right", "up", "down")
EXACT = 1000  # steps of DDIM that count as the trajectory itself
STEPS = (8, 10, 15, 20, 30, 50)
SEGMENTS = 5
HIGH = {"guidance_scale": 6.0}
GUIDANCE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "motion 0.5": {"motion": 0.5},
    "motion 1": {"motion": 1.0},
    **{f"image guidance {x}": {"image_guidance": x} for x in (1.25, 1.5, 2.0)},
    **{f"guidance {x}": {"guidance_scale": x} for x in (1.25, 1.5, 3.0)},
    **{
        f"guidance {x}, apg": {"guidance_scale": x, "guidance_method": "apg"}
        for x in (1.5, 2.0, 3.0)
    },
    **{
        f"guidance {x}, cfg_zero": {"guidance_scale": x, "guidance_method": "cfg_zero"}
        for x in (1.5, 2.0, 3.0)
    },
    "guidance 3 in the first half of the steps": {
        "guidance_scale": 3.0,
        "guidance_interval": (0.0, 0.5),
    },
    "guidance 2 in the first half of the steps": {"guidance_interval": (0.0, 0.5)},
    "guidance 6": HIGH,
    "guidance 6 in the first half of the steps": HIGH | {"guidance_interval": (0.0, 0.5)},
    "guidance 6 in the second half": HIGH | {"guidance_interval": (0.5, 1.0)},
    "guidance 6, apg": HIGH | {"guidance_method": "apg"},
    "guidance 6, cfg_zero": HIGH | {"guidance_method": "cfg_zero"},
    "guidance 6, motion 1": HIGH | {"motion": 1.0},
}


def moved(made: Sequence[Made]) -> float:
    """Pixels, where shapes move in a straight line."""
    ways = []
    for scene, video in made:
        if scene.motion in MOVES:
            ways.append(np.linalg.norm(tracks(video, scene)[0].way))
    return float(np.mean(ways))


def guidance_rows(models: Any, scenes: Sequence[Scene]) -> Iterator[list[str]]:
    yield ["", *COLUMNS]
    for name, settings in GUIDANCE.items():
        made = make(models, scenes, settings)
        row = figures(made, exact=False) | {"moved": moved(made)}
        yield [name, *(f"{row[column]:.{1 if row[column] > 1 else 3}f}" for column in COLUMNS)]


def sampler_rows(models: Any, scenes: Sequence[Scene]) -> Iterator[list[str]]:
    def latents(scheduler: str, steps: int) -> tuple[np.ndarray, list[Made]]:
        kept: list[np.ndarray] = []
        settings = {"scheduler": scheduler, "num_inference_steps": steps}
        made = make(models, scenes, settings, lambda latents, _: kept.append(latents))
        return np.concatenate(kept), made

    exact, _ = latents("ddim", EXACT)
    shown = "error", "clip", "follows"
    yield ["steps", *(f"{name}: {what}" for name in SAMPLERS for what in shown)]
    for steps in STEPS:
        cells = [str(steps)]
        for name in SAMPLERS:
            found, made = latents(name, steps)
            error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
            cells.append("" if name == "dpm" else f"{error:.3f}")  # which adds noise
            row = figures(made, exact=False)
            cells += [f"{row['clip']:.1f}", f"{row['follows']:.2f}"]
        yield cells


def drift_rows(models: Any, scenes: Sequence[Scene]) -> Iterator[list[str]]:
    """Of videos of five segments whose shapes stay still, with and without matched colours."""
    images = [shapes.render(scene)[0] for scene in scenes]
    names = ("bright", "colour", "sharp")
    ways = {"matched": True, "as they come": False}
    yield ["segment", *(f"{way}: {name}" for way in ways for name in names)]
    columns = []
    for match_colour in ways.values():
        request = Request(
            images,
            [scene.prompt for scene in scenes],
            seed=[42] * len(scenes),
            extend=SEGMENTS - 1,
            match_colour=match_colour,
        )
        video = cogi2v_jax.generate(models, request).video.astype(float)
        parts = np.array_split(video[:, 1:], SEGMENTS, axis=1)
        given = looks(np.stack(images)[:, None].astype(float))
        columns.append([looks(part) / given for part in parts])
    for number, rows in enumerate(zip(*columns, strict=True), 1):
        yield [str(number), *(f"{value:.3f}" for row in rows for value in row)]


def looks(video: np.ndarray) -> np.ndarray:
    """The mean, the mean distance of channels from grey, and the mean difference of neighbours in
    a row."""
    grey = video.mean(-1, keepdims=True)
    steps = np.abs(np.diff(video, axis=3)).mean()
    return np.array([video.mean(), np.abs(video - grey).mean(), steps])


TABLES = {"guidance": guidance_rows, "samplers": sampler_rows, "drift": drift_rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = "the embedded model, or a folder with its words (default: cogi2v-tiny)"
    parser.add_argument("--model", default="cogi2v-tiny", help=model)
    parser.add_argument("--scenes", type=int, default=2, help="of every motion (default: 2)")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES])
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    scenes = held_out([*shapes.TRAINED], options.scenes)
    models = cogi2v_jax.load(options.model, "float32")
    for name in options.tables:
        used = scenes
        if name == "drift":
            used = [scene for scene in scenes if scene.motion == "still"]
        about = f"{len(used)} scenes, on a CPU, float32, jax {version('jax')}."
        cells = []
        for row in TABLES[name](models, used):
            cells.append(row)
            print(*row, sep=" | ", flush=True)
        if options.write:
            text = f"{align(cells, markdown=True)}\n\n{about}"
            replace_tables(PAGE, f"benchmarks/craft.py --tables {name}", text)


if __name__ == "__main__":
    main()
