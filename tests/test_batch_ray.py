"""`batch --ray`: processes that are killed lose no row."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import enter

from cogi2v_jax.media.videos import read_frames

pytest.importorskip("ray")

COUNT = 9
COMMAND = [sys.executable, "-m", "cogi2v_jax.batch", "jobs.jsonl", "--output_dir", "out"]
COMMAND += ["--ray", "--workers", "3"]
PATIENCE = 300.0  # seconds, on two cores that others use as well


def start() -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(COMMAND, env=environment, text=True, **pipes)


def read_until(process: subprocess.Popen, done: int) -> str:
    """What a run prints until so many videos are done."""
    said = ""
    while f"\n{done} of {COUNT}" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


def busy_workers(driver: int) -> list[int]:
    """Processes below this one that make a video now: Ray says so in their titles."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in table.stdout.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, *_ in rows}

    def is_below(pid: int) -> bool:
        return pid == driver or (pid in parents and is_below(parents[pid]))

    making = [int(pid) for pid, _, *args in rows if "".join(args).startswith("ray::Worker.make")]
    return [pid for pid in making if is_below(pid)]


def results() -> list[dict]:
    return [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_lose_no_row(tmp_path: Path, monkeypatch) -> None:
    enter(tmp_path, monkeypatch)
    row = {"prompt": "the cyan triangle grows", "image": "photo.png", "num_inference_steps": 20}
    rows = [json.dumps(row | {"seed": seed}) for seed in range(COUNT)]
    Path("jobs.jsonl").write_text("\n".join(rows))
    first = start()
    try:
        said = read_until(first, 1)
        end = time.monotonic() + PATIENCE
        while not (workers := busy_workers(first.pid)):
            assert time.monotonic() < end
        os.kill(workers[0], signal.SIGKILL)
        said += read_until(first, 6)
    finally:
        first.kill()
        first.communicate()
    assert ", line " not in said  # no row failed
    kept = results()
    assert len(kept) >= 6
    assert {line["state"] for line in kept} == {"completed"}
    written = {line["output"]: Path("out", line["output"]).stat().st_mtime_ns for line in kept}
    second = start()
    out, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, err
    made = COUNT - len(kept)
    assert out.splitlines()[-1] == f"out: {COUNT} of {COUNT} are done, {made} of them now"
    lines = results()
    assert [(line["row"], line["state"], line["seed"]) for line in lines] == [
        (seed + 1, "completed", seed) for seed in range(COUNT)
    ]
    names = [line["output"] for line in lines]
    assert {path.name for path in Path("out").iterdir()} == {
        *names,
        "jobs.sqlite",
        "results.jsonl",
    }
    assert all(read_frames(Path("out", name)).shape == (9, 64, 64, 3) for name in names)
    # What was finished was not made again.
    assert {name: Path("out", name).stat().st_mtime_ns for name in written} == written
