"""The embedded model does what its prompts say, by few of the scenes of benchmarks/adherence.py,
with the controls: without them a model that ignores its prompts could pass. And the example LoRA
adds a motion, here and in diffusers."""

from typing import Any

import numpy as np
import pytest
import torch
from adherence import CONTROLS, Made, held_out, make, share
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image
from tracking import follows, nearest_motion, psnr

import cogi2v_jax
from cogi2v_jax.names import ASSETS, EXAMPLE_LORA
from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene
from cogi2v_jax.weights.checkpoint import Models

QUICK = {"num_inference_steps": 12}
MOTIONS = ["left", "right", "up", "down", "grows", "shrinks", "still"]


@pytest.fixture(scope="module")
def models() -> Models:
    return cogi2v_jax.load("cogi2v-tiny", "float32")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """One of each motion, with one shape."""
    drawn = (held_out([motion], 9) for motion in MOTIONS)
    return [next(scene for scene in each if not scene.second) for each in drawn]


@pytest.fixture(scope="module")
def made(models: Models, scenes: list[Scene]) -> dict[str, list[Made]]:
    """Videos of the scenes and, by the control's name, of the changed ones: one batch."""
    asked = {"": scenes} | {what: control.scenes(scenes)[::2] for what, control in CONTROLS.items()}
    videos = iter(make(models, [scene for each in asked.values() for scene in each], QUICK))
    return {what: [next(videos) for _ in each] for what, each in asked.items()}


def test_shapes_do_what_their_prompts_say(made: dict[str, list[Made]]) -> None:
    done = [follows(video, scene) for scene, video in made[""]]
    assert sum(done) >= len(done) - 1, [scene.prompt for scene, _ in made[""]]
    for scene, video in made[""]:
        assert nearest_motion(video, scene) == scene.motion
        assert psnr(video[0], shapes.render(scene)[0]) > 35


@pytest.mark.parametrize("what", CONTROLS)
def test_the_controls_pass(what: str, made: dict[str, list[Made]]) -> None:
    assert share(CONTROLS[what], made[what]) == 1.0


@pytest.fixture(scope="module")
def circles() -> list[Scene]:
    return held_out(["circles"], 8)


def test_the_example_lora_makes_circles_and_leaves_the_other_motions(
    scenes: list[Scene], circles: list[Scene]
) -> None:
    models = cogi2v_jax.load("cogi2v-tiny", "float32", loras=EXAMPLE_LORA)
    made = make(models, [*circles, *scenes], QUICK)
    done = [follows(video, scene) for scene, video in made]
    assert sum(done[: len(circles)]) >= 7
    assert all(done[len(circles) :])


def test_without_it_nothing_circles(models: Models, circles: list[Scene]) -> None:
    assert not any(follows(video, scene) for scene, video in make(models, circles, QUICK))


@pytest.mark.slow
def test_the_example_lora_makes_circles_in_diffusers(circles: list[Scene]) -> None:
    pipeline: Any = CogVideoXImageToVideoPipeline.from_pretrained(
        ASSETS / "cogi2v-tiny", torch_dtype=torch.float32
    )
    pipeline.load_lora_weights(ASSETS / EXAMPLE_LORA)
    videos = pipeline(
        [Image.fromarray(shapes.render(scene)[0]) for scene in circles],
        [scene.prompt for scene in circles],
        height=shapes.SIZE,
        width=shapes.SIZE,
        num_frames=shapes.FRAMES,
        guidance_scale=2.0,
        max_sequence_length=10,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        **QUICK,
    ).frames
    made = [np.rint(video * 255).astype(np.uint8) for video in videos]
    assert sum(map(follows, made, circles)) >= 7
