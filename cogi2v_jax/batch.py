"""`python -m cogi2v_jax.batch`: a list of rows -> a folder of videos, and what became of each."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__
from .apps.jobs import COMPLETED, FAILED, QUEUED, RESULTS, Job, Store
from .apps.listing import Asked, Listing, list_jobs
from .apps.workers import LOCAL, Group, Worker, Workers, working
from .arguments import Listed, add_settings
from .command import Parser, run, say
from .config import names
from .disk import check_target, locked, one_line
from .media.rows import EVERY_COLUMN, Fault
from .request import Request
from .sample import EMBEDDED
from .settings import SETTINGS
from .terminal import printing
from .weights.bucket import is_bucket

WIDTH = 78  # of a paragraph of --help
SHAPE = ("height", "width", "num_frames", "num_inference_steps")  # what programs are compiled for


def parser() -> argparse.ArgumentParser:
    main = Parser(
        allow_abbrev=False,
        prog="python -m cogi2v_jax.batch",
        usage="%(prog)s JOBS --output_dir DIR [--model NAME] [--workers N] [--ray [ADDRESS]] ...",
        description="Makes a video of every row of a list. The same command again keeps those that "
        f"are done and makes the others; {RESULTS} in DIR says what became of each.",
        epilog=f"columns, or keys: {', '.join(EVERY_COLUMN)}",
    )
    main.add_argument("--version", action="version", version=f"cogi2v-jax {__version__}")
    add = main.add_argument
    jobs = "a .csv, .jsonl or .txt file (prompt@@image), a row a video; flags are for all its rows"
    add("jobs", metavar="JOBS", type=Path, help=jobs)
    folder = "where the videos go: a folder, here or at gs://"
    add("--output_dir", metavar="DIR", type=Path, required=True, help=folder)
    add("--dry_run", "--dry-run", action="store_true", help="check everything, and make nothing")
    going = "make the other rows where some can't be made, and exit with 1"
    add("--keep_going", "--keep-going", action="store_true", help=going)
    workers = "how many workers Ray starts (default: one for each host with devices)"
    add("--workers", metavar="N", type=int, help=workers)
    ray = "work with the Ray cluster at ADDRESS (auto: this machine's), or with one started here"
    add("--ray", metavar="ADDRESS", nargs="?", const=LOCAL, help=ray)
    add("--seed", metavar="N", type=int, default=42)
    add("--negative_prompt", metavar="TEXT", default="", help="what should not happen")
    add_settings(main)
    Listed(main, "beyond the reference (docs/craft.md)", WIDTH).add_settings()
    add = main.add_argument_group("model and machine, as python -m cogi2v_jax.sample has them")
    add = add.add_argument
    model = f"converted or diffusers folder, hub id, or {', '.join(names())}"
    add("--model", "--model_path", metavar="NAME", default=EMBEDDED, help=model)
    add("--dtype", choices=["bfloat16", "float32"])
    add("--attention", metavar="NAME", default="auto")
    add("--mesh", metavar="NAME", default="auto")
    add("--vae_tiling", action="store_true")
    add("--lora_path", metavar="FILE[:WEIGHT]", action="append", default=[])
    return main


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, checked against each other. Exits with code 2 and one line if they are
    wrong."""
    reader = parser()
    options = reader.parse_args(arguments)
    for name in ("model", "mesh", "attention", "ray"):
        if getattr(options, name) == "":
            reader.error(f"--{name} must not be empty")
    if options.workers is not None and not options.ray:
        reader.error("--workers must be given with --ray: this process is one worker")
    if options.workers is not None and options.workers < 1:
        reader.error(f"--workers must be at least 1: got {options.workers}")
    return options


