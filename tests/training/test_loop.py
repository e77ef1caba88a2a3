"""Whole runs: what they leave, and that nothing that ends one loses or changes anything."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from processes import announcements
from tolerances import relative_error

from cogi2v_jax import disk
from cogi2v_jax.disk import locked
from cogi2v_jax.train import main
from cogi2v_jax.training.checkpoints import Checkpoints
from cogi2v_jax.training.loop import interrupts, train
from cogi2v_jax.training.output import write_output
from cogi2v_jax.training.run import Run
from cogi2v_jax.weights.checkpoint import MANIFEST, read_unit

PROGRAM = (sys.executable, "-m", "cogi2v_jax.train")
# Quick to compile, exact products, one device a process.
SETTINGS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONPATH": os.pathsep.join(sys.path),
}
PATIENCE = 300.0  # seconds
FIRST = pytest.mark.parametrize("family", ["1.0"], indirect=True)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl; a line may be half-written."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(folder)]


def command(studio: Any, output: Path, **keys: Any) -> list[str]:
    """A recipe's file and changes of it."""
    recipe = output.parent / f"{output.name}.toml"
    recipe.write_text(studio.recipe(output, **keys).to_toml())
    return [*PROGRAM, str(recipe)]


def factors(folder: Path) -> Any:
    from safetensors.numpy import load_file

    return load_file(folder / "pytorch_lora_weights.safetensors")


