"""Sampling with weights as they are in training."""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cogi2v_convert.conversion import to_flax
from footage import library
from recipes import read_recipe
from tolerances import TOLERANCE, assert_close, relative_error

import cogi2v_jax
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import EXAMPLE_IMAGE
from cogi2v_jax.training.clips import Bucket, list_clips
from cogi2v_jax.training.output import write_output
from cogi2v_jax.training.preparation import prepare
from cogi2v_jax.training.run import Run
from cogi2v_jax.training.validation import Validation, with_leaves

FIRST = pytest.mark.parametrize("family", ["1.0"], indirect=True)


def quiet(*_: Any, **__: Any) -> None:
    pass


def changed(run: Run) -> Any:
    """Trained leaves that are all other ones."""
    rng = np.random.default_rng(0)
    leaves = run.begin().leaves
    return {n: leaf + 0.05 * rng.normal(size=leaf.shape) for n, leaf in leaves.items()}


def write(run: Run, leaves: Any, folder: Path) -> None:
    """Writes the result of a run as if these leaves had been trained."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 1.0}\n')
    write_output(run, leaves, folder, quiet)


def request(**settings: Any) -> cogi2v_jax.Request:
    return cogi2v_jax.Request(
        EXAMPLE_IMAGE, "the red circle", num_frames=9, num_inference_steps=2, **settings
    )


@FIRST
@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "vae"))],
)
def test_a_video_in_training_is_that_of_the_weights_that_are_written(
    studio: Any, method: str, tmp_path: Path
) -> None:
    run = Run(studio.recipe(tmp_path / "out", method=method), quiet)
    leaves = changed(run)
    ours = cogi2v_jax.generate(with_leaves(run, leaves, "x"), request())
    base = cogi2v_jax.generate(run.models, request())
    write(run, leaves, tmp_path / "out")
    if method == "lora":
        written = cogi2v_jax.load(studio.model, "float32", loras=[tmp_path / "out"], say=quiet)
    else:
        written = cogi2v_jax.load(tmp_path / "out" / "model", "float32")
    theirs = cogi2v_jax.generate(written, request())
    assert_close(ours.latents, theirs.latents, TOLERANCE["latents"])
    assert (np.abs(ours.video.astype(int) - theirs.video) <= 1).all()
    assert np.abs(ours.video.astype(int) - base.video).max() > 1


@pytest.mark.slow
@FIRST
def test_a_lora_on_int8_weights_is_sampled_in_training_as_after_it(
    studio: Any, tmp_path: Path
) -> None:
    model = Path(to_flax(studio.model, tmp_path / "int8", "int8"))
    clips = list_clips(library(tmp_path / "clips", 4, height=48, width=80))
    data, bucket = tmp_path / "data", [Bucket(9, 48, 80)]
    prepare(cogi2v_jax.load(model, "float32", say=quiet), clips, data, bucket, 8.0)
    recipe = studio.recipe(tmp_path / "out")
    run = Run(dataclasses.replace(recipe, model=str(model), data=str(data)), quiet)
    leaves = changed(run)
    ours = cogi2v_jax.generate(with_leaves(run, leaves, "x"), request())
    write(run, leaves, tmp_path / "out")
    written = cogi2v_jax.load(model, "float32", loras=[tmp_path / "out"], say=quiet)
    theirs = cogi2v_jax.generate(written, request())
    assert_close(ours.latents, theirs.latents, TOLERANCE["latents"])
    base = cogi2v_jax.generate(run.models, request())
    assert relative_error(ours.latents, base.latents) > 0.01


@FIRST
def test_a_batch_file_becomes_videos_of_its_steps(studio: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    data = "data:;base64," + base64.b64encode(EXAMPLE_IMAGE.read_bytes()).decode()
    rows.write_text(f'prompt,image,seed\nthe red circle,"{data}",3\na,{EXAMPLE_IMAGE},\n')
    keys = {"validation": str(rows), "validate_every": 2, "image_latent_scale": "trainer"}
    run = Run(studio.recipe(tmp_path, **keys), quiet)
    validation = Validation(run, tmp_path)
    assert [step for step in range(1, 7) if validation.is_due(step)] == [2, 4, 6]
    validation.rows = validation.rows[:1]
    validation.generate(2, run.begin().leaves)
    assert not run.models.loaded
    (video,) = (tmp_path / "validation").iterdir()
    assert video.name == "000002-0.mp4"
    assert read_recipe(video)["image_latent_scale"] == "trainer"
    assert read_frames(video).shape == (17, 48, 80, 3)


@FIRST
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (f",{EXAMPLE_IMAGE}", "line 3: it must have a prompt and an image"),
        ("the red circle,no-such.png", "no-such.png"),
        (f"{'the ' * 40}circle,{EXAMPLE_IMAGE}", "prompt must be at most 12 tokens"),
    ],
    ids=["no prompt", "no picture", "too long"],
)
def test_a_wrong_batch_file_is_refused_before_training(
    studio: Any, row: str, said: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"prompt,image\nthe red circle,{EXAMPLE_IMAGE}\n{row}\n")
    run = Run(studio.recipe(tmp_path, validation=str(rows), validate_every=2), quiet)
    with pytest.raises((ValueError, OSError), match=said):
        Validation(run, tmp_path)


@FIRST
def test_a_lora_starts_where_the_file_of_another_run_ended(studio: Any, tmp_path: Path) -> None:
    earlier = Run(studio.recipe(tmp_path / "out", targets=("attention", "text_in")), quiet)
    leaves = changed(earlier)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    write_output(earlier, leaves, tmp_path / "out", quiet)
    keys = {"targets": ("text_in", "attention"), "init": str(tmp_path / "out"), "alpha": 12.0}
    begun = Run(studio.recipe(tmp_path, **keys), quiet).begin().leaves
    assert begun.keys() == leaves.keys()
    for name in (name.removesuffix("down") for name in leaves if name.endswith("down")):
        before, after = (
            alpha * each[f"{name}down"] @ each[f"{name}up"]
            for alpha, each in ((6, leaves), (12, begun))
        )
        assert relative_error(after, before) <= TOLERANCE["module"]
    for wrong in ({"rank": 4}, {"targets": ("attention", "mlp")}, {"targets": ("attention",)}):
        with pytest.raises(ValueError, match="init must have"):
            Run(studio.recipe(tmp_path, **{**keys, **wrong}), quiet).begin()
