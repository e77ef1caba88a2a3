"""The trackers of shapes, on clips whose motion is known: those that the generator draws."""

import numpy as np
import pytest
from adherence import held_out
from tracking import colour_error, follows, nearest_motion, psnr, rests, tracks

from cogi2v_jax.training import shapes
from cogi2v_jax.training.shapes import Scene

SCENES = held_out([*shapes.MOTIONS], 9)


def test_every_clip_as_drawn_does_what_its_prompt_says() -> None:
    for scene in SCENES:
        clip = shapes.render(scene)
        assert follows(clip, scene), scene
        assert nearest_motion(clip, scene) == scene.motion
        assert colour_error(clip, scene) < 0.01
        assert all(map(rests, tracks(clip, scene)[1:]))


@pytest.mark.parametrize("motion", shapes.MOTIONS)
def test_no_clip_of_another_motion_does(motion: str) -> None:
    for scene in SCENES:
        turns = scene.shape.form != "circle" or motion not in shapes.TURNING
        known = motion != "wobbles" or scene.motion != "still"  # the nearest that is trained on
        if scene.motion != motion and turns and known:
            clip = shapes.render(scene._replace(motion=motion))
            assert not follows(clip, scene), (scene, motion)


def test_a_track_is_where_the_shape_was_drawn() -> None:
    for scene in SCENES:
        track, *others = tracks(shapes.render(scene), scene)
        assert np.linalg.norm(track.centre[0] - scene.shape.centre) < 1
        for other, shape in zip(others, filter(None, [scene.second]), strict=True):
            assert np.linalg.norm(other.centre - shape.centre, axis=-1).max() < 1


def test_a_shape_that_is_lost_follows_nothing() -> None:
    for scene in SCENES:
        empty = np.rint(np.stack([shapes.background(scene)] * shapes.FRAMES) * 255)
        clip = shapes.render(scene)
        clip[-1] = empty[-1]
        if scene.motion != "shrinks":  # it becomes smaller indeed, and its centre is not known
            assert not follows(clip, scene)
        assert colour_error(clip, scene) == 1.0


def test_a_second_shape_that_moves_does_not_rest() -> None:
    scene: Scene = next(scene for scene in SCENES if scene.second)
    assert scene.second is not None
    clip = shapes.render(scene)
    moved = scene.second._replace(centre=scene.second.centre + np.array([0, 6.0]))
    clip[-1] = shapes.render(scene._replace(second=moved))[-1]
    assert not rests(tracks(clip, scene)[1])


def test_psnr_is_of_levels_from_0_to_255() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black) == 99.0
    assert psnr(black + np.uint8(255), black) == pytest.approx(0.0)
    assert psnr(black + np.uint8(51), black) == pytest.approx(13.979, abs=1e-3)
