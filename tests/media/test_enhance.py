"""Prompts rewritten by an endpoint that is right, and by those that fail in every way."""

import base64
import io
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from endpoints import Answer, Handler, Server, serving
from PIL import Image

from cogi2v_jax.media import enhance
from cogi2v_jax.media.enhance import Endpoint, check_address, connect, rewrite, shorten

PICTURE = np.full((900, 1800, 3), 90, np.uint8)
SECRET = "sk-0123/secret+key="  # as base64 has it


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as server:
        yield server


def ask(server: Server, key: str = SECRET) -> str:
    return rewrite(Endpoint(server.url, "writer", key), "a cat", PICTURE)


def test_the_prompt_and_the_picture_are_sent_and_the_answer_is_the_prompt(server: Server) -> None:
    server.answer = lambda handler: handler.say(' "A cat jumps\n  up." ')
    assert rewrite(connect(server.url, "other"), "a cat", PICTURE) == "A cat jumps up."
    [(method, path, body)] = server.asked
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "other",
        "temperature": 0.01,
        "top_p": 0.7,
        "max_tokens": 250,
    }
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    text, picture = user["content"]
    assert text["text"] == "The user's prompt: a cat"
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.size) == ("JPEG", (768, 384))
    assert np.abs(np.asarray(image).astype(int) - 90).max() <= 2


def test_a_picture_that_is_given_stays_as_it_was(server: Server) -> None:
    image = Image.fromarray(PICTURE)
    rewrite(Endpoint(server.url, "writer"), "a cat", image)
    assert image.size == (1800, 900)


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_the_first_model_that_is_listed_is_the_default(end: str, server: Server) -> None:
    assert connect(server.url + end, None).model == "writer"
    assert server.asked == [("GET", "/v1/models", None)]
    assert connect(server.url, "other").model == "other"
    assert len(server.asked) == 1  # nothing is listed for a name


@pytest.mark.parametrize("listed", [[], [None], [""], [3]])
def test_no_model_is_told_how_to_name_one(listed: list, server: Server) -> None:
    server.models = listed
    with pytest.raises(OSError, match=r"lists no model; name one with --enhance_model$"):
        connect(server.url, None)


def test_the_key_is_sent_where_it_is_set_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(server.url, None)
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\n")
    rewrite(connect(server.url, None), "a cat", PICTURE)
    assert server.keys == [None, f"Bearer {SECRET}", f"Bearer {SECRET}"]
    assert SECRET not in repr(connect(server.url, None))


@pytest.mark.parametrize("key", ["sk-\u732b", "sk-\x01"])
def test_a_key_that_cannot_be_sent_is_refused_without_it(
    key: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY must be printable ASCII: got") as refused:
        connect(server.url, None)
    assert "sk-" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    ["", "host/v1", "ftp://host/v1", "file:///v1", "http://me:x@host/v1", "http://host/v1?key=x"],
)
def test_what_is_no_address_of_an_interface_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="--enhance must be a http or https address") as refused:
        check_address(address)
    assert "me:x" not in str(refused.value)


def drops(handler: Handler) -> None:
    handler.send(200, b"{")
    with suppress(OSError):  # until the other end is gone
        for _ in range(40):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            threading.Event().wait(0.05)


def cut(handler: Handler) -> None:
    handler.send(200, b"{", **{"Content-Length": "100"})


def error(status: int, value: Any = None) -> Answer:
    if value is None:
        return lambda handler: handler.send(status, b"")
    return lambda handler: handler.json(status, value)


