"""Every way to name a checkpoint, and a cache that goes by content alone."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import twins
from cogi2v_convert import conversion
from cogi2v_convert.conversion import to_flax
from safetensors.numpy import load_file, save_file

from cogi2v_jax import hub
from cogi2v_jax.checkpoint import FORMAT, leaf_names
from cogi2v_jax.hub import load

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A diffusers folder; to be copied, not changed."""
    return twins.save(twins.pipeline("1.5"), tmp_path_factory.mktemp("saved"))


@pytest.fixture
def source(saved, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(saved, tmp_path / "source"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own; compilations stay where the other tests have theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "keep_compilations", lambda: None)
    return tmp_path / "cache" / "cogi2v-jax" / "converted"


@pytest.fixture
def snapshots(monkeypatch):
    """A hub whose every repository is the folder last put here (or an error), and what was asked of it."""
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        if isinstance(download.answer, Exception):
            raise download.answer
        return str(download.answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    download.asked = asked
    return download


def quiet(line: str) -> None:
    pass


def refused(*arguments, **named) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(*arguments, say=quiet, **named)
    assert "\n" not in str(caught.value)
    assert " must " in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nudge(source: Path) -> None:
    """Another checkpoint of the same shapes, sizes and names: one number differs."""
    tensors = load_file(source / WEIGHTS)
    tensors["proj_out.bias"][0] += 1
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


def first_bias(models) -> float:
    return float(leaf_names(models.part("transformer"))["out.bias"][0])


# names


def test_the_embedded_model_is_what_load_takes_without_a_name(cache):
    said = []
    models = load(say=said.append)
    assert models.config.name == "cogi2v-tiny"
    assert models.folder.parent == cache
    (line,) = said
    assert line == f"converting {hub.EMBEDDED / 'cogi2v-tiny'} into {models.folder}, once"
    assert load("cogi2v-tiny", say=said.append).folder == models.folder
    assert load(twins.TINY, say=said.append).folder == models.folder
    assert said == [line]


def test_what_load_says_goes_to_stderr(cache, source, capsys):
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
    assert first_bias(models) == pytest.approx(float(load_file(source / WEIGHTS)["proj_out.bias"][0]))


def test_a_converted_folder_is_taken_as_it_is(source, cache, tmp_path):
    folder = to_flax(source, tmp_path / "flax")
    assert load(folder, say=quiet).folder == folder
    assert not cache.exists()


def test_a_tilde_is_the_home_folder(source, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(source.parent))
    assert load("~/source", say=quiet).folder.parent == cache


def test_a_relative_folder_is_found_before_the_hub(source, cache, snapshots, monkeypatch):
    monkeypatch.chdir(source.parent.parent)
    assert load(f"{source.parent.name}/source", say=quiet).folder.parent == cache
    assert snapshots.asked == []


@pytest.mark.parametrize("name", ["nothing", "./no/folder", "/no/folder", "no/such/folder", "~nobody-of-this-name/x", "trailing/", "a//b"])
def test_what_is_neither_folder_nor_name_nor_hub_id_is_refused(name, cache, snapshots):
    line = refused(name)
    assert name in line
    assert "cogi2v-tiny, cogvideox-5b-i2v, cogvideox1.5-5b-i2v" in line
    assert snapshots.asked == []


def test_a_file_is_refused(cache, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "got the file" in refused(tmp_path / "model.safetensors")


def test_a_folder_of_something_else_is_refused(cache, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "must be a diffusers or converted folder" in refused(tmp_path / "photos")
    assert not cache.exists()


# the hub


def test_a_hub_id_is_fetched_and_converted(source, cache, snapshots):
    snapshots.answer = source
    said = []
    models = load("someone/finetune", say=said.append)
    assert models.folder.parent == cache
    assert said[0] == "fetching someone/finetune from the hub"
    ((hub_id, patterns),) = snapshots.asked
    assert hub_id == "someone/finetune"
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert all(any(path.match(pattern) for pattern in patterns) for path in files)
    unneeded = [
        "README.md",
        "transformer/diffusion_pytorch_model.bin",
        "text_encoder/model.fp32.pt",
        "model.safetensors",
        "assets/video.mp4",
    ]
    assert not any(Path(path).match(pattern) for path in unneeded for pattern in patterns)


@pytest.mark.parametrize(
    ("name", "hub_id"), [("cogvideox-5b-i2v", "zai-org/CogVideoX-5b-I2V"), ("cogvideox1.5-5b-i2v", "zai-org/CogVideoX1.5-5B-I2V")]
)
def test_a_released_checkpoint_is_fetched_by_its_name_and_its_licence_named(name, hub_id, source, cache, snapshots):
    snapshots.answer = source
    said = []
    load(name, say=said.append)
    assert snapshots.asked[0][0] == hub_id
    assert hub_id in said[0]
    assert "licence" in said[0]
    assert "commercial" in said[0]


def test_without_a_network_a_hub_id_is_one_clear_line(cache):
    """The real client, offline as all tests are."""
    line = refused("zai-org/CogVideoX-5b-I2V")
    assert line.startswith("model zai-org/CogVideoX-5b-I2V must be reachable on the hub or in its cache: ")


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError(""), ValueError("  \n"), KeyError("x")])
def test_whatever_the_hub_raises_is_one_clear_line(error, cache, snapshots):
    snapshots.answer = error
    assert refused("someone/model").startswith("model someone/model must be reachable on the hub or in its cache: ")


# the cache


def test_the_same_folder_converts_once(source, cache):
    said = []
    first, second = load(source, say=said.append), load(source, say=said.append)
    assert first.folder == second.folder
    assert len(said) == 1
    assert names(cache) == [first.folder.name]


def test_the_same_content_under_another_path_converts_nothing(source, cache, tmp_path):
    first = load(source, say=quiet)
    copy = Path(shutil.copytree(source, tmp_path / "copy of it"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in source.iterdir():
        (linked / folder.name).symlink_to(folder)
    said = []
    assert [load(path, say=said.append).folder for path in (copy, linked)] == [first.folder] * 2
    assert said == []


def test_changed_weights_at_the_same_path_convert_anew(source, cache):
    first = load(source, say=quiet)
    before = (source / WEIGHTS).stat()
    nudge(source)
    os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (source / WEIGHTS).stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = load(source, say=quiet)
    assert second.folder != first.folder
    assert first_bias(second) == pytest.approx(first_bias(first) + 1)


@pytest.mark.parametrize(
    "file",
    ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
def test_changed_settings_convert_anew(file, source, cache):
    first = load(source, say=quiet)
    (source / file).write_text((source / file).read_text() + "\n")
    assert load(source, say=quiet).folder != first.folder


def test_weights_under_other_names_are_another_checkpoint(source, cache):
    """The way back gives files their names, so names are content."""
    first = load(source, say=quiet)
    (source / WEIGHTS).rename((source / WEIGHTS).with_name("other.safetensors"))
    assert load(source, say=quiet).folder != first.folder


def test_a_half_finished_conversion_is_never_taken(source, cache, monkeypatch):
    whole = load(source, say=quiet).folder
    shutil.rmtree(whole)
    write_unit = conversion.write_unit

    def fail(folder, part, layer, leaves):
        if part == "text_encoder":
            raise KeyboardInterrupt
        write_unit(folder, part, layer, leaves)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_unit", fail)
        with pytest.raises(KeyboardInterrupt):
            load(source, say=quiet)
    assert names(cache) == []
    assert load(source, say=quiet).folder == whole


def test_a_killed_conversion_does_not_hinder_the_next(source, cache):
    """A power cut leaves a folder under a name of its own."""
    whole = load(source, say=quiet).folder
    whole.rename(cache / f".{whole.name}.part-01234567")
    assert load(source, say=quiet).folder == whole


def test_an_emptied_cache_folder_is_made_anew(source, cache):
    whole = load(source, say=quiet).folder
    (whole / "checkpoint.json").unlink()
    shutil.rmtree(whole / "vae")
    models = load(source, say=quiet)
    assert models.folder == whole
    models.part("vae")


def test_two_threads_that_convert_at_once_both_succeed(source, cache, monkeypatch):
    meeting = threading.Barrier(2, timeout=60)
    convert = conversion.to_flax

    def together(*arguments):
        meeting.wait()  # neither has the folder, and both make it
        return convert(*arguments)

    monkeypatch.setattr(conversion, "to_flax", together)
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(load(source, "float32", say=quiet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 2
    assert loaded[0].folder == loaded[1].folder
    assert names(cache) == [loaded[0].folder.name]
    assert first_bias(loaded[0]) == first_bias(loaded[1])


@pytest.mark.parametrize("moment", [("transformer", None), ("text_encoder", 2)])
def test_a_folder_that_another_process_finishes_meanwhile_is_taken(moment, source, cache, monkeypatch):
    write_unit = conversion.write_unit
    others = []

    def overtaken(folder, part, layer, leaves):
        write_unit(folder, part, layer, leaves)
        if (part, layer) == moment and not others:
            others.append("under way")
            others.append(load(source, say=quiet).folder)

    monkeypatch.setattr(conversion, "write_unit", overtaken)
    folder = load(source, say=quiet).folder
    assert folder == others[1]
    assert names(cache) == [folder.name]


def test_two_processes_that_load_at_once_both_succeed(source, cache):
    program = "import sys, cogi2v_jax; print(cogi2v_jax.load(sys.argv[1]).part('transformer').out.bias[0])"
    command = [sys.executable, "-c", program, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert len(names(cache)) == 1


# remembered hashes of large files


@pytest.fixture
def large(monkeypatch):
    """Every file counts as large and as old; what is hashed is listed."""
    hashed = []
    digest = hub.hashlib.file_digest

    def watch(stream, kind):
        hashed.append(Path(stream.name).name)
        return digest(stream, kind)

    monkeypatch.setattr(hub, "LARGE", 0)
    monkeypatch.setattr(hub, "YOUNG", -1)
    monkeypatch.setattr(hub.hashlib, "file_digest", watch)
    return hashed


def test_a_large_file_is_hashed_once(source, cache, large):
    first = load(source, say=quiet)
    assert "diffusion_pytorch_model.safetensors" in large
    large.clear()
    assert load(source, say=quiet).folder == first.folder
    assert large == []


def test_a_large_file_that_changed_is_hashed_anew_whatever_its_times_say(source, cache, large):
    first = load(source, say=quiet)
    large.clear()
    before = (source / WEIGHTS).stat()
    nudge(source)
    os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(source, say=quiet).folder != first.folder
    assert large == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(("limit", "value"), [("YOUNG", 10**18), ("LARGE", 2**40)])
def test_the_hash_of_a_file_that_is_small_or_just_changed_is_not_remembered(limit, value, source, cache, large, monkeypatch):
    """Within one tick of the file system's clock, a second change would leave every time as it was."""
    monkeypatch.setattr(hub, limit, value)
    load(source, say=quiet)
    assert names(cache) == [load(source, say=quiet).folder.name]
    assert large.count("spiece.model") == 2


def test_a_remembered_hash_is_whole(source, cache, large):
    load(source, say=quiet)
    notes = list((cache / "sha256").iterdir())
    assert len(notes) == len(large)
    assert all(len(note.read_text()) == len(note.name) == 64 for note in notes)


# what the model computes in


def test_the_compute_dtype_is_float32_on_cpus_and_bfloat16_on_accelerators(cache, source, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert load(source, say=quiet).dtype == np.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load(source, say=quiet).dtype == jax.numpy.bfloat16
    assert load(source, "float32", say=quiet).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp32", "", "float16"])
def test_another_compute_dtype_is_refused(dtype, cache):
    line = refused(dtype=dtype)
    assert line.startswith(f"dtype must be bfloat16 or float32: got {dtype!r}")
    assert ("float16 overflows" in line) == (dtype == "float16")
    assert not cache.exists()


def test_an_unknown_attention_is_refused_before_anything_is_converted(cache):
    assert "attention must be" in refused(attention="flash")
    assert not cache.exists()


def test_loading_keeps_compilations(cache, source, monkeypatch):
    kept = []
    monkeypatch.setattr(hub, "keep_compilations", lambda: kept.append(True))
    load(source, say=quiet)
    assert kept == [True]
