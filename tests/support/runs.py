"""Runs of the command line in a folder of their own, and what tests ask of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cogi2v_jax import pipeline
from cogi2v_jax.sample import EXAMPLE_IMAGE, main

QUICK = ("--num_inference_steps", "2")


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs begin in `folder`, with a photo in it."""
    Image.open(EXAMPLE_IMAGE).convert("RGB").save(folder / "photo.png")
    monkeypatch.chdir(folder)
    return folder


def without_sampling(monkeypatch: pytest.MonkeyPatch) -> list:
    """Arguments alone, in no time: black videos. Returns the list that the requests will be in."""
    asked = []

    def black(models, request, on_step, on_latents):
        resolved = request.resolve(models.config)
        asked.append(resolved)
        on_latents(np.zeros((1, 3, 8, 8, 16), np.float32), resolved)
        seconds = dict.fromkeys(("load", "text", "image", "compile", "denoise", "decode"), 0.5)
        return pipeline.Result(
            np.zeros((1, 9, 64, 64, 3), np.uint8),
            np.zeros((1, 3, 8, 8, 16), np.float32),
            resolved,
            seconds,
        )

    monkeypatch.setattr(pipeline, "generate", black)
    return asked


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"photo.png"}


def failed(capsys, arguments, code: int) -> str:
    """The one line of a run that failed and left nothing."""
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