@printing
def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 all rows are done, 1 some could not be made, 2 wrong arguments, 130 stopped by
    the user."""
    batch = Batch(parse(arguments))
    return run(batch.run, batch.stopped)


class Batch:
    """A run of the command."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.listing = Listing()
        self.done = 0

    def stopped(self) -> str:
        done = f"{self.done} of {self._count} are done; " if self._count else ""
        return f"stopped; {done}the same command goes on"

    def run(self) -> int:
        """Checks all rows, then makes those that are not done."""
        options, folder = self.options, self.options.output_dir
        if not is_bucket(folder):
            check_target("output_dir", folder, (options.jobs,), folder=True)
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"output_dir must be a folder: got {folder}")
            if folder.is_dir() and not options.dry_run:
                with locked(folder, "output_dir"):  # before all the work that the checks are
                    pass
        given = {name: getattr(options, name) for name in SETTINGS}
        settings = {name: value for name, value in given.items() if value is not None}
        # What is wrong with the flags is told once, not with every row.
        Request("", "", options.negative_prompt, seed=options.seed, **settings).check()
        others = {"dtype": options.dtype, "loras": options.lora_path}
        others |= {"vae_tiling": True} if options.vae_tiling else {}
        asked = Asked(options.model, options.seed, options.negative_prompt, settings, others)
        with tempfile.TemporaryDirectory(prefix="cogi2v-") as pictures:
            self.listing = list_jobs(options.jobs, folder, asked, Path(pictures))
            self._tell(self.listing.faults)
            with Store(folder, self.listing.all, dry=True) as seen:
                ahead = seen.jobs(QUEUED)
            if not ahead:
                return self._make(None, {})
            how = {name: getattr(options, name) for name in ("dtype", "attention", "mesh")}
            how |= {"vae_tiling": options.vae_tiling, "loras": options.lora_path}
            with working(Worker(options.model, **how), options.ray, options.workers) as workers:
                sizes, faults = {}, {}
                for key, jobs in _by_settings(ahead).items():
                    sizes[key], found = workers.check(jobs)
                    pairs = zip(jobs, found, strict=True)
                    faults |= {job.row: fault for job, fault in pairs if fault}
                before = len(self.listing.faults)
                self.listing.refuse(faults)
                self._tell(self.listing.faults[before:])
                return self._make(workers, sizes)

    @property
    def _count(self) -> int:
        return len(self.listing.lines)

    def _tell(self, faults: Sequence[Fault]) -> None:
        """Says what is wrong with rows. Raises ValueError, unless the others are to be made."""
        for fault in faults:
            say(one_line(f"cogi2v: {self.options.jobs}, {fault}"))
        if faults and not self.options.keep_going:
            rows = f"{len(faults)} of {self._count} rows"
            raise ValueError(f"{rows} can't be made; --keep_going makes the others")

    def _make(self, workers: Workers | None, sizes: dict[str, int]) -> int:
        """Makes the jobs that are queued, in groups of these sizes by settings."""
        options, folder = self.options, self.options.output_dir
        with Store(folder, self.listing.all, dry=options.dry_run) as store:
            before = self.done = len(store.jobs(COMPLETED))
            groups = [
                jobs[first : first + sizes[key]]
                for key, jobs in _by_settings(store.jobs(QUEUED)).items()
                for first in range(0, len(jobs), sizes[key])
            ]
            if options.dry_run:
                ahead = f"{sum(map(len, groups))} to make"
                print(f"{folder}: {before} of {self._count} are done, {ahead}")
                return int(bool(self.listing.faults))
            if workers and groups:
                self._work(store, workers, groups)
            failed = len(store.jobs(FAILED))
        print(f"{folder}: {self.done} of {self._count} are done, {self.done - before} of them now")
        if failed:
            raise ValueError(f"{failed} of {self._count} rows failed: {folder / RESULTS} says why")
        return 0

    def _work(self, store: Store, workers: Workers, groups: Sequence[Group]) -> None:
        def begin(group: Group) -> dict[str, bytes]:
            store.begin(group)
            of = ("image_sha256", "end_image_sha256")
            digests = {job.recipe[key] for job in group for key in of if key in job.recipe}
            return {digest: self.listing.files[digest].read_bytes() for digest in digests}

        said: set[str] = set()
        show = _progress(sum(map(len, groups)))
        say(f"{self.done} of {self._count} are done")
        for group, made in workers.make(groups, begin):
            for job, video in zip(group, made, strict=True):
                for line in {*video.warnings} - said:
                    say(f"warning: {line}")
                said |= {*video.warnings}
                if video.error is None:
                    store.complete(job, video.files, round(video.seconds, 3))
                    self.done += 1
                else:
                    store.end(job, FAILED, video.error)
                    fault = Fault(job.row, self.listing.lines[job.row], video.error)
                    say(one_line(f"cogi2v: {self.options.jobs}, {fault}"))
            show(len(group), f"{self.done} of {self._count}")


def _by_settings(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Jobs that may be made at once, by their settings; those of equal shapes one after the
    other."""
    groups: dict[str, list[Job]] = {}
    shapes: dict[tuple, int] = {}  # in the order of their first jobs
    ranks: dict[str, int] = {}
    for job in jobs:
        settings = job.recipe["settings"]
        key = json.dumps([settings, job.recipe.get("end_image_sha256")], sort_keys=True)
        groups.setdefault(key, []).append(job)
        ranks[key] = shapes.setdefault(tuple(settings.get(name) for name in SHAPE), len(shapes))
    return {key: groups[key] for key in sorted(groups, key=ranks.__getitem__)}


def _progress(count: int) -> Callable[[int, str], None]:
    """Prints how many videos are done and the time left: in one line of a terminal, or in a line
    for each group."""
    terminal = sys.stderr.isatty()
    made = first = 0
    since = 0.0

    def show(more: int, line: str) -> None:
        nonlocal made, first, since
        made += more
        if not since:  # the time before was spent on compiling too
            first, since = made, time.perf_counter()
        elif made < count:
            each = (time.perf_counter() - since) / (made - first)
            minutes, seconds = divmod(round(each * (count - made)), 60)
            line += f", {minutes}:{seconds:02d} left"
        if terminal:
            say(f"\r{line:40}", end="\n" if made == count else "")
        else:
            say(line)

    return show


if __name__ == "__main__":
    sys.exit(main())
