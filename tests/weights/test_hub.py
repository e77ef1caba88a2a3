"""Downloads from the hub: only what is needed, and one line where that fails."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import hubs
import huggingface_hub
import loras
import pytest
import torch
import twins
from cogi2v_convert.sources.lora_file import open_lora
from folders import left

from cogi2v_jax.config import named
from cogi2v_jax.disk import show_size
from cogi2v_jax.loading import load
from cogi2v_jax.sample import main
from cogi2v_jax.weights.hub import ask, fetch, locate
from cogi2v_jax.weights.needed_files import choose_files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, and its client with an empty cache."""
    hub = hubs.Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    hub.repositories["someone/finetune"] = Path(
        shutil.copytree(twins.TINY, tmp_path / "repository")
    )
    yield hub
    hub.close()


def refused(hub_id: str, kind: type[Exception] = FileNotFoundError) -> str:
    with pytest.raises(kind) as caught:
        fetch(hub_id, lambda line: None)
    line = str(caught.value)
    assert "\n" not in line
    assert " must " in line or line.startswith("cannot ")
    return line


# which files

SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
HALF = [f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ([*SHARDS, INDEX], [INDEX, *SHARDS]),
        (
            [
                *SHARDS,
                INDEX,
                *HALF,
                INDEX.replace(".json", ".fp16.json"),
                "diffusion_pytorch_model.fp16.safetensors",
            ],
            [INDEX, *SHARDS],
        ),
        (
            [*HALF, INDEX.replace(".json", ".fp16.json")],
            [INDEX.replace(".json", ".fp16.json"), *HALF],
        ),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.bf16.safetensors"]),
        (
            ["model.safetensors", "pytorch_model.bin", "model.onnx", "model.ckpt", "tf_model.h5"],
            ["model.safetensors"],
        ),
        (["pytorch_model.bin", "pytorch_model.fp16.bin", "rng.pkl"], ["pytorch_model.bin"]),
        ([*SHARDS, "model.safetensors"], ["model.safetensors"]),
        (["model.onnx"], []),
    ],
)
@pytest.mark.parametrize("part", ["transformer", ""])
def test_one_set_of_weights_is_taken_of_a_part(part, there, taken):
    prefix = f"{part}/" if part else ""
    chosen = choose_files([f"{prefix}{name}" for name in ["config.json", *there]] + ["README.md"])
    assert chosen == (
        [f"{prefix}{name}" for name in ["config.json", *taken]] if taken or part else []
    )


def test_of_a_repository_only_what_a_conversion_reads_is_taken():
    unneeded = [
        "README.md",
        "image.png",
        "all.safetensors",
        "transformer/notes.json",
        "vae_old/config.json",
        "text_encoder/model.fp32.pt",
    ]
    unneeded += ["transformer/old/diffusion_pytorch_model.safetensors", "scheduler/config.json"]
    assert set(choose_files([*twins.FILES, *unneeded])) == set(twins.FILES)
    assert choose_files(["a.safetensors", "b.safetensors"]) == []


# the hub


def test_only_the_needed_files_of_a_repository_are_fetched_and_once(hub):
    repository = hub.repositories["someone/finetune"]
    for name in (
        "README.md",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ):
        (repository / name).write_bytes(b"not needed")
    said = []
    folder = fetch("someone/finetune", said.append)
    assert (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        == twins.FILES
    )
    assert hub.fetched() == set(twins.FILES)
    size = show_size(sum((repository / name).stat().st_size for name in twins.FILES))
    assert said == [f"fetching someone/finetune from the hub, {size} (its licence: it names none)"]
    hub.asked.clear()
    assert fetch("someone/finetune", said.append) == folder
    assert hub.fetched() == set()
    assert "nothing new" in said[1]


