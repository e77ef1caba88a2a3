"""The benchmark of training, at two steps: both sides take the same step, and a difference ends the
comparison."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CLIPS", ("--motions", "spins", "--clips", "8"))
        return training.make_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(training, "make_data", lambda scratch: data)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the whole process
    monkeypatch.setattr(training, "BLOCK", 2)


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    result = tmp_path / "result.json"
    training.main(["--cases", "LoRA", "--json", str(result), *arguments])
    return json.loads(result.read_text())


def test_equal_steps_have_equal_losses_and_every_figure_is_written(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "curves.png"
    settings = ("--blocks", "2", "--steps", "2", "--seeds", "1", "--plot", str(picture))
    found = run(tmp_path, *settings)
    assert found.keys() == {"machine", "others", "cases", "curves", "losses"}
    row = found["cases"]["LoRA"]
    assert len(row["differences"]) == 3
    assert max(row["differences"]) < 1e-5
    assert np.array(row["first"]).shape == (2,)
    assert np.array(row["seconds"]).shape == np.array(row["cpu"]).shape == (2, 2)
    curves = np.array(found["curves"])
    assert curves.shape == (1, 2, 2)
    assert (curves[:, 0] != curves[:, 1]).all()  # each side draws its own random numbers
    means = {"first": [curves[0, 0, 0]], "last": [curves[0, 0, 1]]}
    assert found["losses"]["ours"] == means
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "LoRA" in capsys.readouterr().out


@pytest.mark.parametrize("case", training.CASES)
def test_every_case_is_a_recipe(case: str) -> None:
    training.Recipe(data="data", **training.SETTINGS | training.CASES[case])


def test_a_step_that_differs_ends_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "IMAGE_NOISE", (-3.0, 0.4))  # of the reference's step alone
    with pytest.raises(SystemExit, match="losses of the same steps must agree within 1e-05: got"):
        run(tmp_path, "--blocks", "0", "--steps", "0")
