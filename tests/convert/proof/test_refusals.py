"""Traces and requests that are refused, each in one line, and files that stay as they are."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cogi2v_convert import __main__
from cogi2v_convert.proof import record, trace, verify
from safetensors.torch import load_file, save_file
from traces import Case, damaged, flags, size_of


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ({"removed": "text"}, "has no text"),
        ({"removed": r"guided\.\d"}, "has no guided.0; and 3 more like it"),
        ({"removed": "noise.2"}, "has no noise.2"),
        ({"removed": "x0_prev.1"}, "has no x0_prev.1"),
        ({"changed": {"ids": torch.Tensor.float}}, "has ids of type F32"),
        ({"changed": {"x0_prev.1": lambda x: x[:, 1:]}}, "has x0_prev.1 of shape [1, 4, "),
        ({"changed": {"guided.0": lambda x: x[0]}}, "has guided.0 of shape ["),
        ({"changed": {"moments": lambda x: x[..., 1:]}}, "moments must have the shape"),
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(
    damage: dict[str, Any], line: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = damaged(tmp_path / "damaged.safetensors", case.single, **damage)
    assert __main__.main(["verify", str(case.source), str(target)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = (one for one in lines if not one.startswith("converting"))
    assert line in error
    assert error.startswith("cogi2v-convert: ")


@pytest.mark.parametrize(
    ("settings", "made", "line"),
    [
        ({"prompt": None}, {}, "no prompt in its settings"),
        ({"image": "a"}, {}, "the unknown image in its settings"),
        ({"num_inference_steps": "4"}, {}, "num_inference_steps '4'"),
        ({}, {"torch": None}, "no torch in its making"),
        ({}, {"vae_tiling": "no"}, "vae_tiling 'no' in its making"),
    ],
)
def test_a_trace_with_wrong_entries_about_itself_is_refused(
    settings: dict, made: dict, line: str, case: Case, tmp_path: Path
) -> None:
    kept = trace.open_trace(case.single)
    both = (kept.settings | settings, kept.made | made)
    entries = [{name: value for name, value in one.items() if value is not None} for one in both]
    save_file(load_file(case.single), target := tmp_path / "trace", trace.head(*entries))
    with pytest.raises(ValueError, match=re.escape(line)):
        trace.open_trace(target)


def test_input_files_are_not_overwritten(
    case: Case, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, content in (("image.png", picture.read_bytes()), ("trace", case.single.read_bytes())):
        (tmp_path / name).write_bytes(content)
    image, target = str(tmp_path / "image.png"), str(tmp_path / "trace")
    what = flags({"image": image, "prompt": "a", "height": 48, "width": 80})
    assert __main__.main(["record", str(case.source), image, *what]) == 1
    assert "trace must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", target]) == 1
    assert "json must be outside of what is read" in capsys.readouterr().err
    assert __main__.main(["verify", str(case.source), target, "--json", str(tmp_path)]) == 1
    assert "json must be a file or a new name" in capsys.readouterr().err
    assert (tmp_path / "image.png").read_bytes() == picture.read_bytes()
    assert (tmp_path / "trace").read_bytes() == case.single.read_bytes()


def test_a_file_that_is_not_a_trace_is_refused_in_one_line(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = {"cut": case.single.read_bytes()[:-100], "empty": b"", "text": b"not a trace"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    save_file({"latents": torch.zeros(3)}, tmp_path / "weights")
    for name in (*contents, "weights"):
        path = tmp_path / name
        assert __main__.main(["verify", str(case.source), str(path)]) == 1
        error = capsys.readouterr().err
        assert "trace must be a whole file of cogi2v-convert record" in error
        assert error.count("\n") == 1
    assert __main__.main(["verify", str(case.source), str(tmp_path / "none")]) == 1
    assert "trace must be an existing file" in capsys.readouterr().err


def test_a_truth_must_be_a_float32_trace_of_the_same_request(case: Case, tmp_path: Path) -> None:
    for checked in (case.half, case.single):
        with pytest.raises(ValueError, match="truth must be a float32 trace beside a bfloat16 one"):
            verify.verify(str(case.source), checked, checked)
    inverted = {"picture": lambda picture: 255 - picture}
    other = damaged(tmp_path / "other", case.single, changed=inverted)
    line = r"truth must be a trace of the same request: got .* with another picture"
    with pytest.raises(ValueError, match=line):
        verify.verify(str(case.source), case.half, other)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--scheduler", "deis"],
            "scheduler must be ddim or dpm, which the reference has: got 'deis'",
        ),
        (
            ["--guidance_scale", "6,5", "--num_inference_steps", "2"],
            "guidance_scale must be one number, which the reference takes: got a list",
        ),
        (["--keep_steps", "0,50"], "keep_steps must be from 0 to 49: got 0, 50"),
        (["--image", "no such picture.png"], "image must be an existing file"),
        (["--num_frames", "11"], "num_frames must be"),
        (["--num_inference_steps", "61"], "num_inference_steps must be"),
        (["--num_frames", "9"], "num_frames must be 17 for a trace of"),
        (["--prompt", "the red circle " * 9], "prompt must be at most 12 tokens"),
        (["--device", "cuda"], "device must be cpu where PyTorch finds no CUDA: got cuda"),
    ],
)
def test_a_request_that_cannot_be_recorded_is_refused_first_and_leaves_nothing(
    arguments: list[str],
    line: str,
    case: Case,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    usual = flags({"image": picture, "prompt": "a", **size_of(case.family)})
    command = ["record", str(case.source), str(tmp_path / "trace"), *usual, *arguments]
    assert __main__.main(command) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_record_without_the_reference_names_the_extra_that_it_needs(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = r"record must have the reference: .*; pip install 'cogi2v-jax\[reference\]'"
    with pytest.raises(ValueError, match=line):
        record.record(case.source, tmp_path / "trace", case.request)
