"""Faulty folders, each refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import twins
from cogi2v_convert.conversion import to_flax, to_torch
from folders import (
    ALIAS,
    SHARED,
    left,
    one_line,
    other_width,
    rewrite,
    several,
    weights,
)
from safetensors.torch import load_file

from cogi2v_jax.weights.checkpoint import MANIFEST


@pytest.fixture(scope="module")
def converted(saved, tmp_path_factory):
    """A converted folder; to be copied, not changed."""
    return to_flax(saved["1.0"], tmp_path_factory.mktemp("converted") / "flax")


@pytest.fixture
def source(saved, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(saved["1.0"], tmp_path / "source"))


@pytest.fixture
def flax(converted, tmp_path):
    """A converted folder to change."""
    return Path(shutil.copytree(converted, tmp_path / "flax"))


# faulty sources


def edit(part, change):
    return lambda folder: rewrite(folder, part, change)


def replace_weights(part, data):
    return lambda folder: weights(folder, part).write_bytes(data)


def truncate(folder):
    path = weights(folder, "vae")
    path.write_bytes(path.read_bytes()[:-1000])


def indexed(change):
    """An index over the VAE's one file, changed."""

    def make(folder):
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(
                load_file(weights(folder, "vae")), "diffusion_pytorch_model.safetensors"
            ),
        }
        text = change(index) or json.dumps(index)
        (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)

    return make


def point(file):
    return indexed(lambda index: index["weight_map"].update({"encoder.conv_in.conv.bias": file}))


def promised_and_missing(folder):
    indexed(lambda _: None)(folder)
    rewrite(folder, "vae", lambda tensors: tensors.pop("encoder.conv_in.conv.bias"))


def in_two_shards(folder):
    shutil.copyfile(weights(folder, "vae"), folder / "vae" / "again.safetensors")
    point("again.safetensors")(folder)


def other_zero(tensors):
    tensors[SHARED][0] = 0.0
    tensors[ALIAS] = tensors[SHARED].clone()
    tensors[ALIAS][0] = -0.0


def same_bits(tensors):
    tensors[SHARED] = tensors[SHARED].half()
    tensors[ALIAS] = tensors[SHARED].view(torch.bfloat16)


def no_last_layer(tensors):
    for name in [name for name in tensors if "block.2." in name]:
        del tensors[name]


def drop(path):
    def change(folder):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


def other_bin(folder):
    weights(folder, "transformer").unlink()
    (folder / "transformer" / "pytorch_model.bin").write_bytes(b"garbage" * 99)