FAULTS: dict[str, tuple[Answer, str]] = {
    "401": (error(401), "HTTP 401 Unauthorized"),
    "404": (error(404, {"error": {"message": "no model x\nat all"}}), "HTTP 404 no model x"),
    "429": (error(429, {"error": "slow down"}), "HTTP 429 slow down"),
    "500": (error(500, {"message": "it broke"}), "HTTP 500 it broke"),
    "503 with a page": (lambda h: h.send(503, b"<html>"), "HTTP 503 Service Unavailable"),
    "an error in 200": (error(200, {"error": {"message": "no"}}), "no"),
    "an empty object": (error(200, {}), "its answer has no choices"),
    "no choice": (error(200, {"choices": []}), "its answer has no choices"),
    "strange choices": (error(200, {"choices": [3]}), "its answer has no choices"),
    "a list": (error(200, []), "its answer has no choices"),
    "a number": (error(200, 3), "its answer has no choices"),
    "a page": (lambda h: h.send(200, b"<html>"), "its answer is no JSON"),
    "no text at all": (lambda h: h.send(200, b""), "its answer is no JSON"),
    "bytes": (lambda h: h.send(200, b"\xff\xfe\x00"), "its answer is no JSON"),
    "too much": (lambda h: h.send(200, b" " * 2**21), "it answers with more than 1 MiB"),
    "drops": (drops, "it took more than 1 s"),
    "silence": (lambda h: threading.Event().wait(2.0) and None, "it took more than 1 s|timed out"),
    "a cut answer": (cut, "its answer is no JSON|IncompleteRead"),
    "away": (
        lambda h: h.send(302, b"", Location="http://localhost:1/v1"),
        "it leads to http://localhost:1/v1; give that address itself",
    ),
    "away with the body": (
        lambda h: h.send(307, b"", Location="http://me:pass@localhost:1/v1"),
        r"it leads to http://\.\.\.@localhost:1/v1; give",
    ),
    "the key": (error(401, {"error": {"message": f"not {SECRET} here"}}), r"HTTP 401 not \.\.\. "),
    "the key in an address": (
        lambda h: h.send(302, b"", Location="http://h/sk-0123%2Fsecret%2Bkey%3D"),
        r"it leads to http://h/\.\.\.; give",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_endpoint_that_fails_is_one_line_without_the_key(
    name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("drops", "silence"):
        monkeypatch.setattr(enhance, "SECONDS", 0.6)
    server.answer, why = FAULTS[name]
    with pytest.raises(OSError, match=rf"^cannot ask {server.url}: ({why})") as caught:
        ask(server)
    assert len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 1


def test_an_endpoint_that_is_down_is_one_line() -> None:
    with serving() as server:
        pass
    with pytest.raises(OSError, match=rf"^cannot ask {server.url}: .*refused"):
        ask(server)


@pytest.mark.parametrize(
    "text", ["", "  \n", "...", None, 3, ["a"], "\ud800 a", "<think>a</think>", "<think>a cat"]
)
def test_a_text_that_is_no_prompt_is_another_error(text: Any, server: Server) -> None:
    server.answer = lambda handler: handler.say(text)
    with pytest.raises(ValueError, match=rf"^{server.url} must answer with a prompt: got '"):
        ask(server)


@pytest.mark.parametrize(
    ("text", "end", "prompt"),
    [
        ("<think>A cat.\n</think>\n\nA cat jumps.", "stop", "A cat jumps."),
        ("A cat jumps. It turns. The cam", "length", "A cat jumps. It turns."),
        ("A cat jumps. It turns. The cam", "stop", "A cat jumps. It turns. The cam"),
        ("A cat ju", "length", "A cat ju"),
        ("\u201cA cat\u201d", None, "A cat"),
    ],
)
def test_thoughts_quotes_and_half_sentences_are_left_out(
    text: str, end: str | None, prompt: str, server: Server
) -> None:
    server.answer = lambda handler: handler.say(text, finish_reason=end)
    assert ask(server) == prompt


@pytest.mark.parametrize(
    ("most", "shorter"),
    [(100, "A cat. It jumps! High?"), (15, "A cat. It jumps!"), (8, "A cat."), (3, "")],
)
def test_a_text_is_shortened_by_whole_sentences(most: int, shorter: str) -> None:
    assert shorten("A cat. It jumps! High?", lambda text: len(text) <= most + 1) == shorter


def test_the_model_is_told_to_write_of_motion_in_one_shot() -> None:
    for word in ("first frame", "English", "moves", "no cuts", "the image shows"):
        assert re.search(word, enhance.SYSTEM)
