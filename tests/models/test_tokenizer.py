"""Ids compared with transformers' T5Tokenizer, from both kinds of tokenizer file."""

from pathlib import Path

import numpy as np
import pytest
import twins
from sentencepiece import SentencePieceTrainer
from transformers import T5Tokenizer

from cogi2v_jax.models.tokenizer import tokenize

PROMPTS = [
    "",
    " \t\n ",
    "the red circle moves left",
    "  the   red\t\tcircle \n moves\r\nleft ",
    "The RED circle, moves: left!",
    "a zebra circles thereafter",
    "redcircle",
    "the red\u00a0circle\u200b moves\u3000left",
    "naïve café ﬁne ① ｆｕｌｌ",
    "熊猫 🎸 \x00 \ufffd",
    "a panda plays 12,345.67 guitars; it's \"fine\" -- isn't it?",
    "the red circle moves left " * 60,
]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with many pieces, trained like T5's: the embedded one rarely splits a word."""
    folder = tmp_path_factory.mktemp("larger")
    text = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=500,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    return folder


@pytest.mark.parametrize("length", [1, 10, 226])
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("vocabulary", ["embedded", "larger"])
def test_ids_are_those_of_transformers(
    vocabulary: str, file: str, length: int, larger: Path, tmp_path: Path
) -> None:
    folder = twins.TINY / "tokenizer" if vocabulary == "embedded" else larger
    theirs = T5Tokenizer.from_pretrained(folder)
    if file == "tokenizer.json":
        # The file then keeps these settings.
        theirs("a", padding="max_length", max_length=3, truncation=True)
        theirs.save_pretrained(folder := tmp_path)
    assert (folder / file).is_file()
    ids, counts = tokenize(folder, PROMPTS, length)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(
        ids, theirs(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
    )
    assert counts == [len(tokens) for tokens in theirs(PROMPTS).input_ids]


def test_a_folder_with_neither_file_is_refused_naming_both(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=f"{tmp_path} must hold spiece.model or tokenizer.json: found neither",
    ):
        tokenize(tmp_path, ["a"], 10)
