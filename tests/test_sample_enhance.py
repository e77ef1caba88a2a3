"""Prompts rewritten from the command line; nothing is sampled."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoints import Server, serving
from recipes import read_recipe
from runs import enter, failed, without_sampling
from safetensors import safe_open

from cogi2v_jax import loading
from cogi2v_jax.sample import LATENTS, main

OWN = "the cyan triangle grows"
NEW = "the cyan triangle moves left"  # as many tokens as the embedded model takes at most: 10
LONG = "the red circle moves left and the blue square moves right."
SECRET = "sk-secret"

pytestmark = pytest.mark.filterwarnings("default")  # as lines


@pytest.fixture(autouse=True)
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    loading.load("cogi2v-tiny", say=lambda line: None)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    enter(tmp_path, monkeypatch)
    return without_sampling(monkeypatch)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        server.answer = lambda handler: handler.say(NEW)
        yield server


def warnings_of(capsys: pytest.CaptureFixture) -> list[str]:
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    return [line for line in captured.err.splitlines() if line.startswith("warning: ")]


def test_the_rewritten_prompt_is_sampled_and_the_recipe_has_both(
    server: Server, requests: list, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--prompt", OWN, "--image", "photo.png", "--enhance", server.url]) == 0
    assert f"prompt, by writer: {NEW}" in capsys.readouterr().err.splitlines()
    assert [request.prompt for request in requests] == [NEW]
    recipe = read_recipe("out.mp4")
    found = recipe["prompt"], recipe["original_prompt"], recipe["enhance_model"]
    assert found == (NEW, OWN, "writer")
    with safe_open(f"out{LATENTS}", framework="numpy") as file:
        assert json.loads(file.metadata()["recipe"]) == recipe
    assert server.prompts() == [f"The user's prompt: {OWN}"]


def test_off_by_default(server: Server, requests: list) -> None:
    assert main([]) == 0
    assert server.asked == []
    assert not {"original_prompt", "enhance_model"} & read_recipe("out.mp4").keys()


def test_the_named_model_is_asked(server: Server, requests: list) -> None:
    assert main(["--enhance", server.url, "--enhance_model", "other"]) == 0
    [(_, _, body)] = server.asked
    assert (body["model"], read_recipe("out.mp4")["enhance_model"]) == ("other", "other")


def test_each_pair_of_prompt_and_picture_is_asked_for_once(
    server: Server, requests: list, capsys: pytest.CaptureFixture
) -> None:
    Path("other.png").write_bytes(Path("photo.png").read_bytes())
    Path("jobs.txt").write_text(
        "the circle grows@@photo.png\nthe square grows@@photo.png\n"
        "the circle grows@@photo.png\nthe circle grows@@other.png\n"
    )

    texts = iter(["the circle spins", "", "the circle shrinks"])
    server.answer = lambda handler: handler.say(next(texts))
    arguments = "--manifest jobs.txt --num_videos_per_prompt 2 --best_of 2 --output x.gif --enhance"
    assert main([*arguments.split(), server.url]) == 0
    asked = [prompt.removeprefix("The user's prompt: ") for prompt in server.prompts()]
    assert asked == ["the circle grows", "the square grows", "the circle grows"]
    expected = ["the circle spins", "the square grows", "the circle spins", "the circle shrinks"]
    assert [request.prompt for request in requests] == [text for text in expected for _ in range(4)]
    own = [read_recipe(f"x-{number}.gif").get("original_prompt") for number in range(8)]
    circle = "the circle grows"
    assert own == [circle, circle, None, None, circle, circle, circle, circle]
    assert read_recipe("x-0-1.gif")["original_prompt"] == circle
    [line] = warnings_of(capsys)
    assert line == (
        f"warning: {server.url} must answer with a prompt: got ''; "
        "taking 'the square grows' as it is"
    )


@pytest.mark.parametrize("count", [1, 3])
def test_an_endpoint_that_fails_is_one_warning_and_the_own_prompts(
    count: int, server: Server, requests: list, capsys: pytest.CaptureFixture
) -> None:
    forms = ["circle", "square", "triangle"][:count]
    own = [f"the red {form} grows" for form in forms]
    Path("jobs.txt").write_text("".join(f"{prompt}@@photo.png\n" for prompt in own))
    server.answer = lambda handler: handler.json(401, {"error": {"message": f"not {SECRET}"}})
    assert main(["--manifest", "jobs.txt", "--output", "x.gif", "--enhance", server.url]) == 0
    taking = "the prompt as it is" if count == 1 else f"{count} prompts as they are"
    said = f"warning: cannot ask {server.url}: HTTP 401 not ...; taking {taking}"
    assert warnings_of(capsys) == [said]
    assert [request.prompt for request in requests] == own
    assert len(server.prompts()) == 1  # it is not asked again
    assert "original_prompt" not in read_recipe("x.gif" if count == 1 else "x-0.gif")


def test_an_endpoint_that_is_down_is_one_warning(
    requests: list, capsys: pytest.CaptureFixture
) -> None:
    with serving() as server:
        pass
    assert main(["--image", "photo.png", "--prompt", OWN, "--enhance", server.url]) == 0
    [line] = warnings_of(capsys)
    assert line.startswith(f"warning: cannot ask {server.url}: ")
    assert line.endswith("; taking the prompt as it is")
    assert [request.prompt for request in requests] == [OWN]


@pytest.mark.parametrize(
    ("text", "prompt", "way"),
    [
        (f"{NEW}. {LONG}", f"{NEW}.", f"taking only '{NEW}.'"),
        (LONG, OWN, "taking the prompt as it is"),
    ],
)
def test_a_rewritten_prompt_of_too_many_tokens_is_shortened_or_left(
    text: str, prompt: str, way: str, server: Server, requests: list, capsys: pytest.CaptureFixture
) -> None:
    server.answer = lambda handler: handler.say(text)
    assert main(["--image", "photo.png", "--prompt", OWN, "--enhance", server.url]) == 0
    assert [request.prompt for request in requests] == [prompt]
    lines = [line for line in warnings_of(capsys) if "token" in line]
    must = "the rewritten prompt must be at most 10 tokens for cogi2v-tiny"
    assert lines == [f"warning: {must}: got {text!r}; {way}"]
    assert read_recipe("out.mp4").get("original_prompt") == (None if prompt == OWN else OWN)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--enhance ftp://h/v1", "--enhance must be a http or https address without password and"),
        ("--enhance 127.0.0.1:8000", "as http://127.0.0.1:8000/v1: got 127.0.0.1:8000"),
        ("--enhance_model x", "--enhance_model must be given with --enhance"),
        ("--decode_latents x --enhance http://h/v1", "must stand without --enhance: decoding"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: str, expected: str, capsys: pytest.CaptureFixture
) -> None:
    assert expected in failed(capsys, arguments.split(), 2)


def test_a_request_that_fails_anyway_asks_nobody(
    server: Server, capsys: pytest.CaptureFixture
) -> None:
    failed(capsys, ["--enhance", server.url, "--height", "84"], 1)
    assert server.asked == []
