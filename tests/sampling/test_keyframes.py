"""Pictures for other latent frames than the first: where their latents go, and what is refused; and
noise on the first one."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twins
from PIL import Image
from recipes import read_recipe
from tolerances import assert_close

import cogi2v_jax
from cogi2v_jax import Models, Request, pipeline
from cogi2v_jax.disk import sha256
from cogi2v_jax.names import ASSETS
from cogi2v_jax.sample import main
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.noise import KEYFRAMES, draw
from cogi2v_jax.sampling.programs import Session

EXAMPLE = ASSETS / "example.png"
PROMPT = "the cyan triangle stays still"


@pytest.fixture(scope="module")
def models(pipe: Any, family: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = twins.save(pipe, tmp_path_factory.mktemp("source") / family)
    return cogi2v_jax.load(folder, dtype="float32")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The latents of the image that each loop gets."""
    images: list[np.ndarray] = []
    call = Session.__call__

    def record(self: Session, function: Any, *args: Any, **static: Any) -> Any:
        if function is stages.denoise:
            images.append(np.asarray(args[6]))
        return call(self, function, *args, **static)

    monkeypatch.setattr(pipeline.Session, "__call__", record)
    return images


def noise_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def test_each_picture_is_at_its_latent_frame_and_the_others_are_zero(
    models: Models, seen: list[np.ndarray]
) -> None:
    config = models.config
    names = ("height", "width", "num_frames")
    settings: dict[str, Any] = {name: config.defaults[name] for name in names}
    if not config.transformer.use_learned_positional_embeddings:
        settings = {"height": 32, "width": 48, "num_frames": 17}  # five latent frames, one padding
    settings |= {"num_inference_steps": 1}
    size = settings["height"], settings["width"]
    first, middle, end = (noise_picture(seed, size) for seed in range(3))
    request = Request(first, "a prompt", keyframes={1: middle}, end_image=end, **settings)
    cogi2v_jax.generate(models, request)
    (image,) = (batch[0] for batch in seen)
    shape, job = request.resolve(config).latent_shape(config), pipeline.prepare(models, request)
    assert len(image) == shape.frames
    places = (1 + shape.padding, shape.frames - 1)
    assert not image[[*set(range(1, shape.frames)) - {*places}]].any()
    assert image[0].any()
    for place, picture in zip(places, (middle, end), strict=True):
        pixels = np.asarray(picture, np.float32)[None, None] / 127.5 - 1
        np.testing.assert_allclose(job.pictures[place], pixels, atol=1e-6)
        moments = np.asarray(pipeline.encode_pixels(Session(models, job), pixels))
        mean, log_variance = np.split(moments[0, 0], 2, axis=-1)
        noise = np.asarray(draw(job.keys, KEYFRAMES, (1, *mean.shape), place))[0, 0]
        expected = job.image_scale * (mean + np.exp(0.5 * log_variance) * noise)
        assert_close(image[place], expected, 1e-5)


def test_every_frame_of_a_picture_draws_its_own_noise_from_the_seed(
    seen: list[np.ndarray],
) -> None:
    tiny = cogi2v_jax.load("cogi2v-tiny", dtype="float32")
    for seed in (1, 1, 2):
        pictures = {"keyframes": {1: EXAMPLE}, "end_image": EXAMPLE}
        settings = {"num_inference_steps": 1, "seed": seed}
        cogi2v_jax.generate(tiny, Request(EXAMPLE, PROMPT, **pictures, **settings))
    one, again, other = (image[0] for image in seen)
    np.testing.assert_array_equal(one, again)
    assert (one[1] != one[2]).any()
    assert (one[1] != other[1]).any()


def test_noise_on_the_image_has_its_level_and_is_the_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded: list[np.ndarray] = []
    encode = pipeline.encode_pixels

    def record(run: Session, pixels: Any) -> Any:
        encoded.append(np.asarray(pixels))
        return encode(run, pixels)

    monkeypatch.setattr(pipeline, "encode_pixels", record)
    tiny = cogi2v_jax.load("cogi2v-tiny", dtype="float32")
    for level, seeds in ((0.0, [1, 2]), (0.05, [1, 2]), (0.1, [2, 1])):
        request = Request(EXAMPLE, PROMPT, seed=seeds, noise_aug=level, num_inference_steps=1)
        cogi2v_jax.generate(tiny, request)
    plain, one, two = encoded
    assert plain.min() >= -1
    assert abs((one - plain).std() / 0.05 - 1) < 0.02
    assert_close(two[::-1] - plain, 2 * (one - plain), 1e-4)
    assert (one[0] != one[1]).any()


@pytest.mark.usefixtures("without_type_hooks")
@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"keyframes": {0: EXAMPLE}},
            "keyframes must be of latent frames from 1 to 2 for 9 frames",
        ),
        (
            {"keyframes": {3: EXAMPLE}},
            "keyframes must be of latent frames from 1 to 2 for 9 frames",
        ),
        ({"keyframes": {"1": EXAMPLE}}, "from 1 to 2 for 9 frames: got '1'"),
        ({"keyframes": [EXAMPLE]}, "keyframes must be pictures by latent frame: got list"),
        (
            {"keyframes": {2: EXAMPLE}, "end_image": EXAMPLE},
            "end_image must be the only picture of the last latent frame: got a keyframe there",
        ),
        (
            {"num_frames": 1, "end_image": EXAMPLE},
            "end_image must be the only picture of the last latent frame: got a video of one",
        ),
    ],
    ids=str,
)
def test_pictures_for_frames_that_are_not_there_are_refused(
    given: dict[str, Any], line: str
) -> None:
    from cogi2v_jax.config import named

    with pytest.raises(ValueError, match=re.escape(line)):
        Request(EXAMPLE, PROMPT, **given).resolve(named("cogi2v-tiny"))


def test_the_command_takes_them_and_the_recipe_names_them(tmp_path: Path, capsys: Any) -> None:
    end = tmp_path / "end.png"
    Image.open(EXAMPLE).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(end)
    output = tmp_path / "out.mp4"
    pictures = ["--end_image", str(end), "--keyframe", f"1={EXAMPLE}"]
    assert main([*pictures, "--num_inference_steps", "2", "--output", str(output)]) == 0
    assert read_recipe(output)["keyframes"] == [
        {"latent_frame": 1, "image": EXAMPLE.name, "sha256": sha256(EXAMPLE)},
        {"latent_frame": 2, "image": "end.png", "sha256": sha256(end)},
    ]
    for wrong in ("1", "=x", "x=y", "1="):
        with pytest.raises(SystemExit):
            main(["--keyframe", wrong])
        assert f"--keyframe: must be N=FILE: got {wrong!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--keyframe", f"1={EXAMPLE}", "--keyframe", f"1={end}"])
    assert "once for a latent frame: got 1 twice" in capsys.readouterr().err
    assert main(["--end_image", str(tmp_path / "none.png")]) == 1
    assert "image must be an existing file" in capsys.readouterr().err
