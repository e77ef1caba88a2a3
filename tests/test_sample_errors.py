"""The command line's help, its progress, and its errors in one line each."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from runs import enter, failed, files, without_sampling
from safetensors.numpy import save_file

from cogi2v_jax import __version__, disk, loading, pipeline
from cogi2v_jax.apps import making
from cogi2v_jax.media import videos
from cogi2v_jax.sample import main, parser


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for every run, with a photo in it."""
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def requests(monkeypatch):
    """The requests that would have been sampled; nothing is sampled."""
    return without_sampling(monkeypatch)


@pytest.fixture(scope="module", autouse=True)
def converted():
    """Converts the embedded model, so that no run reports its conversion."""
    loading.load("cogi2v-tiny", say=lambda line: None)


# errors


RECIPE = {"model": "cogi2v-tiny", "dtype": "float32", "fps": 8}


def latents_file(shape=(1, 3, 16, 16, 16), name="latents", recipe=RECIPE) -> str:
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
        *(
            (
                {"recipe": RECIPE | {"fps": fps}},
                f"model 'cogi2v-tiny', dtype 'float32' and fps {fps!r}",
            )
            for fps in (None, "8", True, 0, -8, float("nan"))
        ),
        ({"recipe": RECIPE | {"fps": 10**400}}, "integers must have at most 300 digits: got 401"),
        ({"recipe": RECIPE | {"model": 3}}, "a recipe of model 3, dtype 'float32' and fps 8"),
        ({"recipe": RECIPE | {"dtype": None}}, "a recipe of model 'cogi2v-tiny', dtype None and"),
        ({"shape": (1, 0, 16, 16, 16)}, "it holds [1, 0, 16, 16, 16] and a recipe of"),
        ({"shape": (3, 16, 16, 16)}, "must be a *.latents.safetensors file"),
        ({"shape": (2, 3, 16, 16, 16)}, "must be a *.latents.safetensors file"),
        ({"shape": (1, 3, 16, 16, 4)}, "latents must have the shape [b t h w 16] for cogi2v-tiny"),
        ({"recipe": {**RECIPE, "model": "gone/away/model"}}, "found no gone/away/model"),
    ],
)
def test_a_file_of_other_latents_is_refused(settings, expected, capsys):
    assert expected in failed(capsys, ["--decode_latents", latents_file(**settings)], 1)


# Arguments, and the error: of what cannot be done, and of wrong arguments.
IMPOSSIBLE = [
    ("--image gone.png --prompt p", "image must be an existing file: got gone.png"),
    ("--image cut.png --prompt p", "image must be whole and in a common format: got cut.png"),
    ("--image notes.txt --prompt p", "image must be whole and in a common format: got notes.txt"),
    ("--image . --prompt p", "image must be a picture file"),
    ("--model no-such-model --image photo.png --prompt p", "found no no-such-model$"),
    ("--model ~nobody-of-this-name/x --image photo.png --prompt p", "found no ~nobody"),
    ("--model photo.png --image photo.png --prompt p", "got the file photo.png"),
    ("--height 84", "height must be a multiple of 8: got 84; nearest is 80 or 88"),
    ("--num_frames 50", r"num_frames must be 8k\+1 .*: got 50; nearest is 49 or 56"),
    (
        "--num_inference_steps 61",
        "num_inference_steps must .*61",
    ),  # more than the reference's schedule can do
    (
        "--num_inference_steps 0",
        r"num_inference_steps must be a positive integer below 2\*\*31: got 0",
    ),
    (
        "--prompt 'the cyan triangle grows the cyan triangle grows the cyan triangle grows'",
        "prompt must be at most 10 tokens for cogi2v-tiny",
    ),
    (
        "--guidance_scale nan",
        "guidance_scale must be a finite number and not negative, or one for each step: got nan",
    ),
    ("--prompt 'caf\udce9'", r"negative_prompt must be Unicode text: got 'caf\\udce9' and ''"),
    ("--seed -1", r"seed must be an integer from 0 to 2\*\*64 - 1: got -1"),
    ("--fps 0", "fps must be a number from 0.01 to 240: got 0"),
    *(
        (f"{what}--fps {fps}", "fps must be a number from 0.01 to 240: got ")
        for fps in ("-1", "nan", "1e-5", "1e300", "1e400")
        for what in ("", "--decode_latents x.latents.safetensors ")
    ),
    ("--model a/b --image photo.png --prompt p --mesh v9-8", "mesh must be auto, v5e-1, "),
    (
        "--fps 0 --guidance_scale inf",
        "fps must .*; guidance_scale must |guidance_scale must .*; fps must ",
    ),
    (
        "--image_latent_scale -2",
        "image_latent_scale must be reference, sat, trainer or a positive number: got -2",
    ),
    ("--attention flash", "attention must be auto, xla, .*: got 'flash'"),
    ("--output nowhere/out.mp4", "output must be in an existing, writable folder: got nowhere"),
    ("--output photo.png/out.mp4", "output must be in an existing, writable folder"),
    ("--output .mp4 --num_videos_per_prompt 2", "output must have a name before its suffix: got"),
    ("--output ''", "output must have a name before its suffix: got"),
    ("--output out.avi", "output must end in .mp4, .gif, or .png"),
    ("--output taken.mp4", "output must be a file or a new name: got taken.mp4"),
    ("--decode_latents gone.latents.safetensors", "latents must exist: found no gone"),
    (
        "--decode_latents notes.txt",
        r"latents must be a \*.latents.safetensors file .*: got notes.txt \(",
    ),
    ("--manifest gone.csv", "manifest must exist: found no gone.csv"),
    (
        "--lora_path x --lora_rank 128",
        "lora must be an existing .*, or a hub id: found no x$",
    ),
    ("--lora_path x.safetensors:0.8", "lora must be an existing .*: found no x.safetensors$"),
    (
        "--lora_path notes.txt:strong",
        "the weight of lora notes.txt must be a finite number: got strong$",
    ),
    ("--lora_path notes.txt:inf", "the weight of lora notes.txt must be a finite number: got inf$"),
    ("--lora_path notes.txt", "lora must end in .safetensors, .*: got notes.txt$"),
]
WRONG = [
    ("--manifest jobs.csv --prompt p", "--manifest must stand alone"),
    ("--decode_latents x --prompt p", "--decode_latents must stand without --"),
    ("--decode_latents x --lora_path notes.txt", "--decode_latents must stand without --"),
    ("--decode_latents x --seed 3 --height 64", "must stand without --height, --seed: decoding"),
    *((f"--{name} ''", f"--{name} must not be empty") for name in ("model", "plan", "mesh")),
    ("--decode_latents x --num_videos_per_prompt 0", "--num_videos_per_prompt must be at least 1"),
    ("--num_videos_per_prompt 0", "--num_videos_per_prompt must be at least 1: got 0"),
    ("--height tall", r"--height: must be a positive integer below 2\*\*31: got 'tall'"),
    ("--image_latent_scale big", "must be reference, sat, trainer or a positive number: got 'big'"),
    ("--colour", "unrecognized arguments: --colour"),
    ("--scheduler euler", "--scheduler: invalid choice: 'euler'"),
    ("--dtype float16", "--dtype: invalid choice: 'float16'"),
    ("--generate_type t2v", "--generate_type: invalid choice: 't2v'"),
]


