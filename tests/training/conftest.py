"""Prepared clips of the small random models of both families."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import twins
from footage import library

import cogi2v_jax
from cogi2v_jax.training.clips import Bucket, list_clips
from cogi2v_jax.training.preparation import prepare
from cogi2v_jax.training.recipe import Recipe


class Studio(NamedTuple):
    """A model and data for it."""

    model: Path
    data: Path
    pixels: Path  # the same clips, for the VAE

    def recipe(self, output: Path, **keys: Any) -> Recipe:
        settings: dict[str, Any] = {"method": "lora", "steps": 4, "batch": 4, "warmup": 0}
        settings |= {"learning_rate": 0.01, **keys}
        if settings["method"] == "lora":
            settings = {"rank": 3, "alpha": 6.0, **settings}
        data = self.pixels if settings["method"] == "vae" else self.data
        paths = {"model": str(self.model), "data": str(data), "output": str(output)}
        return Recipe(**paths, **settings)


@pytest.fixture(scope="session")
def studios(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Studio]:
    """That of a family, made once for all tests: compiling takes most of a minute."""

    @cache
    def make(family: str) -> Studio:
        folder = tmp_path_factory.mktemp("studio")
        model = twins.save(twins.pipeline(family), folder / "model")
        models = cogi2v_jax.load(model, "float32", say=lambda _: None)
        clips = list_clips(library(folder / "clips", 6, height=48, width=80))
        bucket = [Bucket(9, 48, 80)]
        prepare(models, clips, folder / "data", bucket, 8.0)
        prepare(models.config, clips, folder / "pixels", bucket, 8.0)
        return Studio(model, folder / "data", folder / "pixels")

    return make


@pytest.fixture(scope="module")
def studio(family: str, studios: Callable[[str], Studio]) -> Studio:
    """To be read, not changed."""
    return studios(family)
