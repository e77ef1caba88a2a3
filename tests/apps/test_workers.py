"""Workers: what they make of jobs, and how Ray's share devices."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes import read_recipe
from runs import enter

from cogi2v_jax import pipeline
from cogi2v_jax.apps.jobs import Job
from cogi2v_jax.apps.workers import Local, Made, Worker, share_of, working
from cogi2v_jax.media.videos import read_frames

QUICK = {"num_inference_steps": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter(tmp_path, monkeypatch)


def jobs_of(*prompts: str, output: str = "{}.mp4", **settings) -> tuple[list[Job], dict]:
    content = Path("photo.png").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    jobs = [
        Job(
            row,
            output.format(row),
            {
                "image": "photo.png",
                "image_sha256": digest,
                "prompt": prompt,
                "negative_prompt": "",
                "seed": row,
                "settings": QUICK | settings,
            },
        )
        for row, prompt in enumerate(prompts, 1)
    ]
    return jobs, {digest: content}


def frames(made: Made, name: str) -> np.ndarray:
    assert made.error is None
    Path(name).write_bytes(made.files[""])
    return read_frames(name)


def test_videos_made_at_once_are_those_made_alone() -> None:
    jobs, pictures = jobs_of(
        *(f"the cyan triangle {does}" for does in ("grows", "spins", "shrinks"))
    )
    together, alone = (Worker("cogi2v-tiny", mesh=mesh) for mesh in ("data=2", "auto"))
    assert together.check(jobs) == (2, [None] * 3)
    assert alone.check(jobs) == (1, [None] * 3)
    # The last group is not full.
    made = [*together.make(jobs[:2], pictures), *together.make(jobs[2:], pictures)]
    for job, ours in zip(jobs, made, strict=True):
        (theirs,) = alone.make([job], pictures)
        difference = frames(ours, "ours.mp4").astype(int) - frames(theirs, "theirs.mp4")
        assert np.abs(difference).max() <= 1
        recipe = read_recipe("ours.mp4")
        assert (recipe["prompt"], recipe["seed"]) == (job.recipe["prompt"], job.row)
        assert recipe["image"] == "photo.png"


@pytest.mark.filterwarnings("ignore:.*expect nothing of sense")
def test_a_padded_video_is_cut_to_its_picture() -> None:
    Image.open("photo.png").crop((0, 16, 64, 48)).save("photo.png")
    jobs, pictures = jobs_of("the cyan triangle grows", fit="pad")
    (made,) = Worker("cogi2v-tiny").make(jobs, pictures)
    assert frames(made, "a.mp4").shape == (9, 32, 64, 3)


def test_each_job_is_told_what_is_wrong_with_it() -> None:
    long = "the cyan triangle grows " * 3
    jobs, _ = jobs_of("the cyan triangle grows", long, "a")
    size, (first, second, third) = Worker("cogi2v-tiny").check(jobs)
    assert (size, first, third) == (1, None, None)
    assert second is not None
    assert second.startswith("prompt must be at most 10 tokens for cogi2v-tiny")


def test_a_job_that_fails_does_not_take_its_group_with_it(monkeypatch) -> None:
    jobs, pictures = jobs_of("a", "the", "white", output="{}")
    made = []

    def generate(models, request, **_):
        made.append(request.prompt)
        if "the" in request.prompt:
            raise FloatingPointError("latents are not finite")
        if "white" in request.prompt:
            raise RuntimeError("RESOURCE_EXHAUSTED: of 3 bytes\nmore")
        resolved = request.resolve(models.config)
        return pipeline.Result(
            np.zeros((len(request.videos), 9, 64, 64, 3), np.uint8),
            np.zeros((len(request.videos), 3, 16, 16, 16), np.float32),
            resolved,
        )

    monkeypatch.setattr(pipeline, "generate", generate)
    first, second, third = Worker("cogi2v-tiny").make(jobs, pictures)
    assert made == [["a", "the", "white"], ["a"], ["the"], ["white"]]
    assert (first.error, len(first.files), "00000.png" in first.files) == (None, 10, True)
    assert second.error == "latents are not finite"
    assert third.error == "the device ran out of memory: RESOURCE_EXHAUSTED: of 3 bytes"


def test_a_bug_is_named_by_its_kind(monkeypatch, capsys) -> None:
    jobs, pictures = jobs_of("a")

    def generate(*_, **__):
        raise TypeError("no such thing")

    monkeypatch.setattr(pipeline, "generate", generate)
    (made,) = Worker("cogi2v-tiny").make(jobs, pictures)
    assert made.error == "TypeError: no such thing"
    assert "Traceback" in capsys.readouterr().err


def test_a_process_of_several_hosts_is_no_worker(monkeypatch) -> None:
    for name, value in (("COORDINATOR", "x:1"), ("PROCESSES", "2"), ("PROCESS", "0")):
        monkeypatch.setenv(f"COGI2V_{name}", value)
    with pytest.raises(ValueError, match=r"^a worker must be one process: got one of several"):
        Worker("cogi2v-tiny").load()


def test_this_process_is_the_worker_without_ray() -> None:
    with working(Worker("cogi2v-tiny"), None, None) as workers:
        assert isinstance(workers, Local)


def node(**resources: float) -> dict:
    return {"Alive": True, "Resources": {"CPU": 8.0, "memory": 1e9} | resources}


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [
        ([node()], None, (1, {"num_cpus": 1})),
        ([node()], 3, (3, {"num_cpus": 1})),
        ([node(), node(), node(CPU=0)], None, (2, {"num_cpus": 1})),
        ([node(GPU=4.0)], None, (1, {"num_gpus": 4})),
        ([node(GPU=4.0)], 4, (4, {"num_gpus": 1})),
        ([node(), *[node(TPU=8.0)] * 4], None, (4, {"resources": {"TPU": 8}})),
        ([node(), *[node(TPU=8.0)] * 4], 2, (2, {"resources": {"TPU": 8}})),
        ([node(TPU=8.0)], 2, (2, {"resources": {"TPU": 4}})),
        ([node(TPU=4.0), node(TPU=4.0) | {"Alive": False}], None, (1, {"resources": {"TPU": 4}})),
    ],
)
def test_a_worker_of_ray_has_the_devices_of_a_host_or_a_share_of_them(
    nodes: list, count: int | None, expected: tuple
) -> None:
    assert share_of(nodes, count) == expected