def test_a_part_s_own_repository_is_fetched_too(hub):
    hub.repositories["someone/vae"] = twins.TINY / "vae"
    assert left(fetch("someone/vae", lambda line: None)) == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_after_a_download_was_cut_off_only_the_files_that_are_missing_are_fetched(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, between attempts
    hub.cut = 100_000
    assert refused("someone/finetune").startswith("cannot fetch model someone/finetune: ")
    repository = hub.repositories["someone/finetune"]
    large = {name for name in twins.FILES if (repository / name).stat().st_size > hub.cut}
    ask_again = ask("someone/finetune")
    assert (
        ask_again.missing
        == sum((repository / name).stat().st_size for name in large)
        < ask_again.size
    )
    hub.cut = None
    hub.asked.clear()
    folder = fetch("someone/finetune", lambda line: None)
    assert hub.fetched() == large
    assert all(
        (folder / name).read_bytes() == (repository / name).read_bytes() for name in twins.FILES
    )
    assert ask("someone/finetune").missing == 0


COGVIDEOX = (
    "CogVideoX LICENSE: free for research; commercial use needs a registration with its authors"
)


@pytest.mark.parametrize(
    ("repository", "card", "licence"),
    [
        ("zai-org/CogVideoX-5b-I2V", None, COGVIDEOX),
        ("THUDM/cogvideox-5b-i2v", None, COGVIDEOX),
        ("someone/other", {"license": "apache-2.0"}, "apache-2.0"),
        (
            "someone/other",
            {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"},
            "mine https://a.b/c",
        ),
        ("someone/other", {"language": "en"}, "it names none"),
        ("someone/other", {"license": "a\x1b[2J"}, r"a\x1b[2J"),
    ],
)
def test_the_licence_is_named_before_the_download(repository, card, licence, hub):
    hub.repositories[repository] = hub.repositories["someone/finetune"]
    hub.cards[repository] = card

    def say(line: str) -> None:
        assert hub.fetched() == set()
        assert line.endswith(f"(its licence: {licence})")

    fetch(repository, say)
    assert hub.fetched() == set(twins.FILES)


def test_without_free_space_nothing_is_fetched(hub, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 5))
    size = show_size(ask("someone/finetune").missing)
    line = refused("someone/finetune", OSError)
    what = "someone/finetune (HF_HOME sets another place)"
    assert line.startswith(f"{tmp_path} must have {size} free for {what}: got 0.0 MB")
    assert hub.fetched() == set()


def test_offline_the_cache_is_used(hub, monkeypatch):
    folder = fetch("someone/finetune", lambda line: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    said = []
    assert fetch("someone/finetune", said.append) == folder
    assert said == ["taking someone/finetune from the cache of the hub's client"]
    assert hub.asked == []
    assert "HF_HUB_OFFLINE is set, and nothing is there" in refused("someone/else")


def test_where_the_hub_can_not_be_reached_the_cache_is_used(hub, monkeypatch):
    folder = fetch("someone/finetune", lambda line: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch("someone/finetune", lambda line: None) == folder
    assert refused("someone/else").startswith(
        "model someone/else must be on the hub, in its cache or a folder here: "
    )


def test_a_gated_repository_says_where_its_terms_are(hub):
    hub.gated.add("someone/finetune")
    assert refused("someone/finetune").endswith(
        f"it is gated; accept its terms at {hub.endpoint}/someone/finetune, "
        "then set HF_TOKEN or run hf auth login"
    )


def test_an_unknown_repository_and_an_unknown_revision_have_errors_of_their_own(hub):
    assert refused("someone/typo").endswith(
        "the hub has none of this name that you may read; "
        "check the name, and set HF_TOKEN if it is private"
    )
    assert (
        refused("someone/finetune@v7")
        == "model someone/finetune must have the revision v7: the hub has none"
    )
    assert (
        locate(f"someone/finetune@{hubs.SHA}", lambda line: None) / "transformer/config.json"
    ).is_file()


def test_a_repository_of_single_files_says_what_to_do(hub, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a_fp8.safetensors").write_bytes(b"")
    hub.repositories["someone/comfy"] = tmp_path / "files"
    line = refused("someone/comfy")
    assert line.endswith(
        "must be a diffusers folder: got a_fp8.safetensors; "
        "download a single file and give its path to cogi2v-convert"
    )


# LoRAs


@pytest.fixture
def orbit(hub, tmp_path):
    """A repository of a LoRA, with what its trainer left there."""
    folder = tmp_path / "orbit"
    (folder / "checkpoint-500").mkdir(parents=True)
    width = named("cogi2v-tiny").transformer.width
    pairs = {"transformer_blocks.0.attn1.to_q": (torch.ones(4, width), torch.ones(width, 4))}
    file = loras.save(folder / "pytorch_lora_weights.safetensors", loras.peft(pairs))
    shutil.copy(file, folder / "checkpoint-500")
    shutil.copy(file, folder / "other.safetensors")
    (folder / "README.md").write_text("---\nbase_model: THUDM/CogVideoX-5b-I2V\n---\n")
    (folder / "sample.mp4").touch()
    hub.repositories["someone/orbit"] = folder
    return folder


def test_of_a_lora_s_repository_its_file_and_its_card_are_fetched(hub, orbit, monkeypatch):
    said: list[str] = []
    file = open_lora("someone/orbit", said.append)
    assert hub.fetched() == {"pytorch_lora_weights.safetensors", "README.md"}
    assert (file.name, file.bases) == ("someone/orbit", ("THUDM/CogVideoX-5b-I2V",))
    assert said == ["fetching someone/orbit from the hub, 0.0 MB (its licence: it names none)"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_lora("someone/orbit", said.append).sha256 == file.sha256


def test_a_lora_may_be_given_as_a_hub_id_with_a_weight(hub, orbit):
    models = load("cogi2v-tiny", loras=["someone/orbit:0.5"])
    assert [(lora.name, lora.weight) for lora in models.loras] == [("someone/orbit", 0.5)]


def test_an_address_of_a_lora_s_file_fetches_it_and_what_is_beside_it(hub, orbit, monkeypatch):
    (orbit / "checkpoint-500" / "adapter_config.json").write_text('{"lora_alpha": 2}')
    address = "https://huggingface.co/someone/orbit"
    asked = f"{address}/blob/main/checkpoint-500/pytorch_lora_weights.safetensors"
    lora = open_lora(asked, lambda line: None)
    assert hub.fetched() == {
        f"checkpoint-500/{name}" for name in (lora.path.name, "adapter_config.json")
    }
    assert lora.settings == {"lora_alpha": 2}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_lora(asked, lambda line: None).sha256 == lora.sha256
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    must = r"lora someone/orbit must hold x\.bin: got README\.md"
    with pytest.raises(FileNotFoundError, match=must):
        open_lora(f"{address}/resolve/main/x.bin", lambda line: None)


def test_an_address_of_a_model_is_its_hub_id(hub):
    address = "https://huggingface.co/someone/finetune"
    assert locate(address, lambda line: None) == fetch("someone/finetune", lambda line: None)
    with pytest.raises(FileNotFoundError, match=r"must be a folder: got a file on the hub, .*vae"):
        locate(f"{address}/blob/main/vae/x.safetensors", lambda line: None)


def test_no_name_is_no_folder():
    with pytest.raises(FileNotFoundError, match="found no ''"):
        locate("")


def test_a_repository_with_several_loras_says_what_to_do(hub, orbit):
    (orbit / "pytorch_lora_weights.safetensors").rename(orbit / "another.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lora someone/orbit must hold one file of a "):
        open_lora("someone/orbit", lambda line: None)


def test_offline_an_unknown_lora_is_said_to_be_sought_on_the_hub(capsys):
    assert main(["--lora_path", "someone/orbit", "--output", "x.png"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "lora someone/orbit must be on the hub, in its cache or a folder here: HF_HUB_OF" in line


# errors


@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), RuntimeError(""), ValueError("  \n"), KeyError("x")]
)
def test_whatever_the_client_raises_is_one_clear_line(error, hub, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    assert refused("someone/model").startswith(
        "model someone/model must be on the hub, in its cache or a folder here: "
    )
    monkeypatch.undo()


def test_the_command_takes_a_hub_id_and_the_client_its_environment(hub, tmp_path):
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "cogi2v_convert", "inspect", "someone/finetune"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr
    assert "diffusers folder, cogi2v-tiny (cogvideox-i2v)" in done.stdout
    assert str(tmp_path / "home") in done.stdout
    # The client also makes requests of its own.
    ours = [(path, token) for _, path, token in hub.asked if "someone/finetune" in path]
    assert {token for _, token in ours} == {"Bearer hf_secret"}
    assert done.stderr.count("fetching someone/finetune") == 1
