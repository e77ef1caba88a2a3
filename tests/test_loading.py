"""Every way to name a checkpoint, and its compute dtype."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from cogi2v_convert.conversion import to_flax
from safetensors.numpy import load_file

from cogi2v_jax import loading
from cogi2v_jax.loading import load
from cogi2v_jax.names import ASSETS
from cogi2v_jax.weights.checkpoint import FORMAT
from cogi2v_jax.weights.pieces import leaf_names

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A diffusers folder that tests must not change."""
    return twins.save(twins.pipeline("1.5"), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def source(saved, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(saved, tmp_path / "source"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of conversions for one test. Compilations are cached as in other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "keep_compilations", lambda: None)
    return tmp_path / "cache" / "cogi2v-jax" / "converted"


@pytest.fixture
def hub_ids(monkeypatch):
    """A hub on which every repository is the folder `answer`, and the ids that were `asked` for."""
    asked = []

    def fetch(hub_id, say):
        asked.append(hub_id)
        return fetch.answer

    monkeypatch.setattr("cogi2v_jax.weights.hub.fetch", fetch)
    fetch.asked = asked
    return fetch


def quiet(line: str) -> None:
    pass


def refused(*arguments, **named) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(*arguments, say=quiet, **named)
    assert "\n" not in str(caught.value)
    assert " must " in str(caught.value)
    return str(caught.value)


# names


def test_load_without_a_name_is_of_the_embedded_model(cache):
    said = []
    models = load(say=said.append)
    assert models.config.name == "cogi2v-tiny"
    assert models.folder.parent == cache
    (line,) = said
    assert line == f"converting {ASSETS / 'cogi2v-tiny'} into {models.folder}, once"
    assert load("cogi2v-tiny", say=said.append).folder == models.folder
    assert load(twins.TINY, say=said.append).folder == models.folder
    assert said == [line]


def test_the_messages_of_load_are_printed_to_stderr(cache, source, capsys):
    load(source)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"converting {source}")


@pytest.mark.parametrize("kind", [Path, str])
def test_a_diffusers_folder_is_converted_into_the_cache(kind, source, cache):
    models = load(kind(source), say=quiet)
    assert models.folder.parent == cache
    assert models.folder.name.endswith(f"-{FORMAT}")
    assert models.config.family == "cogvideox1.5-i2v"
    bias = leaf_names(models.piece("transformer"))["out.bias"]
    assert float(bias[0]) == pytest.approx(float(load_file(source / WEIGHTS)["proj_out.bias"][0]))


def test_a_converted_folder_is_used_as_it_is(source, cache, tmp_path):
    folder = to_flax(source, tmp_path / "flax")
    assert load(folder, say=quiet).folder == folder
    assert not cache.exists()


def test_a_tilde_is_the_home_folder(source, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    assert load("~/source", say=quiet).folder.parent == cache


def test_a_relative_folder_is_found_before_the_hub(source, cache, hub_ids, monkeypatch):
    monkeypatch.chdir(source.parent.parent)
    assert load(f"{source.parent.name}/source", say=quiet).folder.parent == cache
    assert hub_ids.asked == []


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "./no/folder",
        "/no/folder",
        "no/such/folder",
        "~nobody-of-this-name/x",
        "trailing/",
        "a//b",
    ],
)
def test_what_is_neither_folder_nor_name_nor_hub_id_is_refused(name, cache, hub_ids):
    line = refused(name)
    assert name in line
    assert "cogi2v-tiny, cogvideox-5b-i2v, cogvideox1.5-5b-i2v" in line
    assert hub_ids.asked == []


def test_a_file_is_refused(cache, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "got the file" in refused(tmp_path / "model.safetensors")


def test_a_folder_of_something_else_is_refused(cache, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "must be a diffusers or converted folder" in refused(tmp_path / "photos")
    assert not cache.exists()


# the hub


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("cogvideox-5b-i2v", "zai-org/CogVideoX-5b-I2V"),
        ("cogvideox1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V"),
        ("someone/finetune", "someone/finetune"),
        ("someone/finetune@v2", "someone/finetune@v2"),
        ("someone/finetune@refs/pr/3", "someone/finetune@refs/pr/3"),
    ],
)
def test_a_hub_id_is_fetched_and_converted(name, hub_id, source, cache, hub_ids):
    hub_ids.answer = source
    assert load(name, say=quiet).folder.parent == cache
    assert hub_ids.asked == [hub_id]


def test_without_a_network_a_hub_id_is_one_clear_line(cache):
    """The real client, offline as all tests are."""
    line = refused("zai-org/CogVideoX-5b-I2V")
    assert line.startswith(
        "model zai-org/CogVideoX-5b-I2V must be on the hub, in its cache or a folder here: "
        "HF_HUB_OFFLINE is set"
    )


# compute dtypes


def test_the_compute_dtype_is_float32_on_cpus_and_bfloat16_on_accelerators(
    cache, source, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert load(source, say=quiet).dtype == np.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load(source, say=quiet).dtype == jax.numpy.bfloat16
    assert load(source, "float32", say=quiet).dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype(jnp.bfloat16)])
def test_a_compute_dtype_may_be_a_name_or_a_dtype(dtype, cache, source):
    assert load(source, dtype, say=quiet).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "fp32", "", 3, "float16", jnp.float16, np.dtype(np.float16)]
)
def test_another_compute_dtype_is_refused(dtype, cache):
    line = refused(dtype=dtype)
    half = "float16" in str(dtype)
    assert line.startswith(
        f"dtype must be bfloat16 or float32: got {'float16' if half else dtype!r}".replace(
            "got float16", "got 'float16'"
        )
    )
    assert ("float16 overflows" in line) == half
    assert not cache.exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"path_or_name": 3}, "model must be a path, a name or a hub id: got 3"),
        ({"path_or_name": ""}, "model must be a path, a name or a hub id: got ''"),
        ({"mesh": {"data": 1}}, "mesh must be the name of a machine, or sizes in a text: got {'"),
        ({"vae_tiling": "no"}, "vae_tiling must be true or false: got 'no'"),
        ({"loras": [["file", 1]]}, "loras must be FILE, FILE:WEIGHT or (FILE, WEIGHT): got ['"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_type_hooks")
def test_what_is_of_another_kind_is_refused(given, line, cache):
    assert refused(**given).startswith(line)
    assert not cache.exists()


@pytest.mark.usefixtures("without_type_hooks")
def test_only_what_load_returns_is_adapted() -> None:
    with pytest.raises(ValueError, match=r"models must be what cogi2v_jax.load returns: got 'x'"):
        loading.adapt("x")  # pyright: ignore[reportArgumentType]


def test_an_unknown_attention_is_refused_before_anything_is_converted(cache):
    assert "attention must be" in refused(attention="flash")
    assert not cache.exists()


def test_loading_keeps_compilations(cache, source, monkeypatch):
    kept = []
    monkeypatch.setattr(loading, "keep_compilations", lambda: kept.append(True))
    load(source, say=quiet)
    assert kept == [True]


@pytest.mark.parametrize("mesh", ["v5e-9", "data=0", "pair=2,pair=2"])
def test_a_mesh_that_does_not_exist_is_refused_before_a_model_is_fetched(mesh: str) -> None:
    with pytest.raises(ValueError, match=r"mesh must be auto, v5e-1, .*: got"):
        load("someone/not-there", mesh=mesh)
