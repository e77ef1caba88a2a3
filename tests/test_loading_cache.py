"""The cache of conversions: keyed by content alone, complete or absent, and shared by processes
that load at once."""

import os
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import twins
from cogi2v_convert import conversion
from cogi2v_convert.writing import layers
from safetensors.numpy import load_file, save

from cogi2v_jax import disk, loading
from cogi2v_jax.loading import load
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


def quiet(line: str) -> None:
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def nudge(source: Path) -> None:
    """Another checkpoint of the same shapes, sizes and names: one number differs."""
    tensors = load_file(source / WEIGHTS)
    tensors["proj_out.bias"][0] += 1
    # Into the same file: another inode would show the change.
    (source / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))


def first_bias(models) -> float:
    return float(leaf_names(models.piece("transformer"))["out.bias"][0])


def test_the_same_folder_converts_once(source, cache):
    said = []
    first, second = load(source, say=said.append), load(source, say=said.append)
    assert first.folder == second.folder
    assert len(said) == 1
    assert names(cache) == [first.folder.name]


def test_the_same_content_at_another_path_is_not_converted_again(source, cache, tmp_path):
    first = load(source, say=quiet)
    copy = Path(shutil.copytree(source, tmp_path / "copy of it"))
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in source.iterdir():
        (linked / folder.name).symlink_to(folder)
    said = []
    assert [load(path, say=said.append).folder for path in (copy, linked)] == [first.folder] * 2
    assert said == []


def test_changed_weights_at_the_same_path_are_converted_again(source, cache):
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
def test_changed_settings_are_converted_again(file, source, cache):
    first = load(source, say=quiet)
    (source / file).write_text((source / file).read_text() + "\n")
    assert load(source, say=quiet).folder != first.folder


def test_weights_under_other_names_are_another_checkpoint(source, cache):
    """Converting back restores the files' names, so names are content."""
    first = load(source, say=quiet)
    (source / WEIGHTS).rename((source / WEIGHTS).with_name("other.safetensors"))
    assert load(source, say=quiet).folder != first.folder


def test_an_unfinished_conversion_is_never_used(source, cache, monkeypatch):
    whole = load(source, say=quiet).folder
    shutil.rmtree(whole)
    write_unit = layers.write_unit

    def fail(folder, part, layer, leaves):
        if part == "text_encoder":
            raise KeyboardInterrupt
        write_unit(folder, part, layer, leaves)

    with monkeypatch.context() as patch:
        patch.setattr(layers, "write_unit", fail)
        with pytest.raises(KeyboardInterrupt):
            load(source, say=quiet)
    assert names(cache) == []
    assert load(source, say=quiet).folder == whole


def test_a_killed_conversion_does_not_prevent_the_next(source, cache):
    """A power cut leaves a folder under a name of its own."""
    whole = load(source, say=quiet).folder
    whole.rename(cache / f".{whole.name}.part-01234567")
    assert load(source, say=quiet).folder == whole