def no_tokenizer_model(folder):
    for name in ("spiece.model", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink()


def recast(dtype):
    return edit(
        "transformer",
        lambda tensors: tensors.update({"proj_out.bias": tensors["proj_out.bias"].to(dtype)}),
    )


def text_to_video(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"in_channels": 8', '"in_channels": 4'))


FAULTS = {
    "missing shard": (
        point("gone-00002.safetensors"),
        r"vae must hold every shard its index names: missing gone-00002",
    ),
    "truncated": (
        truncate,
        r"vae/diffusion_pytorch_model.safetensors must be a whole safetensors file",
    ),
    "garbage": (
        replace_weights("vae", b"garbage" * 99),
        r"diffusion_pytorch_model.safetensors must be a whole safetensors file",
    ),
    "empty": (
        replace_weights("vae", b""),
        r"diffusion_pytorch_model.safetensors must be a whole safetensors file",
    ),
    "index above its folder": (
        point("../transformer/diffusion_pytorch_model.safetensors"),
        r"must name files of its own folder: got \.\./",
    ),
    "index elsewhere": (
        point("/etc/passwd"),
        r"must name files of its own folder: got /etc/passwd",
    ),
    "index of broken JSON": (
        indexed(lambda _: '{"weight_map": '),
        r"index.json must be a JSON file",
    ),
    "index without a map": (indexed(lambda _: "{}"), r"index.json must have a weight_map from"),
    "index of a list": (indexed(lambda _: "[]"), r"index.json must hold a JSON object"),
    "index of numbers": (point(3), r"index.json must have a weight_map from"),
    "index that promises": (
        indexed(
            lambda index: index["weight_map"].update(
                {"decoder.new": "diffusion_pytorch_model.safetensors"}
            )
        ),
        r"vae: decoder.new is in the index and in no shard",
    ),
    "promised tensor missing": (
        promised_and_missing,
        r"must fit the network: vae: encoder.conv_in.conv.bias is missing$",
    ),
    "tensor twice": (
        in_two_shards,
        r"must be in one file: got it in again.safetensors and diffusion_pytorch_model.safetensors",
    ),
    "missing tensor": (
        edit("vae", lambda tensors: tensors.pop("encoder.conv_in.conv.bias")),
        r"vae: encoder.conv_in.conv.bias is missing$",
    ),
    "missing layer": (
        edit("text_encoder", no_last_layer),
        r"text_encoder: encoder.block.2.layer.0.layer_norm.weight is missing; "
        r".*block.2.layer.1.DenseReluDense.wo.weight is missing$",
    ),
    "extra tensor": (
        edit("transformer", lambda tensors: tensors.update(new=torch.zeros(3))),
        r"network: transformer: new has no rule$",
    ),
    "wrong shape": (
        edit("transformer", lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)})),
        r"transformer: proj_out.bias must have the shape \[16\]: got \[3\]$",
    ),
    "several at once": (
        several,
        r"transformer: extra has no rule; transformer: proj_out.bias is missing; "
        r"vae: encoder.conv_out.conv.bias must have the shape \[8\]: got \[3\]; text_encoder: "
        r"encoder.final_layer_norm.weight is missing$",
    ),
    "embedding twice, unlike": (
        edit("text_encoder", lambda tensors: tensors.update({ALIAS: tensors[SHARED] + 1})),
        r"encoder.embed_tokens.weight must equal shared.weight, its other name",
    ),
    "embedding twice, of two dtypes": (
        edit("text_encoder", same_bits),
        r"encoder.embed_tokens.weight must equal shared.weight, its other name",
    ),
    "embedding twice, with another zero": (
        edit("text_encoder", other_zero),
        r"encoder.embed_tokens.weight must equal shared.weight, its other name",
    ),
    "integers": (
        recast(torch.int8),
        r"proj_out.bias must be one of F64, .* or GGUF's Q4_0 .*: got I8; take",
    ),
    "a .bin of something else": (
        other_bin,
        r"transformer/pytorch_model.bin must be a whole safetensors file",
    ),
    "no weights": (
        drop("vae/diffusion_pytorch_model.safetensors"),
        r"vae must hold one safetensors file or an index .*: found 0 files$",
    ),
    "two weights": (
        lambda folder: shutil.copyfile(
            weights(folder, "vae"), folder / "vae" / "other.safetensors"
        ),
        r"vae must hold one safetensors file or an index of shards: found 2 files$",
    ),
    "no scheduler": (drop("scheduler"), r"scheduler must hold scheduler_config.json: found none$"),
    "no tokenizer": (
        drop("tokenizer"),
        r"tokenizer must hold spiece.model or tokenizer.json: found neither$",
    ),
    "tokenizer without its model": (
        no_tokenizer_model,
        r"tokenizer must hold spiece.model or tokenizer.json: found neither$",
    ),
    "no text encoder": (drop("text_encoder"), r"text_encoder must hold config.json: found none$"),
    "broken config": (
        lambda folder: (folder / "vae" / "config.json").write_text("{"),
        r"vae/config.json must be a JSON file",
    ),
    "VAE of another width": (other_width, r"vae: .* must have the shape .*; and \d+ more$"),
    "text to video": (text_to_video, r"which is a text-to-video checkpoint$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_source_is_refused_in_one_line_and_nothing_is_made(
    fault, source, tmp_path, capsys
):
    change, expected = FAULTS[fault]
    change(source)
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert str(source) in line
    assert re.search(expected, line)
    assert left(tmp_path) == {"source"}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n"


@pytest.mark.parametrize("command", ["to-flax", "inspect"])
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/spiece.model",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/README.md",
        "transformer/config.json",
        "model_index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_pointer_of_git_lfs_is_named(name, command, source, tmp_path, capsys):
    (source / name).write_text(POINTER)
    arguments = [command, source, *([tmp_path / "flax"] if command == "to-flax" else [])]
    line = one_line(capsys, arguments)
    assert f"{source / name} must be the file itself: got a git-lfs pointer; fetch" in line
    assert left(tmp_path) == {"source"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("tokenizer/spiece.model", "must be a sentencepiece model"),
        ("tokenizer/tokenizer.json", "must be a JSON file"),
        ("tokenizer/special_tokens_map.json", "must be a JSON file"),
        ("model_index.json", "must be a JSON file"),
    ],
)
def test_every_file_that_is_taken_over_is_parsed(name, rule, source, tmp_path, capsys):
    (source / name).write_bytes(b"<html>")
    line = one_line(capsys, ["to-flax", source, tmp_path / "flax"])
    assert f"{source / name} {rule}" in line
    assert left(tmp_path) == {"source"}


