"""Clips to start from and segments on small networks of both generations."""

from typing import Any

import numpy as np
import pytest
import twins

import cogi2v_jax
from cogi2v_jax import Models, Request, pipeline
from cogi2v_jax.sampling import stages
from cogi2v_jax.sampling.programs import Session


@pytest.fixture(scope="module")
def models(pipe: Any, family: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = twins.save(pipe, tmp_path_factory.mktemp("source") / family)
    return cogi2v_jax.load(folder, dtype="float32")


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """The latents that each loop begins with, and those of its image."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    call = Session.__call__

    def record(self: Session, function: Any, *args: Any, **static: Any) -> Any:
        if function is stages.denoise:
            seen.append((np.asarray(args[0].x), np.asarray(args[6])))
        return call(self, function, *args, **static)

    monkeypatch.setattr(pipeline.Session, "__call__", record)
    return seen


def sizes(models: Models) -> dict[str, int]:
    config = models.config
    if config.transformer.use_learned_positional_embeddings:
        return {name: config.defaults[name] for name in ("height", "width", "num_frames")}
    return {"height": 32, "width": 48, "num_frames": 9}  # three latent frames and a padding one


def noise_of(models: Models, *shape: int) -> np.ndarray:
    size = sizes(models)
    whole = *shape, size["height"], size["width"], 3
    return np.random.default_rng(0).integers(0, 256, whole, np.uint8)


def ask(models: Models, **given: Any) -> Request:
    picture = noise_of(models)
    return Request(picture, "a prompt", **sizes(models), num_inference_steps=2, **given)


def test_the_frames_that_a_segment_goes_on_from_stand_behind_the_padding(
    models: Models, loops: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    request = ask(models, extend=1, overlap=5)
    result = cogi2v_jax.generate(models, request)
    shape = result.request.latent_shape(models.config)
    assert result.video.shape[1] == 2 * sizes(models)["num_frames"] - 5
    (_, first), (_, second) = loops
    present = [np.abs(image[0]).max(axis=(1, 2, 3)) > 0 for image in (first, second)]
    assert present[0].tolist() == [True] + [False] * (shape.frames - 1)
    given = 2 + shape.padding
    assert present[1].tolist() == [True] * given + [False] * (shape.frames - given)
    if shape.padding:
        np.testing.assert_array_equal(second[0, 0], second[0, 1])


def test_a_clip_stands_behind_the_padding_too(
    models: Models, loops: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    request = ask(models, video=noise_of(models, sizes(models)["num_frames"]), strength=0.5)
    result = cogi2v_jax.generate(models, request)
    shape, job = result.request.latent_shape(models.config), pipeline.prepare(models, request)
    ((start, _),) = loops
    alpha, sigma = job.tableau.alpha[0], job.tableau.sigma[0]
    plain = pipeline.begin(Session(models, job), pipeline.prepare(models, ask(models)))
    noise = np.asarray(plain.state.x)
    latents = (start - sigma * noise) / alpha
    if shape.padding:
        np.testing.assert_allclose(latents[:, 0], latents[:, 1], atol=1e-4)
    assert np.abs(latents[0, -1] - latents[0, -2]).max() > 0.1
    assert np.isfinite(result.latents).all()
