"""Several takes of a video from the command line: their names, figures and latents."""

import json
from pathlib import Path

import numpy as np
import pytest
from recipes import read_recipe
from runs import QUICK, enter, failed, files, without_sampling
from safetensors import safe_open

from cogi2v_jax import loading, pipeline
from cogi2v_jax.apps import making
from cogi2v_jax.media import videos
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import LATENTS, main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    loading.load("cogi2v-tiny", say=lambda line: None)
    return enter(tmp_path, monkeypatch)


def kept_recipe(path: str) -> dict:
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["recipe"])


def test_the_best_take_has_the_name_and_the_others_follow(capsys: pytest.CaptureFixture) -> None:
    assert main([*QUICK, "--best_of", "3", "--seed", "7", "--upscale", "nearest", "2"]) == 0
    stems = ["out", "out-1", "out-2"]
    names = {f"{stem}{end}" for stem in stems for end in (".mp4", "-x2.mp4", LATENTS)}
    assert files() == names
    recipes = [read_recipe(f"{stem}.mp4") for stem in stems]
    assert {recipe["seed"] for recipe in recipes} == {7, 8, 9}
    figures = [recipe["best_of"] for recipe in recipes]
    assert [(each["takes"], each["rank"]) for each in figures] == [(3, 1), (3, 2), (3, 3)]
    assert [each["score"] for each in figures] == sorted(
        (each["score"] for each in figures), reverse=True
    )
    for stem, recipe in zip(stems, recipes, strict=True):
        assert kept_recipe(f"{stem}{LATENTS}") == recipe
    said = capsys.readouterr().out.splitlines()
    head, *rows = said[-4:]
    assert head.split() == ["seed", "motion", "first", "drift", "score"]
    assert [row.split()[:2] for row in rows] == [
        [f"{stem}.mp4", str(recipe["seed"])] for stem, recipe in zip(stems, recipes, strict=True)
    ]
    # The latents are those of their video.
    assert main(["--decode_latents", f"out-2{LATENTS}", "--output", "again.mp4"]) == 0
    np.testing.assert_array_equal(read_frames("again.mp4"), read_frames("out-2.mp4"))


def test_each_of_several_videos_has_takes_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = without_sampling(monkeypatch)
    arguments = "--best_of 2 --num_videos_per_prompt 2 --seed 5 --output x.gif"
    assert main(arguments.split()) == 0
    assert [request.seed for request in asked] == [5, 6, 7, 8]
    stems = ["x-0", "x-0-1", "x-1", "x-1-1"]
    assert files() == {f"{stem}{end}" for stem in stems for end in (".gif", LATENTS)}
    # Black ones are all alike: the earlier is the better.
    assert [read_recipe(f"{stem}.gif")["seed"] for stem in stems] == [5, 6, 7, 8]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("x-")]
    assert [row.split()[0] for row in rows[-4:]] == [f"{stem}.gif" for stem in stems]


def test_one_take_is_a_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sampling(monkeypatch)
    assert main(["--best_of", "1"]) == 0
    assert "best_of" not in read_recipe("out.mp4")
    assert files() == {"out.mp4", f"out{LATENTS}"}


def test_a_run_that_is_stopped_keeps_the_latents_of_every_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_sampling(monkeypatch)
    sample, calls = pipeline.generate, []

    def third(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **named)

    monkeypatch.setattr(pipeline, "generate", third)
    assert main(["--best_of", "4", "--seed", "5"]) == 130
    assert files() == {f"out-take0{LATENTS}", f"out-take1{LATENTS}"}
    assert [kept_recipe(f"out-take{take}{LATENTS}")["seed"] for take in (0, 1)] == [5, 6]


def test_a_run_that_is_stopped_while_it_writes_leaves_whole_files_and_every_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_sampling(monkeypatch)
    write, calls = videos.WRITERS[".gif"], []

    def second(part: Path, *arguments) -> None:
        calls.append(1)
        if len(calls) == 2:
            part.write_bytes(b"half")
            raise KeyboardInterrupt
        write(part, *arguments)

    monkeypatch.setitem(videos.WRITERS, ".gif", second)
    assert main(["--best_of", "3", "--output", "x.gif", "--seed", "5"]) == 130
    assert files() == {"x.gif", f"x{LATENTS}", f"x-1{LATENTS}", f"x-take2{LATENTS}"}
    kept = [kept_recipe(f"{stem}{LATENTS}")["seed"] for stem in ("x", "x-1", "x-take2")]
    assert kept == [5, 6, 7]


@pytest.mark.parametrize(("call", "kept"), [(1, "x-take1"), (2, "x-1")])
def test_a_failure_names_latents_that_are_there(
    call: int, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    without_sampling(monkeypatch)
    write, calls = videos.WRITERS[".gif"], []

    def fill(part: Path, *arguments) -> None:
        calls.append(1)
        if len(calls) == call:
            raise OSError("no space left")
        write(part, *arguments)

    monkeypatch.setitem(videos.WRITERS, ".gif", fill)
    assert main(["--best_of", "2", "--output", "x.gif"]) == 1
    assert f"--decode_latents {kept}{LATENTS} makes the video" in capsys.readouterr().err
    assert Path(f"{kept}{LATENTS}").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("--best_of 0", 2, "--best_of must be at least 1: got 0"),
        ("--best_of two", 2, "invalid int value: 'two'"),
        ("--decode_latents x --best_of 2", 2, "must stand without --best_of"),
        (f"--best_of 2 --seed {2**64 - 1}", 1, "seed must be an integer from 0 to 2**64 - 1: got"),
        ("--best_of 2 --output taken.mp4", 1, "file or a new name: got the folder taken-take1.lat"),
        ("--best_of 3 --output busy.mp4", 1, "output must be a file or a new name: got busy-2.mp4"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything_is_sampled(
    arguments: str, code: int, expected: str, capsys: pytest.CaptureFixture
) -> None:
    Path("busy-2.mp4").mkdir()
    Path(f"taken-take1{LATENTS}").mkdir()
    assert expected in failed(capsys, arguments.split(), code)


def test_the_numbers_of_many_takes_sort_in_their_order() -> None:
    outputs = making.outputs_of(Path("x.gif"), 1, None, best_of=11)
    assert [path.name for path in outputs[:3]] == ["x.gif", "x-01.gif", "x-02.gif"]
    assert outputs[1:] == sorted(outputs[1:])
