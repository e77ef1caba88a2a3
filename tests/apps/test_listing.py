"""Rows as jobs: what is refused before anything slow, and how videos are named."""

from pathlib import Path

import pytest
from runs import enter

from cogi2v_jax.apps.jobs import FAILED
from cogi2v_jax.apps.listing import Asked, Listing, list_jobs, name_of
from cogi2v_jax.media.rows import Row

ASKED = Asked("cogi2v-tiny", 42, "", {"fps": 8.0}, {"dtype": None})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def listed(*rows: str, header: str = "image,prompt,output") -> Listing:
    Path("jobs.csv").write_text("\n".join([header, *rows]))
    Path("fetched").mkdir(exist_ok=True)
    return list_jobs(Path("jobs.csv"), Path("out"), ASKED, Path("fetched"))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("The cyan triangle grows!", "0007-the-cyan-triangle-grows.mp4"),
        ("../../etc/passwd", "0007-etc-passwd.mp4"),
        ("Ein Föhn_weht — ÜBER", "0007-ein-föhn-weht-über.mp4"),
        ("船" * 50, f"0007-{'船' * 13}.mp4"),
        ("!?", "0007.mp4"),
        ("a" * 39 + " b", f"0007-{'a' * 39}.mp4"),
    ],
)
def test_a_name_has_the_number_of_its_row_and_the_beginning_of_its_prompt(
    prompt: str, name: str
) -> None:
    assert name_of(Row(prompt, "photo.png", number=7)) == name


def test_a_row_answers_before_the_command_line() -> None:
    header = "image,prompt,seed,negative_prompt,fps,end_image"
    one, two = listed("photo.png,a,7,red,6,photo.png", "photo.png,the,,,,", header=header).jobs
    digest = one.recipe["image_sha256"]
    assert one.recipe == {
        "dtype": None,
        "model": "cogi2v-tiny",
        "prompt": "a",
        "negative_prompt": "red",
        "seed": 7,
        "settings": {"fps": 6.0},
        "image": "photo.png",
        "image_sha256": digest,
        "end_image": "photo.png",
        "end_image_sha256": digest,
    }
    assert (two.recipe["seed"], two.recipe["settings"]) == (42, {"fps": 8.0})
    assert "end_image" not in two.recipe
    assert (one.row, two.row) == (1, 2)


def test_every_wrong_row_is_told_once_with_all_that_is_wrong() -> None:
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:500])
    listing = listed(
        "gone.png,a,,",
        "photo.png,a,,",
        "cut.png,a,x.avi,60",
        "photo.png,a,,64",
        "photo.png,,,",
        header="image,prompt,output,height",
    )
    assert [fault.line for fault in listing.faults] == [2, 4, 6]
    gone, cut, empty = (fault.message for fault in listing.faults)
    assert gone == "image must be an existing file: got gone.png"
    assert cut.startswith("output must end in .mp4, .gif, ")
    assert "; image must be whole and in a common format: got cut.png" in cut
    assert "; height must be a multiple of 8: got 60" in cut
    assert empty == "it must have a prompt and an image (in a .txt file: prompt@@image)"
    assert [job.row for job in listing.jobs] == [2, 4]
    assert [(job.row, job.state == FAILED) for job in listing.all] == [
        *((1, True), (2, False)),
        *((3, True), (4, False), (5, True)),
    ]


OUTSIDE = ["/tmp/x.mp4", "../x.mp4", "a/../../x.mp4", "", "x\x00.mp4", "a\x1b[2J.mp4"]
OURS = ["jobs.sqlite.png", "results.jsonl.png"]


@pytest.mark.parametrize("output", [one for one in (*OUTSIDE, *OURS) if one])
def test_no_output_leaves_the_folder_or_takes_a_name_of_ours(output: str) -> None:
    (fault,) = listed(f"photo.png,a,{output}").faults
    assert fault.message == f"output must be a name in the folder: got {output!r}"


def test_no_output_leaves_the_folder_by_a_link(tmp_path: Path) -> None:
    Path("out").mkdir()
    Path("out/link").symlink_to("/tmp")
    (fault,) = listed("photo.png,a,link/x.mp4").faults
    assert fault.message == ("output must be a name in the folder: got link/x.mp4, which leads out")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x.mp4", "x.mp4"),
        ("x.mp4", "X.mp4"),
        ("x.png", "x"),
        ("x/", "./x"),
        ("x.png", "x/y.mp4"),
        ("x/y.mp4", "x"),
        ("0002-a.mp4", ""),
    ],
)
def test_an_output_is_one_row_s_alone(first: str, second: str) -> None:
    (fault,) = listed(f"photo.png,a,{first}", f"photo.png,a,{second}").faults
    assert (fault.line, fault.message[:34]) == (3, "output must be one row's alone: go")
    assert fault.message.endswith(", as line 2 has")


def test_outputs_may_be_in_folders_that_are_made_later() -> None:
    listing = listed("photo.png,a,one/x.mp4", "photo.png,a,one/two/x.gif", "photo.png,a,one/y")
    assert listing.faults == []
    assert not Path("out").exists()


def test_a_folder_with_files_of_someone_is_not_replaced() -> None:
    Path("out/mine").mkdir(parents=True)
    Path("out/mine/notes.txt").write_text("mine")
    (fault,) = listed("photo.png,a,mine").faults
    assert fault.message.startswith("output folder must be new, empty or hold only frames")


def test_no_output_replaces_a_picture_that_is_read() -> None:
    Path("out").mkdir()
    Path("out/photo.gif").write_bytes(Path("photo.png").read_bytes())
    listing = listed("out/photo.gif,a,", "photo.png,a,photo.gif")
    (fault,) = listing.faults
    assert fault == (2, 3, "output must be outside of what is read: got photo.gif")
