"""The command line's help, its progress, and its errors in one line each."""

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from runs import enter, failed, files, without_sampling
from safetensors.numpy import save_file

from cogi2v_jax import __version__, loading, pipeline, sample
from cogi2v_jax.media import videos
from cogi2v_jax.sample import main, parser


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every run is in a folder of its own, with a photo in it."""
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def requests(monkeypatch):
    """What would have been sampled; nothing is."""
    return without_sampling(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def converted():
    """The embedded model is in the cache, so that no run says that it converts it."""
    loading.load("cogi2v-tiny", say=lambda line: None)


# what goes wrong


RECIPE = {"model": "cogi2v-tiny", "dtype": "float32", "fps": 8}


def latents_file(shape=(1, 3, 8, 8, 16), name="latents", recipe=RECIPE) -> str:
    metadata = (
        {}
        if recipe is None
        else {"recipe": recipe if isinstance(recipe, str) else json.dumps(recipe)}
    )
    save_file({name: np.zeros(shape, np.float32)}, "bad.latents.safetensors", metadata)
    return "bad.latents.safetensors"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "weights"}, "must be a *.latents.safetensors file"),
        ({"recipe": None}, "must be a *.latents.safetensors file"),
        ({"recipe": "{"}, "must be a *.latents.safetensors file"),
        ({"recipe": "[]"}, "must be a *.latents.safetensors file"),
        ({"recipe": "3"}, "must be a *.latents.safetensors file"),
        ({"recipe": {"model": "cogi2v-tiny"}}, "must be a *.latents.safetensors file"),
        ({"shape": (3, 8, 8, 16)}, "must be a *.latents.safetensors file"),
        ({"shape": (2, 3, 8, 8, 16)}, "must be a *.latents.safetensors file"),
        ({"shape": (1, 3, 8, 8, 4)}, "latents must have 16 channels for cogi2v-tiny: got 4"),
        ({"recipe": {**RECIPE, "model": "gone/away/model"}}, "found no gone/away/model"),
    ],
)
def test_latents_of_another_kind_are_refused(settings, expected, capsys):
    assert expected in failed(capsys, ["--decode_latents", latents_file(**settings)], 1)


ERRORS = {
    "missing image": (
        ["--image", "gone.png", "--prompt", "p"],
        1,
        r"image must be an existing file: got gone.png",
    ),
    "truncated image": (
        ["--image", "cut.png", "--prompt", "p"],
        1,
        r"image must be whole and in a common format: got cut.png",
    ),
    "text as an image": (
        ["--image", "notes.txt", "--prompt", "p"],
        1,
        r"image must be whole and in a common format: got notes.txt",
    ),
    "folder as an image": (["--image", ".", "--prompt", "p"], 1, r"image must be a picture file"),
    "unknown model": (
        ["--model", "no-such-model", "--image", "photo.png", "--prompt", "p"],
        1,
        r"found no no-such-model$",
    ),
    "unknown user's model": (
        ["--model", "~nobody-of-this-name/x", "--image", "photo.png", "--prompt", "p"],
        1,
        r"found no ~nobody",
    ),
    "file as a model": (
        ["--model", "photo.png", "--image", "photo.png", "--prompt", "p"],
        1,
        r"got the file photo.png",
    ),
    "other size": (
        ["--height", "80"],
        1,
        r"height x width must be 64x64 for cogi2v-tiny, .*: got 80x64",
    ),
    "frames": (
        ["--num_frames", "50"],
        1,
        r"num_frames must be 8k\+1 .*at most 9 .*: got 50; nearest is 9",
    ),
    "a count the reference breaks on": (
        ["--num_inference_steps", "61"],
        1,
        r"num_inference_steps must .*61",
    ),
    "no steps": (
        ["--num_inference_steps", "0"],
        1,
        r"num_inference_steps must be a positive integer: got 0",
    ),
    "long prompt": (
        ["--prompt", "the cyan triangle grows " * 5],
        1,
        r"prompt must be at most 10 tokens for cogi2v-tiny",
    ),
    "nan guidance": (
        ["--guidance_scale", "nan"],
        1,
        r"guidance_scale must be a finite number and not negative: got nan",
    ),
    "negative seed": (
        ["--seed", "-1"],
        1,
        r"seed must be an integer from 0 to 2\*\*64 - 1: got -1",
    ),
    "no fps": (["--fps", "0"], 1, r"fps must be a finite number and positive: got 0"),
    "several": (
        ["--fps", "0", "--guidance_scale", "inf"],
        1,
        r"fps must .*; guidance_scale must |guidance_scale must .*; fps must ",
    ),
    "scale": (
        ["--image_latent_scale", "-2"],
        1,
        r"image_latent_scale must be reference, sat, trainer or a positive number: got -2",
    ),
    "attention": (["--attention", "flash"], 1, r"attention must be auto, xla, .*: got 'flash'"),
    "no output folder": (
        ["--output", "nowhere/out.mp4"],
        1,
        r"output must be in an existing, writable folder: got nowhere",
    ),
    "file as an output folder": (
        ["--output", "photo.png/out.mp4"],
        1,
        r"output must be in an existing, writable folder",
    ),
    "unknown suffix": (["--output", "out.avi"], 1, r"output must end in .mp4, .gif, or .png"),
    "folder as an output": (
        ["--output", "taken.mp4"],
        1,
        r"output must be a file or a new name: got taken.mp4",
    ),
    "missing latents": (
        ["--decode_latents", "gone.latents.safetensors"],
        1,
        r"latents must exist: found no gone",
    ),
    "latents that are none": (
        ["--decode_latents", "notes.txt"],
        1,
        r"latents must be a \*.latents.safetensors file .*: notes.txt is not",
    ),
    "missing manifest": (["--manifest", "gone.csv"], 1, r"manifest must exist: found no gone.csv"),
    "manifest and prompt": (
        ["--manifest", "jobs.csv", "--prompt", "p"],
        2,
        r"--manifest must stand alone",
    ),
    "image without a prompt": (["--image", "photo.png"], 2, r"--image and --prompt must be given"),
    "another model without an image": (
        ["--model", "cogvideox-5b-i2v", "--prompt", "p"],
        2,
        r"--image and --prompt must be given",
    ),
    "latents and a prompt": (
        ["--decode_latents", "x", "--prompt", "p"],
        2,
        r"--decode_latents must stand alone",
    ),
    "missing LoRA": (
        ["--lora_path", "x", "--lora_rank", "128"],
        1,
        r"lora must be an existing file or folder: found no x$",
    ),
    "missing LoRA with a weight": (
        ["--lora_path", "x.safetensors:0.8"],
        1,
        r"lora must be an existing .*: found no x.safetensors$",
    ),
    "LoRA's weight": (
        ["--lora_path", "notes.txt:strong"],
        1,
        r"the weight of lora notes.txt must be a finite number: got strong$",
    ),
    "LoRA's infinite weight": (
        ["--lora_path", "notes.txt:inf"],
        1,
        r"the weight of lora notes.txt must be a finite number: got inf$",
    ),
    "text as a LoRA": (
        ["--lora_path", "notes.txt"],
        1,
        r"lora must end in .safetensors, .*: got notes.txt$",
    ),
    "latents and a LoRA": (
        ["--decode_latents", "x", "--lora_path", "notes.txt"],
        2,
        r"--decode_latents must stand alone",
    ),
    "no videos": (
        ["--num_videos_per_prompt", "0"],
        2,
        r"--num_videos_per_prompt must be at least 1: got 0",
    ),
    "text as a number": (["--height", "tall"], 2, r"--height: must be a positive integer: got 'tall'"),
    "text as a scale": (
        ["--image_latent_scale", "big"],
        2,
        r"must be reference, sat, trainer or a positive number: got 'big'",
    ),
    "unknown flag": (["--colour"], 2, r"unrecognized arguments: --colour"),
    "unknown scheduler": (["--scheduler", "euler"], 2, r"--scheduler: invalid choice: 'euler'"),
    "float16": (["--dtype", "float16"], 2, r"--dtype: invalid choice: 'float16'"),
    "text to video": (["--generate_type", "t2v"], 2, r"--generate_type: invalid choice: 't2v'"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_line_and_nothing_is_written(error, capsys):
    arguments, code, expected = ERRORS[error]
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:500])
    Path("notes.txt").write_text("notes")
    Path("taken.mp4").mkdir()
    assert re.search(expected, failed(capsys, arguments, code))


def test_a_hub_id_without_a_network_is_one_line(capsys):
    assert main(["--model", "a/b", "--image", "photo.png", "--prompt", "p"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cogi2v: model a/b must be on the hub, in its cache or a folder here: ")
    assert files() == set()


def test_an_output_folder_that_is_read_only_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(videos.os, "access", lambda path, mode: False)
    assert "output must be in an existing, writable folder" in failed(capsys, [], 1)


def test_a_missing_ffmpeg_is_one_line_before_anything_is_sampled(requests, monkeypatch, capsys):
    def missing(*_, **__):
        raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg on your system")

    monkeypatch.setattr(videos, "_ffmpeg", missing)
    assert (
        failed(capsys, [], 1)
        == "cogi2v: No ffmpeg exe could be found. Install ffmpeg on your system"
    )
    assert requests == []


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main([])


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_and_warnings_are_the_caller_s_again_afterwards(monkeypatch, capsys):
    def warn(*_, **__):
        warnings.warn("outside the published range", stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", warn)
    show = warnings.showwarning
    assert main([]) == 130
    assert capsys.readouterr().err.splitlines()[0] == "warning: outside the published range"
    assert warnings.showwarning is show


def test_arguments_are_judged_without_jax():
    program = """