@pytest.mark.parametrize(
    ("code", "arguments", "expected"),
    [(1, *case) for case in IMPOSSIBLE] + [(2, *case) for case in WRONG],
)
def test_an_error_is_one_line_and_nothing_is_written(code, arguments, expected, capsys):
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:500])
    Path("notes.txt").write_text("notes")
    Path("taken.mp4").mkdir()
    assert re.search(expected, failed(capsys, shlex.split(arguments), code))


def test_a_hub_id_without_a_network_is_one_line(capsys):
    assert main(["--model", "a/b", "--image", "photo.png", "--prompt", "p"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cogi2v: model a/b must be on the hub, in its cache or a folder here: ")
    assert files() == set()


def test_an_output_folder_that_is_read_only_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(videos.os, "access", lambda path, mode: False)
    assert "output must be in an existing, writable folder" in failed(capsys, [], 1)


def test_a_full_disk_is_found_before_anything_is_sampled(requests, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_space", lambda folder: (60_000, folder))
    line = failed(capsys, [], 1)
    # 49,152 bytes of latents and 110,592 of frames, which an mp4 squeezes.
    assert line == "cogi2v: . must have 0.1 MB free for latents and videos: got 0.1 MB"
    assert requests == []
    monkeypatch.setattr(disk, "free_space", lambda folder: (61_000, folder))
    assert main([]) == 0


def test_a_missing_ffmpeg_is_one_line_before_anything_is_sampled(requests, monkeypatch, capsys):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg on your system")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    line = failed(capsys, [], 1)
    assert line.startswith("cogi2v: ffmpeg does not start: No ffmpeg exe could be found. Install")
    assert line.endswith(
        "an mp4 needs an ffmpeg with libx264: unset IMAGEIO_FFMPEG_EXE, or write a .gif or .png"
    )
    assert requests == []


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(pipeline, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main([])


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_and_the_caller_s_hook_is_restored(monkeypatch, capsys):
    def warn(*_, **__):
        warnings.warn("outside the published range", stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "generate", warn)
    show = warnings.showwarning
    assert main([]) == 130
    assert capsys.readouterr().err.splitlines()[0] == "warning: outside the published range"
    assert warnings.showwarning is show


def test_arguments_are_checked_without_jax():
    program = """
import sys
from cogi2v_jax.sample import main
arguments = "--image gone.png --prompt p", "--output x.avi", "--decode_latents gone"
arguments += ("--decode_latents gone --fps -1",)
codes = [main(given.split()) for given in arguments]
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
    assert done.stdout.splitlines()[-1] == "1 1 1 1 0 0 2 False"


def test_devices_that_do_not_start_are_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "cogi2v_jax.sample"],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("cogi2v: jax finds no device of abacus: Unable to initialize")


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
    assert len(lines) <= 66
    assert max(map(len, lines)) <= 120
    groups = [line for line in lines if line.endswith(":") and not line.startswith((" ", "usage"))]
    assert groups == [
        "options:",
        "what to make:",
        "how to sample (default: what the checkpoint was made for):",
        "beyond the reference (docs/craft.md):",
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
def test_progress_is_one_line_on_a_terminal_and_two_lines_in_a_log(live, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", Terminal(live))
    monkeypatch.setattr(making.time, "perf_counter", lambda: now[0])
    show = making.progress()
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
    third = "step 3 of 4: 30.00 s a step, 0:30 left"
    assert shown == ([first, second, third, last] if live else [first, last])
    assert text.count("\n") == (1 if live else 2)
    assert text.endswith("\n")


def test_a_folder_in_the_place_of_the_latents_is_refused_before_sampling_and_kept(capsys):
    Path("out.latents.safetensors").mkdir()
    Path("out.latents.safetensors", "mine").write_text("kept")
    line = failed(capsys, ["--output", "out.mp4"], 1)
    assert line == (
        "cogi2v: latents must be a file or a new name: got the folder out.latents.safetensors"
    )
    assert Path("out.latents.safetensors", "mine").read_text() == "kept"
