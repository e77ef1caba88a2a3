"""Workers make the videos of jobs: this process with its devices, or actors of Ray, each with the
devices of a host. Ray starts and restarts them, gives them devices, and repeats what a dead one was
at. Jobs and pictures go to a worker as bytes, and so do videos from it: no disk is shared."""

import logging
import os
import tempfile
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..command import fault_line, say
from ..devices import hosts
from ..disk import first_line, process_folder
from ..media.recipe import recipe_of, without_padding
from ..media.videos import check_output, write_video
from ..request import Request, Video
from .jobs import Job

if TYPE_CHECKING:
    from ..weights.checkpoint import Models

TRIES = 3  # how often Ray repeats a job whose worker died
LOCAL = "local"  # Ray's name for a cluster that it starts on this machine

Group = Sequence[Job]  # of equal settings, to be made at once
Begin = Callable[[Group], Mapping[str, bytes]]  # called before a group is made: its pictures


class Made(NamedTuple):
    """What became of a job."""

    files: Mapping[str, bytes]  # of the output: by name in a folder, or "" for a file
    seconds: float
    error: str | None = None
    warnings: tuple[str, ...] = ()


class Workers(ABC):
    @abstractmethod
    def check(self, jobs: Group) -> tuple[int, list[str | None]]:
        """How many of these jobs, of equal settings, are made at once, and what is wrong with each
        of them. Raises ValueError or OSError where the model can't be loaded."""

    @abstractmethod
    def make(self, groups: Sequence[Group], begin: Begin) -> Iterator[tuple[Group, list[Made]]]:
        """The groups as they are made."""


class Worker:
    """Makes videos with the devices of its process. `settings` are those of `loading.load`."""

    def __init__(self, model: str, **settings: Any):
        self.model, self.settings = model, settings

    @cached_property
    def models(self) -> "Models":
        if hosts.announced() is not None:
            way = f"split the rows, with {hosts.PROCESSES}=1 on each host"
            raise ValueError(f"a worker must be one process: got one of several hosts; {way}")
        from ..loading import load

        return load(self.model, **self.settings)

    def load(self) -> None:
        """Loads the model, once."""
        _ = self.models

    def check(self, jobs: Group) -> tuple[int, list[str | None]]:
        """As `Workers.check`. No picture is read: whoever lists jobs does that."""
        import jax

        from ..pipeline import prepare, videos_at_once

        if any(str(job.output).lower().endswith(".mp4") for job in jobs):
            check_output(process_folder() / "try.mp4")
        blank = _Blank()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `make` gives them
            faults: list[str | None] = []
            for job in jobs:
                try:
                    prepare(self.models, self._request([job], blank))
                    faults.append(None)
                except ValueError as error:
                    faults.append(str(error))
            good = [job for job, fault in zip(jobs, faults, strict=True) if fault is None]
            most = good[: max(jax.device_count(), self._padded)]
            size = videos_at_once(self.models, self._request(most, blank)) if good else 1
        return size, faults

    def make(self, jobs: Group, pictures: Mapping[str, bytes]) -> list[Made]:
        """Makes the videos of jobs of equal settings. Where they can't be made together, each is
        made alone."""
        models, started = self.models, time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            try:
                files = list(self._files(models, jobs, pictures))
            except Exception as error:
                if len(jobs) > 1:
                    return [self.make([job], pictures)[0] for job in jobs]
                if (line := fault_line(error)) is None:
                    traceback.print_exc()
                    line = f"{type(error).__name__}: {first_line(error)}"
                return [Made({}, time.perf_counter() - started, line)]
        seconds = (time.perf_counter() - started) / len(jobs)
        said = tuple(dict.fromkeys(str(warning.message) for warning in caught))
        return [Made(content, seconds, None, said) for content in files]

    def _files(
        self, models: "Models", jobs: Group, pictures: Mapping[str, bytes]
    ) -> Iterator[dict[str, bytes]]:
        from ..pipeline import generate

        with tempfile.TemporaryDirectory(prefix="cogi2v-") as name:
            folder = Path(name)
            names = {job.recipe[f"{of}_sha256"]: job.recipe[of] for job in jobs for of in _of(job)}
            files = {digest: folder / digest / name for digest, name in names.items()}
            for digest, file in files.items():
                file.parent.mkdir()
                file.write_bytes(pictures[digest])
            # A step at a time, between which Ctrl-C is seen.
            result = generate(models, self._request(jobs, files), on_step=lambda *_: None)
            request = result.request
            made = zip(jobs, result.video, request.videos)  # noqa: B905 (a mesh may need more)
            for number, (job, video, of) in enumerate(made):
                recipe = recipe_of(models, self.model, request, of)
                place = folder / f"video-{number}" / Path(str(job.output)).name
                place.parent.mkdir()
                visible = without_padding(video, recipe)
                yield _content(write_video(place, visible, request.fps, recipe))

    @property
    def _padded(self) -> int:
        """Of how many videos a mesh that was asked for needs a multiple."""
        from ..devices.mesh import sizes_of

        mesh = self.models.mesh
        return 1 if mesh == "auto" else sizes_of(mesh).data

    def _request(self, jobs: Group, pictures: Mapping[str, Any]) -> Request:
        """The request of jobs of equal settings; the last one again and again where the mesh needs
        more videos."""
        jobs = [*jobs, *[jobs[-1]] * (-len(jobs) % self._padded)]
        columns = {
            "image": [pictures[job.recipe["image_sha256"]] for job in jobs],
            **{name: [job.recipe[name] for job in jobs] for name in Video._fields[1:]},
        }
        end = jobs[0].recipe.get("end_image_sha256")
        return Request(
            **columns,
            **jobs[0].recipe["settings"],
            end_image=None if end is None else pictures[end],
        )


