"""A user's noise: which files are taken, and what they become."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes import read_recipe

import cogi2v_jax
from cogi2v_jax import Noise, Request
from cogi2v_jax.disk import sha256
from cogi2v_jax.media.noise_file import read_noise
from cogi2v_jax.media.recipe import read_latents
from cogi2v_jax.names import ASSETS
from cogi2v_jax.request import LatentShape
from cogi2v_jax.sample import main

PLAIN = LatentShape(5, 6, 8, 4, 0)
PADDED = LatentShape(6, 6, 8, 4, 1)
FRAMES = 17


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def read(tmp_path: Path, array: Any, shape: LatentShape = PLAIN) -> np.ndarray:
    np.save(tmp_path / "noise.npy", array)
    return read_noise(tmp_path / "noise.npy", shape, FRAMES)


def test_latents_are_taken_in_both_layouts_and_of_frames_every_fourth(tmp_path: Path) -> None:
    own, frames = noise(5, 6, 8, 4), noise(17, 6, 8, 4)
    for given in (own, own[None], np.moveaxis(own, -1, 1), own.astype(np.float64)):
        np.testing.assert_array_equal(read(tmp_path, given), own[None])
    for given in (frames, np.moveaxis(frames, -1, 1)):
        np.testing.assert_array_equal(read(tmp_path, given), frames[None, ::4])


def test_padding_gets_noise_of_its_own(tmp_path: Path) -> None:
    own = noise(5, 6, 8, 4)
    found = read(tmp_path, own, PADDED)
    np.testing.assert_array_equal(found[0, 1:], own)
    assert 0.8 < found[0, 0].std() < 1.2
    np.testing.assert_array_equal(found, read(tmp_path, own, PADDED))
    whole = noise(6, 6, 8, 4)
    np.testing.assert_array_equal(read(tmp_path, whole, PADDED), whole[None])


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (
            noise(4, 6, 8, 4),
            r"shape \[5 or 17 6 8 4\], or with channels second: got \[4, 6, 8, 4\]",
        ),
        (noise(5, 8, 6, 4), r"got \[5, 8, 6, 4\]"),
        (noise(2, 5, 6, 8, 4), r"got \[2, 5, 6, 8, 4\]"),
        (np.float32(1), r"got \[\]"),
        (3 * noise(5, 6, 8, 4), "deviation 1: got .* and 3.0"),
        (noise(5, 6, 8, 4) + 1, "mean 0 .* got 1.0"),
        (noise(5, 6, 8, 4) * np.nan, "got nan and nan"),
        (np.array(["a"]), "a .npy file of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_noise_of_this_size_is_refused(tmp_path: Path, array: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^noise_file must .*{line}"):
        read(tmp_path, array)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^noise_file must be an existing \.npy file"):
        read_noise(tmp_path / "no.npy", PLAIN, FRAMES)
    np.savez(tmp_path / "two.npz", a=noise(2), b=noise(2))
    (tmp_path / "text.npy").write_text("no numbers")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("two.npz", "text.npy", "empty.npy", "objects.npy"):
        with pytest.raises(ValueError, match=r"^noise_file must be a \.npy file of numbers"):
            read_noise(tmp_path / name, PLAIN, FRAMES)


def test_the_command_starts_from_it_and_the_recipe_names_it(tmp_path: Path, capsys: Any) -> None:
    file, output, given = tmp_path / "noise.npy", tmp_path / "out.gif", noise(3, 16, 16, 16)
    np.save(file, given)
    few = ["--num_inference_steps", "2", "--output", str(output)]
    assert main(["--noise_file", str(file), *few]) == 0
    latents, recipe = read_latents(output.with_suffix(".latents.safetensors"))
    assert recipe == read_recipe(output)
    assert recipe["noise_file"] == {"file": "noise.npy", "sha256": sha256(file)}
    models = cogi2v_jax.load("cogi2v-tiny")
    request = Request(ASSETS / "example.png", recipe["prompt"], num_inference_steps=2)
    made = cogi2v_jax.generate(models, request, Noise(initial=given[None]))
    np.testing.assert_allclose(latents, made.latents, atol=1e-5)
    assert main(["--noise_file", str(tmp_path / "no.npy"), *few]) == 1
    assert "noise_file must be an existing .npy file" in capsys.readouterr().err