def test_the_library_raises_builtin_exceptions(source, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"SRC must be a folder, a file, a hub id or one of .*: found no"
    ):
        to_flax(tmp_path / "nothing", tmp_path / "flax")
    several(source)
    with pytest.raises(ValueError, match="must fit the network"):
        to_flax(source, tmp_path / "flax")
    with pytest.raises(FileNotFoundError, match=r"must hold checkpoint\.json"):
        to_torch(source, tmp_path / "back")
    with pytest.raises(FileExistsError, match="must not exist yet"):
        to_torch(to_flax(twins.TINY, tmp_path / "flax"), source)


@pytest.mark.parametrize("command", ["to-flax", "to-torch", "inspect"])
@pytest.mark.parametrize("kind", ["nothing", "empty folder", "file"])
def test_what_is_no_checkpoint_at_all_is_refused_in_one_line(command, kind, tmp_path, capsys):
    path = tmp_path / "x"
    if kind == "empty folder":
        path.mkdir()
    if kind == "file":
        path.write_text("not a folder")
    line = one_line(capsys, [command, path] + [tmp_path / "out"] * (command != "inspect"))
    assert str(path) in line
    assert " must " in line
    assert not (tmp_path / "out").exists()


# faulty converted folders


def forge(change):
    def make(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return make


def entry(manifest):
    return manifest["tensors"]["vae"]["encoder.conv_in.conv.bias"]


BROKEN = {
    "no record": (
        forge(lambda manifest: manifest.pop("tensors")),
        "must record the tensors of this transformer",
    ),
    "record of nothing": (
        forge(lambda manifest: manifest["tensors"].update(vae=[])),
        "must record the tensors of this vae",
    ),
    "a tensor less": (
        forge(lambda manifest: manifest["tensors"]["vae"].popitem()),
        "must record the tensors of this vae",
    ),
    "a tensor more": (
        forge(lambda manifest: manifest["tensors"]["vae"].update(new=entry(manifest))),
        "must record the tensors of this vae",
    ),
    "a file elsewhere": (
        forge(lambda manifest: entry(manifest).update(file="../../x.safetensors")),
        "must give encoder.conv_in.conv.bias",
    ),
    "a file of another kind": (
        forge(lambda manifest: entry(manifest).update(file="config.json")),
        "must give encoder.conv_in.conv.bias",
    ),
    "a dtype there isn't": (
        forge(lambda manifest: entry(manifest).update(dtype="int8")),
        "must give encoder.conv_in.conv.bias",
    ),
    "an entry of text": (
        forge(
            lambda manifest: manifest["tensors"]["vae"].update({"encoder.conv_in.conv.bias": "x"})
        ),
        "must give encoder.conv_in.conv.bias",
    ),
    "another format": (
        forge(lambda manifest: manifest.update(format=0)),
        "must have format 2: got 0",
    ),
    "no format": (
        lambda folder: (folder / MANIFEST).write_text("{}"),
        "must have format 2: got None",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), " must "),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("command", ["to-torch", "inspect"])
def test_a_faulty_converted_folder_is_refused_in_one_line(command, fault, flax, tmp_path, capsys):
    change, expected = BROKEN[fault]
    change(flax)
    assert expected in one_line(
        capsys, [command, flax] + [tmp_path / "back"] * (command == "to-torch")
    )
    assert left(tmp_path) == {"flax"}


def test_a_recorded_dtype_that_the_weights_do_not_have_is_refused(flax, tmp_path, capsys):
    forge(lambda manifest: entry(manifest).update(dtype="float16"))(flax)
    line = one_line(capsys, ["to-torch", flax, tmp_path / "back"])
    assert "encoder.conv_in.conv.bias must be float16, as checkpoint.json says: got float32" in line
    assert left(tmp_path) == {"flax"}