import sys
from cogi2v_jax.sample import main
codes = [main(["--image", "gone.png", "--prompt", "p"]), main(["--output", "x.avi"]), main(["--decode_latents", "gone"])]
for arguments in (["--help"], ["--version"], ["--height", "tall"]):
    try:
        main(arguments)
    except SystemExit as end:
        codes.append(end.code)
print(*codes, "jax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "1 1 1 0 0 2 False"


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"cogi2v-jax {__version__}\n"


@pytest.mark.parametrize("columns", ["40", "100", "300"])
def test_the_help_fits_two_screens_in_groups(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert groups == [
        "options:",
        "what to make:",
        "how to sample (default: what the checkpoint was made for):",
        "model and machine:",
    ]


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    flags = {flag for action in parser()._actions for flag in action.option_strings}
    assert {flag for flag in flags if not re.search(rf"{flag}\b", text)} == {
        "--generate_type",
        "--lora_rank",
    }
    assert {"cogi2v-tiny", "cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"} <= set(
        re.findall(r"[\w.-]+\w", text)
    )


# the progress line


class Terminal(io.StringIO):
    def __init__(self, live: bool):
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


@pytest.mark.parametrize("live", [True, False])
def test_progress_grows_in_place_on_a_terminal_and_is_two_lines_in_a_log(live, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", Terminal(live))
    monkeypatch.setattr(sample.time, "perf_counter", lambda: now[0])
    show = sample._progress()
    now[0] = 100.0  # compiling
    for step in range(1, 5):
        show(step, 4, None)
        now[0] += 30.0
    text = sys.stderr.getvalue()
    shown = [part.strip() for part in re.split(r"[\r\n]", text) if part.strip()]
    first, second, last = (
        "step 1 of 4: first step done",
        "step 2 of 4: 30.00 s a step, 1:00 left",
        "step 4 of 4: 30.00 s a step, 0:00 left",
    )
    assert (
        shown == [first, second, "step 3 of 4: 30.00 s a step, 0:30 left", last]
        if live
        else shown == [first, last]
    )
    assert text.count("\n") == (1 if live else 2)
    assert text.endswith("\n")
