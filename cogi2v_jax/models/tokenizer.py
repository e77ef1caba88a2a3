"""Prompts to padded T5 ids, by sentencepiece or tokenizers, so that sampling needs neither torch
nor transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

PAD, EOS = 0, 1


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """A function from text to ids without EOS, from the folder's `spiece.model`, or from its
    `tokenizer.json`, which is all that newer transformers save. Raises FileNotFoundError if the
    folder has neither."""
    if (folder / "spiece.model").is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_padding()  # the file keeps the settings of the call before it was saved
        fast.no_truncation()
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    raise FileNotFoundError(f"{folder} must hold spiece.model or tokenizer.json: found neither")


def tokenize(
    folder: Path, prompts: Sequence[str], length: int
) -> tuple[Int[np.ndarray, "b p"], list[int]]:
    """The ids of every prompt, truncated so that EOS fits and padded to `length`, and the number of
    tokens, EOS included, that each prompt has before truncation."""
    encode = encoder(folder)
    ids = np.full((len(prompts), length), PAD, np.int32)
    counts = []
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = encode(prompt)
        counts.append(len(tokens) + 1)
        tokens = [*tokens[: length - 1], EOS]
        row[: len(tokens)] = tokens
    return ids, counts