class _Blank(dict[str, Any]):
    """A picture in place of any."""

    def __missing__(self, digest: str) -> Any:
        import numpy as np

        return np.zeros((16, 16, 3), np.uint8)


def _of(job: Job) -> list[str]:
    """The names of a job's pictures in its recipe."""
    return [name for name in ("image", "end_image") if name in job.recipe]


def _content(written: Path) -> dict[str, bytes]:
    if written.is_file():
        return {"": written.read_bytes()}
    return {file.name: file.read_bytes() for file in written.iterdir()}


class Local(Workers):
    """This process."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def check(self, jobs: Group) -> tuple[int, list[str | None]]:
        return self.worker.check(jobs)

    def make(self, groups: Sequence[Group], begin: Begin) -> Iterator[tuple[Group, list[Made]]]:
        for group in groups:
            yield group, self.worker.make(group, begin(group))


class Ray(Workers):
    """Actors of Ray, each with its share of the devices."""

    def __init__(self, worker: Worker, count: int, share: Mapping[str, Any]):
        import ray

        kind = ray.remote(Worker).options(max_restarts=-1, max_task_retries=TRIES, **share)
        self.actors = [kind.remote(worker.model, **worker.settings) for _ in range(count)]

    def check(self, jobs: Group) -> tuple[int, list[str | None]]:
        return _result(self.actors[0].check.remote(jobs))

    def make(self, groups: Sequence[Group], begin: Begin) -> Iterator[tuple[Group, list[Made]]]:
        """A worker that has loaded the model takes a group, and then the next one."""
        import ray

        waiting, left = iter(groups), len(groups)
        running: dict[Any, tuple[Any, Group]] = {
            actor.load.remote(): (actor, []) for actor in self.actors
        }
        while left:
            if not running:
                raise OSError("no worker of Ray is left, see above")
            (ended,), _ = ray.wait([*running], num_returns=1)
            actor, group = running.pop(ended)
            try:
                made = _result(ended)
            except (ValueError, OSError) as error:
                if not group:
                    say(f"warning: a worker of Ray does not start: {error}")
                    continue
                made = [Made({}, 0.0, str(error)) for _ in group]
            if group:
                left -= 1
                yield group, made
            if (following := next(waiting, None)) is not None:
                running[actor.make.remote(following, begin(following))] = actor, following


def _result(reference: Any) -> Any:
    """What a worker of Ray returned. Raises what it raised, or OSError, in one line."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception) and (line := fault_line(cause)) is not None:
            raise (ValueError if isinstance(cause, ValueError) else OSError)(line) from None
        raise OSError(f"a worker of Ray failed: {first_line(cause)}") from None
    except RayError as error:
        raise OSError(f"a worker of Ray is lost: {first_line(error)}") from None


def share_of(nodes: Iterable[Mapping[str, Any]], count: int | None) -> tuple[int, dict[str, Any]]:
    """How many workers there are, one for each host with devices where `count` is None, and the
    share of a host's devices that each one has, as options of an actor."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    for kind in ("TPU", "GPU"):
        devices = [int(have[kind]) for have in resources if have.get(kind)]
        if devices:
            workers = count or len(devices)
            each = min(max(devices), max(1, sum(devices) // workers))
            return workers, {"num_gpus": each} if kind == "GPU" else {"resources": {kind: each}}
    return count or max(1, sum(have.get("CPU", 0) >= 1 for have in resources)), {"num_cpus": 1}


@contextmanager
def working(worker: Worker, address: str | None, count: int | None) -> Iterator[Workers]:
    """This process's devices, or (`address`) those of a Ray cluster, in `count` workers. Raises
    OSError in one line for a cluster that can't be used."""
    if address is None:
        yield Local(worker)
        return
    if find_spec("ray") is None:
        raise OSError("cannot use Ray: it is not installed; pip install 'cogi2v-jax[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send reports to its makers
    import ray

    here: dict[str, Any] = {"include_dashboard": False}
    if count:  # which may be more than there are cores
        here["num_cpus"] = max(count, os.cpu_count() or 1)
    try:
        given = here if address == LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **given)
    except Exception as error:  # Ray raises anything
        raise OSError(f"cannot use Ray at {address}: {first_line(error)}") from None
    try:
        yield Ray(worker, *share_of(ray.nodes(), count))
    finally:
        ray.shutdown()
