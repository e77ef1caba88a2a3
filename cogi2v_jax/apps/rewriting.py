"""Prompts of a request, rewritten by a language model: the same on all processes, within the
checkpoint's limit, and the user's own where anything fails."""

import json
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..command import say
from ..devices import hosts
from ..disk import one_line, quoted
from ..media.enhance import Endpoint, rewrite, shorten
from ..request import Request, Video

if TYPE_CHECKING:
    from ..weights.checkpoint import Models

Answer = tuple[str, str]  # a prompt, and the model that wrote it
Pair = tuple[str, str]  # a prompt, and the path of its picture


def ask(connect: Callable[[], Endpoint], videos: Sequence[Video]) -> list[Answer | None]:
    """For each video, whose images are files, its prompt rewritten, or None where that failed,
    which a warning says. Each prompt is asked for once with each picture, by process 0."""
    pairs = [(video.prompt, str(video.image)) for video in videos]
    # gloo gives up where a process comes to their first meeting 30 s after another.
    hosts.meet("ask")
    found = _ask(connect, [*dict.fromkeys(pairs)]) if hosts.leads() else []
    # By number: an address is copied to another path on each host.
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    answers = [each and (each[0], each[1]) for each in json.loads(hosts.share(json.dumps(found)))]
    return [answers[numbers[pair]] for pair in pairs]


def _ask(connect: Callable[[], Endpoint], pairs: Sequence[Pair]) -> list[Answer | None]:
    answers: list[Answer | None] = []
    try:
        endpoint = connect()
        for prompt, image in pairs:
            try:
                text = rewrite(endpoint, prompt, image)
            except ValueError as error:  # of this answer; others may be prompts
                warnings.warn(f"{error}; taking {quoted(prompt)} as it is", stacklevel=2)
                answers.append(None)
                continue
            say(f"prompt, by {one_line(endpoint.model)}: {one_line(text)}")
            answers.append((text, endpoint.model))
    except OSError as error:  # of the endpoint: it is not asked again
        left = len(pairs) - len(answers)
        what = "the prompt as it is" if left == 1 else f"{left} prompts as they are"
        warnings.warn(f"{error}; taking {what}", stacklevel=2)
        answers += [None] * left
    return answers


def rewritten(
    models: "Models", request: Request, answers: Sequence[Answer | None]
) -> tuple[Request, list[dict[str, Any]]]:
    """The request with those answers that its checkpoint can take, and for each video what its
    recipe says about that. An answer with too many tokens is shortened by whole sentences; where
    not even the first one fits, the user's own prompt remains. A warning says so."""
    texts = dict.fromkeys(answer[0] for answer in answers if answer)
    fitting = {text: _fitting(models, text) for text in texts}
    prompts: list[str] = []
    notes: list[dict[str, Any]] = []
    for video, answer in zip(request.videos, answers, strict=True):
        prompt = fitting[answer[0]] if answer else ""
        prompts.append(prompt or video.prompt)
        about = {"original_prompt": video.prompt, "enhance_model": answer and answer[1]}
        notes.append(about if prompt else {})
    return request.with_prompts(prompts), notes


def _fitting(models: "Models", text: str) -> str:
    """As many of its first sentences as the checkpoint takes."""
    from ..models.tokenizer import tokenize

    config = models.config
    length = config.transformer.max_text_seq_length

    def fits(text: str) -> bool:
        ids, (count,) = tokenize(models.folder / "tokenizer", [text], length)
        return count <= length and int(ids.max()) < config.text_encoder.vocab_size

    shorter = shorten(text, fits)
    if shorter != text:
        what = f"the rewritten prompt must be at most {length} tokens for {config.title}"
        way = f"taking only {quoted(shorter)}" if shorter else "taking the prompt as it is"
        warnings.warn(f"{what}: got {quoted(text)}; {way}", stacklevel=2)
    return shorter
