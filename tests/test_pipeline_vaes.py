"""The whole path against the reference pipeline with other VAEs than those of test_pipeline.py."""

from pathlib import Path

import numpy as np
import pytest
import twins
from PIL import Image
from reference import PROMPT, decoded, reference, reference_noise, settings
from tolerances import TOLERANCE, assert_close

import cogi2v_jax
from cogi2v_jax import Request

pytestmark = pytest.mark.slow


@pytest.fixture
def image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_with_three_levels_latents_and_video_are_the_references(
    family: str, scheduler: str, image: Image.Image, tmp_path: Path
) -> None:
    pipe = twins.pipeline(family, block_out_channels=(8, 16, 24))
    pipe.set_progress_bar_config(disable=True)
    shared = settings(family, 4, dynamic=True)
    # As many latents as four levels make of twice the size.
    shared |= {side: shared[side] // 2 for side in ("height", "width")}
    theirs, latents = reference(pipe, scheduler, 7, image, PROMPT, **shared)
    noise = reference_noise(scheduler, 4, tuple(theirs.shape[1:]), seed=7)
    request = Request(image, PROMPT, scheduler=scheduler, fit="stretch", **shared)
    models = cogi2v_jax.load(twins.save(pipe, tmp_path / "three"), "float32")
    ours = cogi2v_jax.generate(models, request, noise)
    assert_close(ours.latents, latents, TOLERANCE["latents"])
    assert ours.video.shape == (1, 17, shared["height"], shared["width"], 3)
    assert np.abs(ours.video - decoded(pipe, latents)).max() <= 1


def test_with_tiles_latents_and_video_are_the_references_with_tiles(
    image: Image.Image, tmp_path: Path
) -> None:
    pipe = twins.pipeline("1.5", sample_height=96, sample_width=160)  # a tile is 48x80
    pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    folder = twins.save(pipe, tmp_path / "tiled")
    shared = settings("1.5", 2, dynamic=False) | {"height": 48, "width": 112, "num_frames": 9}
    theirs, latents = reference(pipe, "ddim", 7, image, PROMPT, **shared)
    noise = reference_noise("ddim", 2, tuple(theirs.shape[1:]), seed=7)
    request = Request(image, PROMPT, scheduler="ddim", fit="stretch", **shared)
    ours = cogi2v_jax.generate(cogi2v_jax.load(folder, "float32", vae_tiling=True), request, noise)
    assert_close(ours.latents, latents, TOLERANCE["latents"])
    assert np.abs(ours.video - decoded(pipe, latents)).max() <= 1
    whole = cogi2v_jax.generate(cogi2v_jax.load(folder, "float32"), request, noise)
    assert np.abs(ours.video.astype(int) - whole.video).max() > 5
