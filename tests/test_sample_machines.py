"""The command line's flags for machines: meshes, plans, attention, tiles."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import QUICK, enter, failed

from cogi2v_jax.sample import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch)


@pytest.mark.slow
def test_videos_made_side_by_side_are_those_made_one_by_one_and_verbose_names_the_mesh(capsys):
    run = [*QUICK, "--num_videos_per_prompt", "2"]
    assert main([*run, "--output", "alone.png"]) == 0
    capsys.readouterr()
    assert main([*run, "--output", "shared.png", "--mesh", "data=2,pair=2", "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert "mesh: data=2,pair=2,context=1 on 4 of 8 x cpu" in err
    assert "compiler options for cpu:" in err
    assert "attention: xla, 202 tokens padded to 202" in err
    heads = [line.partition(":")[0] for line in out.splitlines()]
    assert heads == ["seconds", "peak memory", "shared-0", "shared-1"]
    for number in (0, 1):
        for frame in sorted(Path(f"alone-{number}").glob("*.png")):
            paths = Path(f"shared-{number}", frame.name), frame
            ours, theirs = (np.asarray(Image.open(path), np.int16) for path in paths)
            assert np.abs(ours - theirs).max() <= 1


def test_a_plan_is_printed_without_jax():
    script = "import sys; from cogi2v_jax.sample import main; code = main(sys.argv[1:]); "
    script += "sys.exit(code or 'jax' in sys.modules)"
    arguments = ["--model", "cogvideox-5b-i2v", "--plan", "v5e-8"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "v5e-8: 8 chips of TPU v5 lite (2x4), split over data 1, pair 2, context 4\n"
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[4:8]] == [
        "text",
        "image",
        "denoise",
        "decode",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--mesh", "v9-8"], "mesh must be auto, v5e-1, "),
        (
            ["--mesh", "context=4"],
            "transformer blocks.attn: heads (6) must be divisible by 4 (context) for mesh "
            "data=1,pair=1,context=4; ",
        ),
        (
            ["--mesh", "data=2"],
            "request: video (1) must be divisible by 2 (data) for mesh data=2,pair=1,context=1; "
            "nearest mesh",
        ),
        (["--plan", "v9-8"], "mesh must be one of v5e-1, "),
        (
            ["--attention", "splash"],
            "attention splash must have bfloat16 on a TPU: got float32 on cpu",
        ),
        (["--vae_tiling"], "sample_height of a VAE that is tiled must be a multiple of 48: got 64"),
    ],
)
def test_a_machine_that_does_not_suit_is_refused_in_a_line(arguments, expected, capsys):
    assert expected in failed(capsys, arguments, 1)
