"""Files with strange notes and names: each is read, or refused in one line without control
characters."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cogi2v_convert.sources.gather import Source
from cogi2v_convert.sources.lora_file import open_lora
from cogi2v_convert.sources.matching import targets
from cogi2v_convert.sources.parts import Weights, parts_of
from cogi2v_convert.sources.tensor_files import open_file
from safetensors.torch import save_file

from cogi2v_jax.config import named

MARK = "transformer_blocks.0.attn1.to_out.0.weight"
NAME = "a\x1b[2J\nb"


def save(path: Path, *names: str, note: dict[str, str] | None = None, **kind: torch.dtype) -> Path:
    save_file({name: torch.zeros(2, **kind) for name in names}, path, metadata=note)
    return path


def in_file(path: Path) -> dict[str, list[Weights]]:
    return parts_of([open_file(path)], path)


NOTES = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "a number of layers": '{"layers": 3}',
    "no layers": '{"layers": null}',
    "a number for a layer": '{"layers": {"a": 3}}',
    "a list for a layer": '{"layers": {"a": [1]}}',
    "lists in lists": "[" * 9999,
    "objects in objects": '{"layers":' * 9999,
    "a number of 400 digits": '{"layers": {"a": {"format": %s}}}' % ("9" * 400),
}


@pytest.mark.parametrize("text", NOTES.values(), ids=NOTES)
def test_a_note_of_quantisation_that_is_no_object_of_objects_is_refused(
    text: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.safetensors", MARK, note={"_quantization_metadata": text})
    with pytest.raises(ValueError, match="must note its quantisation in JSON: "):
        in_file(path)


@pytest.mark.parametrize("text", ["3", "[1]", '"float8"', "null", "[" * 9999])
def test_a_layer_s_note_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    note = torch.tensor(list(text.encode()), dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    save_file({MARK: torch.zeros(2), "proj_out.comfy_quant": note}, path)
    with pytest.raises(ValueError, match="must note its quantisation in JSON: "):
        in_file(path)


def test_a_header_without_metadata_has_an_empty_note(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": None, MARK: {"dtype": "F32", "shape": [0]}})
    text = text.replace("[0]", '[0], "data_offsets": [0, 0]')
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    assert open_file(path).note == {}
    assert in_file(path).keys() == {"transformer"}


def twice(path: Path) -> None:
    """A tensor of that name in both files of an index."""
    source = Source.__new__(Source)
    source._owners = {}
    files = [save(path.with_name(f"{each}.safetensors"), MARK, NAME) for each in "ab"]
    source._weights = {"transformer": [in_file(file)["transformer"][0] for file in files]}
    source.tensors("transformer")


def pickled(path: Path) -> None:
    path.write_bytes(b"\x80\x02c" + NAME.split("\n")[0].encode() + b"\nb\n.")
    open_file(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no network": (lambda path: in_file(save(path, NAME)), "1 tensors, the first a"),
    "another tensor": (
        lambda path: in_file(save(path, f"model.{MARK}", NAME)),
        "must hold nothing but transformer: got a",
    ),
    "integers": (
        lambda path: in_file(save(path, MARK, NAME, dtype=torch.int32))["transformer"][0].tensors(),
        "must be one of ",
    ),
    "integers in a LoRA": (
        lambda path: open_lora(save(path, NAME, dtype=torch.int32)),
        "must hold tensors of ",
    ),
    "a quantised layer": (
        lambda path: in_file(
            save(
                path,
                MARK,
                note={"_quantization_metadata": json.dumps({"layers": {NAME: {NAME: 1}}})},
            )
        ),
        "must be float8 times a scale: got a",
    ),
    "twice": (twice, "must be in one file"),
    "a pickle": (pickled, "got a pickle that asks for a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_in_a_file_are_printed_with_escapes(case: str, tmp_path: Path) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected) as caught:
        make(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable(), str(caught.value)
    if case != "integers":  # the first of two
        assert r"a\x1b[2J" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "key"),
    [("transformer", "num_layers"), ("text_encoder", "num_layers"), ("vae", "layers_per_block")],
)
def test_more_layers_than_memory_can_name_are_refused(part: str, key: str) -> None:
    config = named("cogi2v-tiny")
    settings = dataclasses.replace(getattr(config, part), **{key: 2**31 - 1})
    with pytest.raises(ValueError, match=f"{part} must have at most 1000 layers: got 2147483647"):
        targets(dataclasses.replace(config, **{part: settings}), part)
