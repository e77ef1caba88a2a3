"""Runs of the command line, each in a folder of its own."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogi2v_jax import pipeline
from cogi2v_jax.sample import EXAMPLE_IMAGE, main

QUICK = ("--num_inference_steps", "2")


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a photo into `folder` and makes it the working directory."""
    Image.open(EXAMPLE_IMAGE).convert("RGB").save(folder / "photo.png")
    monkeypatch.chdir(folder)
    return folder


def without_sampling(monkeypatch: pytest.MonkeyPatch) -> list:
    """Replaces sampling by black videos. Returns the list that collects the requests."""
    asked = []

    def black(models, request, noise, on_step, on_latents, done):
        resolved = request.resolve(models.config)
        asked.append(resolved)
        latents, video = (
            np.zeros((1, 3, 16, 16, 16), np.float32),
            np.zeros((1, 9, 64, 64, 3), np.uint8),
        )
        on_latents(latents, resolved)
        seconds = dict.fromkeys(("load", "text", "image", "compile", "denoise", "decode"), 0.5)
        return pipeline.Result(video, latents, resolved, seconds)

    monkeypatch.setattr(pipeline, "generate", black)
    return asked


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"photo.png"}


def failed(capsys, arguments, code: int) -> str:
    """The one line of a run that fails with `code` and leaves no file."""
    before = files()
    capsys.readouterr()
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        assert caught.value.code == 2
    else:
        assert main(list(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("cogi2v: ")
    assert files() == before
    return line
