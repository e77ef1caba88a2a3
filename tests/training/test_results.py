"""The plot and the card of a run."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import cogi2v_convert.__main__ as convert
import numpy as np
import pytest
from cogi2v_convert.sources.lora_file import open_lora
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import save_file

from cogi2v_jax import sample
from cogi2v_jax.config import named
from cogi2v_jax.training import results
from cogi2v_jax.training.recipe import Recipe, read_recipe
from cogi2v_jax.training.results import draw_loss, plot_loss, write_card

NAMED, HUB = "cogvideox1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V"


def write_metrics(path: Path, losses: Any) -> Path:
    """The first step takes a minute, the others two seconds each."""
    lines = [
        {"step": step, "loss": float(loss), "seconds": 60.0 if step == 1 else 2.0}
        for step, loss in enumerate(losses, 1)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return write_metrics(tmp_path / "metrics.jsonl", np.linspace(0.5, 0.25, 11))


def recipe_of(**keys: Any) -> Recipe:
    given: dict[str, Any] = {"method": "lora", "data": "clips", "output": "runs/orbit"}
    given |= {"model": NAMED, "steps": 11, "warmup": 0, **keys}
    return Recipe(**({"rank": 16, "alpha": 8.0} if given["method"] == "lora" else {}), **given)


# the plot


def test_a_run_has_a_picture_of_its_loss(metrics: Path, tmp_path: Path) -> None:
    assert plot_loss(metrics, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (960, 540))


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        (np.geomspace(5, 0.05, 300), "log"),
        (np.linspace(0.5, 0.25, 300), "linear"),
        # Noise alone: the smoothed loss does not span decades.
        (np.tile([0.01, 0.9], 150), "linear"),
        (np.geomspace(5, 0.05, 300) - 0.06, "linear"),  # some are negative
    ],
    ids=["decades", "no decades", "noise", "below zero"],
)
def test_a_loss_that_spans_decades_has_a_logarithmic_axis(losses: Any, scale: str) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (axes,) = draw_loss(lines).axes
    assert axes.get_yscale() == scale
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")


def test_the_smoothed_loss_is_the_mean_of_a_noisy_one_from_the_beginning(rng: Any) -> None:
    losses = 0.3 + 0.1 * rng.standard_normal(1000)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    each, smooth = (line.get_ydata() for line in draw_loss(lines).axes[0].get_lines())
    np.testing.assert_array_equal(each, losses)
    # 30 steps: 1 / 30 of the variance is left at the beginning, half of that later. No value is 4
    # deviations away.
    assert np.abs(smooth - 0.3).max() < 4 * 0.1 / 30**0.5


def test_without_steps_or_matplotlib_a_line_says_why_there_is_no_picture(
    metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    picture, empty = tmp_path / "loss.png", write_metrics(tmp_path / "empty.jsonl", [])
    assert not plot_loss(empty, picture, said.append)
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    assert not plot_loss(metrics, picture, said.append)
    assert said == [
        f"no plot of the loss: {empty} has no steps",
        "no plot of the loss without matplotlib: pip install 'cogi2v-jax[compare]'",
    ]
    assert not picture.exists()


# the card


def test_the_hub_reads_the_card_of_a_lora_and_so_do_we(metrics: Path, tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    write_card(tmp_path / "README.md", recipe_of(), named(NAMED), metrics, picture)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == HUB
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "image-to-video")
    assert (data["license"], data["license_name"]) == ("other", "cogvideox")
    assert data["license_link"] == f"https://huggingface.co/{HUB}/blob/main/LICENSE"
    assert "lora" in data["tags"]
    assert "rank 16 (alpha 8)" in card.text
    assert "commercial use needs a registration" in card.text
    assert "(loss.png)" in card.text
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    assert open_lora(tmp_path).bases == (HUB,)


def test_the_card_has_the_figures_of_the_run(metrics: Path, tmp_path: Path) -> None:
    write_card(tmp_path / "README.md", recipe_of(), named(NAMED), metrics, None)
    text = (tmp_path / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE))
    assert rows == {
        "steps": "11",
        "last loss": "0.25 (smoothed: 0.25)",
        "seconds a step": "2",
        "machine": "8 x cpu",
    }
    assert "![" not in text


def test_a_card_says_what_a_lora_needs_beside_itself(metrics: Path, tmp_path: Path) -> None:
    recipe = recipe_of(model="/models/5b-int8", image_latent_scale="trainer")
    write_card(tmp_path / "README.md", recipe, named(NAMED), metrics, None)
    text = (tmp_path / "README.md").read_text()
    assert "--model 5b-int8 --lora_path orbit --image_latent_scale trainer\n" in text


@pytest.mark.parametrize("method", ["lora", "full", "vae"])
def test_the_commands_of_a_card_are_those_that_there_are(
    method: str, metrics: Path, tmp_path: Path
) -> None:
    write_card(tmp_path / "README.md", recipe_of(method=method), named(NAMED), metrics, None)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (tmp_path / "README.md").read_text(), re.M | re.S)
    commands = [shlex.split(block.replace("\\\n", "")) for kind, block in blocks if not kind]
    options = sample.parser().parse_args(commands[0][3:])
    loaded = "orbit/model", []
    if method == "lora":
        loaded = NAMED, ["orbit"]
    assert (options.model, options.lora_path or []) == loaded
    code = next(block for kind, block in blocks if kind == "python")
    ast.parse(code)
    folder = HUB
    if method != "lora":
        converted = convert.parser().parse_args(commands[1][1:])
        assert (str(converted.source), (folder := str(converted.destination))) == (
            "orbit/model",
            "diffusers",
        )
    assert f'from_pretrained("{folder}"' in code
    assert ('load_lora_weights("orbit")' in code) == (method == "lora")


def test_a_card_has_the_recipe_and_no_path_of_the_machine(metrics: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    recipe = recipe_of(model=str(model), data=str(tmp_path / "clips"), output=str(tmp_path))
    write_card(tmp_path / "README.md", recipe, named("cogi2v-tiny"), metrics, None)
    card = ModelCard.load(tmp_path / "README.md")
    assert str(tmp_path.parent) not in card.text
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", card.text, re.M | re.S)
    (tmp_path / "again.toml").write_text(toml)
    again = read_recipe(str(tmp_path / "again.toml"))
    assert again == recipe_of(model="tiny", data="clips", output=tmp_path.name)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        (NAMED, HUB),
        ("THUDM/CogVideoX1.5-5B-I2V", HUB),
        ("someone/fine-tune@main", "someone/fine-tune"),
        ("cogi2v-tiny", None),
        ("models/mine", None),  # a folder here
    ],
)
def test_the_base_is_a_repository_where_it_has_one(
    model: str, base: str | None, metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    write_card(tmp_path / "README.md", recipe_of(model=model), named(NAMED), metrics, None)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict().get("base_model") == base
