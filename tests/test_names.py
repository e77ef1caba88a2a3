"""Names of checkpoints, however they are spelled."""

import shutil
from pathlib import Path

import pytest

from cogi2v_jax import config
from cogi2v_jax.arguments import parse_loras
from cogi2v_jax.names import ASSETS, EXAMPLE_LORA, find_name, parse_hub
from cogi2v_jax.weights import hub


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("cogvideox-5b-i2v", "cogvideox-5b-i2v"),
        ("CogVideoX1.5-5B-I2V", "cogvideox1.5-5b-i2v"),
        ("zai-org/CogVideoX-5b-I2V", "cogvideox-5b-i2v"),
        ("THUDM/cogvideox1.5-5b-i2v", "cogvideox1.5-5b-i2v"),
        ("https://huggingface.co/zai-org/CogVideoX-5b-I2V", "cogvideox-5b-i2v"),
        ("https://huggingface.co/THUDM/CogVideoX1.5-5B-I2V/tree/main/", "cogvideox1.5-5b-i2v"),
        ("https://huggingface.co/zai-org/CogVideoX-5b-I2V/tree/v2", None),
        ("someone/CogVideoX-5b-I2V", None),
        ("sora", None),
        ("", None),
    ],
)
def test_a_name_and_every_spelling_of_a_hub_id_find_their_checkpoint(
    model: str, name: str | None
) -> None:
    assert find_name(model) == name


HUB = "https://huggingface.co/a/b"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a/b@v1", ("a/b@v1", "")),
        (HUB, ("a/b", "")),
        (f"{HUB}/", ("a/b", "")),
        ("http://www.hf.co/a/b?library=diffusers", ("a/b", "")),
        (f"{HUB}/tree/refs%2Fpr%2F1", ("a/b@refs/pr/1", "")),
        (f"{HUB}/resolve/main/c/d%20e.safetensors?download=true", ("a/b", "c/d e.safetensors")),
        (f"{HUB}/blob/v1/c.bin", ("a/b@v1", "c.bin")),
        ("https://huggingface.co/a", None),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://example.com/a/b", None),
        ("a/b/c", None),
    ],
)
def test_an_address_of_the_hub_means_the_id_in_it(text, place):
    assert parse_hub(text) == place


def test_every_checkpoint_is_found_by_its_own_name() -> None:
    assert [find_name(name) for name in config.names()] == config.names()


def test_a_folder_here_is_known_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ASSETS / "cogi2v-tiny", "zai-org/CogVideoX-5b-I2V")
    assert hub.known_config("zai-org/CogVideoX-5b-I2V") == config.named("cogi2v-tiny")
    assert hub.known_config("THUDM/CogVideoX-5b-I2V") == config.named("cogvideox-5b-i2v")
    assert hub.known_config("someone/finetune") is None


def test_the_example_lora_has_a_name_that_a_file_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_loras(f"{EXAMPLE_LORA}:0.5") == [(ASSETS / EXAMPLE_LORA, 0.5)]
    Path(EXAMPLE_LORA).touch()
    assert parse_loras(EXAMPLE_LORA) == [(Path(EXAMPLE_LORA), 1.0)]
