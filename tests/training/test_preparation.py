"""Clips and captions to latents and encodings on disk, by the embedded model; the command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from footage import film, library
from processes import announcements, without_gloo
from tolerances import TOLERANCE, assert_close

import cogi2v_jax
from cogi2v_jax.config import named
from cogi2v_jax.devices.sharding import to_host
from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.pipeline import tokenize_prompts
from cogi2v_jax.prepare import main
from cogi2v_jax.training import preparation, shards
from cogi2v_jax.training.clips import Bucket, Clip, list_clips, read_clip
from cogi2v_jax.training.preparation import check_buckets, prepare
from cogi2v_jax.training.shards import Prepared

TINY = ("--model", "cogi2v-tiny")
SIZE = Bucket(9, 64, 64)
MODULE = ("-m", "cogi2v_jax.prepare")
# Quick to compile, exact products, one device a process.
SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONPATH": os.pathsep.join(sys.path),
}


@pytest.fixture(scope="module")
def models() -> cogi2v_jax.Models:
    return cogi2v_jax.load("cogi2v-tiny", "float32")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@nnx.jit
def encode(vae: nnx.Module, pixels: jax.Array) -> jax.Array:
    return vae.encode(pixels / 127.5 - 1)


def assert_encoded(
    models: cogi2v_jax.Models, prepared: Prepared, frames: dict[int, np.ndarray]
) -> None:
    """Clips, all of one size, have the moments of the VAE alone."""
    expected = encode(models.piece("vae"), jnp.asarray(np.stack([*frames.values()])))
    for number, moments in zip(frames, np.asarray(expected), strict=True):
        read = prepared.read(number)
        assert np.array_equal(read["image"], frames[number][0])
        assert_close(read["moments"], moments, TOLERANCE["module"])


def test_moments_are_the_vaes_and_texts_are_t5s(models: cogi2v_jax.Models, tmp_path: Path) -> None:
    clips = list_clips(library(tmp_path / "clips", 5))
    clips[1].path.write_bytes(b"no video")
    film(clips[3].path, frames=8)
    colours = ("cyan", "green", "blue", "red", "white", "black")  # more captions than a batch has
    clips += [Clip(colour, tmp_path / colour, f"the {colour} square grows") for colour in colours]
    prepared = prepare(models, clips, tmp_path / "out", [SIZE], 8.0)
    assert sorted(prepared.clips) == [0, 2, 4]
    assert [clip["video"] for clip in prepared.skipped] == ["1.mp4", "3.mp4", *colours]
    assert prepared.skipped[1]["reason"] == "it must have at least 9 frames: got 8"
    assert prepared.captions == ("", *dict.fromkeys(clip.caption for clip in clips))
    ids = tokenize_prompts(models.config, models.folder, prepared.captions)
    texts = np.asarray(models.piece("text_encoder")(jnp.asarray(ids)))
    for number, text in enumerate(texts):
        assert_close(prepared.text(number), text, TOLERANCE["module"])
    assert np.array_equal(prepared.empty_text, prepared.text(0))
    for number, clip in prepared.clips.items():
        assert np.array_equal(prepared.read(number)["text"], prepared.text(clip.caption))
    assert_encoded(models, prepared, {n: read_frames(clips[n].path) for n in prepared.clips})


def test_clips_that_are_encoded_together_have_the_moments_of_each(tmp_path: Path) -> None:
    """Of two buckets, on two devices; of the smaller one four clips at once, whose last batch is
    filled up."""
    models = cogi2v_jax.load("cogi2v-tiny", "float32", mesh="data=2")
    clips = list_clips(library(tmp_path / "clips", 7))
    film(clips[2].path, height=32, width=64)
    buckets = [Bucket(9, 32, 32), Bucket(9, 32, 64)]
    prepared = prepare(models, clips, tmp_path / "out", buckets, 8.0)
    assert preparation.encoder(models, buckets[0]).size == 4
    assert [clip.bucket for clip in prepared.clips.values()] == [0, 0, 1, 0, 0, 0, 0]
    frames = {n: read_clip(clip.path, buckets, 8.0)[1] for n, clip in enumerate(clips)}
    for bucket in range(2):
        numbers = [number for number, clip in prepared.clips.items() if clip.bucket == bucket]
        assert_encoded(models, prepared, {number: frames[number] for number in numbers})


def test_strips_do_not_change_the_moments_of_a_clip(models: cogi2v_jax.Models, rng) -> None:
    run = preparation.session(models, 1)
    pixels = rng.uniform(-1, 1, (1, 9, 64, 64, 3)).astype(np.float32)
    whole, strips = (
        to_host(run(preparation.stages.encode_image, pixels, strips=count)) for count in (1, 4)
    )
    assert_close(strips, whole, TOLERANCE["module"])


def test_frames_alone_need_no_weights(tmp_path: Path) -> None:
    clips = list_clips(library(tmp_path / "clips", 3))
    prepared = prepare(named("cogi2v-tiny"), clips, tmp_path / "out", [SIZE], 8.0)
    for number, clip in enumerate(clips):
        assert np.array_equal(prepared.read(number)["pixels"], read_frames(clip.path))


def test_long_captions_are_cut_with_one_warning(models: cogi2v_jax.Models) -> None:
    captions = ["the red circle moves", "the red circle moves left and " * 9]
    with pytest.warns(UserWarning, match=r"\A1 of 2 captions longer than 10 tokens.*cut off\Z"):
        ids = preparation.tokenize_captions(models, captions)
    assert ids.shape == (2, 10)


@pytest.mark.filterwarnings("ignore:.* was published for")
@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        ("cogvideox1.5-5b-i2v", [(49, 482, 720)], r"\Aheight .*nearest is 480 or 496\Z"),
        ("cogvideox1.5-5b-i2v", [(50, 480, 720)], r"\Anum_frames .*nearest is 49 or 56\Z"),
        ("cogvideox1.5-5b-i2v", [(48, 480, 720)], r"\Anum_frames must be 8k\+1 .*got 48; .*49\Z"),
        ("cogi2v-tiny", [(9, 64, 64), (9, 64, 36)], r"\Abucket 9x64x36: width must be a multiple"),
    ],
)
def test_sizes_that_the_network_cannot_train_on_are_refused(
    name: str, sizes: list, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_buckets(named(name), sizes, None)


def test_what_is_not_asked_for_is_the_checkpoints() -> None:
    given = check_buckets(named("cogvideox-5b-i2v"), [(None, None, None)], None)
    assert given == ([Bucket(49, 480, 720)], 8.0)


def run(*arguments: object, program: tuple[str, ...] = MODULE) -> subprocess.CompletedProcess:
    line = [sys.executable, *program, *map(str, arguments), *TINY]
    return subprocess.run(line, env=os.environ | SETTINGS, capture_output=True, text=True)


# Kills itself as kill -9 does, before or after a file is renamed to its final name.
KILLED = """
import os, signal, sys
from cogi2v_jax import prepare
count, when, rename = int(sys.argv.pop(1)), sys.argv.pop(1), os.replace
def replace(*paths):
    global count
    count -= 1
    if count == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
