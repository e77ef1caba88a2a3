"""`sample --manifest`: rows of a batch file."""

import json
from pathlib import Path

import pytest
from recipes import read_recipe
from runs import enter, failed, without_sampling

from cogi2v_jax import loading
from cogi2v_jax.sample import main


@pytest.fixture(scope="module", autouse=True)
def converted():
    """The embedded model is converted once, which prints a line."""
    loading.load("cogi2v-tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for every run, with a photo in it."""
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def requests(monkeypatch):
    """The requests that would have been sampled; nothing is sampled."""
    return without_sampling(monkeypatch)


MANIFESTS = {
    "jobs.txt": "the cyan triangle grows@@photo.png\n\nthe cyan triangle spins@@photo.png\n",
    "jobs.csv": "prompt,image,seed\nthe cyan triangle grows,photo.png,42\n"
    "the cyan triangle spins,photo.png,\n",
    "jobs.jsonl": "".join(
        f'{{"prompt": "the cyan triangle {what}", "image": "photo.png"}}\n'
        for what in ("grows", "spins")
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_makes_a_video_a_line(name, requests):
    Path("list").mkdir()
    Path("photo.png").rename("list/photo.png")  # its paths are relative to the manifest
    Path("list", name).write_text(MANIFESTS[name])
    assert main(["--manifest", f"list/{name}", "--output", "m.mp4"]) == 0
    prompts = ["the cyan triangle grows", "the cyan triangle spins"]
    assert [(request.prompt, request.seed) for request in requests] == [(p, 42) for p in prompts]
    assert [read_recipe(f"m-{number}.mp4")["prompt"] for number in (0, 1)] == prompts


def test_seeds_and_negative_prompts_of_a_manifest_take_precedence(requests):
    rows = [
        {"prompt": "a", "image": "photo.png", "seed": 1, "negative_prompt": "x"},
        {"prompt": "the", "image": "photo.png"},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--manifest", "jobs.jsonl", "--seed", "9", "--negative_prompt", "y"]
    assert main([*arguments, "--num_videos_per_prompt", "2"]) == 0
    expected = [("a", "x", 1), ("a", "x", 2), ("the", "y", 9), ("the", "y", 10)]
    assert [
        (request.prompt, request.negative_prompt, request.seed) for request in requests
    ] == expected


def test_rows_of_a_manifest_may_have_settings_of_their_own(requests):
    rows = [
        {"prompt": "a", "image": "photo.png", "num_inference_steps": 2},
        {"prompt": "the", "image": "photo.png", "end_image": "photo.png"},
        {"prompt": "white", "image": "photo.png", "num_inference_steps": 2},
    ]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--manifest", "jobs.jsonl", "--num_inference_steps", "3"]) == 0
    assert [(r.prompt, r.num_inference_steps, r.end_image is None) for r in requests] == [
        ("a", 2, True),
        ("white", 2, True),
        ("the", 3, False),
    ]
    # Names keep the order of the rows.
    assert [read_recipe(f"out-{n}.mp4")["prompt"] for n in range(3)] == ["a", "the", "white"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"prompt": "b", "image": "photo.png", "fps": 0}', "line 2: fps must be a number from"),
        ('{"prompt": "b", "image": "photo.png", "height": 84}', "height must be a multiple of 8"),
        ('{"prompt": "b c d e f g h i j k", "image": "photo.png", "fps": 7}', "at most 10 tokens"),
        ('{"prompt": "b", "image": "photo.png", "output": "b.mp4"}', "cogi2v_jax.batch reads more"),
        ('{"prompt": "b", "image": "gone.png"}', "gone.png"),
        ('{"prompt": "b", "image": "photo.png", "seed": -1}', "seed must be an integer from 0"),
        ('{"prompt": "b"}', "line 2"),
        ('{"prompt": "a b c d e f g h i j", "image": "photo.png"}', "at most 10 tokens"),
        (None, "manifest must have at least one row"),
    ],
)
def test_a_wrong_manifest_is_refused_before_its_first_video(row, expected, requests, capsys):
    first = '{"prompt": "a", "image": "photo.png"}'
    Path("jobs.jsonl").write_text(f"{first}\n{row}" if row else "")
    assert expected in failed(capsys, ["--manifest", "jobs.jsonl"], 1)
    assert requests == []
