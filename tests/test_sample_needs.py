"""What the command line takes from outside (addresses, closed pipes, plain terminals), and what it
says when the end of a run fails."""

import base64
import os
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import twins
from recipes import read_recipe
from runs import QUICK, enter, failed, files

from cogi2v_jax import loading, terminal
from cogi2v_jax.apps import making
from cogi2v_jax.media import videos
from cogi2v_jax.sample import main

PROMPT = ["--prompt", "the cyan triangle grows"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for every run, with a photo in it."""
    return enter(tmp_path, monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def converted():
    loading.load("cogi2v-tiny", say=lambda line: None)


@pytest.fixture
def address(folder: Path):
    """Where the folder is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_may_be_an_address(address: str, capsys) -> None:
    assert main([*QUICK, "--image", f"{address}/photo.png?size=1", *PROMPT]) == 0
    recipe = read_recipe("out.mp4")
    assert main([*QUICK, "--image", "photo.png", *PROMPT, "--output", "here.mp4"]) == 0
    expected = read_recipe("here.mp4")
    assert recipe == expected
    assert recipe["image"] == "photo.png"


def test_a_request_is_refused_before_its_model_is_converted(folder: Path, capsys) -> None:
    shutil.copytree(twins.TINY, "model")
    arguments = ["--model", "model", "--image", "photo.png", *PROMPT, "--num_frames", "5"]
    assert main([*QUICK, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cogi2v: num_frames must be 8k+1 ")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "cogi2v_jax.sample", *QUICK])
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert {"out.mp4", "out.latents.safetensors"} <= files()


def test_a_row_of_a_batch_file_may_have_an_address(address: str, capsys) -> None:
    Path("rows.txt").write_text(f"the cyan triangle grows@@{address}/photo.png\n")
    data = base64.b64encode(Path("photo.png").read_bytes()).decode()
    with Path("rows.txt").open("a") as file:
        file.write(f"the cyan triangle grows@@data:image/png;base64,{data}\n")
    assert main([*QUICK, "--manifest", "rows.txt"]) == 0
    assert [read_recipe(f"out-{n}.mp4")["image"] for n in range(2)] == ["photo.png", "image"]


def test_an_address_without_a_picture_is_named_whole(address: str, capsys) -> None:
    line = failed(capsys, ["--image", f"{address}/none.png", *PROMPT], 1)
    assert line == f"cogi2v: cannot download {address}/none.png: File not found"
    assert files() == set()


def test_a_page_is_named_by_its_address_alone(address: str, capsys) -> None:
    line = failed(capsys, ["--image", f"{address}/", *PROMPT], 1)
    assert line.endswith(f" common format: got {address}/ (unknown format); try saving it anew")


@pytest.mark.parametrize("address", ["gs://b/x.png", " S3://b/x.png"])
def test_an_address_of_another_kind_keeps_its_slashes(address: str, capsys) -> None:
    line = failed(capsys, ["--image", address, *PROMPT], 1)
    assert line.endswith(f": got {address.strip()}; download it first")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--image", "photo.png"], "--prompt must be given with --image"),
        (["--model", "other", *PROMPT], "--image must be given with --prompt"),
        (["--model", "other"], "--image and --prompt must be given (only the embedded"),
        (["--gui", "3"], "unrecognized arguments: --gui 3"),
    ],
)
def test_a_missing_or_unknown_argument_is_named(arguments: list[str], rule: str, capsys) -> None:
    assert rule in failed(capsys, arguments, 2)


def test_latents_that_could_not_be_written_are_not_said_to_be_kept(monkeypatch, capsys) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(making, "write_latents", full)
    assert main([*QUICK]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "cogi2v: No space left on device"


def test_a_failure_at_the_end_names_the_latents_that_are_kept(monkeypatch, capsys) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    write = videos.WRITERS[".mp4"]
    monkeypatch.setitem(videos.WRITERS, ".mp4", full)
    assert main([*QUICK]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    kept = "--decode_latents out.latents.safetensors makes the video"
    assert line == f"cogi2v: No space left on device; the latents are kept: {kept}"
    monkeypatch.setitem(videos.WRITERS, ".mp4", write)
    assert main(["--decode_latents", "out.latents.safetensors"]) == 0


def test_a_terminal_that_cannot_show_a_name_shows_it_escaped() -> None:
    command = [sys.executable, "-m", "cogi2v_jax.sample", *QUICK, "--output", "映画.png"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") or "step" in done.stderr
    assert r"\u6620\u753b: 9 frames of 64x64 at 8 fps" in done.stdout


@pytest.mark.parametrize(
    "program",
    [
        ["cogi2v_jax.sample", "--plan", "v5e-8", "--model", "cogvideox-5b-i2v"],
        ["cogi2v_convert", "inspect", str(twins.TINY)],
    ],
)
def test_a_reader_that_has_closed_ends_a_program_without_a_word(program: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        command = [sys.executable, "-m", *program]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (terminal.PIPE_CLOSED, "")
