"""Prompts to padded T5 ids. Both kinds of tokenizer file are read by the `tokenizers` library, as
transformers does, so that ids agree for every Unicode text and sampling needs neither torch nor
transformers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import Precompiled
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Steps

from ..disk import (
    first_line,
    is_text,
    one_line,
    parse_json,
    quoted,
    read_json,
    refuse_pointer,
)

PAD, EOS, UNKNOWN = 0, 1, 2
MARKS = ["<pad>", "</s>", "<unk>"]  # of these ids
EXTRA_IDS = 100  # marks like <extra_id_0> behind the vocabulary, where no file says how many
NEITHER = "must hold spiece.model or tokenizer.json: found neither"
MOST = 4096  # ids behind the vocabulary


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """A function from text to ids without EOS, from the folder's `spiece.model`, or from its
    `tokenizer.json`, which is all that newer transformers save. Marks like </s> in a text become
    their own ids. Raises ValueError for a file that is no tokenizer of T5's kind, FileNotFoundError
    if the folder has neither."""
    for name, read in _readers():
        if (folder / name).is_file():
            tokenizer = read(folder / name)
            return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    raise FileNotFoundError(f"{folder} {NEITHER}")


def list_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder. (Those whose names begin with a dot are of a system's.)"""
    return sorted(path for path in folder.glob("[!.]*") if path.is_file())


def check_files(folder: Path) -> None:
    """Reads every file of a tokenizer's folder, also what `encoder` leaves out. Raises as
    `encoder`, and ValueError for a file that is no JSON or has not been fetched."""
    for path in list_files(folder):
        refuse_pointer(path)
        if path.suffix == ".json":
            try:
                parse_json(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} must be a JSON file: {error}") from None
    found = [read(folder / name) for name, read in _readers() if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} {NEITHER}")


def _readers() -> Iterable[tuple[str, Callable[[Path], Tokenizer]]]:
    return ("spiece.model", _from_pieces), ("tokenizer.json", _from_json)


def _from_json(path: Path) -> Tokenizer:
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} must be a tokenizer: {first_line(error)}") from None
    tokenizer.no_padding()  # the file keeps the settings of the call before it was saved
    tokenizer.no_truncation()
    return _checked(path, tokenizer)


def _from_pieces(path: Path) -> Tokenizer:
    """What transformers makes of a sentencepiece model: a unigram model over words."""
    from sentencepiece.sentencepiece_model_pb2 import (
        ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
    )

    refuse_pointer(path)
    model: Any = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        tokenizer = Tokenizer(Unigram([(p.piece, p.score) for p in model.pieces], UNKNOWN, False))
    except Exception as error:  # protobuf's and the library's own
        raise ValueError(f"{path} must be a sentencepiece model: {first_line(error)}") from None
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = Precompiled(model.normalizer_spec.precompiled_charsmap)
    words = Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = Steps([WhitespaceSplit(), words])
    kinds = type(model.pieces[0])
    kinds = {kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED}
    tokenizer.add_special_tokens([p.piece for p in model.pieces if p.type in kinds])
    tokenizer.add_tokens(_marks_behind(len(model.pieces), path.parent))
    return _checked(path, tokenizer, model.trainer_spec.model_type == model.trainer_spec.UNIGRAM)


def _checked(path: Path, tokenizer: Tokenizer, is_unigram: bool = True) -> Tokenizer:
    """Raises ValueError for the tokenizer of another kind of model, as LLaMA's."""
    marks = [tokenizer.id_to_token(id) for id in (PAD, EOS, UNKNOWN)]
    if marks != MARKS or not is_unigram or not isinstance(tokenizer.model, Unigram):
        must = f"must be a unigram tokenizer that begins with {' '.join(MARKS)}, as T5's"
        got = " ".join(map(str, marks)) if marks != MARKS else "another kind of model, as BPE"
        raise ValueError(one_line(f"{path} {must}: got {got}"))
    return tokenizer


def _marks_behind(vocabulary: int, folder: Path) -> list[AddedToken]:
    """The marks whose ids follow the vocabulary's, in the order of their ids: those of the folder's
    `tokenizer_config.json`, or T5's, whose numbers fall."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    try:
        count = min(int(settings.get("extra_ids", EXTRA_IDS)), MOST + 1)
        extra = (f"<extra_id_{i}>" for i in reversed(range(count)))
        marks = {id: AddedToken(text, special=True) for id, text in enumerate(extra, vocabulary)}
        listed = settings.get("added_tokens_decoder", {}).items()
        marks |= {int(id): AddedToken(**mark) for id, mark in listed if int(id) >= vocabulary}
        ids = range(vocabulary, max(marks, default=0) + 1)
        if len(ids) > MOST:
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} must list added tokens by their ids: got others") from None
    return [marks.get(id, AddedToken(f"<reserved {id}>", special=True)) for id in ids]


def tokenize(
    folder: Path, prompts: Sequence[str], length: int
) -> tuple[Int[np.ndarray, "b p"], list[int]]:
    """The ids of every prompt, truncated so that EOS fits and padded to `length`, and the number of
    tokens, EOS included, that each prompt has before truncation. Raises ValueError as `encoder`
    does, and for bytes that are no text."""
    encode = encoder(folder)
    ids = np.full((len(prompts), length), PAD, np.int32)
    counts = []
    for row, prompt in zip(ids, prompts, strict=True):
        if not is_text(prompt):
            raise ValueError(f"prompt must be Unicode text: got {quoted(prompt)}")
        tokens = encode(prompt)
        counts.append(len(tokens) + 1)
        tokens = [*tokens[: length - 1], EOS]
        row[: len(tokens)] = tokens
    return ids, counts
