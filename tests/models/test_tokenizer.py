"""Ids compared with transformers' T5Tokenizer, from both kinds of tokenizer file."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import twins
from sentencepiece import SentencePieceTrainer
from transformers import T5Tokenizer

from cogi2v_jax.models.tokenizer import check_files, encoder, list_files, tokenize

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
    "the red circle moves left</s>",
    "<pad> the red<extra_id_0>circle <unk>",
]
# Of which random texts are made, beside random characters: marks, spaces of all kinds, and text
# that changes when it is normalised.
WORDS = """
    the red circle moves left copyright License 1 2.5 ( ) . , & < </s s> </s> <pad> <unk> <s>
    <extra_id_0> <extra_id_7> <extra_id_99> \u2581 \u2581bigger ﬁ ① ｆｕｌｌ 熊猫 🎸 👨\u200d👩 한국
    \u1100\u1161 ｶﾞ … ½ İ ß e\u0301 \u0301 À
"""
SPACES = " \t\n\x00\x7f\x85\xa0\xad\u200b\u202e\u2028\u3000\ufeff\ud7ff"
FRAGMENTS = [*WORDS.split(), *SPACES]
BLOCKS = [(0, 0x250), (0x300, 0x370), (0, 0x3100), (0xF900, 0xFFFF), (0x10000, 0x1FFFF)]


T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train(folder: Path, **settings: object) -> Path:
    """A sentencepiece model of the licence's text."""
    text = (Path(__file__).parents[2] / "LICENSE").read_text().splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=500,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **settings,
    )
    return folder


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with many pieces, trained like T5's: the embedded one rarely splits a word."""
    return train(tmp_path_factory.mktemp("larger"), **T5_IDS)


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


def add_marks(folder: Path, larger: Path) -> Path:
    """A tokenizer whose configuration lists T5's marks as that of the released checkpoints does:
    with the spaces around them."""
    size = 500
    marks = {
        str(size + i): {"content": f"<extra_id_{99 - i}>", "lstrip": True, "rstrip": True}
        for i in range(100)
    }
    settings = {"tokenizer_class": "T5Tokenizer", "added_tokens_decoder": marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "spiece.model").write_bytes((larger / "spiece.model").read_bytes())
    return folder


def random_text(source: random.Random) -> str:
    parts = []
    for _ in range(source.randrange(15)):
        character = chr(source.randrange(*source.choice(BLOCKS)))
        parts.append(source.choice([*source.sample(FRAGMENTS, 3), character]))
        parts.append(source.choice(["", "", " "]))
    return "".join(parts)


@pytest.mark.parametrize("vocabulary", ["embedded", "larger", "marked"])
def test_random_texts_have_the_ids_of_transformers(
    vocabulary: str, larger: Path, tmp_path: Path
) -> None:
    folder = twins.TINY / "tokenizer" if vocabulary == "embedded" else larger
    folder = add_marks(tmp_path, larger) if vocabulary == "marked" else folder
    theirs, source = T5Tokenizer.from_pretrained(folder), random.Random(0)
    texts = [random_text(source) for _ in range(3000)]
    expected = theirs(texts, add_special_tokens=False).input_ids
    theirs.save_pretrained(saved := tmp_path / "saved")
    for encode in (encoder(folder), encoder(saved)):
        assert [encode(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [("spiece.model", b"no model"), ("spiece.model", b""), ("tokenizer.json", b'{"model": 1}')],
)
def test_a_file_that_is_no_tokenizer_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} must be a") as refused:
        tokenize(tmp_path, ["a"], 10)
    assert "\n" not in str(refused.value)


LLAMA = {"unk_id": 0, "bos_id": 1, "eos_id": 2}


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        (LLAMA, r"<unk> <s> </s>"),
        (T5_IDS | {"model_type": "bpe"}, r"another kind of model, as BPE"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    settings: dict[str, object], got: str, tmp_path: Path
) -> None:
    must = rf"spiece\.model must be a unigram tokenizer .* <pad> </s> <unk>, as T5's: got {got}$"
    with pytest.raises(ValueError, match=must):
        check_files(train(tmp_path, **settings))


def to_words(value: dict[str, Any]) -> None:
    words = {token: id for id, (token, _) in enumerate(value["model"]["vocab"])}
    value["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}


def in_reverse(value: dict[str, Any]) -> None:
    value["model"]["vocab"].reverse()
    value["added_tokens"] = []


@pytest.mark.parametrize("change", [in_reverse, to_words])
def test_a_tokenizer_of_another_kind_in_json_is_refused(
    change: Callable[[dict[str, Any]], None], larger: Path, tmp_path: Path
) -> None:
    T5Tokenizer.from_pretrained(larger).save_pretrained(tmp_path)
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    change(value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="must be a unigram tokenizer"):
        encoder(tmp_path)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompt must be Unicode text: got 'a \\udcff'"):
        tokenize(twins.TINY / "tokenizer", ["a \udcff"], 10)


def test_a_folder_with_neither_file_is_refused_naming_both(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=f"{tmp_path} must hold spiece.model or tokenizer.json: found neither",
    ):
        tokenize(tmp_path, ["a"], 10)


def test_what_a_system_left_beside_the_tokenizer_is_no_file_of_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(twins.TINY / "tokenizer", tmp_path / "tokenizer"))
    files = list_files(folder)
    (folder / "._tokenizer_config.json").write_bytes(b"\0\5\x16\7\xff")
    (folder / "merges.json").write_text("[1]")
    check_files(folder)
    assert list_files(folder) == sorted([*files, folder / "merges.json"])
