"""`batch`: what it makes of a list, what it tells, and what a second run does."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clouds import cloud_in
from recipes import read_recipe
from runs import enter

from cogi2v_jax import loading, pipeline
from cogi2v_jax.apps import workers
from cogi2v_jax.batch import main
from cogi2v_jax.disk import locked

ROWS = [
    {"prompt": "the cyan triangle grows", "image": "photo.png"},
    {"prompt": "the cyan triangle spins", "image": "photo.png", "num_inference_steps": 3},
    {"prompt": "the cyan triangle shrinks", "image": "photo.png", "seed": 7, "output": "x.gif"},
]
NAMES = ["0001-the-cyan-triangle-grows.mp4", "0002-the-cyan-triangle-spins.mp4", "x.gif"]
COMMAND = ("jobs.jsonl", "--output_dir", "out", "--num_inference_steps", "2")


@pytest.fixture(scope="module", autouse=True)
def converted() -> None:
    """The embedded model is converted once, which prints a line."""
    loading.load("cogi2v-tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """The requests that would have been sampled; black videos are made."""
    requests = []

    def black(models, request, **_):
        resolved = request.resolve(models.config)
        requests.append(resolved)
        count = len(resolved.videos)
        video = np.zeros((count, 9, 64, 64, 3), np.uint8)
        return pipeline.Result(video, np.zeros((count, 3, 16, 16, 16), np.float32), resolved)

    monkeypatch.setattr(pipeline, "generate", black)
    return requests


def write(*rows: dict) -> None:
    Path("jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(folder: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def videos(folder: str = "out") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.suffix in (".mp4", ".gif"))


def prompts(requests: list) -> list[str]:
    return [video.prompt for request in requests for video in request.videos]


def test_a_list_becomes_a_folder_of_videos_with_a_line_a_row(capsys) -> None:
    write(*ROWS)
    assert main([*COMMAND, "--seed", "9"]) == 0
    said = capsys.readouterr()
    assert said.out == "out: 3 of 3 are done, 3 of them now\n"
    shown = [re.sub(r", \d+:\d\d left$", "", line) for line in said.err.splitlines()]
    shown = [line for line in shown if not line.startswith("converting ")]  # the first time
    assert shown == ["0 of 3 are done", "1 of 3", "2 of 3", "3 of 3"]
    assert videos() == NAMES
    lines = results()
    assert [(line["row"], line["output"], line["seed"]) for line in lines] == [
        (1, NAMES[0], 9),
        (2, NAMES[1], 9),
        (3, NAMES[2], 7),
    ]
    assert {(line["state"], line["error"]) for line in lines} == {("completed", None)}
    assert all(line["seconds"] > 0 for line in lines)
    recipes = [read_recipe(f"out/{name}") for name in NAMES[:2]]
    assert [recipe["num_inference_steps"] for recipe in recipes] == [2, 3]
    assert [recipe["prompt"] for recipe in recipes] == [row["prompt"] for row in ROWS[:2]]


def test_a_second_run_makes_only_what_is_new_changed_or_gone(asked, capsys) -> None:
    write(*ROWS)
    assert main([*COMMAND]) == 0
    Path("out", NAMES[0]).unlink()
    write(ROWS[0], ROWS[1] | {"seed": 1}, ROWS[2], ROWS[0])
    asked.clear()
    capsys.readouterr()
    assert main([*COMMAND]) == 0
    assert capsys.readouterr().out == "out: 4 of 4 are done, 3 of them now\n"
    assert [(video.prompt, video.seed) for r in asked for video in r.videos] == [
        (ROWS[0]["prompt"], 42),
        (ROWS[0]["prompt"], 42),
        (ROWS[1]["prompt"], 1),
    ]
    assert len(results()) == 4


def test_a_run_with_nothing_to_make_loads_no_model_and_starts_no_ray(
    asked, monkeypatch, capsys
) -> None:
    write(*ROWS)
    assert main([*COMMAND]) == 0
    monkeypatch.setattr(workers.Worker, "models", property(lambda _: pytest.fail("loaded")))
    monkeypatch.setattr(workers, "find_spec", lambda name: pytest.fail("started"))
    assert main([*COMMAND, "--ray"]) == 0
    assert capsys.readouterr().out.endswith("out: 3 of 3 are done, 0 of them now\n")


def test_rows_of_one_shape_follow_each_other(asked) -> None:
    steps = (2, 3, 2, 3)
    write(
        *(
            ROWS[0] | {"num_inference_steps": one, "guidance_scale": n}
            for n, one in enumerate(steps)
        )
    )
    assert main([*COMMAND]) == 0
    assert [request.num_inference_steps for request in asked] == [2, 2, 3, 3]
    assert [line["row"] for line in results()] == [1, 2, 3, 4]


def test_rows_of_equal_settings_are_made_at_once_where_the_mesh_has_room(asked) -> None:
    write(ROWS[0], ROWS[1], ROWS[0], ROWS[0])
    assert main([*COMMAND, "--mesh", "data=2"]) == 0
    assert [len(request.videos) for request in asked] == [2, 2, 2]
    assert len(videos()) == len(results()) == 4


WRONG = (
    ROWS[0],
    {"prompt": "a", "image": "gone.png"},
    {"prompt": "a"},
    ROWS[0] | {"height": 84},
    ROWS[0] | {"prompt": "the cyan triangle grows " * 3},
)


def test_every_bad_row_is_told_by_its_line_before_anything_is_made(asked, capsys) -> None:
    write(*WRONG)
    assert main([*COMMAND]) == 1
    said = capsys.readouterr()
    *told, last = said.err.splitlines()
    assert [line[:26] for line in told] == [f"cogi2v: jobs.jsonl, line {n}" for n in (2, 3, 4)]
    assert last == "cogi2v: 3 of 5 rows can't be made; --keep_going makes the others"
    assert (said.out, asked, Path("out").exists()) == ("", [], False)


def test_the_tokenizer_s_faults_come_before_anything_is_made_too(asked, capsys) -> None:
    write(WRONG[0], WRONG[4])
    assert main([*COMMAND]) == 1
    told, last = capsys.readouterr().err.splitlines()
    assert told.startswith("cogi2v: jobs.jsonl, line 2: prompt must be at most 10 tokens for ")
    assert last == "cogi2v: 1 of 2 rows can't be made; --keep_going makes the others"
    assert (asked, Path("out").exists()) == ([], False)


def test_keep_going_makes_the_others_and_ends_with_1(asked, capsys) -> None:
    write(*WRONG)
    assert main([*COMMAND, "--keep_going"]) == 1
    said = capsys.readouterr()
    told = [line for line in said.err.splitlines() if ", line " in line]
    assert [line[25:27] for line in told] == ["2:", "3:", "4:", "5:"]
    assert said.err.splitlines()[-1] == "cogi2v: 4 of 5 rows failed: out/results.jsonl says why"
    assert said.out == "out: 1 of 5 are done, 1 of them now\n"
    assert prompts(asked) == [ROWS[0]["prompt"]]
    lines = results()
    assert [line["state"] for line in lines] == ["completed", *["failed"] * 4]
    assert "gone.png" in lines[1]["error"]
    write(ROWS[0], ROWS[1])
    assert main([*COMMAND]) == 0
    assert [line["state"] for line in results()] == ["completed", "completed"]


def test_a_row_that_fails_while_it_is_made_does_not_stop_the_others(
    asked, monkeypatch, capsys
) -> None:
    black = pipeline.generate

    def generate(models, request, **options):
        if request.num_inference_steps == 3:
            raise FloatingPointError("latents are not finite")
        return black(models, request, **options)

    monkeypatch.setattr(pipeline, "generate", generate)
    write(*ROWS)
    assert main([*COMMAND]) == 1
    err = capsys.readouterr().err.splitlines()
    assert "cogi2v: jobs.jsonl, line 2: latents are not finite" in err
    assert err[-1] == "cogi2v: 1 of 3 rows failed: out/results.jsonl says why"
    assert [line["state"] for line in results()] == ["completed", "failed", "completed"]
    monkeypatch.setattr(pipeline, "generate", black)
    assert main([*COMMAND]) == 0
    assert prompts(asked) == [ROWS[n]["prompt"] for n in (0, 2, 1)]


def test_a_dry_run_checks_all_and_makes_nothing(asked, capsys) -> None:
    write(*ROWS)
    assert main([*COMMAND, "--dry-run"]) == 0
    assert capsys.readouterr().out == "out: 0 of 3 are done, 3 to make\n"
    write(*WRONG)
    assert main([*COMMAND, "--dry_run", "--keep_going"]) == 1
    assert capsys.readouterr().out == "out: 0 of 5 are done, 1 to make\n"
    assert (asked, Path("out").exists()) == ([], False)


def test_a_second_process_is_refused_before_a_model_is_loaded(asked, monkeypatch, capsys) -> None:
    write(*ROWS)
    monkeypatch.setattr(workers.Worker, "models", property(lambda _: pytest.fail("loaded")))
    Path("out").mkdir()
    with locked(Path("out"), "output_dir"):
        assert main([*COMMAND]) == 1
    line = "cogi2v: output_dir out is being written by another program\n"
    assert (capsys.readouterr().err, asked, list(Path("out").iterdir())) == (line, [], [])


def test_a_bucket_may_be_the_folder(asked, tmp_path, capsys) -> None:
    write(*ROWS)
    command = [*COMMAND[:2], "gs://mine/out", *COMMAND[3:]]
    with cloud_in(tmp_path / "cloud"):
        assert main(command) == 0
        seen = str(tmp_path / "cloud/mine/out")
        assert videos(seen) == NAMES
        assert len(results(seen)) == 3
        Path(seen, NAMES[1]).unlink()
        asked.clear()
        assert main(command) == 0
    assert prompts(asked) == [ROWS[1]["prompt"]]
    assert videos(seen) == NAMES
    assert {path.name for path in Path(seen).iterdir()} == {*NAMES, "results.jsonl"}


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["gone.csv", "--output_dir", "out"], 1, "manifest must exist: found no gone.csv"),
        (["photo.png", "--output_dir", "out"], 1, "manifest must end in .csv, .jsonl, .txt: got"),
        ([*COMMAND[:2], "photo.png"], 1, "output_dir must be a folder: got photo.png"),
        ([*COMMAND[:2], "no/where"], 1, "output_dir must be in an existing, writable folder"),
        ([*COMMAND, "--seed", "-1"], 1, "seed must be an integer from 0 to 2**64 - 1: got -1"),
        ([*COMMAND, "--model", "none"], 1, "model must be a folder, a hub id or one of "),
        ([*COMMAND, "--mesh", "v9"], 1, "mesh must be auto, v5e-1, "),
        ([*COMMAND, "--lora_path", "none"], 1, "lora must be an existing file or folder"),
        ([*COMMAND, "--workers", "2"], 2, "--workers must be given with --ray"),
        ([*COMMAND, "--ray", "--workers", "0"], 2, "--workers must be at least 1: got 0"),
        ([*COMMAND, "--model", ""], 2, "--model must not be empty"),
        ([*COMMAND, "--fps", "fast"], 2, "argument --fps: must be a number from 0.01 to 240"),
        (["jobs.jsonl"], 2, "the following arguments are required: --output_dir"),
    ],
)
def test_what_can_not_be_done_is_one_line(arguments, code, line, capsys) -> None:
    write(*ROWS)
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    else:
        assert main(arguments) == code
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"cogi2v: {line}")
    assert not Path("out").exists()


def test_ray_that_is_not_installed_is_one_line(monkeypatch, capsys) -> None:
    write(*ROWS)
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    assert main([*COMMAND, "--ray"]) == 1
    line = "cogi2v: cannot use Ray: it is not installed; pip install 'cogi2v-jax[ray]'\n"
    assert capsys.readouterr().err == line


def test_ctrl_c_says_how_many_are_done_and_the_same_command_goes_on() -> None:
    write(*(ROWS[0] | {"seed": seed, "num_inference_steps": 20} for seed in range(40)))
    command = [sys.executable, "-m", "cogi2v_jax.batch", *COMMAND]
    # A shell that runs the tests in the background makes them, and their children, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert process.stderr
    said = process.stderr.readline()
    while not said.startswith("2 of 40"):
        said = process.stderr.readline()
        assert said, "ended before its second video"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    found = re.fullmatch(
        r"cogi2v: stopped; (\d+) of 40 are done; the same command goes on", err.splitlines()[-1]
    )
    assert found
    assert len(videos()) == len(results()) == int(found[1])
    assert 2 <= int(found[1]) < 40
    write(*(ROWS[0] | {"seed": seed, "num_inference_steps": 20} for seed in range(int(found[1]))))
    assert main([*COMMAND]) == 0