sys.exit(prepare.main())
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    clips = library(tmp_path / "clips", 4)
    (clips / "1.mp4").write_bytes(b"no video")
    done = run(clips, tmp_path / "whole", "--pixels")
    assert done.returncode == 0, done.stderr
    said = f"{tmp_path}/whole: 3 clips in 1 bucket, 1 skipped, 0.3 MB\n"
    assert done.stdout == said
    assert "skipped 1.mp4: it cannot be read: Invalid data" in done.stderr
    # Shards 0 and 1, then the manifest.
    for count, when in ((1, "before"), (1, "after"), (1, "before"), (2, "before")):
        stopped = run(count, when, clips, tmp_path / "killed", "--pixels", program=("-c", KILLED))
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        assert not (tmp_path / "killed" / shards.MANIFEST).exists()
    last = (tmp_path / "killed" / "clips-00001.safetensors").stat()
    done = run(clips, tmp_path / "killed", "--pixels")
    assert done.stdout == said.replace("whole", "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert (tmp_path / "killed" / "clips-00001.safetensors").stat() == last  # it is not made again


@pytest.mark.slow
def test_several_processes_make_the_files_of_one(tmp_path: Path) -> None:
    clips = library(tmp_path / "clips", 3)  # a file of captions, and one of clips
    alone = run(clips, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    line = [sys.executable, *MODULE, clips, tmp_path / "shared", *TINY]
    members = [
        subprocess.Popen(
            line, env=os.environ | SETTINGS | announced, stdout=subprocess.PIPE, text=True
        )
        for announced in announcements(2)
    ]
    try:
        first, second = [member.communicate(timeout=300)[0] for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert [member.returncode for member in members] == [0, 0]
    assert without_gloo(first) == alone.stdout.replace("alone", "shared")
    assert without_gloo(second) == ""
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--buckets", "9x64x64", "--height", "64"), 2, "--buckets must stand alone"),
        (("--buckets", "9x64"), 1, "bucket must be FRAMESxHEIGHTxWIDTH"),
        (("--height", "x"), 2, "--height"),
        # Before a model is fetched.
        (("--height", "-1", "--model", "some/model"), 1, "height must be a positive integer"),
        (("--height", "76"), 1, "height must be a multiple of 8: got 76"),
        (("--fps", "0"), 1, "fps must be"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys
) -> None:
    clips = library(tmp_path / "clips", 1)
    line = [str(clips), str(tmp_path / "out"), *TINY, *arguments]
    if code == 2:
        with pytest.raises(SystemExit):
            main(line)
    else:
        assert main(line) == 1
    (said_line,) = capsys.readouterr().err.splitlines()
    assert said_line.startswith("cogi2v: ")
    assert said in said_line
    assert not (tmp_path / "out").exists()


def test_clips_of_which_none_is_there_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "list.csv").write_text("video,caption\na.mp4,it moves\n")
    assert main([str(tmp_path / "list.csv"), str(tmp_path / "out"), *TINY]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "one clip at least must exist: got 1 that don't" in line


def test_a_folder_of_something_else_is_refused_before_anything_is_written(
    tmp_path: Path, capsys
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "an app"}')
    command = [str(library(tmp_path / "clips", 1)), str(site), *TINY, "--pixels"]
    assert main(command) == 1
    assert "must be new, empty, or of prepared clips: got manifest.json" in capsys.readouterr().err
    assert contents(site) == {"manifest.json": b'{"name": "an app"}'}


def test_stopping_keeps_what_is_done(tmp_path: Path, monkeypatch, capsys) -> None:
    clips = library(tmp_path / "clips", 5)
    line = [str(clips), str(tmp_path / "out"), *TINY, "--pixels"]

    def stop(what: str, done: int, *_: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cogi2v_jax.prepare._progress", lambda: stop)
        assert main(line) == 130
    assert capsys.readouterr().err == "cogi2v: stopped; the same command goes on\n"
    assert sorted(contents(tmp_path / "out")) == ["clips-00000.safetensors"]
    assert main(line) == 0
    assert len(shards.open(tmp_path / "out", check=True).clips) == 5