DAMAGE = {
    "no manifest": lambda folder: (folder / "checkpoint.json").unlink(),
    "no weights": lambda folder: shutil.rmtree(folder / "vae" / "weights"),
    "an old format": lambda folder: (folder / "checkpoint.json").write_text('{"format": 0}'),
    "nothing": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_conversion_is_made_again(damage, source, cache):
    whole = load(source, say=quiet).folder
    DAMAGE[damage](whole)
    said = []
    models = load(source, say=said.append)
    assert models.folder == whole
    assert len(said) == 1
    models.piece("vae")


@pytest.mark.parametrize("obstacle", ["a file in its place", "no permission"])
def test_without_a_cache_a_conversion_is_kept_as_long_as_the_process(
    obstacle, source, cache, monkeypatch
):
    if obstacle == "no permission":
        access = os.access
        monkeypatch.setattr(
            loading.os, "access", lambda path, mode: Path(path) != cache and access(path, mode)
        )
    else:
        cache.parent.parent.write_text("in the way")
    disk.process_folder.cache_clear()
    monkeypatch.setattr(disk, "at_end", ExitStack())
    said = []
    models = load(source, say=said.append)
    assert (
        said[0]
        == f"cannot write {cache}: not keeping the conversion; XDG_CACHE_HOME sets another place"
    )
    assert said[1].startswith(f"converting {source} into ")
    assert cache not in models.folder.parents
    models.piece("text_encoder")
    disk.at_end.close()
    disk.process_folder.cache_clear()
    assert not models.folder.exists()


def test_two_threads_that_convert_at_once_both_succeed(source, cache, monkeypatch):
    meeting = threading.Barrier(2, timeout=60)
    convert = conversion.to_flax

    def together(*arguments, **settings):
        meeting.wait()  # both have found no folder, and start to make it
        return convert(*arguments, **settings)

    monkeypatch.setattr(conversion, "to_flax", together)
    loaded = []
    threads = [
        threading.Thread(target=lambda: loaded.append(load(source, "float32", say=quiet)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 2
    assert loaded[0].folder == loaded[1].folder
    assert names(cache) == [loaded[0].folder.name]
    assert first_bias(loaded[0]) == first_bias(loaded[1])


@pytest.mark.parametrize("moment", [("transformer", None), ("text_encoder", 2)])
def test_a_conversion_that_another_program_is_making_is_waited_for_and_used(
    moment, source, cache, monkeypatch
):
    write_unit = layers.write_unit
    written, others, folders = [], [], []

    def overtaken(folder, part, layer, leaves):
        write_unit(folder, part, layer, leaves)
        written.append((part, layer))
        if (part, layer) == moment:
            others.append(
                threading.Thread(target=lambda: folders.append(load(source, say=quiet).folder))
            )
            others[0].start()

    monkeypatch.setattr(layers, "write_unit", overtaken)
    folder = load(source, say=quiet).folder
    others[0].join(60)
    assert folders == [folder]
    assert len(written) == len(set(written))
    assert names(cache) == [folder.name]


def test_two_processes_that_load_at_once_both_succeed(source, cache):
    program = (
        "import sys, cogi2v_jax; "
        "print(cogi2v_jax.load(sys.argv[1]).piece('transformer').out.bias[0])"
    )
    command = [sys.executable, "-c", program, str(source)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert len(names(cache)) == 1


def test_a_file_in_the_way_of_a_conversion_is_an_error(source, cache):
    whole = load(source, say=quiet).folder
    shutil.rmtree(whole)
    whole.with_name(f".{whole.name}.part").touch()
    with pytest.raises(FileExistsError, match=r"\.part"):
        load(source, say=quiet)


# cached hashes of large files


@pytest.fixture
def large(source, monkeypatch):
    """All files count as large and old. Returns the names of the source's files that are hashed."""
    hashed = []
    digest = loading.hashlib.file_digest

    def watch(stream, kind):
        if source in Path(stream.name).parents:
            hashed.append(Path(stream.name).name)
        return digest(stream, kind)

    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(loading, "COARSEST_CLOCK", -1)
    monkeypatch.setattr(loading.hashlib, "file_digest", watch)
    return hashed


def test_a_large_file_is_hashed_once(source, cache, large):
    first = load(source, say=quiet)
    assert "diffusion_pytorch_model.safetensors" in large
    large.clear()
    assert load(source, say=quiet).folder == first.folder
    assert large == []


def test_a_large_file_that_changed_is_hashed_again_whatever_its_modification_time(
    source, cache, large
):
    first = load(source, say=quiet)
    large.clear()
    before = (source / WEIGHTS).stat()
    nudge(source)
    os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(source, say=quiet).folder != first.folder
    assert large == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(("limit", "value"), [("COARSEST_CLOCK", 10**18), ("LARGE", 2**40)])
def test_the_hash_of_a_small_file_or_one_just_changed_is_not_cached(
    limit, value, source, cache, large, monkeypatch
):
    """Within the resolution of the file system's clock, a second change would change no time."""
    monkeypatch.setattr(loading, limit, value)
    load(source, say=quiet)
    assert names(cache) == [load(source, say=quiet).folder.name]
    assert large.count("spiece.model") == 2


def test_a_cached_hash_is_complete(source, cache, large):
    load(source, say=quiet)
    cached = list((cache / "sha256").iterdir())
    assert len(cached) == len(large)
    assert all(len(file.read_text()) == len(file.name) == 64 for file in cached)


@pytest.mark.parametrize("text", [b"", b"0" * 63, bytes(64), b"\xff" * 64])
def test_what_is_no_hash_in_the_cache_is_as_none(text, source, cache, large):
    """A power cut may leave empty files, or zeros."""
    first = load(source, say=quiet)
    hashed, cached = list(large), list((cache / "sha256").iterdir())
    for file in cached:
        file.write_bytes(text)
    shutil.rmtree(first.folder)
    large.clear()
    assert load(source, say=quiet).folder == first.folder
    assert large == hashed
    assert all(loading.SHA256.fullmatch(file.read_text()) for file in cached)
