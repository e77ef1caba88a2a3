"""Jobs in a folder: which are done, which are made again, and what is written of them."""

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from clouds import cloud_in

from cogi2v_jax.apps.jobs import (
    CANCELLED,
    COMPLETED,
    DATABASE,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    RESULTS,
    Job,
    Store,
)

JOBS = [Job(row, f"{row}.mp4", {"prompt": "a", "seed": 2**64 - row}) for row in (1, 2, 3)]


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path):
    """Where the jobs are, and where their files are seen here."""
    if request.param == "disk":
        yield tmp_path / "out", tmp_path / "out"
    else:
        with cloud_in(tmp_path):
            yield Path("gs://some/out"), tmp_path / "some" / "out"


def states(store: Store) -> list[str]:
    return [job.state for job in store.jobs()]


def lines(seen: Path) -> list[dict]:
    return [json.loads(line) for line in (seen / RESULTS).read_text().splitlines()]


def test_what_is_completed_stays_so_and_the_rest_is_queued_again(folder) -> None:
    target, seen = folder
    with Store(target, JOBS) as store:
        assert states(store) == [QUEUED] * 3
        store.begin(JOBS)
        assert states(store) == [IN_PROGRESS] * 3
        store.complete(JOBS[0], {"": b"video"}, 1.5)
        store.end(JOBS[1], FAILED, "the device ran out of memory")
        assert states(store) == [COMPLETED, FAILED, IN_PROGRESS]
    assert (seen / "1.mp4").read_bytes() == b"video"
    first, second = lines(seen)
    digest = first.pop("recipe")
    assert first == {
        "row": 1,
        "output": "1.mp4",
        "state": "completed",
        "seconds": 1.5,
        "seed": 2**64 - 1,
        "error": None,
    }
    assert (second["state"], second["error"]) == (FAILED, "the device ran out of memory")
    with Store(target, JOBS) as store:
        assert states(store) == [COMPLETED, QUEUED, QUEUED]
        assert store.jobs(COMPLETED)[0].seconds == 1.5
        assert lines(seen) == [first | {"recipe": digest}]
        store.end(JOBS[1], CANCELLED, "by its owner")
    assert [line["state"] for line in lines(seen)] == [COMPLETED, CANCELLED]


def test_another_recipe_or_a_missing_output_is_made_again(folder) -> None:
    target, seen = folder
    with Store(target, JOBS) as store:
        for job in JOBS:
            store.complete(job, {"": b"video"}, 1.0)
    changed = [*JOBS[:2], Job(3, "3.mp4", {"prompt": "b"})]
    (seen / "1.mp4").unlink()
    with Store(target, changed) as store:
        assert states(store) == [QUEUED, COMPLETED, QUEUED]
    assert [line["row"] for line in lines(seen)] == [2]


def test_rows_may_be_added_moved_and_left_out(folder) -> None:
    target, seen = folder
    with Store(target, JOBS[:2]) as store:
        store.complete(JOBS[1], {"": b"video"}, 1.0)
    moved = Job(1, "2.mp4", JOBS[1].recipe)
    bad = Job(2, None, {}, FAILED, error="no picture")
    with Store(target, [moved, bad, JOBS[2]]) as store:
        assert [(job.row, job.state) for job in store.jobs()] == [
            (1, COMPLETED),
            (2, FAILED),
            (3, QUEUED),
        ]
    assert [(line["row"], line["output"], line["error"]) for line in lines(seen)] == [
        (1, "2.mp4", None),
        (2, None, "no picture"),
    ]


def test_a_folder_of_frames_is_an_output(folder) -> None:
    target, seen = folder
    job = Job(1, "in/frames.png", {})
    with Store(target, [job]) as store:
        store.complete(job, {"00000.png": b"0", "recipe.json": b"{}"}, 1.0)
    assert (seen / "in/frames/00000.png").read_bytes() == b"0"
    with Store(target, [job]) as store:
        assert states(store) == [COMPLETED]


def test_a_dry_store_reads_and_writes_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "out", JOBS, dry=True) as store:
        assert states(store) == [QUEUED] * 3
    assert not (tmp_path / "out").exists()
    with Store(tmp_path / "out", JOBS) as store:
        store.complete(JOBS[0], {"": b"video"}, 1.0)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with Store(tmp_path / "out", JOBS[:2], dry=True) as store:
        assert states(store) == [COMPLETED, QUEUED]
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_belongs_to_one_store_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path / "out", JOBS) as store:
        store.begin(JOBS)
        with pytest.raises(ValueError, match=r"out is being written by another program$"):
            Store(tmp_path / "out", JOBS)
        assert states(store) == [IN_PROGRESS] * 3
    with contextlib.closing(sqlite3.connect(tmp_path / "out" / DATABASE)) as database:
        assert database.execute("SELECT DISTINCT state FROM jobs").fetchall() == [(QUEUED,)]
    with Store(tmp_path / "out", JOBS) as store:
        assert states(store) == [QUEUED] * 3


def test_what_a_killed_process_had_in_progress_is_taken_over(tmp_path: Path) -> None:
    with Store(tmp_path / "out", JOBS):
        pass
    (tmp_path / "out" / ".1.mp4.part-x").mkdir()
    (tmp_path / "out" / ".1.mp4.part-x" / "new").write_text("half")
    with sqlite3.connect(tmp_path / "out" / DATABASE) as database:
        database.execute("UPDATE jobs SET state = 'in_progress'")
    database.close()
    with Store(tmp_path / "out", JOBS) as store:
        assert states(store) == [QUEUED] * 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {DATABASE, RESULTS}


def test_a_write_that_fails_completes_nothing(tmp_path: Path, monkeypatch) -> None:
    with Store(tmp_path / "out", JOBS) as store:
        store.begin(JOBS)
        (tmp_path / "out" / "1.mp4").mkdir()
        with pytest.raises(OSError, match=r"1\.mp4"):
            store.complete(JOBS[0], {"": b"video"}, 1.0)
        assert states(store) == [IN_PROGRESS] * 3
    assert not (tmp_path / "out" / RESULTS).exists() or lines(tmp_path / "out") == []


def test_files_that_are_none_of_ours_are_one_line(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_text("x" * 200)
    with pytest.raises(OSError, match=r"^cannot use .*/jobs.sqlite: file is not a database; "):
        Store(tmp_path, JOBS)
    with cloud_in(tmp_path):
        (tmp_path / "some").mkdir()
        (tmp_path / "some" / RESULTS).write_text('{"row": 1}\n')
        with pytest.raises(ValueError, match=r"^line 1 of results.jsonl in .* must be of an "):
            Store(Path("gs://some"), JOBS)
