"""The embedded model does what its prompts say, by few of the scenes of benchmarks/adherence.py,
with the controls: without them a model that ignores its prompts could pass."""

import pytest
from adherence import CONTROLS, Made, held_out, make, share
from tracking import follows, nearest_motion, psnr

import cogi2v_jax
from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene

QUICK = {"num_inference_steps": 12}
MOTIONS = ["left", "right", "up", "down", "grows", "shrinks", "still"]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """One of each motion, with one shape."""
    drawn = (held_out([motion], 9) for motion in MOTIONS)
    return [next(scene for scene in each if not scene.second) for each in drawn]


@pytest.fixture(scope="module")
def made(scenes: list[Scene]) -> dict[str, list[Made]]:
    """Videos of the scenes and, by the control's name, of the changed ones: one batch."""
    models = cogi2v_jax.load("cogi2v-tiny", "float32")
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
