"""The command line as several processes, each in a folder of its own: hosts have their own
disks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import announcements, without_gloo
from safetensors.numpy import load_file
from tolerances import TOLERANCE, assert_close

from cogi2v_jax.media.videos import read_frames
from cogi2v_jax.sample import EXAMPLE_IMAGE

QUICK = ("--num_inference_steps", "2", "--output", "out.png")
PATIENCE = 600.0  # seconds for all to compile, on two cores that others use as well
# Quick to compile, exact products, one device a process.
SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONPATH": os.pathsep.join(sys.path),
}

MODULE = ("-m", "cogi2v_jax.sample")
# The same with a shorter heartbeat: a process is lost after 10 s instead of 30 s.
IMPATIENT = """
import functools, sys
from cogi2v_jax import sample
from cogi2v_jax.devices import hosts
hosts.join = functools.partial(hosts.join, heartbeat=10)
sys.exit(sample.main())
"""

Ended = tuple[int, str, str, Path]  # exit code, standard output, standard error, folder


def sample(
    parent: Path, count: int, *arguments: str, program: tuple[str, ...] = MODULE
) -> list[Ended]:
    folders = [parent / str(process) for process in range(count)]
    processes = []
    try:
        for folder, announced in zip(folders, announcements(count), strict=True):
            folder.mkdir(exist_ok=True)
            line = [sys.executable, *program, *QUICK, *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(
                subprocess.Popen(line, env=os.environ | SETTINGS | announced, cwd=folder, **pipes)
            )
        said = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        (process.returncode, without_gloo(out), err, folder)
        for process, (out, err), folder in zip(processes, said, folders, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [(code, _, err, folder)] = sample(tmp_path_factory.mktemp("alone"), 1)
    assert code == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_make_the_video_of_one(count: int, alone: Path, tmp_path: Path) -> None:
    (code, out, err, folder), *others = sample(tmp_path, count)
    assert code == 0, err
    assert out.splitlines()[-1] == "out: 9 frames of 64x64 at 8 fps"
    assert [line[:11] for line in err.splitlines()] == ["step 1 of 2", "step 2 of 2", "the picture"]
    for code, *said, other in others:
        assert (code, *said, list(other.iterdir())) == (0, "", "", [])
    ours, theirs = (
        load_file(path / "out.latents.safetensors")["latents"] for path in (folder, alone)
    )
    assert_close(ours, theirs, TOLERANCE["module"])
    ours, theirs = (read_frames(path / "out").astype(int) for path in (folder, alone))
    assert np.abs(ours - theirs).max() <= 1  # a value between two levels may be rounded either way


def test_an_image_that_is_missing_on_one_host_ends_all(tmp_path: Path) -> None:
    for process in range(2):
        (tmp_path / str(process)).mkdir()
    (tmp_path / "0" / "photo.png").write_bytes(EXAMPLE_IMAGE.read_bytes())
    arguments = ("--image", "photo.png", "--prompt", "it moves")
    first, second = sample(tmp_path, 2, *arguments, program=("-c", IMPATIENT))
    assert first[0] != 0
    assert first[1] == ""
    assert (second[:2], len(second[2].splitlines())) == ((1, ""), 1)
    assert second[2].startswith("cogi2v: image ")
    assert [path.name for ended in (first, second) for path in ended[3].iterdir()] == ["photo.png"]