def wait_for_steps(run: subprocess.Popen, folder: Path, count: int) -> None:
    """Until so many steps are reported, or the run has ended."""
    end = time.monotonic() + PATIENCE
    while len(lines(folder)) < count and run.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def run(arguments: list[str], **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env=os.environ | SETTINGS | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def disturb(studio: Any, folder: Path, disturbances: list[tuple[int, int]], **keys: Any) -> None:
    """Ends a run by signals after some steps, each time goes on with it, and compares with an
    undisturbed one to the bit."""
    smooth, rough = folder / "smooth", folder / "rough"
    assert ended(run(command(studio, smooth, **keys)))[0] == 0
    for steps, number in disturbances:
        process = run(command(studio, rough, **keys))
        wait_for_steps(process, rough, steps)
        process.send_signal(number)
        code, said = ended(process)
        if number == signal.SIGTERM and code == 0 and "stopped at step" in said:
            reached = int(said.split("stopped at step ")[1].split(";")[0])
            assert lines(rough)[-1]["step"] == reached
            assert (rough / "checkpoints" / str(reached)).is_dir()
    code, said = ended(run(command(studio, rough, **keys)))
    assert code == 0, said
    assert losses(rough) == losses(smooth)
    theirs, ours = factors(smooth), factors(rough)
    assert all((ours[key] == value).all() for key, value in theirs.items())


@pytest.mark.slow
@FIRST
def test_a_killed_and_a_stopped_run_go_on_to_the_same_bits(studio: Any, tmp_path: Path) -> None:
    keys = {"steps": 60, "checkpoint_every": 3, "ema": 0.9, "batch": 2}
    disturb(studio, tmp_path, [(5, signal.SIGKILL), (12, signal.SIGTERM)], **keys)


@pytest.mark.slow
@FIRST
def test_a_run_that_is_killed_ten_times_loses_nothing(studio: Any, tmp_path: Path) -> None:
    random.seed(0)
    steps = sorted(random.randrange(1, 290) for _ in range(10))
    keys = {"steps": 300, "checkpoint_every": 7, "batch": 2}
    disturb(studio, tmp_path, [(step, signal.SIGKILL) for step in steps], **keys)


@pytest.mark.slow
@FIRST
def test_two_processes_train_to_the_weights_of_one(studio: Any, tmp_path: Path) -> None:
    keys = {"steps": 20, "batch": 2}
    train(studio.recipe(tmp_path / "one", mesh="data=1", **keys), lambda *_, **__: None)
    together = command(studio, tmp_path / "two", mesh="data=2", **keys)
    members = [run(together, **variables) for variables in announcements(2)]
    for code, said in map(ended, members):
        assert code == 0, said
    for (_, one), (_, two) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    ours = factors(tmp_path / "two")
    for key, value in factors(tmp_path / "one").items():
        assert relative_error(ours[key], value) <= 1e-5, key


@pytest.mark.slow
@FIRST
def test_processes_of_which_one_is_stopped_stop_at_one_step_and_go_on(
    studio: Any, tmp_path: Path
) -> None:
    def start(name: str) -> list[subprocess.Popen]:
        keys = {"mesh": "data=2", "steps": 60, "batch": 2, "checkpoint_every": 1000}
        together = command(studio, tmp_path / name, **keys)
        return [run(together, **variables) for variables in announcements(2)]

    for code, said in map(ended, start("smooth")):
        assert code == 0, said
    members = start("rough")
    wait_for_steps(members[0], tmp_path / "rough", 5)
    members[1].send_signal(signal.SIGINT)  # passed on as SIGTERM
    for member in members:
        code, said = ended(member)
        assert code == 0, said
    [kept] = (tmp_path / "rough" / "checkpoints").iterdir()
    assert int(kept.name) == lines(tmp_path / "rough")[-1]["step"] < 60
    for code, said in map(ended, start("rough")):
        assert code == 0, said
    assert losses(tmp_path / "rough") == losses(tmp_path / "smooth")
    theirs, ours = factors(tmp_path / "smooth"), factors(tmp_path / "rough")
    assert all((ours[key] == value).all() for key, value in theirs.items())


@FIRST
def test_a_run_leaves_weights_metrics_checkpoints_a_card_and_a_plot(
    studio: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    arguments = command(studio, output, steps=4, checkpoint_every=2, checkpoints=1)[3:]
    assert main([*arguments, "tensorboard=true"]) == 0
    names = {path.name for path in output.iterdir()}
    assert {"pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoints"} <= names
    assert {"README.md", "recipe.toml", "loss.png", "tensorboard"} <= names
    assert any(path.stat().st_size > 0 for path in (output / "tensorboard").iterdir())
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["4"]
    keys = {"step", "loss", "seconds", "grad_norm", "learning_rate"}
    assert [line.keys() for line in lines(output)] == [keys] * 4
    assert "step 4 of 4: loss" in capsys.readouterr().err
    # Again: nothing is left to do; longer: it goes on.
    before = losses(output)
    assert main(arguments) == 0
    assert losses(output) == before
    assert main([*arguments, "steps=6"]) == 0
    assert "going on from step 4" in capsys.readouterr().err
    assert losses(output)[:4] == before
    assert len(losses(output)) == 6
    assert main([*arguments, "steps=5"]) == 1
    assert "steps must be at least those done, 6: got 5" in capsys.readouterr().err
    with locked(output, "output"):
        assert main([*arguments, "steps=7"]) == 1
    assert f"output {output} is being written by another program" in capsys.readouterr().err
    # Another recipe, and a folder of something else, are refused.
    assert main([*arguments, "rank=5", "seed=1"]) == 1
    said = capsys.readouterr().err
    assert "has a run of another recipe: seed was 42 and is 1; rank was 3 and is 5" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".recipe.toml.part-x").mkdir()  # killed while it was written
    assert main([*arguments, f"output={tmp_path / 'other'}", "steps=1"]) == 0
    assert not list((tmp_path / "other").glob(".recipe*"))
    (tmp_path / "other" / "recipe.toml").unlink()
    (tmp_path / "other" / "photo.jpg").touch()
    assert main([*arguments, f"output={tmp_path / 'other'}"]) == 1
    assert "output must be new, empty, or of an earlier run" in capsys.readouterr().err


def test_ctrl_c_is_a_wish_to_stop_where_nobody_reads_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(*_: Any) -> int:
        raise BrokenPipeError

    with interrupts() as asked:
        assert not asked(1)
        monkeypatch.setattr(os, "write", closed)
        signal.raise_signal(signal.SIGINT)
        assert asked(2) == signal.SIGINT
    monkeypatch.undo()


@FIRST
def test_a_disk_that_fills_up_stops_a_run_which_goes_on_from_its_last_checkpoint(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, folder = studio.recipe(tmp_path / "out", steps=4, checkpoint_every=1), tmp_path / "out"
    full = rf"{folder}/checkpoints must have 0\.\d MB free for a checkpoint: got 0\.0 MB"
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_space", lambda path: ((not lines(folder)[1:]) * 10**9, path))
        with pytest.raises(OSError, match=f"^{full}$"):
            train(recipe, lambda *_, **__: None)
    said: list[str] = []
    train(recipe, lambda line, **_: said.append(line))
    assert "going on from step 1" in said
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]


@FIRST
def test_a_checkpoint_that_orbax_does_not_write_is_one_line(
    studio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        logging.getLogger("absl").error("many lines")
        raise ValueError("INTERNAL: the disk\nand more")

    state = Run(studio.recipe(tmp_path), lambda *_, **__: None).begin()
    with closing(Checkpoints(tmp_path / "kept", 2)) as kept:
        kept.save(state)
        monkeypatch.setattr(kept._manager, "save", fail)
        with pytest.raises(OSError, match="INTERNAL: the disk; the last whole one: step 0") as got:
            kept.save(state)
    assert "\n" not in str(got.value)
    assert "many lines" not in capfd.readouterr().err


@FIRST
def test_a_result_stays_until_the_next_one_is_whole(studio: Any, tmp_path: Path) -> None:
    run = Run(studio.recipe(tmp_path, method="vae"), lambda *_, **__: None)
    leaves, nothing = run.begin().leaves, jnp.full(3, jnp.nan)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").touch()
    with pytest.raises(ValueError, match="decoder"):
        write_output(run, {**leaves, "decoder.conv_out.bias": nothing}, tmp_path, print)
    assert (tmp_path / "model" / "earlier").exists()
    write_output(run, leaves, tmp_path, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "README.md"}
    assert (tmp_path / "model" / MANIFEST).exists()


@FIRST
def test_results_are_written_in_the_dtype_that_is_asked_for(studio: Any, tmp_path: Path) -> None:
    for method in ("lora", "vae"):
        recipe = studio.recipe(tmp_path / method, method=method, output_dtype="bfloat16")
        run = Run(recipe, lambda *_, **__: None)
        (tmp_path / method).mkdir()
        write_output(run, run.begin().leaves, tmp_path / method, lambda _: None)
    lora, vae = factors(tmp_path / "lora"), read_unit(tmp_path / "vae" / "model", "vae", None)
    assert {leaf.dtype.name for leaf in (*lora.values(), *vae.values())} == {"bfloat16"}


@FIRST
def test_a_loss_that_is_not_finite_ends_a_run_with_its_step_and_clips(
    studio: Any, tmp_path: Path
) -> None:
    recipe = studio.recipe(tmp_path / "out", steps=9, learning_rate=1e38, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d must be finite.*\d\.mp4") as caught:
        train(recipe, lambda *_, **__: None)
    with closing(Checkpoints(tmp_path / "out" / "checkpoints", 2)) as kept:
        step = int(str(caught.value).split()[1])
        assert kept.latest in (None, step - 1)
    assert len(lines(tmp_path / "out")) == step - 1
