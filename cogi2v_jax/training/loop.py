"""Training, top to bottom: steps, checkpoints, validation, and the results at the end."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from ..devices import hosts
from ..disk import PART, locked, replace_when_done
from ..terminal import Say
from .checkpoints import Checkpoints
from .metrics import Metrics, check_tensorboard
from .output import check_output, write_output
from .recipe import Recipe, changed_keys
from .run import Run
from .validation import Validation

RECIPE = "recipe.toml"


class Stopped(Exception):
    """The run was asked to stop; its last checkpoint is of the step that it had reached."""

    def __init__(self, step: int, signal: int):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.step, self.signal = step, signal


def train(recipe: Recipe, say: Say) -> None:
    """Trains from the last checkpoint in the output folder, or from the beginning, to the end of a
    recipe, and writes the results. Raises Stopped after a checkpoint where a signal asked for it,
    ValueError or OSError, in one line, for what can't be trained, FloatingPointError where a loss
    is not finite."""
    folder = Path(recipe.output)
    if recipe.tensorboard:
        check_tensorboard()
    _check_folder(folder, recipe)
    run = Run(recipe, say)
    validation = Validation(run, folder)
    check_output(run, folder)
    with (
        _owned(folder, recipe),
        closing(Checkpoints(folder / "checkpoints", recipe.checkpoints)) as kept,
        interrupts() as asked,
    ):
        state = kept.restore(run.begin())
        done = int(state.step)
        if done > recipe.steps:
            raise ValueError(f"steps must be at least those done, {done}: got {recipe.steps}")
        if done:
            say(f"going on from step {done}")
        with closing(Metrics(folder, done, recipe, run.name_of, say)) as metrics:
            waiting: tuple[Any, ...] | None = None  # a step whose figures are not read yet
            steps = range(done + 1, recipe.steps + 1)
            for step, rows in zip(steps, run.batches(done), strict=False):  # those have no end
                state, figures = run.step(state, rows, step)
                if waiting is not None:
                    metrics.write(*waiting)  # while this step is computed
                waiting = step, figures, rows.clips
                stop, last = asked(step), step == recipe.steps
                if stop or last or step % recipe.checkpoint_every == 0:
                    metrics.write(*waiting)  # raises before a state that is not finite is kept
                    waiting = None
                    kept.save(state)
                if stop and not last:
                    raise Stopped(step, stop)
                if validation.is_due(step):
                    validation.generate(step, state.result)
        write_output(run, state.result, folder, say)


def _check_folder(folder: Path, recipe: Recipe) -> None:
    """Raises ValueError where a folder has a run of another recipe, or anything else."""
    file = folder / RECIPE
    if file.is_file():
        if changed := changed_keys(recipe, file.read_text(encoding="utf-8")):
            raise ValueError(
                f"output {folder} has a run of another recipe: {'; '.join(changed)}; "
                "name another output, or delete it"
            )
    elif folder.exists() and (not folder.is_dir() or any(map(_is_strange, folder.iterdir()))):
        raise ValueError(f"output must be new, empty, or of an earlier run: got {folder}")


def _is_strange(path: Path) -> bool:
    """Whether it is not what a run that was killed at its first moment leaves."""
    return PART not in path.name


@contextmanager
def _owned(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Makes the folder, holds it for this run, and writes the recipe; on process 0, for which the
    others wait before they write anything there. Raises ValueError where another run holds it."""
    if not hosts.leads():
        hosts.meet("output")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "output"):
        for part in folder.glob(f".*{PART}*"):  # of a run that was killed
            shutil.rmtree(part, ignore_errors=True)
        with replace_when_done(folder / RECIPE) as part:
            part.write_text(recipe.to_toml(), encoding="utf-8")
        hosts.meet("output")
        yield


@contextmanager
def interrupts() -> Iterator[Callable[[int], int]]:
    """A function that says after a step which signal has asked to stop: SIGTERM, which machines
    send before they are taken away, or the first Ctrl-C; 0 for none. Of several processes all stop
    at the same step, which jax's service agrees on."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        def pass_on(*_: Any) -> None:
            signal.signal(signal.SIGINT, default)  # the second one does not wait
            os.kill(os.getpid(), signal.SIGTERM)  # which jax's service tells the others of

        default = signal.signal(signal.SIGINT, pass_on)
        try:
            yield lambda step: signal.SIGTERM if reached_preemption_sync_point(step) else 0
        finally:
            signal.signal(signal.SIGINT, default)
        return
    got: list[int] = []

    def ask(number: int, frame: Any) -> None:
        got.append(number)
        signal.signal(number, before[number])  # the second one does not wait
        with suppress(OSError):  # Ctrl-C ends the other programs of a pipe too
            # Not print, which fails where the signal interrupts a print.
            os.write(sys.stderr.fileno(), b"\nstopping after this step; again to stop at once\n")

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda step: got[0] if got else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
