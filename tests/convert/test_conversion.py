"""Converts whole folders to ours and back, bit for bit, or makes nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from cogi2v_convert import conversion
from cogi2v_convert.__main__ import main
from cogi2v_convert.conversion import to_flax, to_torch
from cogi2v_convert.writing import layers
from diffusers import CogVideoXImageToVideoPipeline
from folders import FILES, KINDS, PARTS, left, one_line, raw, settings, weights
from safetensors.torch import load_file, save_file

from cogi2v_jax.loading import load
from cogi2v_jax.weights.checkpoint import MANIFEST, read_unit, write_unit
from cogi2v_jax.weights.pieces import leaf_names


@pytest.fixture(scope="module")
def pipelines():
    return {family: twins.pipeline(family) for family in twins.FAMILIES}


@pytest.fixture(scope="module")
def saved(pipelines, tmp_path_factory):
    """One diffusers folder a family; to be copied, not changed."""
    return {
        family: twins.save(pipeline, tmp_path_factory.mktemp(family))
        for family, pipeline in pipelines.items()
    }


@pytest.fixture(scope="module")
def converted(saved, tmp_path_factory):
    """A converted folder; to be copied, not changed."""
    return to_flax(saved["1.0"], tmp_path_factory.mktemp("converted") / "flax")


@pytest.fixture
def source(saved, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(saved["1.0"], tmp_path / "source"))


# names


NAMES = ["[AI]", "a\\b", "**", "gs:", b"\xff".decode(errors="surrogateescape"), "a b%20c;é猫"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_may_have_any_name(name, saved, converted, tmp_path, capsys):
    folder = tmp_path / name
    flax = to_flax(saved["1.0"], folder / "flax")
    assert main(["check", str(flax)]) == 0
    assert main(["inspect", str(flax)]) == 0
    capsys.readouterr()
    assert raw(to_torch(flax, folder / "back"), "vae") == raw(saved["1.0"], "vae")
    ours, theirs = (leaf_names(load(each).piece("vae")) for each in (flax, converted))
    assert all(np.array_equal(ours[leaf][...], theirs[leaf][...]) for leaf in theirs)
    assert main(["check", str(Path(flax).rename(tmp_path / "moved"))]) == 0


def test_a_layer_that_reads_back_as_another_is_refused(source, tmp_path, monkeypatch):
    def write(folder, part, layer, leaves):
        write_unit(
            folder, part, layer, {name: leaf + (layer == 1) for name, leaf in leaves.items()}
        )

    monkeypatch.setattr(layers, "write_unit", write)
    with pytest.raises(OSError, match=r"must hold what was written there: transformer/weights/001"):
        to_flax(source, tmp_path / "flax")
    assert left(tmp_path) == {"source"}


# to ours and back


@pytest.mark.parametrize("kind", KINDS)
def test_to_torch_gives_back_what_to_flax_took_bit_for_bit(kind, source, tmp_path):
    KINDS[kind](source)
    back = to_torch(to_flax(source, tmp_path / "flax"), tmp_path / "back")
    for part in PARTS:
        assert raw(back, part) == raw(source, part)
    assert settings(back) == settings(source)


def shard(pipeline, folder: Path) -> Path:
    """Three and more shards of the transformer and of the text encoder, each with an index."""
    for part, size in (("transformer", "700KB"), ("text_encoder", "30KB")):
        weights(folder, part).unlink()
        getattr(pipeline, part).save_pretrained(folder / part, max_shard_size=size)
        assert len(list((folder / part).glob("*.safetensors"))) >= 3
    return folder


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_shards_come_back_as_they_were_and_diffusers_loads_them(family, pipelines, saved, tmp_path):
    source = shard(pipelines[family], Path(shutil.copytree(saved[family], tmp_path / "source")))
    back = to_torch(to_flax(source, tmp_path / "flax"), tmp_path / "back")
    for part in PARTS:
        assert raw(back, part) == raw(source, part)
        for index in (source / part).glob("*.index.json"):
            ours, theirs = (
                json.loads((folder / part / index.name).read_text()) for folder in (back, source)
            )
            assert ours["weight_map"] == theirs["weight_map"]
            assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert left(back / "transformer") == left(source / "transformer")
    loaded = CogVideoXImageToVideoPipeline.from_pretrained(back)
    for part in PARTS:
        ours, theirs = (
            getattr(loaded, part).state_dict(),
            getattr(pipelines[family], part).state_dict(),
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        loaded.scheduler.config.snr_shift_scale
        == pipelines[family].scheduler.config.snr_shift_scale
    )
    assert (
        loaded.tokenizer("the cyan triangle").input_ids
        == pipelines[family].tokenizer("the cyan triangle").input_ids
    )


def test_a_single_shard_keeps_its_index(source, tmp_path):
    one = "diffusion_pytorch_model-00001-of-00001.safetensors"
    file = weights(source, "vae").rename(source / "vae" / one)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), one)}
    (source / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    back = to_torch(to_flax(source, tmp_path / "flax"), tmp_path / "back")
    assert raw(back, "vae") == raw(source, "vae")
    assert left(back / "vae") == left(source / "vae")


def test_shards_of_any_name_get_the_index_that_diffusers_looks_for(source, pipelines, tmp_path):
    tensors = load_file(weights(source, "vae"))
    weights(source, "vae").unlink()
    weight_map = {name: f"part-0{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
            source / "vae" / file,
        )
    (source / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    back = to_torch(to_flax(source, tmp_path / "flax"), tmp_path / "back")
    assert raw(back, "vae") == raw(source, "vae")
    assert left(back / "vae") == left(source / "vae")


def test_variants_beside_the_weights_are_ignored(source, tmp_path):
    for part in PARTS:
        shutil.copyfile(weights(source, part), source / part / f"{FILES[part]}.fp16.safetensors")
    recorded = json.loads((to_flax(source, tmp_path / "flax") / MANIFEST).read_text())["tensors"]
    assert {entry["file"] for part in PARTS for entry in recorded[part].values()} == {
        f"{name}.safetensors" for name in FILES.values()
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["mixed", "embedding twice"])
def test_a_dtype_casts_every_weight_as_torch_does(dtype, kind, source, tmp_path):
    KINDS[kind](source)
    back = to_torch(to_flax(source, tmp_path / "flax", dtype), tmp_path / "back")
    for part in PARTS:
        theirs, ours = load_file(weights(source, part)), load_file(weights(back, part))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == getattr(torch, dtype)
            assert torch.equal(ours[name], tensor.to(getattr(torch, dtype)))


def test_no_unit_holds_more_than_one_layer(converted):
    """So that 20 GB are converted in the memory of two layers."""
    for layer in range(3):
        unit = read_unit(converted, "transformer", layer)
        assert unit["blocks.attn.q.kernel"].shape == (96, 96)
        assert all("blocks" in name for name in unit)
    assert not any(
        "blocks" in name.split(".") for name in read_unit(converted, "transformer", None)
    )


def test_progress_counts_the_bytes_of_all_parts_to_their_end(source, tmp_path):
    for convert, given, made in ((to_flax, source, "flax"), (to_torch, tmp_path / "flax", "back")):
        calls = []
        convert(given, tmp_path / made, progress=lambda *call, calls=calls: calls.append(call))
        parts, done, totals = zip(*calls, strict=True)
        assert list(dict.fromkeys(parts)) == list(PARTS)
        assert list(done) == sorted(done)
        total = sum(len(values) for part in PARTS for *_, values in raw(source, part).values())
        assert set(totals) == {total}
        assert done[-1] == total


# all or nothing


@pytest.mark.parametrize("error", [OSError("disk full"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("unit", [("transformer", None), ("text_encoder", 2)])
def test_a_conversion_that_fails_leaves_nothing(error, unit, source, tmp_path, monkeypatch):
    write_unit = layers.write_unit

    def fail(folder, part, layer, leaves):
        write_unit(folder, part, layer, leaves)
        if (part, layer) == unit:
            raise error

    monkeypatch.setattr(layers, "write_unit", fail)
    with pytest.raises(type(error)):
        to_flax(source, tmp_path / "flax")
    assert left(tmp_path) == {"source"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_conversion_to_torch_that_fails_leaves_nothing(error, converted, tmp_path, monkeypatch):
    write = conversion.write_safetensors

    def fail(path, tensors, read):
        write(path, tensors, read)
        raise error

    monkeypatch.setattr(conversion, "write_safetensors", fail)
    with pytest.raises(type(error)):
        to_torch(converted, tmp_path / "back")
    assert left(tmp_path) == set()


def test_the_destination_appears_only_when_all_is_written(source, tmp_path, monkeypatch):
    seen = []
    write_unit = layers.write_unit

    def watch(*args):
        write_unit(*args)
        seen.append((tmp_path / "flax").exists())

    monkeypatch.setattr(layers, "write_unit", watch)
    to_flax(source, tmp_path / "flax")
    assert seen == [False] * 9
    assert left(tmp_path) == {"source", "flax"}


@pytest.mark.parametrize(("error", "code"), [(OSError("disk full"), 1), (KeyboardInterrupt(), 130)])
def test_the_command_prints_in_one_line_why_it_stopped(
    error, code, source, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr(layers, "write_unit", fail)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"], code)
    assert ("disk full" if code == 1 else "nothing was left") in line
    assert left(tmp_path) == {"source"}


@pytest.mark.parametrize("command", ["to-flax", "to-torch"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_destination_that_exists_is_refused_and_untouched(
    command, kind, saved, converted, tmp_path, capsys
):
    destination = tmp_path / "there"
    if kind == "folder":
        destination.mkdir()
    file = destination / "mine.txt" if kind == "folder" else destination
    file.write_text("mine")
    line = one_line(
        capsys, [command, saved["1.0"] if command == "to-flax" else converted, destination]
    )
    assert "must not exist yet: found it" in line  # an hour of work earlier than by the rename
    assert file.read_text() == "mine"
    assert left(tmp_path) == {"there"}
    assert left(destination) == {"mine.txt"} if kind == "folder" else True


def test_an_empty_destination_is_filled(converted, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (to_torch(converted, tmp_path / "empty") / "model_index.json").is_file()


# the command


def test_the_command_converts_both_ways_and_prints_the_folder(saved, tmp_path, capsys):
    assert main(["to-flax", str(saved["1.5"]), str(tmp_path / "flax")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'flax'}\n"
    assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}\n"
    assert raw(tmp_path / "back", "transformer") == raw(saved["1.5"], "transformer")


def test_converting_takes_no_device(saved, tmp_path):
    command = [sys.executable, "-m", "cogi2v_convert", "to-flax", saved["1.0"], tmp_path / "flax"]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_casts_if_asked(saved, tmp_path):
    assert main(["to-flax", str(saved["1.0"]), str(tmp_path / "flax"), "--dtype", "bfloat16"]) == 0
    dtypes = {
        leaf.dtype.name
        for part in PARTS
        for leaf in read_unit(tmp_path / "flax", part, None).values()
    }
    assert dtypes == {"bfloat16"}


@pytest.mark.parametrize(
    "arguments", [[], ["to-flax", "x"], ["to-flax", "x", "y", "--dtype", "float16"], ["sing"]]
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "cogi2v-convert" in capsys.readouterr().err
