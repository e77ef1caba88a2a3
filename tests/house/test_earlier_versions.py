"""Files that version 0.1.0 wrote before its folders were laid out anew, on one CPU device: a
converted folder with int8 blocks, a video with its recipe, and its latents."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from cogi2v_convert.__main__ import main as convert
from recipes import read_recipe
from tolerances import assert_close

import cogi2v_jax
from cogi2v_jax import Request
from cogi2v_jax.media import videos
from cogi2v_jax.media.recipe import read_latents
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import main as sample
from cogi2v_jax.settings import NEUTRAL, SETTINGS

ARCHIVE = Path(__file__).parents[1] / "data" / "version-0.1.0.tar.xz"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_recipe_and_its_converted_folder_make_its_latents_again(files: Path) -> None:
    recipe = read_recipe(files / "video.mp4")
    latents, beside = read_latents(files / "video.latents.safetensors")
    assert beside == recipe
    models = cogi2v_jax.load(files / "folder", recipe["dtype"], recipe["attention"])
    older = set(SETTINGS) - set(NEUTRAL)  # the others came later
    asked = {name: recipe[name] for name in ("prompt", "negative_prompt", "seed", *older)}
    made = cogi2v_jax.generate(models, Request(files / recipe["image"], **asked))
    assert_close(made.latents, latents, 1e-5)


def test_its_latents_are_decoded_to_its_video(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "SMALL", 0)  # it wrote all sizes at one quality
    latents, folder = str(files / "video.latents.safetensors"), str(files / "folder")
    for output in (tmp_path / "again.mp4", tmp_path / "again.png"):
        arguments = ["--decode_latents", latents, "--model", folder, "--output", str(output)]
        assert sample(arguments) == 0
    output = tmp_path / "again.mp4"
    ours, theirs, exact = (
        read_frames(path).astype(int) for path in (output, files / "video.mp4", tmp_path / "again")
    )
    assert ours.shape == theirs.shape == (9, 32, 48, 3)
    # Of these noisy frames the codec loses 43 levels, root mean square. A single value that rounds
    # the other way changes 17 levels nearby.
    loss, difference = (np.square(frames - theirs).mean() ** 0.5 for frames in (exact, ours))
    assert difference <= 0.05 * loss
    assert read_recipe(output) == read_recipe(files / "video.mp4")


def test_its_converted_folder_agrees_with_its_manifest(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(["check", str(files / "folder")]) == 0
    assert convert(["inspect", str(files / "folder")]) == 0
    assert "int8" in capsys.readouterr().out


def test_its_converted_folder_is_given_back_to_pytorch(files: Path, tmp_path: Path) -> None:
    assert convert(["to-torch", str(files / "folder"), str(tmp_path / "torch")]) == 0
    assert (tmp_path / "torch" / "transformer" / "config.json").is_file()
