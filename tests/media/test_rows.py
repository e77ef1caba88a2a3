"""Batch files: what each format may contain, and that every fault is named with its line."""

import argparse
import json
from pathlib import Path

import pytest

from cogi2v_jax.arguments import Listed, add_settings
from cogi2v_jax.media.rows import EVERY_COLUMN, Row, read_manifest, read_rows
from cogi2v_jax.settings import SETTINGS


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        read_manifest(path)
    return str(caught.value)


CSV = (
    'prompt,image,negative_prompt,seed\n"a, ""panda""",a.png,blur,7\n\n'
    'b,in/b.png\r\n"two\nlines",/c.png,,\n'
)
JSONL = "\n".join(
    json.dumps(row, ensure_ascii=False)
    for row in (
        {"prompt": 'a, "panda"', "image": "a.png", "negative_prompt": "blur", "seed": 7},
        {"prompt": "b", "image": "in/b.png", "seed": None},
        {"prompt": "two\nlines", "image": "/c.png", "seed": ""},
    )
)
TXT = 'a, "panda"@@a.png\n\n  b @@ in/b.png \nan @@ inside@@/c.png'


def test_a_csv_file_and_a_jsonl_file_say_the_same(tmp_path: Path) -> None:
    rows = [
        Row('a, "panda"', tmp_path / "a.png", "blur", 7),
        Row("b", tmp_path / "in/b.png"),
        Row("two\nlines", Path("/c.png")),
    ]
    assert read_manifest(write(tmp_path, "jobs.csv", CSV)) == rows
    assert read_manifest(write(tmp_path, "jobs.jsonl", JSONL)) == rows


def test_a_txt_file_is_split_at_the_last_mark_of_a_line(tmp_path: Path) -> None:
    rows = [
        Row('a, "panda"', tmp_path / "a.png"),
        Row("b", tmp_path / "in/b.png"),
        Row("an @@ inside", Path("/c.png")),
    ]
    assert read_manifest(write(tmp_path, "jobs.txt", TXT)) == rows


ONE = {
    "jobs.csv": "prompt,image\né\u2028ü,a.png",
    "jobs.jsonl": '{"prompt": "é\u2028ü", "image": "a.png"}',
    "jobs.txt": "é\u2028ü@@a.png",
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_a_file_is_utf8_with_or_without_a_byte_order_mark_and_its_suffix_of_any_case(
    tmp_path: Path, name: str, mark: bytes
) -> None:
    path = write(tmp_path, name.upper(), mark + ONE[name].encode())
    assert read_manifest(path) == [Row("é\u2028ü", tmp_path / "a.png")]


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_a_row_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, name, content)
    assert refusal(path) == f"manifest must have at least one row: got {path}, which has none"


HEADER = "prompt,image,seed\n"
COLUMNS = "columns must be among prompt, image, negative_prompt, seed"
INCOMPLETE = "it must have a prompt and an image (in a .txt file: prompt@@image)"
SEED = "seed must be an integer from 0 to 2**64 - 1"


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("a.csv", "prompt,picture\na,b\n", [f"{COLUMNS}: got picture (line 2)"]),
        (
            "b.csv",
            HEADER + "a,b,1,2,3\n",
            ["line 2: it must have a cell a column: got cells beyond the header's"],
        ),
        (
            "c.csv",
            HEADER + "a\n,b\nc,d\n\ne,\n",
            [f"line {number}: {INCOMPLETE}" for number in (2, 3, 6)],
        ),
        ("d.csv", "prompt\na\n", [f"line 2: {INCOMPLETE}"]),
        (
            "e.csv",
            HEADER + "a,b,x\na,b,1.5\n",
            [f"line 2: {SEED}: got 'x'", f"line 3: {SEED}: got '1.5'"],
        ),
        (
            "f.csv",
            HEADER + f"a,b,-1\na,b,{2**64}\n",
            [f"line 2: {SEED}: got '-1'", f"line 3: {SEED}: got '{2**64}'"],
        ),
        (
            "g.jsonl",
            '{"prompt": "a"}\n\n[1]\n{"prompt": "a", "image": "b", "seed": 8}\n',
            [f"line 1: {INCOMPLETE}", "line 3: it must be a JSON object: got list"],
        ),
        *(
            (
                "h.jsonl",
                f'{{"prompt": "a", "image": "b", "seed": {seed}}}',
                [f"line 1: {SEED}: got {json.loads(seed)!r}"],
            )
            for seed in ("1.5", "true", "-1", "[1]", '"x"', str(2**64), f'"{"9" * 5000}"', "NaN")
        ),
        ("i.jsonl", '{"prompt": ["a"], "image": "b"}', ["line 1: prompt must be text: got ['a']"]),
        ("j.jsonl", '{"prompt": "a", "image": 3}', ["line 1: image must be text: got 3"]),
        (
            "k.jsonl",
            '{"prompt": "a", "image": "b", "negative_prompt": 3}',
            ["line 1: negative_prompt must be text: got 3"],
        ),
        ("l.txt", "a\nb@@c\n@@d\ne@@\n", [f"line {number}: {INCOMPLETE}" for number in (1, 3, 4)]),
    ],
)
def test_every_fault_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, faults: list[str]
) -> None:
    path = write(tmp_path, name, content)
    assert refusal(path) == f"{path}: {'; '.join(faults)}"


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    for line in ('{"prompt": ', f'{{"seed": {"9" * 5000}}}', "[" * 10**6):
        path = write(tmp_path, "jobs.jsonl", f'{{"prompt": "a", "image": "b"}}\n{line}\n')
        assert refusal(path).startswith(f"{path}: line 2: it must be a JSON object: ")


