"""Prompts to padded T5 ids. Sentencepiece itself, so that sampling needs neither torch nor
transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

PAD, EOS = 0, 1


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Text to ids without the end mark, from a folder's `spiece.model`, or from the
    `tokenizer.json` that newer transformers save alone."""
    if (folder / "spiece.model").is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast.no_padding()  # the file remembers how it was last called
        fast.no_truncation()
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    raise FileNotFoundError(f"{folder} must hold spiece.model or tokenizer.json: found neither")


def tokenize(
    folder: Path, prompts: Sequence[str], length: int
) -> tuple[Int[np.ndarray, "b p"], list[int]]:
    """Ids of every prompt, ended by one EOS, cut and padded to `length`; and how many tokens each
    prompt has uncut."""
    encode = encoder(folder)
    ids = np.full((len(prompts), length), PAD, np.int32)
    counts = []
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = encode(prompt)
        counts.append(len(tokens) + 1)
        tokens = [*tokens[: length - 1], EOS]
        row[: len(tokens)] = tokens
    return ids, counts
