"""Names of checkpoints, however they are spelled."""

import shutil

import pytest

from cogi2v_jax import config
from cogi2v_jax.names import find_name
from cogi2v_jax.weights import hub


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("cogvideox-5b-i2v", "cogvideox-5b-i2v"),
        ("CogVideoX1.5-5B-I2V", "cogvideox1.5-5b-i2v"),
        ("zai-org/CogVideoX-5b-I2V", "cogvideox-5b-i2v"),
        ("THUDM/cogvideox1.5-5b-i2v", "cogvideox1.5-5b-i2v"),
        ("someone/CogVideoX-5b-I2V", None),
        ("sora", None),
        ("", None),
    ],
)
def test_a_name_and_every_spelling_of_a_hub_id_find_their_checkpoint(
    model: str, name: str | None
) -> None:
    assert find_name(model) == name


def test_every_checkpoint_is_found_by_its_own_name() -> None:
    assert [find_name(name) for name in config.names()] == config.names()


def test_a_folder_here_is_known_before_a_published_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.EMBEDDED / "cogi2v-tiny", "zai-org/CogVideoX-5b-I2V")
    assert hub.known_config("zai-org/CogVideoX-5b-I2V") == config.named("cogi2v-tiny")
    assert hub.known_config("THUDM/CogVideoX-5b-I2V") == config.named("cogvideox-5b-i2v")
    assert hub.known_config("someone/finetune") is None
