"""The command line, run on the embedded model: what it makes and what it prints."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import twins
from recipes import read_recipe
from runs import QUICK, enter, failed, files, without_sampling
from safetensors.numpy import load_file

from cogi2v_jax import __version__, loading, pipeline
from cogi2v_jax.apps import making
from cogi2v_jax.media import videos
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import LATENTS, main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder for every run, with a photo in it."""
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def requests(monkeypatch):
    """The requests that would have been sampled; nothing is sampled."""
    return without_sampling(monkeypatch)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """The main job, without a single argument: (folder, exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("default")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = main([])
    finally:
        os.chdir(before)
    return folder, code, out.getvalue(), err.getvalue()


def cyan(frame: np.ndarray) -> int:
    """Pixels of the shape; every background is darker."""
    red, green, blue = (frame[..., channel].astype(int) for channel in range(3))
    return int(((green > 140) & (blue > 140) & (red < 120)).sum())


# the main job


def test_the_default_run_makes_a_video_with_its_recipe_and_its_latents(default):
    folder, code, _, _ = default
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"out.mp4", "out.latents.safetensors"}
    assert read_frames(folder / "out.mp4").shape == (9, 64, 64, 3)
    recipe = read_recipe(folder / "out.mp4")
    assert recipe["prompt"] == "the cyan triangle grows"
    assert (recipe["model"], recipe["checkpoint"]) == ("cogi2v-tiny", "cogi2v-tiny")
    assert recipe["dtype"] == "float32"
    assert (recipe["seed"], recipe["noise"]) == (42, "jax")
    assert (recipe["num_inference_steps"], recipe["guidance_scale"]) == (50, 2.0)
    assert recipe["program"] == f"cogi2v-jax {__version__}"
    others = "image image_sha256 negative_prompt fps scheduler use_dynamic_cfg fit jax device"
    assert recipe.keys() >= set(others.split())
    latents = load_file(folder / "out.latents.safetensors")["latents"]
    assert (latents.shape, latents.dtype) == ((1, 3, 16, 16, 16), np.float32)
    assert np.isfinite(latents).all()


def test_the_shape_grows_as_the_default_prompt_says(default):
    frames = read_frames(default[0] / "out.mp4")
    assert cyan(frames[0]) > 50
    assert cyan(frames[-1]) > 1.6 * cyan(frames[0])


def test_the_same_shape_stays_if_the_prompt_says_so():
    assert main(["--prompt", "the cyan triangle stays still"]) == 0
    areas = [cyan(frame) for frame in read_frames("out.mp4")]
    assert areas[0] > 50
    assert max(areas) < 1.4 * areas[0]
    assert min(areas) > 0.7 * areas[0]


def test_the_run_ends_with_the_seconds_the_memory_and_the_files(default):
    _, _, out, err = default
    seconds, memory, made = out.splitlines()
    parts = ("load", "text", "image", "compile", "denoise", "decode", "write")
    assert re.fullmatch(
        r"seconds: " + "  ".join(rf"{part} \d+\.\d" for part in parts) + r"  \(total \d+\.\d\)",
        seconds,
    )
    assert re.fullmatch(r"peak memory: host \d+\.\d GiB", memory)
    assert made == "out.mp4: 9 frames of 64x64 at 8 fps"
    assert "step 1 of 50: first step done" in err
    assert re.search(r"step 50 of 50: \d+\.\d\d s a step, 0:00 left", err)
    assert "Traceback" not in err


def test_the_parts_sum_to_the_total(default):
    *parts, total = (float(number) for number in re.findall(r"\d+\.\d", default[2].splitlines()[0]))
    assert len(parts) == 7
    assert sum(parts) == pytest.approx(total, abs=0.4)
    assert total > 0


def test_the_time_to_find_the_model_is_counted_for_the_first_video(
    requests, default, monkeypatch, capsys
):
    find = loading.load

    def slowly(*arguments):
        time.sleep(0.3)
        return find(*arguments)

    monkeypatch.setattr(loading, "load", slowly)
    assert main(["--num_videos_per_prompt", "2", "--output", "x.gif"]) == 0
    first, second = (
        float(number) for number in re.findall(r"load (\d+\.\d)", capsys.readouterr().out)
    )
    assert first >= 0.8
    assert second == 0.5  # what the run itself says


# decoding alone


@pytest.mark.parametrize("output", [None, "again.mp4"])
def test_decoding_the_latents_gives_the_same_frames(output, default, capsys):
    made = default[0]
    latents = Path("x.latents.safetensors")
    latents.write_bytes((made / "out.latents.safetensors").read_bytes())
    assert main(["--decode_latents", str(latents), *(("--output", output) if output else ())]) == 0
    path = output or "x.mp4"
    np.testing.assert_array_equal(read_frames(path), read_frames(made / "out.mp4"))
    assert read_recipe(path) == read_recipe(made / "out.mp4")
    seconds, _, line = capsys.readouterr().out.splitlines()
    assert re.match(r"seconds: load \S+  compile \S+  decode \S+  write \S+  \(total", seconds)
    assert line == f"{path}: 9 frames of 64x64 at 8 fps"


def test_decoding_alone_may_change_the_speed(default, capsys):
    latents = str(default[0] / "out.latents.safetensors")
    assert main(["--decode_latents", latents, "--output", "fast.gif", "--fps", "25"]) == 0
    assert read_recipe("fast.gif") == {**read_recipe(default[0] / "out.mp4"), "fps": 25}
    assert capsys.readouterr().out.splitlines()[-1] == "fast.gif: 9 frames of 64x64 at 25 fps"


def test_latents_are_readable_by_others(default):
    umask = os.umask(0)
    os.umask(umask)
    assert (default[0] / "out.latents.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_latents_are_on_disk_before_decoding_starts(monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating\n and more lines")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode_batch", full)
        assert main([*QUICK]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    full = (
        "cogi2v: the device ran out of memory: RESOURCE_EXHAUSTED: Out of memory while allocating"
    )
    assert line.startswith(f"{full}; the latents are kept: --decode_latents out.latents")
    assert files() == {"out.latents.safetensors"}
    assert main(["--decode_latents", "out.latents.safetensors"]) == 0
    assert read_frames("out.mp4").shape == (9, 64, 64, 3)


# what people type


def test_every_flag_of_the_official_script_still_works(default, capsys):
    arguments = {
        "--prompt": "the cyan triangle moves left",
        "--image_or_video_path": "photo.png",
        "--model_path": str(twins.TINY),
        "--output_path": "./output.mp4",
        "--guidance_scale": "4.5",
        "--num_inference_steps": "2",
        "--num_frames": "9",
        "--width": "64",
        "--height": "64",
        "--fps": "12.0",
        "--num_videos_per_prompt": "1",
        "--generate_type": "i2v",
        "--dtype": "float32",
        "--seed": "7",
    }
    assert main([word for pair in arguments.items() for word in pair]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "output.mp4: 9 frames of 64x64 at 12 fps"
    recipe = read_recipe("output.mp4")
    for flag, value in arguments.items():
        name = flag.removeprefix("--")
        if name in recipe:
            assert str(recipe[name]) == value
    assert recipe["image"] == "photo.png"
    flags = "prompt guidance_scale num_inference_steps num_frames width height fps dtype seed"
    assert recipe.keys() >= set(flags.split())


def test_our_own_flags_reach_the_request(requests, default):
    arguments = "--image photo.png --prompt circle --negative_prompt blurry --model cogi2v-tiny "
    arguments += "--output o.gif --scheduler dpm --use_dynamic_cfg --fit pad --noise torch "
    arguments += "--image_latent_scale 0.5 --attention xla"
    assert main(arguments.split()) == 0
    (request,) = requests
    assert (request.prompt, request.negative_prompt) == ("circle", "blurry")
    assert (request.scheduler, request.use_dynamic_cfg) == ("dpm", True)
    assert (request.fit, request.image_latent_scale, request.noise) == ("pad", 0.5, "torch")
    assert str(request.image) == "photo.png"
    assert main(["--no-use_dynamic_cfg", "--image_latent_scale", "sat"]) == 0
    assert (requests[1].use_dynamic_cfg, requests[1].image_latent_scale) == (False, "sat")


def test_settings_that_are_left_out_are_those_of_the_checkpoint(requests, default):
    assert main([]) == 0
    (request,) = requests
    assert (request.height, request.width, request.num_frames, request.fps) == (64, 64, 9, 8)
    assert (request.scheduler, request.use_dynamic_cfg, request.fit) == ("ddim", False, "crop")
    assert (request.noise, request.seed) == ("jax", 42)


@pytest.mark.parametrize("output", ["clip.gif", "clip.png", "clip", "CLIP.MP4"])
def test_the_output_s_suffix_decides_its_kind(output, default, capsys):
    assert main([*QUICK, "--output", output, "--seed", "3"]) == 0
    path = Path(output).with_suffix("") if output.endswith(".png") else Path(output)
    assert files() == {path.name, f"{Path(output).stem}{LATENTS}"}
    assert path.is_dir() == (path.suffix == "")
    assert read_frames(path).shape[1:] == (64, 64, 3)
    assert read_recipe(path)["seed"] == 3
    rounded = " (in a gif: 12 and 13 hundredths of a second)" if path.suffix == ".gif" else ""
    last = f"{path}: 9 frames of 64x64 at 8 fps{rounded}"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_the_same_seed_makes_the_same_frames_and_another_makes_others(default):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main([*QUICK, "--output", name, "--seed", seed]) == 0
    np.testing.assert_array_equal(read_frames("a"), read_frames("b"))
    assert (read_frames("a") != read_frames("c")).any()


# many at once


def test_several_videos_count_their_seeds_up_and_are_numbered(default, capsys):
    arguments = ["--num_videos_per_prompt", "2", "--seed", "7", "--output", "take.mp4"]
    assert main([*QUICK, *arguments]) == 0
    assert files() == {
        f"take-{number}{suffix}" for number in (0, 1) for suffix in (".mp4", LATENTS)
    }
    assert [read_recipe(f"take-{number}.mp4")["seed"] for number in (0, 1)] == [7, 8]
    assert [line for line in capsys.readouterr().out.splitlines() if "frames of" in line] == [
        f"take-{number}.mp4: 9 frames of 64x64 at 8 fps" for number in (0, 1)
    ]


def test_numbered_outputs_sort_in_the_order_of_the_videos(requests, default):
    assert main(["--num_videos_per_prompt", "11", "--output", "x.gif"]) == 0
    assert files() >= {"x-00.gif", "x-09.gif", "x-10.gif"}


def test_outputs_are_all_checked_before_the_first_video(requests, default, capsys):
    Path("x-1").mkdir()
    Path("x-1", "mine.txt").write_text("mine")
    assert "x-1" in failed(capsys, ["--num_videos_per_prompt", "2", "--output", "x.png"], 1)
    assert requests == []


# stopping


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["loop", "decode", "write"])
def test_stopping_leaves_no_half_written_file(moment, default, monkeypatch, capsys):
    if moment == "loop":
        monkeypatch.setattr(making, "progress", lambda: lambda step, *_: step == 2 and stop())
    if moment == "decode":
        monkeypatch.setattr(pipeline, "decode_batch", stop)
    if moment == "write":
        monkeypatch.setitem(
            videos.WRITERS, ".mp4", lambda part, *_: [part.write_bytes(b"half"), stop()]
        )
    capsys.readouterr()
    assert main([*QUICK]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "cogi2v: stopped; no half-written video was left"
    assert files() == (set() if moment == "loop" else {"out.latents.safetensors"})


def test_stopping_keeps_the_video_of_an_earlier_run(default, monkeypatch):
    Path("out.mp4").write_bytes(b"earlier")
    monkeypatch.setitem(
        videos.WRITERS, ".mp4", lambda part, *_: [part.write_bytes(b"half"), stop()]
    )
    assert main([*QUICK]) == 130
    assert Path("out.mp4").read_bytes() == b"earlier"


def test_ctrl_c_ends_a_running_program_without_a_file(default):
    command = [sys.executable, "-m", "cogi2v_jax.sample", "--num_inference_steps", "999"]
    # A shell that runs the tests in the background makes them, and their children, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    said = ""
    while "first step done" not in said:
        line = process.stderr.readline()
        assert line, f"ended before its first step: {said}"
        said += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "cogi2v: stopped; no half-written video was left\n"
    assert files() == set()


# the program


def test_the_program_samples_a_diffusers_folder_without_torch(default, tmp_path):
    """Converts it first, into a new cache, but uses the compilations that are cached already."""
    program = """
import runpy, sys
sys.argv = ["sample", *sys.argv[1:]]
try:
    runpy.run_module("cogi2v_jax.sample", run_name="__main__")
except SystemExit as end:
    print("exit code", end.code)
known = {"torch", "transformers", "diffusers", "tensorflow", "jax"}
print("imported:", *sorted({name.split(".")[0] for name in sys.modules} & known))
"""
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "cogi2v-jax" / "xla"
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    command = [sys.executable, "-c", program, *QUICK, "--model", str(twins.TINY)]
    command += ["--image", "photo.png", "--prompt", "the cyan triangle grows"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert f"converting {twins.TINY}" in done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "out.mp4: 9 frames of 64x64 at 8 fps",
        "exit code 0",
        "imported: jax",
    ]
    assert read_frames("out.mp4").shape == (9, 64, 64, 3)
