"""Prompts rewritten for a picture by a language model behind an address: one chat completion, as
OpenAI's interface has it and vLLM, llama.cpp, ollama and others offer it."""

import base64
import io
import json
import os
import re
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import quote

from ..disk import SHOWN, is_text, one_line, parse_json
from ..names import scheme_of
from .download import PASSWORD, WEB, has_password, read_answer, shown, within
from .images import read_image

KEY = "OPENAI_API_KEY"
CHAT = "/chat/completions"
SECONDS = 120.0  # for a whole answer
LARGEST = 2**20  # bytes of one
SIDE = 768  # pixels of the picture's longer side, at most
QUALITY = 90  # of its JPEG
SAMPLING = {"temperature": 0.01, "top_p": 0.7, "max_tokens": 250}
SYSTEM = """\
You write prompts for a program that makes a short video from a picture and a sentence. The \
picture is the first frame of the video. Rewrite the user's prompt for this picture: describe in \
English, in the present tense, what moves from this frame on, and how - the subject first, then \
what is around it, then the camera - in the order in which it happens. Keep everything that the \
user asks for, and add nothing that contradicts the picture. The video is one continuous shot of a \
few seconds: no cuts, no new scene. Mention what stands still only where it is needed to say what \
moves. Never write "the image shows", "the video begins" or anything else about images and videos. \
Answer with the new prompt alone: one paragraph of at most 100 words."""
THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
QUOTES = "\"'`\u201c\u201d"


@dataclass(frozen=True)
class Endpoint:
    """Where prompts are rewritten."""

    address: str  # as http://127.0.0.1:8000/v1
    model: str
    key: str = field(default="", repr=False)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key to wherever it leads, and the prompt nowhere."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any):
        fp.close()
        raise urllib.error.URLError(f"it leads to {newurl}; give that address itself")


def check_address(address: str) -> None:
    """Raises ValueError for what is no address of an interface."""
    if scheme_of(address) not in WEB or has_password(address) or set("?#") & set(address):
        rule = "a http or https address without password and query, as http://127.0.0.1:8000/v1"
        raise ValueError(f"--enhance must be {rule}: got {shown(address) or repr(address)}")


def connect(address: str, model: str | None) -> Endpoint:
    """The endpoint at an address, with the key of the environment, and where no model is named, the
    first one that it lists. Raises ValueError for another address or a key that cannot be sent,
    OSError where it has to be asked and does not answer, in one line."""
    check_address(address)
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEY} must be printable ASCII: got other characters")
    address = address.strip().rstrip("/").removesuffix(CHAT)
    if model:
        return Endpoint(address, model, key)
    endpoint = Endpoint(address, "", key)
    listed = _call(endpoint, "/models")
    try:
        first = listed["data"][0]["id"]
    except (LookupError, TypeError):
        first = None
    if not isinstance(first, str) or not first:
        raise OSError(_cannot(endpoint, "it lists no model; name one with --enhance_model"))
    return Endpoint(address, first, key)


def rewrite(endpoint: Endpoint, prompt: str, picture: Any) -> str:
    """A prompt for a video that begins with a picture (what `read_image` reads), rewritten. Raises
    OSError where the endpoint does not answer as it should, ValueError where its answer is no
    prompt, both in one line and without the key."""
    user = [
        {"type": "text", "text": f"The user's prompt: {prompt}"},
        {"type": "image_url", "image_url": {"url": _data_address(picture)}},
    ]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    body = {"model": endpoint.model, "messages": messages, **SAMPLING}
    answer = _call(endpoint, CHAT, body)
    try:
        choice = answer["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise OSError(_cannot(endpoint, _said(answer) or "its answer has no choices")) from None
    text = " ".join(THOUGHTS.sub(" ", text).split()) if is_text(text) else ""
    text = text.strip(QUOTES)
    if not re.search(r"\w", text) or "<think>" in text:
        must = f"{shown(endpoint.address)} must answer with a prompt"
        raise ValueError(_without_key(endpoint, f"{must}: got {text!r:.40}"))
    if end == "length":  # it was cut off, perhaps within a sentence
        text = text if len(parts := SENTENCE.split(text)) == 1 else " ".join(parts[:-1])
    return text


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """As many of a text's first sentences as fit; "" where the first one does not."""
    sentences = SENTENCE.split(text)
    shorter = (" ".join(sentences[:count]) for count in range(len(sentences), 0, -1))
    return next(filter(fits, shorter), "")


def _data_address(picture: Any) -> str:
    image = read_image(picture)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _call(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that an endpoint answers. Raises OSError in one line."""
    address = quote(endpoint.address, safe=string.punctuation) + path
    headers = {"User-Agent": "cogi2v-jax", "Accept": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = None if body is None else json.dumps(body).encode()

    def work() -> bytes:
        end = time.monotonic() + SECONDS
        request = urllib.request.Request(address, data, headers)
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return read_answer(answer, LARGEST, end)
        except urllib.error.HTTPError as error:
            with error:
                said = _said(_parsed(read_answer(error, LARGEST, end)))
            raise OSError(f"HTTP {error.code} {said or error.reason}") from None

    try:
        data = within(SECONDS, work)
    except (OSError, HTTPException, ValueError) as error:
        why = str(getattr(error, "reason", None) or str(error) or type(error).__name__)
        raise OSError(_cannot(endpoint, why)) from None
    if len(data) > LARGEST:
        raise OSError(_cannot(endpoint, f"it answers with more than {LARGEST >> 20} MiB"))
    if (answer := _parsed(data)) is None:
        raise OSError(_cannot(endpoint, "its answer is no JSON"))
    return answer


def _parsed(data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError:
        return None


def _said(answer: Any) -> str:
    """What an answer says went wrong, as the usual servers do; "" for another one."""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    error = error.get("message") if isinstance(error, dict) else error
    return error if isinstance(error, str) else ""


def _cannot(endpoint: Endpoint, why: str) -> str:
    why = PASSWORD.sub("...@", one_line(_without_key(endpoint, why).strip().partition("\n")[0]))
    return f"cannot ask {shown(endpoint.address)}: {why[:SHOWN]}"


def _without_key(endpoint: Endpoint, text: str) -> str:
    """A text for a message: servers quote what they were sent."""
    for form in filter(None, (endpoint.key, quote(endpoint.key, safe=""))):
        text = text.replace(form, "...")
    return text