def test_a_csv_file_of_too_long_a_cell_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.csv", f"prompt,image\n{'a' * 200_000},b\n")
    assert refusal(path).startswith(f"manifest must be a CSV file: got {path} (field larger")


# every setting in a row


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_may_have_any_common_separator_and_header_in_capitals(
    tmp_path: Path, separator: str
) -> None:
    rows = [
        ["Prompt", "IMAGE", " Num Inference Steps ", "end-image", "Output", "Guidance_Scale", ""],
        ["a, b; c\td", "a.png", "20", "z.png", "x.gif", "6,5", ""],
        ["", "", "", "", "", "", ""],
        ["e", "http://x/y.png", "", "", "", "", ""],
    ]
    lines = [separator.join(f'"{cell}"' for cell in row) for row in rows]
    rows, faults = read_rows(write(tmp_path, "jobs.csv", "\n".join(lines)))
    settings = {"num_inference_steps": 20, "guidance_scale": (6.0, 5.0)}
    first = Row("a, b; c\td", tmp_path / "a.png", None, None, settings, tmp_path / "z.png", "x.gif")
    assert (rows, faults) == ([first, Row("e", "http://x/y.png")], [])
    assert [(row.number, row.line) for row in rows] == [(1, 2), (2, 4)]


GIVEN = {  # as flags take them
    "height": "64",
    "fps": "7.5",
    "use_dynamic_cfg": "true",
    "scheduler": "dpm2m",
    "fit": "pad",
    "image_latent_scale": "0.5",
    "guidance_scale": "3,2",
    "guidance_interval": "0.1:0.9",
    "motion": "0.5",
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_cell_is_read_as_the_flag_of_its_name_is(tmp_path: Path, name: str) -> None:
    flags = argparse.ArgumentParser()
    add_settings(flags)
    Listed(flags, "others", 78).add_settings()
    switch = name == "use_dynamic_cfg"
    options = flags.parse_args([f"--{name}"] if switch else [f"--{name}", GIVEN[name]])
    header = f"prompt\timage\t{name}\n"
    (row,), _ = read_rows(write(tmp_path, "jobs.csv", f"{header}a\tb\t {GIVEN[name]} "))
    assert row.settings == {name: getattr(options, name)}
    value = json.dumps({"prompt": "a", "image": "b", name: row.settings[name]})
    (same,), _ = read_rows(write(tmp_path, "jobs.jsonl", value))
    assert same == row


def test_every_setting_may_stand_in_a_row() -> None:
    assert {*SETTINGS, "seed", "negative_prompt", "image", "prompt", "end_image", "output"} == {
        *EVERY_COLUMN
    }


def test_values_that_no_checkpoint_takes_are_named_with_their_line(tmp_path: Path) -> None:
    lines = ["prompt,image,fps,seed,use_dynamic_cfg", "a,b,0,x,maybe", "a,b,8,1,TRUE", "a,b,,,no"]
    rows, faults = read_rows(write(tmp_path, "jobs.csv", "\n".join(lines)))
    assert [row.settings for row in rows] == [
        {"fps": 8.0, "use_dynamic_cfg": True},
        {"use_dynamic_cfg": False},
    ]
    assert [str(fault) for fault in faults] == [
        "line 2: seed must be an integer from 0 to 2**64 - 1: got 'x'; fps must be a number from "
        "0.01 to 240: got '0'; use_dynamic_cfg must be true or false: got 'maybe'"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("jobs.csv", "prompt,image,guidence_scale\n" + "a,b,6\n" * 40),
        ("jobs.jsonl", '\n{"prompt": "a", "image": "b", "guidence_scale": 6}' * 40),
    ],
)
def test_an_unknown_column_is_told_once_with_its_nearest(
    tmp_path: Path, name: str, content: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=r"^.+$") as caught:
        read_rows(path)
    got = "got guidence_scale (line 2); nearest is guidance_scale"
    assert str(caught.value) == f"{path}: columns must be among {', '.join(EVERY_COLUMN)}: {got}"


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.csv", "prompt,image,Seed,seed\na,b,1,2\n")
    assert refusal(path) == f"{path}: columns must be named once: got seed twice"


def test_where_no_settings_are_read_the_command_that_reads_them_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "jobs.csv", "prompt,image,fps\na,b,8\n")
    way = "python -m cogi2v_jax.batch reads more of them"
    assert refusal(path) == f"{path}: {COLUMNS}: got fps (line 2); {way}"


@pytest.mark.parametrize("seed", ["0", "18446744073709551615", " 7 "])
def test_a_seed_may_be_any_64_bits(tmp_path: Path, seed: str) -> None:
    assert read_manifest(write(tmp_path, "jobs.csv", f"prompt,image,seed\na,b,{seed}"))[
        0
    ].seed == int(seed)


def test_a_file_of_another_kind_or_encoding_or_none_at_all_is_one_line(tmp_path: Path) -> None:
    assert (
        refusal(write(tmp_path, "jobs.xlsx", ""))
        == "manifest must end in .csv, .jsonl, .txt: got jobs.xlsx"
    )
    path = write(tmp_path, "jobs.csv", "prompt,image\na,b".encode("utf-16"))
    assert refusal(path) == f"manifest must be UTF-8 text: got {path}, which is not"
    with pytest.raises(
        FileNotFoundError, match=f"^manifest must exist: found no {tmp_path}/none.csv$"
    ):
        read_manifest(tmp_path / "none.csv")
