"""What a run reports: a line of JSON a step, TensorBoard's events, and a line on the terminal."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..devices import hosts
from ..disk import parse_json, replace_when_done
from ..terminal import Say
from .recipe import Recipe
from .steps import Figures

METRICS = "metrics.jsonl"
SMOOTH = 0.98  # of the loss that is shown
QUIET = 30.0  # seconds between lines in a log


class Metrics:
    """Figures of each step of a run. `done` steps were done before: what later ones had left is
    removed, as they are done again. Process 0 alone writes."""

    def __init__(
        self,
        folder: Path,
        done: int,
        recipe: Recipe,
        name_of: Callable[[int], str],  # of a clip
        say: Say,
    ):
        self._steps, self._name_of, self._say = recipe.steps, name_of, say
        self._started = self._printed = time.perf_counter()
        self._before, self._done = self._started, done
        self._loss: float | None = None
        self._file: Any = None
        self._events: Any = None
        if not hosts.leads():
            return
        path = folder / METRICS
        lines = [line for line in read_metrics(path) if line["step"] <= done]
        with replace_when_done(path) as part:
            part.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        if recipe.tensorboard:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, step: int, figures: Figures, clips: Sequence[int]) -> None:
        """Waits for a step and reports it. Raises FloatingPointError, naming the step and its
        clips, where the loss or its gradients are not finite."""
        values = {name: float(value) for name, value in _flat(figures).items()}
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        if not all(map(math.isfinite, (values["loss"], values["grad_norm"]))):
            named = ", ".join(dict.fromkeys(map(self._name_of, clips)))
            got = f"loss {values['loss']:g} and gradients of norm {values['grad_norm']:g}"
            raise FloatingPointError(
                f"step {step} must be finite: got {got} with the clips {named}"
            )
        if self._file is not None:
            line = {"step": step, "loss": values.pop("loss"), "seconds": round(seconds, 4)} | values
            self._file.write(f"{json.dumps(line)}\n")
            self._file.flush()
            if self._events is not None:
                for name, value in line.items():
                    self._events.add_scalar(name, value, step)
            self._show(step, line["loss"], now)

    def _show(self, step: int, loss: float, now: float) -> None:
        self._loss = loss if self._loss is None else SMOOTH * self._loss + (1 - SMOOTH) * loss
        if step == self._done + 1:
            self._started = now  # the time before was spent on compiling
        terminal, last = sys.stderr.isatty(), step == self._steps
        if not (terminal or last or step == self._done + 1 or now - self._printed > QUIET):
            return
        self._printed = now
        each = (now - self._started) / max(step - self._done - 1, 1)
        line = f"step {step} of {self._steps}: loss {self._loss:.4f}"
        if step > self._done + 1:
            minutes, seconds = divmod(round(each * (self._steps - step)), 60)
            rate = f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s a step"
            line += f", {rate}, {minutes}:{seconds:02d} left"
        with suppress(BrokenPipeError):  # training goes on where nobody reads its lines any more
            if terminal:
                self._say(f"\r{line}   ", end="\n" if last else "")
            else:
                self._say(line)

    def close(self) -> None:
        for each in (self._file, self._events):
            if each is not None:
                each.close()


def check_tensorboard() -> None:
    """Raises ValueError where the library that writes TensorBoard's events is missing."""
    if not find_spec("tensorboardX"):
        raise ValueError("tensorboard needs its library: pip install 'cogi2v-jax[tensorboard]'")


def _flat(figures: Figures) -> dict[str, np.ndarray]:
    values = {"loss": figures.loss, "grad_norm": figures.norm, "learning_rate": figures.rate}
    return {name: np.asarray(value) for name, value in (values | figures.parts).items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a kill may have cut the last one."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
